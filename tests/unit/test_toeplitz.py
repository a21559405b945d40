"""The Toeplitz hash against Microsoft's published RSS verification suite and a bitwise reference."""

from __future__ import annotations

import random
import socket

import numpy as np
import pytest

from devmem_tcp.nicmodel.flow import Flow, parse_network
from devmem_tcp.nicmodel.toeplitz import MICROSOFT_KEY, Toeplitz
from devmem_tcp.types import Family

# (source, source port, destination, destination port, hash with ports, hash of addresses alone)
SUITE_IPV4 = [
    ("66.9.149.187", 2794, "161.142.100.80", 1766, 0x51CCC178, 0x323E8FC2),
    ("199.92.111.2", 14230, "65.69.140.83", 4739, 0xC626B0EA, 0xD718262A),
    ("24.19.198.95", 12898, "12.22.207.184", 38024, 0x5C2B394A, 0xD2D0A5DE),
    ("38.27.205.30", 48228, "209.142.163.6", 2217, 0xAFC7327F, 0x82989176),
    ("153.39.163.191", 44251, "202.188.127.2", 1303, 0x10E828A2, 0x5D1809C5),
]
SUITE_IPV6 = [
    ("3ffe:2501:200:1fff::7", 2794, "3ffe:2501:200:3::1", 1766, 0x40207D3D, 0x2CC18CD5),
    ("3ffe:501:8::260:97ff:fe40:efab", 14230, "ff02::1", 4739, 0xDDE51BBF, 0x0F0C461C),
    ("3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251, "fe80::200:f8ff:fe21:67cf", 38024, 0x02D1FEEF, 0x4B61E985),
]


def bitwise_toeplitz(key: bytes, data: bytes) -> int:
    """The definition, bit by bit: slow, and sharing nothing with the code under test."""
    key_bits = "".join(f"{byte:08b}" for byte in key)
    data_bits = "".join(f"{byte:08b}" for byte in data)
    result = 0
    for position, bit in enumerate(data_bits):
        if bit == "1":
            result ^= int(key_bits[position : position + 32], 2)
    return result


@pytest.mark.parametrize(("src", "sport", "dst", "dport", "with_ports", "addresses_alone"), SUITE_IPV4)
def test_ipv4_verification_suite(
    src: str, sport: int, dst: str, dport: int, with_ports: int, addresses_alone: int
) -> None:
    toeplitz = Toeplitz(MICROSOFT_KEY)
    source, destination = socket.inet_aton(src), socket.inet_aton(dst)
    assert toeplitz.hash_tcp4(source, destination, sport, dport) == with_ports
    assert toeplitz.hash_ip4(source, destination) == addresses_alone
    assert toeplitz.hash_text((src, sport), (dst, dport)) == with_ports
    assert bitwise_toeplitz(MICROSOFT_KEY, source + destination) == addresses_alone


@pytest.mark.parametrize(("src", "sport", "dst", "dport", "with_ports", "addresses_alone"), SUITE_IPV6)
def test_ipv6_verification_suite(
    src: str, sport: int, dst: str, dport: int, with_ports: int, addresses_alone: int
) -> None:
    toeplitz = Toeplitz(MICROSOFT_KEY)
    source, destination = (socket.inet_pton(socket.AF_INET6, text) for text in (src, dst))
    assert toeplitz.hash_tcp6(source, destination, sport, dport) == with_ports
    assert toeplitz.hash_ip6(source, destination) == addresses_alone
    assert toeplitz.hash_text((src, sport), (dst, dport)) == with_ports
    assert bitwise_toeplitz(MICROSOFT_KEY, source + destination) == addresses_alone


def test_the_verification_key_is_the_default_and_has_40_bytes() -> None:
    assert len(MICROSOFT_KEY) == 40
    assert Toeplitz().key == MICROSOFT_KEY
    assert Toeplitz().max_input_bytes == 36


@pytest.mark.parametrize("key_bytes", [5, 16, 40, 52])
def test_any_key_and_every_input_length_agree_with_the_definition(key_bytes: int) -> None:
    rng = random.Random(key_bytes)
    key = rng.randbytes(key_bytes)
    toeplitz = Toeplitz(key)
    for length in range(key_bytes - 4 + 1):
        data = rng.randbytes(length)
        assert toeplitz.hash_bytes(data) == bitwise_toeplitz(key, data)


def test_hash_rows_hashes_each_row() -> None:
    rows = np.random.default_rng(1).integers(0, 256, (50, 12), dtype=np.uint8)
    hashes = Toeplitz().hash_rows(rows)
    assert hashes.dtype == np.uint32
    assert hashes.tolist() == [Toeplitz().hash_bytes(row.tobytes()) for row in rows]


def test_input_longer_than_the_key_allows_is_refused() -> None:
    toeplitz = Toeplitz(bytes(16))
    toeplitz.hash_bytes(bytes(12))
    with pytest.raises(ValueError, match="16-byte Toeplitz key hashes up to 12 bytes, got 13"):
        toeplitz.hash_bytes(bytes(13))
    with pytest.raises(ValueError, match="got 13"):
        toeplitz.hash_rows(np.zeros((1, 13), np.uint8))


def test_a_key_too_short_for_one_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 4 bytes, got 4"):
        Toeplitz(bytes(4))


def test_addresses_of_the_wrong_size_are_refused() -> None:
    toeplitz = Toeplitz()
    with pytest.raises(ValueError, match="tcp4 have 4 bytes, got 16 and 4"):
        toeplitz.hash_tcp4(bytes(16), bytes(4), 1, 2)
    with pytest.raises(ValueError, match="tcp6 have 16 bytes, got 16 and 4"):
        toeplitz.hash_ip6(bytes(16), bytes(4))


@pytest.mark.parametrize(("sport", "dport"), [(-1, 0), (65536, 0), (0, -1), (0, 65536)])
def test_ports_out_of_range_are_refused(sport: int, dport: int) -> None:
    with pytest.raises(ValueError, match="port must be 0 to 65535"):
        Toeplitz().hash_tcp4(bytes(4), bytes(4), sport, dport)


def test_mapped_addresses_hash_as_the_ipv4_packet_that_is_on_the_wire() -> None:
    plain = Toeplitz().hash_text(("10.0.0.2", 1000), ("10.0.0.1", 5201))
    assert Toeplitz().hash_text(("::ffff:10.0.0.2", 1000), ("::ffff:10.0.0.1", 5201)) == plain
    assert Toeplitz().hash_text(("::ffff:10.0.0.2", 1000), ("10.0.0.1", 5201)) == plain


def test_flow_between_packs_both_ends() -> None:
    assert Flow.between(("10.0.0.2", 65535), ("10.0.0.1", 0)) == (
        Family.TCP4,
        bytes([10, 0, 0, 2]),
        bytes([10, 0, 0, 1]),
        65535,
        0,
    )
    flow = Flow.between(("fe80::2%eth0", 1), ("fe80::1", 2))
    assert flow == (Family.TCP6, b"\xfe\x80" + bytes(13) + b"\x02", b"\xfe\x80" + bytes(13) + b"\x01", 1, 2)


def test_parse_network_takes_mapped_prefixes_from_96_bits_on() -> None:
    assert str(parse_network("::ffff:10.1.2.3/128")) == "10.1.2.3/32"
    assert str(parse_network("::ffff:10.1.2.3/96")) == "0.0.0.0/0"
    assert str(parse_network("::ffff:10.1.2.3/95")) == "::fffe:0:0/95"


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        (("localhost", 1), ("10.0.0.1", 2), "localhost"),
        (("10.0.0.2", 1), ("::1", 2), "not of one IP version"),
        (("10.0.0.2", -1), ("10.0.0.1", 2), "source port must be 0 to 65535, got -1"),
        (("10.0.0.2", 1), ("10.0.0.1", 65536), "destination port must be 0 to 65535, got 65536"),
    ],
)
def test_flow_between_refuses_what_is_no_flow(src: tuple[str, int], dst: tuple[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Flow.between(src, dst)
