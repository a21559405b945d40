"""Host memory, and what every mapped Buffer does: views, NumPy, DLPack, closing."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from devmem_tcp.buffers import Buffer, BufferUse, CpuAccess
from devmem_tcp.errors import BusyError, ClosedError, KernelError, LeakWarning, OutOfDeviceMemory
from devmem_tcp.memory import Host, HostKind, Hugepages
from devmem_tcp.sys import calls
from devmem_tcp.testing.faults import sweep

MIB = 1 << 20
HUGE = 2 * MIB
KINDS = ["anonymous", "memfd"]

MEMINFO = "MemAvailable:  8388608 kB\nHugePages_Total:   5\nHugePages_Free:    {free}\nHugepagesize:    2048 kB\n"


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def fake_files(
    monkeypatch: pytest.MonkeyPatch, *, free_huge_pages: int = 0, thp: str = "never", shmem_thp: str = "never"
) -> None:
    """Make /proc/meminfo and the transparent huge page settings say this, whatever the machine says."""
    texts = {
        "/proc/meminfo": MEMINFO.format(free=free_huge_pages),
        "/sys/kernel/mm/transparent_hugepage/enabled": choice(thp, "always", "madvise", "never"),
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled": choice(
            shmem_thp, "always", "within_size", "advise", "never", "deny", "force"
        ),
    }

    def read_text(path: str) -> str:
        calls._enter("open")
        return texts[path]

    monkeypatch.setattr(calls, "read_text", read_text)


def choice(chosen: str, *words: str) -> str:
    """Spell a choice as sysfs does: all words, the chosen one in brackets."""
    assert chosen in words
    return " ".join(f"[{word}]" if word == chosen else word for word in words) + "\n"


@pytest.mark.parametrize("kind", KINDS)
class TestBytes:
    def test_zeroed_and_writable(self, kind: str) -> None:
        with Host(kind).allocate(12288) as buffer:
            with buffer.cpu_access(CpuAccess.READ_WRITE) as view:
                assert (view.format, view.shape, view.readonly) == ("B", (12288,), False)
                assert bytes(view) == bytes(12288)
                view[4096:4100] = b"abcd"
            assert bytes(buffer.array()[4095:4101]) == b"\0abcd\0"
            assert buffer.size_bytes == 12288

    def test_views_share_memory(self, kind: str) -> None:
        with Host(kind).allocate(4096) as buffer:
            buffer.array(np.uint32, offset=8, count=2)[:] = (1, 0x01020304)
            with buffer.view() as view:
                assert bytes(view[8:16]) == b"\1\0\0\0\4\3\2\1"
                view[8] = 7
            np.testing.assert_array_equal(np.from_dlpack(buffer)[8:16], [7, 0, 0, 0, 4, 3, 2, 1])

    def test_kind_and_repr(self, kind: str) -> None:
        with Host(kind).allocate(4096) as buffer:
            assert buffer.kind == f"host {kind}"
            assert buffer.dmabuf_fd is None
            assert repr(buffer) == f"<HostBuffer host {kind}, 4096 bytes, open>"
        assert repr(buffer) == f"<HostBuffer host {kind}, 4096 bytes, closed>"

    def test_prefault_touches_every_page(self, kind: str) -> None:
        size = 16 * MIB
        with Host(kind, prefault=False).allocate(size) as untouched:
            assert resident_bytes(untouched) == 0
        with Host(kind).allocate(size) as touched:
            assert resident_bytes(touched) >= size

    def test_fds_come_and_go(self, kind: str) -> None:
        before = open_fds()
        buffer = Host(kind).allocate(4096)
        buffer.close()
        buffer.close()
        assert open_fds() == before
        assert buffer.closed

    @pytest.mark.parametrize(("pages", "pool"), [("off", 0), ("try", 0), ("require", 99)])
    def test_every_call_failing(self, kind: str, pages: str, pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_files(monkeypatch, free_huge_pages=pool, thp="always", shmem_thp="always")
        HugePool(monkeypatch, pages=pool)
        runs = sweep(lambda: Host(kind, pages).allocate(8192).close(), errnos=(errno.EIO,))
        assert [run.call for run in runs if run.outcome != "passed"] == [
            *(["open"] if pages == "require" else []),
            *(["memfd_create", "ftruncate", "mmap"] if kind == "memfd" else ["mmap"]),
        ]


def resident_bytes(buffer: Buffer) -> int:
    """Return how much of a buffer's map is in memory (Rss of /proc/self/smaps)."""
    with open("/proc/self/smaps", encoding="ascii") as file:
        lines = file.read().splitlines()
    start = buffer.array().ctypes.data
    at = next(
        number
        for number, line in enumerate(lines)
        if "-" in (bounds := line.split(maxsplit=1)[0])
        and not bounds.endswith(":")
        and int(bounds.split("-")[0], 16) <= start < int(bounds.split("-")[1], 16)
    )
    rss = next(line for line in lines[at:] if line.startswith("Rss:"))
    return int(rss.split()[1]) * 1024


