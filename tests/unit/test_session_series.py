"""Series of messages alike, and requests: what goes over, in which order, and what breaks the protocol."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.errors import LocalProtocolError, RemoteProtocolError
from devmem_tcp.sansio.frames import MAX_BODY, Answer, Cancel, ChecksumKind, Credit, Decline, Request, SeriesEnd, encode
from devmem_tcp.sansio.session import (
    MAX_REQUESTS,
    Answered,
    CreditGranted,
    MessageAnnounced,
    MessageCancelled,
    MessageDeclined,
    MessageReceived,
    Requested,
    SeriesEnded,
    SessionState,
)
from session_pair import PIECE, Pair, announcement, new_receiver, new_sender

SIZE = 2 * PIECE + 100


def payload(number: int, size: int = SIZE) -> bytes:
    return bytes([number % 251]) * size


def received(pair: Pair) -> list[int]:
    return [event.message_id for event in pair.receiver_events if isinstance(event, MessageReceived)]


def control_frames(pair: Pair) -> int:
    return len(pair.sender.data_to_send())


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_the_messages_of_a_series_cost_no_frame(lanes: int) -> None:
    pair = Pair(lanes)
    pair.settle()
    pair.announce_series(payload(0), 5)
    pair.settle()
    for number in range(1, 5):
        assert pair.announce_next(payload(number)) == number
        assert control_frames(pair) == 0
        pair.settle()

    assert received(pair) == [0, 1, 2, 3, 4]
    assert [bytes(taken) for taken in pair.taken] == pair.payloads
    assert pair.sender.series_left == 0
    pair.announce(b"another")
    pair.settle()
    assert received(pair)[-1] == 5


@given(st.data())
def test_any_interleaving_of_lanes_gives_the_same_messages(data: st.DataObject) -> None:
    lanes, count = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6))
    pair = Pair(lanes, pool_bytes=data.draw(st.sampled_from((PIECE, 3 * PIECE, 1 << 20))))
    pair.settle()
    pair.announce_series(payload(0), count)
    begun, wanted = 1, data.draw(st.integers(1, count))
    while len(received(pair)) < wanted:
        match data.draw(st.integers(0, 4)):
            case 0 if begun < wanted:
                pair.announce_next(payload(begun))
                begun += 1
            case 1:
                pair.control(data.draw(st.integers(1, 40)))
            case 2:
                pair.send(data.draw(st.integers(0, lanes - 1)), data.draw(st.integers(1, 2 * PIECE)))
            case 3:
                pair.receive(data.draw(st.integers(0, lanes - 1)), data.draw(st.integers(1, 2 * PIECE)))
            case _:
                pair.settle() if begun == wanted else pair.release()
    pair.sender.end_series()
    pair.announce(b"and what follows")
    pair.settle()

    assert [bytes(taken) for taken in pair.taken] == pair.payloads
    assert received(pair) == list(range(wanted + 1))
    pair.sender.close()
    pair.settle()
    assert {pair.sender.state, pair.receiver.state} == {SessionState.CLOSED}


@given(st.data())
def test_messages_counted_at_once_are_those_counted_piece_by_piece(data: st.DataObject) -> None:
    """Either end takes the quick way or the long one, message by message; bytes and credit come out the same."""
    count = data.draw(st.integers(2, 12))
    pair = Pair(1, pool_bytes=data.draw(st.sampled_from((3 * PIECE, 1 << 20))), pool_messages=4)
    pair.settle()
    size = data.draw(st.sampled_from((1, PIECE)))
    pair.announce_series(payload(0, size), count)
    pair.settle()
    pair.release(messages=1)
    for number in range(1, count):
        pair.settle()
        if data.draw(st.booleans()):
            assert pair.sender.series_room() >= 1
            assert pair.sender.series_sent(0.0) == number
            pair.payloads.append(payload(number, size))
            pair.taken.append(bytearray(size))
            pair.wires[0] += payload(number, size)
        else:
            pair.announce_next(payload(number, size))
            pair.send(0)
        if data.draw(st.booleans()):
            assert pair.receiver.series_room() >= 1
            pair.receiver.series_received(0.0)
            pair.taken[number][:] = pair.wires[0]
            pair.wires[0].clear()
            pair.held += size
        else:
            pair.receive(0)
        pair.release(messages=1)
    assert [bytes(taken) for taken in pair.taken] == pair.payloads
    assert pair.sender.series_left == pair.sender.series_room() == pair.receiver.series_room() == 0
    pair.announce(b"another", confirm=True)
    pair.settle()
    assert bytes(pair.taken[count]) == b"another"
    pair.sender.close()
    pair.settle()
    assert {pair.sender.state, pair.receiver.state} == {SessionState.CLOSED}


def test_no_message_is_counted_at_once_where_there_is_more_to_see_to() -> None:
    pair = Pair(2)
    assert pair.sender.series_room() == pair.receiver.series_room() == 0
    pair.settle()
    pair.announce_series(payload(0), 5)  # of several pieces
    pair.settle()
    assert pair.sender.series_room() == pair.receiver.series_room() == 0
    pair.sender.end_series()
    pair.announce_series(b"small", 5)
    assert pair.sender.series_room() == 0  # its first message is not sent, and the lane rests
    pair.settle()
    assert pair.sender.series_room() == pair.receiver.series_room() == 4
    pair.receiver.decline(pair.sender.announced, "not that one")
    assert pair.receiver.series_room() == 0
    pair.control()
    assert pair.sender.series_room() == 0


def test_what_follows_a_series_that_ends_early_waits_until_the_receiver_knows() -> None:
    pair = Pair(1)
    pair.settle()
    pair.announce_series(payload(0), 1 << 40)
    pair.settle()
    pair.sender.end_series()
    pair.announce(b"next")
    assert pair.send(0) == 0  # its bytes would be taken for the series'
    pair.settle()
    assert received(pair) == [0, 1]
    assert SeriesEnded(1) in pair.receiver_events
    assert bytes(pair.taken[1]) == b"next"


def test_the_end_of_a_series_may_overtake_its_bytes() -> None:
    pair = Pair(2)
    pair.settle()
    pair.announce_series(payload(0), 100)
    for number in range(1, 4):
        pair.announce_next(payload(number))
    for lane in (0, 1):
        while pair.send(lane):
            pass
    pair.sender.end_series()
    pair.sender.close()
    pair.control()
    assert received(pair) == []
    pair.settle()
    assert received(pair) == [0, 1, 2, 3]
    assert pair.receiver.state is pair.sender.state is SessionState.CLOSED


@pytest.mark.parametrize(("count", "ends_early"), [(3, False), (9, True)])
def test_what_follows_a_series_may_be_announced_before_its_bytes_come(count: int, ends_early: bool) -> None:
    pair = Pair(2)
    pair.settle()
    pair.announce_series(payload(0), count)
    for number in (1, 2):
        pair.announce_next(payload(number))
    if ends_early:
        pair.sender.end_series()
    pair.announce(b"another")
    pair.control()
    told = [event.message_id for event in pair.receiver_events if isinstance(event, MessageAnnounced)]
    assert told == [0, 1, 2, 3]
    pair.settle()
    assert received(pair) == [0, 1, 2, 3]
    assert [bytes(taken) for taken in pair.taken] == pair.payloads


def test_what_follows_a_series_says_that_credit_was_there_for_all_of_it() -> None:
    receiver = new_receiver()
    receiver.receive_control(encode(announcement(count=100)) + encode(announcement(100)), 0.0)
    for message_id in range(5):  # there is credit for four; the next is told of, as always
        event = receiver.next_event()
        assert isinstance(event, MessageAnnounced)
        assert event.message_id == message_id
    with pytest.raises(RemoteProtocolError, match="without credit"):
        receiver.next_event()


def test_a_cancel_within_a_series_may_overtake_the_bytes_before_it() -> None:
    pair = Pair(1)
    pair.settle()
    pair.announce_series(payload(0), 100)
    for number in range(1, 4):
        pair.announce_next(payload(number))
    while pair.sender.next_piece(0).message_id < 3:  # type: ignore[union-attr]
        pair.send(0)
    assert pair.sender.cancel(3, "never mind")
    pair.control()
    pair.settle()
    assert received(pair) == [0, 1, 2]
    assert MessageCancelled(3, "never mind") in pair.receiver_events
    pair.announce_next(payload(4))
    pair.settle()
    assert received(pair) == [0, 1, 2, 4]
    assert bytes(pair.taken[4]) == payload(4)


def test_a_message_of_a_series_is_told_of_before_it_begins_and_takes_credit_when_it_does() -> None:
    pair = Pair(1, pool_messages=1)
    pair.settle()
    pair.announce_series(payload(0), 3)
    pair.settle()
    told = [event.message_id for event in pair.receiver_events if isinstance(event, MessageAnnounced)]
    assert told == [0, 1]
    with pytest.raises(LocalProtocolError, match="no credit"):
        pair.sender.announce_next()
    pair.receiver.release(0, 1)
    pair.settle()
    pair.announce_next(payload(1))
    pair.settle()
    assert received(pair) == [0, 1]


def test_a_message_declined_before_it_begins_is_cancelled_when_it_does() -> None:
    pair = Pair(1)
    pair.settle()
    pair.announce_series(payload(0), 5)
    pair.settle()
    pair.receiver.decline(1, "no room")
    pair.settle()
    pair.announce_next(payload(1))
    pair.settle()
    assert MessageDeclined(1, "no room") in pair.sender_events
    pair.announce_next(payload(2))
    pair.settle()
    assert received(pair) == [0, 2]


def test_a_decline_of_a_message_that_never_comes_is_nothing() -> None:
    pair = Pair(1)
    pair.settle()
    pair.announce_series(payload(0), 5)
    pair.settle()
    pair.receiver.decline(1, "no room")
    pair.sender.end_series()
    pair.settle()
    pair.announce(b"welcome")
    pair.settle()
    assert received(pair) == [0, 1]


def test_a_decline_of_a_message_that_never_comes_does_not_meet_the_next_with_its_id() -> None:
    pair = Pair(1)
    pair.settle()
    pair.announce_series(payload(0), 5)
    pair.settle()
    pair.sender.end_series()
    assert pair.announce(b"another") == 1
    pair.receiver.decline(1, "no room")  # of the series: all that it was told of
    pair.settle()
    assert received(pair) == [0, 1]
    assert not any(isinstance(event, MessageDeclined) for event in pair.sender_events)
    assert pair.announce(b"not wanted") == 2
    pair.control()
    pair.receiver.decline(2, "no room")
    pair.settle()
    assert MessageDeclined(2, "no room") in pair.sender_events


def test_a_receiver_that_leaves_ends_the_series() -> None:
    pair = Pair(1)
    pair.settle()
    pair.announce_series(payload(0), 5)
    pair.settle()
    pair.receiver.close()
    pair.settle()
    assert pair.receiver.state is pair.sender.state is SessionState.CLOSED


def test_what_a_sender_may_not_do_with_a_series() -> None:
    pair = Pair(1)
    pair.settle()
    with pytest.raises(LocalProtocolError, match="no series"):
        pair.sender.announce_next()
    with pytest.raises(ValueError, match="series"):
        pair.announce_series(b"", 2)
    with pytest.raises(ValueError, match="series"):
        pair.sender.announce(name="", dtype="uint8", shape=(1,), nbytes=1, checksum_kind=ChecksumKind.XXH3, count=2)
    with pytest.raises(ValueError, match=">= 1"):
        pair.announce_series(b"x", 0)
    pair.sender.end_series()  # none is under way
    assert control_frames(pair) == 0
    pair.announce_series(b"x", 2)
    with pytest.raises(LocalProtocolError, match="1 of its messages have not begun"):
        pair.announce(b"y")


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (SeriesEnd(0), "series ends before message 0"),
        (SeriesEnd(3), "series ends before message 3"),
        (announcement(1), "message 1 was announced where 1 comes next"),
        (Cancel(4, [0, 0], ""), "message 4 is not on its way"),
    ],
)
def test_a_sender_that_contradicts_its_series_breaks_the_protocol(frame: SeriesEnd | Cancel, words: str) -> None:
    receiver = new_receiver()
    receiver.receive_control(encode(announcement(count=3)), 0.0)
    assert isinstance(receiver.next_event(), MessageAnnounced)
    receiver.receive_control(encode(frame), 0.0)
    with pytest.raises(RemoteProtocolError, match=words):
        receiver.next_event()


def test_a_message_that_begins_without_credit_breaks_the_protocol() -> None:
    receiver = new_receiver()
    receiver.receive_control(encode(announcement(count=100)), 0.0)
    assert isinstance(receiver.next_event(), MessageAnnounced)
    for _ in range(4):
        receiver.received(0, 10, 0.0)
    with pytest.raises(RemoteProtocolError, match="without credit"):
        receiver.received(0, 10, 0.0)


def test_a_request_is_answered_in_pieces() -> None:
    pair = Pair()
    number = pair.receiver.request(b"the catalog, please")
    pair.settle()
    assert Requested(number, b"the catalog, please") in pair.sender_events
    pair.sender.answer(number, b"a" * MAX_BODY, last=False)
    pair.sender.answer(number, b"b")
    pair.settle()
    answers = [event for event in pair.receiver_events if isinstance(event, Answered)]
    assert answers == [Answered(number, b"a" * MAX_BODY, False), Answered(number, b"b", True)]
    with pytest.raises(LocalProtocolError, match="not waiting"):
        pair.sender.answer(number, b"c")


def test_requests_are_bounded_and_numbered() -> None:
    pair = Pair()
    with pytest.raises(ValueError, match="at most"):
        pair.receiver.request(b"x" * (MAX_BODY + 1))
    numbers = [pair.receiver.request(b"") for _ in range(MAX_REQUESTS)]
    assert numbers == list(range(MAX_REQUESTS))
    with pytest.raises(LocalProtocolError, match="64 are not answered"):
        pair.receiver.request(b"")
    pair.settle()
    pair.sender.answer(7, b"")
    pair.settle()
    assert pair.receiver.request(b"") == MAX_REQUESTS

    sender = new_sender()
    sender.receive_control(encode(Request(1, b"")), 0.0)
    with pytest.raises(RemoteProtocolError, match="request 1 in place of 0"):
        sender.next_event()

    receiver = new_receiver()
    receiver.receive_control(encode(Answer(0, b"", True)), 0.0)
    with pytest.raises(RemoteProtocolError, match="waits for none"):
        receiver.next_event()


def test_a_request_that_crosses_a_goodbye_is_dropped() -> None:
    pair = Pair()
    pair.settle()
    pair.receiver.request(b"one more thing")
    pair.sender.close()
    pair.settle()
    assert not any(isinstance(event, Requested) for event in pair.sender_events)
    assert pair.sender.state is SessionState.CLOSED


def test_a_decline_beyond_the_next_message_breaks_the_protocol() -> None:
    sender = new_sender()
    sender.receive_control(encode(Credit(100, 4, 0)) + encode(Decline(1, "")), 0.0)
    assert isinstance(sender.next_event(), CreditGranted)
    with pytest.raises(RemoteProtocolError, match="never announced"):
        sender.next_event()
