"""The journal of NIC settings, with a NIC in a file: whoever dies whenever, it ends as it was."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devmem_tcp.errors import BusyError, KernelError, NicSettingError, RestoreError, SettingWarning
from devmem_tcp.kernel import journal as journal_module
from devmem_tcp.kernel.journal import (
    Entry,
    Journal,
    NicIdentity,
    Outcome,
    Result,
    Value,
    change,
    current_process,
    is_alive,
    replay,
    undo,
)
from devmem_tcp.kernel.settings import JournalledSetting
from devmem_tcp.sys import calls, namespaces
from devmem_tcp.testing.faults import fail_nth

BEFORE: dict[str, Value] = {"split": "off", "table": [0, 1, 2, 3], "feature": False, "rule 7": None}


def nothing(_: str) -> None:
    pass


@dataclass
class FileNic:
    """A NIC whose values are in a file, so that they outlive the process that changes them."""

    path: Path
    step: Callable[[str], None] = nothing
    refuse: Exception | None = None
    identity: NicIdentity = field(default_factory=lambda: nic_identity())

    def read(self, key: str) -> Value:
        value: Value = self.values().get(key)
        return value

    def write(self, key: str, value: Value) -> str:
        if self.refuse is not None:
            raise self.refuse
        self.step("before the NIC changes")
        values = self.values() | {key: value}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(values))
        part.replace(self.path)
        self.step("after the NIC changed")
        return key

    def locate(self, key: str, value: Value) -> str:
        return key

    def same(self, key: str, one: Value, other: Value) -> bool:
        return one == other

    def values(self) -> dict[str, Value]:
        values: dict[str, Value] = json.loads(self.path.read_text())
        return values


class ChoosyNic(FileNic):
    """One that places rules where it likes, and rounds numbers up to tens."""

    def write(self, key: str, value: Value) -> str:
        key = "rule 7" if key == "rule any" else key
        return super().write(key, -(-value // 10) * 10 if isinstance(value, int) else value)

    def locate(self, key: str, value: Value) -> str:
        return "rule 7" if key == "rule any" and self.read("rule 7") == value else key


def nic_identity() -> NicIdentity:
    return NicIdentity("eth1", 3, "02:00:00:00:00:01", True, namespaces.namespace("net"))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(str(tmp_path / "journal"))


@pytest.fixture
def nic(tmp_path: Path) -> FileNic:
    return file_nic(tmp_path)


def file_nic(folder: Path) -> FileNic:
    path = folder / "nic"
    path.write_text(json.dumps(BEFORE))
    return FileNic(path)


def files(journal: Journal) -> list[str]:
    return sorted(os.listdir(journal.directory))


def replay_on(journal: Journal, nic: FileNic) -> list[Outcome]:
    return replay(journal, lambda _: nullcontext(nic))


def results(outcomes: list[Outcome]) -> list[Result]:
    return [outcome.result for outcome in outcomes]


@pytest.fixture
def everybody_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "is_alive", lambda owner: False)


# --- change and undo ------------------------------------------------------------------------------------------------


def test_change_is_in_the_journal_before_it_is_made_and_gone_when_it_is_undone(journal: Journal, nic: FileNic) -> None:
    seen: list[Entry] = []
    nic.step = lambda step: seen.extend(journal.entries()) if step.startswith("before") else None
    entry = change(journal, nic, "split", "on", "ethtool -G eth1 tcp-data-split on")
    assert seen == [entry]
    assert (entry.old, entry.new, entry.owner, entry.nic) == ("off", "on", current_process(), nic.identity)
    assert nic.read("split") == "on"
    outcome = undo(journal, nic, entry.sequence)
    assert (outcome.result, outcome.text) == (Result.RESTORED, "ethtool -G eth1 tcp-data-split on: put back")
    assert nic.values() == BEFORE
    assert files(journal) == []


@settings(max_examples=50)  # each makes files and waits for them to be on their disk
@given(st.data())
def test_changes_undone_in_any_order_leave_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("nic")
    nic, journal = file_nic(folder), Journal(str(folder / "journal"))
    keys = st.sampled_from(["split", "table"])
    made = [
        change(journal, nic, key, data.draw(st.integers(0, 2)), "words")
        for key in data.draw(st.lists(keys, min_size=1, max_size=6))
    ]
    standing = list(made)
    for entry in data.draw(st.permutations(made)):
        standing.remove(entry)
        undo(journal, nic, entry.sequence)
        for key in ("split", "table"):
            top = [other.new for other in standing if other.key == key]
            assert nic.read(key) == (top[-1] if top else BEFORE[key])
    assert files(journal) == []


def test_changes_of_other_keys_and_nics_are_no_business_of_ours(journal: Journal, nic: FileNic, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = file_nic(tmp_path / "other")
    other.identity = msgspec.structs.replace(other.identity, address="02:00:00:00:00:02", ifindex=4)
    mine = change(journal, nic, "split", "on", "words")
    change(journal, nic, "feature", True, "words")
    change(journal, other, "split", "on", "words")
    assert undo(journal, nic, mine.sequence).result is Result.RESTORED
    assert nic.read("split") == "off"
    assert other.read("split") == "on"


def test_value_that_someone_else_changed_is_left_alone(journal: Journal, nic: FileNic) -> None:
    entry = change(journal, nic, "split", "on", "words")
    nic.write("split", "auto")
    assert undo(journal, nic, entry.sequence).result is Result.LEFT_ALONE
    assert nic.read("split") == "auto"
    assert files(journal) == []


def test_value_that_someone_else_changed_between_two_of_ours_is_put_back(journal: Journal, nic: FileNic) -> None:
    lower = change(journal, nic, "split", "on", "words")
    nic.write("split", "auto")
    upper = change(journal, nic, "split", "top", "words")
    assert undo(journal, nic, lower.sequence).result is Result.LEFT_ALONE
    assert undo(journal, nic, upper.sequence).result is Result.RESTORED
    assert nic.read("split") == "auto"


def test_refused_change_leaves_nothing(journal: Journal, nic: FileNic) -> None:
    nic.refuse = NicSettingError(errno.EINVAL, "ethtool")
    with pytest.raises(NicSettingError):
        change(journal, nic, "split", "on", "words")
    assert nic.values() == BEFORE
    assert files(journal) == []


def test_refused_restore_keeps_the_entry_and_may_be_tried_again(journal: Journal, nic: FileNic) -> None:
    entry = change(journal, nic, "split", "on", "words")
    nic.refuse = NicSettingError(errno.EINVAL, "ethtool -G eth1", extack="device has memory provider enabled")
    with pytest.raises(RestoreError, match="memory provider") as refused:
        undo(journal, nic, entry.sequence)
    assert refused.value.journal == journal.path(entry.sequence)
    assert "devmem-tcp doctor --restore" in refused.value.hint
    assert journal.read(entry.sequence) == entry
    nic.refuse = None
    undo(journal, nic, entry.sequence)
    assert nic.values() == BEFORE


def test_what_must_not_be_put_back_now_is_left_alone(journal: Journal, nic: FileNic) -> None:
    entry = change(journal, nic, "feature", True, "words")
    nic.refuse = BusyError("rules of others are in the table")
    outcome = undo(journal, nic, entry.sequence)
    assert outcome.result is Result.LEFT_ALONE
    assert "rules of others" in outcome.text
    assert files(journal) == []


def test_a_driver_may_round_and_place(journal: Journal, tmp_path: Path) -> None:
    nic = ChoosyNic(file_nic(tmp_path).path)
    rounded = change(journal, nic, "split", 64, "words")
    placed = change(journal, nic, "rule any", "tcp4", "words")
    assert (rounded.new, nic.read("split")) == (70, 70)
    assert (placed.key, nic.read("rule 7")) == ("rule 7", "tcp4")
    assert undo(journal, nic, rounded.sequence).result is Result.RESTORED
    assert undo(journal, nic, placed.sequence).result is Result.RESTORED
    assert nic.values() == BEFORE


def test_key_is_chosen_under_the_lock(journal: Journal, nic: FileNic) -> None:
    def choose() -> str:
        assert files(journal) == []
        return "rule 7"

    assert change(journal, nic, choose, "tcp4", "words").key == "rule 7"


def test_setting_warns_when_it_is_left_alone_and_is_closed_once(journal: Journal, nic: FileNic) -> None:
    setting = JournalledSetting(journal, nic, change(journal, nic, "split", "on", "ethtool -G eth1 …"))
    nic.write("split", "auto")
    with pytest.warns(SettingWarning, match=r"eth1: ethtool -G eth1 …: changed by someone else") as told:
        setting.close()
    assert told[0].filename == __file__
    nic.write("split", "on")
    setting.close()
    assert nic.read("split") == "on"


def test_setting_whose_entry_is_gone_is_left_alone(journal: Journal, nic: FileNic) -> None:
    setting = JournalledSetting(journal, nic, change(journal, nic, "split", "on", "words"))
    os.unlink(journal.path(setting.entry.sequence))
    with pytest.warns(SettingWarning, match="is gone"):
        setting.close()
    assert nic.read("split") == "on"


def test_forked_child_leaves_its_parents_settings(journal: Journal, nic: FileNic) -> None:
    setting = JournalledSetting(journal, nic, change(journal, nic, "split", "on", "words"))
    assert in_child(setting.close) == 0
    assert nic.read("split") == "on"
    setting.close()
    assert nic.values() == BEFORE


# --- death ----------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked child; return its number."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked child; return its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL was survived")


def dying_at(n: int, work: Callable[[Callable[[str], None]], object]) -> int:
    """Run ``work`` in a child that kills itself at its n-th step: a system call, or before or after the NIC changes."""

    def child() -> None:
        steps = itertools.count(1)

        def step(_: str) -> None:
            if next(steps) == n:
                die()

        with calls.intercept(step):
            work(step)

    return in_child(child)


def deaths(
    work: Callable[[Callable[[str], None]], object], *, before: Callable[[], object] = lambda: None
) -> Iterator[int]:
    """Yield after each death of a child: at its first step, its second, and so on, until it lives to its end.

    Args:
        before: called here, before each life.
    """
    for n in itertools.count(1):
        before()
        status = dying_at(n, work)
        assert status in (0, -signal.SIGKILL), f"the child failed at step {n}"
        yield n
        if status == 0:
            return


def change_and_undo(journal: Journal, nic: FileNic, step: Callable[[str], None]) -> None:
    """Stack changes and undo them out of order."""
    nic.step = step
    made = [change(journal, nic, "split", value, "words") for value in ("on", "auto")]
    made.append(change(journal, nic, "rule 7", "tcp4", "words"))
    for entry in made:
        undo(journal, nic, entry.sequence)


def test_death_at_any_step_is_harmless(journal: Journal, nic: FileNic) -> None:
    for n in deaths(lambda step: change_and_undo(journal, nic, step)):
        outcomes = replay_on(journal, nic)
        assert nic.values() == BEFORE, f"death at step {n}: {outcomes}"
        assert not os.path.isdir(journal.directory) or files(journal) == [], f"death at step {n}"
    assert n > 40


def test_death_at_any_step_leaves_the_changes_of_the_living(journal: Journal, nic: FileNic) -> None:
    standing: list[Entry] = []

    def stand() -> None:
        standing.append(change(journal, nic, "split", "below", "words"))

    for n in deaths(lambda step: change_and_undo(journal, nic, step), before=stand):
        above = change(journal, nic, "split", "above", "words")
        assert Result.KEPT in results(replay_on(journal, nic))
        assert nic.read("split") == "above", f"death at step {n}"
        assert nic.read("rule 7") is None, f"death at step {n}"
        for entry in (standing.pop(), above):
            undo(journal, nic, entry.sequence)
        assert nic.values() == BEFORE, f"death at step {n}"
        assert files(journal) == []


def test_death_while_replaying_is_harmless(journal: Journal, nic: FileNic) -> None:
    def leave_changes(step: Callable[[str], None]) -> None:
        for value in ("on", "auto", "off"):
            change(journal, nic, "split", value, "words")
        change(journal, nic, "rule 7", "tcp4", "words")

    def restore(step: Callable[[str], None]) -> None:
        nic.step = step
        replay_on(journal, nic)

    dying_at(0, leave_changes)
    for n in deaths(restore):
        if n > 1:
            assert nic.read("split") in ("on", "auto", "off")
        replay_on(journal, nic)
        assert nic.values() == BEFORE, f"death at step {n}"
        dying_at(0, leave_changes)
    assert n > 20


@pytest.mark.usefixtures("everybody_is_dead")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_failure_of_any_call_is_harmless(tmp_path: Path, number: int) -> None:
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        folder.mkdir()
        nic, journal = file_nic(folder), Journal(str(folder / "journal"))
        made: list[Entry] = []
        with fail_nth(n, errno=number) as fault:
            try:
                for value in ("on", "auto"):
                    made.append(change(journal, nic, "split", value, "words"))
                for entry in made:
                    undo(journal, nic, entry.sequence)
            except (KernelError, RestoreError):
                pass
        if nic.read("split") != "off":
            assert journal.entries(), f"call {n}, {fault.failed_call}: a change that no entry tells of"
        replay_on(journal, nic)
        assert nic.values() == BEFORE, f"call {n}, {fault.failed_call}"
        assert not journal.exists() or files(journal) == []
        if not fault.fired:
            break
    assert n > 30


def test_programs_at_once_do_not_lose_each_others_changes(journal: Journal, nic: FileNic) -> None:
    def work(name: int) -> None:
        for turn in range(8):
            made = [change(journal, nic, "split", f"{name}.{turn}.{i}", "words") for i in range(3)]
            for entry in (made[turn % 3 - 1], made[turn % 3 - 2], made[turn % 3]):
                assert undo(journal, nic, entry.sequence).result is not Result.LEFT_ALONE

    pids = [fork(partial(work, name)) for name in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 4
    assert nic.values() == BEFORE
    assert files(journal) == []


# --- replay ---------------------------------------------------------------------------------------------------------


def leave_entry(journal: Journal, nic: FileNic, **owner: int | str) -> Entry:
    """Make a change whose owner, but for ``owner``, is this process."""
    entry = change(journal, nic, "split", "on", "words")
    entry = msgspec.structs.replace(entry, owner=msgspec.structs.replace(entry.owner, **owner))
    journal.put(entry)
    return entry


def test_replay_without_a_journal_does_nothing(journal: Journal, nic: FileNic) -> None:
    assert replay_on(journal, nic) == []
    assert not os.path.exists(journal.directory)


def test_replay_undoes_what_the_dead_left_and_not_the_living(journal: Journal, nic: FileNic) -> None:
    change(journal, nic, "feature", True, "words")
    leave_entry(journal, nic, start_ticks=1)  # our number, but not our start: an earlier process
    outcomes = replay_on(journal, nic)
    assert results(outcomes) == [Result.RESTORED, Result.KEPT]
    assert f"process {os.getpid()}" in outcomes[1].text
    assert (nic.read("split"), nic.read("feature")) == ("off", True)


def test_replay_forgets_another_boot(journal: Journal, nic: FileNic) -> None:
    leave_entry(journal, nic, boot_id="another")
    (outcome,) = replay_on(journal, nic)
    assert outcome.result is Result.STALE
    assert "before this machine was booted" in outcome.text
    assert nic.read("split") == "on"
    assert files(journal) == []


def test_replay_keeps_what_it_cannot_judge(journal: Journal, nic: FileNic) -> None:
    leave_entry(journal, nic, pid_namespace=1)
    assert results(replay_on(journal, nic)) == [Result.KEPT]
    assert len(files(journal)) == 1


@pytest.mark.usefixtures("everybody_is_dead")
def test_replay_forgets_a_nic_that_is_gone_and_keeps_one_elsewhere(journal: Journal, nic: FileNic) -> None:
    entry = change(journal, nic, "split", "on", "words")
    elsewhere = msgspec.structs.replace(entry, nic=msgspec.structs.replace(entry.nic, network_namespace=1))
    journal.put(elsewhere)
    (outcome,) = replay(journal, lambda _: None)
    assert outcome.result is Result.KEPT
    assert "net:[1]" in outcome.text
    journal.put(entry)
    (outcome,) = replay(journal, lambda _: None)
    assert outcome.result is Result.STALE
    assert files(journal) == []


@pytest.mark.usefixtures("everybody_is_dead")
def test_replay_tells_what_it_could_not_put_back(journal: Journal, nic: FileNic) -> None:
    change(journal, nic, "split", "on", "words")
    nic.refuse = NicSettingError(errno.EBUSY, "ethtool -G eth1")
    (outcome,) = replay_on(journal, nic)
    assert outcome.result is Result.FAILED
    assert "EBUSY" in outcome.text
    nic.refuse = None
    assert results(replay_on(journal, nic)) == [Result.RESTORED]


def test_what_is_no_entry_is_told_and_stays(journal: Journal, nic: FileNic) -> None:
    journal.prepare()
    Path(journal.path(4)).write_bytes(b'{"format": 1, "sequence"')
    Path(journal.directory, "README").write_text("not ours")
    (outcome,) = replay_on(journal, nic)
    assert (outcome.result, outcome.entry) == (Result.FAILED, None)
    assert journal.path(4) in outcome.text
    assert change(journal, nic, "split", "on", "words").sequence == 5
    assert files(journal) == ["000000000004.json", "000000000005.json", "README"]


def test_half_written_files_are_removed(journal: Journal, nic: FileNic) -> None:
    journal.prepare()
    Path(journal.path(1) + ".tmp").write_bytes(b"{")
    assert replay_on(journal, nic) == []
    assert files(journal) == []


def test_a_dead_child_is_dead_before_anybody_waits_for_it() -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    stat = Path(f"/proc/{pid}/stat")
    fields = stat.read_text().rpartition(")")[2].split()
    owner = msgspec.structs.replace(current_process(), pid=pid, start_ticks=int(fields[19]))
    assert is_alive(owner)
    assert not is_alive(msgspec.structs.replace(owner, start_ticks=owner.start_ticks + 1))
    os.close(write)
    os.close(read)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(owner)
    os.waitpid(pid, 0)
    assert not is_alive(owner)


def test_process_names_may_hold_anything() -> None:
    text = "12 (a) b (R 1) S 1" + " 0" * 17 + " 4711 0"
    assert journal_module._parse_stat(text) == ("a) b (R 1", "S", 4711)


# --- identity and directory -----------------------------------------------------------------------------------------


def test_nic_is_the_same_by_permanent_address_or_by_place() -> None:
    here = nic_identity()
    moved = msgspec.structs.replace(here, name="net7", ifindex=9, network_namespace=1)
    assert here.same(moved)
    assert not here.same(msgspec.structs.replace(moved, permanent=False))
    assert here.same(msgspec.structs.replace(here, name="renamed", permanent=False))
    assert not here.same(msgspec.structs.replace(here, address="02:00:00:00:00:99"))


def test_entry_survives_its_file(journal: Journal, nic: FileNic) -> None:
    for value in (None, True, 7, "on", [3, 1, 2], {"rx": 1}):
        entry = change(journal, nic, "split", value, "ethtool …")
        read = journal.read(entry.sequence)
        assert read == entry
        assert type(read and read.new) is type(value)


def test_directory_that_others_can_write_to_is_refused(journal: Journal, nic: FileNic) -> None:
    os.mkdir(journal.directory)
    os.chmod(journal.directory, 0o770)
    with pytest.raises(KernelError) as refused:
        change(journal, nic, "split", "on", "words")
    assert refused.value.errno == errno.EPERM
    assert f"ls -ld {journal.directory}" in refused.value.hint
    with pytest.raises(KernelError):
        replay_on(journal, nic)
    assert nic.values() == BEFORE


def test_directory_that_is_a_link_is_refused(journal: Journal, nic: FileNic, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    os.symlink(tmp_path / "elsewhere", journal.directory)
    with pytest.raises(KernelError, match="ENOTDIR"):
        change(journal, nic, "split", "on", "words")
    assert nic.values() == BEFORE


def test_files_are_for_their_owner_only(journal: Journal, nic: FileNic) -> None:
    entry = change(journal, nic, "split", "on", "words")
    assert os.stat(journal.directory).st_mode & 0o777 == 0o755
    assert os.stat(journal.path(entry.sequence)).st_mode & 0o777 == 0o600


def test_journal_is_the_machines_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(journal_module, "_SYSTEM_DIRECTORY", str(tmp_path / "run"))
    assert Journal.default().directory == str(tmp_path / "run")
    os.chmod(tmp_path / "run", 0o777)
    assert Journal.default().directory == str(tmp_path / "devmem-tcp")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(KernelError, match="EPERM"):
        Journal.default()


def test_owner_is_this_process() -> None:
    assert current_process().pid == os.getpid()
    assert is_alive(current_process())
