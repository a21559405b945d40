"""Element types: one name on the wire for what NumPy, ml_dtypes, PyTorch, DLPack and safetensors each call its own."""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec
import numpy as np

from devmem_tcp.errors import DevmemError

MAX_RANK: Final = 32  # dimensions; the wire's limit, and NumPy 1's
MAX_BYTES: Final = 1 << 48  # of one array


class ArrayType(msgspec.Struct, frozen=True):
    """A type of array elements: of fixed size, in the byte order of this machine (little endian on the wire).

    ``name`` is the wire's word, and NumPy's or ml_dtypes' name. ``itemsize`` is in bytes. ``dlpack`` is DLDataType's
    code and bits (dlpack.h, DLDataTypeCode). ``safetensors`` is its name in a safetensors header, or empty: that format
    has no such type.
    """

    name: str
    itemsize: int
    dlpack: tuple[int, int]
    safetensors: str

    @property
    def in_numpy(self) -> bool:
        """Whether NumPy has this type itself; the others come from the package ml_dtypes."""
        return self.name not in _FROM_ML_DTYPES

    @property
    def typestr(self) -> str:
        """NumPy's typestr of what carries the bits: its own type, or where it has none, unsigned integers as large."""
        return _TYPESTRS[self.name]

    def numpy(self) -> np.dtype[Any]:
        """Return the NumPy dtype of these elements.

        Raises:
            DevmemError: it comes from ml_dtypes, which is not installed, or is too old to have it.
        """
        if self.in_numpy:
            return np.dtype(self.name)
        try:
            found: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), self.name))
        except (ImportError, AttributeError) as error:
            raise DevmemError(
                f"NumPy has {self.name} by the package ml_dtypes only, and here: {error}",
                hint="pip install -U ml-dtypes (or 'devmem-tcp[arrays]'); DLPack needs neither: torch.from_dlpack()",
            ) from error
        return found

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the size in bytes of an array of this shape.

        Raises:
            TypeError: the shape is not a sequence of integers.
            ValueError: a negative dimension, over 32 dimensions, or 2**48 bytes and more. An array with a dimension of
                0 is judged by its other dimensions, as NumPy does.
        """
        dimensions = check_shape(shape)
        nbytes = self.itemsize * math.prod(dimensions)
        if (nbytes or self.itemsize * math.prod(filter(None, dimensions))) >= MAX_BYTES:
            raise ValueError(f"shape {dimensions} of {self.name}: the limit is 2**48 - 1 bytes")
        return nbytes


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape as a tuple of int; raises TypeError or ValueError where it is none."""
    try:
        dimensions = tuple(map(operator.index, shape))
    except TypeError:
        raise TypeError(f"a shape is a sequence of integers, not {shape!r}") from None
    if len(dimensions) > MAX_RANK:
        raise ValueError(f"{len(dimensions)} dimensions: the limit is {MAX_RANK}")
    if dimensions and min(dimensions) < 0:
        raise ValueError(f"shape {dimensions} has a negative dimension")
    return dimensions


# Codes: dlpack.h, DLDataTypeCode. Names in safetensors: its enum Dtype.
_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6

_NUMPYS: Final = (
    ArrayType("bool", 1, (_BOOL, 8), "BOOL"),
    ArrayType("int8", 1, (_INT, 8), "I8"),
    ArrayType("int16", 2, (_INT, 16), "I16"),
    ArrayType("int32", 4, (_INT, 32), "I32"),
    ArrayType("int64", 8, (_INT, 64), "I64"),
    ArrayType("uint8", 1, (_UINT, 8), "U8"),
    ArrayType("uint16", 2, (_UINT, 16), "U16"),
    ArrayType("uint32", 4, (_UINT, 32), "U32"),
    ArrayType("uint64", 8, (_UINT, 64), "U64"),
    ArrayType("float16", 2, (_FLOAT, 16), "F16"),
    ArrayType("float32", 4, (_FLOAT, 32), "F32"),
    ArrayType("float64", 8, (_FLOAT, 64), "F64"),
    ArrayType("complex64", 8, (_COMPLEX, 64), "C64"),
    ArrayType("complex128", 16, (_COMPLEX, 128), ""),
)
_ML_DTYPES: Final = (
    ArrayType("bfloat16", 2, (_BFLOAT, 16), "BF16"),
    ArrayType("float8_e4m3fn", 1, (10, 8), "F8_E4M3"),
    ArrayType("float8_e4m3fnuz", 1, (11, 8), "F8_E4M3FNUZ"),
    ArrayType("float8_e5m2", 1, (12, 8), "F8_E5M2"),
    ArrayType("float8_e5m2fnuz", 1, (13, 8), "F8_E5M2FNUZ"),
    ArrayType("float8_e8m0fnu", 1, (14, 8), "F8_E8M0"),
)
_FROM_ML_DTYPES: Final = frozenset(type_.name for type_ in _ML_DTYPES)

