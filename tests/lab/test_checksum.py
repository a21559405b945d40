"""Internet checksums: against the definition taken word by word, published examples, and every transport."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from devmem_tcp.lab.checksum import (
    checksum,
    fill_ip_checksum,
    fill_l4_checksum,
    ones_sum,
    piece_sums,
    verify_ip,
    verify_l4,
)
from devmem_tcp.lab.crafting import Path, echo_request, tcp_frame, udp_frame
from devmem_tcp.lab.frames import parse

PATH4 = Path.between("02:00:00:00:00:01", "10.0.0.1", "02:00:00:00:00:02", "10.0.0.2")
PATH6 = Path.between("02:00:00:00:00:01", "fd00::1", "02:00:00:00:00:02", "fd00::2")
PATHS = pytest.mark.parametrize("path", [PATH4, PATH6], ids=["IPv4", "IPv6"])
UDP_CHECKSUM_4 = slice(14 + 20 + 6, 14 + 20 + 8)
UDP_CHECKSUM_6 = slice(14 + 40 + 6, 14 + 40 + 8)

# Long data is summed another way than short data; both, and the border, are met.
some_bytes = st.binary(max_size=200) | st.integers(700, 3000).flatmap(lambda n: st.binary(min_size=n, max_size=n))


def sum_by_words(data: bytes, start: int = 0) -> int:
    """RFC 1071, section 4.1, as it is written there."""
    padded = data + bytes(len(data) % 2)
    total = start + sum(padded[i] << 8 | padded[i + 1] for i in range(0, len(padded), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def frames_of(path: Path, payload: bytes) -> list[bytes]:
    return [
        tcp_frame(path, 40000, 5201, payload, sequence=7, options=b"\x01" * 12),
        udp_frame(path, 40000, 53, payload),
        echo_request(path, 77, 1, payload),
    ]


# --- sums ------------------------------------------------------------------------------------------------------------


@given(some_bytes, st.integers(0, 1 << 40))
@example(b"", 0)
@example(b"", 0xFFFF)
@example(bytes(2000), 0)
@example(b"\xff" * 2000, 0)
@example(b"\xff\xff", 0)
def test_the_sum_is_that_of_its_definition(data: bytes, start: int) -> None:
    assert ones_sum(data, start) == sum_by_words(data, start)


@pytest.mark.parametrize("size", [*range(760, 776), 65535, 65536])
def test_every_length_around_the_border_and_the_longest(size: int) -> None:
    data = bytes((i * 7 + 3) & 0xFF for i in range(size))
    assert ones_sum(data) == sum_by_words(data)
    assert ones_sum(bytearray(data)) == sum_by_words(data)


@given(some_bytes, st.integers(0, 3))
def test_any_part_of_a_buffer_can_be_summed(data: bytes, skip: int) -> None:
    assert ones_sum(memoryview(data)[skip:]) == sum_by_words(data[skip:])


@given(some_bytes, some_bytes)
def test_sums_chain_after_an_even_length(first: bytes, second: bytes) -> None:
    first += bytes(len(first) % 2)
    assert ones_sum(second, ones_sum(first)) == ones_sum(first + second)


def test_the_example_of_rfc_1071() -> None:
    data = bytes.fromhex("0001f203f4f5f6f7")
    assert ones_sum(data) == 0xDDF2
    assert checksum(data) == 0x220D


def test_zero_and_all_ones_are_told_apart() -> None:
    assert ones_sum(bytes(20)) == 0
    assert ones_sum(b"\xff\xff") == 0xFFFF
    assert checksum(bytes(1000)) == 0xFFFF
    assert checksum(b"\xff" * 1000) == 0


# --- headers ---------------------------------------------------------------------------------------------------------


def test_a_published_ipv4_header() -> None:
    header = bytes.fromhex("45000073000040004011b861c0a80001c0a800c7")
    frame = bytearray(bytes(12) + b"\x08\x00" + header + bytes(0x73 - 20))
    assert verify_ip(frame)
    frame[14 + 10 : 14 + 12] = b"\x12\x34"
    assert not verify_ip(frame)
    assert fill_ip_checksum(frame)
    assert frame[14:34] == header


def test_an_ip_checksum_is_for_ipv4_alone() -> None:
    frame = bytearray(udp_frame(PATH6, 1, 2))
    before = bytes(frame)
    assert not fill_ip_checksum(frame)
    assert frame == before
    assert verify_ip(frame)
    assert not verify_ip(b"not a frame")
    assert not fill_ip_checksum(bytearray(b"neither is this one"))


@PATHS
@pytest.mark.parametrize("payload_bytes", [0, 1, 2, 999, 1448])
def test_filled_checksums_make_the_words_sum_to_all_ones(path: Path, payload_bytes: int) -> None:
    for frame in frames_of(path, b"\x5a" * payload_bytes):
        parsed = parse(frame)
        message = frame[parsed.l4_offset :]
        pseudo = parsed.src + parsed.dst + len(message).to_bytes(4, "big") + parsed.protocol.to_bytes(4, "big")
        assert sum_by_words(message + bytes(len(message) % 2) + (pseudo if parsed.protocol != 1 else b"")) == 0xFFFF
        assert verify_l4(frame)
        assert verify_ip(frame)


@given(st.sampled_from([PATH4, PATH6]), st.binary(max_size=100), st.data())
def test_filling_again_changes_nothing_and_any_wrong_bit_is_seen(
    path: Path, payload: bytes, data: st.DataObject
) -> None:
    frame = bytearray(data.draw(st.sampled_from(frames_of(path, payload))))
    right = bytes(frame)
    parsed = parse(frame)
    covered = [*range(parsed.l4_offset, parsed.l4_offset + 2), *range(parsed.payload_offset, len(frame))]
    frame[data.draw(st.sampled_from(covered))] ^= 1 << data.draw(st.integers(0, 7))
    assert not verify_l4(frame)
    assert fill_l4_checksum(frame)
    assert verify_l4(frame)

    frame[:] = right
    assert fill_l4_checksum(frame)
    assert frame == right


def test_ethernet_padding_is_not_summed() -> None:
    frame = tcp_frame(PATH4, 1, 2, b"x") + b"\xaa" * 5
    assert verify_l4(frame)
    filled = bytearray(frame)
    fill_l4_checksum(filled)
    assert filled == frame


@PATHS
def test_a_udp_checksum_that_comes_to_zero_is_sent_as_all_ones(path: Path) -> None:
    field = UDP_CHECKSUM_4 if path is PATH4 else UDP_CHECKSUM_6
    complement = udp_frame(path, 1, 2, b"\0\0")[field]
    frame = udp_frame(path, 1, 2, complement)  # now all words sum to 0xffff
    assert frame[field] == b"\xff\xff"
    assert verify_l4(frame)


def test_a_tcp_checksum_that_comes_to_zero_stays_zero() -> None:
    complement = tcp_frame(PATH4, 1, 2, b"\0\0")[50:52]
    frame = tcp_frame(PATH4, 1, 2, complement)
    assert frame[50:52] == b"\0\0"
    assert verify_l4(frame)


def test_udp_without_a_checksum_is_right_over_ipv4_alone() -> None:
    over4, over6 = bytearray(udp_frame(PATH4, 1, 2, b"abc")), bytearray(udp_frame(PATH6, 1, 2, b"abc"))
    over4[UDP_CHECKSUM_4] = over6[UDP_CHECKSUM_6] = b"\0\0"
    assert verify_l4(over4)
    assert not verify_l4(over6)


def test_nothing_is_filled_into_fragments_and_strangers() -> None:
    fragment = bytearray(udp_frame(PATH4, 1, 2, b"abc"))
    fragment[14 + 6] |= 0x20  # more fragments
    for frame in (fragment, bytearray(b"\xff" * 60), bytearray(5)):
        before = bytes(frame)
        assert not fill_l4_checksum(frame)
        assert not verify_l4(frame)
        assert frame == before


@given(st.binary(min_size=1, max_size=6000), st.integers(1, 2000))
@example(b"\xff" * 5792, 1448)
@example(b"\xff" * 5793, 1448)
@example(bytes(100), 7000)
def test_the_sums_of_pieces_are_those_of_each(data: bytes, size: int) -> None:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    sums = piece_sums(data, size)
    assert sums.dtype == np.int64
    assert [ones_sum(b"", int(one)) for one in sums] == [ones_sum(piece) for piece in pieces]
