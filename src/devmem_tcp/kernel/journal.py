"""The journal of NIC settings: what was changed, by whom, and what it was before; one file for each change.

A file is written before its change and removed after the change was undone, both under one lock of all programs that
use the directory, so a crash at any instant leaves either nothing, or a file by which ``replay`` finds out what there
is to undo.

Changes of one setting form a stack, of one program or of several. Whoever undoes the top one writes the old value
back. Whoever undoes one further down changes nothing, but hands its old value on to the change above it: so after the
last of them the NIC is as it was before the first, in whatever order they end.

A value that is neither what the change made it nor what it was before is somebody else's by now, and is left alone.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import PurePosixPath
from typing import Final, NamedTuple, Protocol, TypeAlias

import msgspec

from devmem_tcp.errors import BusyError, DevmemError, KernelError, NicSettingError, RestoreError
from devmem_tcp.sys import calls, namespaces

Value: TypeAlias = bool | int | str | list[int] | dict[str, int] | None

FORMAT: Final = 1
RESTORE_HINT: Final = "devmem-tcp doctor --restore   # once this program has ended"
_SYSTEM_DIRECTORY: Final = "/run/devmem-tcp"
_SUFFIX: Final = ".json"
_UNFINISHED: Final = ".tmp"
_DIGITS: Final = 12
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_WRITABLE_BY_OTHERS: Final = 0o022
_DEAD_STATES: Final = frozenset("ZX")
_START_FIELD: Final = 19  # of /proc/PID/stat, counted from the state, which is behind the name; proc_pid_stat(5)


class NicIdentity(msgspec.Struct, frozen=True):
    """Which NIC: names and indexes change, a permanent address does not."""

    name: str
    ifindex: int
    address: str
    permanent: bool  # whether the address is the NIC's own, and so tells it from all others
    network_namespace: int

    def same(self, other: NicIdentity) -> bool:
        """Whether both are one NIC."""
        if self.address != other.address:
            return False
        place = (self.network_namespace, self.ifindex) == (other.network_namespace, other.ifindex)
        return place or (self.permanent and other.permanent)


class Owner(msgspec.Struct, frozen=True):
    """Which process; the start time, in clock ticks after the boot, tells it from a later one of the same number."""

    pid: int
    start_ticks: int
    pid_namespace: int
    boot_id: str
    name: str


class Entry(msgspec.Struct, frozen=True):
    """One change of one setting: ``key`` had the value ``old`` and gets ``new``. ``words`` are ethtool's."""

    format: int
    sequence: int
    owner: Owner
    nic: NicIdentity
    key: str
    old: Value
    new: Value
    words: str


class NicState(Protocol):
    """A NIC as values by name."""

    @property
    def identity(self) -> NicIdentity: ...

    def read(self, key: str) -> Value:
        """Return a value; None for something that is not there. Raises KernelError."""

    def write(self, key: str, value: Value) -> str:
        """Set a value and return its key, if only now known. Raises NicSettingError; BusyError: not at this time."""

    def locate(self, key: str, value: Value) -> str:
        """Return under which key a value is that was written under ``key``."""

    def same(self, key: str, one: Value, other: Value) -> bool:
        """Whether two values of a key mean the same to the NIC."""


class Result(Enum):
    """What became of a change that was to be undone."""

    RESTORED = "put back"
    UNCHANGED = "was as before already"
    HANDED_ON = "left to a later change, which will put it back"
    LEFT_ALONE = "changed by someone else meanwhile, left alone"
    STALE = "of another boot or a NIC that is gone, forgotten"
    KEPT = "not to be undone now, kept"
    FAILED = "could not be put back, kept"


class Outcome(NamedTuple):
    """What became of one change, and why, for people."""

    result: Result
    entry: Entry | None  # None: the file cannot be read
    text: str


