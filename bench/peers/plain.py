"""Plain blocking sockets in Python: recv_into the same memory again and again, sendall; no header at all.

Many connections are read by epoll in one thread, and written in turn.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator

from loopback import HOST
from peers import exchange
from peers.control import ACKNOWLEDGEMENT, Control, Part
from peers.works import Kind


class SocketWire:
    """One connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.send: Callable[[memoryview], None] = sock.sendall

    def receive(self, into: memoryview) -> memoryview:
        """Fill memory."""
        count = self._sock.recv_into(into)
        got = count
        while got < len(into) and count:
            count = self._sock.recv_into(into[got:])
            got += count
        if not count:
            raise EOFError(f"the connection ended after {got} of {len(into)} bytes")
        return into


class Plain:
    most_connections = 512

    def available(self) -> str:
        return ""

    def serve(self, control: Control) -> None:
        with accepted(control) as socks:
            if control.work.kind is Kind.CONNECTIONS:
                _serve_many(control, socks)
            else:
                exchange.serve(control, SocketWire(socks[0]))

    def drive(self, control: Control) -> None:
        with connected(control) as socks:
            if control.work.kind is Kind.CONNECTIONS:
                _drive_many(control, socks)
            else:
                exchange.drive(control, SocketWire(socks[0]))


@contextlib.contextmanager
def accepted(control: Control) -> Iterator[list[socket.socket]]:
    """Listen, say where, and take all connections of a work."""
    with contextlib.ExitStack() as stack:
        with socket.create_server((HOST, 0), backlog=control.work.connections) as listener:
            control.tell(str(listener.getsockname()[1]))
            socks = [stack.enter_context(listener.accept()[0]) for _ in range(control.work.connections)]
        for sock in socks:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield socks


@contextlib.contextmanager
def connected(control: Control) -> Iterator[list[socket.socket]]:
    """Make all connections of a work."""
    port = int(control.hear())
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection((HOST, port))) for _ in range(control.work.connections)]
        for sock in socks:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield socks


def _serve_many(control: Control, socks: list[socket.socket]) -> None:
    for part in control.parts():
        with part, select.epoll() as poll:
            _receive_all(part, socks, poll)
        part.check(part.landing)


def _receive_all(part: Part, socks: list[socket.socket], poll: select.epoll) -> None:
    """Read every connection as it is ready, until each has all its messages, and acknowledge each one's last."""
    size = len(part.landing[0])
    at = dict.fromkeys((sock.fileno() for sock in socks), 0)
    left = dict.fromkeys(at, part.messages)
    by_fd = {sock.fileno(): (sock, into) for sock, into in zip(socks, part.landing, strict=True)}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    open_count = len(by_fd)
    while open_count:
        for fd, _ in poll.poll():
            sock, into = by_fd[fd]
            got = at[fd]
            count = sock.recv_into(into[got:] if got else into)
            if not count:
                raise EOFError(f"a connection ended {left[fd]} messages early")
            at[fd] = got + count
            if at[fd] < size:
                continue
            at[fd] = 0
            left[fd] -= 1
            if left[fd] == 0:
                sock.sendall(ACKNOWLEDGEMENT)
                poll.unregister(fd)
                open_count -= 1


def _drive_many(control: Control, socks: list[socket.socket]) -> None:
    for part in control.parts():
        with part:
            for _ in range(part.messages):
                for sock in socks:
                    sock.sendall(part.message)
            for sock in socks:
                if not sock.recv(1):
                    raise EOFError("a connection ended without an acknowledgement")
