"""The record beside an unfinished file: which of its tensors are there whole, by their checksums.

Rules:
  - lines of JSON: the first says what the file is to be (``Origin``), each other names one finished tensor;
  - the first line, and what was known when it was written, come into being at one stroke (rename);
  - later lines are appended, and only after the bytes they speak of are on the disk;
  - a line that cannot be read says nothing: a death while writing leaves half a line, and no more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Final

import msgspec

from devmem_tcp.safetensors.refusals import refusals
from devmem_tcp.safetensors.writing import write_all
from devmem_tcp.sys import calls, disk

FORMAT: Final = 1

_UNFINISHED: Final = ".new"
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an unfinished file is to be; where any of it differs, none of its bytes can be trusted.

    ``layout`` is a hash of the file's header, ``catalog`` a catalog's fingerprint, ``digest`` how checksums are made.
    """

    format: int
    catalog: str
    layout: str
    digest: str


class _Finished(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor that is there whole; ``checksum`` in hexadecimal digits."""

    name: str
    checksum: str


_origins: Final = msgspec.json.Decoder(Origin)
_lines: Final = msgspec.json.Decoder(_Finished)


class PartJournal:
    """The journal of one unfinished file. Whoever uses it has the lock on that file."""

    def __init__(self, path: str, origin: Origin) -> None:
        self.path: Final = path
        self._origin = origin
        self._fd: int | None = None
        self._end = 0

    def read(self) -> dict[str, bytes] | None:
        """Return the checksums of what was finished, by name; None: there is no journal of this origin."""
        with refusals(f"read {self.path}"):
            try:
                first, *lines = calls.read_bytes(self.path).split(b"\n")
            except FileNotFoundError:
                return None
        try:
            if _origins.decode(first) != self._origin:
                return None
        except _UNREADABLE:
            return None
        noted: dict[str, bytes] = {}
        for line in lines:
            with contextlib.suppress(*_UNREADABLE):
                finished = _lines.decode(line)
                noted[finished.name] = bytes.fromhex(finished.checksum)
        return noted

    def begin(self, noted: Mapping[str, bytes]) -> None:
        """Write the journal anew, in place of any other, with what is known to be finished."""
        data = msgspec.json.encode(self._origin) + b"\n" + _encode(noted)
        with refusals(f"write {self.path}"):
            self._fd = calls.create_file(self.path + _UNFINISHED, 0o666)
            self._write(data)
            calls.rename(self.path + _UNFINISHED, self.path)

    def append(self, noted: Mapping[str, bytes]) -> None:
        """Note more, and wait until it is on the disk. What failed may be tried again: it goes to the same place."""
        with refusals(f"write {self.path}"):
            self._write(_encode(noted))

    def remove(self) -> None:
        """Remove the journal; no error if there is none."""
        for path in (self.path, self.path + _UNFINISHED):
            with refusals(f"remove {path}"), contextlib.suppress(FileNotFoundError):
                calls.remove_file(path)

    def close(self) -> None:
        """Close the file; the journal stays. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            calls.close_fd(fd)

    def _write(self, data: bytes) -> None:
        assert self._fd is not None  # begin() came before
        write_all(self._fd, data, self._end)
        disk.sync_data(self._fd)
        self._end += len(data)


def _encode(noted: Mapping[str, bytes]) -> bytes:
    return b"".join(msgspec.json.encode(_Finished(name, sum_.hex())) + b"\n" for name, sum_ in noted.items())
