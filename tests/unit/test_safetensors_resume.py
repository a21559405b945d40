"""Safetensors files fetched in several attempts: nothing finished is lost, and nothing that is not whole is kept."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from devmem_tcp.errors import BrokenError, KernelError
from devmem_tcp.safetensors.catalog import Catalog
from devmem_tcp.safetensors.source_file import SourceFile
from devmem_tcp.safetensors.target_file import TargetFile
from devmem_tcp.sys import calls
from devmem_tcp.testing.faults import fail_nth, sweep
from safetensors_fetch import TENSORS, TOTAL, Fetch, in_child
from safetensors_files import some_tensors


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


# --- another attempt ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint_bytes", [0, 100, 1 << 40])
@pytest.mark.parametrize("number", range(6))
def test_what_was_finished_is_not_fetched_again(fetch: Fetch, number: int, checkpoint_bytes: int) -> None:
    done = fetch.some(number, checkpoint_bytes=checkpoint_bytes)
    assert fetch.run() == fetch.size_of(done)
    assert fetch.finished == [name for name in TENSORS if name not in done]
    fetch.check_complete()


def test_many_short_attempts(fetch: Fetch) -> None:
    for number in range(1, len(TENSORS) + 1):
        fetch.some(1)
        lines = Path(f"{fetch.path}.part.json").read_text().splitlines()
        assert len(lines) == 1 + number  # each is noted once
    assert fetch.run() == TOTAL
    fetch.check_complete()


def test_journal_entries_come_after_the_data(fetch: Fetch) -> None:
    """The data are put on the disk before the entry that speaks of them is written, at every checkpoint."""
    with fetch.open() as file, fail_nth(0) as seen:
        fetch.fill(file, ["embed.weight"])
        assert seen.calls == ["fdatasync", "pwrite64", "fdatasync"]
        fetch.fill(file, ["layers.0.weight"])
    assert seen.calls == ["fdatasync", "pwrite64", "fdatasync"] * 2


def test_checkpoints_come_by_the_byte(fetch: Fetch) -> None:
    with fetch.open(checkpoint_bytes=9100) as file, fail_nth(0) as seen:
        fetch.fill(file, ["embed.weight"])
        assert seen.calls == []
        fetch.fill(file, ["layers.0.weight"])  # 9140
        assert len(seen.calls) == 3
        fetch.fill(file, ["layers.0.scale"])
        assert len(seen.calls) == 3
        file.checkpoint()
        assert len(seen.calls) == 6
        file.checkpoint()  # nothing to note
        assert len(seen.calls) == 6


def test_the_name_comes_after_the_data_and_before_the_journal_goes(fetch: Fetch) -> None:
    with fetch.open() as file:
        fetch.fill(file, file.missing())
        with fail_nth(0) as seen:
            file.complete()
    assert seen.calls == ["pwrite64", "fsync", "renameat2", "unlink", "unlink", "open", "fsync"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_costs_its_tensor_alone(fetch: Fetch) -> None:
    done = fetch.some(4)
    part = Path(f"{fetch.path}.part")
    flip(part, part.read_bytes().index(TENSORS["embed.weight"][2]) + 4567)
    assert fetch.run() == fetch.size_of(done) - 9000
    assert fetch.finished == ["embed.weight", "layers.1.empty"]
    fetch.check_complete()


def test_any_flipped_byte_of_the_journal_costs_at_most_work(fetch: Fetch) -> None:
    fetch.some(4)
    part, journal = Path(f"{fetch.path}.part"), Path(f"{fetch.path}.part.json")
    kept = part.read_bytes(), journal.read_bytes()
    for at in range(0, len(kept[1]), 7):
        part.write_bytes(kept[0])
        journal.write_bytes(kept[1])
        flip(journal, at)
        fetch.run()
        fetch.check_complete()
        fetch.path.unlink()


@pytest.mark.parametrize(
    "end", ["", '["layers.0.', '["no such tensor","00"]\n', '["layers.1.empty","xx"]\n', "[1,2]\n"]
)
def test_lines_that_cannot_be_read_or_used(fetch: Fetch, end: str) -> None:
    done = fetch.some(3)
    with open(f"{fetch.path}.part.json", "a", encoding="ascii") as journal:
        journal.write(end)
    fetch.some(1)  # also what is appended behind them is found again
    assert fetch.run() == fetch.size_of([*done, "layers.1.mask"])
    fetch.check_complete()


def test_a_changed_source_starts_afresh(fetch: Fetch) -> None:
    fetch.some(4)
    changed = Fetch(fetch.folder, some_tensors(seed=1))
    assert changed.catalog.fingerprint == fetch.catalog.fingerprint  # same size, same time, same header: not to be seen
    os.utime(f"{fetch.folder}-source", ns=(0, 2_000_000_000))
    with SourceFile(f"{fetch.folder}-source") as file:
        changed.catalog = Catalog.of([file])
    assert changed.run() == 0
    changed.check_complete()


@pytest.mark.parametrize(
    "change",
    [
        lambda fetch: setattr(fetch, "catalog", fetch.catalog.select(["layers.*"])),
        lambda fetch: os.truncate(f"{fetch.path}.part", 100),
        lambda fetch: os.truncate(f"{fetch.path}.part", 20_000),
        lambda fetch: os.unlink(f"{fetch.path}.part"),
        lambda fetch: os.unlink(f"{fetch.path}.part.json"),
        lambda fetch: Path(f"{fetch.path}.part.json").write_bytes(b""),
        lambda fetch: Path(f"{fetch.path}.part.json").write_bytes(b"[" * 100_000),
    ],
    ids=["other tensors", "cut", "longer", "no part", "no journal", "empty journal", "no JSON"],
)
def test_what_does_not_fit_starts_afresh(fetch: Fetch, change: Callable[[Fetch], object]) -> None:
    fetch.some(4)
    change(fetch)
    assert fetch.run() == 0
    fetch.tensors = {entry.name: TENSORS[entry.name] for entry in fetch.catalog.entries}
    fetch.check_complete()


def test_other_metadata_start_afresh(fetch: Fetch) -> None:
    fetch.some(4)
    with TargetFile(fetch.path, fetch.catalog, {"format": "np"}) as file:
        assert file.resumed == 0


def test_an_orphaned_journal_is_no_file(fetch: Fetch) -> None:
    """The program died between rename and the end: what is left of the journal neither harms nor helps."""
    fetch.some(4)
    journal = Path(f"{fetch.path}.part.json")
    left = journal.read_bytes()
    fetch.run()
    journal.write_bytes(left)
    with fetch.open(overwrite=True) as file:
        assert file.resumed == 0
        fetch.fill(file, file.missing())
        file.complete()
    fetch.check_complete()


# --- full disks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "hint"),
    [(errno.ENOSPC, "make room"), (errno.EDQUOT, "quota"), (errno.EFBIG, "larger than"), (errno.EOPNOTSUPP, "")],
    ids=lambda value: errno.errorcode.get(value, "hint"),
)
def test_no_room(fetch: Fetch, code: int, hint: str) -> None:
    with fail_nth(1, errno=code, only=["fallocate"]), pytest.raises(KernelError, match=r"allocate \d+ bytes") as caught:
        fetch.open()
    assert caught.value.errno == code
    assert hint in caught.value.hint
    assert fetch.files() == []


def test_the_room_is_taken_at_once(fetch: Fetch) -> None:
    with fetch.open() as file:
        assert os.stat(file.part).st_blocks * 512 >= TOTAL


def test_no_room_keeps_what_was_finished(fetch: Fetch) -> None:
    fetch.some(3)
    with fail_nth(1, errno=errno.ENOSPC, only=["fallocate"]), pytest.raises(KernelError):
        fetch.open()
    assert fetch.run() == 9148


def test_after_bytes_were_lost_only_another_attempt_helps(fetch: Fetch) -> None:
    """Linux tells once that bytes did not get to the disk; a second fdatasync would say that all is well."""
    with fetch.open() as file:
        fetch.fill(file, ["embed.weight"])
        with fail_nth(1, errno=errno.EIO, only=["fdatasync"]), pytest.raises(KernelError, match=r"write .*part: EIO"):
            fetch.fill(file, ["layers.0.weight"])
        for call in (file.checkpoint, file.complete, lambda: file.window("layers.1.mask")):
            with pytest.raises(BrokenError, match="did not get to the disk"):
                call()
    assert fetch.run() == 9000  # what was on the disk before
    fetch.check_complete()


def test_a_file_whose_last_bytes_were_lost_gets_no_name(fetch: Fetch) -> None:
    with fetch.open() as file:
        fetch.fill(file, file.missing())
        with fail_nth(1, errno=errno.EIO, only=["fsync"]), pytest.raises(KernelError, match=r"write .*part: EIO"):
            file.complete()
        with pytest.raises(BrokenError):
            file.complete()
    assert fetch.files() == ["out.part", "out.part.json"]
    assert fetch.run() == TOTAL
    fetch.check_complete()


@pytest.mark.parametrize(("n", "call"), [(2, "fdatasync"), (1, "pwrite64")])
def test_a_journal_that_could_not_be_written_is_made_up_for(fetch: Fetch, n: int, call: str) -> None:
    with fetch.open() as file:
        fetch.fill(file, ["embed.weight"])
        with fail_nth(n, errno=errno.ENOSPC, only=[call]), pytest.raises(KernelError, match=r"json: ENOSPC"):
            fetch.fill(file, ["layers.0.weight"])
        fetch.fill(file, ["layers.0.scale"])
        assert file.missing() == ["layers.1.mask", "layers.1.empty"]
    assert fetch.run() == 9148
    fetch.check_complete()


def test_a_torn_write_of_the_journal_is_written_over(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def torn(fd: int, data: memoryview, offset: int) -> int:
        if real(fd, data[:10], offset) == 10 and len(data) <= 20:
            raise OSError(errno.ENOSPC, "full")
        return 10

    with fetch.open() as file:
        fetch.fill(file, ["embed.weight"])
        monkeypatch.setattr(os, "pwrite", torn)
        with pytest.raises(KernelError, match="ENOSPC"):
            fetch.fill(file, ["layers.0.weight"])
        monkeypatch.undo()
    lines = Path(f"{fetch.path}.part.json").read_text().splitlines()
    assert [json.loads(line)[0] for line in lines[1:]] == ["embed.weight", "layers.0.weight"]
    assert fetch.run() == 9140


def test_closing_raises_nothing_that_a_disk_says(fetch: Fetch) -> None:
    file = fetch.open(checkpoint_bytes=1 << 40)
    fetch.fill(file, ["embed.weight"])
    with fail_nth(1, errno=errno.EIO, only=["fdatasync"]):
        file.close()
    assert fetch.run() == 0  # it was not noted, so nobody knows that it is whole
    fetch.check_complete()


# --- sudden ends ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The program is dead: no system call happens any more but those that the kernel makes for it (close, munmap)."""


