"""What a server of safetensors files offers: made of files, chosen from by patterns, and trusted by nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.errors import RemoteProtocolError
from devmem_tcp.safetensors import catalog as catalog_module
from devmem_tcp.safetensors.catalog import Catalog, CatalogEntry, CatalogFile
from devmem_tcp.safetensors.source_file import SourceFile
from safetensors_files import Tensors, some_tensors, write_file


def catalog_of(folder: Path, *files: Tensors, metadata: dict[str, str] | None = None) -> Catalog:
    with ExitStack() as stack:
        paths = [write_file(folder / f"{i}.safetensors", tensors, metadata) for i, tensors in enumerate(files)]
        return Catalog.of([stack.enter_context(SourceFile(path)) for path in paths])


def named(*names: str) -> Catalog:
    """Return a catalog of tensors of one byte."""
    entries = tuple(CatalogEntry(name, 0, "uint8", (1,), 1) for name in names)
    return Catalog(entries, (CatalogFile("f", "1", {}),))


def names(catalog: Catalog) -> list[str]:
    return [entry.name for entry in catalog.entries]


def test_of_files(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, some_tensors("a."), some_tensors("b."), metadata={"format": "pt", "note": "\n\0"})
    assert [(file.name, file.metadata["note"]) for file in catalog.files] == [
        ("0.safetensors", "\n\0"),
        ("1.safetensors", "\n\0"),
    ]
    assert [entry.file for entry in catalog.entries] == [0] * 5 + [1] * 5
    by_name = {entry.name: entry for entry in catalog.entries}
    assert by_name["b.embed.weight"] == CatalogEntry("b.embed.weight", 1, "bfloat16", (90, 50), 9000)
    assert by_name["a.layers.0.scale"] == CatalogEntry("a.layers.0.scale", 0, "float64", (), 8)
    assert by_name["a.layers.1.empty"] == CatalogEntry("a.layers.1.empty", 0, "int64", (0, 4), 0)
    assert catalog.total_bytes == 2 * (9000 + 140 + 8 + 3)


def test_it_travels(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, some_tensors("a."), some_tensors("b."), {}, metadata={"a": "\u2028"})
    assert Catalog.decode(catalog.encode()) == catalog


def test_no_files() -> None:
    assert Catalog.decode(Catalog.of([]).encode()) == Catalog((), ())


def test_one_name_in_two_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'embed.weight' is in .*/0.safetensors and in .*/1.safetensors"):
        catalog_of(tmp_path, some_tensors(), some_tensors())


def test_a_tensor_whose_name_cannot_be_printed_is_not_offered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0.safetensors cannot be offered.*'a\\x1b' is no name of a tensor"):
        catalog_of(tmp_path, {"a\x1b": ("U8", (1,), b"x")})


# --- choosing -------------------------------------------------------------------------------------------------------


NAMES = ["model.embed.weight", "model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "lm_head.weight", "Odd[1]"]


@pytest.mark.parametrize(
    ("only", "chosen"),
    [
        ([], NAMES),
        (["*"], NAMES),
        (["model.layers.*"], NAMES[1:3]),
        (["lm_head.weight", "model.e*"], [NAMES[0], NAMES[3]]),
        (["*.mlp.*", "model.*"], NAMES[:3]),
        (["*.[1-9].*"], [NAMES[2]]),
        (["model.layers.?.mlp.weight"], NAMES[1:3]),
        (["O*"], [NAMES[4]]),
        (["Odd[[]1]"], [NAMES[4]]),
    ],
)
def test_select(only: list[str], chosen: list[str]) -> None:
    catalog = named(*NAMES)
    assert names(catalog.select(only)) == chosen
    assert catalog.select(only).files == catalog.files


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("lm_hed.weight", "'lm_head.weight'"),
        ("model.layer.*", "'model.layers.0.mlp.weight'"),
        ("o*", "near names: "),
        ("MODEL.embed.weight", "'model.embed.weight'"),
        ("zzz", "'model.embed.weight', 'model.layers.0.mlp.weight', 'model.layers.1.mlp.weight'"),
    ],
)
def test_a_pattern_that_matches_nothing_tells_what_is_near(pattern: str, near: str) -> None:
    with pytest.raises(ValueError, match="no tensor matches") as caught:
        named(*NAMES).select(["*", pattern])
    assert repr(pattern) in str(caught.value)
    assert near in str(caught.value)


def test_names_that_differ_in_numbers_are_told_once() -> None:
    catalog = named(*(f"layers.{i}.weight" for i in range(10_000)), "layers.norm.weight")
    with pytest.raises(ValueError, match="no tensor matches") as caught:
        catalog.select(["layer.7.weight"])
    assert str(caught.value).endswith("; near names: 'layers.0.weight', 'layers.norm.weight'")


def test_select_from_nothing() -> None:
    with pytest.raises(ValueError, match="there are none"):
        Catalog((), ()).select(["a"])


def test_fingerprint_is_that_of_what_was_chosen(tmp_path: Path) -> None:
    both = catalog_of(tmp_path, some_tensors("a."), some_tensors("b."))
    with SourceFile(tmp_path / "1.safetensors") as second:
        alone = Catalog.of([second])
    assert both.select(["b.*"]).fingerprint == alone.fingerprint  # another file changed, or came: no matter
    assert both.fingerprint != alone.fingerprint
    assert both.select(["b.e*"]).fingerprint != alone.fingerprint
    changed = Catalog(alone.entries, (CatalogFile("1.safetensors", "another", {}),))
    assert changed.fingerprint != alone.fingerprint


@pytest.mark.parametrize("fields", [{"dtype": "int8"}, {"shape": (1, 1)}, {"name": "b"}])
def test_fingerprint_tells_entries_apart(fields: dict[str, Any]) -> None:
    catalog = named("a")
    other = msgspec.structs.replace(catalog.entries[0], **fields)
    assert Catalog((other,), catalog.files).fingerprint != catalog.fingerprint


# --- hostile peers --------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def entry(**fields: Any) -> Change:
    return lambda catalog: catalog["entries"][0].update(fields)


def file(**fields: Any) -> Change:
    return lambda catalog: catalog["files"][0].update(fields)


HOSTILE: dict[str, tuple[Change, str]] = {
    "name twice": (lambda c: c["entries"].append(c["entries"][0]), "tensor 'a' comes twice"),
    "name too long": (entry(name="n" * 1025), "length <= 1024"),
    "name with controls": (entry(name="a\x1b[2J"), "is no name of a tensor"),
    "name with direction": (entry(name="a\u202eb"), "is no name of a tensor"),
    "name with lines": (entry(name="a\nb"), "is no name of a tensor"),
    "name reserved": (entry(name="__metadata__"), "is no name of a tensor"),
    "name a number": (entry(name=1), "Expected `str`"),
    "no such file": (entry(file=1), "tensor 'a' is in file 1 of 1"),
    "file negative": (entry(file=-1), "Expected `int` >= 0"),
    "dtype unknown": (entry(dtype="float7"), "no safetensors file holds dtype 'float7'"),
    "dtype of no file": (entry(dtype="complex128"), "no safetensors file holds dtype"),
    "dtype in the other words": (entry(dtype="F32"), "no safetensors file holds dtype 'F32'"),
    "too few bytes": (entry(nbytes=23), "takes 24 bytes, not 23"),
    "too many bytes": (entry(nbytes=25), "takes 24 bytes, not 25"),
    "bytes negative": (entry(nbytes=-24), "Expected `int` >= 0"),
    "shape wraps": (entry(shape=[2**32, 2**32, 2**32], nbytes=0), "the limit is 2"),
    "shape over the limit": (entry(shape=[2**48], nbytes=0), "Expected `int` <="),
    "shape negative": (entry(shape=[-2, -3]), "Expected `int` >= 0"),
    "shape float": (entry(shape=[2.0, 3.0]), "Expected `int`"),
    "rank": (entry(shape=[1] * 33, nbytes=4), "length <= 32"),
    "a key too many": (entry(extra=1), "unknown field"),
    "file of a folder": (file(name="../a"), "is no name of a file"),
    "file is a folder": (file(name=".."), "is no name of a file"),
    "file at the root": (file(name="/etc/passwd"), "is no name of a file"),
    "file with controls": (file(name="a\0"), "is no name of a file"),
    "file without name": (file(name=""), "length >= 1"),
    "file's name too long": (file(name="n" * 256), "length <= 255"),
    "fingerprint too long": (file(fingerprint="1" * 129), "length <= 128"),
    "fingerprint with controls": (file(fingerprint="\n"), "cannot be printed"),
    "metadata nested": (file(metadata={"a": {}}), "Expected `str`"),
    "metadata missing": (lambda c: c["files"][0].pop("metadata"), "missing required field `metadata`"),
    "no files": (lambda c: c.pop("files"), "missing required field `files`"),
    "entries no list": (lambda c: c.update(entries={}), "Expected `array`"),
    "in all too large": (
        lambda c: c.update(
            entries=[{"name": str(i), "file": 0, "dtype": "uint8", "shape": [2**47], "nbytes": 2**47} for i in range(2)]
        ),
        "281474976710656 bytes in all are over the limit",
    ),
}


def honest() -> dict[str, Any]:
    return {
        "entries": [{"name": "a", "file": 0, "dtype": "float32", "shape": [2, 3], "nbytes": 24}],
        "files": [{"name": "f", "fingerprint": "1", "metadata": {}}],
    }


def test_an_honest_catalog_is_taken() -> None:
    assert names(Catalog.decode(json.dumps(honest()).encode())) == ["a"]


@pytest.mark.parametrize(("change", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile(change: Change, words: str) -> None:
    catalog = honest()
    change(catalog)
    with pytest.raises(RemoteProtocolError, match=words) as caught:
        Catalog.decode(json.dumps(catalog).encode())
    assert caught.value.message.isprintable()
    assert len(caught.value.message) <= 512


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"{", b"\xff", b'{"entries":' + b"[" * 100_000, json.dumps(honest()).encode()[:-1] + b"\0}"],
)
def test_no_catalog_at_all(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="no sound catalog"):
        Catalog.decode(data)


def test_limits_of_number_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RemoteProtocolError, match="length <= 100000"):
        Catalog.decode(named(*map(str, range(100_001))).encode())
    assert len(Catalog.decode(named(*map(str, range(100_000))).encode()).entries) == 100_000
    data = json.dumps(honest()).encode()
    monkeypatch.setattr(catalog_module, "MAX_CATALOG", len(data) - 1)
    with pytest.raises(
        RemoteProtocolError, match=f"a catalog of {len(data)} bytes is over the limit of {len(data) - 1}"
    ):
        Catalog.decode(data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.lists(st.tuples(st.sampled_from(["entries", "files"]), st.sampled_from(list("nfdsbm")), VALUES), max_size=3),
    st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=2)), max_size=2),
)
def test_anything_is_taken_whole_or_refused(changes: list[tuple[str, str, Any]], cuts: list[tuple[int, bytes]]) -> None:
    catalog = honest()
    for part, first, value in changes:
        for key in list(catalog[part][0]):
            if key.startswith(first):
                catalog[part][0][key] = value
    data = bytearray(json.dumps(catalog).encode())
    for at, piece in cuts:
        data[at : at + 1] = piece
    try:
        taken = Catalog.decode(bytes(data))
    except RemoteProtocolError:
        return
    assert Catalog.decode(taken.encode()) == taken
    for each in taken.entries:
        assert each.name.isprintable()
        assert taken.files[each.file]
        count = each.nbytes
        for extent in each.shape:
            if extent == 0:
                assert count == 0
            else:
                assert count % extent == 0
                count //= extent
