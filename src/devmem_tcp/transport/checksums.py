"""Checksums of messages, by libraries: which there are, and what they make of a message."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Final, Protocol

from devmem_tcp.errors import DevmemError
from devmem_tcp.sansio.frames import ChecksumKind


class RunningChecksum(Protocol):
    """A checksum that is fed piece by piece."""

    def update(self, data: Any, /) -> None: ...

    def digest(self) -> bytes: ...


_LIBRARIES: Final = {ChecksumKind.XXH3: ("xxhash", "xxh3_64"), ChecksumKind.CRC32C: ("google_crc32c", "Checksum")}
_PACKAGES: Final = {ChecksumKind.XXH3: "xxhash", ChecksumKind.CRC32C: "google-crc32c"}


@cache
def _maker(kind: ChecksumKind) -> Callable[[], RunningChecksum] | None:
    module, name = _LIBRARIES[kind]
    try:
        made: Callable[[], RunningChecksum] = getattr(importlib.import_module(module), name)
    except ImportError:
        return None
    return made


@cache
def available_checksums() -> frozenset[ChecksumKind]:
    """Return the kinds that this machine has a library for."""
    return frozenset(kind for kind in _LIBRARIES if _maker(kind) is not None)


def checksum_kind(kind: ChecksumKind | str | None) -> ChecksumKind:
    """Return a kind by its name, ``xxh3`` or ``crc32c``; None is ChecksumKind.NONE.

    Raises:
        ValueError: there is no such kind.
        DevmemError: its library is not installed.
    """
    chosen = ChecksumKind.NONE if kind is None else ChecksumKind(kind)
    if chosen is not ChecksumKind.NONE and chosen not in available_checksums():
        raise DevmemError(
            f"checksums by {chosen.value} need the package {_PACKAGES[chosen]}",
            hint="pip install 'devmem-tcp[checksum]'",
        )
    return chosen


def running_checksum(kind: ChecksumKind) -> RunningChecksum:
    """Return a checksum of nothing yet, of a kind that is available."""
    maker = _maker(kind)
    assert maker is not None
    return maker()


def checksum_of(kind: ChecksumKind, pieces: Iterable[memoryview]) -> bytes:
    """Return the checksum of a message that lies in pieces, in order."""
    running = running_checksum(kind)
    for piece in pieces:
        running.update(piece if kind is ChecksumKind.XXH3 else bytes(piece))
    return running.digest()
