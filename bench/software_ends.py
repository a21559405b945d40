"""The two ends of the software backend, each a process of its own; run by throughput.py.

    python software_ends.py recv BUFFER_BYTES READ_BYTES CC [HELD_BYTES]
    python software_ends.py send HOST PORT BYTES BUFFER_BYTES CHUNK CC

The same arguments and the same span as the C program. Both ends are written as a user of the package would write them.
HELD_BYTES are worked on before they are given back: 0, each batch before the next one; near the size of the buffer, the
whole buffer is gone through, as the C program does. (Free pages are taken lowest first.)
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Final

import devmem_tcp as dmt
from devmem_tcp.buffers import Buffer
from devmem_tcp.contract import DevmemSocket, Nic, TxBinding
from devmem_tcp.software.options import SoftwareOptions
from devmem_tcp.types import FragBatch
from loopback import HOST, SYSTEM, Span, say

QUEUE: Final = 15
COMPLETION_TIMEOUT_S: Final = 30.0


@contextlib.contextmanager
def opened(congestion: str, buffer_bytes: int) -> Iterator[tuple[Nic, Buffer]]:
    """Open a software NIC and a host Buffer with every page present."""
    options = SoftwareOptions(congestion="system" if congestion == SYSTEM else congestion)
    with (
        dmt.open_nic("soft0", backend="software", software=options) as nic,
        dmt.memory.Host().allocate(buffer_bytes) as buffer,
    ):
        buffer.array()[:] = 0x5A
        yield nic, buffer


def receive(buffer_bytes: str, read_bytes: str, congestion: str, held_bytes: str = "0") -> None:
    """Receive one connection into a bound Buffer; every batch's columns are read and its tokens returned."""
    with (
        opened(congestion, int(buffer_bytes)) as (nic, buffer),
        nic.set_header_split("on"),
        nic.set_rss(equal=QUEUE),
        nic.listen((HOST, 0)) as listener,
        nic.add_ntuple(dst_port=listener.address[1], queue=QUEUE),
        nic.bind_rx(buffer, queues=[QUEUE]),
    ):
        say(port=listener.address[1])
        with listener.accept() as sock:
            span = Span()
            received, reach = _drain(sock, int(read_bytes), int(held_bytes))
            figures = span.figures()
            stats = sock.stats
    say(
        bytes=received,
        calls=stats.recv_calls,
        backend=stats.backend,
        dmabuf_bytes=stats.dmabuf_bytes,
        linear_bytes=stats.linear_bytes,
        host_bytes=stats.host_bytes,
        frags=stats.frags,
        dontneed_calls=stats.dontneed_calls,
        congestion_control=stats.congestion_control,
        reach_bytes=reach,
        **figures,
    )


def _drain(sock: DevmemSocket, step: int, most_held: int) -> tuple[int, int]:
    """Receive to the end of stream; returns the bytes, and how far into the Buffer any batch's last frag reached."""
    received = reach = 0
    held: collections.deque[FragBatch] = collections.deque()
    held_bytes = 0
    while batch := sock.recv_frags(max_bytes=step):
        received += batch.nbytes
        reach = max(reach, int(batch.offsets[-1]) + int(batch.sizes[-1]))
        held.append(batch)
        held_bytes += batch.nbytes
        while held_bytes > most_held:
            oldest = held.popleft()
            held_bytes -= oldest.nbytes
            oldest.release()
    return received, reach


def transmit(host: str, port: str, total_bytes: str, buffer_bytes: str, chunk_bytes: str, congestion: str) -> None:
    """Send out of a bound Buffer; a window of it is used again only after the completion of the send that used it."""
    with (
        opened(congestion, int(buffer_bytes)) as (nic, buffer),
        nic.bind_tx(buffer) as tx,
        nic.connect((host, int(port))) as sock,
    ):
        sock.set_zerocopy()
        span = Span()
        _send_all(sock, tx, int(total_bytes), int(chunk_bytes))
        sock.shutdown_send()
        sock.recv_into(bytearray(1))
        figures = span.figures()
        stats = sock.stats
    say(
        bytes=stats.sent_dmabuf_bytes,
        calls=stats.send_calls,
        backend=stats.backend,
        dmabuf_bytes=stats.sent_dmabuf_bytes,
        host_bytes=stats.sent_host_bytes,
        congestion_control=stats.congestion_control,
        **figures,
    )


def _send_all(sock: DevmemSocket, tx: TxBinding, left: int, chunk: int) -> None:
    """Send ``left`` bytes and wait for every completion. Send n uses window n modulo their number."""
    offsets = range(0, tx.buffer.size_bytes - chunk + 1, chunk)
    sends = completed = 0
    for offset in itertools.cycle(offsets):
        if left == 0:
            break
        if sends - completed == len(offsets):
            completed += _completions(sock)
        piece = min(chunk, left)
        sock.send_frags(tx, [offset], [piece])
        sends += 1
        left -= piece
    while completed < sends:
        completed += _completions(sock)


def _completions(sock: DevmemSocket) -> int:
    """Wait for completions and count the sends they cover. They come in order here: one stream, one thread."""
    return sum(last - first + 1 for first, last in sock.wait_completions(COMPLETION_TIMEOUT_S))


MODES: Final[dict[str, Callable[..., None]]] = {"recv": receive, "send": transmit}

if __name__ == "__main__":
    MODES[sys.argv[1]](*sys.argv[2:])
