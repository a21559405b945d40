"""The header of a safetensors file, read without trust, and written.

A file is 8 bytes, little endian, that say how long the header is; the header, a JSON object, perhaps with spaces after
it; and the tensors' bytes, little endian and in C order, which cover the rest of the file without a hole or an overlap.

Source: README.md of huggingface/safetensors, "Format"; what its library refuses, safetensors/src/tensor.rs
(SafeTensors::read_metadata, Metadata::validate). More is refused here: keys that come twice and keys that nobody
knows, elements smaller than a byte, and what is over the limits of this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, NoReturn

import msgspec
from msgspec import Meta

from devmem_tcp.arrays.dtypes import MAX_RANK
from devmem_tcp.safetensors import dtypes
from devmem_tcp.safetensors.naming import shown

LENGTH_BYTES: Final = 8
MAX_HEADER: Final = 100_000_000  # bytes of JSON; tensor.rs, MAX_HEADER_SIZE
MAX_TENSORS: Final = 1_000_000  # in one file: bounds what a header of MAX_HEADER bytes costs in memory
METADATA_KEY: Final = "__metadata__"

_MAX_COUNT: Final = (1 << 63) - 1  # bytes or elements that a header may speak of at all
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)  # MsgspecError was no ValueError once


class TensorInfo(msgspec.Struct, frozen=True):
    """One tensor of a file: ``dtype`` in the format's own word (``BF16``), ``start`` in bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Header(msgspec.Struct, frozen=True):
    """What a header says: the tensors in the order of their bytes, which start at ``data_start``, and the rest."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


class _Name(str):
    """A key of a JSON object: a type of its own, so that msgspec shows each one to a hook."""

    __slots__ = ()


_Count = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]


class _Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor as the header describes it; the offsets count from the header's end."""

    dtype: str
    shape: Annotated[tuple[_Count, ...], Meta(max_length=MAX_RANK)]
    data_offsets: tuple[_Count, _Count]


_claims: Final = msgspec.json.Decoder(_Claim)
_strings: Final = msgspec.json.Decoder(str)


def header_bytes(start: bytes) -> int:
    """Return where the tensors' bytes begin: the length of the header and of the 8 bytes before it.

    Args:
        start: the first bytes of a file; only 8 are looked at.

    Raises:
        ValueError: there are fewer than 8, or they say more than MAX_HEADER.
    """
    if len(start) < LENGTH_BYTES:
        raise ValueError(
            f"{len(start)} bytes are no safetensors file: it starts with 8 that say how long its header is"
        )
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes is over the limit of {MAX_HEADER}: is this a safetensors file?")
    return LENGTH_BYTES + length


def read_header(data: bytes) -> Header:
    """Read the header of a safetensors file.

    Args:
        data: the file from its start to the end of its header, or further.

    Raises:
        ValueError: it is malformed; names the tensor and what is wrong with it.
    """
    data_start = header_bytes(data)
    if len(data) < data_start:
        raise ValueError(f"the header of {data_start - LENGTH_BYTES} bytes is cut off after {len(data) - LENGTH_BYTES}")
    text = data[LENGTH_BYTES:data_start]
    if not text.startswith(b"{"):
        raise ValueError(f"the header starts with {text[:1]!r}, not with '{{'")
    members = _members(text, "the header")
    metadata = _metadata(members.pop(METADATA_KEY, None))
    claims = {name: _claim(name, value) for name, value in members.items()}
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for name, claim in sorted(claims.items(), key=lambda item: item[1].data_offsets):
        begin, stop = claim.data_offsets
        nbytes = _claimed_bytes(name, claim)
        if stop - begin != nbytes:
            _refuse(
                name, f"{claim.dtype} of shape {list(claim.shape)} takes {nbytes} bytes, not those {begin} to {stop}"
            )
        if begin != end:
            wrong = "a hole" if begin > end else "an overlap"
            _refuse(name, f"it starts at byte {begin} of the data, where the one before ends at {end}: {wrong}")
        tensors[name] = TensorInfo(name, claim.dtype, claim.shape, data_start + begin, nbytes)
        end = stop
    return Header(tensors, metadata, data_start, data_start + end)


def encode_header(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Encode a header, the 8 bytes of its length first, so that ``read_header`` tells where each tensor goes.

    Tensors of larger elements come first, as in files of the format's own library, and what comes before the data is a
    multiple of 8: so every element is aligned.

    Args:
        tensors: of each name the dtype, in the format's word, and the shape.

    Raises:
        ValueError: no such file can be: an unknown dtype, a reserved name, a header over the limit.
    """
    if METADATA_KEY in tensors:
        raise ValueError(f"a tensor cannot be called {METADATA_KEY}")
    types = {name: dtypes.by_word(dtype) for name, (dtype, _) in tensors.items()}
    members: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    begin = 0
    for name in sorted(tensors, key=lambda name: (-types[name].itemsize, name)):
        dtype, shape = tensors[name]
        end = begin + types[name].nbytes(shape)
        members[name] = _Claim(dtype, tuple(shape), (begin, end))
        begin = end
    try:
        text = msgspec.json.encode(members)
    except (TypeError, *_UNREADABLE) as error:
        raise ValueError(f"this cannot be the header of a safetensors file: {error}") from None
    text += b" " * (-len(text) % LENGTH_BYTES)
    data = len(text).to_bytes(LENGTH_BYTES, "little") + text
    read_header(data)  # nothing is written that would not be read
    return data


def _members(text: bytes | msgspec.Raw, what: str) -> dict[str, msgspec.Raw]:
    """Return the members of a JSON object, not decoded; a key that comes twice is an error."""
    seen: set[str] = set()

    def take(_: type, key: str) -> _Name:
        if key in seen:
            raise ValueError(f"{shown(key)} comes twice")
        if len(seen) >= MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS} keys")
        seen.add(key)
        return _Name(key)

    try:
        members = msgspec.json.decode(text, type=dict[_Name, msgspec.Raw], dec_hook=take)
    except _UNREADABLE as error:
        raise ValueError(f"{what} cannot be read: {error}") from None
    return {str(name): value for name, value in members.items()}


def _metadata(value: msgspec.Raw | None) -> dict[str, str]:
    if value is None:
        return {}
    texts: dict[str, str] = {}
    for key, text in _members(value, METADATA_KEY).items():
        try:
            texts[key] = _strings.decode(text)
        except _UNREADABLE as error:
            raise ValueError(f"{METADATA_KEY} may hold text only, but {shown(key)}: {error}") from None
    return texts


def _claim(name: str, value: msgspec.Raw) -> _Claim:
    try:
        claim = _claims.decode(value)
    except _UNREADABLE as error:
        _refuse(name, str(error))
    # The keys are all there and no other is; they, dtypes and numbers hold neither a colon nor, but for -0, a minus.
    text = bytes(value)
    if text.count(b":") != len(_Claim.__struct_fields__):
        _refuse(name, "a key comes twice")
    if b"-" in text:
        _refuse(name, "-0 is no number here")
    return claim


def _claimed_bytes(name: str, claim: _Claim) -> int:
    try:
        return dtypes.by_word(claim.dtype).nbytes(claim.shape)
    except ValueError as error:
        _refuse(name, str(error))


def _refuse(name: str, fault: str) -> NoReturn:
    raise ValueError(f"tensor {shown(name)}: {fault}")
