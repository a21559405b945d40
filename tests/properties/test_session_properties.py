"""Two sessions, whatever is split, delayed or interleaved: what arrives is what was sent, in order, within credit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from devmem_tcp.errors import BrokenError, RemoteProtocolError
from devmem_tcp.sansio.frames import (
    Abort,
    Announce,
    Answer,
    Cancel,
    CancelTaken,
    ChecksumKind,
    Credit,
    Decline,
    Done,
    Goodbye,
    Limits,
    Ping,
    Pong,
    Request,
    SeriesEnd,
    SessionFrame,
    Stripes,
    encode,
)
from devmem_tcp.sansio.receiving import ReceiverSession
from devmem_tcp.sansio.sending import SenderSession
from devmem_tcp.sansio.session import (
    MessageAnnounced,
    MessageCancelled,
    MessageReceived,
    SessionClosed,
    SessionState,
)
from devmem_tcp.sansio.stripes import Progress, Striping, choose_stripes
from session_pair import PIECE, Pair

POOL_BYTES = 3 * PIECE
POOL_MESSAGES = 4
LANES = 3
sizes = st.integers(0, 5 * PIECE) | st.sampled_from((0, 1, PIECE, PIECE + 1))
lane_numbers = st.integers(0, LANES - 1)
amounts = st.integers(1, 20) | st.integers(1, 4 * PIECE)


@given(st.integers(0, 70_000), st.integers(1, 7), st.data())
def test_stripes_cover_a_message_once_and_in_order_on_each_lane(nbytes: int, lanes: int, data: st.DataObject) -> None:
    first_lane, width = data.draw(st.integers(0, lanes - 1)), data.draw(st.integers(1, lanes))
    striping = Striping(nbytes, Stripes(PIECE, first_lane, width), lanes)
    progress = Progress(striping)
    covered: list[tuple[int, int]] = []
    for lane in range(lanes):
        size_before = progress.left(lane)
        assert size_before == striping.lane_nbytes(lane)
        last = -1
        while progress.left(lane):
            offset, size = progress.next_span(lane)
            assert offset > last
            last = offset
            taken = data.draw(st.integers(-(-size // 3), size))
            covered.append((offset, taken))
            progress.advance(lane, taken)
    assert progress.missing == 0
    place = 0
    for offset, size in sorted(covered):
        assert offset == place
        place += size
    assert place == nbytes


@given(st.integers(0, 1 << 48), st.lists(st.integers(0, 99), min_size=1, max_size=64), st.integers(12, 30))
def test_chosen_stripes_start_where_least_waits_and_use_no_lane_in_vain(
    nbytes: int, backlog: list[int], power: int
) -> None:
    stripes = choose_stripes(nbytes, backlog, 1 << power)
    striping = Striping(nbytes, stripes, len(backlog))
    assert backlog[stripes.first_lane] == min(backlog)
    if nbytes:
        assert all(striping.lane_nbytes(lane) for lane in striping.used_lanes())
        assert sum(striping.lane_nbytes(lane) for lane in range(len(backlog))) == nbytes


class Transfers(RuleBasedStateMachine):
    """Any order of what users and networks do; at the end everything is drained, and nothing may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(LANES, POOL_BYTES, POOL_MESSAGES)
        self.with_checksum: set[int] = set()
        self.unfinished: set[int] = set()
        self.cancelled: set[int] = set()
        self.declined: set[int] = set()
        self.seen = 0
        self.next_received = 0
        self.received: list[int] = []
        self.messages_held = 0
        self.closing = False

    @initialize()
    def first_grant(self) -> None:
        self.pair.control()

    @rule(batch=st.lists(st.tuples(sizes, st.booleans(), st.booleans()), min_size=1, max_size=POOL_MESSAGES))
    def announce(self, batch: list[tuple[int, bool, bool]]) -> None:
        for size, checksum, confirm in batch:
            if self.pair.sender.may_announce:
                payload = bytes((len(self.pair.payloads) + 7 * index) % 251 for index in range(size))
                kind = ChecksumKind.XXH3 if checksum else ChecksumKind.NONE
                message_id = self.pair.announce(payload, kind, confirm)
                if checksum:
                    self.with_checksum.add(message_id)
                    self.unfinished.add(message_id)

    @rule()
    def settle(self) -> None:
        self.pair.settle()
        self.look()
        self.pair.release(0, self.messages_held)
        self.messages_held = 0

    @rule(lane=lane_numbers, nbytes=amounts)
    def send(self, lane: int, nbytes: int) -> None:
        self.pair.send(lane, nbytes)

    @rule(lane=lane_numbers, nbytes=amounts)
    def receive(self, lane: int, nbytes: int) -> None:
        self.pair.receive(lane, nbytes)
        self.look()

    @rule(nbytes=st.integers(1, 60) | st.just(1 << 20))
    def control(self, nbytes: int) -> None:
        self.pair.control(nbytes)
        self.look()

    @precondition(lambda self: self.unfinished)
    @rule()
    def finish(self) -> None:
        message_id = self.unfinished.pop()
        due = self.pair.sender.finish(message_id, bytes([message_id % 251]))
        assert due or message_id in self.declined, "cancelled ones are not unfinished"

    @precondition(lambda self: self.pair.payloads)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        message_id = data.draw(st.integers(max(0, len(self.pair.payloads) - 4), len(self.pair.payloads) - 1))
        if self.pair.sender.cancel(message_id, "no"):
            self.cancelled.add(message_id)
            self.unfinished.discard(message_id)

    @precondition(lambda self: self.seen > self.next_received)
    @rule(data=st.data())
    def decline(self, data: st.DataObject) -> None:
        message_id = data.draw(st.integers(self.next_received, self.seen - 1))
        if message_id not in self.cancelled | self.declined:
            self.pair.receiver.decline(message_id, "no")
            self.declined.add(message_id)
            self.look()

    @precondition(lambda self: self.pair.held or self.messages_held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        messages = data.draw(st.integers(0, self.messages_held))
        self.messages_held -= messages
        self.pair.release(data.draw(st.integers(0, self.pair.held)), messages)

    @precondition(lambda self: not self.closing and len(self.pair.payloads) > 6)
    @rule(who=st.sampled_from(("sender", "receiver")))
    def close(self, who: str) -> None:
        self.closing = True
        (self.pair.sender if who == "sender" else self.pair.receiver).close()

    def look(self) -> None:
        """Read the receiver's events, and verify what is to be verified."""
        while self.pair.receiver_events:
            event = self.pair.receiver_events.pop(0)
            if isinstance(event, MessageAnnounced):
                assert event.message_id == self.seen
                self.seen += 1
            elif isinstance(event, MessageCancelled):
                assert event.message_id in self.cancelled
            elif isinstance(event, MessageReceived):
                self.take(event)
            self.pair.collect()

    def take(self, event: MessageReceived) -> None:
        message_id = event.message_id
        assert message_id >= self.next_received, "in order, and once"
        assert message_id not in self.cancelled | self.declined
        assert self.pair.taken[message_id] == self.pair.payloads[message_id]
        self.next_received = message_id + 1
        self.received.append(message_id)
        self.messages_held += 1
        if message_id in self.with_checksum:
            assert event.checksum == bytes([message_id % 251])
            self.pair.receiver.verified(message_id)
        else:
            assert event.checksum == b""

    @invariant()
    def the_pool_is_enough(self) -> None:
        assert self.pair.held <= POOL_BYTES
        assert self.messages_held <= POOL_MESSAGES

    @invariant()
    def nothing_is_on_a_wire_without_credit(self) -> None:
        assert self.pair.held + sum(map(len, self.pair.wires)) <= POOL_BYTES

    def teardown(self) -> None:
        while self.unfinished:
            self.finish()
        for _ in range(POOL_MESSAGES + 1):  # those that wait to be verified come one by one
            self.settle()
        expected = set(range(len(self.pair.payloads))) - self.cancelled - self.declined
        assert set(self.received) == expected
        self.pair.sender.close()
        self.pair.settle()
        self.look()
        assert self.pair.sender.state is self.pair.receiver.state is SessionState.CLOSED
        assert self.pair.sender_events.count(SessionClosed()) == 1
        assert not any(self.pair.wires)


TestTransfers = Transfers.TestCase
TestTransfers.settings = settings(max_examples=60, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])

