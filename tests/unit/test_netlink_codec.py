"""Netlink messages, attributes and extended acks: round trips, malformed bytes, and names for what was refused."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from enum import IntEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.uapi import netlink as nl
from devmem_tcp.uapi.netlink import Attributes, ExtAck, Message, Policy

KINDS = st.integers(1, nl.NLA_TYPE_MASK)
PAYLOADS = st.binary(max_size=40)
ATTRIBUTES = st.lists(st.tuples(KINDS, PAYLOADS), max_size=8)


class Inner(IntEnum):
    ID = 1
    QUEUE_TYPE = 3


class Outer(IntEnum):
    IFINDEX = 1
    QUEUES = 2


NAMES = nl.AttributeNames.of(Outer, {Outer.QUEUES: nl.AttributeNames.of(Inner)})


# --- attributes -----------------------------------------------------------------------------------------------------


@given(ATTRIBUTES)
def test_attributes_come_back_as_they_were_written(wanted: list[tuple[int, bytes]]) -> None:
    data = b"".join(nl.attr(kind, payload) for kind, payload in wanted)
    assert len(data) % 4 == 0
    found = Attributes(data)
    assert len(found) == len(dict(wanted))
    assert {kind: found.get(kind) for kind in found} == dict(wanted)


@given(KINDS, st.lists(ATTRIBUTES, max_size=4))
def test_nests_come_back_each(kind: int, wanted: list[list[tuple[int, bytes]]]) -> None:
    data = b"".join(nl.nest(kind, *(nl.attr(*each) for each in nest)) for nest in wanted)
    found = Attributes(data).nests(kind)
    assert [{inner: nest.get(inner) for inner in nest} for nest in found] == [dict(nest) for nest in wanted]


@given(st.integers(0, 2**64 - 1))
def test_uint_takes_four_bytes_where_they_suffice(value: int) -> None:
    found = Attributes(nl.attr_uint(1, value))
    assert found.uint(1) == value
    assert len(found.get(1) or b"") == (4 if value < 2**32 else 8)


def test_numbers_of_every_size_are_little_endian() -> None:
    assert nl.attr_u8(1, 0xAB) == bytes.fromhex("05000100ab000000")
    assert nl.attr_u16(2, 0xABCD) == bytes.fromhex("06000200cdab0000")
    assert nl.attr_u32(3, 0xABCDEF01) == bytes.fromhex("0800030001efcdab")
    assert nl.attr_u64(4, 1 << 63) == bytes.fromhex("0c0004000000000000000080")
    assert nl.attr_s32(5, -2) == bytes.fromhex("08000500feffffff")
    assert nl.attr_flag(6) == bytes.fromhex("04000600")
    assert nl.attr_string(7, "eth0") == bytes.fromhex("0900070065746830" + "00000000")
    assert nl.nest(8, nl.attr_flag(1)) == bytes.fromhex("0800088004000100")


def test_readers_read_what_writers_wrote() -> None:
    data = b"".join(
        (
            nl.attr_u8(1, 255),
            nl.attr_u16(2, 65535),
            nl.attr_u64(4, 2**64 - 1),
            nl.attr_s32(5, -7),
            nl.attr_string(6, "größe"),
            nl.attr_flag(7),
        )
    )
    found = Attributes(data)
    assert (found.u8(1), found.u16(2), found.u64(4), found.s32(5)) == (255, 65535, 2**64 - 1, -7)
    assert found.string(6) == "größe"
    assert found.flag(7)
    assert not found.flag(8)
    assert 7 in found
    assert 8 not in found


def test_text_may_lack_its_nul_but_not_have_one_within() -> None:
    assert Attributes(nl.attr(1, b"eth0")).string(1) == "eth0"
    with pytest.raises(ValueError, match="NUL"):
        Attributes(nl.attr(1, b"et\0h0\0")).string(1)
    with pytest.raises(ValueError, match="NUL"):
        nl.attr_string(1, "et\0h0")


def test_the_last_of_a_kind_counts() -> None:
    assert Attributes(nl.attr_u32(1, 5) + nl.attr_u32(1, 6)).u32(1) == 6


def test_what_is_absent_is_the_default_or_an_error() -> None:
    empty = Attributes()
    assert empty.u32(1, 7) == 7
    assert empty.u32(1, default=None) is None
    assert empty.string(1, "") == ""
    assert empty.get(1) is None
    assert len(empty.nested(1)) == 0
    assert empty.nests(1) == []
    with pytest.raises(ValueError, match="attribute 1 is missing"):
        empty.u32(1)


@pytest.mark.parametrize("size", [0, 1, 3, 5, 8])
def test_a_number_of_the_wrong_size_is_an_error_even_with_a_default(size: int) -> None:
    with pytest.raises(ValueError, match=f"attribute 1 has {size} bytes, not 4"):
        Attributes(nl.attr(1, bytes(size))).u32(1, 0)


@pytest.mark.parametrize(
    ("make", "value"), [(nl.attr_u8, 256), (nl.attr_u32, -1), (nl.attr_s32, 1 << 31), (nl.attr_uint, 1 << 64)]
)
def test_a_number_that_does_not_fit_is_refused(make: Callable[[int, int], bytes], value: int) -> None:
    with pytest.raises(ValueError, match=f"{value} does not fit"):
        make(1, value)


def test_an_attribute_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        nl.attr(1, bytes(65532))
    with pytest.raises(ValueError, match="does not fit"):
        nl.attr(0x10000, b"")
    assert len(nl.attr(1, bytes(65531))) == 65536


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (bytes.fromhex("0300010000000000"), "3 bytes long"),  # shorter than its header
        (bytes.fromhex("00000100"), "0 bytes long"),  # would never end
        (bytes.fromhex("0900010000000000"), "9 bytes long, of 8"),  # runs past the end
        (nl.attr_u32(1, 0) + b"\x04\x00", "2 bytes at byte 8 are no"),
    ],
)
def test_malformed_attributes_are_refused(data: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Attributes(data)


def test_the_last_attribute_needs_no_padding() -> None:
    assert Attributes(nl.attr_string(1, "eth0")[:9]).string(1) == "eth0"


@given(st.binary(max_size=120))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        found = Attributes(data)
        assert sum(len(found.get(kind) or b"") for kind in found) <= len(data)
    with contextlib.suppress(ValueError):
        for message in nl.parse_messages(data):
            nl.parse_ack(message)


# --- messages -------------------------------------------------------------------------------------------------------

MESSAGES = st.builds(
    Message,
    kind=st.integers(0, 0xFFFF),
    flags=st.integers(0, 0xFFFF),
    sequence=st.integers(0, 2**32 - 1),
    port=st.integers(0, 2**32 - 1),
    payload=st.binary(max_size=40),
)


def write(message: Message) -> bytes:
    return nl.message(message.kind, message.flags, message.sequence, message.payload, port=message.port)


@given(st.lists(MESSAGES, max_size=5))
def test_messages_come_back_as_they_were_written(wanted: list[Message]) -> None:
    assert nl.parse_messages(b"".join(write(message) for message in wanted)) == wanted


@given(st.lists(MESSAGES, min_size=1, max_size=3), st.data())
def test_a_datagram_cut_short_is_refused_or_ends_between_messages(wanted: list[Message], data: st.DataObject) -> None:
    whole = b"".join(write(message) for message in wanted)
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    try:
        found = nl.parse_messages(cut)
    except ValueError:
        return
    assert found == wanted[: len(found)]
    assert len(whole) - len(cut) < 4 or len(found) < len(wanted)


def test_a_message_shorter_than_its_header_is_refused() -> None:
    with pytest.raises(ValueError, match="0 bytes long"):
        nl.parse_messages(bytes(16))


def test_generic_payloads_have_a_command_and_attributes() -> None:
    payload = nl.generic(13, 1, nl.attr_u32(1, 7))
    assert payload == bytes.fromhex("0d010000" + "0800010007000000")
    command, found = nl.parse_generic(payload)
    assert command == 13
    assert found.u32(1) == 7
    with pytest.raises(ValueError, match="3 bytes are less"):
        nl.parse_generic(payload[:3])
    with pytest.raises(ValueError, match="command 256"):
        nl.generic(256, 1)


# --- acks -----------------------------------------------------------------------------------------------------------

REQUEST = nl.message(
    20,
    nl.NLM_F_REQUEST | nl.NLM_F_ACK,
    1,
    nl.generic(
        13,
        1,
        nl.attr_u32(Outer.IFINDEX, 2),
        nl.nest(Outer.QUEUES, nl.attr_u32(Inner.ID, 0), nl.attr_u32(Inner.QUEUE_TYPE, 0)),
        nl.nest(Outer.QUEUES, nl.attr_u32(Inner.ID, 1), nl.attr_u32(Inner.QUEUE_TYPE, 1)),
        nl.attr_u32(9, 0),
    ),
)
FIRST_NEST = 16 + 4 + 8
SECOND_NEST = FIRST_NEST + 4 + 16


def ack(status: int, *attrs: bytes, capped: bool = True) -> Message:
    """Make an NLMSG_ERROR as the kernel does; not ``capped``, it echoes all of REQUEST."""
    echo = REQUEST[:16] if capped else REQUEST
    flags = (nl.NLM_F_CAPPED if capped else 0) | (nl.NLM_F_ACK_TLVS if attrs else 0)
    return Message(nl.NLMSG_ERROR, flags, 1, 0, struct.pack("<i", status) + echo + b"".join(attrs))


@pytest.mark.parametrize("capped", [True, False])
def test_an_ack_says_all_it_has_with_the_request_echoed_or_not(capped: bool) -> None:
    said = ack(
        -22,
        nl.attr_string(nl.NLMSGERR_ATTR_MSG, "tcp-data-split is disabled"),
        nl.attr_u32(nl.NLMSGERR_ATTR_OFFS, 28),
        nl.attr_u32(nl.NLMSGERR_ATTR_MISS_TYPE, 3),
        nl.attr_u32(nl.NLMSGERR_ATTR_MISS_NEST, 48),
        nl.nest(
            nl.NLMSGERR_ATTR_POLICY,
            nl.attr_u32(1, 4),
            nl.attr_u64(nl.NL_POLICY_TYPE_ATTR_MIN_VALUE_U, 4096),
            nl.attr_u64(nl.NL_POLICY_TYPE_ATTR_MAX_VALUE_U, 65536),
        ),
        capped=capped,
    )
    assert nl.parse_ack(said) == (22, ExtAck("tcp-data-split is disabled", 28, 3, 48, Policy(4096, 65536)))


def test_an_ack_without_attributes_says_nothing() -> None:
    assert nl.parse_ack(ack(0)) == (0, ExtAck())
    assert nl.parse_ack(ack(-1, capped=False)) == (1, ExtAck())


def test_the_end_of_a_dump_may_be_an_error() -> None:
    payload = struct.pack("<i", -95) + nl.attr_string(nl.NLMSGERR_ATTR_MSG, "no")
    done = Message(nl.NLMSG_DONE, nl.NLM_F_MULTI | nl.NLM_F_ACK_TLVS, 1, 0, payload)
    assert nl.parse_ack(done) == (95, ExtAck("no"))


@pytest.mark.parametrize(
    "bad",
    [
        Message(nl.NLMSG_ERROR, 0, 1, 0, bytes(3)),
        Message(nl.NLMSG_ERROR, 0, 1, 0, bytes(4)),  # no room for the request's header
        Message(nl.NLMSG_ERROR, 0, 1, 0, struct.pack("<i", 1) + REQUEST[:16]),
        Message(nl.NLMSG_ERROR, nl.NLM_F_ACK_TLVS, 1, 0, bytes(4) + REQUEST[:16]),  # no echo where there must be one
        Message(nl.NLMSG_ERROR, nl.NLM_F_ACK_TLVS | nl.NLM_F_CAPPED, 1, 0, bytes(4) + REQUEST[:16] + b"\x01"),
        Message(nl.NLMSG_NOOP, 0, 1, 0, bytes(4)),
    ],
)
def test_a_malformed_ack_is_refused(bad: Message) -> None:
    with pytest.raises(ValueError, match=r"ack|attribute"):
        nl.parse_ack(bad)


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (Policy(1, 4), "1 to 4"),
        (Policy(min_value=4096), "at least 4096"),
        (Policy(max_value=-1), "at most -1"),
        (Policy(max_length=15), "at most 15 bytes long"),
        (Policy(), ""),
    ],
)
def test_a_policy_reads_as_words(policy: Policy, told: str) -> None:
    assert str(policy) == told


def test_bounds_may_be_negative() -> None:
    wants = nl.nest(nl.NLMSGERR_ATTR_POLICY, nl.attr_u64(nl.NL_POLICY_TYPE_ATTR_MIN_VALUE_S, 2**64 - 5))
    assert nl.parse_ack(ack(-34, wants))[1].policy == Policy(min_value=-5)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (ExtAck(), ""),
        (ExtAck(offset=20), "ifindex"),
        (ExtAck(offset=FIRST_NEST), "queues"),
        (ExtAck(offset=FIRST_NEST + 4), "queues.id"),
        (ExtAck(offset=FIRST_NEST + 12), "queues.queue-type"),
        (ExtAck(offset=SECOND_NEST + 12), "queues.queue-type"),
        (ExtAck(offset=SECOND_NEST + 20), "#9"),
        (ExtAck(offset=len(REQUEST)), ""),  # of another message
        (ExtAck(offset=0), ""),
        (ExtAck(missing_type=1), "ifindex"),
        (ExtAck(missing_type=77), "#77"),
        (ExtAck(missing_type=3, missing_nest=SECOND_NEST), "queues.queue-type"),
        (ExtAck(offset=20, missing_type=2), "queues"),
    ],
)
def test_the_culprit_is_named_from_the_top(said: ExtAck, named: str) -> None:
    assert nl.name_culprit(REQUEST, said, NAMES) == named


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_no_offset_breaks_the_naming(offset: int, nest: int) -> None:
    nl.name_culprit(REQUEST, ExtAck(offset=offset), NAMES)
    nl.name_culprit(REQUEST, ExtAck(missing_type=1, missing_nest=nest), NAMES)
