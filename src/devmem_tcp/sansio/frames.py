"""The frames of a control connection: what two ends of a session say to each other, and its limits.

Rules of the wire:
  - a control connection starts with the four bytes CONTROL_MAGIC from either end, a data connection with a preamble
    (see ``sansio.handshake``), so that both may come to one TCP port;
  - a frame is a body's length, 4 bytes, big endian, then the body: one MessagePack array, its first item the tag;
  - a length is judged before the body arrives, a body before anything is made of it: what breaks a limit of this file
    ends the connection, at a cost of at most one frame;
  - ``Hello`` and ``Refusal`` are the same in every version, but for items added at their end. No other frame may carry
    an item more than this file knows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Final, Generic, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from devmem_tcp.errors import RemoteProtocolError

CONTROL_MAGIC: Final = b"dmtC"
DATA_MAGIC: Final = b"dmtD"
VERSION: Final = 1

LENGTH_BYTES: Final = 4
MAX_HANDSHAKE_FRAME: Final = 4096  # bytes of a body, before the peer has proved anything
MAX_METADATA: Final = 1 << 16  # bytes of JSON
MAX_FRAME: Final = MAX_METADATA + (1 << 13)  # bytes of a body: metadata, a name of four bytes a character, the rest
MAX_LANES: Final = 64
MAX_NAME: Final = 1024  # characters
MAX_RANK: Final = 32
MAX_CHECKSUM: Final = 32  # bytes
MAX_WORDS: Final = 512  # characters of a reason
MAX_TOTAL: Final = (1 << 63) - 1  # of bytes or messages, in the life of a session
MAX_MESSAGE: Final = 1 << 48  # bytes
MIN_PIECE: Final = 1 << 12  # bytes
MAX_BODY: Final = 1 << 16  # bytes of a request, or of one frame of an answer
NONCE_BYTES: Final = 32
TICKET_BYTES: Final = 16
PROOF_BYTES: Final = 32
SESSION_ID_BYTES: Final = 8

_MAX_ITEM_BYTES: Final = 32  # complex256: no element of an array is larger
_MAX_FEATURES: Final = 32
_NO_CONTROLS: Final = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z"  # it may end up on a terminal

Nonce: TypeAlias = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
TicketNonce: TypeAlias = Annotated[bytes, Meta(min_length=TICKET_BYTES, max_length=TICKET_BYTES)]
Mac: TypeAlias = Annotated[bytes, Meta(min_length=PROOF_BYTES, max_length=PROOF_BYTES)]
SessionId: TypeAlias = Annotated[bytes, Meta(min_length=SESSION_ID_BYTES, max_length=SESSION_ID_BYTES)]
Total: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_TOTAL)]
MessageBytes: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_MESSAGE)]
Dimension: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_MESSAGE)]
Lane: TypeAlias = Annotated[int, Meta(ge=0, lt=MAX_LANES)]
LaneCount: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_LANES)]
Version: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFF)]
TcpPort: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFF)]
Word: TypeAlias = Annotated[str, Meta(min_length=1, max_length=32, pattern=r"^[a-z0-9_.-]+\Z")]
Words: TypeAlias = Annotated[str, Meta(max_length=MAX_WORDS, pattern=_NO_CONTROLS)]
Name: TypeAlias = Annotated[str, Meta(max_length=MAX_NAME, pattern=_NO_CONTROLS)]


class Role(Enum):
    """Which way messages go; either role may be the one that connects."""

    SENDER = "sender"
    RECEIVER = "receiver"

    @property
    def other(self) -> Role:
        return Role.RECEIVER if self is Role.SENDER else Role.SENDER


class ChecksumKind(Enum):
    """How the checksum of a message is computed; those but NONE are features that both ends must have."""

    __hash__ = object.__hash__  # Enum's own is written in Python, and this is looked up for every message

    NONE = "none"
    XXH3 = "xxh3"
    CRC32C = "crc32c"


class Limits(msgspec.Struct, frozen=True, array_like=True):
    """What one end takes; the smaller of both ends' numbers holds. Sizes are in bytes."""

    lanes: LaneCount = 1
    message_bytes: MessageBytes = MAX_MESSAGE
    metadata_bytes: Annotated[int, Meta(ge=0, le=MAX_METADATA)] = MAX_METADATA

    def shared_with(self, other: Limits) -> Limits:
        return Limits(
            min(self.lanes, other.lanes),
            min(self.message_bytes, other.message_bytes),
            min(self.metadata_bytes, other.metadata_bytes),
        )


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Connector to acceptor, first: what this end is, can do, and takes. ``keyed``: whether it has a shared key."""

    lowest_version: Version
    highest_version: Version
    role: Role
    backend: Word
    keyed: bool
    nonce: Nonce
    limits: Limits
    features: Annotated[list[Word], Meta(max_length=_MAX_FEATURES)]


class _Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Any frame that only a peer of the same version sends."""


