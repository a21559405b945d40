"""A safetensors file that is being fetched: whole tensors are kept, whatever ends the program, and resumed from.

Rules:
  - bytes go to PATH.part, which has its final size and layout from the start, but no header until it is complete;
  - PATH.part.json says which tensors are there whole (``part_journal``), and never before their bytes are on the disk;
  - whoever holds the lock on PATH.part (flock) is its only writer, and of the journal as well;
  - PATH appears at one stroke, complete, and takes another file's place only if that was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import PurePath
from typing import Final, NamedTuple

from devmem_tcp.closing import Closing
from devmem_tcp.errors import BrokenError, BusyError, ClosedError, LeakWarning
from devmem_tcp.safetensors import dtypes
from devmem_tcp.safetensors.catalog import Catalog
from devmem_tcp.safetensors.header import TensorInfo, encode_header, read_header
from devmem_tcp.safetensors.naming import shown
from devmem_tcp.safetensors.part_journal import FORMAT, Origin, PartJournal
from devmem_tcp.safetensors.refusals import refusals
from devmem_tcp.safetensors.writing import write_all
from devmem_tcp.sys import calls, disk

CHECKPOINT_BYTES: Final = 256 << 20  # finished, and not yet noted: what a power cut may cost

_SHOWN_MISSING: Final = 3  # names in the text of an error


class Digest(NamedTuple):
    """How the checksums of finished tensors are made; ``name`` tells one from another in the journal."""

    name: str
    of: Callable[[memoryview], bytes]


BLAKE2B: Final = Digest("blake2b-128", lambda data: hashlib.blake2b(data, digest_size=16).digest())


class TargetFile(Closing):
    """A new safetensors file of a catalog's tensors, written one by one in any order.

    What an earlier attempt finished is kept, if it was of the same tensors of unchanged files and its bytes still have
    their checksums: ``missing`` tells what is left to do, ``resumed`` how many bytes were done already.

    Lifetime: views of ``window`` keep the map alive, and with it the lock, also after ``close()``.

    Threads: windows may be filled, and ``write`` called, by any; everything else is for one thread at a time.

    Args:
        path: of the file to be; its folder exists.
        metadata: what the file is to say about itself.
        overwrite: whether a file that is there already is replaced, when this one is complete.
        digest: for checksums that the caller has anyway, and gives to ``finish``.
        checkpoint_bytes: bytes to finish before they are put on the disk and noted (``checkpoint``); 0: each tensor.

    Raises:
        FileExistsError: there is a file of that name.
        BusyError: another program is writing this file.
        KernelError: it cannot be opened, or there is no room for it (ENOSPC); nothing new stays on the disk.
        ValueError: no safetensors file holds these tensors.
    """

    _fd: int | None = None  # until __init__ is through: __del__ also meets what was never finished

    def __init__(
        self,
        path: str | PurePath,
        catalog: Catalog,
        metadata: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
        digest: Digest = BLAKE2B,
        checkpoint_bytes: int = CHECKPOINT_BYTES,
    ) -> None:
        self.path: Final = str(path)
        self.part: Final = f"{self.path}.part"
        words = {entry.name: (dtypes.by_wire(entry.dtype).safetensors, entry.shape) for entry in catalog.entries}
        self._head = encode_header(words, metadata or {})
        self._layout = read_header(self._head)
        self._names = list(words)
        self._overwrite = overwrite
        self._digest = digest
        self._checkpoint_bytes = checkpoint_bytes
        layout = hashlib.blake2b(self._head, digest_size=16).hexdigest()
        self._journal = PartJournal(f"{self.part}.json", Origin(FORMAT, catalog.fingerprint, layout, digest.name))
        self._map: calls.MemoryMap | None = None
        self._checksums: dict[str, bytes] = {}  # of what is finished
        self._noted = 0  # as many of them are in the journal: the first ones
        self._unnoted_bytes = 0
        self._worthless = False  # the part holds nothing of an earlier attempt
        self._broken = False  # bytes were lost on the way to the disk, and nobody knows which
        if not overwrite:
            self._refuse_existing()
        self._fd = self._lock_part()
        try:
            self._prepare(self._fd)
        except BaseException:
            self._let_go()
            raise
        self.resumed: Final = sum(self._layout.tensors[name].nbytes for name in self._checksums)

    @property
    def closed(self) -> bool:
        return self._fd is None

    @property
    def total_bytes(self) -> int:
        """The size of all tensors; with the header's, that of the file."""
        return self._layout.file_bytes - self._layout.data_start

    def missing(self) -> list[str]:
        """Return the names of the tensors that are not finished, in the catalog's order."""
        return [name for name in self._names if name not in self._checksums]

    def window(self, name: str) -> memoryview:
        """Return the place of an unfinished tensor: a writable memoryview of format B, shape (nbytes,).

        What is in it at first is of no meaning. After ``finish`` nothing may be written to it any more.

        Raises:
            ValueError: there is no such tensor, or it is finished.
            ClosedError: the file is closed.
        """
        return self._view(self._unfinished(name))

    def write(self, name: str, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Put bytes in the place of an unfinished tensor, ``offset`` bytes from its start.

        For bytes that are somewhere else already: a copy to the window costs a page fault every 4 KiB.

        Kernel: pwrite(2).

        Raises:
            ValueError: there is no such tensor, it is finished, or the bytes do not fit it.
            KernelError: the disk refuses.
            ClosedError: the file is closed.
        """
        fd, tensor = self._open_fd(), self._unfinished(name)
        view = memoryview(data).cast("B")
        if not 0 <= offset <= tensor.nbytes - len(view):
            raise ValueError(f"{len(view)} bytes at {offset} do not fit tensor {shown(name)} of {tensor.nbytes} bytes")
        with refusals(f"write {self.part}"):
            write_all(fd, view, tensor.start + offset)

    def finish(self, name: str, checksum: bytes | None = None) -> None:
        """Take a tensor as whole: its bytes are in its place.

        Args:
            checksum: what ``digest`` makes of the bytes, if the caller knows; otherwise it is computed here.

        Raises:
            ValueError: there is no such tensor, or it is finished already.
            KernelError: a checkpoint was due and failed; see there.
            ClosedError: the file is closed.
        """
        tensor = self._unfinished(name)
        self._checksums[name] = self._digest.of(self._view(tensor)) if checksum is None else checksum
        self._unnoted_bytes += tensor.nbytes
        if self._unnoted_bytes >= self._checkpoint_bytes:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Put on the disk what was finished, then note it, so that not even a power cut costs it.

        Kernel: fdatasync(2) of the file, which on Linux takes along what was written through the map; then pwrite(2)
        and fdatasync(2) of the journal. May wait for the disk as long as it takes.

        Raises:
            KernelError: the disk refuses. If it was the journal, this may be called again; if it was the file, nothing
                works any more (BrokenError) but ``close()`` and another attempt.
            ClosedError: the file is closed.
        """
        fd = self._open_fd()
        unnoted = dict(islice(self._checksums.items(), self._noted, None))
        if unnoted:
            with self._syncing():
                disk.sync_data(fd)
            self._journal.append(unnoted)
            self._noted += len(unnoted)
        self._unnoted_bytes = 0

    def complete(self) -> None:
        """Write the header, wait until everything is on the disk, give the file its name, and close.

        Raises:
            ValueError: tensors are missing.
            FileExistsError: a file of that name appeared meanwhile; the part is kept.
            KernelError: the disk refuses; the part is kept.
            ClosedError: the file is closed.
        """
        fd = self._open_fd()
        if missing := self.missing():
            some = ", ".join(map(shown, missing[:_SHOWN_MISSING])) + (" …" if len(missing) > _SHOWN_MISSING else "")
            raise ValueError(f"{len(missing)} of {len(self._names)} tensors are missing: {some}")
        self.checkpoint()
        with refusals(f"write {self.part}"):
            write_all(fd, self._head, 0)
        with self._syncing():
            calls.sync(fd)
        self._rename()
        self._worthless = False  # what is called like the part from now on is another program's
        self._journal.remove()
        self._sync_folder()
        self._let_go()

    def close(self) -> None:
        """Let go of the file; what is finished is kept for another attempt. Idempotent.

        A part that was new and of which nothing is finished is removed. Raises nothing that a disk can say: what it
        refuses to note is fetched again.
        """
        if self._fd is None:
            return
        try:
            with contextlib.suppress(OSError, BrokenError):
                self.checkpoint()
        finally:
            self._let_go()

    def _prepare(self, fd: int) -> None:
        """Find out what an earlier attempt left, and make the rest ready."""
        noted = self._journal.read()
        with refusals(f"read {self.part}"):
            size_bytes = disk.status(fd).st_size
        with refusals(f"allocate {self._layout.file_bytes} bytes for {self.part}"):
            if noted is None or size_bytes != self._layout.file_bytes:
                self._worthless = True
                calls.truncate(fd, 0)
                noted = {}
            disk.allocate(fd, self._layout.file_bytes)  # of a resumed file, too: a hole may be in it
        with refusals(f"map {self.part}"):
            self._map = calls.map_memory(fd, self._layout.file_bytes, calls.MAP_SHARED)
        self._checksums = {name: checksum for name, checksum in noted.items() if self._is_whole(name, checksum)}
        self._journal.begin(self._checksums)
        self._noted = len(self._checksums)

    def _is_whole(self, name: str, checksum: bytes) -> bool:
        tensor = self._layout.tensors.get(name)
        return tensor is not None and self._digest.of(self._view(tensor)) == checksum

    def _lock_part(self) -> int:
        """Open the part, made if it is missing, and lock it."""
        while True:
            with refusals(f"open {self.part}"):
                fd = disk.open_or_create(self.part)
            try:
                with refusals(f"lock {self.part}"):
                    if not disk.is_regular(disk.status(fd)):
                        raise ValueError(f"{self.part} is not a regular file")
                    if not disk.try_lock(fd):
                        raise BusyError(
                            f"another program is writing {self.part}, or this one has windows of it",
                            hint="wait for it, or name another file",
                        )
                    if self._is_part(fd):
                        return fd
            except BaseException:
                calls.close_fd(fd)
                raise
            calls.close_fd(fd)  # its writer completed it between open and lock: that file has another name by now

    def _is_part(self, fd: int) -> bool:
        """Whether the part's name is that of an open file."""
        try:
            opened, named = disk.status(fd), disk.status_of_name(self.part)
        except FileNotFoundError:
            return False
        return (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)

    def _rename(self) -> None:
        with refusals(f"rename {self.part} to {self.path}"):
            if self._overwrite:
                calls.rename(self.part, self.path)
                return
            try:
                disk.rename_to_new(self.part, self.path)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS):
                    raise
            else:
                return
            self._refuse_existing()  # then rename: that filesystem cannot look and rename at one stroke
            calls.rename(self.part, self.path)

    def _refuse_existing(self) -> None:
        with refusals(f"look for {self.path}"):
            try:
                disk.status_of_name(self.path)
            except FileNotFoundError:
                return
        raise FileExistsError(errno.EEXIST, "there is a file of that name already", self.path)

    def _sync_folder(self) -> None:
        folder = str(PurePath(self.path).parent)
        with refusals(f"sync {folder}"):
            fd = calls.open_directory(folder)
            try:
                calls.sync(fd)
            finally:
                calls.close_fd(fd)

    def _unfinished(self, name: str) -> TensorInfo:
        self._open_fd()
        tensor = self._layout.tensors.get(name)
        if tensor is None:
            raise ValueError(f"{self.path} is to have no tensor {shown(name)}")
        if name in self._checksums:
            raise ValueError(f"tensor {shown(name)} is finished already")
        return tensor

    def _view(self, tensor: TensorInfo) -> memoryview:
        assert self._map is not None  # as long as the file is open
        return memoryview(self._map)[tensor.start : tensor.start + tensor.nbytes]

    @contextlib.contextmanager
    def _syncing(self) -> Iterator[None]:
        """Note when the disk refused the file's bytes.

        Linux tells of it once and takes the bytes for written from then on (mm/filemap.c,
        file_check_and_advance_wb_err; fsync(2)): to try again would say that all is well.
        """
        try:
            with refusals(f"write {self.part}"):
                yield
        except OSError:
            self._broken = True
            raise

    def _open_fd(self) -> int:
        if self._fd is None:
            raise ClosedError(f"{self.path} is closed", hint="make a new TargetFile: it goes on from what is finished")
        if self._broken:
            hint = "close it, look at the disk, and try again: what was noted before is kept"
            raise BrokenError(f"bytes of {self.part} did not get to the disk, nobody knows which", hint=hint)
        return self._fd

    def _let_go(self) -> None:
        """Close everything; remove a part that is worth nothing, while its lock is held."""
        fd, self._fd = self._fd, None
        mapping, self._map = self._map, None
        try:
            self._journal.close()
            if self._worthless and not self._checksums:
                with contextlib.suppress(OSError):
                    calls.remove_file(self.part)
                    self._journal.remove()
        finally:
            if mapping is not None:
                with contextlib.suppress(BufferError):  # windows are alive; the last one unmaps it
                    calls.unmap(mapping)
            if fd is not None:
                calls.close_fd(fd)

    def __del__(self, _finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not (self.closed or _finalizing()):  # at exit the kernel takes everything back, and modules are half gone
            self._let_go()
            warnings.warn(f"{self.path} was never closed", LeakWarning, stacklevel=2, source=self)
