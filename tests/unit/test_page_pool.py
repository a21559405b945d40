"""The page pool: what is taken first, what is shared, and that in flight + free = total."""

from __future__ import annotations

import numpy as np
import pytest

from devmem_tcp.nicmodel.page_pool import PagePool

PAGE = 4096


def columns(*runs: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    firsts, counts = zip(*runs, strict=True)
    return np.array(firsts, np.uint32), np.array(counts, np.uint32)


def test_adjacent_pages_are_one_run_and_the_lowest_come_first() -> None:
    pool = PagePool(16 * PAGE)
    assert pool.alloc(0, 5) == [(0, 5)]
    assert pool.alloc(0, 5) == [(5, 5)]
    pool.free_run(0, 5)
    assert pool.alloc(0, 3) == [(0, 3)]
    assert (pool.inflight, pool.queue_free(0)) == (8, 8)


def test_a_run_that_fits_is_preferred_to_lower_pieces() -> None:
    pool = PagePool(16 * PAGE)
    pool.alloc(0, 16)
    pool.free_run(1, 2)
    pool.free_run(8, 4)
    assert pool.alloc(0, 4) == [(8, 4)]
    pool.free_run(14, 1)
    assert pool.alloc(0, 4) == [(1, 2), (14, 1)]


def test_scattered_pages_come_in_at_most_max_runs() -> None:
    pool = PagePool(32 * PAGE)
    pool.alloc(0, 32)
    for page in range(0, 32, 2):
        pool.free_run(page, 1)
    assert pool.alloc(0, 16, max_runs=3) == [(0, 1), (2, 1), (4, 1)]
    assert len(pool.alloc(0, 16)) == 13


def test_nothing_free_is_counted_as_a_drop() -> None:
    pool = PagePool(2 * PAGE)
    assert pool.alloc(0, 4) == [(0, 2)]
    assert pool.alloc(0, 1) == []
    assert pool.alloc(0, 1) == []
    assert pool.alloc_fail(0) == 2
    pool.free_run(1, 1)
    assert pool.alloc(0, 4) == [(1, 1)]


def test_a_page_with_two_holders_is_free_after_the_second() -> None:
    pool = PagePool(4 * PAGE)
    pool.alloc(0, 2)
    pool.share(1)
    pool.free_run(0, 2)
    assert pool.inflight == 1
    pool.free_runs(*columns((1, 1)))
    assert pool.inflight == 0


@pytest.mark.parametrize("together", [True, False])
def test_both_holders_letting_go_in_one_call(together: bool) -> None:
    pool = PagePool(4 * PAGE)
    pool.alloc(0, 2)
    pool.share(0)
    pool.share(0)
    if together:
        pool.free_runs(*columns((0, 1), (0, 1), (0, 1)))
    else:
        for _ in range(3):
            pool.free_run(0, 1)
    assert pool.inflight == 1
    with pytest.raises(ValueError, match="not all in flight"):
        pool.free_run(0, 1)


@pytest.mark.parametrize("runs", [((0, 1),), ((2, 2),), ((1, 2),), ((3, 2),)])
def test_a_page_given_back_twice_is_an_error_and_changes_nothing(runs: tuple[tuple[int, int], ...]) -> None:
    pool = PagePool(4 * PAGE)
    pool.alloc(0, 4)
    pool.free_run(0, 1)
    pool.free_run(2, 1)
    with pytest.raises(ValueError, match="in flight"):
        pool.free_runs(*columns(*runs))
    assert pool.inflight == 2


def test_many_scattered_runs_given_back_at_once() -> None:
    pool = PagePool(200 * PAGE)
    pool.alloc(0, 200)
    evens = [(page, 1) for page in range(198, -1, -2)]
    pool.free_runs(*columns(*evens))
    assert pool.inflight == 100
    assert pool.alloc(0, 1) == [(0, 1)]
    with pytest.raises(ValueError, match="not in flight"):
        pool.free_runs(*columns(*evens))
    assert pool.inflight == 101
    pool.free_runs(*columns(*((page, 1) for page in range(1, 200, 2))))
    pool.free_run(0, 1)
    assert pool.alloc(0, 200) == [(0, 200)]


def test_each_queue_has_an_even_share() -> None:
    pool = PagePool(7 * PAGE, queues=(3, 9))
    assert (pool.queue_total(3), pool.queue_total(9)) == (4, 3)
    assert pool.alloc(3, 7) == [(0, 4)]
    assert pool.alloc(3, 1) == []
    assert pool.alloc(9, 7) == [(4, 3)]
    assert (pool.alloc_fail(3), pool.alloc_fail(9)) == (1, 0)
    pool.free_runs(*columns((4, 1), (0, 2), (3, 1)))
    assert (pool.queue_inflight(3), pool.queue_inflight(9)) == (1, 2)
    assert (pool.queue_free(3), pool.queue_free(9)) == (3, 1)


def test_many_scattered_runs_of_two_queues() -> None:
    pool = PagePool(100 * PAGE, queues=(1, 2))
    pool.alloc(1, 50)
    pool.alloc(2, 50)
    pool.free_runs(*columns(*((page, 1) for page in range(0, 100, 2))))
    assert (pool.queue_inflight(1), pool.queue_inflight(2)) == (25, 25)


def test_page_size_is_the_unit() -> None:
    pool = PagePool(256 * 1024, page_size=65536)
    assert pool.pages_total == 4
    assert pool.alloc(0, 9) == [(0, 4)]


@pytest.mark.parametrize(("size", "queues"), [(0, (0,)), (4097, (0,)), (4096, ()), (4096, (1, 1))])
def test_a_pool_that_cannot_be(size: int, queues: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pool"):
        PagePool(size, queues)


def test_a_free_page_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="free"):
        PagePool(PAGE).share(0)


def test_a_reserved_run_is_the_lowest_that_fits_or_none() -> None:
    pool = PagePool(16 * PAGE)
    pool.alloc(0, 16)
    pool.free_run(1, 2)
    pool.free_run(8, 4)
    assert pool.reserve(0, 5) is None
    assert pool.reserve(0, 3) == 8
    assert pool.reserve(0, 2) == 1
    assert pool.reserve(0, 2) is None
    assert (pool.inflight, pool.alloc_fail(0)) == (15, 0)
    pool.unreserve(8, 3)
    assert pool.alloc(0, 9) == [(8, 4)]


def test_a_reserved_run_comes_out_of_its_queues_share() -> None:
    pool = PagePool(8 * PAGE, queues=(3, 9))
    assert pool.reserve(3, 5) is None
    assert pool.reserve(3, 4) == 0
    assert (pool.queue_free(3), pool.queue_free(9)) == (0, 4)
    pool.unreserve(0, 4)
    assert (pool.queue_free(3), pool.queue_free(9)) == (4, 4)


def test_a_reserved_run_goes_back_whole_whatever_else_is_shared() -> None:
    pool = PagePool(8 * PAGE)
    pool.alloc(0, 1)
    pool.share(0)
    assert pool.reserve(0, 7) == 1
    pool.unreserve(1, 7)
    assert pool.inflight == 1
    with pytest.raises(ValueError, match="not all in flight"):
        pool.unreserve(1, 1)
