"""What goes through a session: messages, in order, within credit; cancelled and declined ones."""

from __future__ import annotations

import pytest

from devmem_tcp.errors import (
    LocalProtocolError,
)
from devmem_tcp.sansio.frames import (
    ChecksumKind,
    Limits,
)
from devmem_tcp.sansio.incoming import ExpectedPiece
from devmem_tcp.sansio.outgoing import Piece
from devmem_tcp.sansio.sending import SenderSession
from devmem_tcp.sansio.session import (
    CreditGranted,
    MessageAnnounced,
    MessageCancelled,
    MessageDeclined,
    MessageReceived,
    MessagesFinished,
    SessionClosed,
)
from session_pair import (
    LIMITS,
    NONE,
    PIECE,
    XXH3,
    Pair,
    announcement,
    may_announce,
)


def test_a_message_goes_over_in_pieces_by_turns() -> None:
    pair = Pair(lanes=3)
    pair.control()
    payload = bytes(range(256)) * 64 + b"tail"
    assert pair.announce(payload) == 0
    assert [pair.sender.next_piece(lane) for lane in range(3)] == [
        Piece(0, 0, PIECE), Piece(0, PIECE, PIECE), Piece(0, 2 * PIECE, PIECE)
    ]  # fmt: skip
    pair.send(0)
    assert pair.sender.next_piece(0) == Piece(0, 3 * PIECE, PIECE)
    assert pair.receiver.expected(0) is None, "it was not announced yet"
    pair.settle()
    assert pair.taken == [payload]
    assert [type(event) for event in pair.receiver_events] == [MessageAnnounced, MessageReceived]
    assert pair.receiver.expected(0) is None
    announced = pair.receiver_events[0]
    assert isinstance(announced, MessageAnnounced)
    assert (announced.header.name, announced.header.dtype, announced.header.shape) == ("w", "uint8", [len(payload)])


def test_small_messages_take_the_lane_with_the_least_to_send() -> None:
    pair = Pair(lanes=3)
    pair.control()
    for size in (10, 10, 10, 5, 20):
        pair.announce(bytes(size))
    assert [pair.sender.next_piece(lane) for lane in range(3)] == [Piece(0, 0, 10), Piece(1, 0, 10), Piece(2, 0, 10)]
    pair.send(1)
    assert pair.sender.next_piece(1) == Piece(4, 0, 20)
    pair.settle()
    assert [event.message_id for event in pair.receiver_events if isinstance(event, MessageReceived)] == [0, 1, 2, 3, 4]


def test_messages_are_received_in_order_whatever_lane_is_faster() -> None:
    pair = Pair(lanes=2)
    pair.control()
    pair.announce(b"first")
    pair.announce(b"second")
    pair.announce(b"")
    pair.control()
    pair.send(1)
    pair.receive(1)
    assert not [event for event in pair.receiver_events if isinstance(event, MessageReceived)]
    pair.send(0)
    pair.receive(0)
    assert pair.receiver_events[-3:] == [MessageReceived(0, b""), MessageReceived(1, b""), MessageReceived(2, b"")]


def test_a_message_of_no_bytes_is_received_at_once() -> None:
    pair = Pair()
    pair.control()
    pair.announce(b"", confirm=True)
    pair.control()
    assert pair.receiver_events[-1] == MessageReceived(0, b"")
    pair.control()
    assert MessagesFinished(1) in pair.sender_events


def test_a_message_larger_than_the_pool_passes_through_it() -> None:
    pair = Pair(lanes=3, pool_bytes=3 * PIECE)
    pair.control()
    payload = bytes(7) * 20000
    pair.announce(payload)
    pair.settle(release=False)
    assert pair.held == 3 * PIECE
    assert all(pair.sender.next_piece(lane) is None for lane in range(3))
    pair.settle()
    assert pair.taken == [payload]


def test_a_checksum_may_come_before_or_after_the_bytes_and_holds_back_what_follows() -> None:
    pair = Pair(lanes=1)
    pair.control()
    for _ in range(2):
        pair.announce(b"bytes", XXH3)
    pair.announce(b"more")
    assert pair.sender.finish(0, b"one")
    pair.settle()
    assert pair.receiver_events[-1] == MessageReceived(0, b"one")
    pair.sender.finish(1, b"two")
    pair.settle()
    assert pair.receiver_events[-1] == MessageReceived(0, b"one"), "message 0 is not verified"
    with pytest.raises(LocalProtocolError, match="message 1 is not waiting to be verified"):
        pair.receiver.verified(1)
    pair.receiver.verified(0)
    pair.collect()
    assert pair.receiver_events[-1] == MessageReceived(1, b"two")
    pair.receiver.verified(1)
    pair.collect()
    assert pair.receiver_events[-1] == MessageReceived(2, b"")
    with pytest.raises(LocalProtocolError):
        pair.receiver.verified(1)
    for wrong in (b"", b"x" * 33):
        with pytest.raises(ValueError, match="where 1 to 32 are allowed"):
            pair.sender.finish(1, wrong)
    assert not pair.sender.finish(1, b"two")
    assert not pair.sender.finish(2, b"three")
    with pytest.raises(LocalProtocolError, match="message 3 was not announced"):
        pair.sender.finish(3, b"four")
    assert pair.sender.data_to_send() == b""