class Challenge(_Frame, frozen=True, tag=2):
    """Acceptor to connector: the version that both will speak, and the acceptor's own hello, with its nonce."""

    version: Version
    hello: Hello


class Proof(_Frame, frozen=True, tag=3):
    """Connector to acceptor: that it knows the key."""

    mac: Mac


class Welcome(_Frame, frozen=True, tag=4):
    """Acceptor to connector: that it knows the key, too, and where the data connections go.

    ``data_port`` 0: to the TCP port that the control connection came to. As many DataTickets follow as were agreed.
    """

    mac: Mac
    session_id: SessionId
    data_port: TcpPort


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Acceptor to connector: no session, and why, in one word for programs and some for people."""

    cause: Word
    words: Words


class DataTicket(_Frame, frozen=True, tag=6):
    """Acceptor to connector: the nonce that admits one data connection, once, as ``lane``."""

    lane: Lane
    nonce: TicketNonce


class Stripes(_Frame, frozen=True):
    """How a message lies on the lanes: piece i, of ``piece_bytes``, goes by lane first_lane + i % width (mod lanes)."""

    piece_bytes: Annotated[int, Meta(ge=MIN_PIECE, le=MAX_MESSAGE)]
    first_lane: Lane
    width: LaneCount


class Announce(_Frame, frozen=True, tag=10):
    """Sender to receiver: message ``message_id`` comes next. Ids count from 0.

    ``metadata`` is a JSON object, or nothing. ``confirm``: the receiver reports its delivery without delay. ``order``
    is that of the array's elements: C (last index fastest) or F. Where a checksum is announced, Done follows.

    ``count``: as many messages come, ids counting on, that differ in their bytes alone: a *series*. Each but the first
    takes credit for a message when its first byte is sent. Its messages are not empty and have no checksums.
    """

    message_id: Total
    name: Name
    dtype: Word
    shape: Annotated[list[Dimension], Meta(max_length=MAX_RANK)]
    order: Literal["C", "F"]
    nbytes: MessageBytes
    stripes: Stripes
    checksum_kind: ChecksumKind
    confirm: bool
    metadata: Annotated[bytes, Meta(max_length=MAX_METADATA)]
    count: Annotated[int, Meta(ge=1, le=MAX_TOTAL)]


class SeriesEnd(_Frame, frozen=True, tag=20):
    """Sender to receiver: of the series under way, ``message_id`` is the first message that does not come.

    Its lanes rest until CancelTaken, for the reason that Cancel gives.
    """

    message_id: Total


class Credit(_Frame, frozen=True, tag=11):
    """Receiver to sender: how many bytes and messages may have been sent, from the session's start.

    ``finished`` messages, the first ones, are delivered or drained.
    """

    total_bytes: Total
    total_messages: Total
    finished: Total


class Done(_Frame, frozen=True, tag=12):
    """Sender to receiver: the checksum of a message that announced one."""

    message_id: Total
    checksum: Annotated[bytes, Meta(min_length=1, max_length=MAX_CHECKSUM)]


class Cancel(_Frame, frozen=True, tag=13):
    """Sender to receiver: of this message no more comes than ``lane_bytes`` by each lane, those under way included.

    Lanes that were to carry more rest until CancelTaken: what came next on them would be taken for this message's.
    """

    message_id: Total
    lane_bytes: Annotated[list[MessageBytes], Meta(min_length=1, max_length=MAX_LANES)]
    words: Words


class Decline(_Frame, frozen=True, tag=14):
    """Receiver to sender: this message is not wanted. It is cancelled, unless all of it is under way already."""

    message_id: Total
    words: Words


class CancelTaken(_Frame, frozen=True, tag=19):
    """Receiver to sender: the Cancel of this message, or the SeriesEnd, was read."""

    message_id: Total


class Request(_Frame, frozen=True, tag=21):
    """Receiver to sender: a program asks the other for something, in words of their own. Numbers count from 0."""

    number: Total
    body: Annotated[bytes, Meta(max_length=MAX_BODY)]


class Answer(_Frame, frozen=True, tag=22):
    """Sender to receiver: a piece of the answer to a Request, in order; ``last``: it is complete."""

    number: Total
    body: Annotated[bytes, Meta(max_length=MAX_BODY)]
    last: bool


class Abort(_Frame, frozen=True, tag=15):
    """Either way: the session has failed, and why. Nothing follows."""

    words: Words


class Ping(_Frame, frozen=True, tag=16):
    """Either way: asks for a Pong with the same number."""

    number: Total


class Pong(_Frame, frozen=True, tag=17):
    """Answers a Ping."""

    number: Total


class Goodbye(_Frame, frozen=True, tag=18):
    """From the sender: no message follows, and all bytes are on their way. From the receiver: announce no more."""


HandshakeFrame: TypeAlias = Hello | Challenge | Proof | Welcome | Refusal | DataTicket
SessionFrame: TypeAlias = (
    Announce
    | SeriesEnd
    | Credit
    | Done
    | Cancel
    | CancelTaken
    | Decline
    | Request
    | Answer
    | Abort
    | Ping
    | Pong
    | Goodbye
)

FrameType = TypeVar("FrameType")

_encoder: Final = msgspec.msgpack.Encoder()
_handshake_frames: Final = msgspec.msgpack.Decoder(HandshakeFrame)
_session_frames: Final = msgspec.msgpack.Decoder(SessionFrame)
_metadata: Final = msgspec.json.Decoder(dict[str, Any])
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)


class FrameDecoder(Generic[FrameType]):
    """Cuts received bytes into frames; any split of the bytes gives the same frames. After an error it is final."""

    __slots__ = ("_decoder", "_error", "_magic", "_max_body", "_pending")

    def __init__(self, decoder: msgspec.msgpack.Decoder[FrameType], max_body: int, magic: bytes) -> None:
        self._decoder = decoder
        self._max_body = max_body
        self._magic = magic
        self._pending = bytearray()
        self._error = ""

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take received bytes. Holds them until ``next_frame`` takes them, so take all of it after each feed."""
        if not self._error:
            self._pending += data

    def next_body(self) -> bytes | None:
        """Return the body of the next frame, not decoded; None: more bytes are needed.

        Raises:
            RemoteProtocolError: this is no control connection, or a length over the limit.
        """
        if self._error:
            raise RemoteProtocolError(self._error)
        pending = self._pending
        if self._magic:
            known = min(len(pending), len(self._magic))
            if pending[:known] != self._magic[:known]:
                self._fail(f"this is no control connection: it starts with {bytes(pending[:8])!r}")
            if known < len(self._magic):
                return None
            del pending[:known]
            self._magic = b""
        if len(pending) < LENGTH_BYTES:
            return None
        length = int.from_bytes(pending[:LENGTH_BYTES])
        if not 0 < length <= self._max_body:
            self._fail(f"a frame of {length} bytes, where 1 to {self._max_body} are allowed")
        end = LENGTH_BYTES + length
        if len(pending) < end:
            return None
        body = bytes(pending[LENGTH_BYTES:end])
        del pending[:end]
        return body

    def decode(self, body: bytes) -> FrameType:
        """Decode a body.

        Raises:
            RemoteProtocolError: it is no frame that belongs here, or breaks a limit.
        """
        try:
            frame = self._decoder.decode(body)
        except _UNREADABLE as error:
            self._fail(f"this is no frame: {error}")
        if isinstance(frame, Announce) and (fault := announce_fault(frame)):
            self._fail(fault)
        return frame

    def next_frame(self) -> FrameType | None:
        """Return the next frame; None: more bytes are needed.

        Raises:
            RemoteProtocolError: what came is malformed or over a limit; every later call says the same.
        """
        body = self.next_body()
        return None if body is None else self.decode(body)

    def take_rest(self) -> bytes:
        """Return, and forget, what came after the last frame taken."""
        rest = bytes(self._pending)
        self._pending.clear()
        return rest

    @property
    def pending_bytes(self) -> int:
        return len(self._pending)

    def _fail(self, words: str) -> None:
        self._error = printable(words)
        self._pending.clear()
        raise RemoteProtocolError(self._error)


