"""Programs unpacked from packages, run in place with their own libraries and their own loader.

The host's C library may be older than the one they were built for; the loader of their own, started as a program with
``--library-path``, needs nothing of the host but its kernel.
"""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from devmem_tcp.errors import DevmemError

GUEST_TOOLS: Final = {
    "bridge": "usr/sbin/bridge",
    "ethtool": "usr/sbin/ethtool",
    "insmod": "usr/bin/kmod",
    "ip": "usr/bin/ip",
    "iperf3": "usr/bin/iperf3",
    "lsmod": "usr/bin/kmod",
    "modinfo": "usr/bin/kmod",
    "modprobe": "usr/bin/kmod",
    "ping": "usr/bin/ping",
    "rmmod": "usr/bin/kmod",
    "ss": "usr/bin/ss",
    "tc": "usr/sbin/tc",
    "tcpdump": "usr/bin/tcpdump",
}
"""What a guest finds on its PATH, after the host's own programs, and where the packages keep it."""

_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
_QEMU: Final = "qemu-system-x86_64"
_VIRTIOFSD_PLACES: Final = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")


@dataclass(frozen=True)
class Programs:
    """How to start QEMU and virtiofsd: command prefixes, and what QEMU wants in its environment."""

    qemu: tuple[str, ...]
    virtiofsd: tuple[str, ...]
    environment: dict[str, str]
    tools: Path | None
    """A folder of the guest's tools, to go on its PATH; None: the host's own must do."""


def loader_command(root: Path, program: str) -> tuple[str, ...]:
    """Return the command that starts a program (a path below ``root``) with the loader and libraries below ``root``."""
    loader = root / "usr/lib64/ld-linux-x86-64.so.2"
    return (str(loader), "--library-path", str(root / _LIBRARIES), str(root / program))


def unpacked(root: Path) -> Programs:
    """Return the programs unpacked below ``root``."""
    share = root / "usr/share"
    return Programs(
        qemu=(*loader_command(root, f"usr/bin/{_QEMU}"), "-L", str(share / "qemu"), "-L", str(share / "seabios")),
        virtiofsd=loader_command(root, "usr/libexec/virtiofsd"),
        environment={"QEMU_MODULE_DIR": str(root / _LIBRARIES / "qemu")},
        tools=root / "bin",
    )


def brought(qemu: str, fetched: Programs | None) -> Programs:
    """Return the user's own QEMU, with the virtiofsd and the tools that were fetched, or else the host's.

    Args:
        qemu: path of the program, or a name on PATH.
        fetched: what is in the cache, if it is there.

    Raises:
        DevmemError: there is no such QEMU, or no virtiofsd.
    """
    found = shutil.which(qemu)
    if found is None:
        raise DevmemError(f"{qemu}: no such program", hint="--qemu takes the path of qemu-system-x86_64, 10.1 or later")
    own = (os.path.abspath(found),)
    if fetched is not None:
        return Programs(qemu=own, virtiofsd=fetched.virtiofsd, environment={}, tools=fetched.tools)
    places = [path for path in _VIRTIOFSD_PLACES if os.access(path, os.X_OK)]
    virtiofsd = shutil.which("virtiofsd") or next(iter(places), None)
    if virtiofsd is None:
        raise DevmemError(
            "no virtiofsd on this machine, which goes with your own QEMU",
            hint="devmem-tcp lab setup fetches one; or install package virtiofsd",
        )
    return Programs(qemu=own, virtiofsd=(virtiofsd,), environment={}, tools=None)


def write_tool_wrappers(root: Path, final_root: Path) -> None:
    """Write ``bin/NAME`` below ``root`` for each of the guest's tools that is there.

    Args:
        final_root: where ``root`` will be when a wrapper runs.
    """
    folder = root / "bin"
    folder.mkdir(exist_ok=True)
    for name, program in GUEST_TOOLS.items():
        if not (root / program).exists():
            continue
        loader, *arguments = loader_command(final_root, program)
        command = shlex.join((loader, "--argv0", name, *arguments))  # kmod goes by the name it is called by
        wrapper = folder / name
        wrapper.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        wrapper.chmod(0o755)
