"""Ctrl-C while the command is still being imported: no word, no traceback, 130."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

LIMIT_S = 50.0

PROGRAM = """
import json, os, signal, sys, tempfile

from devmem_tcp_main import main


class Interrupts:
    '''Finds no module, but at each that is looked for has a fork of this process interrupted, and notes how it ends.'''

    def __init__(self):
        self.ends = []

    def find_spec(self, name, path=None, target=None):
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if not child:
                sys.meta_path.remove(self)
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                os.kill(os.getpid(), signal.SIGINT)
                return None  # and go on, as far as that lets it
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            self.ends.append((name, status, said.read().decode()))
        return None


loaded = [name for name in ("numpy", "click", "devmem_tcp") if name in sys.modules]
interrupts = Interrupts()
sys.meta_path.insert(0, interrupts)
sys.argv[:] = ["devmem-tcp", *json.loads(sys.argv[1])]
pid = os.getpid()
try:
    main()
finally:
    if os.getpid() == pid:
        sys.meta_path.remove(interrupts)
        with open(os.environ["ENDS"], "w") as file:
            json.dump([loaded, interrupts.ends], file)
"""


@pytest.mark.parametrize("command", [["fetch", "--help"], ["doctor", "--json"]], ids=" ".join)
def test_at_every_import(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDS", str(tmp_path / "ends"))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # a fork of many threads is none
    run = [sys.executable, "-c", PROGRAM, json.dumps(command)]
    done = subprocess.run(run, capture_output=True, timeout=LIMIT_S, text=True)
    assert (done.returncode in (0, 1), done.stderr) == (True, "")
    loaded, ends = json.loads((tmp_path / "ends").read_text())
    assert loaded == [], "what is imported before main is not in its care"
    assert {"devmem_tcp", "numpy", "click", f"devmem_tcp.cli.{command[0]}"} <= {name for name, _, _ in ends}
    assert len(ends) > 200
    verb = False
    for name, status, said in ends:
        verb |= said != ""
        assert (name, status, said) == (name, 130, "devmem-tcp: interrupted\n" if verb else "")


def test_the_console_script_is_this() -> None:
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"devmem-tcp": "devmem_tcp_main:main"}
