"""Ordinary host memory: works on any machine, with the software backend. A NIC cannot be bound to it."""

from __future__ import annotations

import errno
from enum import Enum
from typing import Final

from devmem_tcp.buffers import Allocator, check_buffer_size
from devmem_tcp.errors import KernelError, OutOfDeviceMemory
from devmem_tcp.memory.mapped import MappedBuffer
from devmem_tcp.memory.refusals import check_available, meminfo, refusals
from devmem_tcp.sys import calls
from devmem_tcp.types import PAGE_SIZE

_NO_MEMORY: Final = "allocate less; also look at `ulimit -v` and `sysctl vm.overcommit_memory`"
_NO_HUGETLB: Final = "huge pages need a kernel with CONFIG_HUGETLBFS; use hugepages='try' to do without"
_THP: Final = "/sys/kernel/mm/transparent_hugepage/"


class HostKind(Enum):
    """How host memory is mapped."""

    ANONYMOUS = "anonymous"
    """Private to this process: after a fork, parent and child no longer see each other's writes."""
    MEMFD = "memfd"
    """A memory file: forked children see the same bytes, and ``HostBuffer.memfd`` can be handed to other processes."""


class Hugepages(Enum):
    """Whether memory is made of huge pages (2 MiB on x86-64)."""

    OFF = "off"
    TRY = "try"
    """From the system's huge page pool; where that has none left, advise transparent huge pages instead."""
    REQUIRE = "require"
    """From the system's huge page pool, or an error."""


class HostBuffer(MappedBuffer):
    """Host memory. Made by ``Host``."""

    @property
    def dmabuf_fd(self) -> int | None:
        """None: host memory is not a dma-buf."""
        return None

    @property
    def memfd(self) -> int | None:
        """The memory file's fd, valid until ``close()``; None for anonymous memory. It may be larger than the buffer.

        Raises:
            ClosedError: the buffer is closed.
        """
        self._check_open()
        return self._fd


class Host(Allocator):
    """Allocate ordinary host memory.

    Args:
        kind: a HostKind or its value, ``"anonymous"`` or ``"memfd"``.
        hugepages: a Hugepages or its value, ``"off"``, ``"try"`` or ``"require"``. ``Buffer.kind`` says what was got.
        prefault: touch every page now, so that the first receive does not pay for page faults.

    Kernel: mmap(2), with memfd_create(2) and ftruncate(2) for MEMFD; MAP_HUGETLB or MFD_HUGETLB for huge pages,
    madvise(MADV_HUGEPAGE) for transparent ones (Documentation/admin-guide/mm/hugetlbpage.rst, transhuge.rst).
    """

    def __init__(
        self,
        kind: HostKind | str = HostKind.ANONYMOUS,
        hugepages: Hugepages | str = Hugepages.OFF,
        prefault: bool = True,
    ) -> None:
        self.kind: Final = HostKind(kind)
        self.hugepages: Final = Hugepages(hugepages)
        self.prefault: Final = prefault

    def allocate(self, size_bytes: int) -> HostBuffer:
        """Allocate ``size_bytes`` of zeroed host memory, a positive multiple of 4096.

        Raises:
            ValueError: size is zero, negative or not page-aligned.
            OutOfDeviceMemory: more than there is; with ``REQUIRE``, more than there are free huge pages.
            KernelError: a call failed otherwise, for instance EMFILE.
        """
        check_buffer_size(size_bytes)
        buffer = self._map_best(size_bytes)
        if self.prefault:
            buffer.array()[::PAGE_SIZE] = 0  # one store a page
        return buffer

    def __repr__(self) -> str:
        return f"Host(kind={self.kind.value!r}, hugepages={self.hugepages.value!r}, prefault={self.prefault})"

    def _map_best(self, size_bytes: int) -> HostBuffer:
        name = f"host {self.kind.value}"
        if self.hugepages is not Hugepages.OFF:
            try:
                mapping, memfd = self._map_hugetlb(size_bytes)
            except (KernelError, OutOfDeviceMemory):
                if self.hugepages is Hugepages.REQUIRE:
                    raise
            else:
                return HostBuffer(size_bytes, f"{name}, huge pages", mapping=mapping, fd=memfd)
        if self.prefault:
            check_available(size_bytes)
        mapping, memfd = self._map(size_bytes, hugetlb=False, free=None, no_memory=_NO_MEMORY)
        if self.hugepages is Hugepages.TRY and self._advise_huge(mapping):
            name += ", transparent huge pages advised"
        return HostBuffer(size_bytes, name, mapping=mapping, fd=memfd)

    def _map_hugetlb(self, size_bytes: int) -> tuple[calls.MemoryMap, int | None]:
        system = meminfo()
        page_bytes = system.get("Hugepagesize", 0)
        if page_bytes == 0:
            raise KernelError(errno.EOPNOTSUPP, "mmap(MAP_HUGETLB)", hint=_NO_HUGETLB)
        pages = -(-size_bytes // page_bytes)
        free_pages = system.get("HugePages_Free", 0)
        pool = system.get("HugePages_Total", 0) + max(0, pages - free_pages)
        # munmap and ftruncate of huge pages want whole ones: mm/mmap.c, fs/hugetlbfs/inode.c hugetlbfs_setattr
        return self._map(
            pages * page_bytes,
            hugetlb=True,
            free=free_pages * page_bytes,
            no_memory=f"sudo sysctl vm.nr_hugepages={pool}",
        )

    def _map(
        self, size_bytes: int, *, hugetlb: bool, free: int | None, no_memory: str
    ) -> tuple[calls.MemoryMap, int | None]:
        """Map memory and return the map, and the memfd where there is one."""
        hints = {errno.ENOMEM: no_memory}
        if hugetlb:
            hints |= {errno.EINVAL: _NO_HUGETLB, errno.ENOSYS: _NO_HUGETLB, errno.EOPNOTSUPP: _NO_HUGETLB}
        if self.kind is HostKind.ANONYMOUS:
            flags = calls.MAP_PRIVATE_ANONYMOUS | (calls.MAP_HUGETLB if hugetlb else 0)
            with refusals("mmap(MAP_HUGETLB)" if hugetlb else "mmap", wanted=size_bytes, free=free, hints=hints):
                return calls.map_memory(-1, size_bytes, flags), None
        flags = calls.MFD_HUGETLB if hugetlb else 0
        name = "memfd_create(MFD_HUGETLB)" if hugetlb else "memfd_create"
        with refusals(name, wanted=size_bytes, free=free, hints=hints):
            memfd = calls.memfd_create("devmem-tcp", flags)
        try:
            with refusals(f"ftruncate({name})", wanted=size_bytes, free=free, hints=hints):
                calls.truncate(memfd, size_bytes)
            with refusals(f"mmap({name})", wanted=size_bytes, free=free, hints=hints):
                return calls.map_memory(memfd, size_bytes, calls.MAP_SHARED), memfd
        except BaseException:
            calls.close_fd(memfd)
            raise

    def _advise_huge(self, mapping: calls.MemoryMap) -> bool:
        """Ask for transparent huge pages; False where the system has them switched off for this kind of memory."""
        setting = _THP + ("shmem_enabled" if self.kind is HostKind.MEMFD else "enabled")
        try:
            chosen = calls.read_text(setting)
            if "[never]" in chosen or "[deny]" in chosen:
                return False
            calls.advise(mapping, calls.MADV_HUGEPAGE)
        except OSError:
            return False
        return True
