"""Guests side by side, with a stand-in for QEMU: whose code counts, and who ends whom."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab import control
from devmem_tcp.lab.stage import HOST_VARIABLE, Stage, StagePlan, Streams
from devmem_tcp.lab.vm.kernels import Kernel
from devmem_tcp.lab.vm.machine import GuestFailed, Job
from devmem_tcp.lab.vm.programs import Programs

# Does what the job's command says: prints its host's number and exits, hangs, or dies.
QEMU = f"""\
import json, os, re, sys, time
line = " ".join(sys.argv)
plan = json.load(open(re.search(r"init=(\\S+)init", line)[1] + "plan.json"))
fds = {{name: int(fd) for name, fd in re.findall(r"socket,id=(\\w+),fd=(\\d+)", line)}}
os.write(fds["console"], f"devmem-lab {{plan['nonce']}} ready\\n".encode())
what, *rest = plan["command"]
if what == "hang":
    time.sleep(60)
if what == "exit":
    os.write(fds["out"], plan["environment"]["{HOST_VARIABLE}"].encode() + plan["hostname"].encode())
    os.write(fds["console"], f"devmem-lab {{plan['nonce']}} exit {{rest[0]}}\\n".encode())
"""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    script = tmp_path / "qemu.py"
    script.write_text(QEMU)
    stand_ins = Programs(
        qemu=(sys.executable, "-I", "-S", str(script)),
        virtiofsd=(sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"),
        environment={},
        tools=None,
    )
    kernel = Kernel("test", Path("/vmlinuz"), None)
    with Stage(StagePlan(hosts=2, nics=0), stand_ins, kernel, folder=tmp_path, accelerator="tcg") as made:
        yield made


def run(stage: Stage, *commands: tuple[str, ...], wait_for_all: bool = True) -> tuple[list[int], list[bytes]]:
    outputs = [bytearray() for _ in commands]
    codes = stage.run(
        [Job(command=command) for command in commands],
        [Streams(output.extend, output.extend) for output in outputs],
        wait_for_all=wait_for_all,
    )
    return codes, [bytes(output) for output in outputs]


def test_both_jobs_codes_and_names_come_back_in_order(stage: Stage, tmp_path: Path) -> None:
    assert run(stage, ("exit", "3"), ("exit", "0")) == ([3, 0], [b"0lab0", b"1lab1"])
    assert (tmp_path / "host1/plan.json").exists()


def test_the_first_ones_end_ends_the_other_where_it_is_to(stage: Stage) -> None:
    assert run(stage, ("exit", "5"), ("hang",), wait_for_all=False)[0] == [5]


@pytest.mark.parametrize("commands", [[("die",), ("hang",)], [("exit", "0"), ("die",)]])
def test_a_guest_that_fails_fails_all(stage: Stage, commands: list[tuple[str, ...]]) -> None:
    with pytest.raises(GuestFailed):
        run(stage, *commands)


def test_nics_are_numbered_over_the_guests_and_can_be_captured(tmp_path: Path) -> None:
    nothing = Programs(qemu=("q",), virtiofsd=("v",), environment={}, tools=None)
    plan = StagePlan(hosts=2, nics=1, faults={"drop": 0.5}, seed=7, capture=tmp_path / "all.pcapng")
    kernel = Kernel("test", Path("/vmlinuz"), None)
    with Stage(plan, nothing, kernel, folder=tmp_path, accelerator="tcg") as made:
        assert made.nics is not None
        faults = made.nics.ask(control.SetFaults(faults={}))
        assert {name: one["drop"] for name, one in faults.items()} == {"nic0": 0.5, "nic1": 0.5}
    assert (tmp_path / "all.pcapng").stat().st_size > 0


def test_a_wire_without_nics_has_its_host_port(tmp_path: Path) -> None:
    nothing = Programs(qemu=("q",), virtiofsd=("v",), environment={}, tools=None)
    plan = StagePlan(nics=0, host_port=tmp_path / "wire")
    kernel = Kernel("test", Path("/vmlinuz"), None)
    with (
        Stage(plan, nothing, kernel, folder=tmp_path, accelerator="tcg") as made,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end,
    ):
        end.connect(str(tmp_path / "wire"))
        assert made.nics is not None
        assert made.nics.ask(control.GetStatistics())["nics"] == {}
    assert not (tmp_path / "wire").exists()


def test_a_capture_that_ends_early_is_told(tmp_path: Path) -> None:
    nothing = Programs(qemu=("q",), virtiofsd=("v",), environment={}, tools=None)
    kernel = Kernel("test", Path("/vmlinuz"), None)
    for path, said in ((tmp_path / "all.pcapng", ""), (Path("/dev/full"), "No space left on device")):
        plan = StagePlan(nics=1, capture=path)
        with Stage(plan, nothing, kernel, folder=tmp_path, accelerator="tcg") as made:
            pass
        assert made.capture_failure == said


def test_a_capture_that_cannot_be_written_is_refused_before_anything_boots(tmp_path: Path) -> None:
    nothing = Programs(qemu=("q",), virtiofsd=("v",), environment={}, tools=None)
    plan = StagePlan(capture=tmp_path / "no folder/all.pcapng")
    stage = Stage(plan, nothing, Kernel("test", Path("/vmlinuz"), None), folder=tmp_path, accelerator="tcg")
    with pytest.raises(DevmemError, match="No such file"):
        stage.__enter__()
