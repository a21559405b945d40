"""What may be handed in: arrays of every library and layout, as bytes; and what is refused, with what to do."""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from devmem_tcp.arrays import DeviceArray, Lease, array_type, source
from devmem_tcp.arrays.layout import address_of, strides_of
from devmem_tcp.errors import StaleFragError
from devmem_tcp.memory import Host

Numpy = np.ndarray[Any, Any]


class TestNumpy:
    @pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (5,), (2, 3), (2, 3, 4)])
    @pytest.mark.parametrize("dtype", ["bool", "int16", "complex128", ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu])
    def test_as_it_lies(self, shape: tuple[int, ...], dtype: Any) -> None:
        values = np.ones(shape, dtype)
        taken = source(values)
        assert (taken.type, taken.shape, taken.order) == (array_type(dtype), shape, "C")
        assert (taken.data.format, taken.data.shape, taken.data.readonly) == ("B", (values.nbytes,), False)
        assert taken.data.tobytes() == values.tobytes()
        assert taken.owner is values
        if values.size:
            assert address_of(taken.data) == values.ctypes.data

    def test_fortran_order_is_kept(self) -> None:
        values = np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3))
        taken = source(values)
        assert (taken.shape, taken.order) == ((2, 3), "F")
        assert address_of(taken.data) == values.ctypes.data
        assert taken.data.tobytes() == values.tobytes("F") == values.T.tobytes()

    def test_both_orders_is_c(self) -> None:
        for shape in ((1, 5), (5, 1), (0, 4), (1, 1, 3, 1)):
            assert source(np.asfortranarray(np.zeros(shape))).order == "C"

    def test_scalars(self) -> None:
        taken = source(np.float16(1.5))
        assert (taken.type.name, taken.shape) == ("float16", ())
        assert taken.data.tobytes() == np.float16(1.5).tobytes()
        assert source(ml_dtypes.bfloat16(2)).data.tobytes() == b"\x00\x40"

    def test_read_only(self) -> None:
        values = np.arange(4)
        values.flags.writeable = False
        assert source(values).data.readonly

    def test_changes_are_seen_and_nothing_is_copied(self) -> None:
        values = np.zeros(4, np.uint8)
        taken = source(values, copy=True)
        values[1] = 7
        assert taken.data.tobytes() == b"\x00\x07\x00\x00"

    def test_subclasses(self) -> None:
        class Named(Numpy):
            name = "x"

        taken = source(np.arange(6, dtype=np.uint8).reshape(2, 3).view(Named))
        assert (taken.shape, taken.data.tobytes()) == ((2, 3), bytes(range(6)))

    @pytest.mark.parametrize(
        "strided",
        [
            np.arange(12)[::2],
            np.arange(12)[::-1],
            np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
            np.broadcast_to(np.arange(3), (2, 3)),
            np.zeros((2, 2), [("a", "i4"), ("b", "f4")])["b"],
            np.arange(24).reshape(4, 6)[:, :3],
        ],
    )
    def test_not_contiguous(self, strided: Numpy) -> None:
        with pytest.raises(ValueError, match=r"strides \(.*give copy=True, or numpy\.ascontiguousarray"):
            source(strided)
        taken = source(strided, copy=True)
        assert (taken.shape, taken.order, taken.type) == (strided.shape, "C", array_type(strided.dtype))
        assert taken.data.tobytes() == strided.tobytes()

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            (np.zeros(2, ">i4"), "other byte order"),
            (np.zeros(2, object), "Python objects"),
            (np.array(["a"]), "text"),
            (np.zeros(2, "f4,f4"), "record"),
            (np.zeros(2, "M8[s]"), "time"),
            (np.zeros(2, np.longdouble), "supported: bool"),
            (np.ma.masked_equal([1, 2], 1), r"mask: send \.filled\(\)"),
            (np.zeros((1,) * 33) if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else np.zeros(2, "O"), "33|Python"),
        ],
    )
    def test_refused(self, values: Numpy, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            source(values)

    def test_huge(self) -> None:
        """2**50 bytes by one: NumPy makes it, nothing can send it."""
        values = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (1 << 50,), (0,))
        for copy in (False, True):
            with pytest.raises(ValueError, match="the limit is 2"):
                source(values, copy=copy)