@pytest.mark.parametrize("kind", [NONE, XXH3])
def test_a_confirmed_message_is_reported_at_once_and_others_with_the_next_grant(kind: ChecksumKind) -> None:
    pair = Pair()
    pair.control()
    pair.announce(b"bytes")
    pair.settle(release=False)
    assert not any(isinstance(event, MessagesFinished) for event in pair.sender_events)
    pair.announce(b"bytes", kind, confirm=True)
    if kind is XXH3:
        pair.sender.finish(1, b"sum")
        pair.settle(release=False)
        pair.receiver.verified(1)
    pair.settle(release=False)
    assert MessagesFinished(2) in pair.sender_events


def test_messages_need_credit_and_get_it_back_by_release() -> None:
    pair = Pair(pool_messages=2)
    assert not may_announce(pair)
    pair.control()
    assert pair.sender_events == [CreditGranted()]
    pair.announce(b"x")
    assert may_announce(pair)
    pair.announce(b"y")
    assert not may_announce(pair)
    with pytest.raises(LocalProtocolError, match="no credit for another message: 2 are announced"):
        pair.announce(b"z")
    pair.settle()
    assert not may_announce(pair)
    pair.release(0, 1)
    pair.settle()
    assert may_announce(pair)
    assert pair.announce(b"z") == 2


def test_what_cannot_be_announced_changes_nothing() -> None:
    pair = Pair(limits=Limits(2, 100, 10))
    pair.control()
    with pytest.raises(ValueError, match="101 bytes with 0 of metadata: the receiver takes 100 and 10"):
        pair.announce(bytes(101))
    with pytest.raises(ValueError, match="1 bytes with 11 of metadata"):
        pair.sender.announce(name="", dtype="uint8", shape=(1,), nbytes=1, metadata=b'{"a":"bcd"}')
    with pytest.raises(ValueError, match="cannot verify crc32c"):
        pair.announce(b"x", ChecksumKind.CRC32C)
    with pytest.raises(ValueError, match="does not go with 3 bytes"):
        pair.sender.announce(name="", dtype="uint8", shape=(100,), nbytes=3)
    assert pair.sender.data_to_send() == b""
    assert pair.announce(bytes(100)) == 0
    pair.settle()
    assert pair.receiver_events[-1] == MessageReceived(0, b"")


@pytest.mark.parametrize("piece_bytes", [4095, (1 << 48) + 1])
def test_pieces_have_sizes_that_the_wire_has(piece_bytes: int) -> None:
    with pytest.raises(ValueError, match="4096 to 281474976710656 are allowed"):
        SenderSession(limits=LIMITS, now=0.0, piece_bytes=piece_bytes)


def test_a_driver_that_claims_more_than_was_next_is_told() -> None:
    pair = Pair(lanes=2)
    pair.control()
    pair.announce(b"12345")
    for lane, size in ((0, 6), (0, 0), (1, 1)):
        with pytest.raises(LocalProtocolError, match="bytes sent on lane"):
            pair.sender.sent(lane, size, 0.0)
    pair.send(0)
    pair.control()
    for lane, size in ((0, 6), (0, 0), (1, 1)):
        with pytest.raises(LocalProtocolError, match="bytes read on lane"):
            pair.receiver.received(lane, size, 0.0)
    pair.settle()
    assert pair.taken == [b"12345"]


# Cancel, decline


def test_a_cancelled_message_ends_at_what_was_under_way() -> None:
    pair = Pair(lanes=2)
    pair.control()
    pair.announce(bytes(10 * PIECE))
    pair.control()
    pair.send(0)
    pair.send(0, 100)
    pair.send(1, 7)
    pair.receive(0, 50)
    assert pair.sender.cancel(0, "changed my mind")
    assert pair.sender.next_piece(0) is None
    pair.announce(b"next")
    assert pair.sender.next_piece(0) is pair.sender.next_piece(1) is None, "it would be taken for message 0's"
    pair.control()
    assert pair.receiver_events[1] == MessageCancelled(0, "changed my mind")
    assert pair.receiver.expected(0) == ExpectedPiece(0, 50, PIECE - 50, wanted=False)
    assert pair.receiver.expected(1) == ExpectedPiece(0, PIECE, 7, wanted=False)
    pair.settle()
    assert pair.taken[1] == b"next"
    assert pair.receiver_events[-1] == MessageReceived(1, b"")
    assert not any(event == MessageReceived(0, b"") for event in pair.receiver_events)
    with pytest.raises(LocalProtocolError, match="released"):
        pair.receiver.release(1)


