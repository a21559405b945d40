"""Frames as a hostile peer might write them: right, nearly right, or nothing of the kind.

What items a frame has, and within which limits, is read off its type: a frame that is new to the protocol is thrown,
too. ``Cutter`` reads frames as the judges do, with nothing of the code that is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final, NamedTuple, TypeAlias, get_args

import msgspec
from msgspec import inspect

from choices import Choices
from devmem_tcp.sansio.frames import Announce, HandshakeFrame, SessionFrame, encode

FrameKind: TypeAlias = type[msgspec.Struct]
HANDSHAKE_FRAMES: Final[tuple[FrameKind, ...]] = get_args(HandshakeFrame)
SESSION_FRAMES: Final[tuple[FrameKind, ...]] = get_args(SessionFrame)

_WORDS: Final = ("w", "key", "xxh3", "version", "no.such-word")
_WIDE: Final = (1 << 63) - 1
_DEEP: Final = b"\x91" * 2000  # arrays in arrays
_NOISE: Final = bytes(range(256)) * 1024


class Part(NamedTuple):
    """Bytes up to the end of a frame, or of what came; ``body``: that of the frame which ends with them."""

    data: bytes
    body: bytes | None


class Cutter:
    """Cuts what goes by a control connection into bodies.

    Args:
        max_body: the longest that is allowed, in bytes; one that is longer, or empty, makes the rest ``bad``.
    """

    def __init__(self, max_body: int) -> None:
        self.bad = False
        self._max_body = max_body
        self._pending = b""

    def cut(self, data: bytes) -> list[Part]:
        """Return ``data`` in parts."""
        parts: list[Part] = []
        if self.bad:
            return [Part(data, None)]
        pending, taken = self._pending + data, len(self._pending)
        start = 0
        while len(pending) - start >= 4:
            length = int.from_bytes(pending[start : start + 4])
            self.bad = not 0 < length <= self._max_body
            end = start + 4 + length
            if self.bad or end > len(pending):
                break
            parts.append(Part(pending[taken:end], pending[start + 4 : end]))
            start = taken = end
        self._pending = pending[start:]
        if taken < len(pending):
            parts.append(Part(pending[taken:], None))
        return parts


@cache
def _items(kind: FrameKind) -> tuple[inspect.Field, ...]:
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    return described.fields


class FrameMaker:
    """Makes frames of the types it is given.

    Args:
        choices: decide.
        numbers: that mean something now, as the next message's id.
        blobs: byte strings that mean something, as proofs that were seen.
    """

    def __init__(self, choices: Choices, numbers: Sequence[int] = (0,), blobs: Sequence[bytes] = ()) -> None:
        self._choices = choices
        self._numbers = numbers
        self._blobs = blobs

    def frame(self, kinds: Sequence[FrameKind]) -> msgspec.Struct:
        """Choose a frame that keeps the limits of its items; an Announce mostly agrees with itself."""
        frame = self._struct(self._choices.one_of(kinds))
        if isinstance(frame, Announce) and not self._choices.once_in(8):
            frame = msgspec.structs.replace(frame, shape=[frame.nbytes], metadata=b"")
        return frame

    def body(self, kinds: Sequence[FrameKind]) -> bytes:
        """Choose a body: a frame's, one with an item that does not belong, or anything."""
        choices = self._choices
        kind = choices.integer(0, 15)
        if kind == 15:
            return choices.one_of((msgspec.msgpack.encode(self.value()), choices.data(12), _DEEP)) or b"\0"
        body = encode(self.frame(kinds))[4:]  # type: ignore[arg-type]  # of the two unions that ``kinds`` are of
        if kind < 12:
            return body
        items = msgspec.msgpack.decode(body)
        at = choices.integer(0, len(items) - 1)
        if kind == 12:
            items[at] = self.value()
        elif kind == 13:
            items.insert(choices.integer(0, len(items)), self.value())
        else:
            del items[at:]
        return msgspec.msgpack.encode(items)

    def wire(self, kinds: Sequence[FrameKind]) -> bytes:
        """Choose a frame as it goes over the wire, its length seldom wrong."""
        body = self.body(kinds)
        length = len(body)
        if self._choices.once_in(32):
            length = self._choices.one_of((0, length + 1, length - 1, 1 << 31, (1 << 32) - 1, 5000, 80_000))
        return length.to_bytes(4) + body

    def value(self) -> Any:
        """Choose what MessagePack can say."""
        choices = self._choices
        number = self._number(-(1 << 63), (1 << 64) - 1)
        return choices.one_of((None, True, number, -1, 0.5, "w", choices.data(3), [], [number], {"w": 1}, "\x1b[2J"))

    def _struct(self, kind: FrameKind) -> msgspec.Struct:
        return kind(*(self._item(item.type) for item in _items(kind)))

    def _item(self, described: inspect.Type) -> Any:
        choices = self._choices
        match described:
            case inspect.IntType(ge=low, le=high, lt=below):
                return self._number(low or 0, below - 1 if below is not None else _WIDE if high is None else high)
            case inspect.BoolType():
                return choices.once_in(2)
            case inspect.StrType(max_length=longest):
                return choices.one_of((*_WORDS, "w" * (longest or 32))) if choices.once_in(4) else _WORDS[0]
            case inspect.BytesType(min_length=shortest, max_length=longest):
                return self._blob(shortest or 0, longest or 32)
            case inspect.ListType(item_type=of, min_length=fewest, max_length=most):
                count = choices.integer(fewest or 0, 4)
                count = (most or 64) if choices.once_in(64) else count
                return [self._item(of) for _ in range(count)]
            case inspect.EnumType(cls=kind):
                return choices.one_of(list(kind))
            case inspect.LiteralType(values=values):
                return choices.one_of(values)
            case inspect.StructType(cls=kind):
                return self._struct(kind)
        raise TypeError(f"a frame has an item that this cannot make: {described}")

    def _number(self, low: int, high: int) -> int:
        """Choose a number: mostly one that means something, or is small; at an edge; or any."""
        choices = self._choices
        kind = choices.integer(0, 15)
        if kind < 8:
            number = choices.one_of(self._numbers)
        elif kind < 13:
            number = low + choices.integer(0, 4)
        elif kind == 13:
            number = choices.one_of((low, high))
        else:
            number = 1 << choices.integer(0, 63)
        return min(max(number, low), high)

    def _blob(self, shortest: int, longest: int) -> bytes:
        choices = self._choices
        fitting = [blob for blob in self._blobs if shortest <= len(blob) <= longest]
        if fitting and not choices.once_in(4):
            return choices.one_of(fitting)
        size = choices.one_of((shortest, shortest, max(shortest, 4), longest)) if longest <= len(_NOISE) else shortest
        return (choices.data(min(size, 2)) + _NOISE)[:size]


def damage(choices: Choices, data: bytearray) -> None:
    """Change bytes in one of the ways in which bytes get changed."""
    if not data:
        return
    at = choices.integer(0, len(data) - 1)
    size = choices.one_of((1, 4, choices.integer(1, 64)))
    kind = choices.integer(0, 4)
    if kind == 0:
        data[at] ^= 1 << choices.integer(0, 7)
    elif kind == 1:
        data[at] = choices.integer(0, 255)
    elif kind == 2:
        del data[at : at + size]
    elif kind == 3:
        data[at:at] = data[at : at + size]
    else:
        data[at:at] = choices.data(min(size, 8))
