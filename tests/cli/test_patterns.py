"""The repeating pattern: as ncdevmem makes it, at any phase, and the first wrong byte found wherever it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.testing.patterns import find_mismatch, pattern

LENGTHS = st.integers(2, 256)


def test_pattern_starts_at_one_and_wraps_to_zero() -> None:
    assert pattern(4, 10).tolist() == [1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert pattern(256, 258).tolist()[253:] == [254, 255, 0, 1, 2]


@given(LENGTHS, st.integers(0, 700), st.integers(0, 1 << 40))
def test_pattern_goes_on_from_any_byte(length: int, n: int, start: int) -> None:
    made = pattern(length, n, start)
    assert made.dtype == np.uint8
    assert made.tolist() == [(start + index + 1) % length for index in range(n)]


@given(LENGTHS, st.integers(0, 3000), st.integers(0, 1 << 40))
def test_good_data_has_no_mismatch(length: int, n: int, start: int) -> None:
    assert find_mismatch(pattern(length, n, start), length, start) is None


@given(LENGTHS, st.integers(0, 1 << 40), st.integers(1, 2000), st.data())
def test_the_first_wrong_byte_is_found(length: int, start: int, n: int, data: st.DataObject) -> None:
    wrong = pattern(length, n, start)
    first = data.draw(st.integers(0, n - 1))
    expected = int(wrong[first])
    wrong[first:] ^= 1
    assert find_mismatch(wrong, length, start) == (start + first, expected, expected ^ 1)


@pytest.mark.parametrize("at", [0, (1 << 20) - 1, 1 << 20, (5 << 19) - 1])
def test_blocks_of_a_long_stream_keep_their_phase(at: int) -> None:
    data = pattern(7, 5 << 19, start=3)
    assert find_mismatch(data.data, 7, 3) is None
    data[at] = 9
    assert find_mismatch(data.data, 7, 3) == (at + 3, (at + 4) % 7, 9)


@pytest.mark.parametrize("length", [-1, 0, 1, 257])
def test_lengths_that_no_pattern_has(length: int) -> None:
    with pytest.raises(ValueError, match="2 to 256"):
        pattern(length, 1)
    with pytest.raises(ValueError, match="2 to 256"):
        find_mismatch(b"\1", length)


def test_negative_amounts_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        pattern(2, -1)
    with pytest.raises(ValueError, match="negative"):
        pattern(2, 1, start=-1)
