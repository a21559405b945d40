"""Netlink messages, attributes and extended acks: linux/netlink.h and linux/genetlink.h, as data.

Numbers are in the byte order of the machine, as in the kernel; this package runs on little-endian Linux. Parsing is
strict: whatever does not add up is a ValueError, and no byte past the end is looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Final, TypeVar

Default = TypeVar("Default")

NETLINK_GENERIC: Final = 16
SOL_NETLINK: Final = 270
NETLINK_CAP_ACK: Final = 10  # an error does not echo the request: only its header
NETLINK_EXT_ACK: Final = 11  # an error has attributes: text, offset, what is missing

NLMSG_NOOP: Final = 1
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLMSG_MIN_TYPE: Final = 16  # below are control messages

NLM_F_REQUEST: Final = 0x1
NLM_F_MULTI: Final = 0x2
NLM_F_ACK: Final = 0x4
NLM_F_DUMP_INTR: Final = 0x10  # what is dumped changed meanwhile: the parts do not fit together
NLM_F_DUMP: Final = 0x300  # of a request
NLM_F_CAPPED: Final = 0x100  # of an ack: no echo of the request's payload
NLM_F_ACK_TLVS: Final = 0x200  # of an ack: attributes follow

NLA_F_NESTED: Final = 0x8000
NLA_F_NET_BYTEORDER: Final = 0x4000
NLA_TYPE_MASK: Final = 0x3FFF

NLMSGERR_ATTR_MSG: Final = 1
NLMSGERR_ATTR_OFFS: Final = 2
NLMSGERR_ATTR_POLICY: Final = 4
NLMSGERR_ATTR_MISS_TYPE: Final = 5
NLMSGERR_ATTR_MISS_NEST: Final = 6

NL_POLICY_TYPE_ATTR_MIN_VALUE_S: Final = 2
NL_POLICY_TYPE_ATTR_MAX_VALUE_S: Final = 3
NL_POLICY_TYPE_ATTR_MIN_VALUE_U: Final = 4
NL_POLICY_TYPE_ATTR_MAX_VALUE_U: Final = 5
NL_POLICY_TYPE_ATTR_MIN_LENGTH: Final = 6
NL_POLICY_TYPE_ATTR_MAX_LENGTH: Final = 7

GENL_ID_CTRL: Final = 16
CTRL_CMD_GETFAMILY: Final = 3
CTRL_ATTR_FAMILY_ID: Final = 1
CTRL_ATTR_FAMILY_NAME: Final = 2
CTRL_ATTR_VERSION: Final = 3

NLMSGHDR: Final = struct.Struct("<IHHII")
"""struct nlmsghdr, 16 bytes: nlmsg_len (header included), nlmsg_type, nlmsg_flags, nlmsg_seq, nlmsg_pid."""

GENLMSGHDR: Final = struct.Struct("<BBH")
"""struct genlmsghdr, 4 bytes: cmd, version, reserved."""

NLATTR: Final = struct.Struct("<HH")
"""struct nlattr, 4 bytes: nla_len (header included, padding not), nla_type."""

_ALIGNMENT: Final = 4  # NLMSG_ALIGNTO and NLA_ALIGNTO
_MAX_ATTRIBUTE: Final = 0xFFFF
_ERRNO: Final = struct.Struct("<i")
_REQUIRED: Final[Any] = object()  # stands for no default


def align(size: int) -> int:
    """Round a size in bytes up to the alignment of messages and attributes; the kernel's NLA_ALIGN."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# --- writing --------------------------------------------------------------------------------------------------------


def attr(kind: int, payload: bytes) -> bytes:
    """Make one attribute, padded to 4 bytes. ``kind`` may carry NLA_F_NESTED.

    Raises:
        ValueError: the kind does not fit its 16 bits, or header and payload together are more than 65535 bytes.
    """
    size = NLATTR.size + len(payload)
    if size > _MAX_ATTRIBUTE or not 0 <= kind <= 0xFFFF:
        raise ValueError(f"attribute {kind} of {len(payload)} bytes does not fit its header")
    return NLATTR.pack(size, kind) + payload.ljust(align(len(payload)), b"\0")


