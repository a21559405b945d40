"""The two ends of plain Python sockets, each a process of its own; run by throughput.py.

    python plain_ends.py recv BUFFER_BYTES READ_BYTES CC
    python plain_ends.py send HOST PORT BYTES BUFFER_BYTES CHUNK CC

They take and print what the C program does, save that ``recv`` always listens on a free port.
"""

from __future__ import annotations

import itertools
import socket
import sys
from collections.abc import Callable
from typing import Final

from loopback import HOST, Span, prefaulted, say, set_congestion, windows


def receive(buffer_bytes: str, read_bytes: str, congestion: str) -> None:
    """Read one connection to its end by recv_into, round and round through one buffer."""
    memory = prefaulted(int(buffer_bytes))
    step = min(int(read_bytes), len(memory))
    with socket.create_server((HOST, 0), backlog=1) as listener:
        set_congestion(listener, congestion)
        say(port=listener.getsockname()[1])
        connection, _ = listener.accept()
    with connection:
        span = Span()
        received, calls = _drain(connection, windows(memory, step))
        figures = span.figures()
    say(bytes=received, calls=calls, **figures)


def _drain(connection: socket.socket, targets: list[memoryview]) -> tuple[int, int]:
    """Read to the end of stream; a short read moves on to the next target, so whole views are used as they are."""
    received = calls = 0
    for target in itertools.cycle(targets):
        count = connection.recv_into(target)
        calls += 1
        if count == 0:
            break
        received += count
    return received, calls


def transmit(host: str, port: str, total_bytes: str, buffer_bytes: str, chunk_bytes: str, congestion: str) -> None:
    """Send by sendall, round and round through one buffer, and wait for the receiver's goodbye."""
    memory = prefaulted(int(buffer_bytes))
    left = int(total_bytes)
    sent = calls = 0
    with socket.socket() as connection:
        set_congestion(connection, congestion)
        connection.connect((host, int(port)))
        span = Span()
        for source in itertools.cycle(windows(memory, int(chunk_bytes))):
            piece = source[:left] if left < len(source) else source
            connection.sendall(piece)
            calls += 1
            sent += len(piece)
            left -= len(piece)
            if left == 0:
                break
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        figures = span.figures()
    say(bytes=sent, calls=calls, **figures)


MODES: Final[dict[str, Callable[..., None]]] = {"recv": receive, "send": transmit}

if __name__ == "__main__":
    MODES[sys.argv[1]](*sys.argv[2:])
