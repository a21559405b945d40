"""pyzmq, PAIR sockets over TCP, nothing copied on the Python side: frames of the library's memory, tracked sends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

from loopback import HOST, MIB
from peers import exchange
from peers.contract import missing
from peers.control import ACKNOWLEDGEMENT, Control, Part
from peers.works import Kind

QUEUED_BYTES: Final = 64 * MIB
"""How much of messages may be queued on each side: the library's own limit of 1000 messages would be 250 GiB."""
LINGER_MS: Final = 5000


class ZmqWire:
    """One PAIR socket."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._trackers: list[Any] = []

    def send(self, message: memoryview) -> None:
        self._trackers.append(self._sock.send(message, copy=False, track=True))

    def receive(self, into: memoryview) -> memoryview:
        """Return the library's memory; that of each message is its own."""
        landed: memoryview = self._sock.recv(copy=False).buffer
        self.wait()
        return landed

    def wait(self) -> None:
        """Wait until the library needs none of the memory that was sent."""
        for tracker in self._trackers:
            tracker.wait()
        self._trackers.clear()


class ZmqPair:
    most_connections = 512

    def available(self) -> str:
        return missing("zmq", "pyzmq")

    def serve(self, control: Control) -> None:
        with _sockets(control) as socks:
            control.tell(" ".join(str(sock.bind_to_random_port(f"tcp://{HOST}")) for sock in socks))
            if control.work.kind is Kind.CONNECTIONS:
                _serve_many(control, socks)
            else:
                exchange.serve(control, ZmqWire(socks[0]))

    def drive(self, control: Control) -> None:
        with _sockets(control) as socks:
            for sock, port in zip(socks, control.hear().split(), strict=True):
                sock.connect(f"tcp://{HOST}:{port}")
            if control.work.kind is Kind.CONNECTIONS:
                _drive_many(control, socks)
            else:
                exchange.drive(control, ZmqWire(socks[0]))


@contextlib.contextmanager
def _sockets(control: Control) -> Iterator[list[Any]]:
    """Make a PAIR socket for each connection; what was sent still goes out after."""
    import zmq

    queued = max(2, QUEUED_BYTES // control.work.size_bytes // control.work.connections)
    with zmq.Context() as context:
        context.set(zmq.MAX_SOCKETS, control.work.connections + 8)
        with contextlib.ExitStack() as stack:
            socks = []
            for _ in range(control.work.connections):
                sock = stack.enter_context(context.socket(zmq.PAIR))
                sock.set(zmq.SNDHWM, queued)
                sock.set(zmq.RCVHWM, queued)
                sock.set(zmq.LINGER, LINGER_MS)
                socks.append(sock)
            yield socks


def _serve_many(control: Control, socks: list[Any]) -> None:
    for part in control.parts():
        with part:
            landed = _receive_all(part, socks)
        part.check(landed)


def _receive_all(part: Part, socks: list[Any]) -> list[memoryview]:
    """Take messages of every socket as they are there; returns the last of each."""
    import zmq

    poll = zmq.Poller()
    left = dict.fromkeys(socks, part.messages)
    landed = dict.fromkeys(socks, memoryview(b""))
    for sock in socks:
        poll.register(sock, zmq.POLLIN)
    while left:
        for sock, _ in poll.poll():
            landed[sock] = sock.recv(copy=False).buffer
            left[sock] -= 1
            if left[sock] == 0:
                sock.send(ACKNOWLEDGEMENT)
                poll.unregister(sock)
                del left[sock]
    return list(landed.values())


def _drive_many(control: Control, socks: list[Any]) -> None:
    wires = [ZmqWire(sock) for sock in socks]
    answer = memoryview(bytearray(1))
    for part in control.parts():
        with part:
            for _ in range(part.messages):
                for wire in wires:
                    wire.send(part.message)
            for wire in wires:
                wire.receive(answer)
