"""Whether KVM really boots a guest here, found by trying."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Final

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab.vm import processes
from devmem_tcp.lab.vm.kernels import Kernel
from devmem_tcp.lab.vm.programs import Programs
from devmem_tcp.lab.vm.qemu import probe_command

_KVM: Final = "/dev/kvm"
_PROBE_S: Final = 20.0
_POLL_S: Final = 0.05
_BOOTED: Final = b"Unable to mount root fs"  # as far as a kernel without a root comes: init/do_mounts.c
_REFUSED: Final = b"KVM"  # QEMU speaks of it only when it fails


def accelerator(programs: Programs, kernel: Kernel, record: Path, wanted: str = "auto") -> str:
    """Return what is to run a guest: ``kvm``, or ``tcg``, which is software emulation.

    A ``/dev/kvm`` that opens proves nothing: nested virtualization may lack an instruction that the kernel uses. So the
    kernel is booted once, without a root, until it complains of that.

    Args:
        record: file that keeps the answer until the host boots again.
        wanted: ``kvm``, ``tcg``, or ``auto``: KVM where a guest boots with it.

    Raises:
        DevmemError: KVM is wanted, and no guest boots with it.
    """
    if wanted == "tcg":
        return "tcg"
    if _kvm_boots(programs, kernel, record):
        return "kvm"
    if wanted == "kvm":
        what = f"{kernel.name} does not boot with KVM on this machine" if _kvm_opens() else f"{_KVM} cannot be opened"
        raise DevmemError(what, hint="--accel auto, or tcg: software emulation runs it anywhere, but slower")
    return "tcg"


def recorded(record: Path) -> str:
    """Say in words what is known about KVM here, without trying."""
    if not _kvm_opens():
        return f"{_KVM} cannot be opened: software emulation"
    found = _read(record)
    if not str(found.get("key", "")).startswith(_boot_id()):
        return "not tried since this machine booted"
    return "a guest boots with it" if found["kvm"] else "a guest does not boot with it: software emulation"


def _kvm_opens() -> bool:
    return os.access(_KVM, os.R_OK | os.W_OK)


def _kvm_boots(programs: Programs, kernel: Kernel, record: Path) -> bool:
    """Say whether this kernel boots with KVM; tried once, and recorded."""
    if not _kvm_opens():
        return False
    key = f"{_boot_id()} {kernel.image} {' '.join(programs.qemu)}"
    found = _read(record)
    if found.get("key") == key:
        return bool(found["kvm"])
    boots = _boots(programs, kernel)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"key": key, "kvm": boots}) + "\n", encoding="utf-8")
    return boots


def _read(record: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(record.read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _boots(programs: Programs, kernel: Kernel) -> bool:
    with processes.socket_folder() as folder:
        console, log = folder / "console", folder / "log"
        command = probe_command(programs, kernel, "kvm", console)
        with processes.running(command, log, environment=programs.environment) as qemu:
            deadline = time.monotonic() + _PROBE_S
            while time.monotonic() < deadline and _REFUSED not in log.read_bytes():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    qemu.wait(_POLL_S)
                    break
            qemu.kill()  # with KVM in trouble it may not listen
        return console.exists() and _BOOTED in console.read_bytes()
