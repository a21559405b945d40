"""Peers in processes of their own, which kill themselves at one step of the protocol, or behave.

Run as a program it is a *nursery*: it imports everything once and forks a peer for each datagram on its standard input,
which is a socket; with the datagram comes the peer's own end of a socket to the test, its *line*.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal

import numpy as np

from devmem_tcp import SoftwareOptions, open_nic
from devmem_tcp.errors import DevmemError
from devmem_tcp.sansio.frames import NONCE_BYTES, Limits, Role
from devmem_tcp.sansio.handshake import (
    PREAMBLE_BYTES,
    SECRET_BYTES,
    Acceptor,
    Agreed,
    Connector,
    Handshake,
    HandshakeState,
    Terms,
    read_preamble,
)
from devmem_tcp.sansio.receiving import ReceiverSession
from devmem_tcp.sansio.sending import SenderSession
from devmem_tcp.sansio.session import Event, MessagesFinished, PeerLeaves, Session
from devmem_tcp.transport import open_receiver, open_sender

KEY: Final = bytes(range(32))
LIMIT_S: Final = 20.0  # for one thing that a peer waits for
MESSAGE: Final = 300_000  # bytes
PIECE: Final = 65_536  # bytes of it
OPTIONS: Final = SoftwareOptions(rx_queues=4)
HALF: Final = PREAMBLE_BYTES // 2


def pattern(seed: int, nbytes: int = MESSAGE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of a message that only this seed has."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


# --- one end of a session, step by step ----------------------------------------------------------------------------


class Ends:
    """The sockets of one end, and what has happened to its session."""

    def __init__(self) -> None:
        self.control = socket.socket()
        self.lanes: list[socket.socket] = []
        self.events: list[Event] = []

    def say(self, end: Handshake | Session) -> None:
        self.control.sendall(end.data_to_send())

    def hear(self) -> bytes:
        data = self.control.recv(65_536)
        if not data:
            raise ConnectionResetError("the other end closed the control connection")
        return data

    def hear_until(self, session: Session, done: Callable[[list[Event]], bool]) -> None:
        """Take in what the other end says until that is ``done``, given all that has happened."""
        while True:
            while (event := session.next_event()) is not None:
                self.events.append(event)
            if done(self.events):
                return
            session.receive_control(self.hear(), time.monotonic())


def terms(role: Role, lanes: int) -> Terms:
    return Terms(role, "software", Limits(lanes), key=KEY, peer_is_local=True)


def until_agreed(ends: Ends, end: Handshake, done: Callable[[Agreed | None], bool]) -> Agreed | None:
    """Go on with a handshake until ``done``, without a word."""
    while True:
        agreed = end.next_event()
        if done(agreed):
            return agreed
        end.receive_data(ends.hear())


def connect(role: Role, address: tuple[str, int], lanes: int, ends: Ends) -> Iterator[str]:
    """Shake hands as the end that connects, and go on with a session."""
    ends.control = socket.create_connection(address, LIMIT_S)
    ends.control.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what was said is on its way when it dies
    yield "connected"
    end = Connector(terms(role, lanes), nonce=secrets.token_bytes(NONCE_BYTES), now=time.monotonic())
    ends.say(end)
    yield "hello said"
    until_agreed(ends, end, lambda agreed: end.state is HandshakeState.AWAITS_WELCOME)
    yield "challenge read"
    ends.say(end)
    yield "proof said"
    agreed = until_agreed(ends, end, lambda agreed: agreed is not None)
    assert agreed is not None
    yield "welcome read"
    for lane, preamble in enumerate(agreed.preambles):
        if lane:
            yield "some lanes connected"
        ends.lanes.append(socket.create_connection((address[0], agreed.data_port), LIMIT_S))
        ends.lanes[-1].sendall(preamble[:HALF])
        if lane == lanes - 1:
            yield "preamble half said"
        ends.lanes[-1].sendall(preamble[HALF:])
    yield from talk(role, agreed, ends, end.take_rest())


def accept(role: Role, control: socket.socket, data: socket.socket, lanes: int, ends: Ends) -> Iterator[str]:
    """Shake hands as the end that listens, and go on with a session."""
    ends.control = control.accept()[0]
    ends.control.settimeout(LIMIT_S)
    ends.control.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    yield "connected"
    port = data.getsockname()[1]
    nonce, secret = secrets.token_bytes(NONCE_BYTES), secrets.token_bytes(SECRET_BYTES)
    end = Acceptor(terms(role, lanes), nonce=nonce, secret=secret, now=time.monotonic(), data_port=port)
    until_agreed(ends, end, lambda agreed: end.state is HandshakeState.AWAITS_PROOF)
    yield "hello read"
    ends.say(end)
    yield "challenge said"
    until_agreed(ends, end, lambda agreed: end.state is HandshakeState.AWAITS_LANES)
    yield "proof read"
    ends.say(end)
    yield "welcome said"
    for lane in range(lanes):
        if lane:
            yield "some lanes connected"
        sock = data.accept()[0]
        sock.settimeout(LIMIT_S)
        ends.lanes.append(sock)
        end.admit(read_preamble(sock.recv(PREAMBLE_BYTES, socket.MSG_WAITALL)))
    agreed = end.next_event()
    assert agreed is not None
    yield from talk(role, agreed, ends, end.take_rest())


def talk(role: Role, agreed: Agreed, ends: Ends, rest: bytes) -> Iterator[str]:
    return send(agreed, ends, rest) if role is Role.SENDER else receive(agreed, ends, rest)


def send(agreed: Agreed, ends: Ends, rest: bytes) -> Iterator[str]:
    """Send a message, a series and a goodbye."""
    now = time.monotonic()
    session = SenderSession(limits=agreed.limits, now=now, piece_bytes=PIECE)
    session.receive_control(rest, now)
    ends.hear_until(session, lambda _: session.may_announce)
    yield "session open"
    session.announce(name="whole", dtype="uint8", shape=(MESSAGE,), nbytes=MESSAGE, confirm=True)
    ends.say(session)
    yield "message announced"
    data = pattern(0).tobytes()
    left = MESSAGE - give(session, ends, data, at_most=PIECE // 2)
    yield "half a piece sent"

    def all_is_given(_: list[Event]) -> bool:
        nonlocal left
        left -= give(session, ends, data)
        return not left

    ends.hear_until(session, all_is_given)
    yield "message sent"
    ends.hear_until(session, lambda events: MessagesFinished(1) in events)
    yield "message confirmed"
    ends.hear_until(session, lambda _: session.may_announce)
    session.announce(name="of a series", dtype="uint8", shape=(PIECE,), nbytes=PIECE, count=10)
    ends.say(session)
    give(session, ends, pattern(1, PIECE).tobytes())
    session.announce_next()
    give(session, ends, pattern(2, PIECE).tobytes(), at_most=PIECE // 2)
    yield "in a series"
    give(session, ends, pattern(2, PIECE).tobytes())
    session.close()
    ends.say(session)
    yield "goodbye said"


def give(session: SenderSession, ends: Ends, data: bytes, at_most: int = 1 << 30) -> int:
    """Give lanes what is next, as far as credit goes; returns how many bytes."""
    given, before = 0, -1
    while given > before:
        before = given
        for lane, sock in enumerate(ends.lanes):
            piece = session.next_piece(lane) if given < at_most else None
            if piece is not None:
                size = min(piece.size, at_most - given)
                sock.sendall(data[piece.offset : piece.offset + size])
                session.sent(lane, size, time.monotonic())
                given += size
    return given


def receive(agreed: Agreed, ends: Ends, rest: bytes) -> Iterator[str]:
    """Receive a message, part of a series and a goodbye."""
    now = time.monotonic()
    session = ReceiverSession(limits=agreed.limits, now=now, pool_bytes=1 << 20, pool_messages=4)
    session.receive_control(rest, now)
    yield "session open"
    ends.say(session)
    yield "credit said"
    ends.hear_until(session, lambda _: any(session.expected(lane) for lane in range(len(ends.lanes))))
    yield "announcement read"
    take(session, ends, PIECE // 2)
    yield "half a piece read"
    take(session, ends, MESSAGE - PIECE // 2)
    session.release(MESSAGE, 1)
    ends.say(session)
    yield "message read"
    ends.hear_until(session, lambda _: any(session.expected(lane) for lane in range(len(ends.lanes))))
    take(session, ends, PIECE + PIECE // 2)
    yield "in a series"
    take(session, ends, PIECE // 2)
    ends.hear_until(session, lambda events: PeerLeaves() in events)
    yield "goodbye read"


def take(session: ReceiverSession, ends: Ends, nbytes: int) -> None:
    """Read so many bytes, wherever they come."""
    while nbytes:
        for lane, sock in enumerate(ends.lanes):
            piece = session.expected(lane) if nbytes else None
            if piece is not None:
                taken = len(sock.recv(min(piece.size, nbytes)))
                if not taken:
                    raise ConnectionResetError("the other end closed a lane")
                session.received(lane, taken, time.monotonic())
                nbytes -= taken


# --- what a peer may be --------------------------------------------------------------------------------------------


class Line:
    """A peer's end of its line to the test: lines of JSON."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rwb", buffering=0)

    def tell(self, what: Any) -> None:
        self._file.write(json.dumps(what).encode() + b"\n")

    def wait(self) -> None:
        """Wait for the test's word."""
        if not self._file.readline():
            os._exit(0)  # the test is over