class TestOtherArrays:
    def test_device_array(self) -> None:
        freed: list[int] = []
        lease = Lease(lambda: freed.append(1))
        memory = bytearray(range(12))
        lent = DeviceArray(memoryview(memory), array_type("int16"), (3, 2), "F", lease=lease)
        taken = source(lent)
        assert (taken.type.name, taken.shape, taken.order) == ("int16", (3, 2), "F")
        assert address_of(taken.data) == address_of(memoryview(memory))
        lease.release()
        assert freed == []
        assert taken.data.tobytes() == memory
        with pytest.raises(StaleFragError):
            source(lent)
        del taken
        assert freed == [1]

    def test_buffer_of_this_package(self) -> None:
        with Host().allocate(4096) as buffer:
            buffer.view()[:3] = b"abc"
            taken = source(buffer)
            assert (taken.type.name, taken.shape, taken.data[:4].tobytes()) == ("uint8", (4096,), b"abc\0")
            del taken
            gc.collect()

    def test_array_interface(self) -> None:
        class Image:
            def __init__(self, pixels: Numpy) -> None:
                self.__array_interface__ = pixels.__array_interface__
                self._pixels = pixels

        pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
        image = Image(pixels)
        gone = weakref.ref(image)
        taken = source(image)
        assert (taken.type.name, taken.shape, address_of(taken.data)) == ("uint8", (2, 4, 3), pixels.ctypes.data)
        data = taken.data
        del image, taken, pixels
        assert data.tobytes() == bytes(range(24))
        assert gone() is not None
        del data
        assert gone() is None
        with pytest.raises(ValueError, match="not contiguous"):
            source(Image(np.zeros((4, 4))[::2]))

    def test_gpu_arrays(self) -> None:
        class OnGpu:
            def __dlpack__(self, **options: Any) -> Any:
                raise AssertionError("not even asked")

            def __dlpack_device__(self) -> tuple[int, int]:
                return (2, 1)

        with pytest.raises(ValueError, match=r"OnGpu is in memory of cuda:1.*cupy\.asnumpy"):
            source(OnGpu())

    def test_dlpack_comes_before_the_array_interface(self) -> None:
        class Both:
            __array_interface__ = np.zeros(1).__array_interface__

            def __dlpack__(self, **options: Any) -> Any:
                return np.arange(3, dtype=np.int8).__dlpack__(**options)

            def __dlpack_device__(self) -> tuple[int, int]:
                return (1, 0)

        assert source(Both()).data.tobytes() == b"\0\1\2"


class TestBuffers:
    @pytest.mark.parametrize(
        ("obj", "name", "shape", "readonly"),
        [
            (b"abc", "uint8", (3,), True),
            (b"", "uint8", (0,), True),
            (bytearray(b"abc"), "uint8", (3,), False),
            (memoryview(b"abc"), "uint8", (3,), True),
            (memoryview(bytearray(12)).cast("i", (3, 1)), "int32", (3, 1), False),
            (memoryview(bytearray(8)).cast("d", ()), "float64", (), False),
            (array.array("d", [1, 2]), "float64", (2,), False),
            (array.array("H", [1, 2, 3]), "uint16", (3,), False),
            ((ctypes.c_int16 * 2 * 3)(), "int16", (3, 2), False),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_taken(self, obj: Any, name: str, shape: tuple[int, ...], readonly: bool) -> None:
        taken = source(obj)
        assert (taken.type.name, taken.shape, taken.order, taken.data.readonly) == (name, shape, "C", readonly)
        assert taken.data.tobytes() == memoryview(obj).tobytes()
        assert taken.owner is obj

    def test_mmap(self) -> None:
        with mmap.mmap(-1, 4096) as mapping:
            mapping[:3] = b"abc"
            taken = source(mapping)
            assert taken.data[:3].tobytes() == b"abc"
            with pytest.raises(BufferError):
                mapping.close()
            del taken

    def test_strided_memoryview(self) -> None:
        view = memoryview(bytes(range(6)))[::2]
        with pytest.raises(ValueError, match="not contiguous"):
            source(view)
        assert source(view, copy=True).data.tobytes() == b"\0\2\4"

    def test_text_in_a_buffer(self) -> None:
        with pytest.raises(ValueError, match="text"):
            source(memoryview(b"abc").cast("c"))

    @pytest.mark.parametrize("obj", [[1, 2], (1.0,), 3, 1.5, None, {1: 2}, object(), np.float32, np.ndarray, range(3)])
    def test_no_array(self, obj: object) -> None:
        with pytest.raises(TypeError, match=r"is no array: numpy\.asarray\(it\) makes one"):
            source(obj)

    def test_text(self) -> None:
        with pytest.raises(TypeError, match="encode"):
            source("abc")


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (4, 3, 2), (1, 5, 1), (3, 0, 2)])
def test_strides(shape: tuple[int, ...]) -> None:
    for order, values in (("C", np.zeros(shape)), ("F", np.zeros(shape, order="F"))):
        expected = tuple(stride // 8 for stride in values.strides)
        strides = strides_of(shape, "C" if order == "C" else "F")
        assert strides == expected or not values.size  # of nothing, any strides are right
        assert len(strides) == len(shape)
