"""A Buffer over one memory map: views, NumPy, DLPack and closing, the same for every kind of memory."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from devmem_tcp.buffers import Buffer, CpuAccess
from devmem_tcp.errors import BusyError, ClosedError, LeakWarning
from devmem_tcp.sys import calls


class MappedBuffer(Buffer):
    """A Buffer whose bytes the CPU sees through one memory map, and which may own an fd.

    Lifetime: views (``view()``, ``array()``, DLPack tensors and whatever was made of them) keep the map alive.
    ``close()`` while there are any raises BusyError and changes nothing; leaving a ``with`` block by an exception does
    not, so that the exception is seen: the buffer closes, and its memory goes with the last view.
    """

    _closed = True  # until __init__ is through: __del__ also meets an object that was never finished

    def __init__(self, size_bytes: int, kind: str, *, mapping: calls.MemoryMap | None, fd: int | None) -> None:
        super().__init__(size_bytes)
        self._kind = kind
        self._mapping = mapping
        self._fd = fd
        self._retired = False
        self._closed = False

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def closed(self) -> bool:
        return self._closed

    def view(self) -> memoryview:
        return memoryview(self._memory())[: self.size_bytes]

    @contextlib.contextmanager
    def cpu_access(self, mode: CpuAccess = CpuAccess.READ_WRITE) -> Iterator[memoryview]:
        """Yield ``view()``. The view ends with the block; arrays made of it live on, but are not bracketed then."""
        view = self.view()
        try:
            yield view
        finally:
            with contextlib.suppress(BufferError):  # arrays of it are alive
                view.release()

    def array(self, dtype: npt.DTypeLike = np.uint8, *, offset: int = 0, count: int = -1) -> npt.NDArray[Any]:
        wanted = np.dtype(dtype)
        if wanted.hasobject or wanted.itemsize == 0:
            raise ValueError(f"dtype {wanted} has no fixed size in memory")
        if count < -1:
            raise ValueError(f"count must be -1 (to the end) or not negative, got {count}")
        rest = self.size_bytes - offset
        if not 0 <= rest <= self.size_bytes:
            raise ValueError(f"offset {offset} is outside the buffer of {self.size_bytes} bytes")
        if count == -1:
            count, tail = divmod(rest, wanted.itemsize)
            if tail:
                raise ValueError(f"{rest} bytes from offset {offset} on are no whole number of {wanted}; give a count")
        end = offset + count * wanted.itemsize
        if end > self.size_bytes:
            raise ValueError(
                f"{count} of {wanted} from offset {offset} on end at byte {end}, the buffer at {self.size_bytes}"
            )
        # frombuffer holds an export of the map, so that close() knows; ndarray(buffer=) would not.
        return np.frombuffer(self._memory(), np.uint8)[offset:end].view(wanted)

    def __dlpack__(self, **options: Any) -> Any:
        """Export all bytes as a DLPack capsule of uint8; ``options`` are those of ``numpy.ndarray.__dlpack__``."""
        return self.array().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array().__dlpack_device__()

    def close(self) -> None:
        """Unmap the memory and give it back. Idempotent.

        Raises:
            BusyError: a binding holds the buffer, or views of it are alive. It stays usable.
        """
        if self._closed:
            return
        self.check_unused()
        if self._mapping is not None:
            try:
                calls.unmap(self._mapping)
            except BufferError:
                raise BusyError(
                    f"{self.kind} buffer of {self.size_bytes} bytes is being looked at: memoryviews, NumPy arrays or "
                    "DLPack tensors of it are alive",
                    hint="drop them first (`del array`, or leave the function they are in), or copy what you need; "
                    "then close() again",
                ) from None
        self._let_go()

    def retire(self) -> None:
        if not self._closed:
            self._retired = True
            if not self.holders:
                self._let_go()

    def _unused(self) -> None:
        if self._retired and not self._closed:
            self._let_go()

    def _let_go(self) -> None:
        """Close, leaving the memory to the views that are alive: it is unmapped with the last of them."""
        self._closed = True
        self._mapping = None
        fd, self._fd = self._fd, None
        if fd is not None:
            calls.close_fd(fd)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if value is None:
            self.close()
        elif self.holders:
            value.add_note(f"{self!r} was left open: in use by {', '.join(self.holders)}")
        elif not self._closed:
            self._let_go()  # the traceback itself may hold views; a BusyError here would hide the exception

    def __del__(self, _finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._closed or _finalizing():  # at exit the kernel takes everything back, and modules are half gone
            return
        text = repr(self)
        self._let_go()
        warnings.warn(f"{text} was never closed", LeakWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<{type(self).__name__} {self.kind}, {self.size_bytes} bytes, {state}>"

    def _memory(self) -> calls.MemoryMap:
        self._check_open()
        assert self._mapping is not None  # open and mapped from the start, unless a subclass maps later
        return self._mapping

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.kind} buffer is closed", hint="allocate() a new one")