class TestArray:
    @pytest.mark.parametrize(
        ("options", "shape"),
        [
            ({}, (8192,)),
            ({"dtype": np.float64}, (1024,)),
            ({"dtype": np.uint16, "offset": 3, "count": 2}, (2,)),
            ({"offset": 8192}, (0,)),
            ({"count": 0}, (0,)),
            ({"dtype": np.dtype([("a", "<u4"), ("b", "u1")]), "offset": 2}, (1638,)),
        ],
    )
    def test_shapes(self, options: dict[str, Any], shape: tuple[int, ...]) -> None:
        with Host().allocate(8192) as buffer:
            array = buffer.array(**options)
            assert array.shape == shape
            assert array.dtype == np.dtype(options.get("dtype", np.uint8))
            assert array.flags.writeable
            del array

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"offset": 1, "dtype": np.uint16}, "no whole number"),
            ({"offset": -1}, "offset -1 is outside"),
            ({"offset": 8193}, "offset 8193 is outside"),
            ({"offset": 8190, "count": 3}, "end at byte 8193"),
            ({"count": -2}, "count"),
            ({"dtype": object}, "no fixed size"),
            ({"dtype": "S0"}, "no fixed size"),
        ],
    )
    def test_bad_ranges(self, options: dict[str, Any], words: str) -> None:
        with Host().allocate(8192) as buffer, pytest.raises(ValueError, match=words):
            buffer.array(**options)


class TestDlpack:
    def test_device_is_the_cpu(self) -> None:
        with Host().allocate(4096) as buffer:
            assert buffer.__dlpack_device__() == (1, 0)

    def test_keywords_are_numpys(self) -> None:
        with Host().allocate(4096) as buffer:
            # Copied: writes are not seen.
            copied = np.from_dlpack(buffer, copy=True)
            shared = np.from_dlpack(buffer, copy=False, device="cpu")
            shared[0] = 9
            assert (buffer.array()[0], copied[0]) == (9, 0)
            del copied, shared
            assert "dltensor_versioned" in repr(buffer.__dlpack__(max_version=(1, 0), stream=None))
            with pytest.raises(BufferError):
                buffer.__dlpack__(dl_device=(2, 0))
            with pytest.raises(RuntimeError, match="stream"):
                buffer.__dlpack__(stream=1)