def die_at(steps: Iterator[str], last: str, line: Line) -> None:
    for step in steps:
        if step == last:
            line.tell(step)
            os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(f"there is no step {last!r}")


def dying_connector(line: Line, role: str, address: list[Any], lanes: int, step: str) -> None:
    """Connect, and die at a step."""
    die_at(connect(Role(role), (address[0], address[1]), lanes, Ends()), step, line)


def dying_acceptor(line: Line, role: str, lanes: int, step: str) -> None:
    """Listen, tell where, and die at a step."""
    with socket.create_server(("127.0.0.1", 0)) as control, socket.create_server(("127.0.0.1", 0)) as data:
        control.settimeout(LIMIT_S)
        data.settimeout(LIMIT_S)
        line.tell(control.getsockname()[1])
        die_at(accept(Role(role), control, data, lanes, Ends()), step, line)


def honest_sender(line: Line, address: list[Any], lanes: int, seeds: list[int]) -> None:
    """Send whole messages by the library itself, each after a word of the test's."""
    with (
        open_nic("soft2", backend="software", software=OPTIONS) as nic,
        open_sender(nic, to=(address[0], address[1]), lanes=lanes, key=KEY, size=1 << 20) as sender,
    ):
        for seed in seeds:
            line.wait()
            sender.send(pattern(seed), name=f"honest {seed}")
    line.tell("done")