def attr_u8(kind: int, value: int) -> bytes:
    """Make an attribute of 8 bits unsigned; ValueError if ``value`` does not fit."""
    return attr(kind, _number(value, 1))


def attr_u16(kind: int, value: int) -> bytes:
    """Make an attribute of 16 bits unsigned; ValueError if ``value`` does not fit."""
    return attr(kind, _number(value, 2))


def attr_u32(kind: int, value: int) -> bytes:
    """Make an attribute of 32 bits unsigned; ValueError if ``value`` does not fit."""
    return attr(kind, _number(value, 4))


def attr_s32(kind: int, value: int) -> bytes:
    """Make an attribute of 32 bits signed; ValueError if ``value`` does not fit."""
    return attr(kind, _number(value, 4, signed=True))


def attr_u64(kind: int, value: int) -> bytes:
    """Make an attribute of 64 bits unsigned; ValueError if ``value`` does not fit."""
    return attr(kind, _number(value, 8))


def attr_uint(kind: int, value: int) -> bytes:
    """Make an attribute of netlink's ``uint``: 4 bytes where the value fits them, else 8; ValueError if neither.

    Source: Documentation/userspace-api/netlink/specs.rst, "uint, sint".
    """
    return attr(kind, _number(value, 4 if 0 <= value < 1 << 32 else 8))


def attr_string(kind: int, text: str) -> bytes:
    """Make an attribute of text, UTF-8 with a NUL at the end; ValueError if there is one within."""
    if "\0" in text:
        raise ValueError(f"text of attribute {kind} has a NUL in it: {text!r}")
    return attr(kind, text.encode() + b"\0")


def attr_flag(kind: int) -> bytes:
    """Make an attribute that is true by being there."""
    return attr(kind, b"")


def nest(kind: int, *attrs: bytes) -> bytes:
    """Make an attribute that holds ``attrs``, each made by a function of this module."""
    return attr(kind | NLA_F_NESTED, b"".join(attrs))


def message(kind: int, flags: int, sequence: int, payload: bytes, *, port: int = 0) -> bytes:
    """Make one netlink message, padded to 4 bytes.

    Args:
        kind: nlmsg_type: for generic netlink, the family's id.
        flags: NLM_F_…
        sequence: 32 bits, to tell the answers to this request by.
        payload: what follows struct nlmsghdr; for generic netlink, made by ``generic``.
        port: nlmsg_pid; 0 in a request.

    Raises:
        ValueError: a number does not fit its field.
    """
    try:
        header = NLMSGHDR.pack(NLMSGHDR.size + len(payload), kind, flags, sequence, port)
    except struct.error as error:
        raise ValueError(f"netlink message of type {kind}, flags {flags:#x}, sequence {sequence}: {error}") from None
    return header + payload.ljust(align(len(payload)), b"\0")


def generic(command: int, version: int, *attrs: bytes) -> bytes:
    """Make the payload of a generic netlink message: its header and ``attrs``. ValueError: a number does not fit."""
    try:
        return GENLMSGHDR.pack(command, version, 0) + b"".join(attrs)
    except struct.error as error:
        raise ValueError(f"generic netlink command {command}, version {version}: {error}") from None


def _number(value: int, size: int, *, signed: bool = False) -> bytes:
    try:
        return value.to_bytes(size, "little", signed=signed)
    except OverflowError:
        raise ValueError(f"{value} does not fit {8 * size} bits {'signed' if signed else 'unsigned'}") from None


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """One netlink message: ``kind`` is nlmsg_type, ``port`` nlmsg_pid, ``payload`` all after the header."""

    kind: int
    flags: int
    sequence: int
    port: int
    payload: bytes


def parse_messages(datagram: bytes) -> list[Message]:
    """Parse all messages of one datagram.

    Raises:
        ValueError: a message is shorter than its header or runs past the end, or there are bytes that are none.
    """
    found = []
    at = 0
    while at < len(datagram):
        if len(datagram) - at < NLMSGHDR.size:
            raise ValueError(f"{len(datagram) - at} bytes at byte {at} are no netlink message")
        size, kind, flags, sequence, port = NLMSGHDR.unpack_from(datagram, at)
        end = at + size
        if size < NLMSGHDR.size or end > len(datagram):
            raise ValueError(f"netlink message at byte {at} is {size} bytes long, of {len(datagram) - at} there are")
        found.append(Message(kind, flags, sequence, port, datagram[at + NLMSGHDR.size : end]))
        at = align(end)
    return found


