"""Safetensors files being fetched, in one attempt: whole or not there, and by one writer at a time."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devmem_tcp.errors import BusyError, ClosedError, KernelError, LeakWarning
from devmem_tcp.safetensors.catalog import Catalog
from devmem_tcp.safetensors.source_file import SourceFile
from devmem_tcp.safetensors.target_file import Digest, TargetFile
from devmem_tcp.sys import calls
from devmem_tcp.testing.faults import fail_nth
from safetensors_fetch import TENSORS, TOTAL, Fetch, in_child
from safetensors_files import Tensors, tensors_strategy


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: that it is waited for, and when, is seen at the seam of system calls."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    folder = tmp_path / "folder"
    folder.mkdir()
    return Fetch(folder)


# --- one attempt ----------------------------------------------------------------------------------------------------


def test_a_fetch_in_one_go(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # once, with the real disk
    with fetch.open() as file:
        assert file.missing() == [entry.name for entry in fetch.catalog.entries]
        assert (file.resumed, file.total_bytes) == (0, TOTAL)
        fetch.fill(file, list(TENSORS)[::-1])
        assert file.missing() == []
        assert fetch.files() == ["out.part", "out.part.json"]
        file.complete()
        assert file.closed
    fetch.check_complete()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(tensors=tensors_strategy(), chance=st.randoms(use_true_random=False))
def test_any_tensors_in_any_order(tmp_path: Path, tensors: Tensors, chance: random.Random) -> None:
    printable = {name: tensor for name, tensor in tensors.items() if name.isprintable()}
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    fetch = Fetch(folder, printable)
    with suppress(FileNotFoundError):
        fetch.path.unlink()
    order = list(printable)
    chance.shuffle(order)
    with fetch.open() as file:
        fetch.fill(file, order)
        file.complete()
    fetch.check_complete()


def test_windows_are_of_the_right_size_and_apart(fetch: Fetch) -> None:
    with fetch.open() as file:
        windows = {name: file.window(name) for name in file.missing()}
        assert {name: len(window) for name, window in windows.items()} == {
            name: len(content) for name, (_, _, content) in TENSORS.items()
        }
        assert all((window.format, window.readonly) == ("B", False) for window in windows.values())
        for name, window in windows.items():
            window[:] = TENSORS[name][2]
        for name in windows:
            file.finish(name)
        del window, windows
        file.complete()
    fetch.check_complete()


def test_bytes_may_be_written_in_pieces(fetch: Fetch) -> None:
    with fetch.open() as file:
        for name, (_, _, content) in TENSORS.items():
            half = len(content) // 2
            file.write(name, bytearray(content[half:]), half)
            file.write(name, np.frombuffer(content[:half], np.uint8).data)
            file.finish(name)
        file.complete()
    fetch.check_complete()


def test_short_writes_are_gone_on_with(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))
    with fetch.open() as file:
        file.write("embed.weight", TENSORS["embed.weight"][2])
        file.finish("embed.weight")
    assert fetch.run() == 9000  # the journal was written whole, too
    fetch.check_complete()


def test_bytes_that_do_not_fit_are_not_written(fetch: Fetch) -> None:
    with fetch.open() as file:
        for offset, size in ((0, 141), (-1, 1), (140, 1), (141, 0)):
            with pytest.raises(ValueError, match=r"do not fit tensor 'layers.0.weight' of 140 bytes"):
                file.write("layers.0.weight", bytes(size), offset)
        file.write("layers.0.weight", np.zeros(35, np.float32).data)  # all that fits, in any format
        file.finish("layers.0.weight")
        with pytest.raises(ValueError, match="is finished already"):
            file.write("layers.0.weight", b"x")
        with fail_nth(1, errno=errno.EIO, only=["pwrite64"]), pytest.raises(KernelError, match=r"write .*part: EIO"):
            file.write("embed.weight", b"x")


def test_it_is_not_complete_before_it_is(fetch: Fetch) -> None:
    with fetch.open() as file:
        fetch.fill(file, file.missing()[:-1])
        with pytest.raises(ValueError, match=r"1 of 5 tensors are missing: 'layers.1.empty'"):
            file.complete()
        assert not fetch.path.exists()
        with pytest.raises(ValueError, match="no sound safetensors file"):
            SourceFile(file.part)
        fetch.fill(file, file.missing())  # goes on as if nothing had been
        file.complete()
    fetch.check_complete()


def test_wrong_calls(fetch: Fetch) -> None:
    with fetch.open() as file:
        for call in (file.window, file.finish):
            with pytest.raises(ValueError, match="is to have no tensor 'no'"):
                call("no")
        fetch.fill(file, ["embed.weight"])
        for call in (file.window, file.finish):
            with pytest.raises(ValueError, match=r"'embed.weight' is finished already"):
                call("embed.weight")
    file.close()
    for closed in (lambda: file.window("layers.1.mask"), lambda: file.finish("layers.1.mask"), file.complete):
        with pytest.raises(ClosedError, match="is closed"):
            closed()


def test_a_catalog_of_nothing(fetch: Fetch) -> None:
    with TargetFile(fetch.path, Catalog((), ())) as file:
        assert file.missing() == []
        file.complete()
    with SourceFile(fetch.path) as made:
        assert not made.tensors
    assert fetch.files() == ["out"]


def test_what_is_called_like_the_part_afterwards_is_left_alone(fetch: Fetch) -> None:
    """Another program begins a part of its own as soon as this one has its final name."""
    part = Path(f"{fetch.path}.part")

    begun: list[str] = []

    def hook(name: str) -> None:
        if name == "unlink" and not begun:
            begun.append(name)
            part.touch()

    with calls.intercept(hook), TargetFile(fetch.path, Catalog((), ())) as file:
        file.complete()
    assert part.exists()


def test_nothing_stays_of_an_attempt_that_finished_nothing(fetch: Fetch) -> None:
    with fetch.open() as file:
        file.window("embed.weight")[:] = TENSORS["embed.weight"][2]
    assert fetch.files() == []


def test_a_forgotten_file_is_closed_and_told_of(fetch: Fetch) -> None:
    file = fetch.open()
    fetch.fill(file, ["embed.weight"])
    with pytest.warns(LeakWarning, match="never closed"):
        del file
    assert fetch.run() == 9000


# --- checksums ------------------------------------------------------------------------------------------------------


def sha(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def test_the_callers_own_checksums(fetch: Fetch) -> None:
    digest = Digest("sha256", sha)
    with fetch.open(digest=digest) as file:
        for name in ("embed.weight", "layers.0.weight"):
            file.window(name)[:] = TENSORS[name][2]
        file.finish("embed.weight", sha(memoryview(TENSORS["embed.weight"][2])))
        file.finish("layers.0.weight", b"this is not its checksum")
    with fetch.open(digest=digest) as file:
        assert file.resumed == 9000
    assert fetch.run() == 0  # with another digest nothing can be compared


# --- files in the way -----------------------------------------------------------------------------------------------


def test_an_existing_file_is_not_touched(fetch: Fetch) -> None:
    fetch.path.write_text("precious")
    with pytest.raises(FileExistsError, match="there is a file of that name already"):
        fetch.open()
    assert fetch.files() == ["out"]
    assert fetch.path.read_text() == "precious"


def test_a_dangling_link_is_a_file_too(fetch: Fetch) -> None:
    fetch.path.symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        fetch.open()


def test_a_file_that_comes_meanwhile_is_not_touched(fetch: Fetch) -> None:
    with fetch.open() as file:
        fetch.fill(file, file.missing())
        fetch.path.write_text("precious")
        with pytest.raises(FileExistsError):
            file.complete()
    assert fetch.path.read_text() == "precious"
    with fetch.open(overwrite=True) as file:  # nothing was lost by it
        assert file.resumed == TOTAL
        file.complete()
    fetch.check_complete()


def test_an_existing_file_is_replaced_when_complete(fetch: Fetch) -> None:
    fetch.path.write_text("old")
    with fetch.open(overwrite=True) as file:
        fetch.fill(file, file.missing())
        assert fetch.path.read_text() == "old"
        file.complete()
    fetch.check_complete()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_filesystem_without_exclusive_rename(fetch: Fetch, code: int) -> None:
    with fetch.open() as file:
        fetch.fill(file, file.missing())
        fetch.path.write_text("precious")
        with fail_nth(1, errno=code, only=["renameat2"]) as fault, pytest.raises(FileExistsError):
            file.complete()
        assert fault.fired
        fetch.path.unlink()
        with fail_nth(1, errno=code, only=["renameat2"]) as fault:
            file.complete()
        assert fault.fired
    fetch.check_complete()


def test_a_link_in_place_of_the_part_is_not_followed(fetch: Fetch, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    Path(f"{fetch.path}.part").symlink_to(victim)
    with pytest.raises(KernelError, match="ELOOP") as caught:
        fetch.open()
    assert "symbolic link" in caught.value.hint
    assert victim.read_text() == "precious"


def test_a_folder_or_fifo_in_place_of_the_part(fetch: Fetch) -> None:
    part = Path(f"{fetch.path}.part")
    part.mkdir()
    with pytest.raises(KernelError, match="EISDIR"):
        fetch.open()
    part.rmdir()
    os.mkfifo(part)
    with pytest.raises(ValueError, match="not a regular file"):
        fetch.open()


# --- two at once ----------------------------------------------------------------------------------------------------


def test_one_writer_at_a_time(fetch: Fetch) -> None:
    with fetch.open() as file:
        fetch.fill(file, ["embed.weight"])
        with pytest.raises(BusyError, match=r"another program is writing .*out.part"):
            fetch.open()
        with pytest.raises(BusyError):
            in_child(fetch.open)
        assert file.missing()[0] == "layers.0.weight"
    assert fetch.run() == 9000
    fetch.check_complete()


def test_a_filesystem_without_locks(fetch: Fetch) -> None:
    with fail_nth(1, errno=errno.ENOLCK, only=["flock"]), pytest.raises(KernelError, match=r"lock .*: ENOLCK"):
        fetch.open()
    fetch.run()
    fetch.check_complete()


def test_windows_keep_the_lock(fetch: Fetch) -> None:
    file = fetch.open()
    fetch.fill(file, ["embed.weight"])
    window = file.window("layers.0.weight")
    file.close()
    with pytest.raises(BusyError, match="or this one has windows"):
        fetch.open()
    window[0] = 1
    del window
    assert fetch.run() == 9000
    fetch.check_complete()


def test_the_name_of_a_part_may_change_before_it_is_locked(fetch: Fetch) -> None:
    """Another writer completes its file after we opened its part: that is left alone, and a part of our own made."""
    first = fetch.open()
    fetch.fill(first, first.missing())

    done: list[str] = []

    def hook(name: str) -> None:
        if name == "flock" and not done:
            done.append(name)
            first.complete()

    with calls.intercept(hook), fetch.open(overwrite=True) as second:
        assert second.resumed == 0
        fetch.fill(second, ["layers.0.scale"])
        assert fetch.files() == ["out", "out.part", "out.part.json"]
    with SourceFile(fetch.path) as file:
        assert bytes(file.data("embed.weight")) == TENSORS["embed.weight"][2]
