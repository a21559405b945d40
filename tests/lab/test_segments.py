"""The frame parser and TCP segmentation: examples, and what must hold of any bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from devmem_tcp.lab.checksum import verify_ip, verify_l4
from devmem_tcp.lab.crafting import Path, arp_request, echo_request, tcp_frame, udp_frame
from devmem_tcp.lab.frames import ParsedFrame, parse
from devmem_tcp.lab.segments import MAX_SEGMENTS, SegmentError, segment

PATH4 = Path.between("02:00:00:00:00:01", "10.0.0.1", "02:00:00:00:00:02", "10.0.0.2")
PATH6 = Path.between("02:00:00:00:00:01", "fd00::1", "02:00:00:00:00:02", "fd00::2")
BOTH_PATHS = pytest.mark.parametrize("path", [PATH4, PATH6], ids=["IPv4", "IPv6"])
paths = st.sampled_from([PATH4, PATH6])

FIN, SYN, PSH, ACK, CWR = 0x01, 0x02, 0x08, 0x10, 0x80


def with_vlan_tags(frame: bytes, *tags: bytes) -> bytes:
    return frame[:12] + b"".join(tags) + frame[12:]


def with_extensions(frame: bytes, *headers: tuple[int, bytes], last: int) -> bytes:
    """Put IPv6 extension headers (number, all but their first byte) before the transport header, which is ``last``."""
    following = [number for number, _ in headers[1:]] + [last]
    chain = b"".join(bytes([after]) + body for (_, body), after in zip(headers, following, strict=True))
    changed = bytearray(frame[:54] + chain + frame[54:])
    changed[14 + 6] = headers[0][0]
    struct.pack_into("!H", changed, 14 + 4, len(changed) - 54)
    return bytes(changed)


def with_ipv4_options(frame: bytes, options: bytes) -> bytes:
    changed = bytearray(frame[:34] + options + frame[34:])
    changed[14] = 0x40 | (20 + len(options)) // 4
    struct.pack_into("!H", changed, 14 + 2, len(changed) - 14)
    return bytes(changed)


def assert_sane(parsed: ParsedFrame, size: int) -> None:
    """What holds of every answer: the parts lie one behind the other, within the frame."""
    assert min(parsed.l2_length, parsed.l3_length, parsed.l4_length, parsed.payload_length) >= 0
    assert parsed.payload_offset == parsed.l2_length + parsed.l3_length + parsed.l4_length
    assert parsed.payload_offset + parsed.payload_length <= size
    assert len(parsed.src) == len(parsed.dst) == {4: 4, 6: 16, 0: len(parsed.src)}[parsed.version]
    assert parsed.version in (0, 4, 6)
    assert not (parsed.fragment and parsed.l4_length)


# --- parser ----------------------------------------------------------------------------------------------------------


def test_tcp_over_ipv4() -> None:
    frame = tcp_frame(PATH4, 40000, 5201, b"payload", options=b"\x01" * 12)
    parsed = parse(frame)
    assert parsed == ParsedFrame(
        ether_type=0x0800,
        version=4,
        protocol=6,
        src=bytes([10, 0, 0, 1]),
        dst=bytes([10, 0, 0, 2]),
        sport=40000,
        dport=5201,
        fragment=False,
        l2_length=14,
        l3_length=20,
        l4_length=32,
        payload_offset=66,
        payload_length=7,
    )
    assert parsed.is_tcp
    assert not parsed.is_udp
    assert not parsed.is_icmp


def test_udp_over_ipv6() -> None:
    parsed = parse(udp_frame(PATH6, 1, 65535, b"abc"))
    assert (parsed.version, parsed.src, parsed.dst) == (6, PATH6.src, PATH6.dst)
    assert (parsed.sport, parsed.dport) == (1, 65535)
    assert (parsed.l3_length, parsed.l4_length, parsed.payload_length) == (40, 8, 3)
    assert parsed.is_udp


@BOTH_PATHS
def test_icmp_belongs_to_its_ip_version(path: Path) -> None:
    frame = bytearray(echo_request(path, 1, 2, b"ping"))
    parsed = parse(frame)
    assert parsed.is_icmp
    assert parsed.payload_length == 4
    frame[23 if path is PATH4 else 20] = 58 if path is PATH4 else 1  # the other version's
    assert parse(frame).l4_length == 0


def test_arp() -> None:
    parsed = parse(arp_request(PATH4.src_mac, PATH4.src, PATH4.dst))
    assert (parsed.ether_type, parsed.version, parsed.src, parsed.dst) == (0x0806, 0, PATH4.src, PATH4.dst)
    assert (parsed.l2_length, parsed.l3_length, parsed.l4_length, parsed.payload_length) == (14, 28, 0, 0)


def test_arp_for_other_networks_is_not_understood() -> None:
    frame = bytearray(arp_request(PATH4.src_mac, PATH4.src, PATH4.dst))
    frame[14 + 5] = 16
    assert parse(frame).l3_length == 0
    assert parse(frame).src == b""


@pytest.mark.parametrize(
    ("tags", "ether_type", "l2_length"),
    [
        ([b"\x81\0\0\5"], 0x0800, 18),
        ([b"\x88\xa8\0\5", b"\x81\0\0\6"], 0x0800, 22),
        ([b"\x81\0\0\5"] * 3, 0x8100, 22),  # a third tag is not looked behind
    ],
)
def test_vlan_tags(tags: list[bytes], ether_type: int, l2_length: int) -> None:
    parsed = parse(with_vlan_tags(tcp_frame(PATH4, 1, 2, b"abc"), *tags))
    assert (parsed.ether_type, parsed.l2_length) == (ether_type, l2_length)
    assert parsed.is_tcp == (ether_type == 0x0800)


def test_ipv4_options_are_headers() -> None:
    parsed = parse(with_ipv4_options(tcp_frame(PATH4, 1, 2, b"abc"), b"\x01" * 8))
    assert parsed.is_tcp
    assert (parsed.l3_length, parsed.payload_offset, parsed.payload_length) == (28, 14 + 28 + 20, 3)


@pytest.mark.parametrize("bits", [0x2000, 0x0001, 0x3FFF])
def test_ipv4_fragments_have_no_transport_header(bits: int) -> None:
    frame = bytearray(tcp_frame(PATH4, 1, 2, b"abc"))
    struct.pack_into("!H", frame, 14 + 6, bits)
    parsed = parse(frame)
    assert parsed.fragment
    assert not parsed.is_tcp
    assert (parsed.protocol, parsed.sport, parsed.l4_length, parsed.payload_length) == (6, 0, 0, 23)


def test_dont_fragment_is_no_fragment() -> None:
    frame = bytearray(tcp_frame(PATH4, 1, 2))
    struct.pack_into("!H", frame, 14 + 6, 0x4000)
    assert parse(frame).is_tcp


def test_ipv6_extension_headers_are_walked() -> None:
    hop_by_hop, options, authentication = (0, bytes(7)), (60, b"\x01" + bytes(14)), (51, b"\x04" + bytes(22))
    plain = tcp_frame(PATH6, 1, 2, b"abc")
    parsed = parse(with_extensions(plain, hop_by_hop, options, authentication, last=6))
    assert parsed.is_tcp
    assert (parsed.l3_length, parsed.dport, parsed.payload_length) == (40 + 8 + 16 + 24, 2, 3)


@pytest.mark.parametrize(("third", "fragment"), [(0x0000, False), (0x0001, True), (0x0008, True), (0x0006, False)])
def test_an_ipv6_fragment_header(third: int, fragment: bool) -> None:
    header = (44, b"\0" + third.to_bytes(2, "big") + bytes(4))
    parsed = parse(with_extensions(tcp_frame(PATH6, 1, 2, b"abc"), header, last=6))
    assert (parsed.fragment, parsed.is_tcp) == (fragment, not fragment)
    assert (parsed.protocol, parsed.l3_length) == (6, 48)


@pytest.mark.parametrize(("segments_left", "is_tcp"), [(0, True), (1, False)])
def test_behind_a_routing_header_that_is_not_done_nothing_is_parsed(segments_left: int, is_tcp: bool) -> None:
    header = (43, bytes([0, 4, segments_left]) + bytes(4))
    parsed = parse(with_extensions(tcp_frame(PATH6, 1, 2), header, last=6))
    assert parsed.is_tcp == is_tcp
    assert parsed.protocol == (6 if is_tcp else 43)


def test_extension_headers_without_end_are_given_up() -> None:
    eight, nine = [(0, bytes(7))] * 8, [(0, bytes(7))] * 9
    plain = tcp_frame(PATH6, 1, 2)
    assert parse(with_extensions(plain, *eight, last=6)).is_tcp
    assert not parse(with_extensions(plain, *nine, last=6)).is_tcp


@pytest.mark.parametrize("length", [3, 4, 0xFF])  # 8 + 24 bytes and more, where 28 are
def test_an_extension_header_may_not_point_past_the_packet(length: int) -> None:
    frame = with_extensions(tcp_frame(PATH6, 1, 2), (60, bytes([length]) + bytes(6)), last=6)
    parsed = parse(frame + bytes(3000))
    assert (parsed.version, parsed.protocol, parsed.l3_length, parsed.payload_length) == (6, 60, 40, 28)


@pytest.mark.parametrize("number", [0, 43, 44, 51, 60, 135])
@pytest.mark.parametrize("size", range(8))
def test_an_extension_header_cut_short_is_not_read(number: int, size: int) -> None:
    frame = with_extensions(tcp_frame(PATH6, 1, 2)[:54], (number, bytes(7)), last=6)
    cut = bytearray(frame[: 54 + size])
    cut[14 + 5] = size
    parsed = parse(cut)
    assert (parsed.version, parsed.protocol, parsed.l3_length, parsed.payload_length) == (6, number, 40, size)


def test_ethernet_padding_is_no_payload() -> None:
    assert parse(tcp_frame(PATH4, 1, 2, b"x") + bytes(5)).payload_length == 1
    assert parse(tcp_frame(PATH6, 1, 2, b"x") + bytes(5)).payload_length == 1


def test_a_udp_length_shorter_than_the_packet_ends_the_payload() -> None:
    frame = bytearray(udp_frame(PATH4, 1, 2, b"abcdef"))
    struct.pack_into("!H", frame, 14 + 20 + 4, 8 + 2)
    assert parse(frame).payload_length == 2


@pytest.mark.parametrize(
    ("frame", "offset", "value"),
    [
        (tcp_frame(PATH4, 1, 2), 14, 0x55),  # version 5
        (tcp_frame(PATH4, 1, 2), 14, 0x44),  # a header of 16 bytes
        (tcp_frame(PATH4, 1, 2), 14, 0x4F),  # longer than the packet
        (tcp_frame(PATH4, 1, 2), 17, 41),  # total length: one too many
        (tcp_frame(PATH4, 1, 2), 17, 19),  # total length: less than the header
        (tcp_frame(PATH4, 1, 2), 17, 0),
        (tcp_frame(PATH6, 1, 2), 14, 0x40),  # version 4 under IPv6's EtherType
        (tcp_frame(PATH6, 1, 2), 19, 21),  # payload length: one too many
    ],
)
def test_malformed_ip_is_not_ip(frame: bytes, offset: int, value: int) -> None:
    changed = bytearray(frame)
    changed[offset] = value
    parsed = parse(changed)
    assert (parsed.version, parsed.l3_length, parsed.l4_length) == (0, 0, 0)
    assert (parsed.payload_offset, parsed.payload_length) == (14, len(frame) - 14)


@pytest.mark.parametrize(
    ("frame", "offset", "value"),
    [
        (tcp_frame(PATH4, 1, 2, b"abc"), 34 + 12, 0x40),  # a header of 16 bytes
        (tcp_frame(PATH4, 1, 2, b"abc"), 34 + 12, 0x60),  # longer than the packet
        (tcp_frame(PATH4, 1, 2, b"abc"), 17, 39),  # IP ends within the header
        (udp_frame(PATH4, 1, 2, b"abc"), 34 + 5, 7),  # UDP length: less than the header
        (udp_frame(PATH4, 1, 2, b"abc"), 34 + 5, 12),  # UDP length: one too many
        (echo_request(PATH4, 1, 2, b"abc"), 17, 27),
        (tcp_frame(PATH4, 1, 2, b"abc"), 23, 132),  # SCTP
    ],
)
def test_a_malformed_or_unknown_transport_is_payload_of_ip(frame: bytes, offset: int, value: int) -> None:
    changed = bytearray(frame)
    changed[offset] = value
    parsed = parse(changed)
    assert parsed.version == 4
    assert (parsed.l4_length, parsed.payload_offset) == (0, 34)
    assert (parsed.is_tcp, parsed.is_udp, parsed.is_icmp) == (False, False, False)
    assert_sane(parsed, len(changed))


@BOTH_PATHS
def test_a_length_of_zero_is_a_superframe_only_where_that_is_expected(path: Path) -> None:
    frame = tcp_frame(path, 1, 2, bytes(70000))
    assert not parse(frame).is_tcp
    parsed = parse(frame, superframe=True)
    assert parsed.is_tcp
    assert parsed.payload_length == 70000


@given(st.binary(max_size=120), st.booleans())
def test_any_bytes_parse(data: bytes, superframe: bool) -> None:
    assert_sane(parse(data, superframe=superframe), len(data))


@given(paths, st.data(), st.booleans())
def test_any_damage_to_a_good_frame_parses_within_it(path: Path, data: st.DataObject, superframe: bool) -> None:
    extensions = with_extensions(tcp_frame(PATH6, 1, 2, b"abc"), (0, bytes(7)), (44, bytes(7)), (43, bytes(7)), last=6)
    good = [
        tcp_frame(path, 1, 2, b"payload"),
        udp_frame(path, 1, 2, b"payload"),
        echo_request(path, 1, 2, b"payload"),
        with_vlan_tags(tcp_frame(path, 1, 2, b"payload"), b"\x81\0\0\5"),
        with_ipv4_options(tcp_frame(PATH4, 1, 2), bytes(40)),
        arp_request(PATH4.src_mac, PATH4.src, PATH4.dst),
        extensions,
    ]
    frame = bytearray(data.draw(st.sampled_from(good)))
    for _ in range(data.draw(st.integers(0, 4))):
        frame[data.draw(st.integers(12, len(frame) - 1))] = data.draw(st.integers(0, 255))
    del frame[data.draw(st.integers(0, len(frame))) :]
    parsed = parse(frame, superframe=superframe)
    assert_sane(parsed, len(frame))
    assert parse(memoryview(frame), superframe=superframe) == parsed


# --- segmentation ----------------------------------------------------------------------------------------------------


def fields_of(frame: bytes, parsed: ParsedFrame) -> tuple[int, int]:
    """Return TCP's sequence number and flags."""
    at = parsed.l4_offset
    return int.from_bytes(frame[at + 4 : at + 8], "big"), frame[at + 13]


