"""Which tokens are out, as far as a program can know: against a plain set, and in corners."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.sansio.held import HeldTokens
from devmem_tcp.sansio.tokens import dontneed_calls, run_of
from devmem_tcp.types import FRAG_DTYPE, FragArray, U32Array
from devmem_tcp.uapi.socket import MAX_DONTNEED_FRAGS, pack_tokens


def column(*numbers: int) -> U32Array:
    return np.array(numbers, np.uint32)


def record(held: HeldTokens, tokens: list[int], *, dmabuf_id: int = 1, size: int = 10, now: float = 0.0) -> None:
    frags: FragArray = np.zeros(len(tokens), FRAG_DTYPE)
    frags["token"], frags["dmabuf_id"], frags["size"] = tokens, dmabuf_id, size
    held.record(frags, now, run_of(frags["token"]))


def test_a_run_is_neighbours_in_order() -> None:
    assert run_of(column(5)) == (5, 1)
    assert run_of(column(5, 6, 7)) == (5, 3)
    for none in ((), (0,), (0, 1), (5, 7), (7, 6), (5, 9, 7), (5, 0, 7), (5, 5), (0xFFFF_FFFF, 0)):
        assert run_of(column(*none)) is None


def test_a_run_of_any_numbers() -> None:
    for first in (1, 65_535 - 3, 65_536 - 3, 65_536, 1 << 20, 0xFFFF_FFFD):
        tokens = [first, first + 1, first + 2]
        assert run_of(column(*tokens)) == (first, 3)
        for wrong in ([first, first + 2, first + 2], [first, first, first + 2]):
            assert run_of(column(*wrong)) is None


def test_what_is_held_of_each_binding() -> None:
    held = HeldTokens()
    record(held, [1, 2, 3], dmabuf_id=7, size=100, now=5.0)
    record(held, [9, 4], dmabuf_id=7, size=1, now=3.0)
    record(held, [5, 6], dmabuf_id=8, size=0xFFFF_FFFF, now=4.0)
    assert held.held(7) == (5, 302, 3.0)
    assert held.held(8) == (2, 2 * 0xFFFF_FFFF, 4.0)
    assert held.held(9) == (0, 0, 0.0)
    assert held.out().tolist() == [1, 2, 3, 4, 5, 6, 9]
    assert held.strike(pack_tokens([4], [6])) == 4
    assert held.held(7) == (3, 300, 5.0)
    assert held.outstanding == 3


def test_grows_to_whatever_the_kernel_hands_out() -> None:
    held = HeldTokens()
    record(held, [1, 2, 3], size=7)
    record(held, list(range(100_000, 100_500)))
    record(held, [300_001, 300_000])
    assert held.outstanding == 505
    assert held.held(1)[1] == 21 + 5020
    assert held.strike(pack_tokens([1], [3])) == 3
    assert held.strike(pack_tokens([300_000], [2])) == 2


def test_one_call_looks_at_1024_tokens() -> None:
    held = HeldTokens()
    record(held, list(range(1, 1501)))
    assert held.strike(pack_tokens([1], [1500])) == MAX_DONTNEED_FRAGS
    assert held.out().tolist() == list(range(1025, 1501))
    assert held.strike(pack_tokens([2000, 1025], [1000, 100])) == 24


def test_a_run_that_is_out_whole_is_known_by_its_frags() -> None:
    held = HeldTokens()
    frags: FragArray = np.zeros(3, FRAG_DTYPE)
    frags["token"] = (5, 6, 7)
    held.record(frags, 0.0, run_of(frags["token"]))
    assert held.run_of(frags) == (5, 3)
    assert held.run_of(frags.copy()) is None
    assert held.run_of(frags[:0]) is None
    assert held.strike(pack_tokens([5], [1])) == 1
    assert held.run_of(frags) is None
    assert held.strike(pack_tokens([5], [3])) == 2
    assert held.outstanding == 0


def test_a_run_is_struck_out_from_its_start() -> None:
    held = HeldTokens()
    record(held, [5, 6, 7, 8], now=2.0)
    for first, count in ((6, 1), (5, 0), (5, 5), (9, 1)):
        assert not held.strike_run(first, count)
    assert held.outstanding == 4
    assert held.strike_run(5, 1)
    assert not held.strike_run(5, 1)
    assert held.held(1) == (3, 30, 2.0)
    assert held.strike_run(6, 3)
    assert (held.outstanding, held.out().tolist()) == (0, [])
    record(held, [5, 6])
    assert held.strike(pack_tokens([6], [1])) == 1
    assert not held.strike_run(5, 1)  # broken up: strike() alone knows it now
    assert held.out().tolist() == [5]


def test_what_is_not_out_counts_nothing() -> None:
    held = HeldTokens()
    record(held, [1, 2])
    for start, count in ((0, 1), (3, 5), (1, 0), (0xFFFF_FFFF, 1), (1 << 20, 1)):
        assert held.strike(pack_tokens([start], [count])) == 0
    assert held.strike(pack_tokens([2, 2], [1, 1])) == 1
    assert held.outstanding == 1


def test_a_range_goes_on_at_0_after_the_last_number() -> None:
    held = HeldTokens()
    record(held, [1, 2, 3])
    assert held.strike(pack_tokens([0xFFFF_FFFF], [4])) == 2
    assert held.out().tolist() == [3]


@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(1, 5000), min_size=1, max_size=60)), max_size=12))
def test_as_a_set_would(steps: list[tuple[bool, set[int]]]) -> None:
    held, model = HeldTokens(), set[int]()
    for arrive, tokens in steps:
        if arrive:
            fresh = sorted(tokens - model)
            if fresh:
                record(held, fresh)
            model |= tokens
        else:
            struck = sum(held.strike(ranges) for ranges in dontneed_calls(column(*sorted(tokens))))
            assert struck == len(tokens & model)
            model -= tokens
        assert held.outstanding == len(model)
        assert held.out().tolist() == sorted(model)
        assert held.held(1)[0] == len(model)