ARRAY_TYPES: Final[Mapping[str, ArrayType]] = MappingProxyType({each.name: each for each in (*_NUMPYS, *_ML_DTYPES)})
"""Every type there is, by its name: what a word from the wire is looked up in."""

_TYPESTRS: Final = {
    each.name: np.dtype(each.name if each.in_numpy else f"uint{8 * each.itemsize}").str for each in ARRAY_TYPES.values()
}
_BY_DLPACK: Final = {each.dlpack: each for each in ARRAY_TYPES.values()}


def array_type(what: object) -> ArrayType:
    """Find the element type that is meant.

    Args:
        what: a name (``"bfloat16"``), an np.dtype or whatever np.dtype takes (``np.float32``, ``"<f4"``, ``float``), an
            ml_dtypes type, a torch.dtype, or an ArrayType.

    Raises:
        ValueError: a type that does not travel (big endian, objects, text, records, times …) or an unknown name.
        TypeError: not a type at all.
    """
    if isinstance(what, ArrayType):
        return what
    if isinstance(what, str) and what in ARRAY_TYPES:
        return ARRAY_TYPES[what]
    if isinstance(what, np.dtype):
        return _of_numpy(what)
    if _is_torch_dtype(what):
        return _by_name(str(what).removeprefix("torch."), what)
    try:
        if what is None:  # which NumPy takes for float64
            raise TypeError("None names no type")
        dtype: np.dtype[Any] = np.dtype(what)  # type: ignore[call-overload]  # any object: NumPy judges
    except (TypeError, ValueError, SyntaxError) as error:  # SyntaxError: "(1," is read as a Python literal
        kind = ValueError if isinstance(what, str) else TypeError
        raise kind(f"{what!r} is not a dtype; {_supported()}") from error
    return _of_numpy(dtype)


def of_dlpack(code: int, bits: int, lanes: int) -> ArrayType:
    """Find the type of a DLPack tensor's elements (dlpack.h, DLDataType); ValueError where it does not travel."""
    found = _BY_DLPACK.get((code, bits)) if lanes == 1 else None
    if found is None:
        raise ValueError(f"DLPack type of code {code}, {bits} bits, {lanes} lanes does not travel; {_supported()}")
    return found


def _is_torch_dtype(what: object) -> bool:
    return type(what).__module__ == "torch" and type(what).__name__ == "dtype"


@functools.lru_cache  # NumPy makes up the name of a dtype anew each time, in Python
def _of_numpy(dtype: np.dtype[Any]) -> ArrayType:
    if dtype.hasobject:
        raise ValueError(f"dtype {dtype} holds Python objects, which are addresses in this process: they cannot travel")
    if dtype.names is not None or dtype.subdtype is not None:
        raise ValueError(f"dtype {dtype} is a record: send its fields one by one, or .view('uint8')")
    if dtype.kind in "SU":
        raise ValueError(f"dtype {dtype} is text: send numpy.frombuffer(text.encode(), 'uint8'), or use the metadata")
    if dtype.kind in "mM":
        raise ValueError(f"dtype {dtype} is a time: send .view('int64'), and its unit in the metadata")
    if not dtype.isnative:
        raise ValueError(f"dtype {dtype} has the other byte order: .astype({dtype.newbyteorder('=').name!r}) first")
    return _by_name(dtype.name, dtype)


def _by_name(name: str, what: object) -> ArrayType:
    found = ARRAY_TYPES.get(name)
    if found is None:
        raise ValueError(f"dtype {what} does not travel; {_supported()}")
    return found


def _supported() -> str:
    return f"supported: {', '.join(ARRAY_TYPES)}"
