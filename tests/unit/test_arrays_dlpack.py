"""DLPack by a stand-in for another library on either side, written from dlpack.h alone, and by NumPy's own."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from devmem_tcp.arrays import dlpack
from devmem_tcp.arrays.dtypes import ARRAY_TYPES, ArrayType
from devmem_tcp.arrays.layout import Source, address_of
from devmem_tcp.errors import ClosedError

TYPES = list(ARRAY_TYPES.values())
NAMES = list(ARRAY_TYPES)
F32 = ARRAY_TYPES["float32"]
BF16 = ARRAY_TYPES["bfloat16"]
HAS_VERSIONS = np.lib.NumpyVersion(np.__version__) >= "2.1.0"

TENSOR = "PiiiBBHPPQ"  # data, device type, device, ndim, code, bits, lanes, shape, strides, byte offset
MANAGED = struct.Struct(f"{TENSOR}PP")  # tensor, context, deleter
VERSIONED = struct.Struct(f"IIPPQ{TENSOR}")  # major, minor, context, deleter, flags, tensor

api = ctypes.pythonapi
capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", api))
capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", api))
capsule_set_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", api))
capsule_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", api)
)
Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Owner:
    """Something to be kept alive."""


class Consumer:
    """A stand-in for another library: takes the tensor out of a capsule, looks at it, and calls the deleter."""

    USED: ClassVar = {b"dltensor": b"used_dltensor", b"dltensor_versioned": b"used_dltensor_versioned"}

    def __init__(self, capsule: Any) -> None:
        name = capsule_name(capsule)
        self.versioned = name == b"dltensor_versioned"
        self.address = capsule_pointer(capsule, name)
        capsule_set_name(capsule, self.USED[name])
        if self.versioned:
            fields = VERSIONED.unpack(ctypes.string_at(self.address, VERSIONED.size))
            self.version, self.deleter, self.flags, tensor = fields[:2], fields[3], fields[4], fields[5:]
        else:
            fields = MANAGED.unpack(ctypes.string_at(self.address, MANAGED.size))
            self.deleter, self.flags, tensor = fields[-1], 0, fields[:-2]
        self.data, kind, number, self.ndim, code, bits, self.lanes, shape, strides, offset = tensor
        self.data += offset
        self.device, self.dtype = (kind, number), (code, bits)
        self.shape = tuple((ctypes.c_int64 * self.ndim).from_address(shape)) if self.ndim else ()
        self.strides = tuple((ctypes.c_int64 * self.ndim).from_address(strides)) if self.ndim and strides else None

    def read(self, nbytes: int) -> bytes:
        return ctypes.string_at(self.data, nbytes)

    def delete(self) -> None:
        Deleter(self.deleter)(self.address)


class Producer:
    """A stand-in for another library: exports its memory as it is told, and counts the calls of its deleter."""

    def __init__(self, data: bytes, type: ArrayType, shape: tuple[int, ...], **options: Any) -> None:
        self.memory = ctypes.create_string_buffer(data, max(len(data), 1))
        self.deleted = 0
        self.device: tuple[int, int] = options.get("device", (1, 0))
        self.major: int = options.get("major", 1)
        self.asked: list[dict[str, Any]] = []
        self._shape = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        strides = options.get("strides")
        self._strides = (ctypes.c_int64 * max(len(strides), 1))(*strides) if strides is not None else None
        offset = options.get("offset", 0)
        address = options.get("address", ctypes.addressof(self.memory))
        code, bits = options.get("dtype", type.dlpack)
        self._deleter = Deleter(self._delete) if options.get("has_deleter", True) else None
        deleter = ctypes.cast(self._deleter, ctypes.c_void_p).value if self._deleter is not None else None
        shape_at = ctypes.addressof(self._shape)
        strides_at = ctypes.addressof(self._strides) if self._strides is not None else 0
        ndim = options.get("ndim", len(shape))
        tensor = (address, *self.device, ndim, code, bits, options.get("lanes", 1), shape_at, strides_at, offset)
        self._versioned: bool = options.get("versioned", True)
        packed = (
            VERSIONED.pack(self.major, 0, 0, deleter or 0, options.get("flags", 0), *tensor)
            if self._versioned
            else MANAGED.pack(*tensor, 0, deleter or 0)
        )
        self._managed = ctypes.create_string_buffer(packed, len(packed))
        self._destructor = Deleter(self._destroy)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> Any:
        self.asked.append(options)
        if not self._versioned and options:
            raise TypeError("__dlpack__() got an unexpected keyword argument")
        name = b"dltensor_versioned" if self._versioned else b"dltensor"
        destructor = ctypes.cast(self._destructor, ctypes.c_void_p)
        return capsule_new(ctypes.addressof(self._managed), name, destructor)

    def _delete(self, managed: int) -> None:
        assert managed == ctypes.addressof(self._managed)
        self.deleted += 1

    def _destroy(self, capsule: int) -> None:
        valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", api))
        if valid(capsule, b"dltensor_versioned") or valid(capsule, b"dltensor"):
            self.deleted += 1


def export(memory: bytearray, type: ArrayType, shape: tuple[int, ...], owner: object = None, **options: Any) -> Any:
    """Export a bytearray, which the owner is taken to keep."""
    arguments = {"strides": None, "device": (1, 0), "readonly": False} | options
    return dlpack.export(address_of(memoryview(memory)), len(memory), type, shape, owner=owner, **arguments)


@pytest.fixture(params=[(1, 0), (1, 3), None, (0, 8)], ids=["1.0", "1.3", "none", "0.8"])
def max_version(request: pytest.FixtureRequest) -> Any:
    return request.param


class TestExport:
    @pytest.mark.parametrize("type_", TYPES, ids=NAMES)
    def test_every_type(self, type_: ArrayType, max_version: Any) -> None:
        memory = bytearray(range(6 * type_.itemsize))
        taken = Consumer(export(memory, type_, (2, 3), max_version=max_version))
        assert taken.versioned is (HAS_VERSIONS and max_version is not None and max_version >= (1, 0))
        assert (taken.dtype, taken.lanes, taken.device) == (type_.dlpack, 1, (1, 0))
        assert taken.shape == (2, 3)
        assert taken.strides in ((3, 1), None)
        assert taken.data == address_of(memoryview(memory))
        assert taken.read(len(memory)) == memory
        assert taken.flags == 0
        taken.delete()

    @pytest.mark.parametrize("type_", [type_ for type_ in TYPES if type_.in_numpy], ids=lambda type_: type_.name)
    def test_numpy_takes_it(self, type_: ArrayType) -> None:
        memory = bytearray(value % 2 for value in range(6 * type_.itemsize))

        class Exporter:
            def __dlpack__(self, **options: Any) -> Any:
                return export(memory, type_, (2, 3), self, strides=(1, 2), **options)

            def __dlpack_device__(self) -> tuple[int, int]:
                return (1, 0)

        array = np.from_dlpack(Exporter())
        assert (array.dtype, array.shape) == (type_.numpy(), (2, 3))
        assert array.flags.f_contiguous
        assert array.tobytes("F") == memory
        assert array.ctypes.data == address_of(memoryview(memory))
        assert array.flags.writeable is HAS_VERSIONS  # what comes by the old struct, NumPy protects

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1)])
    def test_shapes(self, shape: tuple[int, ...], max_version: Any) -> None:
        memory = bytearray(range(1, 1 + BF16.nbytes(shape)))
        taken = Consumer(export(memory, BF16, shape, max_version=max_version))
        assert (taken.ndim, taken.shape) == (len(shape), shape)
        assert taken.read(len(memory)) == memory
        taken.delete()

    def test_devices(self) -> None:
        for device in ((1, 0), (2, 3), (3, 0), (10, 1), (11, 0), (13, 2)):
            taken = Consumer(export(bytearray(8), F32, (2,), device=device, stream=None))
            assert taken.device == device
            taken.delete()

    def test_gpu_memory_is_not_touched(self) -> None:
        """Nothing is mapped at that address."""
        capsule = dlpack.export(4096, 64, BF16, (4, 8), None, (2, 1), False, None, max_version=(1, 0), stream=7)
        taken = Consumer(capsule)
        assert (taken.data, taken.device, taken.shape) == (4096, (2, 1), (4, 8))
        taken.delete()

    def test_asked_for_the_cpu(self) -> None:
        for device, wanted in (((1, 0), (1, 0)), ((3, 0), (1, 0)), ((13, 1), (1, 0)), ((2, 1), (2, 1))):
            taken = Consumer(export(bytearray(8), F32, (2,), device=device, dl_device=wanted))
            assert taken.device == wanted
            taken.delete()

    @pytest.mark.parametrize(("device", "wanted"), [((1, 0), (2, 0)), ((2, 0), (1, 0)), ((1, 0), (1, 1))])
    def test_another_device(self, device: tuple[int, int], wanted: tuple[int, int]) -> None:
        with pytest.raises(BufferError, match="cannot be exported as"):
            export(bytearray(8), F32, (2,), device=device, dl_device=wanted)

    def test_streams_are_a_gpus(self) -> None:
        for device in ((1, 0), (3, 0)):
            with pytest.raises(ValueError, match="stream must be None, not 1"):
                export(bytearray(8), F32, (2,), device=device, stream=1)

    def test_copy(self, max_version: Any) -> None:
        memory = bytearray(range(24))
        owner = Owner()
        gone = weakref.ref(owner)
        capsule = export(memory, BF16, (3, 4), owner, strides=(1, 3), copy=True, max_version=max_version, device=(3, 0))
        del owner
        assert gone() is None
        taken = Consumer(capsule)
        assert taken.data != address_of(memoryview(memory))
        assert (taken.dtype, taken.shape, taken.strides, taken.device) == (BF16.dlpack, (3, 4), (1, 3), (1, 0))
        assert taken.read(24) == memory
        assert taken.flags == (2 if taken.versioned else 0)  # DLPACK_FLAG_BITMASK_IS_COPIED
        taken.delete()

    def test_no_copy_of_what_the_cpu_cannot_read(self) -> None:
        with pytest.raises(BufferError, match="cannot copy memory of cuda:0"):
            export(bytearray(8), F32, (2,), device=(2, 0), copy=True)
        with pytest.raises(BufferError, match="cpu:0 cannot be exported as cuda_host:0"):  # a copy is plain memory
            export(bytearray(8), F32, (2,), device=(3, 0), dl_device=(3, 0), copy=True)

    def test_read_only(self) -> None:
        with contextlib.nullcontext() if HAS_VERSIONS else pytest.raises(BufferError):
            taken = Consumer(export(bytearray(8), F32, (2,), readonly=True, max_version=(1, 0)))
            assert taken.flags == 1  # DLPACK_FLAG_BITMASK_READ_ONLY
            taken.delete()

    @pytest.mark.parametrize("shape", [(2,), (0,)])
    def test_read_only_cannot_be_said_before_1_0(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(BufferError, match="readonly"):
            export(bytearray(8), F32, shape, readonly=True)

    @pytest.mark.parametrize(
        ("shape", "strides"),
        [((3,), None), ((2, 2), None), ((2,), (2,)), ((1, 2), (0, 2)), ((2,), (-1,)), ((2,), (1, 1)), ((), (1,))],
    )
    def test_outside_the_memory(self, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> None:
        with pytest.raises(ValueError, match=r"takes|do not go with"):
            export(bytearray(8), F32, shape, strides=strides)

    def test_huge(self) -> None:
        with pytest.raises(ValueError, match="the limit is 2"):
            export(bytearray(8), F32, (1 << 60,))


class TestLifetime:
    @pytest.fixture
    def capsule_and_owner(self, max_version: Any) -> tuple[list[Any], weakref.ref[Owner]]:
        owner = Owner()
        return [export(bytearray(8), BF16, (4,), owner, max_version=max_version)], weakref.ref(owner)

    def test_dropped_unconsumed(self, capsule_and_owner: tuple[list[Any], weakref.ref[Owner]]) -> None:
        capsules, owner = capsule_and_owner
        assert owner() is not None
        capsules.clear()
        assert owner() is None

    def test_deleter(self, capsule_and_owner: tuple[list[Any], weakref.ref[Owner]]) -> None:
        capsules, owner = capsule_and_owner
        taken = Consumer(capsules[0])
        capsules.clear()
        assert owner() is not None
        taken.delete()
        assert owner() is None

    def test_deleter_in_another_thread(self, capsule_and_owner: tuple[list[Any], weakref.ref[Owner]]) -> None:
        capsules, owner = capsule_and_owner
        taken = Consumer(capsules.pop())
        thread = threading.Thread(target=taken.delete)
        thread.start()
        thread.join()
        assert owner() is None

    def test_deleter_in_a_thread_that_python_does_not_know(
        self, capsule_and_owner: tuple[list[Any], weakref.ref[Owner]]
    ) -> None:
        capsules, owner = capsule_and_owner
        taken = Consumer(capsules.pop())
        libc = ctypes.CDLL(None)
        thread = ctypes.c_ulong()
        arguments = (ctypes.c_void_p(taken.deleter), ctypes.c_void_p(taken.address))
        assert libc.pthread_create(ctypes.byref(thread), None, *arguments) == 0  # the deleter is the thread
        assert libc.pthread_join(thread, None) == 0
        assert owner() is None

    def test_capsule_outlives_its_tensor(self, capsule_and_owner: tuple[list[Any], weakref.ref[Owner]]) -> None:
        capsules, owner = capsule_and_owner
        Consumer(capsules[0]).delete()
        assert owner() is None
        capsules.clear()  # its destructor must leave the freed struct alone

    def test_capsule_dropped_by_a_consumer_that_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """NumPy raises, and drops the capsule with the exception under way: the error must survive that."""
        unraisable: list[object] = []
        monkeypatch.setattr(sys, "unraisablehook", lambda caught: unraisable.append(caught.exc_value))

        class Exporter(Owner):
            def __dlpack__(self, **options: Any) -> Any:
                return export(bytearray(8), BF16, (4,), self, **options)

            def __dlpack_device__(self) -> tuple[int, int]:
                return (1, 0)

            def __del__(self) -> None:  # Python code in the destructor
                text = ", ".join(str(number) for number in range(3))
                assert text == "0, 1, 2"

        exporter = Exporter()
        gone = weakref.ref(exporter)
        with pytest.raises((BufferError, RuntimeError), match=r"[Uu]nsupported dtype"):
            np.from_dlpack(exporter)
        del exporter
        assert gone() is None
        assert unraisable == []

    def test_nothing_is_left_of_many(self) -> None:
        owner = Owner()
        before = sys.getrefcount(owner)
        for number in range(200):
            capsule = export(bytearray(8), BF16, (4,), owner)
            if number % 2:
                Consumer(capsule).delete()
        del capsule
        assert sys.getrefcount(owner) == before


class TestRead:
    @pytest.mark.parametrize("versioned", [True, False])
    @pytest.mark.parametrize("type_", TYPES, ids=NAMES)
    def test_every_type(self, type_: ArrayType, versioned: bool) -> None:
        data = bytes(range(6 * type_.itemsize))
        producer = Producer(data, type_, (2, 3), versioned=versioned)
        source = dlpack.read(producer)
        assert (source.type, source.shape, source.order) == (type_, (2, 3), "C")
        assert (source.data.format, source.data.shape, source.data.tobytes()) == ("B", (len(data),), data)
        assert address_of(source.data) == ctypes.addressof(producer.memory)
        assert producer.asked == [{"max_version": (1, 1)}, *([] if versioned else [{}])]

    @pytest.mark.parametrize("keep", [lambda source: source.owner, lambda source: source.data, lambda source: source])
    @pytest.mark.parametrize("versioned", [True, False])
    def test_deleter_is_called_once(self, keep: Callable[[Source], object], versioned: bool) -> None:
        producer = Producer(bytes(8), F32, (2,), versioned=versioned)
        kept = keep(dlpack.read(producer))
        assert producer.deleted == 0
        del kept
        assert producer.deleted == 1

    def test_no_deleter(self) -> None:
        source = dlpack.read(Producer(b"12345678", F32, (2,), has_deleter=False))
        assert source.data.tobytes() == b"12345678"

    def test_byte_offset(self) -> None:
        source = dlpack.read(Producer(b"....12345678", F32, (2,), offset=4))
        assert source.data.tobytes() == b"12345678"

    @pytest.mark.parametrize(
        ("shape", "strides", "order"),
        [((2, 3), (3, 1), "C"), ((2, 3), (1, 2), "F"), ((1, 3), (77, 1), "C"), ((), (), "C"), ((0, 3), (5, 9), "C")],
    )
    def test_orders(self, shape: tuple[int, ...], strides: tuple[int, ...], order: str) -> None:
        source = dlpack.read(Producer(bytes(range(24)), F32, shape, strides=strides))
        assert (source.shape, source.order) == (shape, order)
        assert source.data.tobytes() == bytes(range(F32.nbytes(shape)))

    def test_not_contiguous(self) -> None:
        producer = Producer(bytes(range(24)), F32, (3,), strides=(2,))
        with pytest.raises(ValueError, match=r"strides \(8,\).*copy=True"):
            dlpack.read(producer)
        assert producer.deleted == 1
        copied = dlpack.read(producer, copy=True)
        assert producer.deleted == 2  # the copy needs it no more
        assert copied.data.tobytes() == bytes([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19])

    @pytest.mark.parametrize(
        ("options", "readonly"),
        [({}, False), ({"flags": 1}, True), ({"flags": 2}, False), ({"versioned": False}, True)],
    )
    def test_read_only(self, options: dict[str, Any], readonly: bool) -> None:
        assert dlpack.read(Producer(bytes(8), F32, (2,), **options)).data.readonly is readonly

    @pytest.mark.parametrize("device", [(3, 0), (11, 1), (13, 0)])
    def test_devices_whose_memory_the_cpu_reads(self, device: tuple[int, int]) -> None:
        assert dlpack.read(Producer(b"1234", F32, (1,), device=device)).data.tobytes() == b"1234"

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"device": (2, 3)}, r"memory of cuda:3.*tensor\.cpu\(\)"),
            ({"device": (99, 0)}, "device type 99:0"),
            ({"major": 2}, "speaks DLPack 2.0"),
            ({"dtype": (3, 64)}, "code 3, 64 bits"),
            ({"lanes": 4}, "4 lanes"),
            ({"ndim": 33}, "33 dimensions"),
            ({"ndim": -1}, "-1 dimensions"),
            ({"address": 0}, "at address 0"),
        ],
    )
    def test_refused(self, options: dict[str, Any], reason: str) -> None:
        producer = Producer(bytes(8), F32, (2,), **options)
        with pytest.raises(ValueError, match=reason):
            dlpack.read(producer)
        assert producer.deleted == len(producer.asked)

    def test_huge(self) -> None:
        with pytest.raises(ValueError, match="the limit is 2"):
            dlpack.read(Producer(bytes(8), F32, (1 << 62,)))

    @pytest.mark.parametrize("flags", [0, 1])
    def test_empty_at_address_0(self, flags: int) -> None:
        taken = dlpack.read(Producer(b"", F32, (0, 2), address=0, flags=flags))
        assert (taken.data.nbytes, taken.data.readonly) == (0, flags == 1)

    @pytest.mark.parametrize(
        ("error", "attributes", "reason"),
        [
            (BufferError("Can't export"), {"requires_grad": True}, r"\.detach\(\) it first \(Can't export\)"),
            (RuntimeError("sparse"), {"requires_grad": False}, r"cannot be exported by DLPack \(sparse\)"),
            (TypeError("never"), {}, r"by DLPack \(never\)"),
        ],
    )
    def test_what_refuses_itself(self, error: Exception, attributes: dict[str, Any], reason: str) -> None:
        class Tensor:
            def __dlpack__(self, **options: Any) -> Any:
                raise error

            def __dlpack_device__(self) -> tuple[int, int]:
                return (1, 0)

        tensor = Tensor()
        vars(tensor).update(attributes)
        with pytest.raises(ValueError, match=reason) as caught:
            dlpack.read(tensor)
        assert caught.value.__cause__ is error

    def test_errors_of_this_package_stay_what_they_are(self) -> None:
        class Closed:
            def __dlpack__(self, **options: Any) -> Any:
                raise ClosedError("closed")

            def __dlpack_device__(self) -> tuple[int, int]:
                return (1, 0)

        with pytest.raises(ClosedError):
            dlpack.read(Closed())

    def test_a_capsule_is_taken_once(self) -> None:
        producer = Producer(bytes(8), F32, (2,))
        capsule = producer.__dlpack__()

        class Again(Producer):
            def __dlpack__(self, **options: Any) -> Any:
                return capsule

        again = Again(b"", F32, (0,))
        first = dlpack.read(again)
        assert capsule_name(capsule) == b"used_dltensor_versioned"
        with pytest.raises(ValueError, match="was taken before"):
            dlpack.read(again)
        del first
        assert producer.deleted == 1

    def test_round_trip_with_numpy(self) -> None:
        array = np.arange(6, dtype=np.complex128).reshape(2, 3)
        array.flags.writeable = not HAS_VERSIONS
        source = dlpack.read(array)
        assert source.data.readonly
        assert source.data.tobytes() == array.tobytes()
