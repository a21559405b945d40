"""A man in the middle: two listening sockets that pass on what comes, remember it, and may change it."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from devmem_tcp.types import Address

MIDDLE: Final = "127.0.0.2"  # another address, so that data connections find the TCP port that they were told
LIMIT_S: Final = 20.0

Change = Callable[[bytearray, int], None]
"""Changes bytes that begin at an offset of what a client says by one connection."""


@dataclass
class Passage:
    """One connection through the middle; ``said`` is what its client has said."""

    client: socket.socket
    server: socket.socket
    said: bytearray = field(default_factory=bytearray)

    def close(self) -> None:
        self.client.close()
        self.server.close()


class Middle:
    """Passes control and data connections on, in a thread of its own."""

    def __init__(self, control: Address, data_port: int, change_data: Change | None = None) -> None:
        self._change = change_data
        self._listeners = [socket.create_server((MIDDLE, 0)), socket.create_server((MIDDLE, data_port))]
        self._targets = [control, (control[0], data_port)]
        self.passages: tuple[list[Passage], list[Passage]] = ([], [])  #: of control and of data
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def address(self) -> Address:
        return MIDDLE, self._listeners[0].getsockname()[1]

    def _run(self) -> None:
        while True:
            ends = {end: p for kind in self.passages for p in kind for end in (p.client, p.server) if end.fileno() >= 0}
            ready, _, _ = select.select([self._stopped, *self._listeners, *ends], (), ())
            if self._stopped in ready:
                return
            for sock in ready:
                if sock in self._listeners:
                    self._accept(self._listeners.index(sock))
                elif sock.fileno() >= 0:
                    self._pass_on(ends[sock], sock)

    def _accept(self, kind: int) -> None:
        client, _ = self._listeners[kind].accept()
        self.passages[kind].append(Passage(client, socket.create_connection(self._targets[kind], LIMIT_S)))

    def _pass_on(self, passage: Passage, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # an end that is gone: so is the other one then
            data = bytearray(sock.recv(1 << 16))
            if data and sock is passage.client:
                if self._change is not None and passage in self.passages[1]:
                    self._change(data, len(passage.said))
                passage.said += data
                passage.server.sendall(data)
                return
            if data:
                passage.client.sendall(data)
                return
        passage.close()

    def close(self) -> None:
        self._stop.send(b"x")
        self._thread.join(LIMIT_S)
        for sock in (self._stop, self._stopped, *self._listeners):
            sock.close()
        for passage in (*self.passages[0], *self.passages[1]):
            passage.close()


@contextlib.contextmanager
def middle(control: Address, data_port: int, change_data: Change | None = None) -> Iterator[Middle]:
    made = Middle(control, data_port, change_data)
    try:
        yield made
    finally:
        made.close()