moves = st.tuples(st.sampled_from(("send", "receive", "control", "release")), lane_numbers, amounts)


@given(st.lists(sizes, min_size=2, max_size=POOL_MESSAGES), st.lists(moves, min_size=10, max_size=40))
def test_no_order_of_moves_exceeds_the_credit_or_loses_a_byte(
    lengths: list[int], order: list[tuple[str, int, int]]
) -> None:
    pair = Pair(LANES, POOL_BYTES, POOL_MESSAGES)
    pair.control()
    for number, size in enumerate(lengths):
        pair.announce(bytes((number + index) % 251 for index in range(size)))
    for move, lane, nbytes in order:
        if move == "send":
            pair.send(lane, nbytes)
        elif move == "receive":
            pair.receive(lane, nbytes)
        elif move == "control":
            pair.control(nbytes)
        else:
            pair.release(min(nbytes, pair.held))
        assert pair.held + sum(map(len, pair.wires)) <= POOL_BYTES
    pair.settle()
    assert pair.taken == pair.payloads
    received = [event.message_id for event in pair.receiver_events if isinstance(event, MessageReceived)]
    assert received == list(range(len(lengths)))


small = st.integers(0, 4)
any_frame: st.SearchStrategy[SessionFrame] = st.one_of(
    st.builds(
        lambda message_id, nbytes, lane, width, kind, confirm, count: Announce(
            message_id, "w", "uint8", [nbytes], "C", nbytes, Stripes(PIECE, lane, width), kind, confirm, b"", count
        ),
        small,
        st.sampled_from((0, 1, PIECE, 3 * PIECE)),
        small,
        st.integers(1, 4),
        st.sampled_from(ChecksumKind),
        st.booleans(),
        st.integers(1, 3),
    ),
    st.builds(SeriesEnd, small),
    st.builds(Request, small, st.just(b"?")),
    st.builds(Answer, small, st.just(b"!"), st.booleans()),
    st.builds(Credit, st.sampled_from((0, 100, 1 << 20)), small, small),
    st.builds(Done, small, st.just(b"sum")),
    st.builds(Cancel, small, st.lists(st.sampled_from((0, 1, PIECE)), min_size=1, max_size=4), st.just("no")),
    st.builds(CancelTaken, small),
    st.builds(Decline, small, st.just("no")),
    st.builds(Abort, st.just("no")),
    st.builds(Ping, small),
    st.builds(Pong, small),
    st.just(Goodbye()),
)


