"""What is done for many frames at once comes to the same as frame by frame: parsing, and filling in checksums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from devmem_tcp.lab.checksum import fill_l4_checksum, fill_l4_checksums, verify_l4
from devmem_tcp.lab.crafting import Path, tcp_frame, udp_frame
from devmem_tcp.lab.frames import FlowParser, parse
from gvnic_driver import PATH4, PATH6

HEADERS_BYTES = 14 + 40 + 20

base_frames = st.builds(
    lambda path, make, size: bytes(make(path, 40000, 5201, bytes(size))),
    st.sampled_from([PATH4, PATH6]),
    st.sampled_from([tcp_frame, udp_frame]),
    st.integers(0, 40),
)
payloads = st.integers(0, 2000).flatmap(
    lambda size: st.lists(st.binary(min_size=size, max_size=size), min_size=1, max_size=6)
)
damage = st.lists(st.tuples(st.integers(0, HEADERS_BYTES), st.integers(0, 255)), max_size=2)


def damaged(frame: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    """Return the frame with bytes overwritten and the last ones cut off."""
    made = bytearray(frame[: max(len(frame) - cut, 0)])
    for at, value in changes:
        if at < len(made):
            made[at] = value
    return bytes(made)


@given(base_frames, st.lists(st.tuples(damage, st.integers(0, 60)), max_size=8))
@example(tcp_frame(PATH4, 1, 2), [([(14, 0x46)], 0), ([(14, 0x45)], 0)])
@example(tcp_frame(PATH6, 1, 2), [([(20, 44)], 0), ([], 0), ([], 1)])
def test_a_flow_parser_says_what_parse_says(base: bytes, frames: list[tuple[list[tuple[int, int]], int]]) -> None:
    parser = FlowParser()
    for changes, cut in [([], 0), *frames, ([], 0)]:
        frame = damaged(base, changes, cut)
        assert parser.parse(frame) == parse(frame), frame.hex()


@pytest.mark.parametrize("path", [PATH4, PATH6], ids=["IPv4", "IPv6"])
def test_every_byte_that_parse_reads_counts(path: Path) -> None:
    """Each bit of the headers is flipped, with the untouched frame parsed just before."""
    base = tcp_frame(path, 40000, 5201, b"payload")
    parser = FlowParser()
    for at in range(min(HEADERS_BYTES, len(base))):
        for bit in range(8):
            frame = bytearray(base)
            frame[at] ^= 1 << bit
            assert parser.parse(base) == parse(base)
            assert parser.parse(frame) == parse(frame), (at, bit)


@given(
    st.sampled_from([PATH4, PATH6]),
    st.sampled_from([tcp_frame, udp_frame]),
    payloads,
)
def test_checksums_filled_together_are_those_filled_one_by_one(
    path: Path, make: Callable[..., bytes], payloads: list[bytes]
) -> None:
    frames = [bytearray(make(path, 40000, 5201, payload)) for payload in payloads]
    one_by_one = [bytearray(frame) for frame in frames]
    for frame in one_by_one:
        assert fill_l4_checksum(frame)

    assert fill_l4_checksums(frames, parse(frames[0]))

    assert frames == one_by_one
    assert all(map(verify_l4, frames))


def test_an_echo_reply_of_zeros_has_a_checksum_of_all_ones() -> None:
    """The one sum that is 0 and not 0xffff: ICMP counts no addresses, and every byte is 0."""
    frame = bytearray(tcp_frame(PATH4, 0, 0, bytes(20)))
    frame[23] = 1  # ICMP
    frame[34:] = bytes(len(frame) - 34)
    fill_l4_checksum(frame)
    assert frame[36:38] == b"\xff\xff"
    assert verify_l4(frame)
