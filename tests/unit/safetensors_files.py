"""Safetensors files for tests: made by hand, byte by byte, so that nothing of the code under test is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""By name: the format's word for the dtype, the shape, the bytes."""


def with_header(header: bytes | str | dict[str, Any], data: bytes = b"") -> bytes:
    """Return a file of a header, whatever it says, and data."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + data


def claim(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    """Return a tensor as a header describes it."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(tensors: Tensors, metadata: dict[str, str] | None = None, padding: str = "") -> bytes:
    """Return a sound file of tensors, one after another."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = claim(dtype, list(shape), len(data), len(data) + len(content))
        data += content
    return with_header(json.dumps(header) + padding, data)


def write_file(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.write_bytes(file_of(tensors, metadata))
    return path


def some_tensors(prefix: str = "", seed: int = 0) -> Tensors:
    """Return a few tensors of every sort: large, small, of no dimension, of no bytes."""
    pattern = bytes((7 * i + seed) % 251 for i in range(9000))
    return {
        f"{prefix}embed.weight": ("BF16", (90, 50), pattern),
        f"{prefix}layers.0.weight": ("F32", (5, 7), pattern[1:141]),
        f"{prefix}layers.0.scale": ("F64", (), pattern[2:10]),
        f"{prefix}layers.1.mask": ("BOOL", (3,), pattern[3:6]),
        f"{prefix}layers.1.empty": ("I64", (0, 4), b""),
    }


@st.composite
def tensors_strategy(draw: st.DrawFn) -> Tensors:
    """Any few tensors with any names."""
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
    made: Tensors = {}
    for name in draw(st.lists(names, unique=True, max_size=5)):
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        count = ITEM_BYTES[dtype]
        for extent in shape:
            count *= extent
        made[name] = (dtype, shape, draw(st.binary(min_size=count, max_size=count)))
    return made
