"""The tokens that a kernel handed out to one socket: which are out, of which binding, how large, since when.

The kernel chooses the tokens and answers how many it freed, but never says which are out. This says it, by the same
rules (see ``sansio.tokens``).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from devmem_tcp.sansio.tokens import named_tokens
from devmem_tcp.types import TokenRangeArray, U8Array, U32Array
from devmem_tcp.uapi.socket import MAX_DONTNEED_FRAGS

_FREE: Final = 0
_OUT: Final = 1
_FIRST_CAPACITY: Final = 2048  # more than one recvmsg brings by default


class HeldTokens:
    """Which tokens of one socket are out. Changes are one thread's at a time; ``held`` may be asked from any."""

    __slots__ = ("_dmabuf_ids", "_issued_at", "_sizes", "_state", "_states", "outstanding")

    def __init__(self) -> None:
        self.outstanding = 0
        self._allot(_FIRST_CAPACITY)

    def _allot(self, capacity: int) -> None:
        self._state = bytearray(capacity)
        self._states: U8Array = np.frombuffer(self._state, np.uint8)  # the same bytes: count() for runs, NumPy for rest
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

    def record(
        self, tokens: U32Array, dmabuf_ids: U32Array, sizes: U32Array, now: float, run: tuple[int, int] | None
    ) -> None:
        """Note tokens that are handed out; columns of shape (n,), n > 0, and what ``run_of`` says of them."""
        highest = sum(run) - 1 if run is not None else int(tokens.max())
        if highest >= len(self._state):
            self._grow(highest)
        where = slice(run[0], highest + 1) if run is not None else tokens
        self._sizes[where] = sizes
        self._dmabuf_ids[where] = dmabuf_ids
        self._issued_at[where] = now
        self._states[where] = _OUT
        self.outstanding += len(tokens)

    def strike(self, ranges: TokenRangeArray) -> int:
        """Strike out tokens that are given back, by the rules of one SO_DEVMEM_DONTNEED call; returns how many.

        Args:
            ranges: shape (n,), dtype TOKEN_DTYPE.
        """
        if len(ranges) == 1:
            start, count = ranges.item(0)
            count = min(count, MAX_DONTNEED_FRAGS)
            if start + count <= len(self._state) and self._state.count(_OUT, start, start + count) == count:
                self._states[start : start + count] = _FREE
                self.outstanding -= count
                return count
        named = named_tokens(ranges, len(self._state))
        out = named[self._states[named] == _OUT]
        self._states[out] = _FREE
        self.outstanding -= len(out)
        return len(out)

    def out(self) -> U32Array:
        """Return the tokens that are out, ascending, shape (n,)."""
        return np.flatnonzero(self._states).astype(np.uint32)

    def held(self, dmabuf_id: int) -> tuple[int, int, float]:
        """Return how many tokens of a binding are out, the bytes in their frags, and when the oldest was issued.

        May be called while another thread changes the tokens; it then tells one of the states in between.
        """
        states, ids, sizes, issued_at = self._states, self._dmabuf_ids, self._sizes, self._issued_at
        capacity = min(len(states), len(ids), len(sizes), len(issued_at))  # they may have grown in between
        out = np.flatnonzero((states[:capacity] == _OUT) & (ids[:capacity] == dmabuf_id))
        if not len(out):
            return 0, 0, 0.0
        return len(out), int(sizes[out].sum(dtype=np.uint64)), float(issued_at[out].min())
