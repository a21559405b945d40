"""Udmabuf and DmaHeap against a model of the kernel's exporters that checks every number, byte and order."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from devmem_tcp.buffers import Allocator, CpuAccess
from devmem_tcp.errors import BusyError, ClosedError, KernelError, LeakWarning, OutOfDeviceMemory
from devmem_tcp.memory import DmaHeap, Udmabuf
from devmem_tcp.memory.dmabuf import DmabufBuffer
from devmem_tcp.sys import calls
from devmem_tcp.testing.faults import sweep

MIB = 1 << 20
SIZE_LIMIT = "/sys/module/udmabuf/parameters/size_limit_mb"

# asm-generic _IOC, worked out by hand: direction << 30 | size << 16 | letter << 8 | number
UDMABUF_CREATE = 1 << 30 | 24 << 16 | ord("u") << 8 | 0x42
DMA_HEAP_IOCTL_ALLOC = 3 << 30 | 24 << 16 | ord("H") << 8 | 0
DMA_BUF_IOCTL_SYNC = 1 << 30 | 8 << 16 | ord("b") << 8 | 0


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


class Exporters:
    """/dev/udmabuf, /dev/dma_heap/system and their dma-bufs; memory files stand for dma-bufs.

    ``log`` holds what was asked of them, ``refusals`` the errnos to answer the next ioctls with.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, int]] = []
        self.refusals: list[int] = []
        self.size_limit_mb: str | None = "64\n"
        self._nodes: dict[int, str] = {}
        self._dmabufs: set[int] = set()
        monkeypatch.setattr(calls, "open_device", self.open_device)
        monkeypatch.setattr(calls, "ioctl", self.ioctl)
        monkeypatch.setattr(calls, "read_text", self.read_text)

    def open_device(self, path: str) -> int:
        calls._enter("open")
        if path not in ("/dev/udmabuf", "/dev/dma_heap/system"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._nodes[fd] = path
        return fd

    def read_text(self, path: str) -> str:
        calls._enter("open")
        if path == "/proc/meminfo":
            return "MemAvailable:    1048576 kB\n"
        assert path == SIZE_LIMIT
        if self.size_limit_mb is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return self.size_limit_mb

    def ioctl(self, fd: int, request: int, argument: bytes | bytearray) -> int:
        calls._enter("ioctl")
        if self.refusals:
            number = self.refusals.pop(0)
            raise OSError(number, os.strerror(number))
        if request == UDMABUF_CREATE:
            return self._udmabuf_create(fd, argument)
        if request == DMA_HEAP_IOCTL_ALLOC:
            return self._heap_alloc(fd, argument)
        assert request == DMA_BUF_IOCTL_SYNC, hex(request)
        assert inode(fd) in self._dmabufs
        self.log.append(("sync", struct.unpack("=Q", argument)[0]))
        return 0

    def _udmabuf_create(self, fd: int, argument: bytes | bytearray) -> int:
        assert isinstance(argument, bytearray)  # or the seam would lose the fd that the ioctl returns
        assert self._nodes[fd] == "/dev/udmabuf"
        memfd, flags, offset, size = struct.unpack("=IIQQ", argument)
        assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SHRINK
        assert (flags, offset, os.fstat(memfd).st_size) == (1, 0, size)
        self.log.append(("udmabuf", size))
        return self._export(os.dup(memfd))

    def _heap_alloc(self, fd: int, argument: bytes | bytearray) -> int:
        assert isinstance(argument, bytearray)
        assert self._nodes[fd] == "/dev/dma_heap/system"
        size, answer, fd_flags, heap_flags = struct.unpack("=QIIQ", argument)
        assert (answer, fd_flags, heap_flags) == (0, os.O_RDWR | os.O_CLOEXEC, 0)
        dmabuf_fd = os.memfd_create("heap", os.MFD_CLOEXEC)
        os.ftruncate(dmabuf_fd, size)
        argument[8:12] = struct.pack("=I", dmabuf_fd)
        self.log.append(("heap", size))
        return self._export(dmabuf_fd) and 0

    def _export(self, fd: int) -> int:
        self._dmabufs.add(inode(fd))
        return fd


@pytest.fixture
def exporters(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exporters]:
    before = open_fds()
    yield Exporters(monkeypatch)
    assert open_fds() == before


BOTH = pytest.mark.parametrize("allocator", [Udmabuf(), DmaHeap()], ids=repr)


@BOTH
class TestBuffer:
    def test_allocate(self, allocator: Allocator, exporters: Exporters) -> None:
        before = open_fds()
        with allocator.allocate(2 * MIB) as buffer:
            assert open_fds() == before + 1  # the dma-buf alone: neither the node nor the memory file
            assert buffer.dmabuf_fd is not None
            assert os.fstat(buffer.dmabuf_fd).st_size == buffer.size_bytes == 2 * MIB
            name = {"Udmabuf()": ("udmabuf", "udmabuf"), "DmaHeap('system')": ("dma-heap system", "heap")}
            kind, asked = name[repr(allocator)]
            assert buffer.kind == kind
            assert repr(buffer) == f"<DmabufBuffer {kind}, {2 * MIB} bytes, open>"
        assert exporters.log == [(asked, 2 * MIB)]

    def test_views_are_the_dmabuf(self, allocator: Allocator, exporters: Exporters) -> None:
        with allocator.allocate(8192) as buffer:
            fd = buffer.dmabuf_fd
            assert fd is not None
            buffer.array(np.uint16, offset=4096, count=1)[0] = 0x0201
            np.from_dlpack(buffer)[4098] = 3
            with buffer.view() as view:
                assert (len(view), bytes(view[4096:4100])) == (8192, b"\1\2\3\0")
            assert os.pread(fd, 4, 4096) == b"\1\2\3\0"

    def test_closed_is_closed(self, allocator: Allocator, exporters: Exporters) -> None:
        buffer = allocator.allocate(4096)
        fd = buffer.dmabuf_fd
        assert fd is not None
        buffer.close()
        buffer.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        uses: list[Callable[[], object]] = [
            buffer.view,
            buffer.array,
            lambda: buffer.dmabuf_fd,
            lambda: buffer.cpu_access().__enter__(),
        ]
        for use in uses:
            with pytest.raises(ClosedError, match="is closed"):
                use()

    def test_busy_while_looked_at_keeps_the_fd(self, allocator: Allocator, exporters: Exporters) -> None:
        buffer = allocator.allocate(4096)
        array = buffer.array()
        with pytest.raises(BusyError, match=buffer.kind):
            buffer.close()
        with buffer.cpu_access(CpuAccess.READ):
            assert array[0] == 0
        del array
        buffer.close()

    def test_dropped(self, allocator: Allocator, exporters: Exporters) -> None:
        before = open_fds()
        buffer = allocator.allocate(4096)
        buffer.array()[0] = 1
        with pytest.warns(LeakWarning, match="DmabufBuffer"):
            del buffer
        assert open_fds() == before

    def test_every_call_failing(self, allocator: Allocator, exporters: Exporters) -> None:
        wanted = {
            "Udmabuf()": ["open", "memfd_create", "ftruncate", "fcntl", "ioctl", "mmap", "ioctl", "ioctl"],
            "DmaHeap('system')": ["open", "ioctl", "mmap", "ioctl", "ioctl"],
        }

        def scenario() -> None:
            with allocator.allocate(8192) as buffer, buffer.cpu_access() as view:
                view[0] = 1

        runs = sweep(scenario, errnos=(errno.EIO,))
        assert [run.call for run in runs if run.outcome != "passed"] == wanted[repr(allocator)]
        assert all(run.outcome.startswith(("KernelError: ", "passed")) for run in runs)

    def test_bad_sizes(self, allocator: Allocator, exporters: Exporters) -> None:
        for size in (0, -4096, 4097):
            with pytest.raises(ValueError, match="buffer size"):
                allocator.allocate(size)
        assert exporters.log == []

    def test_no_memory(self, allocator: Allocator, exporters: Exporters) -> None:
        exporters.refusals = [errno.ENOMEM]
        with pytest.raises(OutOfDeviceMemory, match=r"ioctl\(.*no memory for 8192 bytes") as caught:
            allocator.allocate(8192)
        assert (caught.value.wanted, caught.value.free) == (8192, 1 << 30)


@BOTH
class TestCpuAccess:
    @pytest.mark.parametrize(("mode", "start", "end"), [(CpuAccess.READ, 1, 5), (CpuAccess.WRITE, 2, 6)])
    def test_start_and_end(
        self, allocator: Allocator, mode: CpuAccess, start: int, end: int, exporters: Exporters
    ) -> None:
        with allocator.allocate(4096) as buffer:
            exporters.log.clear()
            with buffer.cpu_access(mode) as view:
                assert exporters.log == [("sync", start)]
                view[0] = 1
            assert exporters.log == [("sync", start), ("sync", end)]
            with pytest.raises(ValueError, match="released"):
                view[0] = 2

    def test_reads_and_writes_by_default(self, allocator: Allocator, exporters: Exporters) -> None:
        with allocator.allocate(4096) as buffer:
            exporters.log.clear()
            with buffer.cpu_access():
                pass
            assert exporters.log == [("sync", 3), ("sync", 7)]

    def test_ends_when_the_block_raises(self, allocator: Allocator, exporters: Exporters) -> None:
        with allocator.allocate(4096) as buffer:
            exporters.log.clear()
            with pytest.raises(ZeroDivisionError), buffer.cpu_access():
                raise ZeroDivisionError
            assert exporters.log == [("sync", 3), ("sync", 7)]

    def test_restarts_when_told_so(self, allocator: Allocator, exporters: Exporters) -> None:
        with allocator.allocate(4096) as buffer:
            exporters.log.clear()
            exporters.refusals = [errno.EINTR, errno.EAGAIN, errno.EINTR]
            with buffer.cpu_access(CpuAccess.READ):
                assert exporters.refusals == []
                exporters.refusals = [errno.EAGAIN]
            assert exporters.log == [("sync", 1), ("sync", 5)]

    def test_refused(self, allocator: Allocator, exporters: Exporters) -> None:
        with allocator.allocate(4096) as buffer:
            exporters.log.clear()
            exporters.refusals = [errno.EINVAL]
            with pytest.raises(KernelError, match="DMA_BUF_IOCTL_SYNC"), buffer.cpu_access():
                pytest.fail("the block must not run")
            assert exporters.log == []  # nothing was started: nothing to end


class TestUdmabuf:
    def test_over_the_size_limit(self, exporters: Exporters) -> None:
        Udmabuf().allocate(64 * MIB).close()
        with pytest.raises(OutOfDeviceMemory, match=f"{SIZE_LIMIT} is 64") as caught:
            Udmabuf().allocate(64 * MIB + 4096)
        assert (caught.value.wanted, caught.value.free) == (64 * MIB + 4096, 64 * MIB)
        assert caught.value.hint == f"echo 65 | sudo tee {SIZE_LIMIT}"
        assert exporters.log == [("udmabuf", 64 * MIB)]

    def test_another_size_limit(self, exporters: Exporters) -> None:
        exporters.size_limit_mb = "1\n"
        with pytest.raises(OutOfDeviceMemory):
            Udmabuf().allocate(2 * MIB)
        Udmabuf().allocate(MIB).close()

    def test_more_than_the_machine_has(self, exporters: Exporters) -> None:
        exporters.size_limit_mb = "4096\n"
        with pytest.raises(OutOfDeviceMemory, match="MemAvailable"):
            Udmabuf().allocate((1 << 30) + 4096)
        assert exporters.log == []

    @pytest.mark.parametrize("text", [None, "", "many\n"])
    def test_hidden_size_limit(self, text: str | None, exporters: Exporters) -> None:
        exporters.size_limit_mb = text
        Udmabuf().allocate(65 * MIB).close()
        exporters.refusals = [errno.EINVAL]
        with pytest.raises(KernelError, match=rf"UDMABUF_CREATE(.|\n)*{SIZE_LIMIT} allows \(64 MiB") as caught:
            Udmabuf().allocate(65 * MIB)
        assert caught.value.errno == errno.EINVAL


class TestNodes:
    """Device nodes that cannot be opened: the error names the node, the hint what to do."""

    @pytest.mark.parametrize(
        ("allocator", "node", "hint"),
        [
            (Udmabuf(), "/dev/udmabuf", "modprobe udmabuf.*CONFIG_UDMABUF"),
            (DmaHeap(), "/dev/dma_heap/system", "CONFIG_DMABUF_HEAPS_SYSTEM"),
            (DmaHeap("cma"), "/dev/dma_heap/cma", "ls /dev/dma_heap"),
        ],
    )
    def test_missing(self, allocator: Allocator, node: str, hint: str) -> None:
        with calls.intercept(self._refuse(errno.ENOENT)), pytest.raises(KernelError, match=hint) as caught:
            allocator.allocate(4096)
        assert (caught.value.errno, caught.value.call) == (errno.ENOENT, f"open {node}")

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
    @pytest.mark.parametrize(
        ("allocator", "node", "rule"),
        [
            (Udmabuf(), "/dev/udmabuf", 'KERNEL=="udmabuf", GROUP='),
            (DmaHeap(), "/dev/dma_heap/system", 'SUBSYSTEM=="dma_heap", KERNEL=="system", GROUP='),
        ],
    )
    def test_not_permitted(self, allocator: Allocator, node: str, rule: str, number: int) -> None:
        with calls.intercept(self._refuse(number)), pytest.raises(KernelError, match="group") as caught:
            allocator.allocate(4096)
        assert (caught.value.errno, caught.value.call) == (number, f"open {node}")
        assert rule in caught.value.hint
        assert ("container" in caught.value.hint) == (number == errno.EPERM)

    @staticmethod
    def _refuse(number: int) -> calls.Hook:
        def refuse(name: str) -> None:
            assert name == "open"
            raise OSError(number, os.strerror(number))

        return refuse

    @pytest.mark.parametrize("name", ["", "/dev/mem", "..", "a/b"])
    def test_bad_heap_names(self, name: str) -> None:
        with pytest.raises(ValueError, match="/dev/dma_heap"):
            DmaHeap(name)


class TestMapping:
    def test_without_cpu_access_the_buffer_stays(self, exporters: Exporters) -> None:
        def refuse(name: str) -> None:
            if name == "mmap":
                raise OSError(errno.EINVAL, "Invalid argument")

        with DmaHeap().allocate(4096) as buffer:
            with calls.intercept(refuse), pytest.raises(KernelError, match="can still be bound") as caught:
                buffer.view()
            assert caught.value.call == "mmap(dma-heap system)"
            assert buffer.dmabuf_fd is not None

    def test_threads_share_one_map(self, exporters: Exporters, monkeypatch: pytest.MonkeyPatch) -> None:
        threads, both = 8, threading.Barrier(8)
        maps: list[int] = []
        real = calls.map_memory

        def map_memory(fd: int, size_bytes: int, flags: int) -> calls.MemoryMap:
            maps.append(fd)
            return real(fd, size_bytes, flags)

        monkeypatch.setattr(calls, "map_memory", map_memory)
        with DmaHeap().allocate(4096) as buffer:

            def look() -> None:
                both.wait()
                buffer.array()[0] += 1

            workers = [threading.Thread(target=look) for _ in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            assert maps == [buffer.dmabuf_fd]

    def test_closed_inside_cpu_access(self, exporters: Exporters) -> None:
        buffer = DmaHeap().allocate(4096)
        assert isinstance(buffer, DmabufBuffer)
        with pytest.raises(BusyError), buffer.cpu_access():
            buffer.close()
        assert exporters.log[-2:] == [("sync", 3), ("sync", 7)]
        buffer.close()
