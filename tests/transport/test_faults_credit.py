"""Receivers that are slow, full, or out of memory: the message at fault is declined or cancelled, the next passes."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from devmem_tcp.errors import BrokenError, DevmemError, OutOfDeviceMemory, Timeout
from devmem_tcp.sys import calls
from devmem_tcp.transport import Header, Sender, landing, receiving
from fault_ends import LIMIT_S, MIB, Sending, Survivor, bytes_of, same, surviving
from fault_peer import pattern

SHORT_S = 0.2
LARGE = 8 * MIB


@pytest.fixture
def gone() -> threading.Event:
    """Set by a sender once it has met what it was to meet."""
    return threading.Event()


def until_gone(end: Survivor, sender: Sending) -> None:
    """Drive a receiver until its sender is through."""

    def over() -> bool:
        return sender.met is not None or (end.names[-1:] == ["last"] and not end.receiver.peers)

    end.drive(over, limit_s=LIMIT_S)
    sender.join()
    assert same(end.messages[-1][1], pattern(9))


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_send_to_a_reader_that_does_not_read_times_out_and_the_session_goes_on(
    gone: threading.Event, lanes: int
) -> None:
    def act(sender: Sender) -> None:
        with pytest.raises(Timeout, match=r"message 'slow' was not sent in 0\.2 s"):
            sender.send(pattern(1, LARGE), name="slow", timeout_s=SHORT_S)
        gone.set()
        sender.send(pattern(9), name="last")

    with surviving(lanes=lanes) as end:
        sender = Sending(end, act, lanes=lanes)
        end.drive(lambda: len(end.receiver.peers) == 1)
        assert gone.wait(LIMIT_S), sender.met
        until_gone(end, sender)
        assert end.names == ["last"]
        assert not end.errors


def test_a_lane_that_finds_no_room_in_the_tx_buffer_waits_for_the_others() -> None:
    full = [BlockingIOError(errno.EAGAIN, "full")]  # the first lane, with the whole buffer staged for it

    def fill_up(name: str) -> None:
        if name == "sendmsg" and full:
            raise full.pop()

    def act(sender: Sender) -> None:
        with calls.intercept(fill_up):
            sender.send(pattern(1, 3 * MIB), name="large")
        sender.send(pattern(9), name="last")

    with surviving(lanes=3) as end:
        until_gone(end, Sending(end, act, lanes=3, size=MIB))
        assert end.names == ["large", "last"]
        assert same(end.messages[0][1], pattern(1, 3 * MIB))
    assert not full


def send_many(sender: Sender) -> None:
    for number in range(1000):
        sender.send(pattern(number, 100), name=str(number), timeout_s=SHORT_S)


def test_a_receiver_that_holds_all_its_messages_gives_no_credit_until_it_releases_some(gone: threading.Event) -> None:
    def act(sender: Sender) -> None:
        with pytest.raises(Timeout, match=r"the receiver gave no credit in 0\.2 s"):
            send_many(sender)
        gone.set()
        sender.send(pattern(9), name="last")

    with surviving(size=MIB) as end:
        sender = Sending(end, act)
        held = []
        while not gone.is_set():
            try:
                held.append(end.receiver.receive(0.02))
            except Timeout:
                continue
        assert len(held) == MIB // 4096 // 8  # a message for eight pages
        for number, message in enumerate(held):
            assert message.name == str(number)
            assert same(bytes_of(message), pattern(number, 100))
            message.release()
        until_gone(end, sender)


def test_a_receiver_that_holds_all_its_memory_lets_a_message_time_out(gone: threading.Event) -> None:
    def act(sender: Sender) -> None:
        sender.send(pattern(1, 3 * MIB), name="held")
        with pytest.raises(Timeout, match="message 'second' was not sent"):
            sender.send(pattern(2, 3 * MIB), name="second", timeout_s=SHORT_S)
        gone.set()
        sender.send(pattern(9), name="last")

    with surviving(lanes=2) as end:
        sender = Sending(end, act, lanes=2)
        with end.receiver.receive(LIMIT_S) as held:
            while not gone.is_set():
                with pytest.raises(Timeout, match="no message came"):
                    end.receiver.receive(0.02)
            assert same(bytes_of(held), pattern(1, 3 * MIB))
        until_gone(end, sender)
        assert end.names == ["last"]


# --- declined ------------------------------------------------------------------------------------------------------


def refused(sender: Sender, words: str, nbytes: int = LARGE) -> None:
    """Send a message that is declined, and one that is not."""
    with pytest.raises(BrokenError, match=f"the receiver declined message 'bad': {words}"):
        sender.send(pattern(1, nbytes), name="bad", confirm=True).wait_delivered(LIMIT_S)
    sender.send(pattern(9), name="last")


def choosing(error: Exception) -> Callable[[Header], Any]:
    def into(header: Header) -> Any:
        if header.name == "bad":
            raise error
        return np.empty(header.shape, np.uint8)

    return into


@pytest.mark.parametrize("nbytes", [LARGE, 1000])
@pytest.mark.parametrize(
    ("error", "heard"),
    [(ValueError("not this one"), []), (MemoryError(), []), (DevmemError("no"), []), (KeyError("k"), [KeyError])],
    ids=["ValueError", "MemoryError", "DevmemError", "KeyError"],
)
def test_what_into_raises_is_told_the_sender(error: Exception, heard: list[type[Exception]], nbytes: int) -> None:
    words = str(error) or type(error).__name__
    with surviving(into=choosing(error)) as end:
        sender = Sending(end, lambda sender: refused(sender, words, nbytes))
        until_gone(end, sender)
        assert end.names == ["last"]
        assert [type(error) for error in end.errors] == heard


def test_an_array_that_does_not_fit_is_told_the_sender() -> None:
    def into(header: Header) -> Any:
        return np.empty(10 if header.name == "bad" else header.shape, np.uint8)

    with surviving(into=into) as end:
        sender = Sending(
            end, lambda sender: refused(sender, f"the array to receive into has 10 bytes, the message {LARGE}")
        )
        until_gone(end, sender)


def test_a_receiver_without_host_memory_declines_what_does_not_fit_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(nbytes: int) -> memoryview:
        raise OutOfDeviceMemory(f"no {nbytes} bytes of host memory for a message", wanted=nbytes, free=0)

    monkeypatch.setattr(receiving, "host_memory", none)
    with surviving() as end:
        sender = Sending(end, lambda sender: refused(sender, f"no {LARGE} bytes of host memory for a message"))
        until_gone(end, sender)
        assert end.names == ["last"]
        assert not end.errors


def test_a_receiver_out_of_memory_in_the_middle_of_a_message_ends_that_session_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(nbytes: int) -> memoryview:
        raise OutOfDeviceMemory(f"no {nbytes} bytes of host memory for a message", wanted=nbytes, free=0)

    def act(sender: Sender) -> None:
        with pytest.raises(BrokenError, match=r"the peer aborted the session: no \d+ bytes of host memory"):
            sender.send(pattern(1, 90_000), name="scattered", confirm=True).wait_delivered(LIMIT_S)

    with surviving(size=MIB) as end:
        monkeypatch.setattr("devmem_tcp.transport.inbox.Share.take", lambda share, nbytes: None)
        monkeypatch.setattr("devmem_tcp.transport.inbox.Share.hold_pages", lambda share, pages: pages <= 0)
        monkeypatch.setattr(landing, "host_memory", none)
        sender = Sending(end, act)
        end.drive(lambda: bool(end.errors))
        sender.join()
        assert isinstance(end.errors[0], OutOfDeviceMemory)
        monkeypatch.undo()
        until_gone(end, Sending(end, lambda sender: sender.send(pattern(9), name="last") and None))


def test_a_message_over_the_receivers_limit_is_not_sent_at_all() -> None:
    def act(sender: Sender) -> None:
        with pytest.raises(ValueError, match="the receiver takes 400000"):
            sender.send(pattern(1, 400_001), name="bad")
        sender.send(pattern(9), name="last")

    with surviving(max_message_bytes=400_000) as end:
        until_gone(end, Sending(end, act))
        assert end.names == ["last"]
