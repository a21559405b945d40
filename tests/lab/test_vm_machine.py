"""A machine whose QEMU is a stand-in: what it makes of consoles, time, and its own end."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from devmem_tcp.errors import DevmemError, Timeout
from devmem_tcp.lab.vm import machine
from devmem_tcp.lab.vm.kernels import Kernel
from devmem_tcp.lab.vm.machine import GuestFailed, Job, Machine, guest_environment
from devmem_tcp.lab.vm.programs import Programs
from devmem_tcp.lab.vm.qemu import GuestShape

PRELUDE = """\
import json, os, re, sys, time
line = " ".join(sys.argv)
plan = json.load(open(re.search(r"init=(\\S+)init", line)[1] + "plan.json"))
fds = {name: int(fd) for name, fd in re.findall(r"socket,id=(\\w+),fd=(\\d+)", line)}
def say(text, channel="console"):
    os.write(fds[channel], text.replace("NONCE", plan["nonce"]).encode())
"""


def made(folder: Path, behaviour: str, **job: object) -> Machine:
    """Return a machine whose QEMU runs ``behaviour``, Python, after PRELUDE."""
    script = folder / "qemu.py"
    script.write_text(PRELUDE + behaviour)
    stand_ins = Programs(
        qemu=(sys.executable, "-I", "-S", str(script)),
        virtiofsd=(sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"),
        environment={},
        tools=Path("/tools"),
    )
    return Machine(
        stand_ins,
        Kernel("test", Path("/vmlinuz"), None),
        GuestShape(),
        Job(command=("job", "argument"), **job),  # type: ignore[arg-type]
        folder=folder,
        accelerator="tcg",
    )


def waited(guest: Machine, timeout_s: float | None = None, source: int | None = None) -> tuple[int, bytes, bytes]:
    out, err = bytearray(), bytearray()
    with guest:
        code = guest.wait(out=out.extend, err=err.extend, timeout_s=timeout_s, source=source)
    return code, bytes(out), bytes(err)


def test_the_jobs_code_and_output_come_back(tmp_path: Path) -> None:
    behaviour = """
say("[1.0] devmem-lab NONCE ready\\r\\n")
say("to out", "out"); say("to err", "err")
say("[2.0] devmem-lab NONCE exit 42\\r\\n[2.1] reboot: Power down\\r\\n")
"""
    assert waited(made(tmp_path, behaviour)) == (42, b"to out", b"to err")


def test_input_goes_to_the_guest(tmp_path: Path) -> None:
    readable, writable = os.pipe()
    os.write(writable, b"some input")
    os.close(writable)
    behaviour = """
say("devmem-lab NONCE ready\\n")
got = b""
while not got.endswith(bytes(4)): got += os.read(fds["in"], 100)
say(repr(got), "out"); say("devmem-lab NONCE exit 0\\n")
"""
    assert waited(made(tmp_path, behaviour, input=True), source=readable)[1] == (
        repr(b"\x0a\0\0\0some input\0\0\0\0").encode()
    )
    os.close(readable)


def test_the_plan_says_what_to_run_and_where(tmp_path: Path) -> None:
    guest = made(tmp_path, 'say("devmem-lab NONCE exit 0\\n")', environment={"NAME": "value"}, cwd=tmp_path)
    waited(guest)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["command"] == ["job", "argument"]
    assert plan["cwd"] == str(tmp_path)
    assert plan["environment"]["NAME"] == "value"
    init = (tmp_path / "init").read_text()
    assert init.startswith("#!/bin/sh\n")
    assert "guest_init.py" in init
    assert os.access(tmp_path / "init", os.X_OK)


def test_a_warning_of_the_kernel_fails_a_job_that_went_well(tmp_path: Path) -> None:
    behaviour = """
say("devmem-lab NONCE ready\\n[3.0] WARNING: net/core/dev.c:1 at f+0x1/0x2, CPU#0: x/1\\ndevmem-lab NONCE exit 0\\n")
"""
    with pytest.raises(GuestFailed, match=r"WARNING: net/core/dev\.c:1") as caught:
        waited(made(tmp_path, behaviour))
    assert caught.value.log == tmp_path / "console.log"
    assert str(tmp_path) in caught.value.hint


def test_a_panic_shows_the_end_of_the_log(tmp_path: Path) -> None:
    behaviour = """
say("devmem-lab NONCE ready\\n[3.0] line before\\n[3.1] Kernel panic - not syncing: Fatal exception")
"""
    with pytest.raises(GuestFailed, match=r"(?s)Kernel panic.*line before"):
        waited(made(tmp_path, behaviour))


def test_an_init_that_could_not_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(GuestFailed, match="could not be set up: OSError: loading gve"):
        waited(made(tmp_path, 'say("devmem-lab NONCE failed OSError: loading gve\\n")'))


def test_a_qemu_that_dies_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(GuestFailed, match=r"(?s)ended before its job did.*qemu said:.*no such machine"):
        waited(made(tmp_path, 'sys.exit("no such machine")'))


def test_a_job_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(Timeout, match="the job took too long"):
        waited(made(tmp_path, 'say("devmem-lab NONCE ready\\n"); time.sleep(60)'), timeout_s=0.05)


def test_a_guest_that_does_not_boot_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_BOOT_S", 0.3)
    with pytest.raises(Timeout, match=r"(?s)the guest's boot took too long.*last words"):
        waited(made(tmp_path, 'say("last words\\n"); time.sleep(60)'))


def test_a_guest_that_does_not_power_off_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_POWER_OFF_S", 0.05)
    with pytest.raises(Timeout, match="power-off took too long"):
        waited(made(tmp_path, 'say("devmem-lab NONCE ready\\ndevmem-lab NONCE exit 0\\n"); time.sleep(60)'))


def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    behaviour = 'say("devmem-lab NONCE ready\\n"); say(str(os.getpid()), "out"); time.sleep(60)'
    got = bytearray()

    def interrupt(data: bytes) -> None:
        got.extend(data)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), made(tmp_path, behaviour) as guest:
        guest.wait(out=interrupt, err=got.extend)
    with pytest.raises(ProcessLookupError):
        os.kill(int(got), 0)


def test_stopping_from_another_thread_ends_the_wait(tmp_path: Path) -> None:
    with made(tmp_path, 'say("devmem-lab NONCE ready\\n"); time.sleep(60)') as guest:
        stopper = threading.Thread(target=guest.stop)
        started = time.monotonic()
        with pytest.raises(GuestFailed, match="ended before its job did"):
            guest.wait(out=bytes, err=bytes, booted=stopper.start)
        stopper.join()
        assert time.monotonic() - started < 5


def test_a_folder_with_spaces_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    with pytest.raises(DevmemError, match="path with spaces"):
        waited(made(folder, ""))


def test_nics_and_places_must_match(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 NICs are plugged in, 0 have a place"):
        Machine(
            Programs(qemu=("q",), virtiofsd=("v",), environment={}, tools=None),
            Kernel("test", Path("/vmlinuz"), None),
            GuestShape(nic_sockets=(Path("/nic0"),)),
            Job(command=("true",)),
            folder=tmp_path,
            accelerator="tcg",
        )


def test_the_guests_tools_come_last_on_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/first:/usr/bin")
    path = guest_environment({"X": "1"}, Path("/tools"))["PATH"].split(":")
    assert path[0] == "/first"
    assert path[-1] == "/tools"
    assert path.count("/usr/bin") == 1
    assert "/usr/sbin" in path
