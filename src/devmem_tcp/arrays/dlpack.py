"""DLPack both ways: capsules over any memory, and tensors of others as bytes.

Source: dlpack.h, and the array API standard's ``__dlpack__`` (stream, max_version, dl_device, copy).

A capsule's destructor and a tensor's deleter are called by strangers: with an exception under way (a ``from_dlpack``
that refuses a dtype drops the capsule), without the interpreter's lock, after the interpreter has ended. Python code
cannot run in all of these, so none does: NumPy makes the capsule, over integers of the right size, with its own
destructor and deleter in C; what NumPy has no words for, the element type and the device, is then written into the
struct, whose layout is ABI.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from devmem_tcp.arrays.dtypes import MAX_RANK, ArrayType, check_shape, of_dlpack
from devmem_tcp.arrays.layout import CPU, HOST_DEVICES, Device, Source, array_at, contiguous
from devmem_tcp.errors import DevmemError

VERSION: Final = (1, 1)  # the newest that is understood here; 1.1 brought the float8 types
_READ_ONLY: Final = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
_NUMPY_HAS_VERSIONS: Final = np.lib.NumpyVersion(np.__version__) >= "2.1.0"

_DEVICE_NAMES: Final = {1: "cpu", 2: "cuda", 3: "cuda_host", 4: "opencl", 7: "vulkan", 8: "metal", 10: "rocm"} | {
    11: "rocm_host", 13: "cuda_managed", 14: "oneapi", 15: "webgpu", 16: "hexagon", 17: "maia", 18: "trainium"
}  # fmt: skip


class _DLDevice(ctypes.Structure):
    _fields_: ClassVar = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DLDataType(ctypes.Structure):
    _fields_: ClassVar = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; NULL: C order
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("dl_tensor", _DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]
    name: ClassVar = b"dltensor"
    used_name: ClassVar = b"used_dltensor"  # capsules keep the address of their name


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_: ClassVar = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", _DLTensor),
    ]
    name: ClassVar = b"dltensor_versioned"
    used_name: ClassVar = b"used_dltensor_versioned"


_Managed = _DLManagedTensor | _DLManagedTensorVersioned

# Prototypes of our own: those of ctypes.pythonapi belong to every library of the process.
_capsule_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule_set_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_SetName", ctypes.pythonapi)
)
_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # called without the interpreter's lock, as dlpack.h allows


def device_name(device: Device) -> str:
    """Return what people call a DLPack device, for instance ``cuda:0``."""
    kind, number = device
    return f"{_DEVICE_NAMES.get(kind, f'device type {kind}')}:{number}"


def export(
    address: int,
    nbytes: int,
    type: ArrayType,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    device: Device,
    readonly: bool,
    owner: object,
    *,
    max_version: tuple[int, int] | None = None,
    dl_device: Device | None = None,
    copy: bool | None = None,
    stream: int | None = None,
) -> Any:
    """Return a DLPack capsule over memory: versioned if ``max_version`` is (1, 0) or more, else the old kind.

    Args:
        address, nbytes: the memory. It is not touched, unless ``copy`` is True.
        strides: in elements, not negative; None: C order.
        device: DLPack device type and number.
        dl_device: where the consumer wants it: ``device``, or the CPU if that can read the memory.
        copy: True: of a copy, in host memory. None and False are the same: nothing else needs one.
        stream: None for memory that the CPU reads. For a GPU's any: whoever calls has finished writing.

    Raises:
        ValueError: the shape does not fit the memory, or a CUDA stream was given for host memory.
        BufferError: read-only memory for a consumer that cannot be told (before DLPack 1.0, NumPy before 2.1); or
            another device was asked for, or a copy of memory that the CPU cannot read.

    Lifetime: ``owner`` is kept until the capsule is dropped, or the consumer has called the deleter; from any thread.
    """
    on_host = device[0] in HOST_DEVICES
    if stream is not None and on_host:
        raise ValueError(f"{device_name(device)} memory has no streams: stream must be None, not {stream!r}")
    if copy and not on_host:
        raise BufferError(f"the CPU cannot copy memory of {device_name(device)}")
    wanted = _wanted_device(CPU if copy else device, dl_device)
    _check_extent(nbytes, type, shape, strides)
    capsule = _by_numpy(array_at(address, type, shape, strides, readonly, owner), max_version, bool(copy))
    if wanted != CPU or not type.in_numpy:
        tensor = _managed(capsule).dl_tensor
        tensor.dtype.code, tensor.dtype.bits = type.dlpack
        tensor.device.device_type, tensor.device.device_id = wanted
    return capsule


def read(obj: Any, *, copy: bool = False) -> Source:
    """Take the tensor that an object exports by ``__dlpack__``, if the CPU can read it.

    Args:
        copy: copy what is not contiguous.

    Returns:
        A Source that is read-only if the tensor is, or if it comes by DLPack before 1.0, which cannot tell.

    Raises:
        ValueError: it is in a GPU's memory, of a type that does not travel, not contiguous, too large; or the object
            refuses to export it, for instance a PyTorch tensor that requires grad.

    Lifetime: the Source keeps the tensor; its deleter is called when the Source and all made of it are gone.
    """
    _check_host(obj, obj.__dlpack_device__())
    capsule = _ask(obj)
    managed = _managed(capsule)
    if isinstance(managed, _DLManagedTensorVersioned) and managed.major != VERSION[0]:
        raise ValueError(f"{_kind(obj)} speaks DLPack {managed.major}.{managed.minor}, this package 1.x")
    owner = _Taken(capsule, managed)
    # Before 1.0 nothing could say read-only: JAX, whose arrays never change, still exports like that.
    readonly = not isinstance(managed, _DLManagedTensorVersioned) or bool(managed.flags & _READ_ONLY)
    tensor = managed.dl_tensor
    _check_host(obj, (tensor.device.device_type, tensor.device.device_id))
    type_ = of_dlpack(tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes)
    if not 0 <= tensor.ndim <= MAX_RANK:  # before as many numbers are read
        raise ValueError(f"{_kind(obj)} has {tensor.ndim} dimensions: the limit is {MAX_RANK}")
    shape = check_shape(tensor.shape[: tensor.ndim])
    nbytes = type_.nbytes(shape)
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    address = (tensor.data or 0) + tensor.byte_offset
    if nbytes and not tensor.data:
        raise ValueError(f"{_kind(obj)} exports {nbytes} bytes at address 0")
    return contiguous(array_at(address, type_, shape, strides, readonly, owner), type_, owner, copy=copy)


class _Taken:
    """A tensor out of its capsule: called back by the producer's deleter, once, when this is collected."""

    __slots__ = ("_address", "_deleter")

    def __init__(self, capsule: object, managed: _Managed) -> None:
        self._address = ctypes.addressof(managed)
        self._deleter = _Deleter(managed.deleter) if managed.deleter else None  # dlpack.h: it may be NULL
        _capsule_set_name(capsule, managed.used_name)  # from here on the capsule's destructor leaves it alone

    def __del__(self) -> None:
        if self._deleter is not None:
            self._deleter(self._address)


