"""Gather: the plan's runs, what is copied and what is a view, and every way to ask for the wrong thing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from devmem_tcp.buffers import Buffer, CpuAccess
from devmem_tcp.errors import BusyError, ClosedError, StaleFragError
from devmem_tcp.gather import GatherPlan, gather, plan_gather
from devmem_tcp.gather import plan as planning
from devmem_tcp.memory import Host
from devmem_tcp.memory.host import HostBuffer
from devmem_tcp.types import FRAG_DTYPE, FragBatch, FragKind

SIZE = 256 * 4096

Frag = tuple[int, int, int, int, int]


def dmabuf(offset: int, size: int, dmabuf_id: int = 1) -> Frag:
    return (offset, size, 1, dmabuf_id, FragKind.DMABUF)


def linear(offset: int, size: int) -> Frag:
    return (offset, size, 0, 0, FragKind.LINEAR)


def host(offset: int, size: int) -> Frag:
    return (offset, size, 0, 0, FragKind.HOST)


def batch_of(*frags: Frag, inline: bytes = b"") -> FragBatch:
    table = np.array(list(frags), FRAG_DTYPE)
    return FragBatch(table, int(table["size"].sum()), memoryview(inline), None)


def runs_of(plan: GatherPlan) -> list[tuple[int, int, int]]:
    runs: list[tuple[int, int, int]] = plan.runs.tolist()
    return runs


@pytest.fixture
def buffer() -> Iterator[HostBuffer]:
    with Host().allocate(SIZE) as buffer:
        buffer.array()[:] = np.random.default_rng(7).integers(0, 256, SIZE, np.uint8)
        yield buffer


@pytest.fixture(params=["loop", "columns"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Plan by the loop, and by columns, whatever the number of frags."""
    monkeypatch.setattr(planning, "_FEW_FRAGS", 1 << 30 if request.param == "loop" else 0)
    return str(request.param)


