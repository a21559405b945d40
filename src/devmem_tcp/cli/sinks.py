"""Where received payload goes: a file, a check against the pattern, a hash. Each takes the buffer's own bytes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import click

from devmem_tcp.cli.failure import OutputClosed, VerificationFailed
from devmem_tcp.errors import DevmemError
from devmem_tcp.testing.patterns import find_mismatch

STDOUT: Final = "-"
_MAX_IOVECS: Final = 1024  # IOV_MAX of Linux, include/uapi/linux/uio.h


class Sink(Protocol):
    """Takes payload, piece by piece, in the order of the stream."""

    def take(self, pieces: Sequence[memoryview]) -> None: ...


class FileSink:
    """Writes payload to a file with writev, straight from where it landed."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._is_stdout = name == STDOUT
        self.name: Final = "stdout" if name == STDOUT else name
        self.is_terminal: Final = os.isatty(fd)
        self.written = 0  # bytes

    def take(self, pieces: Sequence[memoryview]) -> None:
        """Write all pieces; goes on after short writes.

        Raises:
            OutputClosed: nobody reads stdout any more.
            DevmemError: the file takes no more; says how much it took.
        """
        pending = list(pieces)
        first = 0
        while first < len(pending):
            count = self._write(pending[first : first + _MAX_IOVECS])
            self.written += count
            while first < len(pending) and count >= len(pending[first]):
                count -= len(pending[first])
                first += 1
            if count:
                pending[first] = pending[first][count:]

    def _write(self, pieces: list[memoryview]) -> int:
        while True:
            try:
                return os.writev(self._fd, pieces)
            except BlockingIOError:  # somebody who shares our stdout made it non-blocking
                select.select([], [self._fd], [])
            except OSError as error:
                if self._is_stdout and error.errno == errno.EPIPE:
                    raise OutputClosed from None
                raise DevmemError(
                    f"{self.name}: {error.strerror}, after {self.written:,} bytes", hint=self._left_behind(error)
                ) from error

    def _left_behind(self, error: OSError) -> str:
        room = "make room, or choose another --output; " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        if self._is_stdout or not stat.S_ISREG(os.fstat(self._fd).st_mode):
            return f"{room}what came after that is lost"
        return f"{room}the partly written file is left as it is"


class PatternSink:
    """Compares payload with the repeating pattern."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._seen = 0

    def take(self, pieces: Sequence[memoryview]) -> None:
        """Compare all pieces.

        Raises:
            VerificationFailed: a byte differs: says where, what was expected, what was found.
        """
        for piece in pieces:
            mismatch = find_mismatch(piece, self._length, self._seen)
            if mismatch is not None:
                offset, expected, found = mismatch
                raise VerificationFailed(
                    f"payload differs from the pattern of {self._length} at offset {offset}: "
                    f"expected {expected}, found {found}",
                    hint=f"send it with `devmem-tcp send --pattern {self._length} --size SIZE HOST:PORT`",
                )
            self._seen += len(piece)


class HashSink:
    """Hashes payload (SHA-256)."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def take(self, pieces: Sequence[memoryview]) -> None:
        for piece in pieces:
            self._digest.update(piece)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


@contextlib.contextmanager
def open_output(name: str, *, force: bool) -> Iterator[FileSink]:
    """Open (create, empty) the output file, or take stdout for ``-``; closed at the end of the block.

    Raises:
        click.UsageError: stdout is a terminal, and ``force`` is not given.
        OSError: the file cannot be written: a directory, not permitted.
    """
    if name == STDOUT:
        fd = sys.stdout.fileno()
        if os.isatty(fd) and not force:
            raise click.UsageError(
                "payload would go to the terminal: give -o FILE, -o /dev/null to drop it, or --force to see it"
            )
        yield FileSink(fd, name)
        return
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        yield FileSink(fd, name)
    finally:
        os.close(fd)
