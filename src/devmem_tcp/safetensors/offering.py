"""The files that a server offers: one catalog, and each file watched for changes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import PurePath
from typing import Final, TypeAlias

from devmem_tcp.closing import Closing
from devmem_tcp.safetensors.catalog import Catalog
from devmem_tcp.safetensors.refusals import refusals
from devmem_tcp.safetensors.source_file import SourceFile
from devmem_tcp.sys import calls, disk

_Stamp: TypeAlias = tuple[int, int, int, int]  # device, inode, bytes, time of change


class _Offered:
    """One file as it was when the catalog was made."""

    def __init__(self, path: str) -> None:
        with refusals(f"open {path}"):
            self._stamp = _stamp(path)
        self.file: Final = SourceFile(path)
        if self.changed:
            self.file.close()
            raise ValueError(f"{path} is being written: serve it once it is complete")

    @property
    def changed(self) -> bool:
        """Whether its name is another file's by now, or it was written to."""
        try:
            return _stamp(self.file.path) != self._stamp
        except OSError:
            return True


class Offering(Closing):
    """Safetensors files, open, and the catalog of their tensors.

    Raises:
        KernelError: a file cannot be opened, read or mapped.
        ValueError: one is no sound safetensors file or is being written; or together they are over a limit, or two of
            their tensors have one name.
    """

    def __init__(self, paths: Sequence[str | PurePath]) -> None:
        self._files: list[_Offered] = []
        with ExitStack() as opened:
            for path in paths:
                offered = _Offered(str(path))
                opened.callback(offered.file.close)
                self._files.append(offered)
            self.catalog: Final = Catalog.of([offered.file for offered in self._files])
            self.encoded: Final = self.catalog.encode()
            opened.pop_all()

    def data(self, index: int) -> memoryview:
        """Return the bytes of a tensor of the catalog, read-only, format B, shape (nbytes,)."""
        entry = self.catalog.entries[index]
        return self._files[entry.file].file.data(entry.name)

    def change(self, index: int) -> str:
        """Say in words that the file of a tensor has changed since the catalog was made; nothing: it has not.

        Kernel: open(2), fstat(2). A change within the clock tick in which the catalog was made is not seen.
        """
        entry = self.catalog.entries[index]
        if not self._files[entry.file].changed:
            return ""
        return f"{self.catalog.files[entry.file].name} has changed on the server's disk since it was started"

    @property
    def closed(self) -> bool:
        return all(offered.file.closed for offered in self._files)

    def close(self) -> None:
        for offered in self._files:
            offered.file.close()


def _stamp(path: str) -> _Stamp:
    fd = disk.open_for_reading(path)
    try:
        found = disk.status(fd)
    finally:
        calls.close_fd(fd)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
