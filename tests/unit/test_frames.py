"""Frames: what goes over the wire comes back the same in any split, and what breaks a limit ends it at once."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.errors import RemoteProtocolError
from devmem_tcp.sansio import frames
from devmem_tcp.sansio.frames import (
    CONTROL_MAGIC,
    MAX_FRAME,
    MAX_HANDSHAKE_FRAME,
    MAX_LANES,
    MAX_MESSAGE,
    MAX_METADATA,
    MAX_NAME,
    MAX_RANK,
    MAX_TOTAL,
    MAX_WORDS,
    Abort,
    Announce,
    Answer,
    Cancel,
    CancelTaken,
    Challenge,
    ChecksumKind,
    Credit,
    DataTicket,
    Decline,
    Done,
    FrameDecoder,
    Goodbye,
    HandshakeFrame,
    Hello,
    Limits,
    Ping,
    Pong,
    Proof,
    Refusal,
    Request,
    Role,
    SeriesEnd,
    SessionFrame,
    Stripes,
    Welcome,
    encode,
    encode_announce,
    handshake_decoder,
    session_decoder,
)

HELLO = Hello(1, 1, Role.SENDER, "software", True, b"n" * 32, Limits(4), ["xxh3"])
HANDSHAKE: list[HandshakeFrame] = [
    HELLO,
    Challenge(1, HELLO),
    Proof(b"m" * 32),
    Welcome(b"m" * 32, b"s" * 8, 5202),
    Refusal("key", "no"),
    DataTicket(63, b"t" * 16),
]
ANNOUNCE = Announce(
    0, "layers.0/wé", "bfloat16", [3, 5], "C", 30, Stripes(4096, 0, 1), ChecksumKind.XXH3, True, b'{"step":1}', 1
)
SESSION: list[SessionFrame] = [
    ANNOUNCE,
    SeriesEnd(3),
    Request(0, b"what have you got?"),
    Answer(0, b"all of it", True),
    Credit(1, 2, 0),
    Done(0, b"12345678"),
    Cancel(0, [1, 2], "enough"),
    CancelTaken(0),
    Decline(0, "out of device memory"),
    Abort("so sorry"),
    Ping(MAX_TOTAL),
    Pong(0),
    Goodbye(),
]


def announce(**changes: Any) -> Announce:
    return msgspec.structs.replace(ANNOUNCE, **changes)


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4) + body


def read_all(decoder: FrameDecoder[Any], chunks: list[bytes]) -> list[Any]:
    read = []
    for chunk in chunks:
        decoder.feed(chunk)
        while (frame := decoder.next_frame()) is not None:
            read.append(frame)
    return read


def refused(data: bytes) -> str:
    decoder = session_decoder()
    decoder.feed(data)
    with pytest.raises(RemoteProtocolError) as caught:
        decoder.next_frame()
    assert decoder.pending_bytes == 0, "what is refused is not kept"
    decoder.feed(encode(Goodbye()))
    with pytest.raises(RemoteProtocolError) as again:
        decoder.next_frame()
    assert str(again.value) == str(caught.value), "an error is final"
    assert decoder.pending_bytes == 0, "nothing is taken in after it"
    return str(caught.value)


def test_frames_are_the_same_byte_by_byte() -> None:
    opening = CONTROL_MAGIC + b"".join(map(encode, HANDSHAKE))
    assert read_all(handshake_decoder(), [opening]) == HANDSHAKE
    assert read_all(handshake_decoder(), [bytes([byte]) for byte in opening]) == HANDSHAKE
    rest = b"".join(map(encode, SESSION))
    assert read_all(session_decoder(), [rest]) == SESSION
    assert read_all(session_decoder(), [bytes([byte]) for byte in rest]) == SESSION


@given(st.data())
def test_any_split_of_any_bytes_gives_the_same(data: st.DataObject) -> None:
    good = b"".join(map(encode, data.draw(st.lists(st.sampled_from(SESSION)))))
    sent = good + data.draw(st.binary(max_size=40))
    ends = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=8)))
    chunks = [sent[start:end] for start, end in zip([0, *ends], [*ends, len(sent)], strict=True)]

    def outcome(chunks: list[bytes]) -> tuple[list[object], str]:
        read: list[object] = []
        decoder = session_decoder()
        try:
            for chunk in chunks:
                decoder.feed(chunk)
                while (frame := decoder.next_frame()) is not None:
                    read.append(frame)
        except RemoteProtocolError as error:
            return read, str(error)
        return read, f"{decoder.pending_bytes} bytes wait"

    assert outcome(chunks) == outcome([sent])


def test_a_frame_is_as_long_as_the_record_says() -> None:
    assert encode(Ping(1)) == bytes.fromhex("00000003 921001")
    assert encode(Goodbye()) == bytes.fromhex("00000002 9112")
    assert encode(Credit(1, 2, 3)) == bytes.fromhex("00000005 940b010203")
    assert len(encode_announce(announce(name="w", metadata=b""))) == 39


@pytest.mark.parametrize("length", [0, MAX_FRAME + 1, 0xFFFFFFFF])
def test_a_wrong_length_is_refused_before_its_body_comes(length: int) -> None:
    assert f"a frame of {length} bytes" in refused(length.to_bytes(4))


def test_before_the_handshake_is_over_frames_are_small() -> None:
    decoder = handshake_decoder()
    decoder.feed(CONTROL_MAGIC + (MAX_HANDSHAKE_FRAME + 1).to_bytes(4))
    with pytest.raises(RemoteProtocolError, match="a frame of 4097 bytes, where 1 to 4096"):
        decoder.next_frame()


@pytest.mark.parametrize("stray", [b"G", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", b"dmtD", b"dmtX"])
def test_a_stray_connection_is_known_by_its_first_bytes(stray: bytes) -> None:
    decoder = handshake_decoder()
    decoder.feed(stray)
    with pytest.raises(RemoteProtocolError, match="no control connection"):
        decoder.next_frame()


@pytest.mark.parametrize(
    "value",
    [
        [99],
        [1],
        ["ping", 1],
        [16],
        [16, -1],
        [16, 1.5],
        [16, MAX_TOTAL + 1],
        [16, 1, 2],
        [18, 0],
        {"tag": 18},
        18,
        None,
        [11, 1, 2],
        [12, 0, b""],
        [12, 0, b"x" * 33],
        [13, 0, [], "x"],
        [13, 0, [1] * (MAX_LANES + 1), "x"],
        [15, "x" * (MAX_WORDS + 1)],
        [15, "\x1b[2J"],
        [15, "\x9b2J"],
        [15, b"\xff"],
        [[[[[[]]]]]],
    ],
)
def test_what_is_no_frame_is_refused(value: object) -> None:
    assert "this is no frame" in refused(framed(msgspec.msgpack.encode(value)))


@pytest.mark.parametrize(
    "body", [b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 70000, b"\x91\x12\x00"]
)
def test_what_is_no_messagepack_is_refused(body: bytes) -> None:
    assert "this is no frame" in refused(framed(body))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shape": [1] * (MAX_RANK + 1), "nbytes": 1}, "length <= 32"),
        ({"shape": [MAX_MESSAGE + 1]}, "<="),
        ({"shape": [1 << 40] * 32}, "does not go with 30 bytes"),
        ({"shape": [-1]}, ">= 0"),
        ({"shape": [0], "nbytes": 1}, "a shape of 0 elements does not go with 1 bytes"),
        ({"shape": [1], "nbytes": 0}, "a shape of 1 elements does not go with 0 bytes"),
        ({"shape": [1], "nbytes": 33}, "a shape of 1 elements does not go with 33 bytes"),
        ({"shape": [9], "nbytes": 1}, "a shape of 9 elements does not go with 1 bytes"),
        ({"nbytes": MAX_MESSAGE + 1}, "<="),
        ({"name": "n" * (MAX_NAME + 1)}, "length <= 1024"),
        ({"name": "a\nb"}, "regex"),
        ({"name": "a\x00"}, "regex"),
        ({"name": "a\u2028"}, "regex"),
        ({"dtype": ""}, "length >= 1"),
        ({"dtype": "f" * 33}, "length <= 32"),
        ({"dtype": "float 32"}, "regex"),
        ({"dtype": "float32\n"}, "regex"),
        ({"order": "K"}, "enum"),
        ({"stripes": Stripes(4095, 0, 1)}, ">= 4096"),
        ({"stripes": Stripes(4096, MAX_LANES, 1)}, "<"),
        ({"stripes": Stripes(4096, 0, 0)}, ">= 1"),
        ({"stripes": Stripes(4096, 0, MAX_LANES + 1)}, "<= 64"),
        ({"metadata": b" " * (MAX_METADATA + 1)}, "length <= 65536"),
        ({"metadata": b"[]"}, "no JSON object"),
        ({"metadata": b"{"}, "no JSON object"),
        ({"metadata": b'{"a":"\xff"}'}, "no JSON object"),
        ({"metadata": b'{"a":' * 10000}, "no JSON object"),
        ({"metadata": b'{"a":' + b"9" * 6000 + b"}"}, None),
    ],
)
def test_an_announcement_that_breaks_a_limit_is_neither_sent_nor_taken(
    changes: dict[str, Any], why: str | None
) -> None:
    frame = announce(**changes)
    if why is None:  # whatever the JSON parser makes of it, the two ends agree
        assert (frames.announce_fault(frame) == "") == bool(read_all_or_none(frame))
        return
    assert why in refused(encode(frame))
    with pytest.raises(ValueError, match="this cannot be announced"):
        encode_announce(frame)


def read_all_or_none(frame: Announce) -> list[object]:
    try:
        return read_all(session_decoder(), [encode(frame)])
    except RemoteProtocolError:
        return []


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [0, 7], "nbytes": 0},
        {"shape": [], "nbytes": 16, "dtype": "complex128"},
        {"shape": [8], "nbytes": 1, "dtype": "bit"},
        {"shape": [1] * MAX_RANK, "nbytes": 1},
        {"shape": [MAX_MESSAGE], "nbytes": MAX_MESSAGE},
        {"name": "\U0001f9ee" * MAX_NAME, "metadata": b"{" + b" " * (MAX_METADATA - 2) + b"}", "shape": [1 << 40] * 1,
         "nbytes": 1 << 40},
        {"name": ""},
    ],
)  # fmt: skip
def test_an_announcement_at_the_limit_passes(changes: dict[str, Any]) -> None:
    frame = announce(**changes)
    assert read_all(session_decoder(), [encode_announce(frame)]) == [frame]


def test_hello_and_refusal_may_say_more_in_later_versions() -> None:
    for frame in (HELLO, Refusal("version", "too old")):
        longer = msgspec.msgpack.encode([*msgspec.msgpack.decode(msgspec.msgpack.encode(frame)), "more"])
        assert read_all(handshake_decoder(), [CONTROL_MAGIC + framed(longer)]) == [frame]


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": b"n" * 31},
        {"nonce": b"n" * 33},
        {"limits": Limits(0)},
        {"limits": Limits(65)},
        {"features": ["x"] * 33},
        {"backend": "soft ware"},
        {"highest_version": 1 << 16},
    ],
)
def test_a_hello_that_breaks_a_limit_is_refused(changes: dict[str, Any]) -> None:
    decoder = handshake_decoder()
    decoder.feed(CONTROL_MAGIC + encode(msgspec.structs.replace(HELLO, **changes)))
    with pytest.raises(RemoteProtocolError, match="this is no frame"):
        decoder.next_frame()


def test_handshake_frames_do_not_belong_in_a_session_nor_the_reverse() -> None:
    for frame in HANDSHAKE:
        refused(encode(frame))
    for other in SESSION:
        with pytest.raises(RemoteProtocolError):
            read_all(handshake_decoder(), [CONTROL_MAGIC + encode(other)])


def test_limits_shared_are_the_smaller_ones() -> None:
    assert Limits(4, 100, 7).shared_with(Limits(2, 200, 7)) == Limits(2, 100, 7)
    assert Limits(2, 200, 8).shared_with(Limits(4, 100, 7)) == Limits(2, 100, 7)


def test_metadata_goes_there_and_back() -> None:
    assert frames.encode_metadata({}) == b""
    assert frames.decode_metadata(b"") == {}
    assert frames.decode_metadata(frames.encode_metadata({"step": 3, "é": [1, None]})) == {"step": 3, "é": [1, None]}
    with pytest.raises(ValueError, match="over the limit of 65536"):
        frames.encode_metadata({"a": "x" * MAX_METADATA})
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        frames.encode_metadata({"a": object()})


def test_words_are_cut_and_cleaned_for_the_wire() -> None:
    words = frames.printable("\x1b[2Jé\ud800" + "x" * MAX_WORDS)
    assert words.startswith("?[2Jé?x")
    assert len(words) == MAX_WORDS
    assert read_all(session_decoder(), [encode(Abort(words))]) == [Abort(words)]


def read_or_words(decoder: FrameDecoder[Any], data: bytes) -> str:
    try:
        read_all(decoder, [data])
    except RemoteProtocolError as error:
        return error.message
    return ""


@given(st.binary(max_size=200))
def test_random_bytes_give_frames_or_a_protocol_error(data: bytes) -> None:
    for decoder, start in ((session_decoder(), b""), (handshake_decoder(), CONTROL_MAGIC)):
        words = read_or_words(decoder, start + data)
        assert not words or words.isprintable()
        assert decoder.pending_bytes <= len(data)


@given(st.sampled_from(SESSION), st.data())
def test_damaged_frames_give_frames_or_a_protocol_error(frame: SessionFrame, data: st.DataObject) -> None:
    damaged = bytearray(encode(frame))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(4, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    words = read_or_words(session_decoder(), bytes(damaged))
    assert not words or words.isprintable()
