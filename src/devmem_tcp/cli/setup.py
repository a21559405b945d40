"""What recv and send set up on the NIC, each piece put back on the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import click

from devmem_tcp import memory
from devmem_tcp.broker.client import BrokerMemory
from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.cli.failure import say
from devmem_tcp.cli.report import ListeningEvent, print_json
from devmem_tcp.contract import DevmemSocket, Listener, Nic
from devmem_tcp.doors import open_nic
from devmem_tcp.errors import DevmemError
from devmem_tcp.nicmodel.isolation import weights_without
from devmem_tcp.software.options import SoftwareOptions
from devmem_tcp.types import Address

_ALLOCATORS: Final[dict[str, Callable[[], Allocator]]] = {
    "host": memory.Host,
    "udmabuf": memory.Udmabuf,
    "dma-heap": memory.DmaHeap,
}


_BROKERED: Final = {"udmabuf": "udmabuf", "dma-heap": "dma-heap system"}


@dataclass(frozen=True, kw_only=True)
class NicChoice:
    """Which NIC, backend and memory the user asked for: the options of ``backend_options``."""

    nic: str
    backend: str
    via: str | None
    memory: str | None
    buffer_bytes: int
    frag_size: int | None
    congestion: str | None
    hostile_seed: int | None

    def open(self) -> Nic:
        """Open the NIC.

        Raises:
            click.UsageError: an option of the software backend for the kernel's.
            ValueError, KernelError, BackendUnavailable: as ``open_nic``.
        """
        wanted = {"frag_size": self.frag_size, "congestion": self.congestion, "hostile_seed": self.hostile_seed}
        given: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
        if given and self.backend == "kernel":
            raise click.UsageError("--frag-size, --congestion and --hostile are for the software backend alone")
        return open_nic(self.nic, backend=self.backend, software=SoftwareOptions(**given), via=self.via)

    def allocate(self, nic: Nic) -> Buffer:
        """Allocate the buffer to bind to ``nic``; by the broker, if there is one."""
        real = nic.capabilities.zero_copy
        kind = self.memory or ("udmabuf" if real else "host")
        if real and self.via is not None and kind in _BROKERED:
            return BrokerMemory(self.via, _BROKERED[kind]).allocate(self.buffer_bytes)
        return _ALLOCATORS[kind]().allocate(self.buffer_bytes)


@dataclass(frozen=True, kw_only=True)
class ReportChoice:
    """What to print, and how long to wait: the options of ``report_options``."""

    hashing: bool
    as_json: bool
    progress: str
    quiet: bool
    timeout_s: float | None

    def check(self) -> None:
        """Raise click.UsageError if the options do not go together."""
        if self.progress == "json" and not self.as_json:
            raise click.UsageError("--progress json goes with --json")


@contextlib.contextmanager
def steering(nic: Nic, queue: int, *, spread: bool = True) -> Iterator[None]:
    """Turn header split on and keep ordinary flows off ``queue``, until the block ends; the host does of a leased one.

    Args:
        spread: set RSS so, unless it is; if not, that is somebody else's to do.

    Raises:
        DevmemError: the NIC has no such queue, or no other one for ordinary flows.
        NicSettingError: a setting was refused.
    """
    queues = nic.capabilities.rx_queues
    if not 0 <= queue < queues:
        raise DevmemError(f"{nic.name} has no RX queue {queue}", hint=f"--queue takes 0 to {queues - 1}")
    if queues == 1:
        raise DevmemError(f"{nic.name} has one RX queue: none is left for ordinary flows")
    if not nic.capabilities.settings:
        yield
        return
    with contextlib.ExitStack() as held:
        held.enter_context(nic.set_header_split("on"))
        if spread and queue in (table := nic.rss_table):
            held.enter_context(nic.set_rss(weights=weights_without([queue], table, queues)))
        yield


def steered(
    nic: Nic, queue: int, *, src_port: int | None = None, dst_port: int | None = None
) -> contextlib.AbstractContextManager[object]:
    """Steer a TCP port's flows to ``queue``, until the block ends; those to a leased queue are steered by the host."""
    if not nic.capabilities.settings:
        return contextlib.nullcontext()
    return nic.add_ntuple(src_port=src_port, dst_port=dst_port, queue=queue)


def accept_one(nic: Nic, listener: Listener, choice: ReportChoice, what: str) -> DevmemSocket:
    """Say where ``listener`` listens, take one connection and close it: the next one is refused, not left waiting.

    Args:
        what: more to say about the listener, for people.

    Raises:
        Timeout: nobody came in the time given.
    """
    host, port = listener.address
    if choice.as_json:
        print_json(ListeningEvent(host=host, port=port))
    elif not choice.quiet:
        say(f"listening on {hostport((host, port))} ({nic.capabilities.backend} backend, {nic.name}{what})")
    listener.settimeout(choice.timeout_s)
    sock = listener.accept()
    listener.close()
    return sock


def hostport(address: Address) -> str:
    """Write an address as the command line takes it, IPv6 in brackets."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