@pytest.mark.parametrize("kind", KINDS)
class TestClose:
    EXPORTS: tuple[Callable[[Buffer], Any], ...] = (
        lambda buffer: buffer.view(),
        lambda buffer: buffer.view()[10:20],
        lambda buffer: buffer.array(),
        lambda buffer: buffer.array(np.float32, offset=4, count=6)[::2],
        lambda buffer: buffer.array().reshape(-1, 64).T,
        lambda buffer: np.from_dlpack(buffer),
        lambda buffer: buffer.__dlpack__(),
        lambda buffer: buffer.array().data,
    )

    @pytest.mark.parametrize("export", EXPORTS)
    def test_busy_while_looked_at(self, kind: str, export: Callable[[Buffer], Any]) -> None:
        buffer = Host(kind).allocate(4096)
        alive = export(buffer)
        with pytest.raises(BusyError, match="hint: drop them"):
            buffer.close()
        assert not buffer.closed
        buffer.array()[0] = 1
        del alive
        buffer.close()
        assert buffer.closed

    def test_busy_while_held(self, kind: str) -> None:
        buffer = Host(kind).allocate(4096)
        pin = buffer.pin("binding 7", BufferUse.RX)
        with pytest.raises(BusyError, match="binding 7"):
            buffer.close()
        assert bytes(buffer.array()[:2]) == b"\0\0"
        buffer.unpin(pin)
        buffer.close()

    def test_closed_is_closed(self, kind: str) -> None:
        buffer = Host(kind).allocate(4096)
        buffer.close()
        uses: list[Callable[[], object]] = [
            buffer.view,
            buffer.array,
            buffer.__dlpack__,
            buffer.__dlpack_device__,
            lambda: buffer.memfd,
            lambda: buffer.pin("x", BufferUse.TX),
            lambda: buffer.cpu_access().__enter__(),
        ]
        for use in uses:
            with pytest.raises(ClosedError, match="allocate"):
                use()

    def test_cpu_access_view_ends_with_the_block(self, kind: str) -> None:
        with Host(kind).allocate(4096) as buffer:
            with buffer.cpu_access() as view:
                pass
            with pytest.raises(ValueError, match="released"):
                len(view)

    def test_cpu_access_leaves_exports_of_the_view_alone(self, kind: str) -> None:
        with Host(kind).allocate(4096) as buffer:
            with buffer.cpu_access() as view:
                export = pickle.PickleBuffer(view)
            assert len(view) == len(export.raw()) == 4096
            export.release()
            view.release()

    def test_with_raises_busy(self, kind: str) -> None:
        before = open_fds()
        buffer = Host(kind).allocate(4096)
        view = buffer.view()
        with pytest.raises(BusyError), buffer:
            pass
        view.release()
        buffer.close()
        assert open_fds() == before

    def test_an_exception_is_not_hidden_by_views(self, kind: str) -> None:
        before = open_fds()
        buffer = Host(kind).allocate(4096)
        array = buffer.array()
        array[0] = 5
        with pytest.raises(ZeroDivisionError), buffer:
            raise ZeroDivisionError
        assert buffer.closed
        assert array[0] == 5  # mapped until the last view goes
        del array
        gc.collect()
        assert open_fds() == before

    def test_an_exception_is_not_hidden_by_a_holder(self, kind: str) -> None:
        buffer = Host(kind).allocate(4096)
        pin = buffer.pin("binding 7", BufferUse.RX)
        with pytest.raises(ZeroDivisionError) as caught, buffer:
            raise ZeroDivisionError
        assert "binding 7" in caught.value.__notes__[0]
        assert not buffer.closed
        buffer.unpin(pin)
        buffer.close()

    def test_dropped(self, kind: str) -> None:
        before = open_fds()
        buffer = Host(kind).allocate(4096)
        with pytest.warns(LeakWarning, match=f"HostBuffer host {kind}, 4096 bytes, open"):
            del buffer
        assert open_fds() == before

    def test_dropped_with_a_view_alive(self, kind: str) -> None:
        buffer = Host(kind).allocate(4096)
        view = buffer.view()
        with pytest.warns(LeakWarning):
            del buffer
        view[4095] = 1
        view.release()


def test_silent_at_interpreter_exit() -> None:
    program = (
        "import warnings; warnings.simplefilter('error')\n"
        "from devmem_tcp.memory import Host\n"
        "kept = [Host(kind).allocate(4096) for kind in ('memfd', 'anonymous')]\n"
        "kept.append(kept)\n"  # a cycle: found when modules are gone
        "kept.append(kept[0].array())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_memfd_is_the_memory() -> None:
    with Host(HostKind.MEMFD).allocate(8192) as buffer:
        buffer.array()[4096:4099] = (1, 2, 3)
        assert buffer.memfd is not None
        assert os.pread(buffer.memfd, 4, 4096) == b"\1\2\3\0"
        assert not os.get_inheritable(buffer.memfd)
    with Host().allocate(4096) as anonymous:
        assert anonymous.memfd is None


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="'ramdisk'"):
        Host("ramdisk")
    with pytest.raises(ValueError, match="'perhaps'"):
        Host(hugepages="perhaps")
    for size, words in ((0, "positive"), (-4096, "positive"), (5000, "use 8192")):
        with pytest.raises(ValueError, match=words):
            Host().allocate(size)
    assert repr(Host("memfd", "try", prefault=False)) == "Host(kind='memfd', hugepages='try', prefault=False)"


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_there_is(kind: str) -> None:
    before = open_fds()
    with pytest.raises(OutOfDeviceMemory, match="available") as caught:
        Host(kind).allocate(1 << 50)
    assert caught.value.wanted == 1 << 50
    assert 0 < caught.value.free < 1 << 50
    assert caught.value.hint
    assert open_fds() == before


def test_prefault_looks_before_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "read_text", lambda path: "MemAvailable:  4 kB\n")
    with pytest.raises(OutOfDeviceMemory, match="MemAvailable") as caught:
        Host().allocate(8192)
    assert (caught.value.wanted, caught.value.free) == (8192, 4096)
    Host().allocate(4096).close()
    Host(prefault=False).allocate(8192).close()


def test_kernel_says_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_files(monkeypatch)

    def refuse(name: str) -> None:
        if name == "mmap":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with calls.intercept(refuse), pytest.raises(OutOfDeviceMemory, match="overcommit") as caught:
        Host().allocate(4096)
    assert (caught.value.wanted, caught.value.free) == (4096, 8 << 30)


