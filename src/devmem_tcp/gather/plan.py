"""Which bytes to copy, in which order, to make payload contiguous: pure, from the columns of batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from devmem_tcp.types import FragBatch, FragKind

RUN_DTYPE: Final = np.dtype(
    [
        ("source", "<i8"),  # a dmabuf_id, or inline_source(i): the inline bytes of batch i
        ("offset", "<i8"),  # into the source, bytes
        ("size", "<i8"),  # bytes, not 0
    ]
)

RunArray: TypeAlias = npt.NDArray[np.void]

_FEW_FRAGS: Final = 32  # up to here a loop is quicker than two dozen NumPy calls


def inline_source(batch_index: int) -> int:
    """Return the ``source`` of the inline bytes of batch ``batch_index``: negative, where dmabuf_ids are not."""
    return -1 - batch_index


@dataclass(frozen=True, slots=True, eq=False)
class GatherPlan:
    """The pieces of a payload, in order, adjacent ones merged into runs.

    Args:
        runs: shape (n,), dtype RUN_DTYPE.
        equal_size: bytes, where all frags are that large, lie in one dma-buf and at multiples of it (so every run is a
            whole number of rows of a table as wide); else None.
    """

    runs: RunArray
    equal_size: int | None

    @property
    def nbytes(self) -> int:
        """Payload bytes in all runs."""
        return int(self.runs["size"].sum())

    @property
    def contiguous(self) -> bool:
        """Whether the payload is one run of one dma-buf already."""
        return len(self.runs) == 1 and int(self.runs["source"][0]) >= 0

    @property
    def dmabuf_ids(self) -> tuple[int, ...]:
        """The dma-bufs that have pieces, ascending."""
        sources = self.runs["source"]
        return tuple(np.unique(sources[sources >= 0]).tolist())

    def rows(self) -> npt.NDArray[np.int64]:
        """Return the rows of ``equal_size`` bytes that make up the payload: shape (nbytes / equal_size,), int64.

        Raises:
            ValueError: the pieces are not of equal size.
        """
        if self.equal_size is None:
            raise ValueError("the pieces of this plan are not of equal size")
        first = self.runs["offset"] // self.equal_size
        counts = self.runs["size"] // self.equal_size
        rows_before = np.cumsum(counts) - counts
        return np.repeat(first - rows_before, counts) + np.arange(counts.sum())


def plan_gather(batches: FragBatch | Sequence[FragBatch]) -> GatherPlan:
    """Plan how to make the payload of one or several batches contiguous, in order.

    Frags without bytes are left out.

    Raises:
        StaleFragError: a batch was released.
    """
    if isinstance(batches, FragBatch):
        batches = (batches,)
    columns = [batch.frags for batch in batches]
    if sum(map(len, columns)) <= _FEW_FRAGS:
        return _plan_few([column.tolist() for column in columns])
    return _plan_many(columns)


def _plan_few(batches: list[list[tuple[int, int, int, int, int]]]) -> GatherPlan:
    """Merge in a loop. Each frag is a tuple in the order of FRAG_DTYPE."""
    runs: list[tuple[int, int, int]] = []
    frag_sizes = set()
    aligned = True
    for index, frags in enumerate(batches):
        for offset, size, _, dmabuf_id, kind in frags:
            if size == 0:
                continue
            source = dmabuf_id if kind == FragKind.DMABUF else inline_source(index)
            frag_sizes.add(size)
            aligned = aligned and offset % size == 0
            if runs:
                last_source, last_offset, last_size = runs[-1]
                if last_source == source and last_offset + last_size == offset:
                    runs[-1] = (source, last_offset, last_size + size)
                    continue
            runs.append((source, offset, size))
    sources = {source for source, _, _ in runs}
    equal = aligned and len(frag_sizes) == 1 and len(sources) == 1 and sources.pop() >= 0
    return GatherPlan(np.array(runs, RUN_DTYPE), frag_sizes.pop() if equal else None)


def _plan_many(columns: list[npt.NDArray[np.void]]) -> GatherPlan:
    """Merge by comparing each frag with the one before it, all at once."""
    frags = np.concatenate(columns)
    batch_index = np.repeat(np.arange(len(columns)), [len(column) for column in columns])
    source = np.where(frags["kind"] == FragKind.DMABUF, frags["dmabuf_id"].astype(np.int64), -1 - batch_index)
    offset = frags["offset"].astype(np.int64)
    size = frags["size"].astype(np.int64)
    if not size.all():
        kept = size > 0
        source, offset, size = source[kept], offset[kept], size[kept]

    begins = np.ones(len(size), np.bool_)
    begins[1:] = (source[1:] != source[:-1]) | (offset[1:] != offset[:-1] + size[:-1])
    at = np.flatnonzero(begins)
    runs = np.empty(len(at), RUN_DTYPE)
    runs["source"] = source[at]
    runs["offset"] = offset[at]
    runs["size"] = np.add.reduceat(size, at) if len(at) else 0

    equal_size = None
    if len(size) and source[0] >= 0 and (source == source[0]).all() and (size == size[0]).all():
        width = int(size[0])
        equal_size = width if not (offset % width).any() else None
    return GatherPlan(runs, equal_size)
