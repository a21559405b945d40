"""Notify blocks and MSI-X vectors: when an event becomes an interrupt.

A queue's events go to its notify block, whose doorbell the driver rings to ask for the next interrupt. An event on an
enabled block fires its vector and disables the block; on a disabled one it is remembered. Enabling a block with an
event remembered fires at once, so no event between the driver's last look and its doorbell is lost
(gve_main.c, gve_napi_poll_dqo).
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

ENABLE: Final = 1 << 0  # GVE_ITR_ENABLE_BIT_DQO, gve_dqo.h
CLEAR_PENDING: Final = 1 << 1  # GVE_ITR_CLEAR_PBA_BIT_DQO


class Vectors:
    """The MSI-X vectors: each an eventfd of the virtual machine, or none while it is masked or not set up.

    An interrupt on a vector without eventfd is kept until it gets one, as the pending bit array of MSI-X does.

    Lifetime: eventfds belong to whoever set them.
    """

    def __init__(self, count: int) -> None:
        self.count: Final = count
        self.fired = 0  #: interrupts sent
        self._fds: list[int | None] = [None] * count
        self._kept = [False] * count

    def assign(self, vector: int, eventfd: int | None) -> None:
        """Give ``vector`` its eventfd, or take it away with None; vectors out of range are not there to set."""
        if not 0 <= vector < self.count:
            return
        self._fds[vector] = eventfd
        if eventfd is not None and self._kept[vector]:
            self._kept[vector] = False
            self.fire(vector)

    def fire(self, vector: int) -> None:
        """Raise the interrupt of ``vector``."""
        eventfd = self._fds[vector]
        if eventfd is None:
            self._kept[vector] = True
            return
        self.fired += 1
        with suppress(BlockingIOError):  # 2^64 - 2 interrupts unread: one more changes nothing
            os.eventfd_write(eventfd, 1)

    def forget(self) -> None:
        """Drop interrupts kept for vectors without eventfd."""
        self._kept = [False] * self.count


class NotifyBlock:
    """What a queue's events go to: disabled until its doorbell says otherwise."""

    __slots__ = ("_vector", "_vectors", "enabled", "pending")

    def __init__(self, vectors: Vectors, vector: int) -> None:
        self._vectors = vectors
        self._vector = vector
        self.enabled = False
        self.pending = False

    def event(self) -> None:
        """Something happened on the queue: fire, or remember."""
        if self.enabled:
            self.enabled = False
            self._vectors.fire(self._vector)
        else:
            self.pending = True

    def doorbell(self, value: int) -> None:
        """Take a write to the block's doorbell; the throttling interval in it is ignored."""
        if value & CLEAR_PENDING:
            self.pending = False
        if not value & ENABLE:
            return
        self.enabled = True
        if self.pending:
            self.pending = False
            self.event()
