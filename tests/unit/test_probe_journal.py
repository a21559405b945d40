"""What doctor says of settings that programs journalled, and of those that are no more."""

from __future__ import annotations

import errno
from pathlib import Path

import msgspec
import pytest

from devmem_tcp.kernel.journal import FORMAT, Entry, NicIdentity, Owner, current_process
from devmem_tcp.probe import usage
from devmem_tcp.sys import calls
from devmem_tcp.types import Severity

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR


@pytest.fixture
def journal_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own journal; the machine's is not looked at."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("devmem_tcp.kernel.journal._SYSTEM_DIRECTORY", str(tmp_path / "nowhere"))
    folder = tmp_path / "devmem-tcp"
    folder.mkdir(mode=0o700)
    return folder


def write_entry(folder: Path, number: int, owner: Owner) -> None:
    identity = NicIdentity("eth7", 7, "02:00:00:00:00:01", True, 1)
    made = Entry(FORMAT, number, owner, identity, "header-split", "off", "on", "ethtool -G eth7 tcp-data-split on")
    (folder / f"{number:012}.json").write_bytes(msgspec.json.encode(made))


def test_journal(journal_folder: Path) -> None:
    assert (usage.journal().severity, usage.journal().found) == (OK, "nothing left")
    alive = current_process()
    write_entry(journal_folder, 1, alive)
    assert usage.journal().found == "1 changes in force, of living programs"
    write_entry(journal_folder, 2, msgspec.structs.replace(alive, start_ticks=alive.start_ticks + 1, name="recv"))
    check = usage.journal()
    assert check.severity is WARNING
    assert "1 left by recv (process" in check.found
    assert "): ethtool -G eth7 tcp-data-split on" in check.found
    assert check.fix == "sudo devmem-tcp doctor --restore"
    write_entry(journal_folder, 3, msgspec.structs.replace(alive, boot_id="another"))
    assert usage.journal().found.startswith("2 left")


def test_a_journal_that_is_closed_to_this_user(journal_folder: Path) -> None:
    def refuse(name: str) -> None:
        if name == "getdents64":
            raise PermissionError(errno.EACCES, "Permission denied")

    with calls.intercept(refuse):
        check = usage.journal()
    assert check.severity is OK
    assert f"{journal_folder} is closed to this user" in check.found
