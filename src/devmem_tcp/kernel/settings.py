"""NIC settings as transactions: each journalled before it is made, and put back by ``close()``."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

from devmem_tcp import contract
from devmem_tcp.closing import Closing
from devmem_tcp.errors import DevmemError, NicSettingError, SettingWarning
from devmem_tcp.kernel import ethtool, journal
from devmem_tcp.kernel.ethtool import NTUPLE, Ethtool
from devmem_tcp.kernel.journal import Journal, Result, Value
from devmem_tcp.kernel.ntuple import flow_rule, flow_spec
from devmem_tcp.kernel.state import ANY_RULE, EthtoolState, Kind, rule_value
from devmem_tcp.nicmodel.indirection import IndirectionTable
from devmem_tcp.nicmodel.ntuple import as_held, ethtool_command
from devmem_tcp.sys import calls
from devmem_tcp.types import FlowRule, HeaderSplitMode
from devmem_tcp.uapi import ethtool as abi

_TOO_FINE: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT})


class JournalledSetting(contract.Setting):
    """One change. ``close()`` puts the old value back, or hands that on to a later change that stands on this one.

    A value that someone else changed meanwhile is left alone, with a SettingWarning.
    """

    def __init__(self, journal_: Journal, state: journal.NicState, entry: journal.Entry) -> None:
        self._journal = journal_
        self._state = state
        self.entry: Final = entry
        self._open = True

    @property
    def description(self) -> str:
        return self.entry.words

    @property
    def closed(self) -> bool:
        return not self._open

    def close(self) -> None:
        """Put the old value back. Idempotent; does nothing in a forked child: the setting is its parent's.

        Raises:
            RestoreError: the old value was refused; ``close()`` may be tried again, and ``devmem-tcp doctor
                --restore`` does it once this process has ended.
        """
        if not self._open or calls.process_id() != self.entry.owner.pid:
            return
        outcome = journal.undo(self._journal, self._state, self.entry.sequence)
        self._open = False
        if outcome.result is Result.LEFT_ALONE:
            warnings.warn(f"{self.entry.nic.name}: {outcome.text}", SettingWarning, stacklevel=2)


class JournalledRules(contract.NtupleRule):
    """The ntuple rules of one ``add_ntuple``, and the feature that they need."""

    def __init__(self, settings: Sequence[JournalledSetting], rules: Sequence[FlowRule]) -> None:
        self._settings = list(settings)
        self.rules: Final = tuple(rules)

    @property
    def description(self) -> str:
        return " && ".join(setting.description for setting in self._settings)

    @property
    def closed(self) -> bool:
        return all(setting.closed for setting in self._settings)

    @property
    def rule(self) -> FlowRule:
        return self.rules[0]

    def close(self) -> None:
        """Delete the rules that are still there, then turn the feature off if nobody else needs it.

        Raises:
            RestoreError: one was refused; the others are undone. As ``JournalledSetting.close``.
        """
        close_all(self._settings)


def close_all(settings: Sequence[contract.Setting]) -> None:
    """Close settings in reverse order, all of them; then raise the first error there was."""
    first: DevmemError | None = None
    for setting in reversed(settings):
        try:
            setting.close()
        except DevmemError as error:
            first = first or error
    if first is not None:
        raise first


class NicSettings(Closing):
    """The settings of one NIC of this network namespace.

    Args:
        nic: the interface's name.
        journal: where changes are noted; None: this machine's.

    Raises:
        KernelError: ENODEV: no such interface.
    """

    def __init__(self, nic: str, journal: Journal | None = None) -> None:
        self.nic: Final = nic
        self._journal = journal
        self._state = EthtoolState(nic)
        self._settings: list[JournalledSetting | JournalledRules] = []

    @property
    def ethtool(self) -> Ethtool:
        """What the NIC says itself."""
        return self._state.ethtool

    def close(self) -> None:
        """Undo every change, the last one first. Idempotent.

        Raises:
            RestoreError: some could not be undone; the others are.
        """
        try:
            close_all(self._settings)
        finally:
            self._settings.clear()
            self._state.close()

    # --- what is ---

    @property
    def header_split(self) -> HeaderSplitMode:
        """Whether header split is on."""
        return self.ethtool.rings().header_split

    @property
    def rss_table(self) -> tuple[int, ...]:
        """The RSS indirection table."""
        return self.ethtool.rss().table

    @property
    def ntuple_rules(self) -> tuple[FlowRule, ...]:
        """The TCP rules in order of location; ``ethtool.rules()`` gives those of other protocols too."""
        return tuple(held.rule for held in self.ethtool.rules() if held.rule is not None)

    # --- what is to be ---

    def set_header_split(self, mode: HeaderSplitMode | str) -> JournalledSetting:
        """Turn header split on or off. See ``contract.Nic.set_header_split``."""
        mode = HeaderSplitMode(mode)
        return self._change(Kind.HEADER_SPLIT, mode.value, ethtool.header_split_words(self.nic, mode))

    def set_hds_thresh(self, size_bytes: int) -> JournalledSetting:
        """Split only packets larger than ``size_bytes``. See ``contract.Nic.set_hds_thresh``."""
        if size_bytes < 0:
            raise ValueError(f"hds-thresh must not be negative, got {size_bytes}")
        return self._change(Kind.HDS_THRESH, size_bytes, f"ethtool -G {self.nic} hds-thresh {size_bytes}")

    def set_ring_sizes(self, *, rx: int, tx: int) -> JournalledSetting:
        """Give every queue so many descriptors (ethtool -G rx, tx)."""
        return self._change(Kind.RING_SIZES, {"rx": rx, "tx": tx}, f"ethtool -G {self.nic} rx {rx} tx {tx}")

    def set_channels(self, *, rx: int = 0, tx: int = 0, combined: int = 0) -> JournalledSetting:
        """Set how many queues there are (ethtool -L)."""
        words = ethtool.channels_words(self.nic, rx=rx, tx=tx, combined=combined)
        return self._change(Kind.CHANNELS, {"rx": rx, "tx": tx, "combined": combined}, words)

    def set_feature(self, name: str, on: bool) -> JournalledSetting:
        """Turn a feature on or off (ethtool -K).

        Raises:
            BusyError: ntuple off, with rules in the table: they would be lost.
        """
        return self._change(f"{Kind.FEATURE} {name}", on, ethtool.feature_words(self.nic, name, on))

    def set_rss(
        self, *, equal: int | None = None, weights: Sequence[int] | None = None, table: Sequence[int] | None = None
    ) -> JournalledSetting:
        """Spread unsteered flows over queues. See ``contract.Nic.set_rss``.

        Raises:
            ValueError: not exactly one of the three, or it names a queue that the NIC has not.
        """
        words = rss_words(self.nic, equal=equal, weights=weights, table=table)
        size = len(self.rss_table)
        if equal is not None:
            new = IndirectionTable.equal(equal, size)
        elif weights is not None:
            new = IndirectionTable.weights(weights, size)
        else:
            new = IndirectionTable.explicit(table or (), size)
        return self.set_rss_table(new, words)

    def set_rss_table(self, table: IndirectionTable, words: str) -> JournalledSetting:
        """Set the RSS indirection table; ``words`` are the command that would.

        Raises:
            ValueError: it names a queue that the NIC has not.
        """
        table.check_queues(self.ethtool.rx_queues())
        return self._change(Kind.RSS_TABLE, list(table.entries), words)

    def set_rss_default(self) -> JournalledSetting:
        """Spread flows over all queues, as the kernel does by itself (ethtool -X default)."""
        new = IndirectionTable.default(self.ethtool.rx_queues(), len(self.rss_table))
        return self._change(Kind.RSS_TABLE, list(new.entries), f"ethtool -X {self.nic} default")

    def set_rss_key(self, key: bytes) -> JournalledSetting:
        """Set the RSS hash key (ethtool -X hkey)."""
        return self._change(Kind.RSS_KEY, key.hex(), ethtool.rss_key_words(self.nic, key))

    def add_ntuple(self, rule: FlowRule, *, or_destination_only: bool = False) -> JournalledRules:
        """Steer matching flows to a queue, and turn ntuple on for it. See ``contract.Nic.add_ntuple``.

        Args:
            rule: of one IP version, or of both: then it is two rules, at two locations, all or none.
            or_destination_only: where the NIC refuses to match on the source, match on the destination alone, with a
                SettingWarning.

        Raises:
            ValueError: as ``nicmodel.ntuple.as_held``.
            NicSettingError: EINVAL: no such queue; ENOSPC: no free location; EEXIST: the NIC has this rule.
        """
        held = as_held(rule)
        if rule.location is not None and len(held) > 1:
            raise ValueError(f"a rule for IPv4 and IPv6 takes two locations: location={rule.location} needs a family")
        queues = self.ethtool.rx_queues()
        if not 0 <= rule.queue < queues:
            hint = f"queue {rule.queue} does not exist; queues are 0 to {queues - 1}"
            raise NicSettingError(errno.EINVAL, ethtool_command(self.nic, rule), hint=hint)
        made = [
            self._change(f"{Kind.FEATURE} {NTUPLE}", True, ethtool.feature_words(self.nic, NTUPLE, True), keep=False)
        ]
        try:
            for one in held:
                made.append(self._add_rule(one, or_destination_only))
        except BaseException:
            with suppress(DevmemError):  # the first error is told
                close_all(made)
            raise
        rules = JournalledRules(made, [_rule_of(setting.entry) for setting in made[1:]])
        self._keep(rules)
        return rules

    def _add_rule(self, rule: FlowRule, or_destination_only: bool) -> JournalledSetting:
        try:
            return self._insert(rule)
        except NicSettingError as error:
            wide = replace(rule, src_ip=None, src_port=None)
            has_destination = wide.dst_ip is not None or wide.dst_port is not None
            if error.errno not in _TOO_FINE or wide == rule or not (or_destination_only and has_destination):
                raise
            setting = self._insert(wide)
            text = f"{self.nic} refused a rule on the source ({error.message}); in force is {setting.description}"
            warnings.warn(text, SettingWarning, stacklevel=3)
            return setting

    def _insert(self, rule: FlowRule) -> JournalledSetting:
        value = rule_value(flow_spec(rule))
        key: str | Callable[[], str] = f"{Kind.RULE} {rule.location}"
        if rule.location is None:
            key = partial(self._choose, rule, value)
        return self._change(key, value, ethtool_command(self.nic, rule), keep=False)

    def _choose(self, rule: FlowRule, value: str) -> str:
        """Choose the location of a new rule: the driver's choice where it has one, else the last free one."""
        table = self.ethtool.rule_table()
        call = ethtool_command(self.nic, rule)
        if table.driver_chooses:
            present = self._state.locate(ANY_RULE, value)
            if present != ANY_RULE:  # could not be told from ours after a crash
                raise NicSettingError(errno.EEXIST, call, hint=f"the NIC has it already: {present}")
            return present
        taken = set(table.locations)
        for location in reversed(range(table.size)):
            if location not in taken:
                return f"{Kind.RULE} {location}"
        hint = f"all {table.size} locations are in use; delete a rule first: ethtool -N {self.nic} delete LOCATION"
        raise NicSettingError(errno.ENOSPC, call, hint=hint)

    def _change(
        self, key: str | Callable[[], str], value: Value, words: str, *, keep: bool = True
    ) -> JournalledSetting:
        if self._journal is None:
            self._journal = Journal.default()
        entry = journal.change(self._journal, self._state, key, value, words)
        setting = JournalledSetting(self._journal, self._state, entry)
        if keep:
            self._keep(setting)
        return setting

    def _keep(self, setting: JournalledSetting | JournalledRules) -> None:
        """Remember what is to be undone in the end, and forget what was undone before."""
        self._settings = [*(one for one in self._settings if not one.closed), setting]


