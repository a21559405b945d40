"""Guest-physical memory as a NIC in the lab sees it: the client's DMA maps, with every bound checked here, once."""

from __future__ import annotations

import bisect
import contextlib
import errno as _errno
import fcntl
import mmap
import os
import stat
from typing import Final

from devmem_tcp.errors import DevmemError

PAGE_SIZE: Final = 4096  # the only ``pgsizes`` that the server offers; QEMU aligns its maps to it
ADDRESS_END: Final = 1 << 64
MAX_MAPS: Final = 512  # a map with a file costs an fd, so this stays well below the usual limit of 1024


class DmaError(DevmemError):
    """A DMA address or map was refused; nothing was read or written. ``errno`` is what the client is answered."""

    def __init__(self, message: str, *, errno: int = _errno.EFAULT, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class _Map:
    """One mapped range: ``size`` bytes from ``start`` on. Without ``memory`` it is known, but out of reach."""

    __slots__ = ("memory", "readable", "size", "start", "writable")

    def __init__(self, start: int, size: int, memory: mmap.mmap | None, *, writable: bool) -> None:
        self.start = start
        self.size = size
        self.memory = memory
        self.readable: memoryview | None = None
        self.writable: memoryview | None = None
        if memory is not None:
            whole = memoryview(memory)
            self.readable = whole.toreadonly()
            self.writable = whole if writable else None

    @property
    def end(self) -> int:
        return self.start + self.size

    def close(self) -> None:
        """Let the memory go. While views of it are alive it stays mapped, and goes with the last of them."""
        self.readable = self.writable = None
        memory, self.memory = self.memory, None
        if memory is not None:
            with contextlib.suppress(BufferError):
                memory.close()

    def __str__(self) -> str:
        kind = "out of reach" if self.memory is None else "read-only" if self.writable is None else "writable"
        return f"{self.start:#x}-{self.end - 1:#x} ({kind})"


_NOWHERE: Final = _Map(0, 0, None, writable=False)


class DmaSpace:
    """The guest's memory by DMA address (without a guest IOMMU: guest-physical), as the client mapped it.

    Maps never overlap. The map that was used last is tried first, which is where nearly every access goes: all of a
    guest's memory above 1 MiB is one map.

    Limits: a map's file must not shrink below the map while it is in use: touching what is gone ends this process
    (SIGBUS). Where the file allows seals, as QEMU's memfd does, it is sealed against that; any other file is in the
    hands of the client, whose user could end this process anyway. A guest cannot reach either.
    Threads: none; one space belongs to one loop.
    """

    def __init__(self) -> None:
        self._maps: list[_Map] = []  # sorted by address
        self._starts: list[int] = []  # of _maps, to bisect in
        self._last = _NOWHERE  # may be closed by now: a closed map cannot be accessed
        self.generation = 0  #: goes up with each change of the maps; a kept ``view`` is stale when it has moved on

    def map(self, address: int, size: int, fd: int, offset: int, *, writable: bool) -> None:
        """Map ``size`` bytes at ``offset`` of a file to DMA ``address``. All three are whole pages of 4096 bytes.

        Args:
            fd: a regular file (memfd, tmpfs, disk). Stays the caller's, and may be closed at once. -1: the client gave
                none; the range is remembered, so that it can be unmapped, but cannot be accessed.
            writable: else ``write`` and ``view`` are refused here, and the memory is mapped without write access.

        Raises:
            DmaError: EINVAL: not whole pages, beyond 64 bits, not a regular file, or beyond its end; EEXIST: overlaps
                another map; ENOSPC: there are MAX_MAPS; or what mmap(2) said. Nothing has changed.
        """
        if (
            size <= 0
            or min(address, offset) < 0
            or address + size > ADDRESS_END
            or (address | size | offset) % PAGE_SIZE
        ):
            raise DmaError(f"cannot map {size:#x} bytes at {address:#x}, offset {offset:#x}", errno=_errno.EINVAL)
        place = bisect.bisect_left(self._starts, address)
        for other in self._maps[max(place - 1, 0) : place + 1]:
            if other.start < address + size and address < other.end:
                raise DmaError(f"{size:#x} bytes at {address:#x} overlap the map {other}", errno=_errno.EEXIST)
        if len(self._maps) >= MAX_MAPS:
            raise DmaError(f"there are {MAX_MAPS} maps already", errno=_errno.ENOSPC)
        memory = None if fd < 0 else _open_memory(fd, offset, size, writable=writable)
        self._maps.insert(place, _Map(address, size, memory, writable=writable))
        self._starts.insert(place, address)
        self.generation += 1

    def unmap(self, address: int, size: int) -> None:
        """Unmap every map in the range. Like VFIO's type 1 version 2, it never cuts a map in two.

        Raises:
            DmaError: EINVAL: an end of the range lies within a map; ENOENT: there is no map. Nothing has changed.
        """
        end = address + size
        first, last = bisect.bisect_left(self._starts, address), bisect.bisect_left(self._starts, end)
        for at, edge in ((first - 1, address), (last - 1, end)):
            if at >= 0 and self._maps[at].end > edge:
                text = f"unmapping {size:#x} bytes at {address:#x} would cut the map {self._maps[at]}"
                raise DmaError(text, errno=_errno.EINVAL)
        if first >= last:
            raise DmaError(f"nothing is mapped in {size:#x} bytes at {address:#x}", errno=_errno.ENOENT)
        self._drop(first, last)

    def unmap_all(self) -> None:
        """Unmap everything."""
        self._drop(0, len(self._maps))

    def close(self) -> None:
        """Unmap everything. Idempotent."""
        self.unmap_all()

    def read(self, address: int, size: int) -> memoryview:
        """Return ``size`` bytes at ``address``, read-only, format B.

        A view of the guest's memory, which the guest may change meanwhile; a copy where the range spans several maps.

        Raises:
            DmaError: EFAULT: a byte of it is not mapped, or out of reach.
        """
        found = self._last
        offset = address - found.start
        if found.readable is not None and 0 <= offset <= offset + size <= found.size:
            return found.readable[offset : offset + size]
        pieces = [readable[offset : offset + length] for readable, _, offset, length in self._pieces(address, size)]
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` at ``address``: all of it or, on an error, nothing. A memoryview must be of format B.

        Raises:
            DmaError: EFAULT: a byte of the range is not mapped, read-only, or out of reach.
        """
        found, size = self._last, len(data)
        offset = address - found.start
        if found.writable is not None and 0 <= offset <= offset + size <= found.size:
            found.writable[offset : offset + size] = data
            return
        targets = [
            _writable(writable, address, size)[offset : offset + length]
            for _, writable, offset, length in self._pieces(address, size)
        ]
        rest = memoryview(data)
        for target in targets:
            target[:] = rest[: len(target)]
            rest = rest[len(target) :]

    def view(self, address: int, size: int) -> memoryview:
        """Return ``size`` bytes at ``address`` as a writable view of format B; they lie in one map.

        Lifetime: the guest's memory stays mapped while the view is alive, also after ``unmap``, but is no longer what
        the guest sees at ``address``. Don't keep views, or keep ``generation`` with them.

        Raises:
            DmaError: EFAULT: not mapped, read-only, out of reach, or in more than one map.
        """
        pieces = self._pieces(address, size)
        if len(pieces) != 1:
            raise DmaError(f"{size} bytes at {address:#x} lie in {len(pieces)} maps, not in one")
        _, writable, offset, length = pieces[0]
        return _writable(writable, address, size)[offset : offset + length]

    def _pieces(self, address: int, size: int) -> list[tuple[memoryview, memoryview | None, int, int]]:
        """Split a range into (readable, writable, offset, length) of the maps that it spans; none for no bytes."""
        pieces = []
        at, end = address, address + size
        if size < 0:
            raise DmaError(f"{size} bytes at {address:#x}: a size is not negative")
        while at < end:
            found = self._maps[max(bisect.bisect_right(self._starts, at) - 1, 0)] if self._maps else _NOWHERE
            offset = at - found.start
            if not 0 <= offset < found.size:
                raise DmaError(f"{size} bytes at {address:#x}: {at:#x} is not mapped")
            if found.readable is None:
                raise DmaError(f"{size} bytes at {address:#x}: the client gave no file for the map {found}")
            length = min(end, found.end) - at
            pieces.append((found.readable, found.writable, offset, length))
            self._last = found
            at += length
        return pieces

    def _drop(self, first: int, last: int) -> None:
        for dropped in self._maps[first:last]:
            dropped.close()
        del self._maps[first:last], self._starts[first:last]
        self.generation += 1

    def __repr__(self) -> str:
        return f"<DmaSpace {', '.join(map(str, self._maps)) or 'nothing mapped'}>"


def _writable(writable: memoryview | None, address: int, size: int) -> memoryview:
    if writable is None:
        raise DmaError(f"{size} bytes at {address:#x} are mapped read-only")
    return writable


def _open_memory(fd: int, offset: int, size: int, *, writable: bool) -> mmap.mmap:
    try:
        with contextlib.suppress(OSError):  # no memfd, or sealed already
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or offset + size > status.st_size:
            text = f"{size:#x} bytes from {offset:#x} on are not in the file, which has {status.st_size:#x} bytes"
            raise DmaError(text, errno=_errno.EINVAL)
        protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection, offset=offset)
    except OSError as refused:
        text = f"cannot map {size:#x} bytes of the client's file: {refused}"
        raise DmaError(text, errno=refused.errno or _errno.EIO) from None
