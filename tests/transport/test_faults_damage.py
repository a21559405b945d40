"""A byte is changed on its way: with a checksum both ends hear of it, and what else is under way is not touched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from devmem_tcp.errors import BrokenError, RemoteProtocolError
from devmem_tcp.sansio.frames import ChecksumKind
from devmem_tcp.sansio.handshake import PREAMBLE_BYTES
from devmem_tcp.transport import Sender, checksums
from fault_ends import LIMIT_S, Nursery, Sending, nursery, same, surviving
from fault_peer import pattern
from fault_wire import Change, middle


@pytest.fixture(scope="module")
def peers() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


@pytest.fixture(autouse=True)
def a_checksum(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have a checksum whatever libraries are installed; what it is called is of no matter here."""
    made = {ChecksumKind.XXH3: hashlib.blake2s, ChecksumKind.CRC32C: None}
    monkeypatch.setattr(checksums, "_maker", made.__getitem__)
    checksums.available_checksums.cache_clear()
    yield
    checksums.available_checksums.cache_clear()


def flip(at: int) -> Change:
    """Change one bit of the byte that a message has at this offset, on its only lane."""
    place = PREAMBLE_BYTES + at

    def change(data: bytearray, offset: int) -> None:
        if offset <= place < offset + len(data):
            data[place - offset] ^= 0x10

    return change


@pytest.mark.parametrize("at", [0, 150_000, 299_999])
def test_a_changed_byte_is_told_both_ends_and_harms_no_other_session(peers: Nursery, at: int) -> None:
    def act(sender: Sender) -> None:
        with pytest.raises(BrokenError, match=r"the peer aborted the session: message 0 \('bad'\) was damaged"):
            sender.send(pattern(1), name="bad", checksum="xxh3", confirm=True).wait_delivered(LIMIT_S)

    with surviving(max_peers=2) as end:
        address, reception = end.receiver.address, end.receiver._engine.reception
        assert address is not None
        assert reception is not None
        with (
            peers.peer("honest_sender", address=address, lanes=1, seeds=[5, 6]) as other,
            middle(address, reception._data.address[1], flip(at)) as between,
        ):
            other.go()
            end.drive(lambda: end.names == ["honest 5"], other)
            other.go()
            sender = Sending(end, act, to=between.address)
            end.drive(lambda: bool(end.errors) and "honest 6" in end.names, other)
            sender.join()
            (error,) = end.errors
            assert isinstance(error, RemoteProtocolError)
            assert "message 0 ('bad') was damaged on its way: its xxh3 is " in str(error)
            assert end.names == ["honest 5", "honest 6"]
            assert same(end.messages[1][1], pattern(6))


def test_a_message_that_comes_as_it_was_passes(peers: Nursery) -> None:
    def act(sender: Sender) -> None:
        sender.send(pattern(1), name="good", checksum="xxh3", confirm=True).wait_delivered(LIMIT_S)

    with surviving() as end:
        sender = Sending(end, act)
        end.drive(lambda: end.names == ["good"] and not end.receiver.peers)
        sender.join()
