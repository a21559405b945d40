"""The receive side of one socket: from TCP into pages, from pages to frags and tokens. Never waits.

Where Linux has packets in a receive queue, this has at most one *rest*: what a read brought beyond the bytes asked for,
up to the end of its page. It is handed out first, with a token of its own, as Linux does for a page read in pieces.
"""

from __future__ import annotations

import errno
import time
from typing import Final

import numpy as np

from devmem_tcp.contract import DEFAULT_MAX_BYTES
from devmem_tcp.errors import KernelError, NotZeroCopy
from devmem_tcp.sansio.tokens import Returned, TokenLedger
from devmem_tcp.software.binding import SoftwareRxBinding
from devmem_tcp.software.flow import SteeredFlow
from devmem_tcp.software.landing import Piece, Planner, give_back
from devmem_tcp.sys import calls
from devmem_tcp.types import FRAG_DTYPE, BatchOwner, FragArray, FragBatch, FragKind

_MAX_SPARE_INLINE: Final = 4
_SMALL_INLINE: Final = 64 << 10  # bytes
_NO_INLINE: Final = memoryview(b"")


class Starved(Exception):
    """There is data, and no free page on its queue."""

    def __init__(self, binding: SoftwareRxBinding, queue: int) -> None:
        super().__init__(binding, queue)
        self.binding = binding
        self.queue = queue


class InlinePool:
    """Host memory for LINEAR and HOST bytes: large pieces are reused once their batch is released. Thread-safe."""

    def __init__(self) -> None:
        self._spare: list[bytearray] = []

    def take(self, size: int) -> memoryview:
        """Return ``size`` writable bytes."""
        if _SMALL_INLINE < size <= DEFAULT_MAX_BYTES:
            try:
                whole = self._spare.pop()
            except IndexError:
                whole = bytearray(DEFAULT_MAX_BYTES)
            return memoryview(whole)[:size]
        return memoryview(bytearray(size))

    def trim(self, window: memoryview, used: int) -> memoryview:
        """Return the first ``used`` bytes; a few are copied, so that they do not hold a large piece."""
        if used > _SMALL_INLINE or len(window) <= _SMALL_INLINE:
            return window[:used]
        kept = memoryview(bytes(window[:used]))
        self.put(window)
        return kept

    def put(self, window: memoryview) -> None:
        """Take memory back."""
        whole = window.obj
        if isinstance(whole, bytearray) and len(whole) == DEFAULT_MAX_BYTES and len(self._spare) < _MAX_SPARE_INLINE:
            self._spare.append(whole)