def hear(end: SenderSession | ReceiverSession, data: bytes) -> str:
    """Feed a session and use it as a driver would; returns the error's words."""
    end.receive_control(data, 0.0)
    try:
        while end.next_event() is not None:
            pass
        if isinstance(end, ReceiverSession):
            for lane in range(end.lanes):
                while (piece := end.expected(lane)) is not None:
                    end.received(lane, piece.size, 0.0)
        else:
            while end.may_announce and end.announced < 3:
                end.announce(name="w", dtype="uint8", shape=(9,), nbytes=9)
            for lane in range(end.lanes):
                if (todo := end.next_piece(lane)) is not None:
                    end.sent(lane, todo.size, 0.0)
    except Exception as error:
        return told(end, error)
    return ""


def told(end: SenderSession | ReceiverSession, error: Exception) -> str:
    """Return an error's words; it must be the one that the session ended with."""
    assert end.ending is not None
    assert type(error) is end.ending.kind
    return str(error)


@pytest.mark.parametrize("role", [SenderSession, ReceiverSession])
@given(data=st.data())
def test_no_sequence_of_frames_makes_a_session_do_anything_but_end_it(role: type[Any], data: st.DataObject) -> None:
    pool: dict[str, int] = {"pool_bytes": POOL_BYTES, "pool_messages": 3} if role is ReceiverSession else {}
    end = role(limits=Limits(LANES), now=0.0, checksums=frozenset({ChecksumKind.XXH3}), **pool)
    failed = ""
    for _ in range(data.draw(st.integers(1, 12))):
        words = hear(end, encode(data.draw(any_frame)))
        assert not failed or words == failed, "an error is final"
        failed = words


@given(st.lists(any_frame, max_size=8), st.binary(max_size=20), st.lists(st.integers(0, 400), max_size=6))
def test_any_split_of_control_gives_the_same_session(sent: list[SessionFrame], junk: bytes, ends: list[int]) -> None:
    data = b"".join(map(encode, sent)) + junk
    cuts = sorted(min(end, len(data)) for end in ends)
    outcomes = []
    for chunks in ([data], [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]):
        end = ReceiverSession(limits=Limits(LANES), now=0.0, pool_bytes=POOL_BYTES, pool_messages=3)
        seen: list[object] = []
        try:
            for chunk in chunks:
                end.receive_control(chunk, 0.0)
                while (event := end.next_event()) is not None:
                    seen.append(event)
        except Exception as error:
            seen.append((type(error), str(error)))
        outcomes.append((seen, end.data_to_send(), end.state))
    assert outcomes[0] == outcomes[1]


@given(st.binary(max_size=300))
def test_random_bytes_end_a_session_by_a_protocol_error_or_wait_for_more(data: bytes) -> None:
    end = ReceiverSession(limits=Limits(LANES), now=0.0, pool_bytes=POOL_BYTES, pool_messages=3)
    end.receive_control(data, 0.0)
    words = ""
    try:
        while end.next_event() is not None:
            pass
    except Exception as error:
        words = told(end, error)
    assert bool(words) is (end.state is SessionState.FAILED)
    assert end.ending is None or end.ending.kind in (RemoteProtocolError, BrokenError)
