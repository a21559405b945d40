"""What a client and the broker say to each other: JSON, one message a datagram, at most one fd with it.

The client asks, one request at a time; the broker answers each with one message. The first request is ``Hello``; of any
other version of the protocol, ``Hello`` and ``Failed`` are the same. A message that breaks the rules of this file
ends the connection.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Annotated, Final, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from devmem_tcp.errors import (
    BindError,
    BrokenError,
    BusyError,
    ClosedError,
    DevmemError,
    KernelError,
    NicSettingError,
    OutOfDeviceMemory,
    ProtocolError,
    RemoteProtocolError,
    RestoreError,
)
from devmem_tcp.types import Family, FlowRule, HeaderSplitMode

VERSION: Final = 1
DEFAULT_PATH: Final = "/run/devmem-tcp/broker.sock"
MAX_MESSAGE_BYTES: Final = 1 << 16
MAX_RSS_ENTRIES: Final = 8192  # of at most five digits and a comma each: they fit a message
MAX_QUEUES: Final = 1024
MAX_WORDS: Final = 1024

_MAX_TEXT: Final = 1000  # characters of each text of an error or warning: six bytes each in JSON at most; ten fit
_MAX_WARNINGS: Final = 4
_MAX_SIZE: Final = (1 << 63) - 1
_U32_MAX: Final = (1 << 32) - 1

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=15, pattern=r"^[!-.0-~]+\Z")]  # IFNAMSIZ - 1, no slash
Kind: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64)]
Words: TypeAlias = Annotated[str, Meta(max_length=MAX_WORDS, pattern=r"^[ -~]*\Z")]
Ip: TypeAlias = Annotated[str, Meta(max_length=64, pattern=r"^[0-9a-fA-F:./]+\Z")]
Queue: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFF)]
Port: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFF)]
Size: TypeAlias = Annotated[int, Meta(ge=0, le=_MAX_SIZE)]
Handle: TypeAlias = Annotated[int, Meta(ge=1, le=_MAX_SIZE)]


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello", tag_field="do"):
    """The first request: which version the client speaks. Answer: ``Welcome``."""

    version: Annotated[int, Meta(ge=0, le=_U32_MAX)]


class _Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="do", forbid_unknown_fields=True):
    """What comes after ``Hello``."""


class OpenNic(_Request, frozen=True, kw_only=True, tag="open"):
    """Choose the NIC that this connection is about, once. Answer: ``Done``.

    ``network_namespace`` is the inode of the client's: names of NICs mean the same in the same one alone.
    """

    nic: Name
    network_namespace: Size


class SetHeaderSplit(_Request, frozen=True, kw_only=True, tag="set-header-split"):
    """``NicControl.set_header_split``. Answer: ``Changed``."""

    mode: HeaderSplitMode


class SetHdsThresh(_Request, frozen=True, kw_only=True, tag="set-hds-thresh"):
    """``NicControl.set_hds_thresh``. Answer: ``Changed``."""

    size_bytes: Size


class SetRss(_Request, frozen=True, kw_only=True, tag="set-rss"):
    """``NicControl.set_rss``. Answer: ``Changed``."""

    table: Annotated[list[Queue], Meta(min_length=1, max_length=MAX_RSS_ENTRIES)]
    words: Words


class Rule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A ``FlowRule``."""

    queue: Queue
    family: Family | None = None
    src_ip: Ip | None = None
    dst_ip: Ip | None = None
    src_port: Port | None = None
    dst_port: Port | None = None
    src_port_mask: Port = 0xFFFF
    dst_port_mask: Port = 0xFFFF
    location: Annotated[int, Meta(ge=0, le=_U32_MAX)] | None = None

    @classmethod
    def of(cls, rule: FlowRule) -> Rule:
        return cls(**{field: getattr(rule, field) for field in cls.__struct_fields__})

    def flow_rule(self) -> FlowRule:
        return FlowRule(**{field: getattr(self, field) for field in self.__struct_fields__})


class AddNtuple(_Request, frozen=True, kw_only=True, tag="add-ntuple"):
    """``NicControl.add_ntuple``. Answer: ``RuleAdded``."""

    rule: Rule


