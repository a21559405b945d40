"""System calls on files of data: the rules of ``calls``, and its seam.

Each function is one call, passes the hook with its name first, and raises what the operating system raised. What
small files of settings need as well (write, rename, fsync …) is in ``calls``.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import stat
from typing import Final

from devmem_tcp.sys.calls import MemoryMap, _enter

_AT_FDCWD: Final = -100  # uapi/linux/fcntl.h
_RENAME_NOREPLACE: Final = 1  # uapi/linux/fs.h

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def open_for_reading(path: str) -> int:
    """Open a file, close-on-exec. O_NONBLOCK means nothing to a file, but a FIFO would make open(2) wait."""
    _enter("open")
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def open_or_create(path: str) -> int:
    """Open a file for reading and writing, made if it is missing, close-on-exec; a symbolic link is refused (ELOOP)."""
    _enter("open")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def status(fd: int) -> os.stat_result:
    _enter("fstat")
    return os.fstat(fd)


def status_of_name(path: str) -> os.stat_result:
    """Return the status of what has a name; of a symbolic link, its own. FileNotFoundError: nothing has it."""
    _enter("lstat")
    return os.lstat(path)


def is_regular(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode)


def read_at(fd: int, size_bytes: int, offset: int) -> bytes:
    """Read up to ``size_bytes`` from a place; fewer may come. Kernel: pread64(2)."""
    _enter("pread64")
    return os.pread(fd, size_bytes, offset)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> int:
    """Write to a place; returns how many bytes were taken. Kernel: pwrite64(2)."""
    _enter("pwrite64")
    return os.pwrite(fd, data, offset)


def map_for_reading(fd: int, size_bytes: int) -> MemoryMap:
    """Map a file so that nothing can be written through the map. Kernel: mmap(2)."""
    _enter("mmap")
    return mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)


def allocate(fd: int, size_bytes: int) -> None:
    """Give a file room on its disk up to a size: writing there cannot run out of it. Library: posix_fallocate(3).

    What is in the file stays. Where a filesystem cannot do it, the C library writes to each block.
    """
    _enter("fallocate")
    os.posix_fallocate(fd, 0, size_bytes)


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of an open file; False if another has it. Kernel: flock(2).

    It goes back when the last fd of this opening is closed, a memory map's own included.
    """
    _enter("flock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync_data(fd: int) -> None:
    """Wait until a file's data are on its disk, also what was written through a shared map. Kernel: fdatasync(2)."""
    _enter("fdatasync")
    os.fdatasync(fd)


def rename_to_new(old: str, new: str) -> None:
    """Give a file another name that nothing has yet (EEXIST), at one stroke.

    Kernel: renameat2(2), RENAME_NOREPLACE; EINVAL where the filesystem does not know that.
    """
    _enter("renameat2")
    if _libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), old, None, new)
