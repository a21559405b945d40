"""KVM or software emulation, with stand-ins for /dev/kvm and QEMU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab.vm import acceleration
from devmem_tcp.lab.vm.kernels import Kernel
from devmem_tcp.lab.vm.programs import Programs

BOOTS = 'open(console, "w").write("Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)")'
FAILS = 'sys.stderr.write("KVM internal error. Suberror: 1\\n"); sys.stderr.flush(); time.sleep(60)'
QEMU = """\
import re, sys, time
console = re.search(r"file:(\\S+)", " ".join(sys.argv))[1]
open({tried!r}, "a").write("tried ")
"""


class Host:
    """A machine with a /dev/kvm that opens, and a QEMU that behaves as it is told."""

    def __init__(self, folder: Path, behaviour: str, name: str = "qemu.py") -> None:
        self.record = folder / "kvm.json"
        self._tried = folder / "tried"
        script = folder / name
        script.write_text(QEMU.format(tried=str(self._tried)) + behaviour)
        self.programs = Programs(
            qemu=(sys.executable, "-I", "-S", str(script)), virtiofsd=(), environment={}, tools=None
        )

    def choose(self, wanted: str = "auto", kernel: str = "/vmlinuz") -> str:
        return acceleration.accelerator(self.programs, Kernel("7.3.4", Path(kernel), None), self.record, wanted)

    @property
    def tries(self) -> int:
        return len(self._tried.read_text().split()) if self._tried.exists() else 0


@pytest.fixture(autouse=True)
def kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A /dev/kvm that can be opened."""
    node = tmp_path / "kvm"
    node.touch()
    monkeypatch.setattr(acceleration, "_KVM", str(node))
    return node


def test_kvm_is_taken_where_a_guest_boots_with_it_and_tried_once(tmp_path: Path) -> None:
    host = Host(tmp_path, BOOTS)
    assert [host.choose() for _ in range(2)] == ["kvm", "kvm"]
    assert host.choose("kvm") == "kvm"
    assert host.tries == 1
    assert acceleration.recorded(host.record) == "a guest boots with it"
    host.choose(kernel="/another")
    assert host.tries == 2, "another kernel may use what this machine lacks"


def test_kvm_that_opens_but_boots_nothing_is_not_taken(tmp_path: Path) -> None:
    host = Host(tmp_path, FAILS)
    assert [host.choose() for _ in range(2)] == ["tcg", "tcg"]
    assert host.tries == 1
    assert "does not boot with it" in acceleration.recorded(host.record)


def test_who_insists_on_kvm_is_told_why_not(tmp_path: Path, kvm: Path) -> None:
    host = Host(tmp_path, FAILS)
    with pytest.raises(DevmemError, match=r"7\.3\.4 does not boot with KVM on this machine") as caught:
        host.choose("kvm")
    assert "--accel auto" in caught.value.hint
    kvm.unlink()
    with pytest.raises(DevmemError, match=f"{kvm} cannot be opened"):
        host.choose("kvm")
    assert host.tries == 1


def test_who_wants_emulation_gets_it_untried(tmp_path: Path) -> None:
    host = Host(tmp_path, BOOTS)
    assert host.choose("tcg") == "tcg"
    assert host.tries == 0
    assert acceleration.recorded(host.record) == "not tried since this machine booted"


def test_without_a_kvm_nothing_is_tried(tmp_path: Path, kvm: Path) -> None:
    kvm.unlink()
    host = Host(tmp_path, BOOTS)
    assert host.choose() == "tcg"
    assert host.tries == 0
    assert "cannot be opened" in acceleration.recorded(host.record)