class Attach(_Request, frozen=True, kw_only=True, tag="attach"):
    """``NicControl.attach`` of the dma-buf whose fd comes with this message. Answer: ``Attached``."""

    queues: Annotated[list[Queue], Meta(min_length=1, max_length=MAX_QUEUES)]
    rx_page_size: Annotated[int, Meta(ge=0, le=_U32_MAX)]


class Undo(_Request, frozen=True, kw_only=True, tag="undo"):
    """Undo what an answer gave a handle for; unknown handles are ignored. Answer: ``Done``."""

    handle: Handle


class UndoAll(_Request, frozen=True, kw_only=True, tag="undo-all"):
    """Undo all that this connection was given, the last first. Answer: ``Done``."""


class Allocate(_Request, frozen=True, kw_only=True, tag="allocate"):
    """Make a dma-buf of a kind that ``Welcome`` named. Answer: ``Allocated``, with its fd."""

    kind: Kind
    size_bytes: Size


class GetStatus(_Request, frozen=True, kw_only=True, tag="status"):
    """Ask what this user has and may have. Answer: ``Status``."""


Request: TypeAlias = (
    Hello
    | OpenNic
    | SetHeaderSplit
    | SetHdsThresh
    | SetRss
    | AddNtuple
    | Attach
    | Undo
    | UndoAll
    | Allocate
    | GetStatus
)


class _Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="is"):
    """What the broker answers; unknown fields are ignored, so that it may say more later.

    ``warnings`` are the texts of SettingWarnings.
    """

    warnings: list[str] = []


class Welcome(_Answer, frozen=True, kw_only=True, tag="welcome"):
    """The broker's version, and the kinds of memory that ``Allocate`` takes."""

    version: int
    kinds: list[str]


class Done(_Answer, frozen=True, kw_only=True, tag="done"):
    """It was done, and there is nothing to say about it."""


class Changed(_Answer, frozen=True, kw_only=True, tag="changed"):
    """A setting was changed; ``description`` says it in ethtool's words."""

    handle: Handle
    description: str


class RuleAdded(_Answer, frozen=True, kw_only=True, tag="rule-added"):
    """A rule is in the NIC, as ``rule`` says."""

    handle: Handle
    description: str
    rule: Rule


class Attached(_Answer, frozen=True, kw_only=True, tag="attached"):
    """The dma-buf is bound."""

    handle: Handle
    dmabuf_id: int


class Allocated(_Answer, frozen=True, kw_only=True, tag="allocated"):
    """The memory is the dma-buf whose fd comes with this message."""

    handle: Handle


class Amount(msgspec.Struct, frozen=True, kw_only=True):
    """One quota: how much of it is used, and how much there may be."""

    used: int
    allowed: int


class Status(_Answer, frozen=True, kw_only=True, tag="status"):
    """Quotas of the client's user by name; ``leased``: the queues of each NIC that this user's programs have."""

    user_id: int
    quotas: dict[str, Amount]
    leased: dict[str, list[int]]


class Failed(_Answer, frozen=True, kw_only=True, tag="failed"):
    """An error, whole: ``error`` is the class's name in ``devmem_tcp.errors``, or ValueError."""

    error: str
    message: str
    hint: str = ""
    errno: int = 0
    call: str = ""
    extack: str = ""
    attr: str = ""
    wanted: int = 0
    free: int = 0
    journal: str = ""


Answer: TypeAlias = Welcome | Done | Changed | RuleAdded | Attached | Allocated | Status | Failed

AnswerType = TypeVar("AnswerType", Welcome, Done, Changed, RuleAdded, Attached, Allocated, Status)

_encoder: Final = msgspec.json.Encoder()
_requests: Final = msgspec.json.Decoder(Request)
_answers: Final = msgspec.json.Decoder(Answer)


def encode(message: Request | Answer) -> bytes:
    """Encode a message.

    Raises:
        ValueError: it is longer than MAX_MESSAGE_BYTES.
    """
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes is over the broker's limit of {MAX_MESSAGE_BYTES}")
    return data


