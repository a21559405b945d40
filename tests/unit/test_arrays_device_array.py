"""DeviceArray: what others make of it shares its bytes, holds its lease, and cannot be made too late."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from devmem_tcp.arrays import ARRAY_TYPES, ArrayType, DeviceArray, Lease, array_type
from devmem_tcp.arrays.layout import address_of
from devmem_tcp.errors import BusyError, StaleFragError
from devmem_tcp.memory import Host

TYPES = list(ARRAY_TYPES.values())
F32 = ARRAY_TYPES["float32"]
BF16 = ARRAY_TYPES["bfloat16"]
HAS_VERSIONS = np.lib.NumpyVersion(np.__version__) >= "2.1.0"

# Every way to make something that shows the bytes.
LOOKS: dict[str, Callable[[DeviceArray], Any]] = {
    "numpy": DeviceArray.numpy,
    "asarray": np.asarray,
    "from_dlpack": np.from_dlpack,
    "capsule": lambda lent: lent.__dlpack__(),
    "versioned capsule": lambda lent: lent.__dlpack__(max_version=(1, 0)),
    "interface": lambda lent: lent.__array_interface__,
    "array": lambda lent: lent.__array__(),
    "bytes_view": DeviceArray.bytes_view,
    "view of a view": lambda lent: np.asarray(lent)[1:].reshape(-1, 1).view(np.uint8).T,
    "flat iterator": lambda lent: lent.numpy().flat,
    "memoryview": lambda lent: np.asarray(lent).data,
}


def lend(type_: ArrayType = F32, shape: tuple[int, ...] = (2, 3), **options: Any) -> tuple[DeviceArray, bytearray]:
    memory = bytearray(number % 2 for number in range(type_.nbytes(shape)))
    return DeviceArray(memoryview(memory), type_, shape, **options), memory


class TestWhatItIs:
    def test_attributes(self) -> None:
        lent, _ = lend(BF16, (2, 3), order="F", device=(3, 0))
        assert (lent.dtype, lent.type, lent.shape, lent.nbytes, lent.order) == ("bfloat16", BF16, (2, 3), 12, "F")
        assert (lent.readonly, lent.device, lent.__dlpack_device__(), len(lent)) == (False, (3, 0), (3, 0), 2)
        assert repr(lent) == "<DeviceArray bfloat16 (2, 3), order F, 12 bytes>"

    def test_no_length_without_dimensions(self) -> None:
        with pytest.raises(TypeError, match="no len"):
            len(lend(F32, ())[0])

    @pytest.mark.parametrize(
        ("data", "options", "reason"),
        [
            (memoryview(bytes(23)), {}, r"takes 24 bytes, data has 23"),
            (memoryview(bytes(25)), {}, "data has 25"),
            (memoryview(bytes(24)).cast("b"), {}, "format B"),
            (memoryview(bytes(24)).cast("B", (2, 12)), {}, "format B"),
            (memoryview(bytes(48))[::2], {}, "contiguous"),
            (memoryview(bytes(24)), {"order": "A"}, "order is 'C' or 'F'"),
            (memoryview(bytes(24)), {"device": (2, 0)}, "memory of cuda:0 has no memoryview"),
            (memoryview(bytes(24)), {"shape": (-2, -3)}, "negative"),
        ],
    )
    def test_what_does_not_fit(self, data: memoryview, options: dict[str, Any], reason: str) -> None:
        arguments: dict[str, Any] = {"type": F32, "shape": (2, 3)} | options
        with pytest.raises(ValueError, match=reason):
            DeviceArray(data, **arguments)


class TestBytes:
    @pytest.mark.parametrize("type_", TYPES, ids=list(ARRAY_TYPES))
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_numpy(self, type_: ArrayType, order: Any) -> None:
        for shape in ((), (0,), (3, 0), (4,), (2, 3), (2, 3, 4)):
            lent, memory = lend(type_, shape, order=order)
            for made in (lent.numpy(), np.asarray(lent), lent.__array__()):
                assert (made.dtype, made.shape, made.flags.writeable) == (type_.numpy(), shape, True)
                assert made.flags.c_contiguous if order == "C" else made.flags.f_contiguous
                assert made.tobytes(order) == memory
                assert not memory or made.ctypes.data == address_of(memoryview(memory))
            assert lent.tobytes() == lent.bytes_view() == memory

    def test_writes_go_through(self) -> None:
        lent, memory = lend()
        lent.numpy()[0, 1] = 1.5
        assert memory[4:8] == np.float32(1.5).tobytes()

    def test_unaligned(self) -> None:
        memory = bytearray(np.arange(9, dtype=np.uint8))
        lent = DeviceArray(memoryview(memory)[1:], array_type("uint32"), (2,))
        for made in (lent.numpy(), np.asarray(lent), np.from_dlpack(lent)):
            assert made.tolist() == [0x04030201, 0x08070605]

    @pytest.mark.parametrize("data", [memoryview(bytes(24)), memoryview(bytearray(24))])
    def test_read_only(self, data: memoryview) -> None:
        lent = DeviceArray(data, F32, (2, 3), readonly=True)
        made: list[Any] = [lent.numpy(), np.asarray(lent), lent.bytes_view().obj]
        if HAS_VERSIONS:
            made.append(np.from_dlpack(lent))
        for array in made:
            assert not array.flags.writeable
        assert lent.bytes_view().readonly
        with pytest.raises(BufferError, match="readonly"):
            lent.__dlpack__()
        assert DeviceArray(data, F32, (2, 3)).readonly is data.readonly

    def test_read_only_without_bytes(self) -> None:
        lent = DeviceArray(memoryview(b""), F32, (0, 3))
        assert lent.readonly
        assert not lent.numpy().flags.writeable

    def test_array_protocol(self) -> None:
        lent, _ = lend(BF16, (2, 2), order="F")
        as_floats = np.asarray(lent, dtype=np.float32)
        assert as_floats.dtype == np.float32
        assert np.array_equal(as_floats, lent.numpy().astype(np.float32))
        assert lent.__array__(dtype=ml_dtypes.bfloat16, copy=False).ctypes.data == lent.numpy().ctypes.data
        copied = lent.__array__(copy=True)
        assert copied.ctypes.data != lent.numpy().ctypes.data
        assert copied.flags.f_contiguous
        with pytest.raises(ValueError, match="bfloat16 cannot be had as float32 without a copy"):
            lent.__array__(dtype=np.float32, copy=False)

    def test_array_interface_has_no_word_for_some(self) -> None:
        assert hasattr(lend(F32)[0], "__array_interface__")
        assert not hasattr(lend(BF16)[0], "__array_interface__")

    def test_dlpack_arguments_arrive(self) -> None:
        lent, memory = lend(device=(3, 0))
        assert ("dltensor_versioned" in repr(lent.__dlpack__(max_version=(1, 0)))) is HAS_VERSIONS
        with pytest.raises(BufferError, match="cuda_host:0 cannot be exported as cuda:1"):
            lent.__dlpack__(dl_device=(2, 1))
        with pytest.raises(ValueError, match="stream must be None"):
            lent.__dlpack__(stream=1)

        class Copying:
            def __dlpack__(self, **options: Any) -> Any:
                return lent.__dlpack__(max_version=(1, 0), dl_device=(1, 0), copy=True)

            def __dlpack_device__(self) -> tuple[int, int]:
                return (1, 0)

        copied = np.from_dlpack(Copying())
        assert copied.tobytes() == memory
        assert copied.ctypes.data != address_of(memoryview(memory))


class TestLease:
    @pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
    def test_what_was_made_keeps_the_bytes(self, look: Callable[[DeviceArray], Any]) -> None:
        freed: list[int] = []
        lease = Lease(lambda: freed.append(1))
        lent, _ = lend(lease=lease)
        made = look(lent)
        assert lease.held == 1
        lease.release()
        del lent
        assert freed == []
        del made
        assert freed == [1]

    @pytest.mark.parametrize("type_", [F32, BF16])
    def test_nothing_can_be_made_too_late(self, type_: ArrayType) -> None:
        lease = Lease(lambda: None)
        lent, memory = lend(type_, lease=lease)
        before = lent.numpy()
        lease.release()
        looks = dict(LOOKS)
        if type_ is BF16:
            del looks["interface"]  # which has no word for it: AttributeError, before and after
        looks |= {"tobytes": DeviceArray.tobytes, "np.array": np.array}
        for name, look in looks.items():
            with pytest.raises(StaleFragError, match="released"):
                pytest.fail(f"{name} gave {look(lent)!r}")
        assert before.tobytes() == memory
        assert (lent.shape, lent.dtype, len(lent)) == ((2, 3), type_.name, 2)
        assert repr(lent).endswith("24 bytes, released>" if type_ is F32 else "12 bytes, released>")

    @pytest.mark.parametrize("look", [DeviceArray.numpy, np.asarray])
    def test_types_of_ml_dtypes_hold_too(self, look: Callable[[DeviceArray], Any]) -> None:
        freed: list[int] = []
        lease = Lease(lambda: freed.append(1))
        made = look(lend(BF16, lease=lease)[0])[:1]
        lease.release()
        assert freed == []
        del made
        assert freed == [1]

    def test_copies_hold_nothing(self) -> None:
        freed: list[int] = []
        lease = Lease(lambda: freed.append(1))
        lent, memory = lend(lease=lease)
        copies: list[Any] = [np.array(lent), lent.tobytes(), lent.__array__(np.float64), lent.__dlpack__(copy=True)]
        lease.release()
        assert freed == [1]
        assert copies[0].tobytes() == memory

    def test_the_array_itself_holds_nothing(self) -> None:
        freed: list[int] = []
        lease = Lease(lambda: freed.append(1))
        lent, _ = lend(lease=lease)
        np.asarray(lent)
        lease.release()
        assert freed == [1]
        assert lent.shape == (2, 3)

    def test_without_a_lease_the_memory_is_kept(self) -> None:
        lent, memory = lend()
        made = np.from_dlpack(lent)
        del lent
        with pytest.raises(BufferError):
            memory.append(1)  # exported
        del made
        memory.append(1)

    def test_over_a_buffer(self) -> None:
        """A Buffer knows by the arrays that it is looked at."""
        with Host().allocate(4096) as buffer:
            made = np.asarray(DeviceArray(buffer.view()[8:32], F32, (2, 3)))
            made[:] = 1
            with pytest.raises(BusyError):
                buffer.close()
            assert buffer.array(np.float32, offset=8, count=6).tolist() == [1.0] * 6
            del made
            gc.collect()
