"""NICs that remember what was changed and put back, for a broker under test. Usable from several threads."""

from __future__ import annotations

import errno
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Final

from devmem_tcp.contract import NtupleRule, Setting
from devmem_tcp.errors import BindError, KernelError, RestoreError, SettingWarning
from devmem_tcp.types import FlowRule, HeaderSplitMode

NAMES: Final = ("fake0", "fake1")
PATIENCE_S: Final = 20.0
BUSY_QUEUE: Final = 15  # whose binding the NIC refuses
BUSY_EXTACK: Final = "designated queue already memory provider bound"
COARSE_PORT: Final = 5299  # whose rules the NIC makes less exact
STUBBORN_PORT: Final = 5298  # whose rules cannot be deleted


class FakeNics:
    """All NICs: what is in force, in order, and all that ever happened."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: list[str] = []
        self._events: list[str] = []
        self._ids = 0

    def control_for(self, name: str) -> FakeControl:
        """Make a NicControl; ENODEV for a NIC that there is not."""
        if name not in NAMES:
            raise KernelError(errno.ENODEV, f"open {name}", hint=f"there are {', '.join(NAMES)}")
        return FakeControl(self, name)

    @property
    def held(self) -> list[str]:
        """What is in force."""
        with self._changed:
            return list(self._held)

    @property
    def events(self) -> list[str]:
        """What happened: ``+`` for done, ``-`` for undone."""
        with self._changed:
            return list(self._events)

    def do(self, what: str) -> None:
        with self._changed:
            self._held.append(what)
            self._events.append(f"+{what}")
            self._changed.notify_all()

    def undo(self, what: str) -> None:
        with self._changed:
            self._held.remove(what)
            self._events.append(f"-{what}")
            self._changed.notify_all()

    def next_id(self) -> int:
        self._ids += 1
        return self._ids

    def wait_until(self, wanted: Callable[[list[str]], bool]) -> None:
        """Wait until what is in force is as wanted."""
        with self._changed:
            assert self._changed.wait_for(lambda: wanted(self._held), PATIENCE_S), self._held


class _Undoable:
    def __init__(self, nics: FakeNics, what: str) -> None:
        self._nics = nics
        self._what = what
        self._open = True
        nics.do(what)

    def undo(self) -> None:
        if self._open:
            self._open = False
            self._nics.undo(self._what)


class _FakeSetting(Setting):
    def __init__(self, nics: FakeNics, what: str) -> None:
        self._undoable = _Undoable(nics, what)
        self._description = what

    @property
    def description(self) -> str:
        return self._description

    def close(self) -> None:
        self._undoable.undo()


class _FakeRule(NtupleRule):
    def __init__(self, nics: FakeNics, what: str, rule: FlowRule) -> None:
        self._undoable = _Undoable(nics, what)
        self._description = what
        self._rule = rule

    @property
    def description(self) -> str:
        return self._description

    @property
    def rule(self) -> FlowRule:
        return self._rule

    def close(self) -> None:
        self._undoable.undo()
        if self._rule.dst_port == STUBBORN_PORT:
            raise RestoreError("the rule would not go", journal="/run/journal/7.json", hint="doctor --restore")


class _FakeQueues:
    def __init__(self, nics: FakeNics, what: str) -> None:
        self.dmabuf_id: Final = nics.next_id()
        self._undoable = _Undoable(nics, what)

    def close(self) -> None:
        self._undoable.undo()


class FakeControl:
    """See ``kernel.control.NicControl``."""

    def __init__(self, nics: FakeNics, nic: str) -> None:
        self._nics = nics
        self._nic = nic
        nics.do(f"{nic} open")

    def set_header_split(self, mode: HeaderSplitMode) -> Setting:
        return _FakeSetting(self._nics, f"{self._nic} header-split {mode.value}")

    def set_hds_thresh(self, size_bytes: int) -> Setting:
        return _FakeSetting(self._nics, f"{self._nic} hds-thresh {size_bytes}")

    def set_rss(self, table: Sequence[int], words: str) -> Setting:
        return _FakeSetting(self._nics, f"{self._nic} rss {words}")

    def add_ntuple(self, rule: FlowRule) -> NtupleRule:
        if rule.dst_port == COARSE_PORT:
            warnings.warn("refused a rule on the source", SettingWarning, stacklevel=2)
        return _FakeRule(self._nics, f"{self._nic} rule {rule.dst_port} to {rule.queue}", rule)

    def attach(self, dmabuf_fd: int, queues: Sequence[int], rx_page_size: int) -> _FakeQueues:
        if BUSY_QUEUE in queues:
            raise BindError(errno.EEXIST, "bind-rx", extack=BUSY_EXTACK, attr="queues", hint="take another")
        return _FakeQueues(self._nics, f"{self._nic} bound {list(queues)}")

    def close(self) -> None:
        self._nics.undo(f"{self._nic} open")