class Inbound:
    """What one socket has received and not given back. One reading thread at a time."""

    def __init__(
        self,
        sock: calls.Socket,
        flow: SteeredFlow,
        bindings: dict[int, SoftwareRxBinding],
        planner: Planner,
        inline: InlinePool,
        *,
        strict: bool,
    ) -> None:
        self._sock = sock
        self._flow = flow
        self._by_queue = bindings
        self._by_id: dict[int, SoftwareRxBinding] = {}
        self._planner = planner
        self._inline = inline
        self._strict = strict
        self._places = planner.places
        self.rest: tuple[SoftwareRxBinding, Piece] | None = None  # read from TCP, and not handed out
        self.ledger = TokenLedger()
        self.drained_tcp = True  # the last read took all there was: the next one would better wait first
        self.bytes_by_queue: dict[int, int] = {}
        self.dmabuf_bytes = self.linear_bytes = self.host_bytes = self.frags = 0

    def receive(self, max_bytes: int, max_frags: int, owner: BatchOwner) -> FragBatch:
        """Receive what is there, at most ``max_bytes``; an empty batch is the end of stream.

        Raises:
            BlockingIOError: nothing is there.
            Starved: there is data and no page for it.
            NotZeroCopy: ordinary data on a strict socket.
        """
        if self.rest is not None:
            return self._receive_rest(max_bytes, owner)
        self.drained_tcp = True
        queue = self._flow.queue
        binding = self._by_queue.get(queue)
        if binding is None:
            return self._receive_host(max_bytes, owner)
        plan = self._planner.plan(binding, queue, max_bytes, max_frags)
        if not plan:
            return self._when_starved(binding, queue)
        if len(plan) == 1 and plan[0].kind is FragKind.DMABUF:
            return self._receive_run(binding, queue, plan[0], max_bytes, owner)
        if plan[0].kind is FragKind.HOST:
            return self._receive_host(plan[0].size, owner)
        return self._receive_planned(binding, queue, plan, max_bytes, owner)

    def _receive_run(
        self, binding: SoftwareRxBinding, queue: int, run: Piece, max_bytes: int, owner: BatchOwner
    ) -> FragBatch:
        """Receive into one run of pages: the common case, with nothing in it that could be left out."""
        _, offset, size, first_page, page_count = run
        taken = used = 0
        try:
            taken = calls.recv_into(self._sock, binding.window(offset, size), calls.MSG_DONTWAIT)
        finally:
            if taken < size:
                used = -(-taken // binding.page_size)
                if used < page_count:
                    binding.give_back(first_page + used, page_count - used)
        self.drained_tcp = taken < size
        if not 0 < taken <= min(max_bytes, binding.frag_size):
            landed = [Piece(FragKind.DMABUF, offset, taken, first_page, used or page_count)] if taken else []
            return self._landed(binding, queue, landed, taken, max_bytes, _NO_INLINE, owner)
        self._count(queue, taken)
        return self._one_frag(binding, offset, taken, first_page, used or page_count, owner)

    def _one_frag(
        self, binding: SoftwareRxBinding, offset: int, size: int, first_page: int, page_count: int, owner: BatchOwner
    ) -> FragBatch:
        """Make a batch of what landed in one place, no longer than a frag may be."""
        dmabuf_id = binding.dmabuf_id
        self._by_id[dmabuf_id] = binding
        token = self.ledger.issue_one(first_page, page_count, dmabuf_id, size, time.monotonic())
        frags: FragArray = np.empty(1, FRAG_DTYPE)
        frags[0] = (offset, size, token, dmabuf_id, FragKind.DMABUF.value)
        self.dmabuf_bytes += size
        self.frags += 1
        return FragBatch(frags, size, _NO_INLINE, owner)

    def _receive_planned(
        self, binding: SoftwareRxBinding, queue: int, plan: list[Piece], max_bytes: int, owner: BatchOwner
    ) -> FragBatch:
        linear = plan[0].size if plan[0].kind is FragKind.LINEAR else 0
        inline = self._inline.take(linear) if linear else _NO_INLINE
        windows = [inline] if linear else []
        windows += [binding.window(piece.offset, piece.size) for piece in (plan[1:] if linear else plan)]
        capacity = sum(piece.size for piece in plan)
        taken = 0
        try:
            taken = calls.recvmsg_into(self._sock, windows, calls.MSG_DONTWAIT)
        finally:
            if taken < capacity:
                plan = _shrink(binding, plan, taken)
        self.drained_tcp = taken < capacity
        return self._landed(binding, queue, plan, taken, max_bytes, inline, owner)

    def _landed(
        self,
        binding: SoftwareRxBinding,
        queue: int,
        landed: list[Piece],
        taken: int,
        max_bytes: int,
        inline: memoryview,
        owner: BatchOwner,
    ) -> FragBatch:
        """Count what a read brought, keep what is over ``max_bytes``, and hand out the rest."""
        self._count(queue, taken)
        if taken > max_bytes:
            landed = self._keep_rest(binding, landed, taken - max_bytes)
            taken = max_bytes
        return self._issue(binding, landed, taken, inline, owner)

    def _keep_rest(self, binding: SoftwareRxBinding, plan: list[Piece], excess: int) -> list[Piece]:
        """Keep the last ``excess`` bytes, which lie within one page, for the next read."""
        piece = plan[-1]
        end = piece.offset + piece.size
        page = (end - 1) // binding.page_size
        kept = Piece(FragKind.DMABUF, end - excess, excess, page, 1)
        size = piece.size - excess
        pages = -(-size // binding.page_size)
        if pages == piece.page_count:
            binding.share(page)
        self.rest = (binding, kept)
        shorter = piece._replace(size=size, page_count=pages)
        return [*plan[:-1], shorter] if size else plan[:-1]

    def _receive_rest(self, max_bytes: int, owner: BatchOwner) -> FragBatch:
        assert self.rest is not None
        binding, piece = self.rest
        self.rest = None
        if piece.size > max_bytes:
            binding.share(piece.first_page)
            self.rest = (binding, piece._replace(offset=piece.offset + max_bytes, size=piece.size - max_bytes))
            piece = piece._replace(size=max_bytes)
        _, offset, size, first_page, page_count = piece
        return self._one_frag(binding, offset, size, first_page, page_count, owner)

    def _issue(
        self, binding: SoftwareRxBinding, landed: list[Piece], nbytes: int, inline: memoryview, owner: BatchOwner
    ) -> FragBatch:
        """Make frags of what landed, with tokens."""
        linear = landed[0].size if landed and landed[0].kind is FragKind.LINEAR else 0
        frags = self._issue_tokens(binding, landed[1:] if linear else landed)
        if linear:
            head = np.zeros(1, FRAG_DTYPE)
            head["size"], head["kind"] = linear, FragKind.LINEAR
            frags = np.concatenate((head, frags))
        self.linear_bytes += linear
        self.dmabuf_bytes += nbytes - linear
        self.frags += len(frags)
        return FragBatch(frags, nbytes, inline[:linear], owner)

    def _issue_tokens(self, binding: SoftwareRxBinding, landed: list[Piece]) -> FragArray:
        dmabuf_id, now = binding.dmabuf_id, time.monotonic()
        self._by_id[dmabuf_id] = binding
        offsets, sizes, firsts, counts = _cut(landed, binding.frag_size, binding.page_size)
        frags: FragArray = np.empty(len(offsets), FRAG_DTYPE)
        frags["offset"] = offsets
        frags["size"] = sizes
        frags["token"] = self.ledger.issue(firsts, counts, dmabuf_id, sizes, now)
        frags["dmabuf_id"] = dmabuf_id
        frags["kind"] = FragKind.DMABUF
        return frags

    def _receive_host(self, max_bytes: int, owner: BatchOwner) -> FragBatch:
        window = self._inline.take(max_bytes)
        taken = 0
        try:
            taken = calls.recv_into(self._sock, window, calls.MSG_DONTWAIT)
        finally:
            if not taken:
                self._inline.put(window)
        self._count(self._flow.queue, taken)
        self.drained_tcp = taken < max_bytes
        self.host_bytes += taken
        if not taken:
            return _end_of_stream()
        inline = self._inline.trim(window, taken)
        if self._strict:
            data = bytes(inline)
            self._inline.put(inline)
            raise NotZeroCopy(
                f"{taken} bytes arrived in host memory on a strict socket (RX queue {self._flow.queue})",
                linear_bytes=0,
                host_bytes=taken,
                data=data,
                hint="steer the flow to a bound queue before it connects: nic.add_ntuple(dst_port=…, queue=…)",
            )
        self.frags += 1
        frags: FragArray = np.zeros(1, FRAG_DTYPE)
        frags["size"] = taken
        return FragBatch(frags, taken, inline, owner)

    def _when_starved(self, binding: SoftwareRxBinding, queue: int) -> FragBatch:
        """No page is free: find out whether there is data at all."""
        if self._at_end():
            return _end_of_stream()
        raise Starved(binding, queue)

    def _at_end(self) -> bool:
        """Whether the peer's stream has ended; raises BlockingIOError if it has not, and nothing is there."""
        return not calls.recv_into(self._sock, bytearray(1), calls.MSG_DONTWAIT | calls.MSG_PEEK)

    def receive_ordinary(self, target: memoryview) -> int:
        """Receive without the devmem flag.

        Raises:
            KernelError: EFAULT: the next data is, or would be, in device memory; nothing is consumed.
            BlockingIOError: nothing is there.
        """
        if self.rest is None and self._flow.queue not in self._by_queue:
            taken = calls.recv_into(self._sock, target, calls.MSG_DONTWAIT)
            self._count(self._flow.queue, taken)
            self.host_bytes += taken
            return taken
        if self.rest is None and self._at_end():
            return 0
        raise KernelError(errno.EFAULT, "recvmsg", hint="the next data is in device memory: take it with recv_frags()")

    def lands_in(self, queue: int) -> SoftwareRxBinding | None:
        """Return the binding in which the next payload, if it comes over ``queue``, can be placed."""
        if self.rest is not None or not self._places:
            return None
        return self._by_queue.get(queue)

    def receive_placed(self, window: memoryview) -> int:
        """Receive what is there into a place; ``placed`` is to count it. Raises BlockingIOError: nothing is there."""
        return calls.recv_into(self._sock, window, calls.MSG_DONTWAIT)

    def placed(self, queue: int, taken: int) -> None:
        """Count what was received into a place."""
        if taken:
            self.bytes_by_queue[queue] = self.bytes_by_queue.get(queue, 0) + taken
            self.dmabuf_bytes += taken
            self.frags += 1

    def discard(self, max_bytes: int) -> int:
        """Drop what is there, at most ``max_bytes``."""
        if self.rest is not None:
            binding, piece = self.rest
            dropped = min(piece.size, max_bytes)
            if dropped == piece.size:
                self.rest = None
                give_back(binding, piece)
            else:
                left = piece._replace(offset=piece.offset + dropped, size=piece.size - dropped)
                self.rest = (binding, left)
            return dropped
        window = self._inline.take(min(max_bytes, DEFAULT_MAX_BYTES))
        try:
            dropped = calls.recv_into(self._sock, window, calls.MSG_DONTWAIT | calls.MSG_TRUNC)
        finally:
            self._inline.put(window)
        self._count(self._flow.queue, dropped)
        return dropped

    def _count(self, queue: int, taken: int) -> None:
        self.bytes_by_queue[queue] = self.bytes_by_queue.get(queue, 0) + taken

    def give_back_pages(self, returned: Returned) -> int:
        """Give the pages of returned tokens back to their bindings; answers how many tokens there were."""
        firsts, counts, dmabuf_ids = returned
        if len(firsts):
            for dmabuf_id in [int(dmabuf_ids[0])] if (dmabuf_ids == dmabuf_ids[0]).all() else set(dmabuf_ids.tolist()):
                mine = dmabuf_ids == dmabuf_id
                self._by_id[dmabuf_id].give_back_many(firsts[mine], counts[mine])
        return len(firsts)

    def give_back_one(self, token: int) -> int:
        """Return one token; answers how many were out: 1 or 0."""
        taken = self.ledger.take_one(token)
        if taken is None:
            return 0
        first_page, page_count, dmabuf_id = taken
        self._by_id[dmabuf_id].give_back(first_page, page_count)
        return 1

    def recycle(self, batch: FragBatch) -> None:
        """Reuse the host memory of a batch that is being released."""
        self._inline.put(batch.inline)

    def close(self) -> None:
        """Give back everything."""
        self.give_back_pages(self.ledger.take_all())
        if self.rest is not None:
            binding, piece = self.rest
            self.rest = None
            give_back(binding, piece)


def _end_of_stream() -> FragBatch:
    return FragBatch(np.empty(0, FRAG_DTYPE), 0, _NO_INLINE, None)


def _shrink(binding: SoftwareRxBinding, plan: list[Piece], taken: int) -> list[Piece]:
    """Give back what of a plan nothing landed in, and return the rest of it."""
    landed: list[Piece] = []
    for piece in plan:
        if taken >= piece.size:
            landed.append(piece)
        elif not taken:
            give_back(binding, piece)
        elif piece.kind is FragKind.LINEAR:
            landed.append(piece._replace(size=taken))
        else:
            pages = -(-(piece.offset % binding.page_size + taken) // binding.page_size)
            if pages < piece.page_count:
                binding.give_back(piece.first_page + pages, piece.page_count - pages)
            landed.append(piece._replace(size=taken, page_count=pages))
        taken -= min(taken, piece.size)
    return landed


def _cut(landed: list[Piece], frag_size: int, page_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut pieces into frags of at most ``frag_size`` bytes: columns of offsets, sizes, first pages and page counts."""
    table = np.array([piece[1:] for piece in landed], np.int64).reshape(-1, 4)
    offsets, sizes, firsts, counts = table.T
    if (sizes <= frag_size).all():
        return offsets, sizes, firsts, counts
    pages_each = frag_size // page_size
    shares = -(-sizes // frag_size)  # frags of each piece; pieces longer than one frag begin at a page
    ends = np.cumsum(shares)
    index = np.arange(int(ends[-1])) - np.repeat(ends - shares, shares)
    done = index * frag_size
    return (
        np.repeat(offsets, shares) + done,
        np.minimum(np.repeat(sizes, shares) - done, frag_size),
        np.repeat(firsts, shares) + index * pages_each,
        np.minimum(np.repeat(counts, shares) - index * pages_each, pages_each),
    )
