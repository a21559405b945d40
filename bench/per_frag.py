"""What one frag costs outside system calls: parsed out of control messages, made by the software backend, returned.

Everything runs for real, sockets and pages included, except the system call that would copy the payload: that one
answers at once that every page was filled. Frags are 4096 bytes, as the kernel makes them.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final
from unittest import mock

import click
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

import devmem_tcp as dmt
from devmem_tcp.contract import DevmemSocket
from devmem_tcp.sansio.tokens import dontneed_calls
from devmem_tcp.software.options import SoftwareOptions
from devmem_tcp.sys import calls
from devmem_tcp.types import PAGE_SIZE, FragKind, U32Array
from devmem_tcp.uapi.socket import FRAG_DTYPE, ControlColumns, build_control
from loopback import HOST

BATCHES: Final = (16, 256, 1024, 8192)
LIMIT_FRAGS: Final = 8192
LIMIT_NS: Final = 100.0
QUEUE: Final = 15
SAMPLE_FRAGS: Final = 65536  # at least so many a sample, so that a sample takes milliseconds


class Row(msgspec.Struct, frozen=True):
    """Nanoseconds per frag, medians, at one number of frags a batch."""

    frags: int
    parse_ns: float
    receive_ns: float
    release_ns: float
    coalesce_scattered_ns: float

    @property
    def parse_and_release_ns(self) -> float:
        return self.parse_ns + self.release_ns


def ns_per_frag(action: Callable[[], object], frags: int, samples: int) -> float:
    """Return how long a call takes per frag: the median over samples, each the mean of many calls."""
    repeats = max(1, SAMPLE_FRAGS // frags)
    found = []
    for _ in range(samples):
        start = time.perf_counter_ns()
        for _ in range(repeats):
            action()
        found.append((time.perf_counter_ns() - start) / (repeats * frags))
    return statistics.median(found)


def control_of(frags: int) -> bytes:
    """Build what the kernel writes for one recvmsg: frags of whole pages, tokens from 1."""
    table = np.zeros(frags, FRAG_DTYPE)
    table["offset"] = np.arange(frags) * PAGE_SIZE
    table["size"] = PAGE_SIZE
    table["token"] = np.arange(1, frags + 1)
    table["dmabuf_id"] = 1
    table["kind"] = FragKind.DMABUF
    return build_control(table)


def coalesce(tokens: U32Array) -> None:
    """Make all the DONTNEED arguments for these tokens."""
    for _ in dontneed_calls(tokens):
        pass


def fill_one(_sock: calls.Socket, target: memoryview | bytearray, _flags: int = 0) -> int:
    """Stand in for ``calls.recv_into``: the whole range was filled."""
    return len(target)


def fill_many(_sock: calls.Socket, targets: Sequence[memoryview], _flags: int = 0) -> int:
    """Stand in for ``calls.recvmsg_into``: every range was filled."""
    return sum(len(target) for target in targets)


@contextlib.contextmanager
def connected() -> Iterator[DevmemSocket]:
    """Yield a socket whose queue is bound to a Buffer of 64 MiB, with the kernel's shape of frags."""
    with (
        dmt.open_nic("soft0", backend="software", software=SoftwareOptions(frag_size=PAGE_SIZE)) as nic,
        dmt.memory.Host().allocate(64 << 20) as buffer,
        nic.set_header_split("on"),
        nic.set_rss(equal=QUEUE),
        nic.listen((HOST, 0)) as listener,
        nic.add_ntuple(dst_port=listener.address[1], queue=QUEUE),
        nic.bind_rx(buffer, queues=[QUEUE]),
        nic.connect(listener.address) as peer,
        listener.accept() as sock,
    ):
        peer.send(b"!")  # never read: it makes the socket readable, so that no call waits
        yield sock


def receive_and_release(sock: DevmemSocket, frags: int) -> tuple[int, int]:
    """Receive one batch and return its tokens; answers the nanoseconds of each."""
    start = time.perf_counter_ns()
    batch = sock.recv_frags(frags * PAGE_SIZE, max_frags=frags)
    received = time.perf_counter_ns()
    if len(batch) != frags:
        raise click.ClickException(f"a batch of {len(batch)} frags came where {frags} were wanted")
    releasing = time.perf_counter_ns()
    batch.release()
    return received - start, time.perf_counter_ns() - releasing


def measure(sock: DevmemSocket, frags: int, samples: int) -> Row:
    """Measure every stage at one number of frags a batch."""
    control = control_of(frags)
    columns = ControlColumns(control)
    scattered = np.arange(1, 2 * frags + 1, 2, dtype=np.uint32)
    repeats = max(1, SAMPLE_FRAGS // frags)
    times = np.array([[receive_and_release(sock, frags) for _ in range(repeats)] for _ in range(samples)])
    receive_ns, release_ns = np.median(times.mean(axis=1), axis=0) / frags
    return Row(
        frags=frags,
        parse_ns=ns_per_frag(lambda: columns.parse(len(control)), frags, samples),
        receive_ns=float(receive_ns),
        release_ns=float(release_ns),
        coalesce_scattered_ns=ns_per_frag(lambda: coalesce(scattered), frags, samples),
    )


def show(rows: list[Row], console: Console) -> None:
    """Print the table."""
    table = Table(title="nanoseconds a frag, outside system calls (medians)", box=None, padding=(0, 2, 0, 0))
    headings = (
        "frags\na batch",
        "parse control\nmessages",
        "return\ntokens",
        "both",
        "software:\nmake frags",
        "merge\nscattered tokens",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        figures = (row.parse_ns, row.release_ns, row.parse_and_release_ns, row.receive_ns, row.coalesce_scattered_ns)
        table.add_row(str(row.frags), *(f"{ns:.1f}" for ns in figures))
    console.print(table)


@click.command(help=__doc__)
@click.option("--samples", type=click.IntRange(1), default=15, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure there.")
@click.option("--check", is_flag=True, help="Exit with 1 if the limit is missed.")
def main(samples: int, json_path: Path | None, check: bool) -> None:
    with (
        connected() as sock,
        mock.patch.object(calls, "recv_into", fill_one),
        mock.patch.object(calls, "recvmsg_into", fill_many),
    ):
        rows = [measure(sock, frags, samples) for frags in BATCHES]
    console = Console()
    show(rows, console)
    cost = next(row.parse_and_release_ns for row in rows if row.frags == LIMIT_FRAGS)
    holds = cost < LIMIT_NS
    console.print(
        f"{'holds ' if holds else 'MISSED'}  parsing and returning {LIMIT_FRAGS} frags, under {LIMIT_NS:.0f} ns a frag:"
        f" {cost:.1f} ns"
    )
    if json_path is not None:
        json_path.write_bytes(msgspec.json.encode({"rows": rows, "holds": holds}))
    if check and not holds:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