def parse_generic(payload: bytes) -> tuple[int, Attributes]:
    """Parse the payload of a generic netlink message into its command and attributes.

    Raises:
        ValueError: shorter than struct genlmsghdr, or malformed attributes.
    """
    if len(payload) < GENLMSGHDR.size:
        raise ValueError(f"{len(payload)} bytes are less than struct genlmsghdr's {GENLMSGHDR.size}")
    command, _, _ = GENLMSGHDR.unpack_from(payload)
    return command, Attributes(payload[GENLMSGHDR.size :])


def walk_attributes(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (kind, start, end) of each attribute between two offsets of ``data``; header included, padding not.

    ``kind`` is without NLA_F_NESTED and NLA_F_NET_BYTEORDER.

    Raises:
        ValueError: an attribute is shorter than its header or runs past ``end``, or there are bytes that are none.
            Attributes before a bad one have been yielded by then.
    """
    at = start
    while at < end:
        if end - at < NLATTR.size:
            raise ValueError(f"{end - at} bytes at byte {at} are no netlink attribute")
        size, kind = NLATTR.unpack_from(data, at)
        if size < NLATTR.size or at + size > end:
            raise ValueError(f"netlink attribute at byte {at} is {size} bytes long, of {end - at} there are")
        yield kind & NLA_TYPE_MASK, at, at + size
        at += align(size)


class Attributes:
    """The attributes of one message or nest, by kind.

    Where a kind is there several times, the last one counts, as in the kernel's nla_parse; ``nests`` gives them all.
    Each reader takes a default for an attribute that is absent; without one, and for one of the wrong size, it raises
    ValueError.
    """

    __slots__ = ("_payloads",)

    def __init__(self, data: bytes = b"") -> None:
        """Parse ``data``. Raises ValueError as ``walk_attributes``."""
        self._payloads: dict[int, list[bytes]] = {}
        for kind, start, end in walk_attributes(data, 0, len(data)):
            self._payloads.setdefault(kind, []).append(data[start + NLATTR.size : end])

    def __contains__(self, kind: int) -> bool:
        return kind in self._payloads

    def __iter__(self) -> Iterator[int]:
        """Iterate the kinds that are there, each once, in order of arrival."""
        return iter(self._payloads)

    def __len__(self) -> int:
        """How many kinds are there."""
        return len(self._payloads)

    def __repr__(self) -> str:
        told = ", ".join(f"{kind}: {payload.hex()}" for kind, all_of in self._payloads.items() for payload in all_of)
        return f"<Attributes {told}>"

    def get(self, kind: int) -> bytes | None:
        """Return an attribute's bytes; None if it is absent."""
        payloads = self._payloads.get(kind)
        return payloads[-1] if payloads else None

    def u8(self, kind: int, default: Default = _REQUIRED) -> int | Default:
        """Read 8 bits unsigned."""
        return self._number(kind, (1,), default)

    def u16(self, kind: int, default: Default = _REQUIRED) -> int | Default:
        """Read 16 bits unsigned."""
        return self._number(kind, (2,), default)

    def u32(self, kind: int, default: Default = _REQUIRED) -> int | Default:
        """Read 32 bits unsigned."""
        return self._number(kind, (4,), default)

    def s32(self, kind: int, default: Default = _REQUIRED) -> int | Default:
        """Read 32 bits signed."""
        return self._number(kind, (4,), default, signed=True)

    def u64(self, kind: int, default: Default = _REQUIRED) -> int | Default:
        """Read 64 bits unsigned."""
        return self._number(kind, (8,), default)

    def uint(self, kind: int, default: Default = _REQUIRED) -> int | Default:
        """Read netlink's ``uint``: 4 or 8 bytes unsigned."""
        return self._number(kind, (4, 8), default)

    def string(self, kind: int, default: Default = _REQUIRED) -> str | Default:
        """Read text, with or without the NUL at its end; bytes that are no UTF-8 are replaced."""
        payload = self._payload(kind, default)
        if not isinstance(payload, bytes):
            return payload
        text = payload.rstrip(b"\0")
        if b"\0" in text:
            raise ValueError(f"text of attribute {kind} has a NUL in it: {payload!r}")
        return text.decode(errors="replace")

    def flag(self, kind: int) -> bool:
        """Whether the attribute is there."""
        return kind in self

    def nested(self, kind: int) -> Attributes:
        """Read a nest; one without attributes if it is absent. Raises ValueError as ``walk_attributes``."""
        return Attributes(self.get(kind) or b"")

    def nests(self, kind: int) -> list[Attributes]:
        """Read every nest of this kind (a multi-attr), in order. Raises ValueError as ``walk_attributes``."""
        return [Attributes(payload) for payload in self._payloads.get(kind, ())]

    def _payload(self, kind: int, default: Default) -> bytes | Default:
        payload = self.get(kind)
        if payload is not None:
            return payload
        if default is _REQUIRED:
            raise ValueError(f"attribute {kind} is missing")
        return default

    def _number(self, kind: int, sizes: tuple[int, ...], default: Default, *, signed: bool = False) -> int | Default:
        payload = self._payload(kind, default)
        if not isinstance(payload, bytes):
            return payload
        if len(payload) not in sizes:
            wanted = " or ".join(map(str, sizes))
            raise ValueError(f"attribute {kind} has {len(payload)} bytes, not {wanted}")
        return int.from_bytes(payload, "little", signed=signed)


# --- refusals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Policy:
    """What the kernel wants of an attribute it refused: bounds of its value, or of its length in bytes."""

    min_value: int | None = None
    max_value: int | None = None
    min_length: int | None = None
    max_length: int | None = None

    def __str__(self) -> str:
        value, length = _bounds(self.min_value, self.max_value), _bounds(self.min_length, self.max_length)
        return ", ".join(filter(None, (value, f"{length} bytes long" if length else "")))


def _bounds(low: int | None, high: int | None) -> str:
    if low is None:
        return "" if high is None else f"at most {high}"
    return f"at least {low}" if high is None else f"{low} to {high}"


@dataclass(frozen=True, slots=True)
class ExtAck:
    """What the kernel says about a refused request, besides the errno.

    Offsets are in bytes from the start of the request's struct nlmsghdr, and point at an attribute's header; None where
    the kernel gave none. An attribute that ``missing_type`` names is missing in the nest at ``missing_nest``, or at the
    top level where that is None.

    Kernel: net/netlink/af_netlink.c, netlink_ack_tlv_fill.
    """

    message: str = ""
    offset: int | None = None
    missing_type: int | None = None
    missing_nest: int | None = None
    policy: Policy | None = None


def parse_ack(ack: Message) -> tuple[int, ExtAck]:
    """Parse an NLMSG_ERROR or NLMSG_DONE into the errno, 0 for success, and what the kernel says about it.

    Kernel: net/netlink/af_netlink.c, netlink_ack and netlink_dump_done. An error echoes the request's header, and
    unless NLM_F_CAPPED is set its payload too, before the attributes; the end of a dump echoes nothing.

    Raises:
        ValueError: another kind of message, too short, a positive status, or malformed attributes.
    """
    payload = ack.payload
    if ack.kind not in (NLMSG_ERROR, NLMSG_DONE) or len(payload) < _ERRNO.size:
        raise ValueError(f"message of type {ack.kind} and {len(payload)} bytes is no ack")
    (status,) = _ERRNO.unpack_from(payload)
    if status > 0:
        raise ValueError(f"ack with a positive status: {status}")
    at = _ERRNO.size
    if ack.kind == NLMSG_ERROR:
        if len(payload) < at + NLMSGHDR.size:
            raise ValueError(f"ack of {len(payload)} bytes has no room for the request's header")
        echoed = NLMSGHDR.size if ack.flags & NLM_F_CAPPED else align(NLMSGHDR.unpack_from(payload, at)[0])
        at += echoed
    if not ack.flags & NLM_F_ACK_TLVS:
        return -status, ExtAck()
    if at > len(payload):
        raise ValueError(f"ack of {len(payload)} bytes does not hold the request's echo, to byte {at}")
    return -status, _parse_ext_ack(Attributes(payload[at:]))


def _parse_ext_ack(found: Attributes) -> ExtAck:
    policy = None
    if NLMSGERR_ATTR_POLICY in found:
        wants = found.nested(NLMSGERR_ATTR_POLICY)
        policy = Policy(
            min_value=_bound(wants, NL_POLICY_TYPE_ATTR_MIN_VALUE_U, NL_POLICY_TYPE_ATTR_MIN_VALUE_S),
            max_value=_bound(wants, NL_POLICY_TYPE_ATTR_MAX_VALUE_U, NL_POLICY_TYPE_ATTR_MAX_VALUE_S),
            min_length=wants.u32(NL_POLICY_TYPE_ATTR_MIN_LENGTH, None),
            max_length=wants.u32(NL_POLICY_TYPE_ATTR_MAX_LENGTH, None),
        )
    return ExtAck(
        message=found.string(NLMSGERR_ATTR_MSG, ""),
        offset=found.u32(NLMSGERR_ATTR_OFFS, None),
        missing_type=found.u32(NLMSGERR_ATTR_MISS_TYPE, None),
        missing_nest=found.u32(NLMSGERR_ATTR_MISS_NEST, None),
        policy=policy,
    )


def _bound(wants: Attributes, unsigned: int, signed: int) -> int | None:
    """Read one bound of a policy, which the kernel gives in one of two attributes of 64 bits."""
    bound = wants.u64(signed, None)
    if bound is None:
        return wants.u64(unsigned, None)
    return bound - (1 << 64) if bound >> 63 else bound


# --- names ----------------------------------------------------------------------------------------------------------


def spell(member: IntEnum) -> str:
    """Return an enum member's name as the specifications spell it: BIND_RX is ``bind-rx``."""
    return member.name.lower().replace("_", "-")


@dataclass(frozen=True)
class AttributeNames:
    """The names of one attribute set, for errors: by kind, and for those that are nests, the set within."""

    names: Mapping[int, str]
    nests: Mapping[int, AttributeNames] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, kinds: type[IntEnum], nests: Mapping[int, AttributeNames] = MappingProxyType({})) -> AttributeNames:
        """Take the names from an enum: RX_PAGE_SIZE is ``rx-page-size``."""
        return cls(MappingProxyType({int(kind): spell(kind) for kind in kinds}), nests)

    def name(self, kind: int) -> str:
        """Name an attribute; one that is not known is named by its number."""
        return self.names.get(kind, f"#{kind}")

    def within(self, kind: int) -> AttributeNames:
        """Return the names of what a nest holds; none if it is not known as a nest."""
        return self.nests.get(kind, NO_NAMES)


