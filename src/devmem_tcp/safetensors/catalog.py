"""What a server of safetensors files offers: every tensor's name, dtype and shape, and which file it is in."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from devmem_tcp.arrays.dtypes import MAX_BYTES, MAX_RANK
from devmem_tcp.errors import RemoteProtocolError
from devmem_tcp.safetensors import dtypes
from devmem_tcp.safetensors.header import METADATA_KEY
from devmem_tcp.safetensors.naming import shown
from devmem_tcp.sansio.frames import MAX_NAME, printable

if TYPE_CHECKING:
    from devmem_tcp.safetensors.source_file import SourceFile

MAX_ENTRIES: Final = 100_000
MAX_FILES: Final = 10_000
MAX_TOTAL: Final = MAX_BYTES - 1  # bytes of all tensors
MAX_CATALOG: Final = 1 << 26  # bytes of JSON

_MAX_FILE_NAME: Final = 255  # linux/limits.h, NAME_MAX
_MAX_FINGERPRINT: Final = 128  # characters
_NEAR: Final = 3  # names in the text of an error
_NEAR_CUTOFF: Final = 0.4
_NEAR_OF: Final = 5000  # names that are compared: a few tenths of a second
_DIGITS: Final = re.compile(r"\d+")
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)

_Bytes = Annotated[int, Meta(ge=0, le=MAX_TOTAL)]


class CatalogEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: ``file`` counts in the catalog's files, ``dtype`` is the word that messages carry (``bfloat16``)."""

    name: Annotated[str, Meta(max_length=MAX_NAME)]
    file: Annotated[int, Meta(ge=0, lt=MAX_FILES)]
    dtype: str
    shape: Annotated[tuple[_Bytes, ...], Meta(max_length=MAX_RANK)]
    nbytes: _Bytes


class CatalogFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: its name without a folder, its fingerprint, what it says about itself (free text, any characters)."""

    name: Annotated[str, Meta(min_length=1, max_length=_MAX_FILE_NAME)]
    fingerprint: Annotated[str, Meta(max_length=_MAX_FINGERPRINT)]
    metadata: dict[str, str]


class Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tensors of some files, in the order of the files and of the bytes in them."""

    entries: Annotated[tuple[CatalogEntry, ...], Meta(max_length=MAX_ENTRIES)]
    files: Annotated[tuple[CatalogFile, ...], Meta(max_length=MAX_FILES)]

    @classmethod
    def of(cls, files: Sequence[SourceFile]) -> Catalog:
        """Return the catalog of open files.

        Raises:
            ValueError: two tensors have one name, or something is over a limit of this file; names the files.
        """
        entries: list[CatalogEntry] = []
        paths: dict[str, str] = {}
        for index, file in enumerate(files):
            for name, tensor in file.tensors.items():
                if name in paths:
                    raise ValueError(f"tensor {shown(name)} is in {paths[name]} and in {file.path}: serve one of them")
                paths[name] = file.path
                wire = dtypes.by_word(tensor.dtype).name
                entries.append(CatalogEntry(name, index, wire, tensor.shape, tensor.nbytes))
        listed = (CatalogFile(PurePath(file.path).name, file.fingerprint, dict(file.metadata)) for file in files)
        catalog = cls(tuple(entries), tuple(listed))
        try:
            _read(catalog.encode())  # msgspec checks what it decodes, not what is made
        except RemoteProtocolError as error:
            raise ValueError(f"{', '.join(file.path for file in files)} cannot be offered: {error.message}") from None
        return catalog

    @property
    def total_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def fingerprint(self) -> str:
        """What changes when one of the tensors may have: a hash of the entries and of their files' fingerprints.

        Files that no entry is of do not count, nor does where in the list a file is.
        """
        told = [(entry.name, entry.dtype, entry.shape, self.files[entry.file].fingerprint) for entry in self.entries]
        return hashlib.blake2b(msgspec.json.encode(told), digest_size=16).hexdigest()

    def select(self, only: Sequence[str]) -> Catalog:
        """Return the catalog of the tensors whose names match one of the patterns; without any, of all.

        Args:
            only: patterns as of a shell (``*``, ``?``, ``[a-z]``), case counts. A ``*`` matches dots and slashes too.

        Raises:
            ValueError: a pattern matches nothing; says which names are near.
        """
        if not only:
            return self
        chosen: set[str] = set()
        names = [entry.name for entry in self.entries]
        for pattern in only:
            found = [name for name in names if fnmatchcase(name, pattern)]
            if not found:
                raise ValueError(f"no tensor matches {shown(pattern)}{_suggestion(pattern, names)}")
            chosen.update(found)
        return msgspec.structs.replace(self, entries=tuple(entry for entry in self.entries if entry.name in chosen))

    def encode(self) -> bytes:
        """Encode as JSON; ``decode`` at the other end."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Catalog:
        """Decode what a server sent.

        Raises:
            RemoteProtocolError: it is no catalog, breaks a limit of this file, or contradicts itself.
        """
        return _read(data)


_catalogs: Final = msgspec.json.Decoder(Catalog)


def _read(data: bytes) -> Catalog:
    if len(data) > MAX_CATALOG:
        raise RemoteProtocolError(f"a catalog of {len(data)} bytes is over the limit of {MAX_CATALOG}")
    try:
        catalog = _catalogs.decode(data)
        for file in catalog.files:
            _check_file(file)
        for entry in catalog.entries:
            _check_entry(entry, len(catalog.files))
        _check_all(catalog)
    except _UNREADABLE as error:
        raise RemoteProtocolError(printable(f"this is no sound catalog: {error}")) from None
    return catalog


def _check_file(file: CatalogFile) -> None:
    if not file.name.isprintable() or "/" in file.name or file.name in (".", ".."):
        raise ValueError(f"{shown(file.name)} is no name of a file")
    if not file.fingerprint.isprintable():
        raise ValueError(f"the fingerprint of {shown(file.name)} cannot be printed")


def _check_entry(entry: CatalogEntry, files: int) -> None:
    if not entry.name.isprintable() or entry.name == METADATA_KEY:
        raise ValueError(f"{shown(entry.name)} is no name of a tensor")
    if entry.file >= files:
        raise ValueError(f"tensor {shown(entry.name)} is in file {entry.file} of {files}")
    nbytes = dtypes.by_wire(entry.dtype).nbytes(entry.shape)
    if nbytes != entry.nbytes:
        told = f"{entry.dtype} of shape {list(entry.shape)} takes {nbytes} bytes, not {entry.nbytes}"
        raise ValueError(f"tensor {shown(entry.name)}: {told}")


def _check_all(catalog: Catalog) -> None:
    seen: set[str] = set()
    for entry in catalog.entries:
        if entry.name in seen:
            raise ValueError(f"tensor {shown(entry.name)} comes twice")
        seen.add(entry.name)
    if catalog.total_bytes > MAX_TOTAL:
        raise ValueError(f"{catalog.total_bytes} bytes in all are over the limit of {MAX_TOTAL}")


def _suggestion(pattern: str, names: Sequence[str]) -> str:
    """Return the names that a pattern was perhaps meant to match, as the end of a sentence.

    Of names that differ in numbers only, the first stands for all.
    """
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(_DIGITS.sub("0", name), name)
    near = difflib.get_close_matches(pattern, list(kinds.values())[:_NEAR_OF], _NEAR, _NEAR_CUTOFF) or names[:_NEAR]
    return f"; near names: {', '.join(map(shown, near))}" if near else ": there are none"
