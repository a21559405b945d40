"""How a session ends, by every event in every state: by whom, why, and as which error."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from devmem_tcp.errors import (
    BrokenError,
    ClosedError,
    LocalProtocolError,
    RemoteProtocolError,
    Timeout,
)
from devmem_tcp.sansio import session
from devmem_tcp.sansio.endings import Party
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
    Ping,
    Pong,
    Request,
    Role,
    SeriesEnd,
    SessionFrame,
    encode,
)
from devmem_tcp.sansio.receiving import ReceiverSession
from devmem_tcp.sansio.sending import SenderSession
from devmem_tcp.sansio.session import (
    LANE_GRACE_S,
    TABLE,
    CreditGranted,
    Happening,
    KeepAlive,
    MessageAnnounced,
    MessageReceived,
    MessagesFinished,
    Outcome,
    PeerLeaves,
    Session,
    SessionClosed,
    SessionState,
)
from session_pair import (
    LIMITS,
    PIECE,
    XXH3,
    Pair,
    announce,
    announcement,
    events_of,
    feed,
    may_announce,
    new_receiver,
    new_sender,
    said,
    send_all,
    state_of,
)

# The table


def sender_in(state: SessionState) -> SenderSession:
    """Message 0 is cancelled, message 1 announced, and sent if that must be before a Goodbye."""
    end = new_sender()
    feed(end, Credit(1000, 3, 0))
    for _ in range(2):
        announce(end, 10)
    end.cancel(0, "no")
    if state in (SessionState.LEAVING, SessionState.PARTING, SessionState.CLOSED):
        send_all(end)
        end.close()
    if state in (SessionState.LEFT, SessionState.PARTING, SessionState.CLOSED):
        feed(end, Goodbye())
    if state is SessionState.CLOSED:
        feed(end, Credit(1000, 3, 2))
    if state is SessionState.FAILED:
        end.abort("enough")
    return end


def receiver_in(state: SessionState) -> ReceiverSession:
    """A request waits for its answer; message 0 is on its way, but once CLOSED."""
    end = new_receiver()
    end.request(b"")
    feed(end, announcement(kind=XXH3))
    if state in (SessionState.LEAVING, SessionState.PARTING, SessionState.CLOSED):
        end.close()
    if state is SessionState.CLOSED:
        end.received(0, 10, 0.0)
        feed(end, Done(0, b"sum"))
        end.verified(0)
    if state in (SessionState.LEFT, SessionState.PARTING, SessionState.CLOSED):
        feed(end, Goodbye())
    if state is SessionState.FAILED:
        end.abort("enough")
    return end


MAKERS: dict[Role, Callable[[SessionState], Session]] = {Role.SENDER: sender_in, Role.RECEIVER: receiver_in}
FRAMES: dict[session.What, SessionFrame] = {
    Announce: announcement(1),
    Credit: Credit(2000, 4, 0),
    Done: Done(0, b"sum"),
    SeriesEnd: SeriesEnd(2),
    Cancel: Cancel(0, [5, 0], "changed my mind"),
    Request: Request(0, b""),
    Answer: Answer(0, b"", True),
    CancelTaken: CancelTaken(0),
    Decline: Decline(1, "no room"),
    Abort: Abort("no memory"),
    Ping: Ping(7),
    Pong: Pong(7),
    Goodbye: Goodbye(),
}
CELLS = [(role, what, state) for role, rows in TABLE.items() for what in rows for state in rows[what]]


def happen(end: Session, what: session.What) -> None:
    if what in FRAMES:
        if what is SeriesEnd:
            end.receive_control(encode(announcement(1, count=5)), 0.0)
        # what a sender hears of finished messages is as far as it announced: see sender_in
        end.receive_control(encode(FRAMES[what]), 0.0)
    elif what is Happening.CONTROL_END:
        end.control_ended(0.0)
    elif what is Happening.LANE_END:
        end.lane_ended(0, 0.0)
        end.tick(LANE_GRACE_S)
    else:
        end._keep_alive = KeepAlive(1.0, 0)
        end.tick(1.0)


@pytest.mark.parametrize("role", Role)
def test_every_event_in_every_state_does_what_the_table_says(role: Role) -> None:
    for _, what, state in (cell for cell in CELLS if cell[0] is role):
        end = MAKERS[role](state)
        assert end.state is state
        said(end)
        if state is not SessionState.FAILED:
            events_of(end)
        ending = end.ending
        happen(end, what)
        match TABLE[role][what][state]:
            case Outcome.TAKE if what is Abort:
                fails(end, BrokenError, "the peer aborted the session: no memory", Party.PEER)
            case Outcome.TAKE:
                events_of(end)
                assert end.state not in (SessionState.CLOSED, SessionState.FAILED), (what, state)
            case Outcome.BROKEN:
                fails(end, RemoteProtocolError, f"does not go to a {role.value} that is {state.name}", Party.PEER)
                assert isinstance(said(end)[-1], Abort)
            case Outcome.LOST if what is Happening.CONTROL_END:
                early = state in (SessionState.OPEN, SessionState.LEAVING)
                said_so = "without a goodbye" if early else "after its goodbye, before all was settled"
                fails(end, ConnectionResetError, said_so, Party.PEER)
                assert said(end) == []
            case Outcome.LOST if what is Happening.LANE_END:
                fails(end, ConnectionResetError, "data connection 0 ended before", Party.NETWORK)
                assert isinstance(said(end)[-1], Abort)
            case Outcome.LOST:
                fails(end, Timeout, "no sign of life", Party.NETWORK)
            case Outcome.PASS:
                assert (end.state, end.ending, said(end)) == (state, ending, []), (what, state)
                if state is SessionState.CLOSED:
                    assert events_of(end) == []
                else:
                    fails(end, ClosedError, "this side aborted the session: enough", Party.HERE)


def fails(end: Session, kind: type[Exception], words: str, by: Party) -> None:
    """Check the error and who made it, and that it is final."""
    with pytest.raises(kind, match=words):
        events_of(end)
    with pytest.raises(kind, match=words) as caught:
        end.next_event()
    assert type(caught.value) is kind
    assert end.state is SessionState.FAILED
    assert end.ending is not None
    assert end.ending.by is by
    assert end.deadline() is None
    end.close()
    end.abort("again")
    end.tick(1e9)
    ask: Callable[[int], object] = (
        end.next_piece if isinstance(end, SenderSession) else cast(ReceiverSession, end).expected
    )
    with pytest.raises(kind, match=words):
        ask(0)


def test_the_table_in_the_docstring_is_the_table() -> None:
    assert session.__doc__ is not None
    names = {"take": Outcome.TAKE, "broken": Outcome.BROKEN, "lost": Outcome.LOST, "pass": Outcome.PASS}
    happenings: dict[str, list[session.What]] = {
        "the control connection ends": [Happening.CONTROL_END],
        "a lane ends": [Happening.LANE_END],
        "silence": [Happening.SILENCE],
    }
    kinds: dict[str, session.What] = {kind.__name__: kind for kind in FRAMES if isinstance(kind, type)}
    told: dict[Role, dict[session.What, list[Outcome]]] = {Role.SENDER: {}, Role.RECEIVER: {}}
    role = Role.SENDER
    for line in session.__doc__.splitlines():
        words = line.split()
        if "to whom" in line:
            role = Role(words[0].rstrip(","))
            assert words[-6:] == [state.name for state in SessionState]
        elif "as for the sender" in line:
            told[role] |= {
                what: outcomes for what, outcomes in told[Role.SENDER].items() if isinstance(what, Happening)
            }
        elif len(words) > 6 and all(word in names for word in words[-6:]):
            subject = " ".join(words[:-6])
            for what in happenings.get(subject) or [kinds[name] for name in subject.split(", ")]:
                told[role][what] = [names[word] for word in words[-6:]]
    assert told == {
        role: {what: list(outcomes.values()) for what, outcomes in rows.items()} for role, rows in TABLE.items()
    }


# What a hostile peer may try


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([announcement(1)], "message 1 was announced where 0 comes next"),
        ([announcement(0), announcement(0)], "message 0 was announced where 1 comes next"),
        ([announcement(n, 0) for n in range(9)] + [announcement(9), announcement(9)], "where 10 comes next"),
        ([announcement(n) for n in range(5)], "message 4 was announced without credit"),
        ([announcement(0, (1 << 20) + 1)], "message 0 is over the limits"),
        ([announcement(0, width=3)], "stripes over 3 lanes from lane 0 on: the session has 2"),
        ([announcement(0, kind=ChecksumKind.CRC32C)], "a checksum by crc32c, which was not agreed"),
        ([Done(0, b"sum")], "message 0 is not on its way"),
        ([announcement(), Done(0, b"sum")], "a checksum of message 0, where none is due"),
        ([announcement(kind=XXH3), Done(0, b"s"), Done(0, b"s")], "a checksum of message 0, where none is due"),
        ([Cancel(0, [0, 0], "")], "message 0 is not on its way"),
        ([announcement(), Cancel(0, [5, 0], ""), Cancel(0, [5, 0], "")], "is cancelled already"),
        ([announcement(), announcement(1, 0), Cancel(1, [0, 0], "")], "is complete already"),
        ([announcement(), Cancel(0, [11, 0], "")], "ends after 11 bytes on lane 0, where 0 of 10 had come"),
        ([announcement(), Cancel(0, [0, 1], "")], "ends after 1 bytes on lane 1, where 0 of 0 had come"),
        ([announcement(), Cancel(0, [1], "")], "bytes of 1 lanes, where the session has 2"),
        ([announcement(kind=XXH3), Cancel(0, [5, 0], ""), Done(0, b"s")], "a checksum of message 0, where none is due"),
        ([Ping(n) for n in range(65)], "65 pings in 0.0 s"),
    ],
)
def test_a_sender_that_breaks_the_rules_is_cut_off(frames: list[SessionFrame], words: str) -> None:
    end = new_receiver()
    if len(frames) > 9:
        end = ReceiverSession(limits=LIMITS, now=0.0, pool_bytes=100, pool_messages=99)
    said(end)
    end.receive_control(b"".join(map(encode, frames)), 0.0)
    fails(end, RemoteProtocolError, words, Party.PEER)
    assert isinstance(said(end)[-1], Abort)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (Credit(999, 3, 0), "takes back what was granted"),
        (Credit(1000, 2, 0), "takes back what was granted"),
        (Credit(1000, 3, 3), "3 messages finished, of 2 announced"),
        (CancelTaken(1), "a cancel of message 1 was taken, and none is under way"),
        (Decline(2, ""), "message 2 was declined, and never announced"),
    ],
)
def test_a_receiver_that_breaks_the_rules_is_cut_off(frame: SessionFrame, words: str) -> None:
    end = sender_in(SessionState.OPEN)
    end.receive_control(encode(frame), 0.0)
    fails(end, RemoteProtocolError, words, Party.PEER)


def test_finished_messages_cannot_be_taken_back() -> None:
    end = sender_in(SessionState.OPEN)
    feed(end, Credit(1000, 3, 1))
    end.receive_control(encode(Credit(1000, 3, 0)), 0.0)
    fails(end, RemoteProtocolError, "0 messages finished, of 2 announced", Party.PEER)


def test_a_cancel_below_what_came_is_refused() -> None:
    end = new_receiver()
    feed(end, announcement())
    end.received(0, 6, 0.0)
    end.receive_control(encode(Cancel(0, [5, 0], "")), 0.0)
    fails(end, RemoteProtocolError, "ends after 5 bytes on lane 0, where 6 of 10 had come", Party.PEER)


def test_bytes_without_credit_are_refused() -> None:
    end = ReceiverSession(limits=LIMITS, now=0.0, pool_bytes=100, pool_messages=4)
    feed(end, announcement(0, 101))
    said(end)
    end.received(0, 100, 0.0)
    with pytest.raises(RemoteProtocolError, match="bytes up to 101 were sent, and 100 granted"):
        end.received(0, 1, 0.0)
    fails(end, RemoteProtocolError, "bytes up to 101 were sent", Party.PEER)
    assert isinstance(said(end)[-1], Abort)


def test_events_before_an_error_are_told_first() -> None:
    end = new_receiver()
    end.receive_control(encode(announcement(0, 0)) + encode(Ping(1)) + b"\xff" * 4, 0.0)
    assert end.next_event() == MessageAnnounced(0, announcement(0, 0))
    assert end.next_event() == MessageReceived(0, b"")
    fails(end, RemoteProtocolError, "a frame of 4294967295 bytes", Party.PEER)


def test_pings_may_come_at_a_pace() -> None:
    end = new_receiver()
    said(end)
    for second in range(10):
        end.receive_control(b"".join(encode(Ping(n)) for n in range(64)), float(second))
        assert events_of(end) == []
        assert said(end) == [Pong(n) for n in range(64)]


# Ends


def test_a_sender_closes_after_what_it_announced() -> None:
    pair = Pair()
    pair.control()
    pair.announce(b"bytes", XXH3)
    pair.sender.close()
    assert state_of(pair.sender) is SessionState.OPEN, "the bytes are not sent"
    with pytest.raises(LocalProtocolError, match="this side is closing the session"):
        pair.announce(b"more")
    pair.settle()
    assert state_of(pair.sender) is SessionState.OPEN, "the checksum is due"
    pair.sender.finish(0, b"sum")
    assert state_of(pair.sender) is SessionState.LEAVING
    pair.settle()
    assert state_of(pair.sender) is SessionState.LEAVING, "the receiver has not verified it"
    pair.receiver.verified(0)
    pair.settle()
    for events in (pair.sender_events, pair.receiver_events):
        assert events[-1] == SessionClosed()
        assert PeerLeaves() in events
    assert MessagesFinished(1) in pair.sender_events
    assert pair.sender.next_piece(0) is None
    assert pair.receiver.expected(0) is None
    with pytest.raises(ClosedError, match="the session is closed"):
        pair.announce(b"more")
    pair.receiver.release(0, 1)
    assert pair.receiver.data_to_send() == b"", "released after the end: nobody is told"


def test_a_receiver_asks_for_the_end_and_gets_what_is_under_way() -> None:
    pair = Pair()
    pair.control()
    pair.announce(bytes(3 * PIECE))
    pair.receiver.close()
    pair.control()
    assert state_of(pair.sender) is SessionState.LEFT
    assert not may_announce(pair)
    with pytest.raises(LocalProtocolError, match="the receiver is closing the session"):
        pair.announce(b"more")
    pair.settle()
    assert pair.taken == [bytes(3 * PIECE)]
    assert pair.sender_events[-1] == pair.receiver_events[-1] == SessionClosed()


def test_goodbyes_that_cross_close_both() -> None:
    pair = Pair()
    pair.control()
    pair.sender.close()
    pair.receiver.close()
    pair.settle()
    assert pair.sender.state is pair.receiver.state is SessionState.CLOSED
    pair.sender.close()
    pair.receiver.close()
    assert pair.sender.data_to_send() == pair.receiver.data_to_send() == b""


def test_an_aborted_session_tells_the_peer_why() -> None:
    pair = Pair()
    pair.control()
    pair.announce(b"bytes")
    pair.receiver.abort("checksum of message 0 is wrong\n")
    with pytest.raises(BrokenError, match=r"the peer aborted the session: checksum of message 0 is wrong\?"):
        pair.settle()
    with pytest.raises(ClosedError, match="this side aborted"):
        pair.receiver.next_event()


def test_what_comes_behind_the_end_is_not_kept() -> None:
    pair = Pair()
    pair.settle()
    pair.sender.close()
    pair.settle()
    pair.receiver.close()
    failed = new_receiver()
    failed.abort("enough")
    for end in (pair.sender, pair.receiver, failed):
        for _ in range(3):
            end.receive_control(bytes(1 << 16), 0.0)
        assert end._decoder.pending_bytes == 0


def test_the_error_says_what_was_under_way() -> None:
    end = sender_in(SessionState.OPEN)
    end.control_ended(0.0)
    fails(end, ConnectionResetError, "0 of 2 messages are known to have arrived", Party.PEER)
    other = receiver_in(SessionState.OPEN)
    other.control_ended(0.0)
    fails(other, ConnectionResetError, "1 messages were under way", Party.PEER)


def test_frames_before_the_end_of_the_connection_are_heard() -> None:
    end = new_receiver()
    end.receive_control(encode(announcement()) + encode(Abort("out of memory")), 0.0)
    end.control_ended(0.0)
    assert end.next_event() == MessageAnnounced(0, announcement())
    fails(end, BrokenError, "out of memory", Party.PEER)


def test_a_lane_that_ends_is_explained_by_what_the_control_connection_says_next() -> None:
    end = sender_in(SessionState.OPEN)
    end.lane_ended(1, 5.0)
    end.lane_ended(0, 5.5)
    assert end.deadline() == 5.0 + LANE_GRACE_S
    end.tick(5.9)
    assert events_of(end) == []
    end.receive_control(encode(Abort("no memory")), 5.9)
    fails(end, BrokenError, "no memory", Party.PEER)
    end = sender_in(SessionState.PARTING)
    end.lane_ended(0, 5.0)
    assert feed(end, Credit(1000, 3, 2))[-1] == SessionClosed()
    end.tick(9.0)
    assert events_of(end) == []
    assert end.deadline() is None
    end = sender_in(SessionState.OPEN)
    end.lane_ended(1, 5.0)
    end.tick(6.0)
    fails(end, ConnectionResetError, "data connection 1 ended", Party.NETWORK)


def test_a_silent_peer_is_pinged_and_given_up() -> None:
    end = new_sender(KeepAlive(10.0, 2))
    assert end.deadline() == 10.0
    end.tick(9.9)
    assert said(end) == []
    end.tick(10.0)
    assert said(end) == [Ping(1)]
    assert end.deadline() == 20.0
    end.tick(20.0)
    assert said(end) == [Ping(2)]
    end.tick(29.9)
    assert events_of(end) == []
    end.tick(30.0)
    fails(end, Timeout, "no sign of life from the peer in 30.0 s", Party.NETWORK)


def test_any_sign_of_life_starts_the_count_again() -> None:
    end = new_sender(KeepAlive(10.0, 1))
    end.tick(10.0)
    end.receive_control(encode(Pong(1)), 12.0)
    assert end.deadline() == 22.0
    end.tick(22.0)
    end.receive_control(encode(Credit(100, 1, 0)), 23.0)
    assert events_of(end) == [CreditGranted()]
    announce(end, 100)
    end.tick(33.0)
    end.sent(0, 50, 34.0)
    assert end.deadline() == 44.0
    end.tick(44.0)
    assert events_of(end) == []
    end.tick(54.0)
    fails(end, Timeout, "in 20.0 s", Party.NETWORK)


def test_a_slow_transfer_is_no_dead_peer() -> None:
    end = new_receiver(KeepAlive(10.0, 1))
    feed(end, announcement(0, 100))
    said(end)
    for second in range(0, 400, 9):
        end.received(0, 1, float(second))
        end.tick(second + 5.0)
    assert events_of(end) == []
    assert said(end) == []


def test_a_program_that_was_busy_long_pings_before_it_gives_up() -> None:
    end = new_sender(KeepAlive(10.0, 2))
    end.tick(10_000.0)
    assert said(end) == [Ping(1)]
    assert end.deadline() == 10_010.0


def test_without_keep_alive_there_is_no_deadline() -> None:
    end = new_sender()
    assert end.deadline() is None
    end.tick(1e9)
    assert said(end) == []


def test_pings_are_answered_by_either_end_itself() -> None:
    pair = Pair(keep_alive=KeepAlive(10.0, 1))
    pair.control()
    for now in (10.0, 20.0, 30.0):
        pair.now = now
        for end in (pair.sender, pair.receiver):
            end.tick(now)
        while pair.control():
            pass
    assert pair.sender.state is pair.receiver.state is SessionState.OPEN