NO_NAMES: Final = AttributeNames(MappingProxyType({}))


def name_culprit(request: bytes, said: ExtAck, names: AttributeNames) -> str:
    """Name the bad or missing attribute of a generic netlink request, from the top: ``queues.type``; "" for none.

    Args:
        request: the whole message as it was sent, which an ack does not echo in full.
        said: what the kernel said about it.
        names: those of the request's attributes.
    """
    if said.missing_type is not None:
        path, within = _path_to(request, said.missing_nest, names)
        return ".".join((*path, within.name(said.missing_type)))
    return ".".join(_path_to(request, said.offset, names)[0])


def _path_to(request: bytes, offset: int | None, names: AttributeNames) -> tuple[list[str], AttributeNames]:
    """Return the names down to the attribute at ``offset``, and those of what it holds; no path if there is none."""
    path: list[str] = []
    within = names
    start, end = NLMSGHDR.size + GENLMSGHDR.size, len(request)
    while offset is not None:
        around = next((found for found in walk_attributes(request, start, end) if found[1] <= offset < found[2]), None)
        if around is None:
            return [], names
        kind, start, end = around
        path.append(within.name(kind))
        known_nest = kind in within.nests
        within = within.within(kind)
        if start == offset or not known_nest:
            break
        start += NLATTR.size
    return path, within
