"""Mistakes of the guest: counted by kind, logged without flooding, never raised."""

from __future__ import annotations

import logging
from collections import Counter

_LOG = logging.getLogger("devmem_tcp.lab.gvnic")


class Mistakes:
    """What a driver did wrong, counted by kind. The 1st, 2nd, 4th, 8th … of a kind are logged as warnings."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.counts: Counter[str] = Counter()

    def note(self, kind: str, detail: str) -> None:
        """Count one mistake of ``kind``; ``detail`` says what exactly was wrong."""
        self.counts[kind] += 1
        count = self.counts[kind]
        if count & (count - 1) == 0:
            _LOG.warning("%s: guest mistake %s (%d so far): %s", self._name, kind, count, detail)

    @property
    def total(self) -> int:
        return self.counts.total()
