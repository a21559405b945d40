"""Arrays as they lie in memory: contiguous bytes with an order, and NumPy arrays over a bare address."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from devmem_tcp.arrays.dtypes import ArrayType

Order: TypeAlias = Literal["C", "F"]
Device: TypeAlias = tuple[int, int]

CPU: Final[Device] = (1, 0)
HOST_DEVICES: Final = frozenset({1, 3, 11, 13})
"""DLPack device types whose memory the CPU reads: kDLCPU, kDLCUDAHost, kDLROCMHost, kDLCUDAManaged (dlpack.h)."""


@dataclass(frozen=True, slots=True)
class Source:
    """An array to send: contiguous bytes, and what they mean.

    Lifetime: ``data`` and ``owner`` each keep the memory; nothing is copied, so a change of the array changes them.
    """

    type: ArrayType
    shape: tuple[int, ...]
    order: Order  #: C: the last index runs fastest; F: the first
    data: memoryview  #: format B, shape (nbytes,); read-only where the array is
    owner: object


def strides_of(shape: tuple[int, ...], order: Order) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous array."""
    if order == "F":
        return tuple(accumulate(shape[:-1], mul, initial=1))[: len(shape)]
    return strides_of(shape[::-1], "F")[::-1]


def contiguous(array: npt.NDArray[Any], type: ArrayType, owner: object, *, copy: bool) -> Source:
    """Return the Source over a NumPy array whose dtype is ``type``'s own or its typestr.

    Args:
        copy: copy what is not contiguous, in C order.

    Raises:
        ValueError: it is not contiguous, and ``copy`` is False; or it is too large.
    """
    nbytes = type.nbytes(array.shape)
    order: Order = "C"
    if not array.flags.c_contiguous:
        if array.flags.f_contiguous:
            order = "F"
        elif copy:
            array = owner = np.array(array, order="C")
        else:
            raise ValueError(
                f"an array of shape {array.shape} and strides {array.strides} (bytes) is not contiguous: "
                "give copy=True, or numpy.ascontiguousarray(it)"
            )
    data = array.reshape(-1, order=order).view(np.uint8).data
    assert data.nbytes == nbytes
    return Source(type, array.shape, order, data, owner)


class _Memory:
    """Memory that somebody owns, in the words of NumPy's array interface: the ``base`` of arrays over it."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def array_at(
    address: int,
    type: ArrayType,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    readonly: bool,
    owner: object,
) -> npt.NDArray[Any]:
    """Return a NumPy array of ``type.typestr`` over memory at an address; the memory is not touched.

    Args:
        strides: in elements; None: C order.

    Lifetime: the array, and every view of it, keeps ``owner``.
    """
    interface: dict[str, Any] = {
        "version": 3,
        "shape": shape,
        "typestr": type.typestr,
        "data": (address or type.itemsize, readonly),  # at 0, where empty arrays may be, NumPy does not take it
    }
    if strides is not None:
        interface["strides"] = tuple(stride * type.itemsize for stride in strides)
    return np.asarray(_Memory(interface, owner))


def address_of(data: memoryview) -> int:
    """Return the address of the first byte of a contiguous memoryview, writable or not; any number if it is empty."""
    if data.readonly or not data.nbytes:
        return np.frombuffer(data, np.uint8).ctypes.data
    return ctypes.addressof(ctypes.c_char.from_buffer(data))  # ten times as fast
