"""Where messages land, one after the other: memory that was just used is used again, and nobody is left without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import devmem_tcp as dmt
from devmem_tcp.contract import Nic, RxBinding
from devmem_tcp.transport import Message
from devmem_tcp.transport.inbox import SparePlaces
from devmem_tcp.transport.sender import Sent, Slot
from devmem_tcp.types import PAGE_SIZE
from fault_ends import Nursery, nursery, same, surviving
from fault_peer import pattern
from tensor_ends import MIB, receiving, senders

PAGES = 64


@pytest.fixture
def bound() -> Iterator[tuple[Nic, RxBinding]]:
    with (
        dmt.open_nic("soft0", backend="software") as nic,
        dmt.memory.Host().allocate(PAGES * PAGE_SIZE) as buffer,
        nic.set_header_split("on"),
        nic.bind_rx(buffer, [0]) as binding,
    ):
        yield nic, binding


def in_use(nic: Nic) -> int:
    return nic.queue_stats(0).pages_inflight


def test_the_place_used_last_is_the_next_of_its_size(bound: tuple[Nic, RxBinding]) -> None:
    nic, binding = bound
    spare = SparePlaces(binding, PAGES)
    small, large = spare.take(PAGE_SIZE), spare.take(3 * PAGE_SIZE)
    other = spare.take(PAGE_SIZE)
    assert small
    assert large
    assert other
    for place in (small, other, large):
        spare.put(place)
    assert in_use(nic) == 5, "they are kept"
    assert [spare.take(PAGE_SIZE), spare.take(3 * PAGE_SIZE), spare.take(PAGE_SIZE)] == [other, large, small]
    for place in (small, other, large):
        spare.put(place)
    spare.drop()
    assert in_use(nic) == 0


def test_spare_places_make_way_for_messages(bound: tuple[Nic, RxBinding]) -> None:
    nic, binding = bound
    spare = SparePlaces(binding, PAGES)
    kept = spare.take(20 * PAGE_SIZE)
    assert kept
    spare.put(kept)
    whole = spare.take(PAGES * PAGE_SIZE)
    assert whole
    assert kept.closed
    assert spare.take(PAGE_SIZE) is None
    spare.put(whole)
    assert in_use(nic) == 0, "over half of all pages are not kept"


def test_spare_places_and_messages_take_half_of_the_pages_at_most(bound: tuple[Nic, RxBinding]) -> None:
    nic, binding = bound
    spare = SparePlaces(binding, PAGES)
    places = [spare.take(4 * PAGE_SIZE) for _ in range(3)]
    for place in places:
        assert place
        spare.put(place)
    spare.hold_pages(20)
    assert in_use(nic) == 12
    spare.hold_pages(1)
    assert in_use(nic) == 0


def test_few_places_are_kept(bound: tuple[Nic, RxBinding]) -> None:
    nic, binding = bound
    spare = SparePlaces(binding, PAGES)
    places = [spare.take(PAGE_SIZE) for _ in range(6)]
    for place in places:
        assert place
        spare.put(place)
    assert in_use(nic) == 4
    assert [place.closed for place in places if place] == [True, True, False, False, False, False]
    spare.drop()


def where(message: Message) -> int:
    """Return the address that a message lies at."""
    address: int = message.gather().__array_interface__["data"][0]
    return address


@pytest.mark.parametrize("in_series", [False, True])
def test_messages_of_several_senders_land_in_the_same_memory(in_series: bool) -> None:
    data = np.arange(65536, dtype=np.uint8)
    with receiving(size=8 * MIB, max_peers=3) as receiver, senders(receiver, 3) as sources:
        for source in sources:
            slot = source.reserve(data.shape, data.dtype)
            slot.numpy()[:] = data
            with slot, contextlib.ExitStack() as series:
                send: Callable[[Slot], Sent] = source.send_slot
                if in_series:
                    send = series.enter_context(source.series(data.shape, data.dtype)).send
                for _ in range(3):
                    send(slot)
        seen = set()
        for _ in range(9):
            with receiver.receive(20) as message:
                assert (message.gather().numpy() == data).all()
                seen.add(where(message))
        assert len(seen) == 1


@pytest.fixture(scope="module")
def peers() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_whole_message_of_a_sender_that_was_killed_is_received(peers: Nursery, lanes: int) -> None:
    """Its end is known by the control connection; what it sent before is still in the lanes."""
    with surviving(lanes=lanes) as end:
        address = end.receiver.address
        with peers.peer("dying_connector", role="sender", address=address, lanes=lanes, step="message sent") as victim:
            end.drive(lambda: len(end.receiver.peers) == 1, victim)
            assert victim.hear() == "message sent"
            assert victim.hear() is None
            end.drive(lambda: bool(end.errors), victim)
        (received,) = end.messages
        assert received[0] == "whole"
        assert same(received[1], pattern(0))
