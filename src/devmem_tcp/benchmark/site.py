"""What an end measures with: its NIC, its memory, the terms of its sessions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from devmem_tcp.benchmark.drill import PATTERN
from devmem_tcp.benchmark.plan import Pools, Work
from devmem_tcp.buffers import Buffer, CpuAccess
from devmem_tcp.contract import Nic
from devmem_tcp.testing.patterns import pattern

_TILE: Final = PATTERN << 12  # bytes


class Site:
    """One end's means. Buffers are allocated when first needed, and kept: works follow each other quickly.

    Args:
        allocate: makes a Buffer of so many bytes for the NIC.
        session: of ``SessionOptions``: key, insecure, lanes.
        timeout_s: how long to wait for the other end at any point of a work.
    """

    def __init__(
        self, nic: Nic, allocate: Callable[[int], Buffer], session: Mapping[str, Any], timeout_s: float
    ) -> None:
        self.nic: Final = nic
        self.backend: Final = nic.capabilities.backend
        self.session: Final = session
        self.timeout_s: Final = timeout_s
        self.pools = Pools(0, 0, 0, 0, 0)
        self._allocate = allocate
        self._held = contextlib.ExitStack()
        self._buffers: dict[tuple[str, int], Buffer] = {}

    def rx(self, work: Work) -> Buffer:
        """Return the Buffer that a work receives into."""
        return self._buffer("rx", self.pools.rx(work))

    def tx(self, work: Work) -> Buffer:
        """Return the Buffer that a work sends from: wherever a message begins in it, at 0, is the pattern."""
        return self._buffer("tx", self.pools.tx(work))

    def _buffer(self, role: str, size_bytes: int) -> Buffer:
        if (role, size_bytes) not in self._buffers:
            buffer = self._allocate(size_bytes)
            self._held.callback(buffer.retire)  # not close: what showed bytes of a slot may not be collected yet
            if role == "tx":
                _fill(buffer)
            self._buffers[role, size_bytes] = buffer
        return self._buffers[role, size_bytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._buffers.clear()
        self._held.close()


def _fill(buffer: Buffer) -> None:
    """Write the pattern all over a Buffer."""
    tile = pattern(PATTERN, _TILE)  # a whole number of periods
    with buffer.cpu_access(CpuAccess.WRITE) as memory:
        target = np.frombuffer(memory, np.uint8)
        for at in range(0, len(target), _TILE):
            piece = target[at : at + _TILE]
            piece[:] = tile[: len(piece)]
