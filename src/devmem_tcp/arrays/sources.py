"""What users hand in to be sent: arrays of any library, as contiguous bytes with a type, a shape and an order."""

from __future__ import annotations

from typing import Any

import numpy as np

from devmem_tcp.arrays import dlpack
from devmem_tcp.arrays.device_array import DeviceArray
from devmem_tcp.arrays.dtypes import array_type
from devmem_tcp.arrays.layout import Source, contiguous


def source(obj: Any, *, copy: bool = False) -> Source:
    """Return an array's bytes, without copying them.

    The first that fits: a NumPy array or scalar; a DeviceArray; ``__dlpack__`` (PyTorch, JAX, CuPy …) of memory that
    the CPU reads; ``__array_interface__``; the buffer protocol (bytes, bytearray, memoryview, array.array, mmap …),
    where bytes are an array of uint8.

    Args:
        obj: the array; of any shape, read-only or not, in C or in Fortran order, which is kept.
        copy: make a copy, in C order, of an array that is not contiguous. A contiguous one is never copied.

    Raises:
        ValueError: not contiguous and no ``copy``; in a GPU's memory; masked; of a dtype that does not travel (big
            endian, objects, text, records …); 2**48 bytes and more; or refused by its own library.
        TypeError: not an array.
        StaleFragError: a DeviceArray whose message was released.

    Lifetime: the Source keeps what it was made of.
    """
    if isinstance(obj, np.ndarray | np.generic):
        return _of_numpy(obj, obj, copy)
    if isinstance(obj, str | type):  # np.float32 itself has all that its scalars have
        raise TypeError(_refusal(obj))
    if isinstance(obj, DeviceArray):
        return Source(obj.type, obj.shape, obj.order, obj.bytes_view(), obj)
    if hasattr(obj, "__dlpack__") and hasattr(obj, "__dlpack_device__"):
        return dlpack.read(obj, copy=copy)
    if hasattr(obj, "__array_interface__"):
        return _of_numpy(obj, obj, copy)
    try:
        view = memoryview(obj)
    except TypeError:
        raise TypeError(_refusal(obj)) from None
    return _of_numpy(view, obj, copy)


def _of_numpy(obj: Any, owner: object, copy: bool) -> Source:
    if isinstance(obj, np.ma.MaskedArray):
        raise ValueError("a masked array would lose its mask: send .filled(), or .data and .mask one by one")
    array = np.asarray(obj)
    return contiguous(array, array_type(array.dtype), owner, copy=copy)


def _refusal(obj: object) -> str:
    if isinstance(obj, str):
        return "text is no array: send numpy.frombuffer(text.encode(), 'uint8'), or use the metadata"
    return (
        f"{type(obj).__qualname__} is no array: numpy.asarray(it) makes one, with the dtype you name; arrays of NumPy, "
        "PyTorch, JAX and CuPy are taken as they are, and all that have __dlpack__, __array_interface__ or a buffer"
    )