@given(
    path=paths,
    payload_bytes=st.integers(0, 3000),
    shares=st.integers(1, 6),
    sequence=st.integers(0, 0xFFFFFFFF),
    flags=st.integers(0, 0xFF),
    identification=st.integers(0, 0xFFFF),
    option_bytes=st.integers(0, 40),
)
@example(PATH4, 3000, 3, 0xFFFFFC00, 0xFF, 0xFFFE, 12)  # everything wraps, every flag is set
@example(PATH6, 3000, 3, 0xFFFFFC00, 0xFF, 0, 12)
def test_segments_are_right_and_joined_give_the_superframe(
    path: Path, payload_bytes: int, shares: int, sequence: int, flags: int, identification: int, option_bytes: int
) -> None:
    payload = bytes(i * 31 & 0xFF for i in range(payload_bytes))
    mss = payload_bytes // shares + 1
    superframe = tcp_frame(
        path,
        40000,
        5201,
        payload,
        sequence=sequence,
        flags=flags,
        options=b"\x01" * option_bytes,
        identification=identification,
    )
    header_length = parse(superframe).payload_offset
    frames = segment(superframe, header_length, mss)
    assert len(frames) == max(1, -(-len(payload) // mss))

    joined = b""
    for index, frame in enumerate(frames):
        parsed = parse(frame)
        last = index == len(frames) - 1
        assert parsed.is_tcp
        assert parsed.payload_offset + parsed.payload_length == len(frame)  # IP states the very length
        assert parsed.payload_length == (len(payload) - index * mss if last else mss)
        assert verify_ip(frame)
        assert verify_l4(frame)
        expected = flags & ~(0 if last else FIN | PSH) & ~(0 if index == 0 else CWR)
        assert fields_of(frame, parsed) == ((sequence + len(joined)) % (1 << 32), expected)
        if path is PATH4:
            assert int.from_bytes(frame[18:20], "big") == (identification + index) % (1 << 16)
        assert frame[:12] == superframe[:12]
        assert (parsed.src, parsed.dst, parsed.sport, parsed.dport) == (path.src, path.dst, 40000, 5201)
        joined += frame[parsed.payload_offset :]
    assert joined == payload


@BOTH_PATHS
def test_a_frame_that_fits_is_unchanged(path: Path) -> None:
    frame = tcp_frame(path, 1, 2, b"x" * 1000, flags=ACK | PSH | FIN | CWR, sequence=9, identification=5)
    assert segment(frame, parse(frame).payload_offset, 1000) == [frame]
    empty = tcp_frame(path, 1, 2, flags=SYN)
    assert segment(empty, len(empty), 1448) == [empty]


@BOTH_PATHS
def test_wrong_checksums_and_padding_of_the_superframe_do_not_matter(path: Path) -> None:
    right = tcp_frame(path, 1, 2, bytes(range(250)))
    header_length = parse(right).payload_offset
    wrong = bytearray(right)
    wrong[header_length - 4 : header_length - 2] = b"\x12\x34"
    if path is PATH4:
        wrong[24:26] = b"\x56\x78"
    assert segment(wrong + b"padding", header_length, 100) == segment(right, header_length, 100)


def test_headers_with_tags_options_and_extensions_are_kept() -> None:
    frames = [
        with_vlan_tags(tcp_frame(PATH4, 1, 2, bytes(300)), b"\x81\0\0\5"),
        with_ipv4_options(tcp_frame(PATH4, 1, 2, bytes(300)), b"\x01" * 4),
        with_extensions(tcp_frame(PATH6, 1, 2, bytes(300)), (60, bytes(7)), last=6),
    ]
    for frame in frames:
        header_length = parse(frame).payload_offset
        for part in segment(frame, header_length, 100):
            assert parse(part) == parse(frame)._replace(payload_length=100)
            assert verify_l4(part)
            assert verify_ip(part)


@BOTH_PATHS
def test_superframes_of_more_than_64_kib(path: Path) -> None:
    payload = bytes(range(256)) * 700
    frame = tcp_frame(path, 1, 2, payload)
    parts = segment(frame, parse(frame, superframe=True).payload_offset, 8948)
    assert all(verify_l4(part) and verify_ip(part) for part in parts)
    assert b"".join(part[parse(part).payload_offset :] for part in parts) == payload


def test_a_checksum_of_0_is_written_as_0() -> None:
    frame = tcp_frame(PATH4, 1, 2, bytes(4))
    frame = tcp_frame(PATH4, 1, 2, frame[50:52] + bytes(2))  # its own checksum, once more: the sum is 0xffff
    assert frame[50:52] == b"\0\0"
    assert segment(frame, 54, 4) == [frame]


def test_ids_leave_room_for_the_segments_of_each_piece() -> None:
    frame = tcp_frame(PATH4, 1, 2, bytes(10_000), identification=0xFFF8)
    pieces = segment(frame, 54, 4000, ids=5)
    assert [int.from_bytes(piece[18:20], "big") for piece in pieces] == [0xFFF8, 0xFFFD, 2]
    assert [segment(piece, 54, 800)[0][18:20] for piece in pieces] == [piece[18:20] for piece in pieces]
    ends = [(number * 800, int.from_bytes(part[18:20], "big")) for number, part in enumerate(segment(frame, 54, 800))]
    assert [value for start, value in ends if start % 4000 == 0] == [0xFFF8, 0xFFFD, 2]


@pytest.mark.parametrize(
    ("frame", "header_length", "mss", "complaint"),
    [
        (udp_frame(PATH4, 1, 2, b"abc"), 42, 1000, "only a whole TCP"),
        (b"", 0, 1000, "only a whole TCP"),
        (tcp_frame(PATH4, 1, 2, b"abc")[:-1], 54, 1000, "only a whole TCP"),
        (tcp_frame(PATH4, 1, 2, b"abc"), 53, 1000, "54 bytes, the sender says 53"),
        (tcp_frame(PATH4, 1, 2, b"abc"), 54, 0, "positive"),
        (tcp_frame(PATH4, 1, 2, b"abc"), 54, -1, "positive"),
        (tcp_frame(PATH4, 1, 2, bytes(70000)), 54, 65536 - 40, "do not fit"),
        (tcp_frame(PATH6, 1, 2, bytes(70000)), 74, 65536 - 20, "do not fit"),
        (tcp_frame(PATH4, 1, 2, bytes(MAX_SEGMENTS + 1)), 54, 1, "more than 4096"),
    ],
)
def test_what_cannot_be_segmented_is_refused(frame: bytes, header_length: int, mss: int, complaint: str) -> None:
    with pytest.raises(SegmentError, match=complaint):
        segment(frame, header_length, mss)


def test_the_limits_themselves_are_allowed() -> None:
    assert len(segment(tcp_frame(PATH4, 1, 2, bytes(MAX_SEGMENTS)), 54, 1)) == MAX_SEGMENTS
    assert len(segment(tcp_frame(PATH4, 1, 2, bytes(70000)), 54, 65535 - 40)[0]) == 14 + 65535
    assert len(segment(tcp_frame(PATH6, 1, 2, bytes(70000)), 74, 65535 - 20)[0]) == 14 + 40 + 65535


@given(paths, st.data(), st.integers(-1, 120), st.integers(-1, 70000))
def test_any_bytes_are_segmented_or_refused(path: Path, data: st.DataObject, header_length: int, mss: int) -> None:
    frame = bytearray(tcp_frame(path, 1, 2, bytes(50)))
    for _ in range(data.draw(st.integers(0, 3))):
        frame[data.draw(st.integers(12, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        parts = segment(frame, header_length, mss)
    except SegmentError:
        return
    assert sum(len(part) - header_length for part in parts) <= len(frame) - header_length
    assert all(verify_l4(part) for part in parts)
