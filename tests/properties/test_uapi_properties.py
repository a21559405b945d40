"""Control messages for any input: what is built parses back, and arbitrary bytes are parsed or refused."""

from __future__ import annotations

import struct
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.uapi import errqueue, socket

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
DMABUF = socket.SCM_DEVMEM_DMABUF
LINEAR = socket.SCM_DEVMEM_LINEAR

DMABUF_ROW = st.tuples(U64, U32, U32, U32, st.just(DMABUF))
LINEAR_ROW = st.tuples(st.just(0), U32, st.just(0), st.just(0), st.just(LINEAR))
MIXED_ROWS = st.lists(DMABUF_ROW | LINEAR_ROW, max_size=30)
DMABUF_ROWS = st.lists(DMABUF_ROW, max_size=30)

# Messages of other levels and types. (SOL_SOCKET, 1) is SCM_RIGHTS; our type at SOL_TCP and theirs at SOL_SOCKET both.
FOREIGN = st.builds(
    lambda names, data: struct.pack("<Qii", 16 + len(data), *names) + data + bytes(-len(data) % 8),
    st.sampled_from([(1, 1), (1, 29), (6, 36), (6, DMABUF), (0, LINEAR), (-1, -1)]),
    st.binary(max_size=50),
)

# Bytes that look like control messages often enough to get past the first check.
RECORD = st.builds(
    lambda size, level, kind, data: struct.pack("<Qii", size, level, kind) + data,
    st.sampled_from([0, 15, 16, 17, 20, 32, 39, 40, 41, 48, 60, 2**32, 2**63, 2**64 - 1]) | U64,
    st.sampled_from([0, 1, 6, 41]),
    st.sampled_from([11, 25, 36, LINEAR, DMABUF]),
    st.binary(max_size=4) | st.binary(min_size=24, max_size=24),
)
WELL_FORMED = MIXED_ROWS.map(lambda rows: socket.build_control(to_frags(rows)))
GARBAGE = st.lists(WELL_FORMED | RECORD | st.binary(max_size=48), max_size=6).map(b"".join)


def to_frags(rows: list[tuple[int, int, int, int, int]]) -> npt.NDArray[np.void]:
    """Make frags of rows, with LINEAR ones where they are in the inline bytes."""
    frags = np.array(rows, socket.FRAG_DTYPE)
    inline_sizes = [row[1] if row[4] == LINEAR else 0 for row in rows]
    starts = list(accumulate(inline_sizes, initial=0))[:-1]
    for frag, start in zip(frags, starts, strict=True):
        if frag["kind"] == LINEAR:
            frag["offset"] = start
    return frags


@given(MIXED_ROWS | DMABUF_ROWS)
def test_control_round_trip(rows: list[tuple[int, int, int, int, int]]) -> None:
    frags = to_frags(rows)
    control = socket.build_control(frags)
    assert socket.parse_control(control, len(control)).tolist() == frags.tolist()


@given(MIXED_ROWS | DMABUF_ROWS, st.lists(st.tuples(st.integers(0, 30), FOREIGN), max_size=4))
def test_foreign_messages_change_nothing(
    rows: list[tuple[int, int, int, int, int]], strangers: list[tuple[int, bytes]]
) -> None:
    frags = to_frags(rows)
    space = socket.CONTROL_SPACE_PER_FRAG
    built = socket.build_control(frags)
    records = [built[at : at + space] for at in range(0, len(built), space)]
    for place, stranger in strangers:
        records.insert(place, stranger)
    control = b"".join(records)
    assert socket.parse_control(control, len(control)).tolist() == frags.tolist()


@given(GARBAGE, st.integers(-8, 2000))
def test_arbitrary_control_is_parsed_or_refused(control: bytes, length: int) -> None:
    for size in (len(control), length):
        try:
            frags = socket.parse_control(control, size)
        except ValueError:
            continue
        assert len(frags) <= size // socket.CONTROL_SPACE_PER_FRAG
        assert np.isin(frags["kind"], (LINEAR, DMABUF)).all()


@given(GARBAGE)
def test_bytes_past_the_length_are_never_looked_at(control: bytes) -> None:
    answers: list[object] = []
    for beyond in (b"", b"\0" * 64, b"\xff" * 64, struct.pack("<Qii", 40, 1, DMABUF) + bytes(48)):
        try:
            answers.append(socket.parse_control(control + beyond, len(control)).tolist())
        except ValueError as error:
            answers.append(str(error))
    assert answers == answers[:1] * len(answers)


@given(st.lists(st.tuples(U32, U32), max_size=8), st.sampled_from([errqueue.SOL_IP, errqueue.SOL_IPV6]), FOREIGN)
def test_errqueue_round_trip(completions: list[tuple[int, int]], level: int, stranger: bytes) -> None:
    control = stranger + errqueue.build_errqueue(completions, level=level) + stranger
    assert errqueue.parse_errqueue(control, len(control)) == completions


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31))
def test_errqueue_ranges_wrap(low: int, more: int) -> None:
    high = (low + more) % 2**32
    control = errqueue.build_errqueue([(low, high)], level=errqueue.SOL_IP)
    assert errqueue.parse_errqueue(control, len(control)) == [(low, high)]


@given(GARBAGE, st.integers(-8, 2000))
def test_arbitrary_error_queues_are_parsed_or_refused(control: bytes, length: int) -> None:
    for size in (len(control), length):
        try:
            completions = errqueue.parse_errqueue(control, size)
        except ValueError:
            continue
        assert len(completions) <= size // (socket.CMSG_HEADER_SIZE + errqueue.SOCK_EXTENDED_ERR.size)


@given(st.lists(st.tuples(U32, U32), max_size=200))
def test_tokens_are_pairs_of_u32(ranges: list[tuple[int, int]]) -> None:
    packed = socket.pack_tokens([start for start, _ in ranges], [count for _, count in ranges])
    assert list(socket.DMABUF_TOKEN.iter_unpack(packed.tobytes())) == ranges
