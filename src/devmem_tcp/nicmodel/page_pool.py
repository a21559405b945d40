"""The pages of one bound Buffer, as the NIC's RX queues take them and as returned tokens give them back.

Rules:
  - a page is free, or in flight for one queue; it may have several holders (a page read in pieces), and is free again
    once the last has let go: in flight + free = total, always;
  - the lowest adjacent free pages are taken first, so that a buffer that is emptied quickly stays in the CPU's caches
    and payload lands in few, long runs;
  - each queue has an even share, so that a queue whose reader holds its tokens cannot stop another;
  - reserved pages are in flight like others: neighbours, with one holder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from devmem_tcp.types import PAGE_SIZE, U32Array

_FREE: Final = 0xFF
_FREE_PAGE: Final = bytes([_FREE])
MAX_QUEUES: Final = _FREE
_MANY_RUNS: Final = 16  # from here on one pass over an index array is quicker than a loop over runs


class _Share:
    """What one queue may take and has taken."""

    __slots__ = ("alloc_fail", "inflight", "mark", "quota")

    def __init__(self, index: int, quota: int) -> None:
        self.mark = bytes([index])  # what a page of this share has in the pool's state
        self.quota = quota
        self.inflight = 0
        self.alloc_fail = 0


class PagePool:
    """Free and in-flight pages of a Buffer of ``size_bytes``, shared evenly by ``queues``. Not thread-safe.

    Args:
        size_bytes: of the buffer; a multiple of ``page_size``.
        page_size: bytes a page, a power of two from 4096 on (rx-page-size).
        queues: the RX queues that the buffer is bound to, 1 to 255 of them.
    """

    def __init__(self, size_bytes: int, queues: Sequence[int] = (0,), *, page_size: int = PAGE_SIZE) -> None:
        if size_bytes <= 0 or size_bytes % page_size:
            raise ValueError(f"pool of {size_bytes} bytes is no positive multiple of its page size {page_size}")
        if not 0 < len(set(queues)) == len(queues) <= MAX_QUEUES:
            raise ValueError(f"a pool needs 1 to {MAX_QUEUES} different queues, got {list(queues)}")
        self.page_size: Final = page_size
        self.pages_total: Final = size_bytes // page_size
        self._state = bytearray(_FREE_PAGE * self.pages_total)  # per page: _FREE, or the index of its queue's share
        self._states = np.frombuffer(self._state, np.uint8)
        even, rest = divmod(self.pages_total, len(queues))
        self._shares = [_Share(index, even + (index < rest)) for index in range(len(queues))]
        self._index = {queue: index for index, queue in enumerate(queues)}
        self._low = 0  # no free page is below this one
        self._extra_holders: dict[int, int] = {}  # pages with more than one holder: how many more

    @property
    def inflight(self) -> int:
        """Pages in flight, of all queues."""
        return sum(share.inflight for share in self._shares)

    def queue_inflight(self, queue: int) -> int:
        return self._shares[self._index[queue]].inflight

    def queue_total(self, queue: int) -> int:
        """Pages that the queue may have in flight."""
        return self._shares[self._index[queue]].quota

    def queue_free(self, queue: int) -> int:
        share = self._shares[self._index[queue]]
        return share.quota - share.inflight

    def alloc_fail(self, queue: int) -> int:
        """How often the queue found no free page: the packets that a NIC would have dropped."""
        return self._shares[self._index[queue]].alloc_fail

    def alloc(self, queue: int, pages: int, *, max_runs: int = 16) -> list[tuple[int, int]]:
        """Take up to ``pages`` pages for a queue, in at most ``max_runs`` runs of neighbours.

        Returns:
            (first page, page count) of each run; fewer pages than asked when fewer are free or they are scattered.
            Empty, and counted as a drop, when the queue has none left.
        """
        share = self._shares[self._index[queue]]
        pages = min(pages, share.quota - share.inflight)
        if pages <= 0:
            share.alloc_fail += 1
            return []
        at = self._find(pages)
        if at < 0:
            return self._take_scattered(share, pages, max_runs)
        self._take(share, at, pages)
        return [(at, pages)]

    def reserve(self, queue: int, pages: int) -> int | None:
        """Take ``pages`` neighbouring pages for a queue, all or none; returns the first. They are never shared.

        Returns:
            None: the queue may not have so many, or they are scattered. Nothing is dropped for it, and none counted.
        """
        share = self._shares[self._index[queue]]
        if pages > share.quota - share.inflight:
            return None
        first = self._find(pages)
        if first < 0:
            return None
        self._take(share, first, pages)
        return first

    def unreserve(self, first: int, count: int) -> None:
        """Give back what ``reserve`` took.

        Raises:
            ValueError: one of the pages is free already: somebody counts wrongly.
        """
        self._put_back(first, count)

    def _find(self, pages: int) -> int:
        """Return the first page of the lowest run of ``pages`` free pages, or -1."""
        wanted = _FREE_PAGE * pages
        if self._state.startswith(wanted, self._low):  # the usual case; find() prepares for a long search first
            return self._low
        return self._state.find(wanted, self._low)

    def _take(self, share: _Share, first: int, count: int) -> None:
        self._state[first : first + count] = share.mark * count
        share.inflight += count
        if first == self._low:
            self._low = first + count

    def _take_scattered(self, share: _Share, pages: int, max_runs: int) -> list[tuple[int, int]]:
        """Take up to ``pages`` free pages in several runs, the longest there are first."""
        runs: list[tuple[int, int]] = []
        size, start = max(1, pages // 4), self._low
        while pages and len(runs) < max_runs:
            size = min(size, pages)
            at = self._state.find(_FREE_PAGE * size, start)
            if at >= 0:
                self._take(share, at, size)
                if runs and at == sum(runs[-1]):
                    runs[-1] = (runs[-1][0], runs[-1][1] + size)
                else:
                    runs.append((at, size))
                pages -= size
                start = at + size
            elif size == 1:
                break
            else:
                size, start = max(1, size // 4), self._low
        return runs

    def share(self, page: int) -> None:
        """Give a page in flight one more holder: another frag lies in it."""
        if self._state[page] == _FREE:
            raise ValueError(f"page {page} is free and cannot be shared")
        self._extra_holders[page] = self._extra_holders.get(page, 0) + 1

    def free_run(self, first: int, count: int) -> None:
        """Let go of ``count`` neighbouring pages; those with no other holder are free again.

        Raises:
            ValueError: one of them is free already: somebody counts wrongly.
        """
        if self._extra_holders:
            for page in range(first, first + count):
                if not self._drop_extra(page):
                    self._put_back(page, 1)
        else:
            self._put_back(first, count)

    def _drop_extra(self, page: int) -> bool:
        more = self._extra_holders.get(page)
        if more is None:
            return False
        if more == 1:
            del self._extra_holders[page]
        else:
            self._extra_holders[page] = more - 1
        return True

    def _put_back(self, first: int, count: int) -> None:
        end = first + count
        if end > self.pages_total or self._state.find(_FREE_PAGE, first, end) >= 0:
            raise ValueError(f"pages {first} to {end - 1} are not all in flight")
        if len(self._shares) == 1:
            self._shares[0].inflight -= count
        else:
            for share in self._shares:
                share.inflight -= self._state.count(share.mark, first, end)
        self._state[first:end] = _FREE_PAGE * count
        if first < self._low:
            self._low = first

    def free_runs(self, firsts: U32Array, counts: U32Array) -> None:
        """Let go of many runs at once; columns of shape (n,), in any order. Neighbours are merged first."""
        if self._extra_holders or len(firsts) < 2:
            for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
                self.free_run(first, count)
            return
        order = np.argsort(firsts, kind="stable")
        firsts, counts = firsts[order].astype(np.int64), counts[order].astype(np.int64)
        heads = np.flatnonzero(np.concatenate(([True], firsts[1:] != firsts[:-1] + counts[:-1])))
        firsts, counts = firsts[heads], np.add.reduceat(counts, heads)
        if len(heads) < _MANY_RUNS:
            for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
                self._put_back(first, count)
            return
        ends = np.cumsum(counts)
        self._put_back_pages(np.repeat(firsts - (ends - counts), counts) + np.arange(int(ends[-1])))

    def _put_back_pages(self, pages: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        held = np.bincount(self._states[pages], minlength=_FREE + 1)
        if held[_FREE] or (pages[1:] <= pages[:-1]).any():
            raise ValueError("some of the pages given back are not in flight")
        for index, share in enumerate(self._shares):
            share.inflight -= int(held[index])
        self._states[pages] = _FREE
        self._low = min(self._low, int(pages[0]))
