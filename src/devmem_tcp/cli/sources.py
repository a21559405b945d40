"""Where sent payload comes from: a file, stdin, the pattern. Each fills the bound buffer in place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from typing import Final, Protocol

import numpy as np

from devmem_tcp.testing.patterns import pattern

STDIN: Final = "-"
_PIPE_BYTES: Final = 1 << 20  # what anybody may ask for: fs.pipe-max-size, by default


class Source(Protocol):
    """Fills memory with the next bytes of a stream."""

    @property
    def name(self) -> str: ...

    @property
    def total(self) -> int | None:
        """How many bytes in all, if known."""

    @property
    def is_terminal(self) -> bool: ...

    def fill(self, target: memoryview) -> int:
        """Put the next bytes into ``target`` and return how many; 0 at the end."""


class FileSource:
    """Reads a file, a pipe or a terminal: what is there is taken, so a slow writer's bytes go out at once."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name: Final = name
        self.is_terminal: Final = os.isatty(fd)
        status = os.fstat(fd)
        self.total: Final = status.st_size if stat.S_ISREG(status.st_mode) else None
        if stat.S_ISFIFO(status.st_mode):  # or no window ever gets more than the 64 KiB that a pipe starts with
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def fill(self, target: memoryview) -> int:
        return os.readv(self._fd, [target])


class PatternSource:
    """Makes the repeating pattern that ``devmem-tcp recv --verify`` and ``ncdevmem -v`` expect."""

    def __init__(self, length: int, size_bytes: int, window_bytes: int) -> None:
        self.name: Final = f"pattern of {length}"
        self.total: Final = size_bytes
        self.is_terminal: Final = False
        self._length = length
        self._tile = pattern(length, window_bytes + length)
        self._made = 0

    def fill(self, target: memoryview) -> int:
        count = min(len(target), self.total - self._made)
        phase = self._made % self._length
        np.frombuffer(target, np.uint8)[:count] = self._tile[phase : phase + count]
        self._made += count
        return count


@contextlib.contextmanager
def open_file(name: str) -> Iterator[FileSource]:
    """Open a file for reading, or take stdin for ``-``; closed at the end of the block.

    Raises:
        OSError: it is missing, a directory, or not permitted.
    """
    if name == STDIN:
        yield FileSource(sys.stdin.fileno(), "stdin")
        return
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        yield FileSource(fd, name)
    finally:
        os.close(fd)
