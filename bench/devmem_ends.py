"""Our end of devmem_cpu.py: a receiver on the kernel backend, as a user of the package would write it.

    python devmem_ends.py NIC PORT READ_BYTES LOWAT_BYTES WARM_BYTES

The same arguments and the same span as devmem_receiver.c, which it is measured against. The NIC is set up and the
buffer bound by another process: receiving needs no privilege.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from typing import Final

import devmem_tcp as dmt
from devmem_tcp.contract import DevmemSocket
from loopback import GIB, say

MAX_FRAGS: Final = (1 << 18) // 40  # as many as fit the C program's room for control messages


class Span:
    """What one process has spent and one socket has counted since the span began."""

    def __init__(self, sock: DevmemSocket) -> None:
        self._sock = sock
        self._stats = sock.stats
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        self._wall_s = time.perf_counter()
        self.spent: Final[list[float]] = []  # of each read, seconds a byte

    def figures(self) -> dict[str, float]:
        """Return what devmem_receiver.c would say."""
        wall_s = time.perf_counter() - self._wall_s
        usage, stats = resource.getrusage(resource.RUSAGE_SELF), self._sock.stats
        names = ("dmabuf_bytes", "linear_bytes", "host_bytes", "frags", "recv_calls", "dontneed_calls")
        counts = {name: getattr(stats, name) - getattr(self._stats, name) for name in names}
        return {
            "bytes": counts["dmabuf_bytes"] + counts["linear_bytes"] + counts["host_bytes"],
            **counts,
            "wall_s": wall_s,
            "user_s": usage.ru_utime - self._usage.ru_utime,
            "system_s": usage.ru_stime - self._usage.ru_stime,
            "undisturbed_s_per_gib": sorted(self.spent)[len(self.spent) // 4] * GIB,
        }


def receive(nic_name: str, port: str, read_bytes: str, lowat_bytes: str, warm_bytes: str) -> None:
    """Take one connection on every address and receive it to its end; each batch's tokens go back before the next."""
    with dmt.open_nic(nic_name, backend="kernel") as nic, nic.listen(("::", int(port))) as listener:
        say(port=int(port))
        with listener.accept() as sock:
            set_lowat(sock, int(lowat_bytes))
            step, warm = int(read_bytes), int(warm_bytes)
            span, start_s = Span(sock), 0.0
            received = 0
            accepted = start = time.process_time()
            while batch := sock.recv_frags(max_bytes=step, max_frags=MAX_FRAGS):
                received += batch.nbytes
                batch.release()
                end = time.process_time()
                span.spent.append((end - start) / batch.nbytes)
                start = end
                if not start_s and received >= warm:
                    start_s = end - accepted
                    span = Span(sock)
            figures = span.figures()
    say(**figures, start_s=start_s)


def set_lowat(sock: DevmemSocket, lowat_bytes: int) -> None:
    """Let each receive wait for so much, or the end of stream. Kernel: SO_RCVLOWAT, tcp_set_rcvlowat."""
    with socket.socket(fileno=os.dup(sock.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, lowat_bytes)


if __name__ == "__main__":
    receive(*sys.argv[1:])
