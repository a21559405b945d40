"""Tokens: how a socket hands them out and takes them back, and how a program returns many in few calls.

Rules of the machine, as in net/ipv4/tcp.c (tcp_recvmsg_dmabuf) and net/core/sock.c (sock_devmem_dontneed):
  - a token is a number from 1, the lowest free one of its socket;
  - one DONTNEED call takes 1 to 128 ranges and looks at the first 1024 tokens they name, known or not;
  - an unknown token, one of another socket, or one returned before is passed over in silence.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from devmem_tcp.errors import KernelError
from devmem_tcp.types import TokenRange, TokenRangeArray, U32Array
from devmem_tcp.uapi.socket import DMABUF_TOKEN, MAX_DONTNEED_FRAGS, MAX_DONTNEED_TOKENS, TOKEN_DTYPE

_FREE: Final = 0
_LIVE: Final = 1
_FIRST_CAPACITY: Final = 64
_ROW_DTYPE: Final = np.dtype(
    [
        ("first_page", np.uint32),
        ("page_count", np.uint32),
        ("dmabuf_id", np.uint32),
        ("size", np.uint32),
        ("issued_at", np.float64),
    ]
)
_CALL: Final = "setsockopt(SO_DEVMEM_DONTNEED)"
_NUMBERS: Final = 1 << 32
_LADDER_TOKENS: Final = 1 << 16
_LADDER: Final = np.arange(_LADDER_TOKENS, dtype="<u4").tobytes()  # every token below that: what a run is a part of
_TOKEN_BYTES: Final = 4


class Returned(NamedTuple):
    """What a return of tokens gave back: page runs, and the binding (dmabuf_id) each belongs to. Shapes (n,)."""

    first_pages: U32Array
    page_counts: U32Array
    dmabuf_ids: U32Array


class TokenLedger:
    """The tokens of one socket: which are out, and which pages of which binding each stands for."""

    __slots__ = ("_low", "_rows", "_state", "_states", "outstanding")

    def __init__(self) -> None:
        self.outstanding = 0
        self._low = 1  # no free token is below this one
        self._state = bytearray(_FIRST_CAPACITY)
        self._state[0] = _LIVE  # token 0 is never handed out
        self._states = np.frombuffer(self._state, np.uint8)  # the same bytes: find() for one token, NumPy for many
        self._rows = np.zeros(_FIRST_CAPACITY, _ROW_DTYPE)

    def _grow(self) -> None:
        state = bytearray(2 * self.capacity)
        state[: self.capacity] = self._state
        rows = np.zeros(len(state), _ROW_DTYPE)
        rows[: self.capacity] = self._rows
        self._state, self._states, self._rows = state, np.frombuffer(state, np.uint8), rows

    @property
    def capacity(self) -> int:
        return len(self._state)

    def issue_one(self, first_page: int, page_count: int, dmabuf_id: int, size: int, now: float) -> int:
        """Hand out the lowest free token for one frag of ``size`` bytes."""
        token = self._state.find(_FREE, self._low)
        if token < 0:
            token = self.capacity
            self._grow()
        self._state[token] = _LIVE
        self._rows[token] = (first_page, page_count, dmabuf_id, size, now)
        self._low = token + 1
        self.outstanding += 1
        return token

    def issue(
        self, first_pages: U32Array, page_counts: U32Array, dmabuf_id: int, sizes: U32Array, now: float
    ) -> npt.NDArray[np.intp]:
        """Hand out the lowest free tokens for frags of one binding, in order; columns of shape (n,)."""
        wanted = len(first_pages)
        while self.capacity - 1 - self.outstanding < wanted:
            self._grow()
        tokens = np.flatnonzero(self._states[self._low :] == _FREE)[:wanted] + self._low
        rows = np.empty(wanted, _ROW_DTYPE)
        rows["first_page"] = first_pages
        rows["page_count"] = page_counts
        rows["dmabuf_id"] = dmabuf_id
        rows["size"] = sizes
        rows["issued_at"] = now
        self._rows[tokens] = rows
        self._states[tokens] = _LIVE
        if wanted:
            self._low = int(tokens[-1]) + 1
        self.outstanding += wanted
        return tokens

    def dontneed(self, tokens: TokenRangeArray) -> Returned:
        """Take tokens back, by the rules of one SO_DEVMEM_DONTNEED call.

        Args:
            tokens: shape (n,), dtype TOKEN_DTYPE.

        Raises:
            KernelError: EINVAL: no range, or more than 128; nothing is taken.
        """
        if not 0 < len(tokens) <= MAX_DONTNEED_TOKENS:
            raise KernelError(
                errno.EINVAL, _CALL, hint=f"give 1 to {MAX_DONTNEED_TOKENS} ranges a call, not {len(tokens)}"
            )
        named = named_tokens(tokens, self.capacity)
        return self._take(named[self._states[named] == _LIVE])

    def take_one(self, token: int) -> tuple[int, int, int] | None:
        """Take one token back: (first page, page count, dmabuf_id), or None if it is not out."""
        if not 0 < token < self.capacity or self._state[token] != _LIVE:
            return None
        self._state[token] = _FREE
        if token < self._low:
            self._low = token
        self.outstanding -= 1
        first_page, page_count, dmabuf_id, _, _ = self._rows.item(token)
        return first_page, page_count, dmabuf_id

    def take_all(self) -> Returned:
        """Take back every token, as closing the socket does."""
        return self._take(np.flatnonzero(self._states[1:] == _LIVE) + 1)

    def _take(self, tokens: npt.NDArray[np.intp]) -> Returned:
        if len(tokens):
            self._states[tokens] = _FREE
            self._low = min(self._low, int(tokens[0]))
            self.outstanding -= len(tokens)
        rows = self._rows[tokens]
        return Returned(rows["first_page"], rows["page_count"], rows["dmabuf_id"])

    def held(self, dmabuf_id: int) -> tuple[int, int, float]:
        """Return how many tokens of a binding are out, the bytes in their frags, and when the oldest was issued.

        May be called while another thread changes the ledger; it then tells one of the states in between.
        """
        states, rows = self._states, self._rows  # two reads: the ledger may grow in between
        rows = rows[: len(states)][states[: len(rows)] == _LIVE]
        rows = rows[rows["dmabuf_id"] == dmabuf_id]
        if not len(rows):
            return 0, 0, 0.0
        return len(rows), int(rows["size"].sum()), float(rows["issued_at"].min())


def named_tokens(ranges: TokenRangeArray, capacity: int) -> npt.NDArray[np.int64]:
    """Return the tokens from 1 and below ``capacity`` that one DONTNEED call looks at, each once, ascending.

    A range that goes past the last 32-bit number goes on at 0 (net/core/sock.c, sock_devmem_dontneed).

    Args:
        ranges: shape (n,), dtype TOKEN_DTYPE.
    """
    if len(ranges) == 1:
        start, count = ranges.item(0)
        end = start + min(count, MAX_DONTNEED_FRAGS)
        if end <= _NUMBERS:
            return np.arange(max(start, 1), max(min(end, capacity), 1))
    named = np.unique(_expand(ranges))
    return named[(named > 0) & (named < capacity)]


def run_of(tokens: U32Array) -> tuple[int, int] | None:
    """Return tokens that are neighbours in ascending order as (first, count); None if they are not, or none, or 0."""
    count = len(tokens)
    if not count:
        return None
    first = tokens.item(0)
    if not first or tokens.item(-1) - first != count - 1:
        return None
    if first + count <= _LADDER_TOKENS:
        # Bytes are compared without a ufunc; see ControlColumns for why.
        neighbours = _LADDER.startswith(tokens.tobytes(), first * _TOKEN_BYTES)
    else:
        neighbours = bool((tokens[1:] > tokens[:-1]).all())
    return (first, count) if neighbours else None


def _expand(tokens: TokenRangeArray) -> npt.NDArray[np.int64]:
    """Return the first 1024 token numbers that the ranges name, in order."""
    starts = tokens["start"].astype(np.int64)
    counts = np.minimum(tokens["count"], MAX_DONTNEED_FRAGS).astype(np.int64)
    ends = np.minimum(np.cumsum(counts), MAX_DONTNEED_FRAGS)
    counts = np.diff(ends, prepend=0)
    return (np.repeat(starts - (ends - counts), counts) + np.arange(int(ends[-1]))) % _NUMBERS


def token_array(optval: TokenRangeArray | bytes) -> TokenRangeArray:
    """Read a DONTNEED argument: an array of TOKEN_DTYPE as it is, or its raw bytes.

    Raises:
        KernelError: EINVAL: the length is not a multiple of 8 bytes.
    """
    if isinstance(optval, np.ndarray):
        if optval.dtype != TOKEN_DTYPE or optval.ndim != 1:
            raise ValueError(f"tokens must be a 1-D array of uapi.socket.TOKEN_DTYPE, not {optval.dtype}")
        return optval
    if len(optval) % TOKEN_DTYPE.itemsize:
        raise KernelError(errno.EINVAL, _CALL, hint=f"{len(optval)} bytes are no whole number of 8-byte tokens")
    return np.frombuffer(optval, TOKEN_DTYPE)


def dontneed_calls(tokens: U32Array) -> Iterator[TokenRangeArray]:
    """Merge tokens into ranges and split them into as few DONTNEED calls as the limits allow.

    Args:
        tokens: shape (n,), in any order; zeros (frags that have none) are left out.

    Yields:
        Arrays of TOKEN_DTYPE, each at most 128 ranges and 1024 tokens in all.
    """
    if (run := run_of(tokens)) is not None:
        yield from run_calls(*run)
        return
    if len(tokens) > 1 and not (tokens[1:] > tokens[:-1]).all():
        tokens = np.unique(tokens)
    if len(tokens) and tokens[0] == 0:
        tokens = tokens[1:]
    for at in range(0, len(tokens), MAX_DONTNEED_FRAGS):
        ranges = _merge(tokens[at : at + MAX_DONTNEED_FRAGS])
        for first in range(0, len(ranges), MAX_DONTNEED_TOKENS):
            yield ranges[first : first + MAX_DONTNEED_TOKENS]


def run_calls(first: int, count: int) -> Iterator[TokenRangeArray]:
    """Split a run of tokens into as few DONTNEED calls as the limits allow; yields arrays of TOKEN_DTYPE."""
    for at in range(0, count, MAX_DONTNEED_FRAGS):
        yield np.frombuffer(DMABUF_TOKEN.pack(first + at, min(count - at, MAX_DONTNEED_FRAGS)), TOKEN_DTYPE)


def _merge(tokens: U32Array) -> TokenRangeArray:
    """Return sorted, distinct tokens as ranges of neighbours."""
    follows = np.zeros(len(tokens), np.bool_)
    np.equal(tokens[1:] - tokens[:-1], 1, out=follows[1:])
    starts = np.flatnonzero(~follows)
    ranges = np.empty(len(starts), TOKEN_DTYPE)
    ranges["start"] = tokens[starts]
    ranges["count"] = np.diff(starts, append=len(tokens))
    return ranges


def token_ranges(tokens: TokenRangeArray) -> list[TokenRange]:
    """Return ranges as typed objects; for reading and tests."""
    return [TokenRange(start, count) for start, count in tokens.tolist()]
