"""Several senders at once, faster than the receiver: each has its turn, of a few messages in a row."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections import Counter

import pytest

from devmem_tcp.errors import BrokenError
from devmem_tcp.transport import Sender, receiver_engine
from tensor_ends import MIB, receiving, senders

NBYTES = 20 << 10
MESSAGES = 24
TURN = 4  # messages, besides the one that begins it


def send_all(sources: list[Sender]) -> None:
    """Send a series from each, by turns, message n full of n."""
    with contextlib.ExitStack() as stack:
        lines = [
            (stack.enter_context(source.series(NBYTES, "uint8")), stack.enter_context(source.reserve(NBYTES, "uint8")))
            for source in sources
        ]
        for number in range(MESSAGES):
            for series, slot in lines:
                slot.numpy()[:] = number
                series.send(slot).wait(20)


@pytest.fixture
def small_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver_engine, "_BYTES_IN_A_ROW", TURN * (NBYTES + receiver_engine._BYTES_A_MESSAGE))


def test_senders_that_wait_have_turns_of_a_few_messages(small_turns: None) -> None:
    with receiving(size=8 * MIB, max_peers=3) as receiver, senders(receiver, 3) as sources:
        send_all(sources)
        came = []
        for _ in range(MESSAGES * len(sources)):
            with receiver.receive(20) as message:
                assert len(set(message.gather().tobytes())) == 1
                came.append((message.peer, message.gather().numpy()[0]))
    turns = [[number for _, number in group] for _, group in itertools.groupby(came, lambda item: item[0])]
    assert {peer: [number for who, number in came if who == peer] for peer, _ in came} == {
        peer: list(range(MESSAGES)) for peer, _ in came
    }
    ended = turns.index(next(turn for turn in turns if turn[-1] == MESSAGES - 1))
    while_all_wait = [len(turn) for turn in turns[:ended]]
    assert max(while_all_wait) == 1 + TURN, "nobody is kept waiting for longer"
    assert while_all_wait.count(1 + TURN) > len(while_all_wait) / 2, "there is more than one message in most turns"


def test_a_sender_that_fails_in_its_turn_ends_nobody_elses(small_turns: None) -> None:
    with receiving(size=8 * MIB, max_peers=3) as receiver, senders(receiver, 3) as sources:
        send_all(sources)
        counts: Counter[object] = Counter()
        failures = 0
        with receiver.receive(20) as first:
            counts[first.peer] += 1
        for source in sources[1:]:
            source._engine.close()
        while failures < 2 or counts[receiver.peers[0]] < MESSAGES:
            try:
                with receiver.receive(20) as message:
                    counts[message.peer] += 1
            except BrokenError:
                failures += 1
        assert len(receiver.peers) == 1


def test_who_comes_is_seen_though_the_only_sender_never_pauses(
    small_turns: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver_engine, "_BYTES_BLIND", TURN * (NBYTES + receiver_engine._BYTES_A_MESSAGE))
    with receiving(size=8 * MIB, max_peers=3) as receiver, senders(receiver, 1) as sources:
        send_all(sources)
        with contextlib.ExitStack() as stack:
            for number in range(MESSAGES):
                if number == 3:
                    assert receiver.address
                    stranger = stack.enter_context(socket.create_connection(receiver.address))
                    stranger.sendall(b"nobody that it knows")
                with receiver.receive(20) as message:
                    assert message.message_id == number
            assert receiver.refused == 1
