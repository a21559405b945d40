"""The RSS indirection table: what ethtool -X writes, and which queue a hash gets."""

from __future__ import annotations

import pytest

from devmem_tcp.nicmodel.indirection import IndirectionTable


def test_default_and_equal_take_queues_in_turn() -> None:
    assert IndirectionTable.equal(3, 8).entries == (0, 1, 2, 0, 1, 2, 0, 1)
    assert IndirectionTable.default(3, 8).entries == (0, 1, 2, 0, 1, 2, 0, 1)
    assert IndirectionTable.equal(1, 2).entries == (0, 0)
    assert IndirectionTable.equal(4).size == 128
    assert IndirectionTable.default(4).size == 128


def test_more_queues_than_entries_is_a_state_but_not_a_request() -> None:
    assert IndirectionTable.default(16, 8).queues_used == tuple(range(8))
    assert IndirectionTable.equal(8, 8).queues_used == tuple(range(8))
    with pytest.raises(ValueError, match="equal=9 is more queues than the table has entries, 8"):
        IndirectionTable.equal(9, 8)


@pytest.mark.parametrize("queues", [0, -1])
def test_no_queue_is_refused(queues: int) -> None:
    with pytest.raises(ValueError, match="needs a queue"):
        IndirectionTable.equal(queues, 8)
    with pytest.raises(ValueError, match="needs a queue"):
        IndirectionTable.default(queues, 8)


def test_weights_make_contiguous_blocks() -> None:
    assert IndirectionTable.weights([1, 3], 8).entries == (0, 0, 1, 1, 1, 1, 1, 1)
    assert IndirectionTable.weights([0, 1, 0, 1], 8).entries == (1, 1, 1, 1, 3, 3, 3, 3)
    assert IndirectionTable.weights([1, 0], 4).entries == (0, 0, 0, 0)


def test_weights_that_do_not_divide_round_each_block_end_down() -> None:
    # Block ends at floor(8/3) = 2, floor(16/3) = 5 and 8.
    assert IndirectionTable.weights([1, 1, 1], 8).entries == (0, 0, 1, 1, 1, 2, 2, 2)


def test_weights_that_sum_to_the_size_get_just_that_many_entries() -> None:
    assert IndirectionTable.weights([5, 3], 8).entries == (0,) * 5 + (1,) * 3
    with pytest.raises(ValueError, match="sum to 9, more than the 8 entries"):
        IndirectionTable.weights([5, 4], 8)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([], "above 0"), ([0, 0], "above 0"), ([2, -1], "not be negative")],
)
def test_senseless_weights_are_refused(weights: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndirectionTable.weights(weights, 8)


def test_explicit_entries_are_repeated_to_fill_the_table() -> None:
    assert IndirectionTable.explicit([4, 2], 8).entries == (4, 2, 4, 2, 4, 2, 4, 2)
    assert IndirectionTable.explicit(range(8), 8).entries == tuple(range(8))
    assert IndirectionTable.explicit([7]).entries == (7,) * 128


@pytest.mark.parametrize("entries", [[], [1, 2, 3], list(range(16))])
def test_explicit_entries_that_do_not_fill_the_table_evenly_are_refused(entries: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fill an RSS indirection table of 8 evenly"):
        IndirectionTable.explicit(entries, 8)


def test_the_low_bits_of_the_hash_choose_the_entry() -> None:
    table = IndirectionTable.explicit([10, 11, 12, 13], 4)
    assert [table.queue_for(value) for value in range(8)] == [10, 11, 12, 13, 10, 11, 12, 13]
    assert table.queue_for(0xFFFFFFFE) == 12
    assert IndirectionTable.explicit([6], 1).queue_for(0xFFFFFFFF) == 6


def test_queues_used_are_distinct_and_ascending() -> None:
    assert IndirectionTable.explicit([9, 1, 9, 4], 8).queues_used == (1, 4, 9)


@pytest.mark.parametrize("size", [0, 3, 12, 100])
def test_a_size_that_cannot_mask_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"power of two entries, got {size}"):
        IndirectionTable((0,) * size)


def test_negative_queues_are_refused() -> None:
    with pytest.raises(ValueError, match="start at 0, got -1"):
        IndirectionTable.explicit([0, -1], 8)


def test_check_queues_knows_the_nic() -> None:
    IndirectionTable.equal(4, 8).check_queues(4)
    with pytest.raises(ValueError, match="names queue 3; the NIC has 0 to 2"):
        IndirectionTable.equal(4, 8).check_queues(3)


def test_a_table_is_a_value() -> None:
    assert IndirectionTable.equal(2, 4) == IndirectionTable.explicit([0, 1], 4)
    with pytest.raises(AttributeError):
        IndirectionTable.equal(2, 4).entries = ()  # type: ignore[misc]
