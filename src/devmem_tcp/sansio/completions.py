"""Completions of sends: the numbers, 32 bits wide, of sendmsg(MSG_ZEROCOPY) calls whose bytes may be changed again.

Rules of the machine, as in net/core/skbuff.c (msg_zerocopy_put_abort, skb_zerocopy_notify_extend):
  - the n-th successful send of a socket has the number n - 1, modulo 2**32; a failed one uses no number;
  - completions arrive as inclusive ranges, a range growing while the next number follows its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

from devmem_tcp.errors import RemoteProtocolError
from devmem_tcp.types import CompletionRange

_MODULUS: Final = 1 << 32

Item = TypeVar("Item")


class CompletionQueue:
    """The error queue's side: numbers go in as sends complete, coalesced ranges come out."""

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[list[int]] = []  # low and high

    def complete(self, number: int) -> None:
        """Note that one send is complete."""
        if self._ranges and (self._ranges[-1][1] + 1) % _MODULUS == number:
            self._ranges[-1][1] = number
        else:
            self._ranges.append([number, number])

    def take(self) -> list[CompletionRange]:
        """Return what has completed since the last call."""
        ranges, self._ranges = self._ranges, []
        return [CompletionRange(low, high) for low, high in ranges]

    @property
    def waiting(self) -> bool:
        """Whether there is one whose completion was not taken."""
        return bool(self._ranges)

    @property
    def count(self) -> int:
        """Sends whose completion was not taken."""
        return sum((high - low) % _MODULUS + 1 for low, high in self._ranges)


class InFlight(Generic[Item]):
    """The program's side: what each incomplete send still needs unchanged, oldest first."""

    __slots__ = ("_items", "_next", "_oldest")

    def __init__(self, first_number: int = 0) -> None:
        self._next = first_number % _MODULUS
        self._oldest = self._next  # the number of _items[0]
        self._items: deque[tuple[Item, bool]] = deque()

    def add(self, item: Item) -> int:
        """Note a successful send; returns its number."""
        number = self._next
        self._next = (number + 1) % _MODULUS
        self._items.append((item, False))
        return number

    def complete(self, ranges: Iterable[CompletionRange]) -> list[Item]:
        """Return the items that ranges complete, in order of sending.

        Raises:
            RemoteProtocolError: a range names a send that was never made, or is complete already.
        """
        done: list[Item] = []
        for low, high in ranges:
            first = (low - self._oldest) % _MODULUS
            count = (high - low) % _MODULUS + 1
            if first + count > len(self._items):
                raise RemoteProtocolError(f"completion of sends {low} to {high}, of which some are not in flight")
            for index in range(first, first + count):
                item, complete = self._items[index]
                if complete:
                    raise RemoteProtocolError(f"second completion of send {(self._oldest + index) % _MODULUS}")
                self._items[index] = (item, True)
                done.append(item)
            while self._items and self._items[0][1]:
                self._items.popleft()
                self._oldest = (self._oldest + 1) % _MODULUS
        return done

    def __len__(self) -> int:
        return sum(not complete for _, complete in self._items)