def encode_request(request: Request) -> bytes:
    """Encode a request that is within the limits of this file.

    Raises:
        ValueError: it is not; says what is over which.
    """
    data = encode(request)
    try:
        _requests.decode(data)  # msgspec checks what it decodes, not what is made
    except msgspec.ValidationError as error:
        raise ValueError(f"the broker takes no such {type(request).__name__}: {error}") from None
    return data


def decode_request(data: bytes, fds: Sequence[int]) -> Request:
    """Decode a request, and see that an fd came with it if, and only if, one belongs there.

    Raises:
        RemoteProtocolError: it is no request.
    """
    try:
        request: Request = _requests.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"this is no request: {error}") from error
    _check_fds(fds, isinstance(request, Attach), type(request).__name__)
    return request


def decode_answer(data: bytes, fds: Sequence[int]) -> Answer:
    """Decode an answer, and see that an fd came with it if, and only if, one belongs there.

    Raises:
        RemoteProtocolError: it is no answer.
    """
    try:
        answer: Answer = _answers.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"the broker's answer makes no sense: {error}") from error
    _check_fds(fds, isinstance(answer, Allocated), type(answer).__name__)
    return answer


def _check_fds(fds: Sequence[int], wanted: bool, what: str) -> None:
    if len(fds) != wanted:
        raise RemoteProtocolError(f"{what} takes {'one fd' if wanted else 'no fd'}, and {len(fds)} came with it")


_KERNEL_ERRORS: Final = {kind.__name__: kind for kind in (KernelError, BindError, NicSettingError)}
_PLAIN_ERRORS: Final[dict[str, type[DevmemError]]] = {
    kind.__name__: kind
    for kind in (DevmemError, BusyError, ClosedError, BrokenError, ProtocolError, RemoteProtocolError)
}


def pack_error(error: Exception) -> Failed:
    """Return the message for an error; of an unknown class it becomes the nearest that is known. Long texts are cut."""
    failed = _pack_error(error)
    texts = {field: getattr(failed, field)[:_MAX_TEXT] for field in ("message", "hint", "call", "extack", "attr")}
    return msgspec.structs.replace(failed, **texts)


def _pack_error(error: Exception) -> Failed:
    name = type(error).__name__
    match error:
        case KernelError():
            return Failed(
                error=name if name in _KERNEL_ERRORS else KernelError.__name__,
                message=error.message,
                hint=error.hint,
                errno=error.errno or 0,
                call=error.call,
                extack=error.extack,
                attr=error.attr,
            )
        case OutOfDeviceMemory():
            return Failed(error=name, message=error.message, hint=error.hint, wanted=error.wanted, free=error.free)
        case RestoreError():
            return Failed(error=name, message=error.message, hint=error.hint, journal=error.journal)
        case DevmemError():
            known = name if name in _PLAIN_ERRORS else DevmemError.__name__
            return Failed(error=known, message=error.message, hint=error.hint)
        case OSError():
            number = error.errno or errno.EIO
            return Failed(error=KernelError.__name__, message=str(error), errno=number, call="the broker's work")
        case ValueError():
            return Failed(error=ValueError.__name__, message=str(error))
    return Failed(error=BrokenError.__name__, message=f"the broker failed: {error}")


def with_warnings(answer: Answer, warnings: Sequence[Warning]) -> Answer:
    """Return an answer with the texts of warnings, cut like those of errors."""
    if not warnings:
        return answer
    texts = [str(warning)[:_MAX_TEXT] for warning in warnings[:_MAX_WARNINGS]]
    return msgspec.structs.replace(answer, warnings=texts)


def unpack_error(failed: Failed) -> Exception:
    """Return the error of a message, to be raised."""
    if failed.error in _KERNEL_ERRORS:
        return _KERNEL_ERRORS[failed.error](
            failed.errno, failed.call, extack=failed.extack, attr=failed.attr, hint=failed.hint
        )
    if failed.error == OutOfDeviceMemory.__name__:
        return OutOfDeviceMemory(failed.message, wanted=failed.wanted, free=failed.free, hint=failed.hint)
    if failed.error == RestoreError.__name__:
        return RestoreError(failed.message, journal=failed.journal, hint=failed.hint)
    if failed.error == ValueError.__name__:
        return ValueError(failed.message)
    return _PLAIN_ERRORS.get(failed.error, DevmemError)(failed.message, hint=failed.hint)
