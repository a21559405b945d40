"""Safetensors files opened for reading: what is in them, and nothing that is not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devmem_tcp.errors import ClosedError, KernelError, LeakWarning
from devmem_tcp.safetensors.source_file import SourceFile
from devmem_tcp.testing.faults import fail_nth, sweep
from safetensors_files import Tensors, claim, file_of, some_tensors, tensors_strategy, with_header, write_file

ONE_FILE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example writes it anew


@ONE_FILE
@given(tensors=tensors_strategy())
def test_every_tensor_is_read_as_written(tmp_path: Path, tensors: Tensors) -> None:
    with SourceFile(write_file(tmp_path / "x", tensors, {"format": "pt"})) as file:
        assert file.metadata == {"format": "pt"}
        assert {
            name: (each.dtype, each.shape, bytes(file.data(name))) for name, each in file.tensors.items()
        } == tensors


def test_data_are_views_that_cannot_be_written_to(tmp_path: Path) -> None:
    with SourceFile(write_file(tmp_path / "x", some_tensors())) as file:
        view = file.data("layers.0.weight")
        assert (view.readonly, view.format, view.shape) == (True, "B", (140,))
        assert np.frombuffer(view, np.float32).shape == (35,)
        assert file.data("layers.1.empty").shape == (0,)
        with pytest.raises(TypeError):
            view[0] = 1


def test_views_outlive_the_file(tmp_path: Path) -> None:
    tensors = some_tensors()
    file = SourceFile(write_file(tmp_path / "x", tensors))
    view = file.data("embed.weight")
    file.close()
    file.close()
    os.unlink(tmp_path / "x")
    assert bytes(view) == tensors["embed.weight"][2]
    assert file.closed
    with pytest.raises(ClosedError, match="is closed"):
        file.data("embed.weight")


def test_unknown_tensor(tmp_path: Path) -> None:
    with (
        SourceFile(write_file(tmp_path / "x", some_tensors())) as file,
        pytest.raises(ValueError, match="no tensor 'no'"),
    ):
        file.data("no")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"\x02\0\0\0\0\0\0", "7 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "a header of 100 bytes does not fit a file of 10"),
        (b"\xff" * 16, "over the limit"),
        (with_header({"a": claim("U8", [2], 0, 2)}, b"x"), "its tensors end at byte 70, the file at 69"),
        (with_header({"a": claim("U8", [2], 0, 2)}, b"xyz"), "its tensors end at byte 70, the file at 71"),
        (with_header("{}", b"x"), "its tensors end at byte 10, the file at 11"),
        (with_header("{"), "cannot be read"),
    ],
)
def test_unsound_files(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        SourceFile(path)
    assert str(path) in str(caught.value)


@ONE_FILE
@given(data=st.data())
def test_a_mutated_file_is_refused_or_read_within_its_bounds(tmp_path: Path, data: st.DataObject) -> None:
    """Also cut short, and made longer: what is read lies within the file, and covers all of it behind the header."""
    raw = bytearray(file_of(some_tensors()))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 500))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    raw = raw[: data.draw(st.none() | st.integers(0, len(raw)))] + data.draw(st.binary(max_size=2))
    (tmp_path / "x").write_bytes(raw)
    try:
        file = SourceFile(tmp_path / "x")
    except ValueError:
        return
    with file:
        start = 8 + int.from_bytes(raw[:8], "little")
        assert b"".join(file.data(name) for name in file.tensors) == raw[start:]


def test_fingerprint_tells_changes(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x", some_tensors())
    os.utime(path, ns=(0, 1_000_000_000))

    def fingerprint() -> str:
        with SourceFile(path) as file:
            return file.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    os.utime(path, ns=(0, 1_000_000_001))
    assert fingerprint() != first
    write_file(path, some_tensors(), {"a": "b"})  # another header
    os.utime(path, ns=(0, 1_000_000_000))
    other = fingerprint()
    write_file(path, some_tensors(), {"a": "c"})  # of the same size
    os.utime(path, ns=(0, 1_000_000_000))
    assert len({first, other, fingerprint()}) == 3


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=f"open {tmp_path}/none: ENOENT"):
        SourceFile(tmp_path / "none")
    with pytest.raises(ValueError, match="not a regular file"):
        SourceFile(tmp_path)
    os.mkfifo(tmp_path / "fifo")  # must not wait for a writer
    with pytest.raises(ValueError, match="not a regular file"):
        SourceFile(tmp_path / "fifo")


def test_a_forgotten_file_is_closed_and_told_of(tmp_path: Path) -> None:
    file = SourceFile(write_file(tmp_path / "x", some_tensors()))
    with pytest.warns(LeakWarning, match="never closed"):
        del file


def test_every_call_fails_once(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x", some_tensors())

    def read() -> None:
        with SourceFile(path) as file:
            assert len(file.data("embed.weight")) == 9000

    assert [run.call for run in sweep(read, errnos=[errno.EIO])] == ["open", "fstat", "pread64", "pread64", "mmap"]


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x", some_tensors())
    with fail_nth(1, errno=errno.EIO, only=["pread64"]), pytest.raises(KernelError, match=f"read {path}: EIO"):
        SourceFile(path)
