"""Our end of devmem_cpu.py: a receiver on the kernel backend, as a user of the package would write it.

    python devmem_ends.py NIC PORT READ_BYTES LOWAT_BYTES

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


def receive(nic_name: str, port: str, read_bytes: str, lowat_bytes: str) -> None:
    """Take one connection on every address and receive it to its end; each batch's tokens go back before the next."""
    with dmt.open_nic(nic_name, backend="kernel") as nic, nic.listen(("::", int(port))) as listener:
        say(port=int(port))
        with listener.accept() as sock:
            set_lowat(sock, int(lowat_bytes))
            step = int(read_bytes)
            before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            received = 0
            spent = []  # of each read, for each byte
            start = time.process_time()
            while batch := sock.recv_frags(max_bytes=step, max_frags=MAX_FRAGS):
                received += batch.nbytes
                batch.release()
                end = time.process_time()
                spent.append((end - start) / batch.nbytes)
                start = end
            wall_s = time.perf_counter() - started
            after = resource.getrusage(resource.RUSAGE_SELF)
            stats = sock.stats
    say(
        bytes=received,
        dmabuf_bytes=stats.dmabuf_bytes,
        linear_bytes=stats.linear_bytes,
        host_bytes=stats.host_bytes,
        frags=stats.frags,
        recv_calls=stats.recv_calls,
        dontneed_calls=stats.dontneed_calls,
        wall_s=wall_s,
        user_s=after.ru_utime - before.ru_utime,
        system_s=after.ru_stime - before.ru_stime,
        undisturbed_s_per_gib=sorted(spent)[len(spent) // 4] * GIB,
    )


def set_lowat(sock: DevmemSocket, lowat_bytes: int) -> None:
    """Let each receive wait for so much, or the end of stream. Kernel: SO_RCVLOWAT, tcp_set_rcvlowat."""
    with socket.socket(fileno=os.dup(sock.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, lowat_bytes)


if __name__ == "__main__":
    receive(*sys.argv[1:])
