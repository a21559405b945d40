"""The bound RX Buffer, and each session's share of it: how much a sender is granted, and where a message can lie."""

from __future__ import annotations

from typing import Final

import numpy as np

from devmem_tcp.buffers import Buffer
from devmem_tcp.contract import Place, RxBinding
from devmem_tcp.errors import OutOfDeviceMemory
from devmem_tcp.types import PAGE_SIZE

_MAX_MESSAGES: Final = 1024  # that a session may hold
_PAGES_A_MESSAGE: Final = 8  # a message for so many pages of a share, at least
_LEAST_PAGES: Final = 16
_SPARE_PAGES: Final = 4
_MAX_SPARE: Final = 4  # places
_FRAG_CREDIT: Final = 4  # bytes of pages for one of payload: at an MTU of 1500 a page holds a third of itself


class SparePlaces:
    """Places that no message lies in, kept for the next one of their size, whoever sends it: what was used last is the
    likeliest to be in the CPU's cache. Messages and spare places together take half of the pages, or there are none.

    Args:
        pages: that the NIC has for the binding.
    """

    def __init__(self, binding: RxBinding, pages: int) -> None:
        self._binding = binding
        self._page_limit = pages // 2
        self._places: list[Place] = []  # the one used last at the end
        self._pages_spare = 0
        self._pages_held = 0

    def take(self, nbytes: int) -> Place | None:
        """Return a place for a message, on whichever queue has room; None: there is none now."""
        place = self._find(nbytes)
        if place is not None:
            self.hold_pages(whole_pages(nbytes))
        return place

    def _find(self, nbytes: int) -> Place | None:
        for index in range(len(self._places) - 1, -1, -1):
            if self._places[index].size_bytes == nbytes:
                return self._remove(index)
        place = self._reserve(nbytes)
        if place is None and self._places:
            self.drop()
            place = self._reserve(nbytes)
        return place

    def _reserve(self, nbytes: int) -> Place | None:
        if not self._binding.closed:
            for queue in self._binding.queues:
                place = self._binding.reserve(queue, nbytes)
                if place is not None:
                    return place
        return None

    def put(self, place: Place) -> None:
        """Take a place back, and give it to the NIC if there are too many."""
        pages = whole_pages(place.size_bytes)
        self._places.append(place)
        self._pages_spare += pages
        if len(self._places) > _MAX_SPARE:
            self._remove(0).close()
        self.hold_pages(-pages)

    def _remove(self, index: int) -> Place:
        place = self._places.pop(index)
        self._pages_spare -= whole_pages(place.size_bytes)
        return place

    def hold_pages(self, pages: int) -> None:
        """Count pages that messages of any session hold, or no longer do."""
        self._pages_held += pages
        if self._pages_held + self._pages_spare > self._page_limit:
            self.drop()

    def drop(self) -> None:
        """Give all of them to the NIC."""
        while self._places:
            self._remove(-1).close()


class Share:
    """One session's part of a bound Buffer.

    With placement, messages lie in whole pages: what is granted is the share but for a page a message. Without, payload
    lies in pages as packets fill them, and a quarter is granted. Either way a part is never set apart, and messages in
    frags are moved to host memory rather than use that up: else those that are half here could hold all pages, and none
    of them be finished.

    Args:
        binding: of the Buffer to the queues that data connections are steered to.
        spare: of that binding.
        size_bytes: of the share.
        pages: that the NIC has for it, which may be fewer than fit.
        placement: whether the backend places payload (``Capabilities.placement``).

    Raises:
        OutOfDeviceMemory: it is too small to receive anything.
    """

    def __init__(self, binding: RxBinding, spare: SparePlaces, size_bytes: int, pages: int, *, placement: bool) -> None:
        pages = min(pages, size_bytes // PAGE_SIZE)
        if pages < _LEAST_PAGES:
            raise OutOfDeviceMemory(
                f"a share of {size_bytes} bytes for each peer is too small",
                wanted=_LEAST_PAGES * PAGE_SIZE,
                free=size_bytes,
                hint="open the receiver with a larger size=, or fewer max_peers=",
            )
        self.buffer: Final[Buffer] = binding.buffer
        self.credit_messages: Final = min(_MAX_MESSAGES, pages // _PAGES_A_MESSAGE)
        self._page_limit = pages - max(_SPARE_PAGES, pages // 8) if placement else pages // 2
        rest = self._page_limit - self.credit_messages if placement else pages
        self.credit_bytes: Final = (rest if placement else max(1, rest // _FRAG_CREDIT)) * PAGE_SIZE
        self.placement: Final = placement
        self._spare = spare
        self._pages_held = 0

    def take(self, nbytes: int) -> Place | None:
        """Return a place for a message, whose pages count as held from now on; None: there is none now."""
        pages = whole_pages(nbytes)
        if not self.placement or self._pages_held + pages > self._page_limit:
            return None
        place = self._spare.take(nbytes)
        if place is not None:
            self._pages_held += pages
        return place

    def put(self, place: Place) -> None:
        """Take a place back."""
        self._pages_held -= whole_pages(place.size_bytes)
        self._spare.put(place)

    def drop_spare(self) -> None:
        """Give places that wait for a message back to the NIC."""
        self._spare.drop()

    def hold_pages(self, pages: int) -> bool:
        """Count pages that frags hold, or no longer do; False: it is more than there should be."""
        self._pages_held += pages
        self._spare.hold_pages(pages)
        return self._pages_held <= self._page_limit


def whole_pages(size_bytes: int) -> int:
    """Return how many pages so many bytes of one message take."""
    return -(-size_bytes // PAGE_SIZE)


def host_memory(nbytes: int) -> memoryview:
    """Return ``nbytes`` of host memory, format B, for what does not fit the bound Buffer.

    Raises:
        OutOfDeviceMemory: there is not so much.
    """
    try:
        return np.empty(nbytes, np.uint8).data
    except MemoryError:
        raise OutOfDeviceMemory(f"no {nbytes} bytes of host memory for a message", wanted=nbytes, free=0) from None
