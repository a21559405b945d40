"""The command lines of one guest: QEMU's and virtiofsd's. Nothing is started here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from devmem_tcp.lab.vm.kernels import Kernel
from devmem_tcp.lab.vm.programs import Programs

CHANNELS: Final = ("in", "out", "err")
"""The virtio-serial ports that carry the job's standard input, output and error."""

CONSOLE: Final = "console"
"""The channel of the guest's console, which is kept in a file too."""

_ROOT_TAG: Final = "hostroot"
_KERNEL_ARGUMENTS: Final = (
    "console=ttyS0",
    "loglevel=5",  # warnings too: a WARN is one
    "printk.devkmsg=on",  # the markers are never rate-limited away
    "panic=-1",  # with -no-reboot: QEMU ends at once
    "mitigations=off",
    "tsc=reliable",
    "rootfstype=virtiofs",
    "ro",
)


_ALL_LOW_MIB: Final = 2816  # where a q35 machine has less, all of it lies below 4 GiB; where not …
_LOW_MIB: Final = 2048  # … this much does, and the rest above: QEMU's hw/i386/pc_q35.c, pc_q35_init


@dataclass(frozen=True, kw_only=True)
class GuestShape:
    """How big a guest is, and what is plugged into it.

    ``second_memory`` backs a second NUMA node of ``second_memory_mib`` by that file: memory that NICs reach by DMA and
    that a process of the host can read. A file of its own is one range of physical addresses, so that an address is an
    offset in it.
    """

    memory_mib: int = 1024
    cpus: int = 2
    nic_sockets: tuple[Path, ...] = ()
    second_memory: Path | None = None
    second_memory_mib: int = 0

    def __post_init__(self) -> None:
        if self.memory_mib < 256:
            raise ValueError(f"a guest needs 256 MiB of memory or more, not {self.memory_mib}")
        if self.cpus < 1:
            raise ValueError("a guest needs a processor")
        if (self.second_memory is None) != (self.second_memory_mib == 0):
            raise ValueError("second memory needs a file and a size")
        whole_mib = self.memory_mib + self.second_memory_mib
        if self.second_memory is not None and whole_mib >= _ALL_LOW_MIB and self.memory_mib < _LOW_MIB:
            raise ValueError(
                f"a second memory behind {self.memory_mib} MiB would lie on both sides of the 4 GiB line: less than "
                f"{_ALL_LOW_MIB} MiB in all, or {_LOW_MIB} MiB and more before it"
            )


def virtiofsd_command(programs: Programs, listener: int, *, privileged: bool) -> list[str]:
    """Return the command that serves the host's root, read-only.

    Args:
        listener: fd of a listening UNIX socket that it inherits.
        privileged: whether it runs as root, and so can confine itself by chroot; else it serves what its user can read.
    """
    return [
        *programs.virtiofsd,
        f"--fd={listener}",
        "--shared-dir=/",
        "--readonly",
        "--cache=always",  # without it a Python start takes 4 to 6 s
        "--no-announce-submounts",  # the guest's overlay sees the host's other file systems as part of one
        *(("--sandbox=chroot", "--inode-file-handles=prefer") if privileged else ("--sandbox=none",)),
        "--log-level=error",
    ]


def qemu_command(
    programs: Programs,
    kernel: Kernel,
    shape: GuestShape,
    *,
    accelerator: str,
    console: Path,
    root_socket: Path,
    init: Path,
    channel_fds: Mapping[str, int],
) -> list[str]:
    """Return the command that boots a guest.

    Args:
        accelerator: ``kvm`` or ``tcg``.
        console: file that keeps what the guest's console says.
        root_socket: UNIX socket of virtiofsd.
        init: path, in the host's file system, of the program to run as PID 1.
        channel_fds: for each of ``CHANNELS``, and ``CONSOLE``, a connected socket that QEMU inherits.
    """
    arguments = " ".join((*_KERNEL_ARGUMENTS, f"root={_ROOT_TAG}", f"init={init}"))
    return [
        *programs.qemu,
        *_machine(shape, accelerator),
        *("-chardev", f"socket,id={CONSOLE},fd={channel_fds[CONSOLE]},logfile={_escaped(console)}"),
        *("-serial", f"chardev:{CONSOLE}"),
        *("-chardev", f"socket,id=root,path={_escaped(root_socket)}"),
        *("-device", f"vhost-user-fs-pci,chardev=root,tag={_ROOT_TAG}"),
        *_channels(channel_fds),
        *("-kernel", str(kernel.image), "-append", arguments),
        *_nics(shape.nic_sockets),
    ]


def probe_command(programs: Programs, kernel: Kernel, accelerator: str, console: Path) -> list[str]:
    """Return the command that boots a kernel with nothing to mount: where it runs at all, it ends for want of one."""
    return [
        *programs.qemu,
        *_machine(GuestShape(memory_mib=512, cpus=1), accelerator),
        *("-serial", f"file:{_escaped(console)}"),
        *("-kernel", str(kernel.image), "-append", "console=ttyS0 panic=-1"),
    ]


def _machine(shape: GuestShape, accelerator: str) -> list[str]:
    acceleration = "tcg,thread=multi,tb-size=256" if accelerator == "tcg" else accelerator
    command = [
        *("-machine", "q35", "-accel", acceleration, "-cpu", "host" if accelerator == "kvm" else "max"),
        *("-smp", str(shape.cpus), "-m", f"{shape.memory_mib + shape.second_memory_mib}M"),
        *("-object", f"memory-backend-memfd,id=ram,size={shape.memory_mib}M,share=on"),  # what devices map
        *("-numa", "node,nodeid=0,memdev=ram"),
    ]
    if shape.second_memory is not None:
        path = _escaped(shape.second_memory)
        backend = f"memory-backend-file,id=second,size={shape.second_memory_mib}M,mem-path={path},share=on"
        command += ["-object", backend, "-numa", "node,nodeid=1,memdev=second"]
    return [
        *command,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-monitor", "none"),
        *("-run-with", "exit-with-parent=on"),  # kill -9 of this program leaves no QEMU
    ]


def _channels(channel_fds: Mapping[str, int]) -> list[str]:
    command = ["-device", "virtio-serial-pci"]
    for name in CHANNELS:
        command += ["-chardev", f"socket,id={name},fd={channel_fds[name]}"]
        command += ["-device", f"virtserialport,chardev={name},name=devmem-lab.{name}"]
    return command


def _nics(sockets: Sequence[Path]) -> list[str]:
    command = []
    for index, path in enumerate(sockets):
        plug = {"driver": "vfio-user-pci", "id": f"nic{index}", "socket": {"type": "unix", "path": str(path)}}
        command += ["-device", json.dumps(plug)]
    return command


def _escaped(path: Path) -> str:
    """Write a path for one of QEMU's comma-separated options."""
    return str(path).replace(",", ",,")
