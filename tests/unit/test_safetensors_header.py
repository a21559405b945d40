"""Headers of safetensors files: sound ones are read as they are, all others are refused by name and fault."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from devmem_tcp.safetensors import header as header_module
from devmem_tcp.safetensors.header import MAX_HEADER, Header, encode_header, header_bytes, read_header
from safetensors_files import ITEM_BYTES, Tensors, claim, file_of, some_tensors, tensors_strategy, with_header

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def check_reading(header: Header, data: bytes) -> None:
    """What a header says must be within the file, without hole or overlap, and of the size that its dtype has."""
    end = header.data_start
    for name, tensor in header.tensors.items():
        assert tensor.name == name
        assert tensor.start == end
        end += tensor.nbytes
        count = ITEM_BYTES[tensor.dtype]
        for extent in tensor.shape:
            count *= extent
        assert tensor.nbytes == count
    assert header.file_bytes == end
    assert header.data_start == 8 + int.from_bytes(data[:8], "little") <= len(data)


@given(tensors_strategy(), st.none() | st.dictionaries(TEXT, TEXT, max_size=3), st.sampled_from(["", " ", " " * 9]))
def test_what_was_written_is_read(tensors: Tensors, metadata: dict[str, str] | None, padding: str) -> None:
    data = file_of(tensors, metadata, padding)
    header = read_header(data)
    check_reading(header, data)
    assert header.metadata == (metadata or {})
    assert header.file_bytes == len(data)
    read = {
        name: (each.dtype, each.shape, data[each.start : each.start + each.nbytes])
        for name, each in header.tensors.items()
    }
    assert read == tensors


@given(tensors_strategy(), st.dictionaries(TEXT, TEXT, max_size=3))
def test_encoded_headers_are_read_and_aligned(tensors: Tensors, metadata: dict[str, str]) -> None:
    data = encode_header({name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}, metadata)
    header = read_header(data)
    assert len(data) == header.data_start
    assert len(data) % 8 == 0
    assert header.metadata == metadata
    assert {name: (each.dtype, each.shape) for name, each in header.tensors.items()} == {
        name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()
    }
    for tensor in header.tensors.values():
        assert tensor.start % ITEM_BYTES[tensor.dtype] == 0


def test_order_is_that_of_the_bytes_not_of_the_header() -> None:
    text = {"late": claim("U8", [4], 3, 7), "none": claim("U8", [0], 3, 3), "early": claim("U8", [3], 0, 3)}
    assert list(read_header(with_header(text)).tensors) == ["early", "none", "late"]


def test_data_may_follow_or_not() -> None:
    data = file_of(some_tensors())
    assert read_header(data) == read_header(data[: header_bytes(data)])


FAULTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "0 bytes are no safetensors file"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "7 bytes are no safetensors file"),
    "length over the limit": ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", "over the limit of 100000000"),
    "length of all ones": (b"\xff" * 8 + b"{}", "over the limit"),
    "length past the end": ((3).to_bytes(8, "little") + b"{}", "the header of 3 bytes is cut off after 2"),
    "no header": (with_header(b""), "starts with b''"),
    "space first": (with_header(b" {}"), "starts with b' '"),
    "byte order mark": (with_header(b"\xef\xbb\xbf{}"), "starts with"),
    "a list": (with_header(b"[]"), "starts with b'.'"),
    "UTF-16": (with_header('{"a":1}'.encode("utf-16-le")), "cannot be read"),
    "not closed": (with_header(b'{"a":'), "cannot be read"),
    "something after": (with_header(b"{} {}"), "cannot be read"),
    "zeros after": (with_header(b"{}\0\0"), "cannot be read"),
    "a trailing comma": (with_header(b'{"__metadata__":{},}'), "cannot be read"),
    "name is no UTF-8": (with_header(b'{"\xff":1}'), "cannot be read"),
    "name is half a pair": (with_header(b'{"\\ud800":1}'), "cannot be read"),
    "deep": (with_header(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "cannot be read"),
    "metadata null": (with_header(b'{"__metadata__":null}'), "__metadata__ cannot be read"),
    "metadata a number": (with_header({"__metadata__": {"format": 1}}), "may hold text only, but 'format'"),
    "metadata nested": (with_header({"__metadata__": {"a": {"b": "c"}}}), "may hold text only, but 'a'"),
    "metadata twice": (with_header(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' comes twice"),
    "metadata's key twice": (with_header(b'{"__metadata__":{"a":"","\\u0061":""}}'), "'a' comes twice"),
    "tensor twice": (
        with_header(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":[[]]}'),
        "'a' comes twice",
    ),
    "dtype twice": (
        with_header(b'{"a":{"dtype":":","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "tensor 'a': a key comes twice",
    ),
    "dtype twice, once escaped": (
        with_header(b'{"a":{"dtype":"U8","\\u0064type":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "tensor 'a': a key comes twice",
    ),
    "tensor null": (with_header(b'{"a":null}'), "tensor 'a': "),
    "no dtype": (with_header({"a": {"shape": [0], "data_offsets": [0, 0]}}), "tensor 'a': .*dtype"),
    "no shape": (with_header({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "tensor 'a': .*shape"),
    "no offsets": (with_header({"a": {"dtype": "U8", "shape": [0]}}), "tensor 'a': .*data_offsets"),
    "a key too many": (with_header({"a": claim("U8", [0], 0, 0) | {"x": 1}}), "tensor 'a': .*unknown field `x`"),
    "three offsets": (
        with_header({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0, 0]}}),
        "tensor 'a': .*data_offsets",
    ),
    "unknown dtype": (with_header({"a": claim("F128", [0], 0, 0)}), "tensor 'a': dtype 'F128' is unknown"),
    "lower case": (with_header({"a": claim("bf16", [0], 0, 0)}), "tensor 'a': dtype 'bf16' is unknown"),
    "F4": (with_header({"a": claim("F4", [2], 0, 1)}, b"\0"), "tensor 'a': elements of F4 are smaller than a byte"),
    "F6_E2M3": (with_header({"a": claim("F6_E2M3", [4], 0, 3)}), "tensor 'a': elements of F6_E2M3 are smaller"),
    "F6_E3M2": (with_header({"a": claim("F6_E3M2", [4], 0, 3)}), "tensor 'a': elements of F6_E3M2 are smaller"),
    "negative dimension": (with_header({"a": claim("U8", [-1, -1], 0, 1)}), "tensor 'a': .*shape"),
    "fraction": (with_header({"a": claim("U8", [1.5], 0, 1)}), "tensor 'a': .*shape"),
    "float": (with_header({"a": claim("U8", [1.0], 0, 1)}), "tensor 'a': .*shape"),
    "true": (with_header({"a": claim("U8", [True], 0, 1)}), "tensor 'a': .*shape"),
    "text": (with_header({"a": claim("U8", ["1"], 0, 1)}), "tensor 'a': .*shape"),
    "dimension of 2**63": (with_header({"a": claim("U8", [2**63], 0, 2**63 - 1)}), "tensor 'a': .*shape"),
    "digits": (with_header('{"a":{"dtype":"U8","shape":[' + "9" * 100_000 + '],"data_offsets":[0,0]}}'), "tensor 'a'"),
    "wraps to 0": (with_header({"a": claim("U8", [2**32, 2**32], 0, 0)}), "tensor 'a': shape .* the limit is 2"),
    "wraps by the size": (with_header({"a": claim("F64", [2**61], 0, 0)}), "tensor 'a': shape .* the limit is 2"),
    "33 dimensions": (with_header({"a": claim("U8", [1] * 33, 0, 1)}), "tensor 'a': .*length <= 32"),
    "minus 0": (with_header('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "tensor 'a': -0 is no number"),
    "offset negative": (with_header({"a": claim("U8", [1], -1, 0)}), "tensor 'a': .*data_offsets"),
    "offsets reversed": (with_header({"a": claim("U8", [1], 1, 0)}), "tensor 'a': U8 of shape .* takes 1 bytes"),
    "too long": (with_header({"a": claim("U8", [2], 0, 3)}), "tensor 'a': U8 of shape .2. takes 2 bytes, not those"),
    "too short": (with_header({"a": claim("F32", [2], 0, 4)}), "tensor 'a': F32 of shape .2. takes 8 bytes"),
    "a hole first": (with_header({"a": claim("U8", [2], 1, 3)}), "tensor 'a': it starts at byte 1 .* a hole"),
    "a hole": (
        with_header({"a": claim("U8", [2], 0, 2), "b": claim("U8", [2], 3, 5)}),
        "tensor 'b': it starts at byte 3 of the data, where the one before ends at 2: a hole",
    ),
    "an overlap": (
        with_header({"a": claim("U8", [2], 0, 2), "b": claim("U8", [2], 1, 3)}),
        "tensor 'b': it starts at byte 1 of the data, where the one before ends at 2: an overlap",
    ),
    "the same bytes": (with_header({"a": claim("U8", [2], 0, 2), "b": claim("U8", [2], 0, 2)}), "an overlap"),
    "empty in the middle": (with_header({"a": claim("U8", [2], 0, 2), "b": claim("U8", [0], 1, 1)}), "an overlap"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "words"), FAULTS.values(), ids=FAULTS)
def test_malformed(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_header(data)
    assert len(str(caught.value)) < 1000


def test_a_header_of_the_largest_size_is_taken() -> None:
    assert header_bytes(MAX_HEADER.to_bytes(8, "little")) == MAX_HEADER + 8


def test_an_error_shows_a_hostile_name_harmlessly() -> None:
    name = "\x1b[2J\u202e" + "n" * 5000
    with pytest.raises(ValueError, match="dtype") as caught:
        read_header(with_header({name: claim("NO", [0], 0, 0)}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


def test_the_number_of_tensors_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of({f"t{i}": ("U8", (1,), b"x") for i in range(4)})
    monkeypatch.setattr(header_module, "MAX_TENSORS", 4)
    assert len(read_header(data).tensors) == 4
    monkeypatch.setattr(header_module, "MAX_TENSORS", 3)
    with pytest.raises(ValueError, match="more than 3 keys"):
        read_header(data)


SOUND = file_of(some_tensors(), {"format": "pt"}, padding="  ")


@given(st.data())
def test_a_mutated_file_is_refused_or_read_right(data: st.DataObject) -> None:
    """Bytes of the header are changed, inserted and removed; what is read then must hold together all the same."""
    raw = bytearray(SOUND)
    header_end = header_bytes(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_end - 1))
        piece = data.draw(
            st.binary(max_size=2) | st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"9"])
        )
        raw[at : at + data.draw(st.integers(0, 2))] = piece
    if data.draw(st.booleans()):  # mend the length, so that the parser sees the change
        raw[:8] = max(0, header_end - 8 + len(raw) - len(SOUND)).to_bytes(8, "little")
    try:
        header = read_header(bytes(raw))
    except ValueError:
        return
    check_reading(header, bytes(raw))


def test_every_change_of_one_byte_is_refused_or_read_right() -> None:
    chance = random.Random(1)
    for at in range(header_bytes(SOUND)):
        for value in {0, 9, 0x20, 0x22, 0x30, 0x31, 0x39, 0x7D, 0xFF, chance.randrange(256)}:
            raw = bytearray(SOUND)
            raw[at] = value
            try:
                header = read_header(bytes(raw))
            except ValueError:
                continue
            check_reading(header, bytes(raw))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F4", ""]) | JSON,
        "shape": st.lists(st.integers(-1, 3) | st.sampled_from([2**31, 2**62, 2**63]), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 20), min_size=1, max_size=3) | JSON,
    }
)


@given(st.dictionaries(TEXT | st.just("__metadata__"), ENTRY | JSON, max_size=3))
@example({"a": claim("U8", [2**31, 2**31, 2**31], 0, 0)})
def test_any_json_is_refused_or_read_right(header: dict[str, Any]) -> None:
    data = with_header(json.dumps(header))
    try:
        read = read_header(data)
    except ValueError:
        return
    check_reading(read, data)
    assert set(read.tensors) == set(header) - {"__metadata__"}


@given(st.binary(max_size=64))
def test_any_bytes_are_refused_or_read_right(data: bytes) -> None:
    for raw in (data, with_header(data), with_header(b"{" + data + b"}")):
        try:
            header = read_header(raw)
        except ValueError:
            continue
        check_reading(header, raw)


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"__metadata__": ("U8", ())}, {}, "cannot be called __metadata__"),
        ({"a": ("float32", ())}, {}, "dtype 'float32' is unknown"),
        ({"a": ("F4", (2,))}, {}, "smaller than a byte"),
        ({"a": ("U8", (-1,))}, {}, "negative dimension"),
        ({"a": ("U8", (2**48,))}, {}, "the limit is 2"),
        ({"\ud800": ("U8", ())}, {}, "surrogates"),
        ({}, {"a": "\ud800"}, "surrogates"),
        ({}, {"a": 1}, "may hold text only"),
        ({}, {"a": "x" * MAX_HEADER}, "over the limit"),
    ],
)
def test_what_cannot_be_a_file_is_not_encoded(tensors: Any, metadata: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode_header(tensors, metadata)