@pytest.mark.usefixtures("way")
class TestPlan:
    def test_adjacent_frags_become_runs(self) -> None:
        plan = plan_gather(batch_of(dmabuf(4096, 4096), dmabuf(8192, 3720), dmabuf(11912, 8), dmabuf(0, 4096)))
        assert runs_of(plan) == [(1, 4096, 7824), (1, 0, 4096)]
        assert plan.nbytes == 11920
        assert not plan.contiguous
        assert plan.equal_size is None

    def test_one_dmabuf_run_is_contiguous(self) -> None:
        plan = plan_gather(batch_of(dmabuf(4096, 4096), dmabuf(8192, 4096)))
        assert runs_of(plan) == [(1, 4096, 8192)]
        assert plan.contiguous
        assert plan.equal_size == 4096

    def test_order_is_kept(self) -> None:
        plan = plan_gather(batch_of(dmabuf(8192, 4096), dmabuf(4096, 4096), dmabuf(0, 4096)))
        assert runs_of(plan) == [(1, 8192, 4096), (1, 4096, 4096), (1, 0, 4096)]

    def test_neighbours_in_different_dmabufs_stay_apart(self) -> None:
        plan = plan_gather(batch_of(dmabuf(0, 4096, 3), dmabuf(4096, 4096, 2)))
        assert runs_of(plan) == [(3, 0, 4096), (2, 4096, 4096)]
        assert plan.dmabuf_ids == (2, 3)
        assert plan.equal_size is None

    def test_batches_join(self) -> None:
        first, second = batch_of(dmabuf(0, 4096)), batch_of(dmabuf(4096, 4096))
        assert runs_of(plan_gather([first, second])) == [(1, 0, 8192)]

    def test_inline_bytes_are_of_their_batch(self) -> None:
        first = batch_of(linear(0, 3), host(3, 2), dmabuf(5, 4), host(5, 1), inline=bytes(6))
        second = batch_of(host(6, 2), inline=bytes(8))
        plan = plan_gather([first, second])
        assert runs_of(plan) == [(-1, 0, 5), (1, 5, 4), (-1, 5, 1), (-2, 6, 2)]
        assert plan.nbytes == 12
        assert plan.dmabuf_ids == (1,)

    def test_one_inline_run_is_not_contiguous(self) -> None:
        plan = plan_gather(batch_of(linear(0, 64), inline=bytes(64)))
        assert not plan.contiguous
        assert plan.equal_size is None

    @pytest.mark.parametrize(
        ("frags", "equal_size"),
        [
            ([(4096, 4096), (16384, 4096)], 4096),
            ([(4096, 4096), (8192, 4096), (0, 4096)], 4096),  # two merged
            ([(3, 1), (9, 1)], 1),
            ([(4096, 4096), (16384, 4095)], None),
            ([(4096, 4096), (16385, 4096)], None),
            ([(100, 50), (300, 50)], 50),
            ([(100, 50), (310, 50)], None),
            ([], None),
        ],
    )
    def test_equal_size(self, frags: list[tuple[int, int]], equal_size: int | None) -> None:
        assert plan_gather(batch_of(*(dmabuf(*frag) for frag in frags))).equal_size == equal_size

    def test_rows(self) -> None:
        plan = plan_gather(batch_of(*(dmabuf(row * 16, 16) for row in (7, 8, 9, 2, 0, 1))))
        assert len(plan.runs) == 3
        assert plan.rows().tolist() == [7, 8, 9, 2, 0, 1]
        with pytest.raises(ValueError, match="equal size"):
            plan_gather(batch_of(dmabuf(0, 1), dmabuf(5, 2))).rows()

    def test_empty(self) -> None:
        for nothing in (batch_of(), [], [batch_of(), batch_of()], batch_of(dmabuf(0, 0), host(0, 0))):
            plan = plan_gather(nothing)
            assert (runs_of(plan), plan.nbytes, plan.contiguous, plan.dmabuf_ids) == ([], 0, False, ())

    def test_frags_without_bytes_are_left_out(self) -> None:
        plan = plan_gather(batch_of(dmabuf(0, 16), host(0, 0), dmabuf(16, 16), dmabuf(99, 0)))
        assert runs_of(plan) == [(1, 0, 32)]
        assert plan.equal_size == 16

    def test_large_offsets_and_sums(self) -> None:
        gib = 1 << 30
        plan = plan_gather(batch_of(*(dmabuf(number * 3 * gib, 3 * gib) for number in range(40))))
        assert runs_of(plan) == [(1, 0, 120 * gib)]


