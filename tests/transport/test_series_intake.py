"""Messages of a series, of which the session hears many at a time: none is lost, and credit comes when it is due."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable

import pytest

from devmem_tcp.errors import BrokenError, Timeout
from devmem_tcp.sansio.receiving import ReceiverSession
from devmem_tcp.transport import Message, Receiver
from fault_ends import LIMIT_S
from tensor_ends import MIB, receiving, senders, sending

KIB = 1 << 10


class Sending:
    """A thread that sends a series, message n full of n, by turns from each sender, and then says goodbye."""

    def __init__(self, receiver: Receiver, nbytes: int, count: int, *, close_series: bool = True) -> None:
        self._receiver, self._nbytes, self._count, self._close_series = receiver, nbytes, count, close_series
        self.sent = 0
        self.errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with sending(self._receiver) as sender, sender.reserve(self._nbytes, "uint8") as slot:
                series = sender.series(self._nbytes, "uint8", count=None if self._close_series else self._count)
                for number in range(self._count):
                    slot.numpy()[:] = number % 251
                    series.send(slot, LIMIT_S).wait(LIMIT_S)
                    self.sent += 1
                series.close()
                sender.send(b"something else", name="last")
        except Exception as error:
            self.errors.append(error)

    def join(self) -> None:
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), f"the sender waits, with {self.sent} messages sent"
        for error in self.errors:
            raise error


def holds(message: Message, number: int) -> bool:
    return message.gather().tobytes() == bytes([number % 251]) * message.nbytes


@pytest.mark.parametrize("seed", range(24))
def test_messages_are_held_and_given_back_in_any_order(seed: int) -> None:
    choices = random.Random(seed)
    nbytes, size, max_peers = (
        choices.choice((1, 100, 4096, 20 * KIB)),
        choices.choice((256 * KIB, 8 * MIB)),
        1 + seed % 2,
    )
    count, most = choices.choice((3, 40, 200)), choices.choice((1, 2))
    held: list[Message] = []

    def give_back_one() -> None:
        message = held.pop(choices.randrange(len(held)))
        assert holds(message, message.message_id)
        if choices.random() < 0.1:
            message.keep()
        if choices.random() < 0.1:
            thread = threading.Thread(target=message.release)
            thread.start()
            thread.join()
        else:
            message.release()

    with receiving(size=size, max_peers=max_peers) as receiver:
        source = Sending(receiver, nbytes, count, close_series=choices.random() < 0.5)
        for number in range(count):
            message = receiver.receive(LIMIT_S)
            assert (message.message_id, message.path.received) == (number, nbytes)
            assert holds(message, number)
            held.append(message)
            while len(held) > most or (held and choices.random() < 0.3):
                give_back_one()
        with receiver.receive(LIMIT_S) as last:
            assert last.gather().tobytes() == b"something else"
        while held:
            give_back_one()
        assert list(receiver) == []
        source.join()


@pytest.mark.parametrize("size", [256 * KIB, 2 * MIB])
def test_memory_given_back_is_granted_at_once_though_nobody_receives(size: int) -> None:
    with receiving(size=size) as receiver:
        source = Sending(receiver, 16 * KIB, 1000)
        held: list[Message] = []
        with contextlib.suppress(Timeout):
            while True:
                held.append(receiver.receive(0.2 if held else LIMIT_S))
        granted = source.sent
        assert granted < 1000, "the sender had no more credit"
        for message in held:
            message.release()
        until(lambda: source.sent > granted)
        for message in receiver:
            message.release()
        source.join()


def until(reached: Callable[[], bool]) -> None:
    """Look again and again, for as long as it may take."""
    tick = threading.Event()
    for _ in range(int(LIMIT_S / 0.01)):
        if reached():
            return
        tick.wait(0.01)
    raise AssertionError("it did not come about")


def test_the_session_hears_of_many_messages_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    honest = ReceiverSession.series_received

    def count(self: ReceiverSession, now: float, count: int = 1) -> None:
        told.append(count)
        honest(self, now, count)

    monkeypatch.setattr(ReceiverSession, "series_received", count)
    with receiving(size=16 * MIB) as receiver:
        source = Sending(receiver, 64 * KIB, 300)
        for message in receiver:
            message.release()
        source.join()
    assert sum(told) >= 290
    assert max(told) >= 20


def test_what_came_before_a_sender_failed_stays_readable_and_goes_back() -> None:
    with receiving(size=2 * MIB, max_peers=2) as receiver, senders(receiver, 2) as sources:
        held: list[Message] = []
        for source in sources:
            slot = source.reserve(16 * KIB, "uint8")
            series = source.series(16 * KIB, "uint8")
            for number in range(8):
                slot.numpy()[:] = number
                series.send(slot).wait(LIMIT_S)
        while len(held) < 8:
            held.append(receiver.receive(LIMIT_S))
        for source in sources:
            source._engine.close()
        failures = 0
        while failures < 2:
            try:
                held.append(receiver.receive(LIMIT_S))
            except BrokenError:
                failures += 1
        assert len(held) == 16
        by_peer: dict[object, int] = {}
        for message in held:
            number = by_peer.get(message.peer, 0)
            by_peer[message.peer] = number + 1
            assert holds(message, number)
            message.release()
        assert set(by_peer.values()) == {8}
        another = Sending(receiver, 512 * KIB, 1)  # half of a share: all memory is back
        for nbytes in (512 * KIB, len(b"something else")):
            with receiver.receive(LIMIT_S) as message:
                assert message.path.dmabuf == nbytes
        receiver.close()
        another.join()