@contextmanager
def killed_at(n: int) -> Iterator[list[str]]:
    """Let n - 1 system calls happen, and none after them."""
    seen: list[str] = []

    def hook(name: str) -> None:
        seen.append(name)
        if len(seen) >= n:
            raise Killed

    with calls.intercept(hook):
        yield seen


def check_goes_on(fetch: Fetch) -> None:
    """After a sudden end: the file is complete, or the rest can be fetched, and at most one tensor is lost."""
    finished = fetch.finished
    if fetch.path.exists():
        assert len(finished) == len(TENSORS)
        with suppress(FileNotFoundError):
            os.unlink(f"{fetch.path}.part.json")
    else:
        assert fetch.run() >= fetch.size_of(finished)
        assert not set(fetch.finished) & set(finished)
    fetch.check_complete()
    fetch.path.unlink()


def test_killed_at_every_call(fetch: Fetch) -> None:
    for n in count(1):
        with killed_at(n) as seen, suppress(Killed):
            fetch.run()
        if len(seen) < n:
            break
        check_goes_on(fetch)
    assert n > 25  # the whole of it was gone through
    fetch.check_complete()


def test_killed_at_every_call_of_a_second_attempt(fetch: Fetch) -> None:
    for n in count(1):
        done = fetch.some(3)
        with killed_at(n) as seen, suppress(Killed):
            fetch.run()
        if len(seen) < n:
            break
        fetch.finished += done
        check_goes_on(fetch)
    assert n > 20


