"""The RSS indirection table: which RX queue each hash bucket goes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

DEFAULT_SIZE: Final = 128


@dataclass(frozen=True, slots=True)
class IndirectionTable:
    """A queue for each hash bucket; bucket is the hash modulo the size. Made by one of the class methods.

    Raises:
        ValueError: the size is not a power of two (NICs mask the hash), or a queue is negative.
    """

    entries: tuple[int, ...]

    def __post_init__(self) -> None:
        size = len(self.entries)
        if size == 0 or size & (size - 1):
            raise ValueError(f"an RSS indirection table has a power of two entries, got {size}")
        if min(self.entries) < 0:
            raise ValueError(f"queues in an RSS indirection table start at 0, got {min(self.entries)}")

    @classmethod
    def default(cls, queues: int, size: int = DEFAULT_SIZE) -> IndirectionTable:
        """Make the table that a NIC with ``queues`` RX queues starts with: entry i is i modulo ``queues``.

        With more queues than entries the last queues get no flow.
        Kernel: ethtool_rxfh_indir_default, include/linux/ethtool.h.

        Raises:
            ValueError: no queue, or ``size`` is not a power of two.
        """
        if queues < 1:
            raise ValueError(f"an RSS indirection table needs a queue, got {queues}")
        return cls(tuple(i % queues for i in range(size)))

    @classmethod
    def equal(cls, queues: int, size: int = DEFAULT_SIZE) -> IndirectionTable:
        """Spread evenly over queues 0 to ``queues`` - 1, as ``ethtool -X NIC equal N`` does.

        Raises:
            ValueError: no queue, more queues than entries, or ``size`` is not a power of two.
        """
        if queues > size:
            raise ValueError(f"equal={queues} is more queues than the table has entries, {size}")
        return cls.default(queues, size)

    @classmethod
    def weights(cls, weights: Sequence[int], size: int = DEFAULT_SIZE) -> IndirectionTable:
        """Give queue i a share of weights[i], in contiguous blocks, as ``ethtool -X NIC weight W0 W1 ...`` does.

        A queue's block ends at entry floor(size * (its own and all earlier weights) / (all weights)), as in ethtool's
        fill_indir_table. A weight of 0 leaves its queue out; every other queue gets an entry at least.

        Raises:
            ValueError: a negative weight, none above 0, a sum above ``size``, or ``size`` is not a power of two.
        """
        if any(weight < 0 for weight in weights):
            raise ValueError(f"RSS weights must not be negative, got {list(weights)}")
        total = sum(weights)
        if total == 0:
            raise ValueError("at least one RSS weight must be above 0")
        if total > size:
            raise ValueError(f"RSS weights sum to {total}, more than the {size} entries of the table")
        entries: list[int] = []
        for queue, so_far in enumerate(accumulate(weights)):
            entries += [queue] * (size * so_far // total - len(entries))
        return cls(tuple(entries))

    @classmethod
    def explicit(cls, entries: Sequence[int], size: int = DEFAULT_SIZE) -> IndirectionTable:
        """Take the entries themselves, repeated to fill ``size``.

        Kernel: ETHTOOL_A_RSS_INDIR is repeated likewise; net/ethtool/rss.c, rss_set_prep_indir.

        Raises:
            ValueError: no entry, a number that does not divide ``size``, a negative queue, or ``size`` is not a power
                of two.
        """
        if not entries or size % len(entries):
            raise ValueError(f"{len(entries)} entries do not fill an RSS indirection table of {size} evenly")
        return cls(tuple(entries) * (size // len(entries)))

    @property
    def size(self) -> int:
        """Number of entries, a power of two."""
        return len(self.entries)

    @property
    def queues_used(self) -> tuple[int, ...]:
        """Queues that some bucket goes to, ascending."""
        return tuple(sorted(set(self.entries)))

    def queue_for(self, hash_value: int) -> int:
        """Return the queue of a packet with this RSS hash: the low bits of the hash choose the entry."""
        return self.entries[hash_value & (len(self.entries) - 1)]

    def check_queues(self, rx_queues: int) -> None:
        """Raise ValueError if an entry names a queue that a NIC with ``rx_queues`` RX queues has not."""
        highest = max(self.entries)
        if highest >= rx_queues:
            raise ValueError(f"RSS indirection table names queue {highest}; the NIC has 0 to {rx_queues - 1}")
