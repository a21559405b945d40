"""The survivors' side of the fault tests: receivers that one thread drives event by event, and the nursery of peers."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import numpy as np

import devmem_tcp as dmt
from devmem_tcp.errors import Timeout
from devmem_tcp.transport import Message, Receiver, Sender, open_receiver, open_sender
from fault_peer import KEY, OPTIONS

LIMIT_S: Final = 20.0
LOOPBACK: Final = ("127.0.0.1", 0)
MIB: Final = 1 << 20


class Peer:
    """One process of the nursery, and the line to it."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._file = line.makefile("rb", buffering=0)
        self.pid = int(self.hear())
        self.dead = False

    def fileno(self) -> int:
        return self._line.fileno()

    def hear(self) -> Any:
        """Return the next thing it tells; None: it is dead."""
        try:
            line = self._file.readline()
        except ConnectionResetError:  # it died with the test's word unread
            line = b""
        if not line:
            self.dead = True
            return None
        return json.loads(line)

    def go(self) -> None:
        """Give it the word it waits for."""
        self._line.sendall(b"\n")

    def close(self) -> None:
        """End it, if it has not ended."""
        if not self.dead:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            while not self.dead:  # its line ends when it is gone
                self.hear()
        self._file.close()
        self._line.close()


class Nursery:
    """Makes peers, each a process of its own."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            program = [sys.executable, str(Path(__file__).with_name("fault_peer.py"))]
            self._process = subprocess.Popen(program, stdin=theirs.fileno())

    @contextlib.contextmanager
    def peer(self, part: str, **arguments: Any) -> Iterator[Peer]:
        """Start a peer; it is gone at the end of the block."""
        mine, theirs = socket.socketpair()
        with theirs:
            order = {"part": part} | arguments
            socket.send_fds(self._orders, [json.dumps(order).encode()], [theirs.fileno()])
        mine.settimeout(LIMIT_S)
        peer = Peer(mine)
        try:
            yield peer
        finally:
            peer.close()

    def close(self) -> None:
        self._orders.close()
        self._process.wait(LIMIT_S)


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    try:
        yield made
    finally:
        made.close()


class Survivor:
    """A receiver and what came of it: messages as (name, bytes), errors as they were raised."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.messages: list[tuple[str, bytes]] = []
        self.errors: list[Exception] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.messages]

    def drive(self, done: Callable[[], bool], *watched: Peer, limit_s: float = 5.0) -> None:
        """Let the receiver act on what comes until ``done``; what a watched peer does counts as something, too."""
        end = time.monotonic() + limit_s
        while not done():
            left = end - time.monotonic()
            assert left > 0, f"not in {limit_s} s; messages {self.names}, errors {self.errors}"
            self.take_all()
            if done():
                return
            engine = self.receiver._engine
            due = engine.deadline()
            patience = left if due is None else max(0.0, min(left, due - time.monotonic()))
            fds = [engine.fileno(), *(peer.fileno() for peer in watched if not peer.dead)]
            select.select(fds, (), (), patience)

    def take_all(self) -> None:
        """Let the receiver do what there is to do now."""
        self.receiver._engine.step(0)
        while True:
            try:
                message = self.receiver.receive(0)
            except Timeout as error:
                if not str(error).startswith("no message came"):
                    self.errors.append(error)
                    continue
                return
            except Exception as error:
                self.errors.append(error)
            else:
                with message:
                    self.messages.append((message.name, bytes_of(message)))

    def drive_until_said(self, peer: Peer) -> Any:
        """Let the receiver act until a peer tells something, and return that."""
        self.drive(lambda: bool(select.select([peer], (), (), 0)[0]), peer)
        return peer.hear()


def bytes_of(message: Message) -> bytes:
    return bytes(message.gather().numpy().tobytes())


def settings_of(nic: dmt.Nic) -> tuple[Any, ...]:
    return nic.header_split, nic.rss_table, nic.ntuple_rules


@contextlib.contextmanager
def surviving(software: dmt.SoftwareOptions = OPTIONS, **options: Any) -> Iterator[Survivor]:
    """A receiver that leaves nothing behind at the end: no page held, the NIC's settings as they were."""
    given: dict[str, Any] = {"listen": LOOPBACK, "size": 4 * MIB, "key": KEY}
    given |= options
    with dmt.open_nic("soft0", backend="software", software=software) as nic:
        before = settings_of(nic)
        with open_receiver(nic, **given) as receiver:
            binding = receiver._engine._binding
            yield Survivor(receiver)
        assert binding.drained
        assert settings_of(nic) == before


@contextlib.contextmanager
def sending(**options: Any) -> Iterator[Sender]:
    """A sender on a NIC of its own, dropped at the end as after an error."""
    given: dict[str, Any] = {"size": MIB, "key": KEY}
    given |= options
    with dmt.open_nic("soft1", backend="software", software=OPTIONS) as nic:
        sender = open_sender(nic, **given)
        try:
            yield sender
        finally:
            sender._engine.close()
            assert sender._engine.outbox.free_bytes == given["size"]


class Sending:
    """A sender in a thread of its own, inside of ``place``: ``act`` is done with it, and ``met`` is what it raised."""

    def __init__(
        self,
        end: Survivor,
        act: Callable[[Sender], object],
        *,
        place: AbstractContextManager[None] | None = None,
        **options: Any,
    ) -> None:
        self.met: BaseException | None = None
        self._place = place or contextlib.nullcontext()
        options = {"to": end.receiver.address} | options
        self._thread = threading.Thread(target=self._run, args=(act,), kwargs=options)
        self._thread.start()

    def _run(self, act: Callable[[Sender], object], **options: Any) -> None:
        try:
            with self._place, sending(**options) as sender:
                act(sender)
                sender.close()
        except BaseException as error:  # what pytest.fail raises, too
            self.met = error

    def join(self) -> None:
        """Wait until it is over; raises what it met and ``act`` did not expect."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), "the sender still waits"
        if self.met is not None:
            raise self.met


def notes_of(error: BaseException) -> str:
    """Return everything an error says."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def same(data: bytes, expected: np.ndarray[Any, Any]) -> bool:
    return data == expected.tobytes()
