"""Sessions between any programs, over any network; what must hold is said in ``session_fuzzer``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
from hypothesis import given

import session_fuzzer
from choices import Choices
from devmem_tcp.errors import RemoteProtocolError
from devmem_tcp.sansio.credit import Grant, ReceiveCredit, SendCredit
from devmem_tcp.sansio.frames import (
    Announce,
    Decline,
    FrameDecoder,
    SessionFrame,
    encode,
    handshake_decoder,
    session_decoder,
)
from devmem_tcp.sansio.incoming import Incoming
from devmem_tcp.sansio.outgoing import Outgoing, Piece
from devmem_tcp.sansio.receiving import ReceiverSession
from devmem_tcp.sansio.sending import SenderSession
from devmem_tcp.sansio.session import Event, Outcome, Session, SessionState
from devmem_tcp.sansio.stripes import Progress
from frame_maker import HANDSHAKE_FRAMES, SESSION_FRAMES, FrameMaker
from fuzz_engines import Session as Run
from fuzz_engines import cases, run_random

Patch = pytest.MonkeyPatch


@given(case=cases())
def test_no_network_and_no_peer_does_harm(case: bytes) -> None:
    session_fuzzer.run(case, Counter())


def test_sessions_get_far_and_enemies_are_hostile() -> None:
    run = Run(session_fuzzer.run, 10_000)
    run_random(run, seed=1)
    tally = run.tally
    assert tally["messages received"] > 200
    assert tally["closed in order"] > 10
    assert tally["sessions"] > 100
    for kind in ("RemoteProtocolError", "BrokenError", "ConnectionResetError", "ClosedError", "Timeout"):
        assert tally[f"failed by {kind}"] > 2


@pytest.mark.parametrize("kinds", [HANDSHAKE_FRAMES, SESSION_FRAMES])
def test_frames_of_every_type_are_made_and_most_can_be_read(kinds: tuple[type, ...]) -> None:
    made: Counter[type] = Counter()
    decoder = handshake_decoder() if kinds is HANDSHAKE_FRAMES else session_decoder()
    for number in range(2000):
        choices = Choices()
        choices.refill(bytes((number * step + number // 256) % 256 for step in range(1, 65, 2)))
        frame = FrameMaker(choices, (1, 5)).frame(kinds)
        try:
            decoder.decode(encode(frame)[4:])  # type: ignore[arg-type]
        except RemoteProtocolError:
            assert isinstance(frame, Announce), f"{frame} breaks a limit of its items"
        else:
            made[type(frame)] += 1
    assert made.keys() == set(kinds)


def count_credit_instead_of_places(patch: Patch) -> None:
    honest = Outgoing.next_piece

    def careless(self: Outgoing, lane: int) -> Piece | None:
        used = self._next_place - sum(self.backlog)
        patch.setattr(SendCredit, "room", lambda credit, place: max(0, credit.granted_bytes - used))
        return honest(self, lane)

    patch.setattr(Outgoing, "next_piece", careless)


def let_no_lane_rest(patch: Patch) -> None:
    patch.setattr(Outgoing, "_rests", lambda self, lane: False)


def rest_for_no_end_of_a_series(patch: Patch) -> None:
    honest = Outgoing.rest
    patch.setattr(Outgoing, "lanes_of", lambda self, stripes: [])
    patch.setattr(Outgoing, "rest", honest)


def forget_the_place_of_what_went_whole(patch: Patch) -> None:
    patch.setattr(Outgoing, "skip", lambda self, nbytes: None)


def let_a_series_pass_what_waits(patch: Patch) -> None:
    patch.setattr(Outgoing, "room_for", lambda self, nbytes: self._credit.room(self._next_place) // nbytes)


def grant_the_pool_twice(patch: Patch) -> None:
    honest = ReceiveCredit.take_grant

    def careless(self: ReceiveCredit) -> Grant:
        total_bytes, total_messages = honest(self)
        return Grant(total_bytes + self.pool_bytes, total_messages)

    patch.setattr(ReceiveCredit, "take_grant", careless)


def take_bytes_without_credit(patch: Patch) -> None:
    def careless(self: ReceiveCredit, place: int, nbytes: int) -> None:
        self.arrived_bytes += nbytes

    patch.setattr(ReceiveCredit, "bytes_arrived", careless)


def take_messages_without_credit(patch: Patch) -> None:
    def careless(self: ReceiveCredit, count: int = 1) -> None:
        self.arrived_messages += count

    patch.setattr(ReceiveCredit, "message_arrived", careless)


def skip_at_once_what_never_comes(patch: Patch) -> None:
    honest = Incoming.cancel

    def careless(self: Incoming, message_id: int, lane_bytes: list[int]) -> bool:
        wanted = honest(self, message_id, lane_bytes)
        message = self._by_id[message_id]
        self._credit.bytes_skipped(message.skipped)
        message.skipped = 0
        return wanted

    patch.setattr(Incoming, "cancel", careless)


def deliver_what_was_declined(patch: Patch) -> None:
    patch.setattr(Incoming, "decline", lambda self, message_id: self._by_id[message_id].wanted)


def take_pieces_in_another_order(patch: Patch) -> None:
    honest = Progress.next_span

    def careless(self: Progress, lane: int) -> tuple[int, int]:
        offset, size = honest(self, lane)
        return offset - offset % 4096, size

    patch.setattr(Progress, "next_span", careless)


def take_any_length(patch: Patch) -> None:
    honest = FrameDecoder.__init__
    patch.setattr(FrameDecoder, "__init__", lambda self, decoder, limit, magic: honest(self, decoder, 1 << 40, magic))


def forget_a_frame_that_comes_in_two(patch: Patch) -> None:
    honest = FrameDecoder.feed

    def careless(self: FrameDecoder[object], data: bytes) -> None:
        if len(self._pending) == 3:
            self._pending.clear()
        honest(self, data)

    patch.setattr(FrameDecoder, "feed", careless)


def take_every_frame_in_every_state(patch: Patch) -> None:
    honest = Session._take

    def careless(self: Session, frame: SessionFrame) -> None:
        self._table = {**self._table, type(frame): defaultdict(lambda: Outcome.TAKE)}
        honest(self, frame)

    patch.setattr(Session, "_take", careless)


def forget_an_error(patch: Patch) -> None:
    honest = Session.next_event

    def careless(self: Session) -> Event | None:
        try:
            return honest(self)
        except Exception:
            self.ending = None
            raise

    patch.setattr(Session, "next_event", careless)


def ping_for_ever(patch: Patch) -> None:
    honest = Session.tick

    def careless(self: Session, now: float) -> None:
        self._pings_unanswered = 0
        honest(self, now)

    patch.setattr(Session, "tick", careless)


def keep_what_comes_behind_the_end(patch: Patch) -> None:
    def careless(self: Session, data: bytes, now: float) -> None:
        self._alive(now)
        self._decoder.feed(data)

    patch.setattr(Session, "receive_control", careless)


def close_before_all_is_reported(patch: Patch) -> None:
    def careless(self: ReceiverSession) -> None:
        if self.state is SessionState.LEFT:
            self._say_goodbye()
        if self.state is SessionState.PARTING:
            self._close()

    patch.setattr(ReceiverSession, "_part", careless)


def begin_nothing_that_brought_no_byte(patch: Patch) -> None:
    patch.setattr(Incoming, "_begin_rest_of_series", lambda self: None)


def decline_what_has_the_same_id(patch: Patch) -> None:
    honest = SenderSession._take_decline

    def careless(self: SenderSession, frame: Decline) -> None:
        self._series_ends.clear()
        honest(self, frame)

    patch.setattr(SenderSession, "_take_decline", careless)


@pytest.mark.parametrize(
    "plant",
    [
        count_credit_instead_of_places,
        let_no_lane_rest,
        rest_for_no_end_of_a_series,
        forget_the_place_of_what_went_whole,
        let_a_series_pass_what_waits,
        grant_the_pool_twice,
        take_bytes_without_credit,
        take_messages_without_credit,
        skip_at_once_what_never_comes,
        deliver_what_was_declined,
        take_pieces_in_another_order,
        take_any_length,
        forget_a_frame_that_comes_in_two,
        take_every_frame_in_every_state,
        forget_an_error,
        ping_for_ever,
        keep_what_comes_behind_the_end,
        close_before_all_is_reported,
        begin_nothing_that_brought_no_byte,
        decline_what_has_the_same_id,
    ],
)
def test_planted_bugs_are_found(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run_random(Run(session_fuzzer.run, 30_000), seed=1)
