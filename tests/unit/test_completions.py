"""Numbers of sends and their completions: net/core/skbuff.c, __msg_zerocopy_callback."""

from __future__ import annotations

import pytest

from devmem_tcp.errors import RemoteProtocolError
from devmem_tcp.sansio.completions import CompletionQueue, InFlight
from devmem_tcp.types import CompletionRange

LAST = 0xFFFFFFFF


def test_completions_that_follow_each_other_are_one_range() -> None:
    queue = CompletionQueue()
    for number in (0, 1, 2, 5, 6):
        queue.complete(number)
    assert queue.count == 5
    assert queue.take() == [CompletionRange(0, 2), CompletionRange(5, 6)]
    assert queue.take() == []


def test_ranges_coalesce_over_the_32_bit_wrap() -> None:
    queue = CompletionQueue()
    for number in (LAST - 1, LAST, 0, 1):
        queue.complete(number)
    assert queue.count == 4
    assert queue.take() == [CompletionRange(LAST - 1, 1)]


def test_in_flight_gives_items_back_in_order_of_sending() -> None:
    flight: InFlight[str] = InFlight()
    assert [flight.add(item) for item in "abcd"] == [0, 1, 2, 3]
    assert flight.complete([CompletionRange(1, 2)]) == ["b", "c"]
    assert len(flight) == 2
    assert flight.complete([CompletionRange(0, 0), CompletionRange(3, 3)]) == ["a", "d"]
    assert len(flight) == 0


def test_in_flight_over_the_32_bit_wrap() -> None:
    flight: InFlight[str] = InFlight(first_number=LAST)
    assert [flight.add(item) for item in "ab"] == [LAST, 0]
    assert flight.complete([CompletionRange(LAST, 0)]) == ["a", "b"]
    assert flight.add("c") == 1


@pytest.mark.parametrize("bad", [CompletionRange(2, 2), CompletionRange(0, 2), CompletionRange(LAST, 0)])
def test_a_completion_of_what_was_not_sent_is_refused(bad: CompletionRange) -> None:
    flight: InFlight[str] = InFlight()
    flight.add("a")
    flight.add("b")
    with pytest.raises(RemoteProtocolError, match="not in flight"):
        flight.complete([bad])
    assert len(flight) == 2


def test_a_second_completion_is_refused() -> None:
    flight: InFlight[str] = InFlight()
    for item in "abc":
        flight.add(item)
    flight.complete([CompletionRange(1, 1)])
    with pytest.raises(RemoteProtocolError, match="second completion of send 1"):
        flight.complete([CompletionRange(1, 1)])