def handshake_decoder() -> FrameDecoder[HandshakeFrame]:
    """Return a decoder for the start of a control connection: its magic, and frames of at most 4 KiB."""
    return FrameDecoder(_handshake_frames, MAX_HANDSHAKE_FRAME, CONTROL_MAGIC)


def session_decoder() -> FrameDecoder[SessionFrame]:
    """Return a decoder for what follows the handshake."""
    return FrameDecoder(_session_frames, MAX_FRAME, b"")


def encode(frame: HandshakeFrame | SessionFrame) -> bytes:
    """Encode a frame, its length first."""
    body = _encoder.encode(frame)
    return len(body).to_bytes(LENGTH_BYTES) + body


def check_name(name: str) -> None:
    """Raise ValueError unless a message may have this name."""
    if len(name) > MAX_NAME or not re.match(_NO_CONTROLS, name):
        raise ValueError(f"a name has at most {MAX_NAME} characters, and no control characters: {name[:80]!r}")


def encode_announce(frame: Announce) -> bytes:
    """Encode an Announce made of a caller's values.

    Raises:
        ValueError: it breaks a limit of this file; says which.
    """
    body = _encoder.encode(frame)
    try:
        _session_frames.decode(body)  # msgspec checks what it decodes, not what is made
    except _UNREADABLE as error:
        raise ValueError(f"this cannot be announced: {error}") from None
    if fault := announce_fault(frame):
        raise ValueError(f"this cannot be announced: {fault}")
    return len(body).to_bytes(LENGTH_BYTES) + body


