"""Any split of a payload, in any order and mixture of places, gathers to the same bytes as a plain join."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.gather import gather, plan_gather
from devmem_tcp.gather.plan import _plan_few, _plan_many
from devmem_tcp.memory import Host
from devmem_tcp.types import FRAG_DTYPE, FragBatch, FragKind

SIZE = 8192
Frag = tuple[int, int, int, int, int]

CONTENTS = {
    1: np.random.default_rng(1).integers(0, 256, SIZE, np.uint8),
    2: np.random.default_rng(2).integers(0, 256, SIZE, np.uint8),
}

widths = st.sampled_from([1, 3, 16, 512])


@st.composite
def dmabuf_frags(draw: st.DrawFn) -> list[Frag]:
    """Frags of one dma-buf: ragged ones anywhere, or rows of a table, or neighbours, in any order."""
    dmabuf_id = draw(st.sampled_from(sorted(CONTENTS)))
    shape = draw(st.sampled_from(["ragged", "rows", "neighbours"]))
    if shape == "rows":
        width = draw(widths)
        rows = draw(st.lists(st.integers(0, SIZE // width - 1), max_size=40))
        spans = [(row * width, (row + 1) * width) for row in rows]
    elif shape == "neighbours":
        spans = list(pairwise(sorted(draw(st.lists(st.integers(0, SIZE), max_size=40)))))
    else:
        ends = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)
        spans = [(begin, end) for begin, end in draw(st.lists(ends, max_size=10))]
    return [(begin, end - begin, 1, dmabuf_id, FragKind.DMABUF) for begin, end in spans]


@st.composite
def batches(draw: st.DrawFn) -> tuple[FragBatch, bytes]:
    """A batch of frags of all kinds, and its bytes joined frag by frag."""
    parts: list[list[Frag] | bytes] = draw(st.lists(dmabuf_frags() | st.binary(max_size=50), max_size=5))
    frags: list[Frag] = []
    inline = b""
    joined = b""
    for part in parts:
        if isinstance(part, bytes):
            kind = draw(st.sampled_from([FragKind.LINEAR, FragKind.HOST]))
            frags.append((len(inline), len(part), 0, 0, kind))
            inline += part
            joined += part
        else:
            frags += part
            joined += b"".join(CONTENTS[frag[3]][frag[0] : frag[0] + frag[1]].tobytes() for frag in part)
    return FragBatch(np.array(frags, FRAG_DTYPE), len(joined), memoryview(inline), None), joined


@pytest.fixture(scope="module")
def buffers() -> Any:
    with Host().allocate(SIZE) as one, Host("memfd").allocate(SIZE) as two:
        one.array()[:] = CONTENTS[1]
        two.array()[:] = CONTENTS[2]
        yield {1: one, 2: two}


@given(parts=st.lists(batches(), max_size=4), spare=st.integers(0, 9), with_out=st.booleans())
def test_same_bytes_as_a_join(parts: list[tuple[FragBatch, bytes]], spare: int, with_out: bool, buffers: Any) -> None:
    joined = b"".join(payload for _, payload in parts)
    out = np.zeros(len(joined) + spare, np.uint8) if with_out else None
    payload = gather([batch for batch, _ in parts], buffers, out=out)
    assert payload.tobytes() == joined
    assert payload.dtype == np.uint8
    assert payload.shape == (len(joined),)
    if out is not None:
        assert out.tobytes() == joined + bytes(spare)


@given(parts=st.lists(batches(), max_size=4))
def test_the_plan_is_the_same_by_loop_and_by_columns(parts: list[tuple[FragBatch, bytes]]) -> None:
    columns = [batch.frags for batch, _ in parts] or [np.empty(0, FRAG_DTYPE)]
    few, many = _plan_few([column.tolist() for column in columns]), _plan_many(columns)
    assert few.runs.tolist() == many.runs.tolist()
    assert few.equal_size == many.equal_size
    assert few.nbytes == sum(len(payload) for _, payload in parts)


@given(parts=st.lists(batches(), max_size=4))
def test_neighbouring_runs_are_not_adjacent(parts: list[tuple[FragBatch, bytes]]) -> None:
    plan = plan_gather([batch for batch, _ in parts])
    runs = plan.runs.tolist()
    assert all(size > 0 for _, _, size in runs)
    assert not any(
        (source, offset + size) == (next_source, next_offset)
        for (source, offset, size), (next_source, next_offset, _) in pairwise(runs)
    )


@given(cuts=st.lists(st.integers(0, SIZE), min_size=2, max_size=60), batch_count=st.integers(1, 3))
def test_contiguous_payload_shares_memory(cuts: list[int], batch_count: int, buffers: Any) -> None:
    spans = pairwise(sorted(cuts))
    frags = np.array([(begin, end - begin, 1, 1, FragKind.DMABUF) for begin, end in spans], FRAG_DTYPE)
    split = np.array_split(frags, batch_count)
    payload = gather([FragBatch(part, int(part["size"].sum()), memoryview(b""), None) for part in split], buffers)
    assert payload.tobytes() == CONTENTS[1][min(cuts) : max(cuts)].tobytes()
    assert np.shares_memory(payload, buffers[1].array()) == (payload.size > 0)