def _rule_of(entry: journal.Entry) -> FlowRule:
    """Return the rule of an entry as the NIC holds it."""
    assert isinstance(entry.new, str)
    location = int(entry.key.removeprefix(Kind.RULE))
    found = flow_rule(abi.with_location(bytes.fromhex(entry.new), location))
    assert found is not None  # we made it of a FlowRule
    return found


def rss_words(
    nic: str,
    *,
    equal: int | None = None,
    weights: Sequence[int] | None = None,
    table: Sequence[int] | None = None,
) -> str:
    """Return the command that spreads unsteered flows; a table as such is beyond ethtool(8), so it is the kernel's ynl.

    Raises:
        ValueError: not exactly one of the three.
    """
    if equal is not None and weights is None and table is None:
        return f"ethtool -X {nic} equal {equal}"
    if weights is not None and equal is None and table is None:
        return f"ethtool -X {nic} weight {' '.join(map(str, weights))}"
    if table is not None and equal is None and weights is None:
        json = f'{{"header": {{"dev-name": "{nic}"}}, "indir": {list(table)}}}'
        return f"ynl --family ethtool --do rss-set --json '{json}'"
    raise ValueError("set_rss takes exactly one of equal=, weights= and table=")


def plan(
    nic: str,
    *,
    header_split: HeaderSplitMode | str | None = None,
    hds_thresh: int | None = None,
    equal: int | None = None,
    weights: Sequence[int] | None = None,
    table: Sequence[int] | None = None,
    rules: Sequence[FlowRule] = (),
) -> list[str]:
    """Return the commands that do by hand what these settings would do, in order; changes nothing.

    Raises:
        ValueError: as the settings themselves.
    """
    commands = []
    if header_split is not None:
        commands.append(ethtool.header_split_words(nic, HeaderSplitMode(header_split)))
    if hds_thresh is not None:
        commands.append(f"ethtool -G {nic} hds-thresh {hds_thresh}")
    if any(one is not None for one in (equal, weights, table)):
        commands.append(rss_words(nic, equal=equal, weights=weights, table=table))
    if rules:
        commands.append(ethtool.feature_words(nic, NTUPLE, True))
    return commands + [ethtool_command(nic, one) for rule in rules for one in as_held(rule)]
