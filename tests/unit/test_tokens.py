"""The token ledger, and how many tokens become few DONTNEED calls: net/core/sock.c, sock_devmem_dontneed."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import numpy as np
import pytest

from devmem_tcp.errors import KernelError
from devmem_tcp.sansio.tokens import TokenLedger, dontneed_calls, token_array, token_ranges
from devmem_tcp.types import TokenRange, TokenRangeArray
from devmem_tcp.uapi.socket import TOKEN_DTYPE


def ranges(*pairs: tuple[int, int]) -> TokenRangeArray:
    return np.array(list(pairs), TOKEN_DTYPE)


def issue(ledger: TokenLedger, count: int, dmabuf_id: int = 7, now: float = 0.0) -> list[int]:
    pages = np.arange(count, dtype=np.uint32)
    sizes = np.full(count, 4096, np.uint32)
    return [int(token) for token in ledger.issue(pages, np.ones(count, np.uint32), dmabuf_id, sizes, now)]


def calls_of(tokens: Sequence[int]) -> list[list[TokenRange]]:
    return [token_ranges(call) for call in dontneed_calls(np.array(tokens, np.uint32))]


def test_tokens_start_at_one_and_count_up() -> None:
    assert issue(TokenLedger(), 3) == [1, 2, 3]


def test_the_lowest_free_tokens_are_reused_first() -> None:
    ledger = TokenLedger()
    issue(ledger, 6)
    ledger.dontneed(ranges((2, 1), (5, 1)))
    assert issue(ledger, 3) == [2, 5, 7]
    assert ledger.issue_one(0, 1, 7, 1, 0.0) == 8
    assert ledger.take_one(1) is not None
    assert ledger.issue_one(0, 1, 7, 1, 0.0) == 1


def test_issuing_one_and_many_agree_when_the_ledger_grows() -> None:
    one, many = TokenLedger(), TokenLedger()
    assert [one.issue_one(0, 1, 7, 1, 0.0) for _ in range(300)] == issue(many, 300) == list(range(1, 301))
    assert one.outstanding == many.outstanding == 300


def test_a_return_gives_back_each_tokens_pages() -> None:
    ledger = TokenLedger()
    ledger.issue_one(10, 3, 7, 9000, 0.0)
    ledger.issue_one(20, 1, 8, 100, 0.0)
    returned = ledger.dontneed(ranges((1, 2)))
    assert (returned.first_pages.tolist(), returned.page_counts.tolist()) == ([10, 20], [3, 1])
    assert returned.dmabuf_ids.tolist() == [7, 8]
    assert ledger.outstanding == 0


def test_128_ranges_are_taken_and_129_are_refused_whole() -> None:
    ledger = TokenLedger()
    issue(ledger, 129)
    with pytest.raises(KernelError) as refused:
        ledger.dontneed(ranges(*((token, 1) for token in range(1, 130))))
    assert refused.value.errno == errno.EINVAL
    assert ledger.outstanding == 129
    assert len(ledger.dontneed(ranges(*((token, 1) for token in range(1, 129)))).first_pages) == 128


def test_no_range_is_refused() -> None:
    with pytest.raises(KernelError) as refused:
        TokenLedger().dontneed(ranges())
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize("asked", [ranges((1, 1100)), ranges((1, 600), (601, 500))], ids=["one range", "two ranges"])
def test_a_call_frees_1024_tokens_at_most(asked: TokenRangeArray) -> None:
    ledger = TokenLedger()
    issue(ledger, 1100)
    assert len(ledger.dontneed(asked).first_pages) == 1024
    assert ledger.outstanding == 76
    assert issue(ledger, 1) == [1]


def test_unknown_tokens_use_up_the_budget_too() -> None:
    ledger = TokenLedger()
    issue(ledger, 10)
    assert len(ledger.dontneed(ranges((5000, 1020), (1, 10))).first_pages) == 4
    assert len(ledger.dontneed(ranges((5000, 5000), (5, 6))).first_pages) == 0


@pytest.mark.parametrize(
    "asked", [ranges((99, 1)), ranges((1, 0)), ranges((0, 1)), ranges((0xFFFFFFFF, 2)), ranges((99, 1), (0, 1))]
)
def test_unknown_tokens_and_empty_ranges_are_passed_over(asked: TokenRangeArray) -> None:
    ledger = TokenLedger()
    issue(ledger, 3)
    assert len(ledger.dontneed(asked).first_pages) == 0
    assert ledger.outstanding == 3


def test_a_token_named_twice_is_freed_once() -> None:
    ledger = TokenLedger()
    issue(ledger, 3)
    assert len(ledger.dontneed(ranges((1, 2), (2, 2))).first_pages) == 3
    assert len(ledger.dontneed(ranges((1, 3))).first_pages) == 0
    assert ledger.take_one(1) is None


@pytest.mark.parametrize("token", [0, -1, 64, 10_000])
def test_take_one_of_a_token_that_is_not_out(token: int) -> None:
    ledger = TokenLedger()
    issue(ledger, 3)
    assert ledger.take_one(token) is None
    assert ledger.outstanding == 3


def test_held_counts_one_binding_and_finds_the_oldest() -> None:
    ledger = TokenLedger()
    issue(ledger, 2, dmabuf_id=7, now=5.0)
    issue(ledger, 1, dmabuf_id=7, now=3.0)
    issue(ledger, 4, dmabuf_id=8, now=1.0)
    assert ledger.held(7) == (3, 3 * 4096, 3.0)
    assert ledger.held(9) == (0, 0, 0.0)
    assert len(ledger.take_all().first_pages) == 7
    assert ledger.held(8) == (0, 0, 0.0)


def test_raw_bytes_must_be_whole_tokens() -> None:
    assert token_ranges(token_array(bytes([1, 0, 0, 0, 2, 0, 0, 0]))) == [TokenRange(1, 2)]
    with pytest.raises(KernelError) as refused:
        token_array(bytes(12))
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(ValueError, match="TOKEN_DTYPE"):
        token_array(np.zeros(2, np.uint64))


def test_neighbours_become_one_range() -> None:
    assert calls_of([1, 2, 3, 5, 7, 8]) == [[TokenRange(1, 3), TokenRange(5, 1), TokenRange(7, 2)]]
    assert calls_of([9]) == [[TokenRange(9, 1)]]
    assert calls_of([3, 1, 2]) == [[TokenRange(1, 3)]]


def test_frags_without_a_token_are_left_out() -> None:
    assert calls_of([]) == calls_of([0]) == calls_of([0, 0]) == []
    assert calls_of([0, 4, 0, 5]) == [[TokenRange(4, 2)]]


def test_calls_stay_within_1024_tokens_and_128_ranges() -> None:
    assert calls_of(range(1, 2050)) == [[TokenRange(1, 1024)], [TokenRange(1025, 1024)], [TokenRange(2049, 1)]]
    scattered = calls_of(range(1, 600, 2))
    assert [len(call) for call in scattered] == [128, 128, 44]
