"""Choices read off a string of bytes: the one thing that a fuzzer needs from whatever drives it.

A case is a string of bytes. Where it comes from, a seeded generator, Hypothesis, atheris or a file, is no business of
the fuzzer that reads its choices off it; the same bytes always make the same choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

INPUT_BYTES: Final = 32  # of a case, for the choices of one input

_T = TypeVar("_T")


def blocks(case: bytes) -> list[bytes]:
    """Cut a case into what the choices of each input are read off, so that dropping one leaves the others alone."""
    return [case[start : start + INPUT_BYTES] for start in range(0, len(case), INPUT_BYTES)]


class Choices:
    """A source of choices. Behind the end of its bytes it always chooses the first: the lowest, the plainest.

    So a case with more zeros is a simpler one, which is what shrinking looks for.
    """

    def __init__(self) -> None:
        self._block = b""
        self._at = 0

    def refill(self, block: bytes) -> None:
        """Read choices off ``block`` from now on."""
        self._block = block
        self._at = 0

    def integer(self, low: int, high: int) -> int:
        """Choose a number from ``low`` to ``high``, both included. Reads as many bytes as the difference has."""
        span = high - low
        start = self._at
        self._at = start + (span.bit_length() + 7 >> 3)
        return low + int.from_bytes(self._block[start : self._at], "little") % (span + 1)

    def one_of(self, options: Sequence[_T]) -> _T:
        """Choose one of ``options``, which are not none."""
        return options[self.integer(0, len(options) - 1)]

    def once_in(self, times: int) -> bool:
        """Say yes once in so many times, at most 256; no behind the end."""
        return self.integer(0, times - 1) == times - 1

    def data(self, size: int) -> bytes:
        """Choose ``size`` bytes; zeros behind the end."""
        start = self._at
        self._at = start + size
        return self._block[start : self._at].ljust(size, b"\0")
