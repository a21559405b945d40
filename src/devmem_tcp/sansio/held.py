"""The tokens that a kernel handed out to one socket: which are out, of which binding, how large, since when.

The kernel chooses the tokens and answers how many it freed, but never says which are out. This says it, by the same
rules (see ``sansio.tokens``).
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from devmem_tcp.sansio.tokens import named_tokens
from devmem_tcp.types import FragArray, TokenRangeArray, U8Array, U32Array
from devmem_tcp.uapi.socket import MAX_DONTNEED_FRAGS

_FREE: Final = 0
_OUT: Final = 1
_FIRST_CAPACITY: Final = 2048  # more than one recvmsg brings by default


_Run: TypeAlias = tuple[FragArray, float]
"""Frags whose tokens are neighbours, all of them out; when they were issued."""


class HeldTokens:
    """Which tokens of one socket are out. Changes are one thread's at a time; ``held`` may be asked from any.

    What a recvmsg brings is mostly a run, and comes back as one: so runs are kept whole, by their first token, as long
    as they are struck out from their start. Any other tokens have a row each in four columns.
    """

    __slots__ = ("_dmabuf_ids", "_issued_at", "_runs", "_sizes", "_states", "outstanding")

    def __init__(self) -> None:
        self.outstanding = 0
        self._runs: dict[int, _Run] = {}
        self._allot(_FIRST_CAPACITY)

    def _allot(self, capacity: int) -> None:
        self._states: U8Array = np.zeros(capacity, np.uint8)
        self._sizes: U32Array = np.zeros(capacity, np.uint32)
        self._dmabuf_ids: U32Array = np.zeros(capacity, np.uint32)
        self._issued_at: npt.NDArray[np.float64] = np.zeros(capacity, np.float64)

    def _grow(self, highest: int) -> None:
        states, sizes, dmabuf_ids, issued_at = self._states, self._sizes, self._dmabuf_ids, self._issued_at
        self._allot(max(2 * len(states), highest + 1))
        self._sizes[: len(sizes)] = sizes
        self._dmabuf_ids[: len(dmabuf_ids)] = dmabuf_ids
        self._issued_at[: len(issued_at)] = issued_at
        self._states[: len(states)] = states

    def record(self, frags: FragArray, now: float, run: tuple[int, int] | None) -> None:
        """Note tokens that are handed out.

        Args:
            frags: shape (n,), n > 0, each with its token; kept, so they must not change any more.
            run: what ``sansio.tokens.run_of`` says of the tokens.
        """
        self.outstanding += len(frags)
        if run is None:
            self._note(frags, now)
        else:
            self._runs[run[0]] = frags, now

    def _note(self, frags: FragArray, now: float) -> None:
        """Give each token its row."""
        tokens = frags["token"]
        highest = int(tokens.max())
        if highest >= len(self._states):
            self._grow(highest)
        self._sizes[tokens] = frags["size"]
        self._dmabuf_ids[tokens] = frags["dmabuf_id"]
        self._issued_at[tokens] = now
        self._states[tokens] = _OUT

    def _break_up_runs(self) -> None:
        """Give each token of every run its row. In between, a token is in both places rather than in none."""
        for first, (frags, issued_at) in list(self._runs.items()):
            self._note(frags, issued_at)
            del self._runs[first]

    def run_of(self, frags: FragArray) -> tuple[int, int] | None:
        """Return (first, count) if the tokens of these very frags were recorded as a run and all of them are out."""
        first = frags["token"].item(0) if len(frags) else 0
        run = self._runs.get(first)
        return (first, len(frags)) if run is not None and run[0] is frags else None

    def strike(self, ranges: TokenRangeArray) -> int:
        """Strike out tokens that are given back, by the rules of one SO_DEVMEM_DONTNEED call; returns how many.

        Args:
            ranges: shape (n,), dtype TOKEN_DTYPE.
        """
        if len(ranges) == 1:
            start, count = ranges.item(0)
            count = min(count, MAX_DONTNEED_FRAGS)
            if self.strike_run(start, count):
                return count
        self._break_up_runs()
        named = named_tokens(ranges, len(self._states))
        out = named[self._states[named] == _OUT]
        self._states[out] = _FREE
        self.outstanding -= len(out)
        return len(out)

    def strike_run(self, first: int, count: int) -> bool:
        """Strike out the first ``count`` tokens of the run that starts with ``first``; False: there is no such run."""
        run = self._runs.get(first)
        if run is None or not 0 < count <= len(run[0]):
            return False
        frags, issued_at = run
        if count < len(frags):
            self._runs[first + count] = frags[count:], issued_at
        del self._runs[first]
        self.outstanding -= count
        return True

    def out(self) -> U32Array:
        """Return the tokens that are out, ascending, shape (n,)."""
        self._break_up_runs()
        return np.flatnonzero(self._states).astype(np.uint32)

    def held(self, dmabuf_id: int) -> tuple[int, int, float]:
        """Return how many tokens of a binding are out, the bytes in their frags, and when the oldest was issued.

        May be called while another thread changes the tokens; it then tells one of the states in between.
        """
        states, ids, sizes, issued_at = self._states, self._dmabuf_ids, self._sizes, self._issued_at
        capacity = min(len(states), len(ids), len(sizes), len(issued_at))  # they may have grown in between
        out = np.flatnonzero((states[:capacity] == _OUT) & (ids[:capacity] == dmabuf_id))
        count, size, oldest = len(out), int(sizes[out].sum(dtype=np.uint64)), issued_at[out].min(initial=np.inf)
        for frags, since in list(self._runs.values()):
            ours = frags["size"][frags["dmabuf_id"] == dmabuf_id]
            if len(ours):
                count, size = count + len(ours), size + int(ours.sum(dtype=np.uint64))
                oldest = min(oldest, since)
        return (count, size, float(oldest)) if count else (0, 0, 0.0)