def test_interrupted_at_every_call(fetch: Fetch) -> None:
    """Ctrl-C: the call does not happen, and what follows does."""
    for n in count(1):
        seen: list[str] = []

        def hook(name: str, n: int = n, seen: list[str] = seen) -> None:
            seen.append(name)
            if len(seen) == n:
                raise KeyboardInterrupt

        with calls.intercept(hook), suppress(KeyboardInterrupt):
            fetch.run()
        if len(seen) < n:
            break
        check_goes_on(fetch)
    assert n > 25


def test_really_killed(fetch: Fetch) -> None:
    """kill -9, at each call in turn."""
    for n in count(1):
        seen: list[str] = []

        def hook(name: str, n: int = n, seen: list[str] = seen) -> None:
            seen.append(name)
            if len(seen) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        def attempt(hook: Callable[[str], None] = hook) -> None:
            with calls.intercept(hook):
                fetch.run()

        fetch.finished = []
        status = in_child(attempt)
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            break
        if fetch.path.exists():
            fetch.finished = list(TENSORS)
        check_goes_on(fetch)
    assert n > 25
    fetch.check_complete()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_every_call_fails_once(fetch: Fetch, code: int) -> None:
    def scenario() -> None:
        for name in fetch.files():  # or one run would go on from what the one before finished
            (fetch.folder / name).unlink()
        fetch.run()

    names = {run.call for run in sweep(scenario, errnos=[code])}
    assert {"open", "flock", "ftruncate", "fallocate", "mmap", "fdatasync", "pwrite64", "fsync", "renameat2"} <= names
    fetch.check_complete()