@pytest.mark.usefixtures("way")
class TestBytes:
    def test_contiguous_is_a_view(self, buffer: HostBuffer) -> None:
        payload = gather(batch_of(dmabuf(4096, 4096), dmabuf(8192, 100)), buffer)
        assert payload.shape == (4196,)
        assert payload.dtype == np.uint8
        assert np.shares_memory(payload, buffer.array(offset=4096, count=4196))
        payload[0] ^= 0xFF
        assert payload[0] == buffer.array()[4096]
        with pytest.raises(BusyError):
            buffer.close()

    def test_scattered_is_a_copy(self, buffer: HostBuffer) -> None:
        source = buffer.array()
        payload = gather(batch_of(dmabuf(8192, 4096), dmabuf(0, 4096)), buffer)
        np.testing.assert_array_equal(payload, np.concatenate([source[8192:12288], source[:4096]]))
        assert not np.shares_memory(payload, source)

    def test_ragged_mixed_and_many_batches(self, buffer: HostBuffer) -> None:
        source = bytes(buffer.array())
        first = batch_of(dmabuf(5000, 1), linear(0, 3), dmabuf(5001, 4000), host(3, 2), inline=b"abcde")
        second = batch_of(host(2, 2), dmabuf(SIZE - 7, 7), inline=b"..fg")
        payload = gather([first, second], buffer)
        assert payload.tobytes() == source[5000:5001] + b"abc" + source[5001:9001] + b"defg" + source[-7:]

    def test_inline_alone_needs_no_dmabuf(self, buffer: HostBuffer) -> None:
        batch = batch_of(host(0, 5), inline=b"hello")
        assert gather(batch, buffer).tobytes() == b"hello"
        assert gather(batch, {}).tobytes() == b"hello"

    def test_empty(self, buffer: HostBuffer) -> None:
        assert gather(batch_of(), buffer).shape == (0,)
        assert gather([], {}, out=np.empty(3)).shape == (0,)

    def test_several_dmabufs(self, buffer: HostBuffer) -> None:
        with Host().allocate(4096) as other:
            other.array()[:] = 9
            batch = batch_of(dmabuf(10, 2, 5), dmabuf(10, 3, 4))
            expected = bytes(buffer.array()[10:12]) + b"\t\t\t"
            assert gather(batch, {5: buffer, 4: other, 6: buffer}).tobytes() == expected
            with pytest.raises(ValueError, match=r"dma-bufs 4, 5: pass \{dmabuf_id: Buffer\}"):
                gather(batch, buffer)
            with pytest.raises(ValueError, match="dma-buf 4, but a Buffer was given for 5 only"):
                gather(batch, {5: buffer})
            with pytest.raises(ValueError, match="given for none"):
                gather(batch, {})
            assert gather(batch_of(dmabuf(10, 2, 5)), {5: buffer}).base is not None

    @pytest.mark.parametrize("equal", [True, False])
    def test_out(self, equal: bool, buffer: HostBuffer) -> None:
        batch = batch_of(dmabuf(8192, 4096), dmabuf(0, 4096 if equal else 4092))
        expected = gather(batch, buffer)
        out = np.full((5, 1000), -1, np.int32)
        payload = gather(batch, buffer, out=out)
        assert payload.shape == (batch.nbytes,)
        assert payload.ctypes.data == out.ctypes.data
        np.testing.assert_array_equal(payload, expected)
        assert (out.reshape(-1)[batch.nbytes // 4 :] == -1).all()

    def test_out_makes_contiguous_payload_a_copy(self, buffer: HostBuffer) -> None:
        out = np.empty(4096, np.uint8)
        payload = gather(batch_of(dmabuf(4096, 4096)), buffer, out=out)
        assert np.shares_memory(payload, out)
        np.testing.assert_array_equal(payload, buffer.array(offset=4096, count=4096))


class TestEqualSizes:
    """Scattered frags of equal size go by one np.take; long runs are copied one by one."""

    @pytest.fixture
    def takes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        takes: list[int] = []
        real = np.take

        def take(table: npt.NDArray[Any], rows: npt.NDArray[Any], **options: Any) -> Any:
            takes.append(len(rows))
            return real(table, rows, **options)

        monkeypatch.setattr(np, "take", take)
        return takes

    @pytest.mark.parametrize("count", [3, 200])
    def test_scattered(self, count: int, buffer: HostBuffer, takes: list[int]) -> None:
        rows = np.random.default_rng(count).permutation(256)[:count]
        payload = gather(batch_of(*(dmabuf(int(row) * 4096, 4096) for row in rows)), buffer)
        np.testing.assert_array_equal(payload.reshape(-1, 4096), buffer.array().reshape(-1, 4096)[rows])
        assert takes == [count]

    def test_long_runs(self, buffer: HostBuffer, takes: list[int]) -> None:
        rows = [*range(100, 200), *range(50)]
        payload = gather(batch_of(*(dmabuf(row * 4096, 4096) for row in rows)), buffer)
        np.testing.assert_array_equal(payload.reshape(-1, 4096), buffer.array().reshape(-1, 4096)[rows])
        assert takes == []

    def test_width_that_does_not_divide_the_buffer(self, buffer: HostBuffer, takes: list[int]) -> None:
        last = SIZE // 1448 - 1
        payload = gather(batch_of(dmabuf(last * 1448, 1448), dmabuf(0, 1448)), buffer)
        assert payload[:1448].tobytes() == buffer.array(offset=last * 1448, count=1448).tobytes()
        assert takes == [2]


@pytest.mark.usefixtures("way")
class TestWrong:
    BATCH = ((8192, 4096), (0, 4096))

    @pytest.mark.parametrize(
        ("out", "words"),
        [
            (np.empty(8191, np.uint8), "out has 8191 bytes, the payload 8192"),
            (np.empty((64, 256), np.uint8)[:, :200], "C-contiguous"),
            (np.empty((128, 128), np.uint8).T[:, :], "C-contiguous"),
            (np.broadcast_to(np.uint8(0), (8192,)), "C-contiguous"),
            (np.frombuffer(bytes(8192), np.uint8), "read-only"),
            (np.empty(8192, object), "objects"),
        ],
    )
    def test_out(self, out: npt.NDArray[Any], words: str, buffer: HostBuffer) -> None:
        with pytest.raises(ValueError, match=words):
            gather(batch_of(*(dmabuf(*frag) for frag in self.BATCH)), buffer, out=out)

    def test_out_of_another_type(self, buffer: HostBuffer) -> None:
        with pytest.raises(TypeError, match="bytearray"):
            gather(batch_of(dmabuf(0, 1)), buffer, out=bytearray(8))  # type: ignore[arg-type]

    def test_out_in_the_buffer(self, buffer: HostBuffer) -> None:
        before = bytes(buffer.array())
        with pytest.raises(ValueError, match="out lies in the buffer"):
            gather(batch_of(dmabuf(0, 8)), buffer, out=buffer.array(offset=4))
        assert bytes(buffer.array()) == before

    @pytest.mark.parametrize("frags", [[(SIZE - 4, 8)], [(0, 4), (SIZE, 4)], [(0, 4096), (SIZE, 4096)]])
    def test_frag_outside_the_buffer(self, frags: list[tuple[int, int]], buffer: HostBuffer) -> None:
        end = sum(frags[-1])
        with pytest.raises(ValueError, match=f"ends at byte {end} of dma-buf 1, which is {SIZE} bytes long"):
            gather(batch_of(*(dmabuf(*frag) for frag in frags)), buffer)

    def test_frag_outside_inline(self, buffer: HostBuffer) -> None:
        good = batch_of(host(0, 2), inline=b"ab")
        with pytest.raises(ValueError, match="ends at byte 4 of the inline bytes of batch 1, which is 3 bytes long"):
            gather([good, batch_of(host(2, 2), inline=b"abc")], buffer)

    def test_released(self, buffer: HostBuffer) -> None:
        kept, released = batch_of(dmabuf(0, 1)), batch_of(dmabuf(1, 1))
        released.release()
        with pytest.raises(StaleFragError, match="gather"):
            gather([kept, released], buffer)

    def test_closed_buffer(self) -> None:
        closed = Host().allocate(4096)
        closed.close()
        for frags in ([dmabuf(0, 1)], [dmabuf(0, 1), dmabuf(5, 1)]):
            with pytest.raises(ClosedError):
                gather(batch_of(*frags), closed)


class TestCpuAccess:
    """Copies are made inside cpu_access(READ) of every buffer that has pieces, and of no other."""

    @pytest.fixture
    def accesses(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Buffer, CpuAccess]]:
        accesses: list[tuple[Buffer, CpuAccess]] = []
        real = HostBuffer.cpu_access

        @contextlib.contextmanager
        def cpu_access(self: HostBuffer, mode: CpuAccess = CpuAccess.READ_WRITE) -> Iterator[memoryview]:
            accesses.append((self, mode))
            with real(self, mode) as view:
                yield view

        monkeypatch.setattr(HostBuffer, "cpu_access", cpu_access)
        return accesses

    def test_copy(self, buffer: HostBuffer, accesses: list[tuple[Buffer, CpuAccess]]) -> None:
        with Host().allocate(4096) as unused:
            gather(batch_of(dmabuf(0, 1), dmabuf(5, 1)), {1: buffer, 2: unused})
        assert accesses == [(buffer, CpuAccess.READ)]

    def test_view_and_inline(self, buffer: HostBuffer, accesses: list[tuple[Buffer, CpuAccess]]) -> None:
        gather(batch_of(dmabuf(0, 1)), buffer)
        gather(batch_of(host(0, 1), inline=b"x"), buffer)
        assert accesses == []
