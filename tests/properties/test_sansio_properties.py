"""Invariants of tokens, pages and completions under any order of operations."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from devmem_tcp.nicmodel.page_pool import PagePool
from devmem_tcp.sansio.completions import CompletionQueue, InFlight
from devmem_tcp.sansio.tokens import TokenLedger, dontneed_calls, token_array
from devmem_tcp.uapi.socket import MAX_DONTNEED_FRAGS, MAX_DONTNEED_TOKENS, TOKEN_DTYPE

PAGES = 40
tokens = st.lists(st.integers(0, 3000), max_size=2500)


@given(tokens)
def test_every_token_is_returned_once_within_the_limits(named: list[int]) -> None:
    freed: list[int] = []
    for call in dontneed_calls(np.array(named, np.uint32)):
        assert 0 < len(call) <= MAX_DONTNEED_TOKENS
        assert 0 < int(call["count"].sum()) <= MAX_DONTNEED_FRAGS
        for start, count in call.tolist():
            freed += range(start, start + count)
    assert freed == sorted(set(named) - {0})


class Pages(RuleBasedStateMachine):
    """A reader that takes pages, by tokens and as places, and gives them back, against a naive model."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES * 4096, queues=(0, 1))
        self.ledger = TokenLedger()
        self.held: dict[int, tuple[int, int]] = {}  # token: (first page, count)
        self.places: list[tuple[int, int]] = []  # first page, count

    @rule(queue=st.sampled_from((0, 1)), pages=st.integers(1, 25), max_runs=st.integers(1, 4))
    def take(self, queue: int, pages: int, max_runs: int) -> None:
        free = self.pool.queue_free(queue)
        runs = self.pool.alloc(queue, pages, max_runs=max_runs)
        assert sum(count for _, count in runs) <= min(pages, free)
        assert bool(runs) == bool(free)
        for first, count in runs:
            expected = next(number for number in range(1, 1000) if number not in self.held)
            assert self.ledger.issue_one(first, count, 1, count * 4096, 0.0) == expected
            self.held[expected] = (first, count)

    def pages_out(self) -> list[int]:
        runs = [*self.held.values(), *self.places]
        return [page for first, count in runs for page in range(first, first + count)]

    @rule(queue=st.sampled_from((0, 1)), pages=st.integers(1, 25))
    def reserve(self, queue: int, pages: int) -> None:
        out = set(self.pages_out())
        fits = [first for first in range(PAGES - pages + 1) if out.isdisjoint(range(first, first + pages))]
        allowed = pages <= self.pool.queue_free(queue)
        first = self.pool.reserve(queue, pages)
        assert first == (fits[0] if fits and allowed else None)
        if first is not None:
            self.places.append((first, pages))

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def unreserve(self, data: st.DataObject) -> None:
        self.pool.unreserve(*self.places.pop(data.draw(st.integers(0, len(self.places) - 1))))

    @rule(named=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), min_size=1, max_size=8))
    def give_back(self, named: list[tuple[int, int]]) -> None:
        wanted = {token for start, count in named for token in range(start, start + count)} & set(self.held)
        returned = self.ledger.dontneed(token_array(np.array(list(named), TOKEN_DTYPE)))
        assert len(returned.first_pages) == len(wanted)
        self.pool.free_runs(returned.first_pages, returned.page_counts)
        for token in wanted:
            del self.held[token]

    @invariant()
    def pages_are_conserved(self) -> None:
        out = self.pages_out()
        assert len(out) == len(set(out)), "two live frags or places overlap"
        assert self.pool.inflight == len(out)
        assert self.pool.inflight + self.pool.queue_free(0) + self.pool.queue_free(1) == PAGES
        assert self.ledger.outstanding == len(self.held)

    def teardown(self) -> None:
        returned = self.ledger.take_all()
        self.pool.free_runs(returned.first_pages, returned.page_counts)
        for first, count in self.places:
            self.pool.unreserve(first, count)
        assert self.pool.inflight == 0


TestPages = Pages.TestCase


@given(st.integers(0, 0xFFFFFFFF), st.integers(1, 40), st.data())
def test_any_coalescing_completes_every_send_once(first: int, sends: int, data: st.DataObject) -> None:
    flight: InFlight[int] = InFlight(first)
    numbers = [flight.add(item) for item in range(sends)]
    queue = CompletionQueue()
    done: list[int] = []
    for item in data.draw(st.permutations(range(sends))):
        queue.complete(numbers[item])
        if data.draw(st.booleans()):
            done += flight.complete(queue.take())
    done += flight.complete(queue.take())
    assert sorted(done) == list(range(sends))
    assert len(flight) == 0
