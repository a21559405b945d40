"""A window of the TX Buffer, shaped: what slots are, whoever drives the sender."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy.typing as npt

from devmem_tcp.arrays import ArrayType, DeviceArray, Lease
from devmem_tcp.transport.delivery import SlotSource, Source
from devmem_tcp.transport.outbox import Window


class Room(NamedTuple):
    """A window that was set apart for an array, and the bytes of that."""

    window: Window
    data: memoryview
    type: ArrayType
    shape: tuple[int, ...]


class ReservedArray:
    """An array in the TX Buffer, to whatever speaks DLPack or NumPy's protocols. ``with`` gives it back."""

    def __init__(self, room: Room) -> None:
        self._window = room.window
        self._lease = Lease(room.window.drop)
        self.data: Final = room.data
        self.array: Final = DeviceArray(room.data, room.type, room.shape, lease=self._lease)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> str:
        """The name of the element type."""
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def numpy(self) -> npt.NDArray[Any]:
        """Return a writable NumPy array over the slot."""
        return self.array.numpy()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.array.__array_interface__

    @property
    def window(self) -> Window | None:
        """The window, until it is given back."""
        return None if self._lease.released else self._window

    def source(self) -> Source:
        """Return what a message of this slot is sent from."""
        self._lease.check()
        return SlotSource(self._window)

    def release(self) -> None:
        """Give the window back, now or once nobody looks at it and no send reads it. Idempotent."""
        self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.release()
