"""``devmem-tcp lab shell`` on a real terminal; a stand-in for QEMU runs the guest's side of it on the host."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from devmem_tcp.lab.vm import guest_init

QEMU = f"""\
#!{sys.executable} -IS
import importlib.util, json, os, re, sys
line = " ".join(sys.argv)
plan = json.load(open(re.search(r"init=(\\S+)init", line)[1] + "plan.json"))
fds = {{name: int(fd) for name, fd in re.findall(r"socket,id=(\\w+),fd=(\\d+)", line)}}
spec = importlib.util.spec_from_file_location("guest_init", {guest_init.__file__!r})
guest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(guest)
def say(text):
    os.write(fds["console"], f"devmem-lab {{plan['nonce']}} {{text}}\\n".encode())
say("ready")
say(f"exit {{guest.run_on_terminal(plan, fds['in'], fds['out'])}}")
"""
VIRTIOFSD = "#!/bin/sh\nexec sleep 60\n"
SHELL = f"""\
#!{sys.executable} -IS
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
def tell(word):
    size = os.get_terminal_size(0)
    print(word, size.lines, size.columns, flush=True)
tell("first")
for _ in range(2):
    signal.sigwait([signal.SIGWINCH])
    tell("now")
sys.exit(5 if sys.stdin.readline() == "end\\n" else 1)
"""


class Terminal:
    """The user's side of a terminal that a program runs on."""

    def __init__(self, command: list[str], environment: dict[str, str], size: tuple[int, int]) -> None:
        self._master, slave = os.openpty()
        self._seen = b""
        self.resize(*size)
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str) -> None:
        """Read until the program has written something; what came up to there is not looked at again."""
        while not (found := re.search(pattern.encode(), self._seen)):
            try:
                self._seen += os.read(self._master, 1 << 16)
            except OSError:
                raise AssertionError(f"ended without {pattern}: {self._seen.decode()}") from None
        self._seen = self._seen[found.end() :]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A lab shell on a terminal of 30 rows and 100 columns."""
    for name, text in (("my-qemu", QEMU), ("virtiofsd", VIRTIOFSD), ("my-shell", SHELL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bzImage").touch()
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SHELL": str(tmp_path / "my-shell"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "devmem_tcp", "lab", "shell", "--nics", "0", "--accel", "tcg"]
    command += ["--kernel", str(tmp_path / "bzImage"), "--qemu", str(tmp_path / "my-qemu")]
    with contextlib.closing(Terminal(command, environment, (30, 100))) as made:
        yield made


def test_the_guests_terminal_has_the_size_of_this_one_and_follows_it(terminal: Terminal) -> None:
    terminal.wait_for("first 30 100\r\n")
    terminal.resize(50, 132)
    terminal.wait_for("now 50 132\r\n")
    terminal.resize(24, 80)
    terminal.wait_for("now 24 80\r\n")
    terminal.type("end\r")
    assert terminal.process.wait() == 5
