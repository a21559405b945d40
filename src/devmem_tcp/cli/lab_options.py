"""The options of ``devmem-tcp lab``: which parts to take, what guests to boot."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from devmem_tcp.cli.options import MIB, Size
from devmem_tcp.lab.stage import MAX_MTU, StagePlan
from devmem_tcp.lab.vm import kernels, programs
from devmem_tcp.lab.vm.apt import Progress
from devmem_tcp.lab.vm.cache import Cache
from devmem_tcp.lab.vm.kernels import Kernel
from devmem_tcp.lab.vm.packages import Installation
from devmem_tcp.lab.vm.programs import Programs
from devmem_tcp.lab.vm.qemu import GuestShape


class Fault(click.ParamType[tuple[str, float]]):
    """One fault of the NICs: ``NAME=NUMBER``."""

    name = "name=number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        name, _, number = value.partition("=")
        try:
            parsed = float(number)
        except ValueError:
            self.fail(f"{value!r} is not NAME=NUMBER, as in reorder=0.01", param, ctx)
        return name.strip().replace("-", "_"), int(parsed) if parsed.is_integer() else parsed


@dataclass(frozen=True, kw_only=True)
class PartsChoice:
    """Which kernel, QEMU and mirror: the options of ``parts_options``."""

    kernel: str | None
    modules: Path | None
    qemu: str | None
    mirror: str | None

    def gather(self, cache: Cache, progress: Progress) -> tuple[Programs, Kernel]:
        """Return the parts, fetched first where they are not in the cache.

        Raises:
            DevmemError: a part is not there, or cannot be fetched.
        """
        installation = Installation(cache, progress, mirror=self.mirror)
        if self.kernel is not None and (os.sep in self.kernel or Path(self.kernel).exists()):
            kernel = kernels.brought(Path(self.kernel), self.modules)
        elif self.modules is not None:
            raise click.UsageError("--modules goes with --kernel PATH")
        else:
            kernel = installation.kernel(self.kernel)
        if self.qemu is None:
            return installation.programs(), kernel
        fetched = programs.unpacked(cache.programs) if installation.held_programs() else None
        return programs.brought(self.qemu, fetched), kernel


@dataclass(frozen=True, kw_only=True)
class GuestChoice:
    """How the guests are made: the options of ``guest_options``."""

    plan: StagePlan
    accelerator: str
    timeout_s: float | None
    quiet: bool


def parts_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which kernel and QEMU to take; the command gets them as ``parts``."""

    def wrapped(
        *args: Any, kernel: str | None, modules: Path | None, qemu: str | None, mirror: str | None, **rest: Any
    ) -> Any:
        return command(*args, parts=PartsChoice(kernel=kernel, modules=modules, qemu=qemu, mirror=mirror), **rest)

    return _with_options(
        command,
        wrapped,
        click.option(
            "--kernel",
            metavar="VERSION|PATH",
            help="Kernel of the suites, as 7.2 or 7.2.12; or a bzImage, or the source tree it was built in."
            "  [default: the one in the cache]",
        ),
        click.option(
            "--modules",
            type=click.Path(path_type=Path),
            metavar="FOLDER",
            help="With --kernel PATH: its lib/modules/RELEASE, unless all it needs is built in.",
        ),
        click.option("--qemu", metavar="PATH", help="Your own qemu-system-x86_64, 10.1 or later, with vfio-user."),
        click.option("--mirror", metavar="URI", help="Debian mirror.  [default: the one that apt here uses]"),
    )


def guest_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what guests to boot; the command gets them as ``guests``."""

    def wrapped(*args: Any, **given: Any) -> Any:
        return command(*args, guests=_guest_choice(given), **given)

    return _with_options(
        command,
        wrapped,
        click.option("--nics", type=click.IntRange(0, 16), help="NICs of each guest.  [default: 2; 1 of two hosts]"),
        click.option("--queues", type=click.IntRange(1, 32), default=4, show_default=True, help="Queues of each NIC."),
        click.option("--mtu", type=click.IntRange(68, MAX_MTU), default=1500, show_default=True, help="MTU in bytes."),
        click.option("--memory", type=Size(), default="1G", show_default=True, help="Memory of each guest."),
        click.option("--smp", type=click.IntRange(1, 64), default=2, show_default=True, help="Processors of each."),
        click.option("--two-hosts", is_flag=True, help="Boot two guests on one wire."),
        click.option("--drop", type=click.FloatRange(0, 1), help="Probability that a NIC loses a packet."),
        click.option(
            "--fault", type=Fault(), multiple=True, help="Any fault of the NICs, as reorder=0.01; repeatable."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of everything random in the NICs."),
        click.option("--pcap", type=click.Path(path_type=Path), metavar="FILE", help="Capture all packets, as pcapng."),
        click.option(
            "--host-port",
            type=click.Path(path_type=Path),
            metavar="PATH",
            help="Make a UNIX socket where processes of this machine plug into the wire: SOCK_SEQPACKET, one Ethernet"
            " frame a message.",
        ),
        click.option(
            "--second-memory",
            type=(Size(), click.Path(path_type=Path)),
            metavar="SIZE FILE",
            help="A second NUMA node, kept in that file: memory to check from outside.",
        ),
        click.option(
            "--accel",
            type=click.Choice(["auto", "kvm", "tcg"]),
            default="auto",
            show_default=True,
            help="auto: KVM if a guest really boots with it.",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            help="Longest time for the command, from when the guest is up.  [default: for ever]",
        ),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but what the command prints, and errors."),
    )


def _guest_choice(given: dict[str, Any]) -> GuestChoice:
    """Take the options of ``guest_options`` out of ``given``."""
    two_hosts, nics, drop = given.pop("two_hosts"), given.pop("nics"), given.pop("drop")
    size, path = given.pop("second_memory") or (0, None)
    faults = dict(given.pop("fault"))
    if drop is not None:
        faults["drop"] = drop
    plan = StagePlan(
        hosts=2 if two_hosts else 1,
        nics=nics if nics is not None else 1 if two_hosts else 2,
        queues=given.pop("queues"),
        mtu=given.pop("mtu"),
        shape=GuestShape(
            memory_mib=given.pop("memory") // MIB,
            cpus=given.pop("smp"),
            second_memory=path,
            second_memory_mib=size // MIB,
        ),
        faults=faults,
        seed=given.pop("seed"),
        capture=given.pop("pcap"),
        host_port=given.pop("host_port"),
    )
    if size and two_hosts:
        raise click.UsageError("--second-memory is for one guest")
    return GuestChoice(
        plan=plan, accelerator=given.pop("accel"), timeout_s=given.pop("timeout"), quiet=given.pop("quiet")
    )


def _with_options(
    command: Callable[..., Any], wrapped: Callable[..., Any], *options: Callable[[Any], Any]
) -> Callable[..., Any]:
    """Give ``wrapped``, which stands for ``command``, its name, its options and some more."""
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__click_params__ = list(getattr(command, "__click_params__", ()))  # type: ignore[attr-defined]
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped
