"""Host memory of ordinary data: a few bytes do not hold a large piece, and large pieces are used again."""

from __future__ import annotations

import tracemalloc

from devmem_tcp.contract import DEFAULT_MAX_BYTES
from devmem_tcp.software.inbound import InlinePool


def test_a_few_bytes_hold_a_few_bytes() -> None:
    pool = InlinePool()
    tracemalloc.start()
    held = []
    for index in range(100):
        window = pool.take(DEFAULT_MAX_BYTES)
        window[:3] = bytes([index, 1, 2])
        held.append(pool.trim(window, 3))
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert memory < 2 * DEFAULT_MAX_BYTES
    assert [bytes(piece) for piece in held] == [bytes([index, 1, 2]) for index in range(100)]


def test_a_large_piece_is_kept_as_it_is_and_used_again() -> None:
    pool = InlinePool()
    window = pool.take(DEFAULT_MAX_BYTES)
    kept = pool.trim(window, DEFAULT_MAX_BYTES - 1)
    assert kept.obj is window.obj
    assert pool.take(DEFAULT_MAX_BYTES).obj is not window.obj
    pool.put(kept)
    assert pool.take(DEFAULT_MAX_BYTES).obj is window.obj


def test_larger_than_usual_is_made_to_size() -> None:
    pool = InlinePool()
    window = pool.take(3 * DEFAULT_MAX_BYTES)
    assert len(window) == 3 * DEFAULT_MAX_BYTES
    pool.put(window)
    assert len(pool.take(100)) == 100