def test_the_credit_of_a_cancelled_message_comes_back() -> None:
    pair = Pair(lanes=2, pool_bytes=PIECE, pool_messages=1)
    pair.control()
    for _ in range(5):
        message_id = pair.announce(bytes(100 * PIECE))
        pair.send(0, 10)
        pair.sender.cancel(message_id, "no")
        pair.settle()
    pair.announce(b"through")
    pair.settle()
    assert pair.taken[-1] == b"through"


def test_the_credit_of_a_cancelled_message_is_not_given_to_those_before_it() -> None:
    """What the cancelled message never sends frees no memory that an earlier one could use."""
    pair = Pair(lanes=1, pool_bytes=PIECE)
    pair.control()
    for _ in range(3):
        pair.announce(bytes(PIECE))
    pair.sender.cancel(2, "no")
    pair.settle(release=False)
    assert pair.held == PIECE
    assert pair.receiver_events[-1] == MessageReceived(0, b"")
    assert pair.sender.next_piece(0) is None
    pair.settle()
    assert pair.receiver_events[-1] == MessageReceived(1, b"")


def test_a_cancelled_message_waits_on_no_lane() -> None:
    pair = Pair(lanes=2)
    pair.control()
    pair.announce(bytes(10))
    pair.sender.cancel(0, "no")
    pair.announce(bytes(10))
    pair.control()
    pair.control()
    assert pair.sender.next_piece(0) == Piece(1, 0, 10), "no lane has a backlog, so the first is taken"


def test_what_is_all_sent_cannot_be_cancelled() -> None:
    pair = Pair()
    pair.control()
    pair.announce(b"bytes", XXH3)
    pair.announce(b"")
    pair.send(0)
    assert not pair.sender.cancel(0, "too late")
    assert not pair.sender.cancel(1, "too late")
    with pytest.raises(LocalProtocolError, match="message 2 was not announced"):
        pair.sender.cancel(2, "never")
    with pytest.raises(LocalProtocolError, match="message -1 was not announced"):
        pair.sender.cancel(-1, "never")
    pair.sender.finish(0, b"sum")
    pair.settle()
    assert MessageReceived(0, b"sum") in pair.receiver_events


def test_a_cancelled_message_owes_no_checksum() -> None:
    pair = Pair()
    pair.control()
    pair.announce(b"bytes", XXH3)
    pair.sender.cancel(0, "no")
    assert not pair.sender.finish(0, b"sum")
    pair.sender.close()
    pair.settle()
    assert pair.sender_events[-1] == pair.receiver_events[-1] == SessionClosed()


def test_a_declined_message_is_cancelled_by_its_sender() -> None:
    pair = Pair(lanes=1)
    pair.control()
    pair.announce(bytes(10 * PIECE))
    pair.send(0, 100)
    pair.control()
    pair.receiver.decline(0, "out of device memory")
    pair.receiver.decline(0, "again")
    assert pair.receiver.expected(0) == ExpectedPiece(0, 0, 10 * PIECE, wanted=False)
    pair.announce(b"next")
    pair.settle()
    assert [event for event in pair.sender_events if isinstance(event, MessageDeclined)] == [
        MessageDeclined(0, "out of device memory")
    ]
    assert pair.receiver_events[1:] == [
        MessageAnnounced(1, announcement(1, 4)),
        MessageReceived(1, b""),
    ], "no event says to the receiver what it did itself"
    with pytest.raises(LocalProtocolError, match="message 1 is not on its way"):
        pair.receiver.decline(1, "too late")


def test_a_message_declined_when_all_of_it_is_sent_is_drained() -> None:
    pair = Pair(lanes=1)
    pair.control()
    pair.announce(b"bytes", XXH3, confirm=True)
    pair.sender.finish(0, b"sum")
    pair.send(0)
    pair.control()
    pair.receiver.decline(0, "no")
    pair.settle()
    assert MessageDeclined(0, "no") in pair.sender_events
    assert MessagesFinished(1) in pair.sender_events
    assert not any(isinstance(event, MessageReceived) for event in pair.receiver_events)
