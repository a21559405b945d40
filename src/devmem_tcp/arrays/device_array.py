"""Received bytes as an array, for NumPy and for whatever speaks DLPack, as long as they may be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from devmem_tcp.arrays import dlpack
from devmem_tcp.arrays.dtypes import ARRAY_TYPES, ArrayType, check_shape
from devmem_tcp.arrays.layout import CPU, HOST_DEVICES, Device, Order, address_of, array_at, strides_of
from devmem_tcp.arrays.lease import Lease


class DeviceArray:
    """An array over memory that is lent: a window of a Buffer, which takes the next message once it is given back.

    ``numpy()``, ``np.asarray``, ``np.from_dlpack``, ``torch.from_dlpack``, ``jax.dlpack.from_dlpack`` … make arrays of
    it without copying. What it is (``shape``, ``dtype`` …) can be asked at any time.

    Args:
        data: contiguous memoryview of format B; exactly as long as the array.
        type: of the elements; see ``array_type``.
        shape: any; ``()`` is one element.
        order: C: the last index runs fastest; F: the first.
        lease: who else must know that the bytes are looked at; None: nobody.
        readonly: make read-only arrays; of read-only ``data`` they always are.
        device: DLPack device type and number; of a type that the CPU reads.

    Raises:
        ValueError: data, shape and type do not fit each other, or the device is a GPU.

    Lifetime: every array that is made keeps ``data`` and a hold on the lease, also views of it and through other
    libraries, so its bytes stay as they are. After the lease is released no more can be made: StaleFragError.
    """

    __slots__ = ("__weakref__", "_data", "_lease", "device", "nbytes", "order", "readonly", "shape", "type")

    def __init__(
        self,
        data: memoryview,
        type: ArrayType,
        shape: Sequence[int],
        order: Order = "C",
        *,
        lease: Lease | None = None,
        readonly: bool = False,
        device: Device = CPU,
    ) -> None:
        if data.format != "B" or data.ndim != 1 or not data.c_contiguous:
            raise ValueError("data must be a contiguous memoryview of format B: memoryview.cast('B') makes one")
        if order not in ("C", "F"):
            raise ValueError(f"order is 'C' or 'F', not {order!r}")
        if device[0] not in HOST_DEVICES:
            raise ValueError(f"memory of {dlpack.device_name(device)} has no memoryview")
        self.type: Final = type
        self.shape: Final = check_shape(shape)
        self.order: Final[Order] = order
        self.nbytes: Final = type.nbytes(self.shape)
        self.readonly: Final = readonly or data.readonly
        self.device: Final = device
        self._data = data
        self._lease = lease
        if data.nbytes != self.nbytes:
            raise ValueError(f"shape {self.shape} of {type.name} takes {self.nbytes} bytes, data has {data.nbytes}")

    @property
    def dtype(self) -> str:
        """The name of the element type, for instance ``bfloat16``."""
        return self.type.name

    def bytes_view(self) -> memoryview:
        """Return the bytes as they lie in memory, shape (nbytes,), format B; the view keeps a hold.

        Raises:
            StaleFragError: the lease is released.
        """
        return self._array(_BYTES, (self.nbytes,), None).data

    def tobytes(self) -> bytes:
        """Return a copy of the bytes as they lie in memory, so in ``order``.

        Raises:
            StaleFragError: the lease is released.
        """
        return bytes(self.bytes_view())

    def numpy(self) -> npt.NDArray[Any]:
        """Return a NumPy array over the bytes; it and all its views keep a hold.

        Raises:
            StaleFragError: the lease is released.
            DevmemError: NumPy has this type by ml_dtypes only, which is missing.
        """
        array = self._array(self.type, self.shape, self._strides)
        return array if self.type.in_numpy else array.view(self.type.numpy())

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """NumPy's array interface, version 3. Its ``data`` is an object, not an address, so that it can keep a hold.

        Raises:
            AttributeError: a type that the interface has no word for; NumPy then asks ``__array__``.
            StaleFragError: the lease is released.
        """
        if not self.type.in_numpy:
            raise AttributeError(f"NumPy's array interface has no word for {self.dtype}")
        strides = self._strides
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.type.typestr,
            "strides": None if strides is None else tuple(stride * self.type.itemsize for stride in strides),
            "data": self._array(_BYTES, (self.nbytes,), None),
        }

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        array = self.numpy()
        if dtype is not None and array.dtype != np.dtype(dtype):
            if copy is False:
                raise ValueError(f"{self.dtype} cannot be had as {np.dtype(dtype)} without a copy")
            return array.astype(dtype)
        return array.copy(order="K") if copy else array

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: Device | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Export by DLPack; see ``dlpack.export`` for the arguments and errors. The consumer's tensor keeps a hold.

        Raises:
            StaleFragError: the lease is released.
        """
        return dlpack.export(
            address_of(self._data),
            self.nbytes,
            self.type,
            self.shape,
            self._strides,
            self.device,
            self.readonly,
            self._hold(),
            max_version=max_version,
            dl_device=dl_device,
            copy=copy,
            stream=stream,
        )

    def __dlpack_device__(self) -> Device:
        """Return DLPack's device type and number, (1, 0) for the CPU."""
        return self.device

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("an array without dimensions has no len()")
        return self.shape[0]

    def __repr__(self) -> str:
        state = ", released" if self._lease is not None and self._lease.released else ""
        order = "" if self.order == "C" else ", order F"
        return f"<DeviceArray {self.dtype} {self.shape}{order}, {self.nbytes} bytes{state}>"

    def _hold(self) -> object:
        """Return what keeps the bytes as they are, until it is collected; StaleFragError if it is too late for that."""
        return (self._data, self._lease.hold() if self._lease is not None else None)

    @property
    def _strides(self) -> tuple[int, ...] | None:
        """In elements; None: C order."""
        return None if self.order == "C" else strides_of(self.shape, self.order)

    def _array(self, type: ArrayType, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> npt.NDArray[Any]:
        """Return an array of ``type.typestr`` over the bytes that keeps a hold."""
        return array_at(address_of(self._data), type, shape, strides, self.readonly, self._hold())


_BYTES: Final = ARRAY_TYPES["uint8"]