@pytest.mark.parametrize(("name", "call"), [("memfd_create", "memfd_create"), ("ftruncate", "ftruncate(memfd_create)")])
def test_the_refused_call_is_named(name: str, call: str) -> None:
    def refuse(entered: str) -> None:
        if entered == name:
            raise OSError(errno.EMFILE, "Too many open files")

    with calls.intercept(refuse), pytest.raises(KernelError, match="EMFILE") as caught:
        Host("memfd").allocate(4096)
    assert (caught.value.errno, caught.value.call) == (errno.EMFILE, call)


class HugePool:
    """A huge page pool: takes the flags and sizes that hugetlbfs takes, and maps ordinary memory instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, pages: int) -> None:
        self.pages = pages
        self.taken = 0
        self._huge_fds: set[int] = set()
        self._map, self._memfd, self._truncate = calls.map_memory, calls.memfd_create, calls.truncate
        monkeypatch.setattr(calls, "map_memory", self.map_memory)
        monkeypatch.setattr(calls, "memfd_create", self.memfd_create)
        monkeypatch.setattr(calls, "truncate", self.truncate)

    def map_memory(self, fd: int, size_bytes: int, flags: int) -> calls.MemoryMap:
        if flags & calls.MAP_HUGETLB or fd in self._huge_fds:
            assert size_bytes % HUGE == 0
            if self.taken + size_bytes // HUGE > self.pages:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            self.taken += size_bytes // HUGE
        return self._map(fd, size_bytes, flags & ~calls.MAP_HUGETLB)

    def memfd_create(self, name: str, flags: int = 0) -> int:
        fd = self._memfd(name, flags & ~calls.MFD_HUGETLB)
        (self._huge_fds.add if flags & calls.MFD_HUGETLB else self._huge_fds.discard)(fd)
        return fd

    def truncate(self, fd: int, size_bytes: int) -> None:
        assert fd not in self._huge_fds or size_bytes % HUGE == 0
        self._truncate(fd, size_bytes)


@pytest.mark.parametrize("kind", KINDS)
class TestHugepages:
    @pytest.mark.parametrize("pages", ["try", "require"])
    def test_from_the_pool(self, kind: str, pages: str, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_files(monkeypatch, free_huge_pages=5)
        pool = HugePool(monkeypatch, pages=5)
        with Host(kind, pages).allocate(HUGE + 4096) as buffer:
            assert pool.taken == 2
            assert buffer.kind == f"host {kind}, huge pages"
            assert (len(buffer.view()), len(buffer.array())) == (HUGE + 4096, HUGE + 4096)

    def test_require_says_how_many_more(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_files(monkeypatch, free_huge_pages=1)
        HugePool(monkeypatch, pages=1)
        before = open_fds()
        with pytest.raises(OutOfDeviceMemory) as caught:
            Host(kind, Hugepages.REQUIRE).allocate(3 * HUGE)
        assert caught.value.hint == "sudo sysctl vm.nr_hugepages=7"  # 5 there are, 1 of them free, 3 wanted
        assert (caught.value.wanted, caught.value.free) == (3 * HUGE, HUGE)
        assert open_fds() == before

    def test_require_without_kernel_support(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calls, "read_text", lambda path: "MemAvailable: 8388608 kB\n")
        with pytest.raises(KernelError, match="CONFIG_HUGETLBFS") as caught:
            Host(kind, "require").allocate(4096)
        assert caught.value.errno == errno.EOPNOTSUPP

    @pytest.mark.parametrize("allowed", [True, False])
    def test_try_falls_back(self, kind: str, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        anonymous, shmem = ("madvise", "deny") if (kind == "anonymous") == allowed else ("never", "advise")
        fake_files(monkeypatch, thp=anonymous, shmem_thp=shmem)
        HugePool(monkeypatch, pages=0)
        advised: list[int] = []
        monkeypatch.setattr(calls, "advise", lambda mapping, advice: advised.append(advice))
        with Host(kind, "try").allocate(HUGE) as buffer:
            assert buffer.kind == f"host {kind}" + (", transparent huge pages advised" if allowed else "")
        assert advised == ([calls.MADV_HUGEPAGE] if allowed else [])

    def test_try_without_any(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_files(monkeypatch, thp="madvise", shmem_thp="advise")
        HugePool(monkeypatch, pages=0)

        def refuse(name: str) -> None:
            if name == "madvise":
                raise OSError(errno.EINVAL, "Invalid argument")

        with calls.intercept(refuse), contextlib.closing(Host(kind, "try").allocate(HUGE)) as buffer:
            assert buffer.kind == f"host {kind}"