def announce_fault(frame: Announce) -> str:
    """Return in which way an Announce contradicts itself, or an empty string.

    The sizes of dtypes are not known here. An element has one bit to 32 bytes; that bounds what a shape may claim.
    """
    count = math.prod(frame.shape)
    if not count <= 8 * frame.nbytes <= 8 * _MAX_ITEM_BYTES * count:
        return f"a shape of {count} elements does not go with {frame.nbytes} bytes"
    if frame.count > 1 and (not frame.nbytes or frame.checksum_kind is not ChecksumKind.NONE):
        return "a series of messages that are empty or have checksums"
    if frame.metadata:
        try:
            _metadata.decode(frame.metadata)
        except _UNREADABLE as error:
            return f"metadata is no JSON object: {error}"
    return ""


def encode_metadata(metadata: Mapping[str, Any]) -> bytes:
    """Encode a user's metadata as JSON; none becomes no bytes.

    Raises:
        ValueError: it is longer than MAX_METADATA bytes, or cannot be written as JSON.
    """
    if not metadata:
        return b""
    try:
        data = msgspec.json.encode(metadata)
    except (TypeError, *_UNREADABLE) as error:
        raise ValueError(f"metadata cannot be written as JSON: {error}") from None
    if len(data) > MAX_METADATA:
        raise ValueError(f"metadata of {len(data)} bytes is over the limit of {MAX_METADATA}")
    return data


def decode_metadata(data: bytes) -> dict[str, Any]:
    """Decode the metadata of an Announce."""
    return _metadata.decode(data) if data else {}


def printable(words: str) -> str:
    """Return words fit for a frame and a terminal: cut to MAX_WORDS characters, what has no glyph replaced by ``?``."""
    return "".join(char if char.isprintable() else "?" for char in words[:MAX_WORDS])
