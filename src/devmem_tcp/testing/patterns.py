"""The repeating byte pattern of the kernel's own tool, made and checked without a Python loop over bytes.

Of length N it is 1, 2, …, N - 1, 0, 1, 2, …: byte i of the stream is (i + 1) mod N, which is what ``ncdevmem -v N``
expects (tools/testing/selftests/drivers/net/hw/ncdevmem.c, validate_buffer).
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import numpy as np

from devmem_tcp.types import U8Array

MIN_LENGTH: Final = 2
MAX_LENGTH: Final = 256  # values are bytes
_BLOCK: Final = 1 << 20  # bytes compared at a time: the comparison's result stays in the processor's cache


class Mismatch(NamedTuple):
    """The first wrong byte: its offset in the stream, the byte expected there, and the byte found."""

    offset: int
    expected: int
    found: int


def pattern(length: int, n: int, start: int = 0) -> U8Array:
    """Make ``n`` bytes of the pattern, from byte ``start`` of the stream on.

    Args:
        length: the pattern's length N, 2 to 256.
        n: how many bytes.
        start: offset in the stream of the first of them, in bytes.

    Returns:
        Shape (n,), uint8.

    Raises:
        ValueError: ``length`` is out of range; ``n`` or ``start`` is negative.
    """
    if not MIN_LENGTH <= length <= MAX_LENGTH:
        raise ValueError(f"pattern length must be {MIN_LENGTH} to {MAX_LENGTH}, got {length}")
    if n < 0 or start < 0:
        raise ValueError(f"n and start must not be negative, got n={n}, start={start}")
    period = (np.arange(length) + start + 1) % length
    return np.resize(period.astype(np.uint8), n)


def find_mismatch(data: U8Array | memoryview | bytes, length: int, start: int = 0) -> Mismatch | None:
    """Compare bytes with the pattern and return the first that differs, or None.

    Args:
        data: bytes of a stream, in order: shape (n,), uint8, or anything of n contiguous bytes.
        length: the pattern's length N, 2 to 256.
        start: offset in the stream of ``data``'s first byte.

    Raises:
        ValueError: ``length`` is out of range.
    """
    found = np.frombuffer(data, np.uint8)
    tile = _tile(length)
    for at in range(0, len(found), _BLOCK):
        block = found[at : at + _BLOCK]
        phase = (start + at) % length
        expected = tile[phase : phase + len(block)]
        differs = block != expected
        if differs.any():
            index = int(differs.argmax())
            return Mismatch(start + at + index, int(expected[index]), int(block[index]))
    return None


@functools.lru_cache(maxsize=4)
def _tile(length: int) -> U8Array:
    """Return the pattern for one block at any phase."""
    return pattern(length, _BLOCK + length)
