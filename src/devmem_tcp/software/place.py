"""A contiguous run of a bound Buffer that a program receives into.

``close()`` may be called while other threads receive, and by the garbage collector in the midst of anything, so nothing
here takes a lock. Who starts to receive says so first and looks second whether the place is closed; who closes it says
so first and looks second whether somebody receives: one of the two sees the other, and the last gives the pages back.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

from devmem_tcp import contract
from devmem_tcp.errors import ClosedError, LeakWarning


class SoftwarePlace(contract.Place):
    """See ``contract.Place``. Made by ``SoftwareRxBinding.reserve``.

    Args:
        memory: all bytes of the place.
        give_back: gives the pages back; called once.
    """

    _closed = True  # until __init__ is through: __del__ also meets an object that was never finished

    def __init__(
        self, binding: contract.RxBinding, offset: int, memory: memoryview, give_back: Callable[[], None]
    ) -> None:
        self._binding = binding
        self._offset = offset
        self._size = len(memory)
        self._memory = memory
        self._receiving: list[None] = []  # one for each receive that is under way
        self._give_back = [give_back]  # taken out by who calls it
        self._closed = False

    @property
    def binding(self) -> contract.RxBinding:
        return self._binding

    @property
    def offset(self) -> int:
        return self._offset

    @property
    def size_bytes(self) -> int:
        return self._size

    @property
    def closed(self) -> bool:
        return self._closed

    def view(self) -> memoryview:
        window = self.start(0, self._size)
        try:
            return window[:]
        finally:
            self.end()

    def start(self, at: int, size: int) -> memoryview:
        """Return ``size`` bytes from ``at`` on to receive into; ``end`` is to follow.

        Raises:
            ValueError: no such bytes.
            ClosedError: the place is closed.
        """
        if size <= 0:
            raise ValueError(f"max_bytes must be positive, got {size}")
        if not 0 <= at <= self._size - size:
            raise ValueError(f"{size} bytes at byte {at} do not fit a place of {self._size} bytes")
        self._receiving.append(None)
        if self._closed:
            self.end()
            raise ClosedError(f"{self!r} is closed", hint="reserve() another")
        return self._memory if size == self._size else self._memory[at : at + size]

    def end(self) -> None:
        """Say that what ``start`` returned is not written any more."""
        self._receiving.pop()
        if self._closed:
            self._settle()

    def close(self) -> None:
        self._closed = True
        self._settle()

    def _settle(self) -> None:
        """Give the pages back, unless somebody still receives into them, or it is done."""
        if self._receiving:
            return
        try:
            give_back = self._give_back.pop()
        except IndexError:
            return
        self._memory.release()
        give_back()

    def __del__(self, _finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._closed or _finalizing():  # at exit the memory goes with the process, and modules are half gone
            return
        text = repr(self)
        self.close()
        warnings.warn(f"{text} was dropped without close()", LeakWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Place {state}, {self._size} bytes at {self._offset} of RX binding {self._binding.dmabuf_id}>"
