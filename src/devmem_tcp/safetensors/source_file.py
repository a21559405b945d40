"""A safetensors file that is read: its header checked against its size, its tensors as views of a memory map."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import PurePath
from types import MappingProxyType
from typing import Final

from devmem_tcp.closing import Closing
from devmem_tcp.errors import ClosedError, LeakWarning
from devmem_tcp.safetensors.header import LENGTH_BYTES, Header, TensorInfo, header_bytes, read_header
from devmem_tcp.safetensors.naming import shown
from devmem_tcp.safetensors.refusals import refusals
from devmem_tcp.sys import calls, disk

_FINGERPRINT_BYTES: Final = 16


class SourceFile(Closing):
    """A safetensors file, open for reading.

    Lifetime: views of ``data`` keep the map alive; ``close()`` leaves it to them.

    Limits: a file that another program makes shorter meanwhile ends this one by SIGBUS when a missing byte is read
    here, and fails send(2) with EFAULT; replacing it by rename harms nobody.

    Raises:
        KernelError: it cannot be opened, read or mapped.
        ValueError: it is no safetensors file, or a damaged one; says what is wrong where.
    """

    _map: calls.MemoryMap | None = None  # until __init__ is through: __del__ also meets what was never finished

    def __init__(self, path: str | PurePath) -> None:
        self.path: Final = str(path)
        with refusals(f"open {self.path}"):
            fd = disk.open_for_reading(self.path)
        try:
            with refusals(f"read {self.path}"):
                self._header, self._fingerprint = _read(fd, self.path)
            with refusals(f"map {self.path}"):
                self._map = disk.map_for_reading(fd, self._header.file_bytes)
        finally:
            calls.close_fd(fd)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The file's tensors by name, in the order of their bytes."""
        return MappingProxyType(self._header.tensors)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the file says about itself; free text, which may hold anything."""
        return MappingProxyType(self._header.metadata)

    @property
    def fingerprint(self) -> str:
        """What changes when the file does: its size, its time of change, a hash of its header. No data are read."""
        return self._fingerprint

    @property
    def closed(self) -> bool:
        return self._map is None

    def data(self, name: str) -> memoryview:
        """Return the bytes of a tensor as a read-only memoryview of format B, shape (nbytes,).

        Raises:
            ValueError: there is no such tensor.
            ClosedError: the file is closed.
        """
        if self._map is None:
            raise ClosedError(f"{self.path} is closed")
        tensor = self._header.tensors.get(name)
        if tensor is None:
            raise ValueError(f"{self.path} has no tensor {shown(name)}")
        return memoryview(self._map)[tensor.start : tensor.start + tensor.nbytes]

    def close(self) -> None:
        mapping, self._map = self._map, None
        if mapping is not None:
            with contextlib.suppress(BufferError):  # views are alive; the last one unmaps it
                calls.unmap(mapping)

    def __del__(self, _finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not (self.closed or _finalizing()):  # at exit the kernel takes everything back, and modules are half gone
            self.close()
            warnings.warn(f"{self.path} was never closed", LeakWarning, stacklevel=2, source=self)


def _read(fd: int, path: str) -> tuple[Header, str]:
    """Return the header of a file, all of it checked, and the file's fingerprint."""
    found = disk.status(fd)
    if not disk.is_regular(found):
        raise ValueError(f"{path} is not a regular file")
    try:
        end = header_bytes(_read_start(fd, LENGTH_BYTES))
        if end > found.st_size:
            raise ValueError(f"a header of {end - LENGTH_BYTES} bytes does not fit a file of {found.st_size}")
        start = _read_start(fd, end)
        header = read_header(start)
        if header.file_bytes != found.st_size:
            raise ValueError(f"its tensors end at byte {header.file_bytes}, the file at {found.st_size}")
    except ValueError as error:
        raise ValueError(f"{path} is no sound safetensors file: {error}") from None
    digest = hashlib.blake2b(start, digest_size=_FINGERPRINT_BYTES).hexdigest()
    return header, f"{found.st_size}-{found.st_mtime_ns}-{digest}"


def _read_start(fd: int, size_bytes: int) -> bytes:
    """Return the first bytes of a file; fewer if there are no more."""
    data = bytearray()
    while len(data) < size_bytes and (part := disk.read_at(fd, size_bytes - len(data), len(data))):
        data += part
    return bytes(data)
