"""NIC settings of a software NIC, each with its way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from devmem_tcp import contract
from devmem_tcp.types import FlowRule

Value = TypeVar("Value")


class ValueSetting(contract.Setting, Generic[Value]):
    """A setting with one value: closing it writes the old one back, unless somebody changed it meanwhile."""

    def __init__(self, description: str, read: Callable[[], Value], write: Callable[[Value], None], new: Value) -> None:
        self._description = description
        self._read = read
        self._write = write
        self._old = read()
        self._new = new
        self._open = True
        write(new)

    @property
    def description(self) -> str:
        return self._description

    def close(self) -> None:
        if self._open:
            if self._read() == self._new:
                self._write(self._old)
            self._open = False


class InsertedRule(contract.NtupleRule):
    """Ntuple rules of one ``add_ntuple``: closing it deletes those that are still there."""

    def __init__(
        self,
        description: str,
        rules: tuple[FlowRule, ...],
        present: Callable[[FlowRule], bool],
        delete: Callable[[FlowRule], None],
    ) -> None:
        self._description = description
        self._rules = rules
        self._present = present
        self._delete = delete
        self._open = True

    @property
    def description(self) -> str:
        return self._description

    @property
    def rule(self) -> FlowRule:
        return self._rules[0]

    def close(self) -> None:
        for rule in self._rules:
            if self._open and self._present(rule):
                self._delete(rule)
        self._open = False