def _wanted_device(device: Device, dl_device: Device | None) -> Device:
    if dl_device is None:
        return device
    wanted = (int(dl_device[0]), int(dl_device[1]))
    if wanted != device and not (wanted == CPU and device[0] in HOST_DEVICES):
        raise BufferError(f"memory of {device_name(device)} cannot be exported as {device_name(wanted)}")
    return wanted


def _check_extent(nbytes: int, type: ArrayType, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> None:
    """Raise ValueError unless every element lies within ``nbytes``."""
    extent = type.nbytes(shape)
    if strides is not None:
        if len(strides) != len(shape) or (strides and min(strides) < 0):
            raise ValueError(f"strides {strides} do not go with shape {shape}: one each, and none negative")
        if extent:
            last = sum((dimension - 1) * stride for dimension, stride in zip(shape, strides, strict=True))
            extent = (last + 1) * type.itemsize
    if extent > nbytes:
        raise ValueError(f"shape {shape} of {type.name} takes {extent} bytes, the memory has {nbytes}")


def _by_numpy(array: npt.NDArray[Any], max_version: tuple[int, int] | None, copy: bool) -> object:
    if _NUMPY_HAS_VERSIONS:
        return array.__dlpack__(max_version=max_version, copy=copy)
    return (array.copy(order="K") if copy else array).__dlpack__()


def _managed(capsule: object) -> _Managed:
    """Return the struct in a capsule that nobody has taken yet. It lives no longer than that."""
    for layout in (_DLManagedTensorVersioned, _DLManagedTensor):
        if _capsule_is_valid(capsule, layout.name):
            return layout.from_address(_capsule_pointer(capsule, layout.name))
    raise ValueError(f"{capsule!r} is not a DLPack capsule, or was taken before")


def _ask(obj: Any) -> object:
    """Return an object's capsule, whatever age its ``__dlpack__`` has."""
    try:
        try:
            return obj.__dlpack__(max_version=VERSION)
        except TypeError:  # from before the array API standard 2023.12, which brought the argument
            return obj.__dlpack__()
    except DevmemError:
        raise
    except Exception as error:  # a stranger's: torch alone raises three kinds
        hint = ": .detach() it first" if getattr(obj, "requires_grad", False) is True else ""
        raise ValueError(f"{_kind(obj)} cannot be exported by DLPack{hint} ({error})") from error


def _check_host(obj: object, device: tuple[Any, Any]) -> None:
    kind, number = int(device[0]), int(device[1])
    if kind not in HOST_DEVICES:
        raise ValueError(
            f"{_kind(obj)} is in memory of {device_name((kind, number))}, which the CPU cannot read: copy it to the "
            "host first, by tensor.cpu(), cupy.asnumpy() or jax.device_get()"
        )


def _kind(obj: object) -> str:
    return f"{obj.__class__.__module__}.{obj.__class__.__qualname__}"