def honest_receiver(line: Line) -> None:
    """Receive from one sender after the other by the library itself, each until its goodbye, whatever comes of it."""
    with (
        open_nic("soft2", backend="software", software=OPTIONS) as nic,
        open_receiver(nic, listen=("127.0.0.1", 0), key=KEY, size=1 << 20, max_peers=16) as receiver,
    ):
        assert receiver.address is not None
        line.tell(receiver.address[1])
        while True:
            with contextlib.suppress(DevmemError, OSError):
                receiver.receive().release()


PARTS: Final[dict[str, Callable[..., None]]] = {
    part.__name__: part for part in (dying_connector, dying_acceptor, honest_sender, honest_receiver)
}


# --- the nursery ---------------------------------------------------------------------------------------------------


def nursery() -> Literal[0]:
    """Fork a peer for each datagram until the test's end of the socket is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for peers: their line says when they are gone
    with socket.socket(fileno=os.dup(0)) as orders:
        while True:
            order, fds, _, _ = socket.recv_fds(orders, 1 << 16, 1)
            if not order:
                return 0
            if os.fork() == 0:
                orders.close()
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os._exit(live(fds[0], json.loads(order)))
            os.close(fds[0])


def live(fd: int, order: dict[str, Any]) -> int:
    """Be one peer, from its first to its last word."""
    with socket.socket(fileno=fd) as sock:
        line = Line(sock)
        line.tell(os.getpid())
        try:
            PARTS[order.pop("part")](line, **order)
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(nursery())
