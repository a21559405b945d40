"""Receiving in tests: every batch is checked against what any legal NIC must do, and its bytes kept in TCP order."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from devmem_tcp.buffers import Buffer, CpuAccess
from devmem_tcp.contract import DEFAULT_MAX_BYTES, DEFAULT_MAX_FRAGS, DevmemSocket
from devmem_tcp.types import DmabufFrag, FragBatch, FragKind, LinearFrag, TokenRangeArray, U8Array
from devmem_tcp.uapi.socket import TOKEN_DTYPE


def token_ranges(*pairs: tuple[int, int]) -> TokenRangeArray:
    """Make the array that ``dontneed`` takes from (start, count) pairs."""
    return np.array(list(pairs), dtype=TOKEN_DTYPE)


class BoundMemory:
    """One bound Buffer, and which of its bytes live frags cover: no two may overlap, on whatever socket."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self._live: U8Array = np.zeros(buffer.size_bytes, np.uint8)

    def claim(self, frag: DmabufFrag) -> None:
        end = frag.offset + frag.size
        assert end <= self.buffer.size_bytes, f"{frag} ends outside the buffer of {self.buffer.size_bytes} bytes"
        assert not self._live[frag.offset : end].any(), f"{frag} overlaps a frag whose token is still out"
        self._live[frag.offset : end] = 1

    def forget(self, frag: DmabufFrag) -> None:
        self._live[frag.offset : frag.offset + frag.size] = 0

    def read(self, frag: DmabufFrag) -> bytes:
        with self.buffer.cpu_access(CpuAccess.READ) as view:
            return bytes(view[frag.offset : frag.offset + frag.size])


class LiveFrag(NamedTuple):
    """A frag whose token is out, and where its bytes are in the stream."""

    frag: DmabufFrag
    position: int


class Collector:
    """Receives on one socket as an application would, and keeps everything.

    ``data`` is what came in so far; ``live`` the frags whose tokens are out, by token; ``seen`` counts bytes by kind.
    Memory of live frags, and ``inline`` of live batches, are compared with what came when they are given back: nobody
    may have written there.
    """

    def __init__(self, sock: DevmemSocket, memories: dict[int, BoundMemory]) -> None:
        self.sock = sock
        self.data = bytearray()
        self.live: dict[int, LiveFrag] = {}
        self.seen: dict[FragKind, int] = dict.fromkeys(FragKind, 0)
        self._memories = memories
        self._batches: list[tuple[FragBatch, bytes]] = []  # with a copy of ``inline``

    def recv(self, max_bytes: int = DEFAULT_MAX_BYTES, *, max_frags: int = DEFAULT_MAX_FRAGS) -> FragBatch:
        """Receive one batch, check it, and hold it."""
        batch = self.sock.recv_frags(max_bytes, max_frags=max_frags)
        check_columns(batch)
        assert batch.nbytes <= max_bytes, f"{batch.nbytes} bytes came where {max_bytes} were asked for"
        with_cmsg = sum(kind != FragKind.HOST for kind in batch.kinds.tolist())
        assert with_cmsg <= max_frags, f"{with_cmsg} control messages came where {max_frags} had room"
        for frag in batch:
            if isinstance(frag, DmabufFrag):
                self._hold(frag)
                self.seen[FragKind.DMABUF] += frag.size
            else:
                self.data += frag.data
                self.seen[FragKind.LINEAR if isinstance(frag, LinearFrag) else FragKind.HOST] += len(frag.data)
        self._batches.append((batch, bytes(batch.inline)))
        return batch

    def _hold(self, frag: DmabufFrag) -> None:
        assert frag.token not in self.live, f"{frag} has a token that is still out"
        assert frag.dmabuf_id in self._memories, f"{frag} is of an unknown binding"
        memory = self._memories[frag.dmabuf_id]
        memory.claim(frag)
        self.live[frag.token] = LiveFrag(frag, len(self.data))
        self.data += memory.read(frag)

    def recv_exactly(
        self,
        size: int,
        *,
        hold: bool = False,
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_frags: int = DEFAULT_MAX_FRAGS,
    ) -> bytes:
        """Receive ``size`` bytes more and return them; unless ``hold``, give tokens back as they come."""
        start = len(self.data)
        while (missing := start + size - len(self.data)) > 0:
            batch = self.recv(min(max_bytes, missing), max_frags=max_frags)
            assert batch, f"stream ended {missing} bytes early"
            if not hold:
                self.release()
        return bytes(self.data[start:])

    def recv_to_end(self) -> bytes:
        """Receive until the end of stream, giving tokens back as they come; return what came."""
        start = len(self.data)
        while self.recv():
            self.release()
        return bytes(self.data[start:])

    def release(self) -> None:
        """Give back every token that is out, batch by batch, as an application would."""
        self.forget(list(self.live))
        for batch, inline in self._batches:
            assert batch.inline == inline, "inline was written over while its batch was out"
            batch.release()
        self._batches.clear()

    def dontneed(self, tokens: Iterable[int]) -> int:
        """Give back single tokens, a range each; return how many the kernel freed."""
        tokens = list(tokens)
        self.forget(tokens)
        return self.sock.dontneed(token_ranges(*((token, 1) for token in tokens)))

    def forget(self, tokens: Iterable[int]) -> None:
        """Stop watching frags that are about to go back, after a last look that nobody wrote over them."""
        for token in tokens:
            frag, position = self.live.pop(token)
            memory = self._memories[frag.dmabuf_id]
            expected = self.data[position : position + frag.size]
            assert memory.read(frag) == expected, f"{frag} was written over while its token was out"
            memory.forget(frag)

    def close(self) -> None:
        """Close the socket, which gives back every token."""
        self.forget(list(self.live))
        self._batches.clear()
        self.sock.close()

    @property
    def bytes_live(self) -> int:
        """Bytes in frags whose tokens are out."""
        return sum(live.frag.size for live in self.live.values())


def check_columns(batch: FragBatch) -> None:
    """Check what holds for the columns of every batch of a legal NIC."""
    kinds = [FragKind(kind) for kind in batch.kinds.tolist()]
    sizes: list[int] = batch.sizes.tolist()
    assert len(batch) == len(sizes)
    assert sum(sizes) == batch.nbytes, f"frags of {sum(sizes)} bytes in a batch of {batch.nbytes}"
    assert bool(batch) == (batch.nbytes > 0)
    assert all(size > 0 for size in sizes), "a frag of no bytes"
    assert len({kind is FragKind.HOST for kind in kinds}) <= 1, "ordinary and devmem data in one batch"
    check_inline(batch)
    for kind, token, dmabuf_id in zip(kinds, batch.tokens.tolist(), batch.dmabuf_ids.tolist(), strict=True):
        in_device = kind is FragKind.DMABUF
        assert (token > 0) == in_device, f"{kind.name} frag with token {token}"
        assert (dmabuf_id > 0) == in_device, f"{kind.name} frag with dmabuf_id {dmabuf_id}"


def check_inline(batch: FragBatch) -> None:
    """Check that frags in host memory are packed back to back from the start of ``inline``, and fill it."""
    inside = batch.kinds != FragKind.DMABUF
    starts: list[int] = batch.offsets[inside].tolist()
    sizes: list[int] = batch.sizes[inside].tolist()
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    assert starts[:1] in ([], [0]), f"the first frag in host memory starts at {starts[0]} of inline"
    assert all(end == start for end, (_, start) in zip(ends, pairwise(starts), strict=False)), "gaps in inline"
    assert len(batch.inline) == sum(sizes), f"inline holds {len(batch.inline)} bytes, its frags {sum(sizes)}"