class Journal:
    """A directory of changes.

    Args:
        directory: made at the first change; its owner alone may write to it.
    """

    def __init__(self, directory: str) -> None:
        self.directory: Final = directory

    @classmethod
    def candidates(cls) -> list[Journal]:
        """Return the journals that this user's changes may be in, the preferred one first; makes none.

        That is /run/devmem-tcp, and $XDG_RUNTIME_DIR/devmem-tcp if there is such a directory. Both are empty after a
        boot, as are NICs.
        """
        runtime = calls.environment("XDG_RUNTIME_DIR")
        own = [cls(str(PurePosixPath(runtime, "devmem-tcp")))] if runtime else []
        return [cls(_SYSTEM_DIRECTORY), *own]

    @classmethod
    def default(cls) -> Journal:
        """Return the journal of this machine if this user may write to it, else this user's own.

        Raises:
            KernelError: neither can be had.
        """
        machine, *own = cls.candidates()
        try:
            machine.prepare()
        except KernelError:
            if not own:
                raise
            own[0].prepare()
            return own[0]
        return machine

    def prepare(self) -> None:
        """Make the directory if it is missing, and see that nobody else can write to it.

        Raises:
            KernelError: it cannot be made, or is not this user's alone (EPERM): what it says is obeyed with privilege.
        """
        with self._refusals("make the journal's directory"):
            calls.make_directory(self.directory, 0o755)
            owner, mode = calls.directory_owner(self.directory)
        if owner != calls.user_id() or mode & _WRITABLE_BY_OTHERS:
            hint = f"it must belong to user {calls.user_id()} and be writable by nobody else: ls -ld {self.directory}"
            raise KernelError(errno.EPERM, f"use {self.directory} as journal", hint=hint)

    def exists(self) -> bool:
        """Whether anybody has written to this journal since the boot."""
        with self._refusals("look for the journal"):
            try:
                calls.directory_owner(self.directory)
            except FileNotFoundError:
                return False
            return True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other program that uses this journal from changing settings, until the block ends.

        Not re-entrant. A process that dies gives the lock back.
        """
        with self._refusals("lock the journal"):
            fd = calls.open_directory(self.directory)
        try:
            with self._refusals("lock the journal"):
                calls.lock(fd)
            yield
        finally:
            calls.close_fd(fd)

    def path(self, sequence: int) -> str:
        """Return the path of an entry's file."""
        return f"{self.directory}/{sequence:0{_DIGITS}}{_SUFFIX}"

    def entries(self) -> list[Entry]:
        """Return all entries that can be read, in the order of their changes."""
        return [entry for entry in map(self.read, self.sequences()) if entry is not None]

    def read(self, sequence: int) -> Entry | None:
        """Return an entry; None if there is none, or it cannot be read."""
        try:
            return msgspec.json.decode(calls.read_bytes(self.path(sequence)), type=Entry)
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        except OSError as error:
            raise KernelError(error.errno or 0, f"read {self.path(sequence)}") from error

    def begin(self, nic: NicIdentity, key: str, old: Value, new: Value, words: str) -> Entry:
        """Write a new entry, the last in order, for a change that this process is about to make; under the lock."""
        sequences = self.sequences()
        entry = Entry(FORMAT, sequences[-1] + 1 if sequences else 1, current_process(), nic, key, old, new, words)
        try:
            self.put(entry)
        except BaseException:
            with contextlib.suppress(KernelError):
                self.remove(entry.sequence)
            raise
        return entry

    def put(self, entry: Entry) -> None:
        """Write an entry, in place of the one of the same number; it is there whole or not at all."""
        path = self.path(entry.sequence)
        with self._refusals(f"write {path}"):
            fd = calls.create_file(path + _UNFINISHED, 0o600)
            try:
                data = memoryview(msgspec.json.encode(entry))
                while data:
                    data = data[calls.write(fd, data) :]
                calls.sync(fd)
            finally:
                calls.close_fd(fd)
            calls.rename(path + _UNFINISHED, path)
            folder = calls.open_directory(self.directory)
            try:
                calls.sync(folder)
            finally:
                calls.close_fd(folder)

    def remove(self, sequence: int) -> None:
        """Remove an entry; no error if it is gone.

        Whether that reaches the disk does not matter: of an entry that comes back, ``replay`` finds the value put back.
        """
        with self._refusals(f"remove {self.path(sequence)}"), contextlib.suppress(FileNotFoundError):
            calls.remove_file(self.path(sequence))

    def above(self, entry: Entry) -> list[Entry]:
        """Return the later changes of the same setting of the same NIC, whoever made them, in order."""
        later = (other for other in self.entries() if other.sequence > entry.sequence)
        return [other for other in later if other.key == entry.key and other.nic.same(entry.nic)]

    def clean(self) -> None:
        """Remove what writers left that died while writing; under the lock."""
        with self._refusals("clean the journal"):
            for name in calls.directory_entries(self.directory):
                if name.endswith(_UNFINISHED):
                    calls.remove_file(f"{self.directory}/{name}")

    def sequences(self) -> list[int]:
        """Return the numbers of all entries, readable or not, in order."""
        with self._refusals("list the journal"):
            names = calls.directory_entries(self.directory)
        stems = (name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    @contextlib.contextmanager
    def _refusals(self, call: str) -> Iterator[None]:
        try:
            yield
        except KernelError:
            raise
        except OSError as error:
            hint = f"the journal of NIC settings is {self.directory}; nothing is changed without it"
            raise KernelError(error.errno or 0, call, hint=hint) from error


# --- changing and undoing ---


def change(journal: Journal, nic: NicState, key: str | Callable[[], str], new: Value, words: str) -> Entry:
    """Change a setting, journalled before; returns the entry by which ``undo`` puts it back.

    Also a value that is right already is noted: whoever changed it before may put it back, and must hand that on.

    Args:
        key: a function is called under the lock, to choose what no other program has chosen.

    Raises:
        NicSettingError: refused; the setting is as it was.
        KernelError: it cannot be read, or the journal cannot be written; nothing was changed.
    """
    journal.prepare()
    with journal.locked():
        if not isinstance(key, str):
            key = key()
        entry = journal.begin(nic.identity, key, nic.read(key), new, words)
        try:
            try:
                where = nic.write(key, new)
            except (NicSettingError, BusyError):
                journal.remove(entry.sequence)
                raise
            now = nic.read(where)
            if where != key or now != new:  # where the driver put it, or what the driver made of it
                entry = msgspec.structs.replace(entry, key=where, new=now)
                journal.put(entry)
        except BaseException:
            with contextlib.suppress(DevmemError, OSError):  # the first error is told; what is not undone, replay finds
                _undo(journal, nic, entry)
            raise
    return entry


def undo(journal: Journal, nic: NicState, sequence: int) -> Outcome:
    """Undo one change of this process and forget it.

    Raises:
        RestoreError: the old value was refused, or the journal cannot be written; the entry stays, to be tried again.
    """
    with _restore_errors(journal, sequence), journal.locked():
        entry = journal.read(sequence)
        if entry is None:
            path = journal.path(sequence)
            return Outcome(Result.LEFT_ALONE, None, f"{path} is gone: nobody knows what there was to put back")
        return _undo(journal, nic, entry)


def replay(
    journal: Journal, open_nic: Callable[[NicIdentity], AbstractContextManager[NicState] | None]
) -> list[Outcome]:
    """Undo what dead processes left, the last change first; what living ones changed is theirs.

    Args:
        open_nic: finds a NIC in this network namespace; None: it is not here.

    Returns:
        What became of each entry, in the order it was looked at; none for a journal that does not exist.

    Raises:
        KernelError: the journal cannot be read or written.
    """
    if not journal.exists():
        return []
    journal.prepare()
    with journal.locked():
        journal.clean()
        return [_replay_one(journal, sequence, open_nic) for sequence in reversed(journal.sequences())]


def _replay_one(
    journal: Journal, sequence: int, open_nic: Callable[[NicIdentity], AbstractContextManager[NicState] | None]
) -> Outcome:
    entry = journal.read(sequence)
    if entry is None:
        path = journal.path(sequence)
        return Outcome(Result.FAILED, None, f"{path} cannot be read as an entry of format {FORMAT}; remove it by hand")
    here = current_process()
    if entry.owner.boot_id != here.boot_id:
        journal.remove(sequence)
        return _outcome(Result.STALE, entry, "it was made before this machine was booted")
    if entry.owner.pid_namespace != here.pid_namespace:
        return _outcome(Result.KEPT, entry, "its process is of another PID namespace, and may be alive")
    if is_alive(entry.owner):
        return _outcome(Result.KEPT, entry, f"process {entry.owner.pid} ({entry.owner.name}) is alive")
    opened = open_nic(entry.nic)
    if opened is None and entry.nic.network_namespace != namespaces.namespace("net"):
        hint = f"run this in network namespace net:[{entry.nic.network_namespace}]: ip netns exec NAME …"
        return _outcome(Result.KEPT, entry, hint)
    if opened is None:
        journal.remove(sequence)
        return _outcome(Result.STALE, entry, f"{entry.nic.name} is gone")
    try:
        with _restore_errors(journal, sequence), opened as nic:
            return _undo(journal, nic, entry)
    except RestoreError as error:
        return _outcome(Result.FAILED, entry, error.message)


def _undo(journal: Journal, nic: NicState, entry: Entry) -> Outcome:
    """Undo a change, or hand it on; forget it. Under the lock.

    The order of writes makes a death between any two of them harmless: a second run finds the value put back, or the
    old value handed on already.
    """
    key = nic.locate(entry.key, entry.new)
    current = nic.read(key)
    above = journal.above(entry)
    handed_on = _hand_on(journal, nic, key, entry, above)
    claimed = any(nic.same(key, current, other.new) for other in above)
    # With others above us the value is ours only if they stand on us, and died before they changed anything.
    ours = nic.same(key, current, entry.new) and not claimed and (handed_on or not above)
    if ours and not nic.same(key, entry.old, entry.new):
        try:
            nic.write(key, entry.old)
        except BusyError as error:
            journal.remove(entry.sequence)
            return _outcome(Result.LEFT_ALONE, entry, error.message)
        result = Result.RESTORED
    elif ours or nic.same(key, current, entry.old):
        result = Result.UNCHANGED
    else:
        result = Result.LEFT_ALONE
    if handed_on and result is not Result.RESTORED:
        result = Result.HANDED_ON
    journal.remove(entry.sequence)
    return _outcome(result, entry)


def _hand_on(journal: Journal, nic: NicState, key: str, entry: Entry, above: list[Entry]) -> bool:
    """Give the old value of ``entry`` to the change that stands on it; returns whether there is one.

    A change that was journalled and, its program being dead, never made, is stood on by nobody: the one above it found
    the value of ``entry`` too, and gets its old value as well.
    """
    standing = 0
    for other in above:
        if not nic.same(key, other.old, entry.new) and not nic.same(key, other.old, entry.old):
            break
        if not nic.same(key, other.old, entry.old):
            journal.put(msgspec.structs.replace(other, old=entry.old))
        standing += 1
        if nic.same(key, other.new, entry.new):
            break
    return standing > 0


def _outcome(result: Result, entry: Entry, why: str = "") -> Outcome:
    return Outcome(result, entry, f"{entry.words}: {result.value}" + (f" ({why})" if why else ""))


@contextlib.contextmanager
def _restore_errors(journal: Journal, sequence: int) -> Iterator[None]:
    """Raise what is refused in the block as RestoreError."""
    try:
        yield
    except RestoreError:
        raise
    except (DevmemError, OSError) as error:
        told = error.message if isinstance(error, DevmemError) else str(error)
        hint = (error.hint if isinstance(error, DevmemError) else "") or RESTORE_HINT
        path = journal.path(sequence)
        raise RestoreError(f"could not put a NIC setting back: {told}", journal=path, hint=hint) from error


# --- processes ---


def current_process() -> Owner:
    """Return this process as the owner of changes.

    Raises:
        KernelError: /proc does not tell.
    """
    pid = calls.process_id()
    try:
        text = calls.read_text(f"/proc/{pid}/stat")
        pid_namespace, boot_id = namespaces.namespace("pid"), calls.read_text(_BOOT_ID).strip()
    except OSError as error:
        raise KernelError(error.errno or 0, "find out about this process in /proc", hint="mount /proc") from error
    name, _, start_ticks = _parse_stat(text)
    return Owner(pid, start_ticks, pid_namespace, boot_id, name)


def is_alive(owner: Owner) -> bool:
    """Whether a process of this boot and PID namespace still runs; one that nobody has waited for does not."""
    try:
        _, state, start_ticks = _parse_stat(calls.read_text(f"/proc/{owner.pid}/stat"))
    except (FileNotFoundError, ProcessLookupError):
        return False
    return start_ticks == owner.start_ticks and state not in _DEAD_STATES


def _parse_stat(text: str) -> tuple[str, str, int]:
    """Return name, state and start time of /proc/PID/stat; the name may hold anything, brackets too."""
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return head.partition("(")[2], fields[0], int(fields[_START_FIELD])
