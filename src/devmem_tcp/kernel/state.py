"""A NIC's settings as values by name: what the journal reads, writes and compares."""

from __future__ import annotations

from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Final

from devmem_tcp.closing import Closing
from devmem_tcp.errors import BusyError, KernelError
from devmem_tcp.kernel import journal
from devmem_tcp.kernel.ethtool import NTUPLE, Ethtool
from devmem_tcp.kernel.journal import Journal, NicIdentity, Outcome, Value
from devmem_tcp.kernel.ntuple import HeldRule, flow_rule
from devmem_tcp.nicmodel.ntuple import ethtool_command
from devmem_tcp.sys import calls, namespaces
from devmem_tcp.types import HeaderSplitMode
from devmem_tcp.uapi import ethtool as abi


class Kind(StrEnum):
    """Which setting: the first word of a key. A feature's name or a rule's location follows."""

    HEADER_SPLIT = "header-split"
    HDS_THRESH = "hds-thresh"
    RING_SIZES = "ring-sizes"
    CHANNELS = "channels"
    RSS_TABLE = "rss-table"
    RSS_KEY = "rss-key"
    FEATURE = "feature"
    RULE = "ntuple-rule"


ANY_RULE: Final = f"{Kind.RULE} any"
"""The key of a rule whose location the driver is to choose."""

_ANY: Final = "any"


class EthtoolState(Closing):
    """A NIC's settings by name, for the journal. See ``journal.NicState``.

    Values: header-split: ``HeaderSplitMode``'s; hds-thresh: bytes; ring-sizes and channels: counts by kind; rss-table:
    queues; rss-key: hex; features: whether on; ntuple-rule: struct ethtool_rx_flow_spec at location 0, hex.
    """

    def __init__(self, nic: str) -> None:
        self.ethtool: Final = Ethtool(nic)
        try:
            permanent = self.ethtool.permanent_address()
            address = permanent or self.ethtool.hardware_address()
            self._identity = NicIdentity(
                nic, self.ethtool.ifindex, address.hex(":"), bool(permanent), namespaces.namespace("net")
            )
        except BaseException:
            self.ethtool.close()
            raise

    @property
    def identity(self) -> NicIdentity:
        return self._identity

    def close(self) -> None:
        self.ethtool.close()

    def read(self, key: str) -> Value:
        kind, _, name = key.partition(" ")
        match kind:
            case Kind.HEADER_SPLIT:
                return self.ethtool.rings().header_split.value
            case Kind.HDS_THRESH:
                return self.ethtool.rings().hds_thresh
            case Kind.RING_SIZES:
                rings = self.ethtool.rings()
                return {"rx": rings.rx, "tx": rings.tx}
            case Kind.CHANNELS:
                channels = self.ethtool.channels()
                return {"rx": channels.rx, "tx": channels.tx, "combined": channels.combined}
            case Kind.RSS_TABLE:
                return list(self.ethtool.rss().table)
            case Kind.RSS_KEY:
                return self.ethtool.rss().key.hex()
            case Kind.FEATURE:
                return self.ethtool.feature(name)
            case Kind.RULE:
                held = None if name == _ANY else self.ethtool.rule_at(int(name))
                return None if held is None else rule_value(held.spec)
        raise ValueError(f"no NIC setting is called {key!r}")

    def write(self, key: str, value: Value) -> str:
        kind, _, name = key.partition(" ")
        match kind, value:
            case Kind.HEADER_SPLIT, str():
                self.ethtool.set_header_split(HeaderSplitMode(value))
            case Kind.HDS_THRESH, int():
                self.ethtool.set_hds_thresh(value)
            case Kind.RING_SIZES, dict():
                self.ethtool.set_ring_sizes(**value)
            case Kind.CHANNELS, dict():
                self.ethtool.set_channels(**value)
            case Kind.RSS_TABLE, list():
                self._write_rss_table(value)
            case Kind.RSS_KEY, str():
                self.ethtool.set_rss_key(bytes.fromhex(value))
            case Kind.FEATURE, bool():
                self._write_feature(name, value)
            case Kind.RULE, None:
                self.ethtool.delete_rule(int(name))
            case Kind.RULE, str():
                return f"{Kind.RULE} {self._write_rule(name, value)}"
            case _:
                raise ValueError(f"{key!r} cannot be set to {value!r}")
        return key

    def _write_rss_table(self, table: list[int]) -> None:
        """Write a table; the kernel's default as such, so that it follows when the number of queues changes."""
        queues = self.ethtool.rx_queues()
        if table == [index % queues for index in range(len(table))]:
            self.ethtool.set_rss_default()
        else:
            self.ethtool.set_rss_table(table)

    def _write_feature(self, name: str, on: bool) -> None:
        """Turn a feature on or off; not ntuple off while there are rules, which drivers would drop silently."""
        if name == NTUPLE and not on and (count := len(self.ethtool.rule_table().locations)):
            nic = self.ethtool.nic
            hint = f"delete them first: ethtool -n {nic}; ethtool -N {nic} delete LOCATION"
            raise BusyError(
                f"{nic} has {count} ntuple rules of others: {NTUPLE} stays on, or they were lost", hint=hint
            )
        self.ethtool.set_feature(name, on)

    def _write_rule(self, location: str, value: str) -> int:
        spec = bytes.fromhex(value)
        number = abi.RX_CLS_LOC_ANY if location == _ANY else int(location)
        held = HeldRule.parse(abi.with_location(spec, number))
        if held.rule is None:
            words = f"ethtool -N {self.ethtool.nic} flow-type {held.kind} … loc {number}"
        else:
            words = ethtool_command(self.ethtool.nic, held.rule)
        return self.ethtool.insert_rule(held.spec, words)

    def locate(self, key: str, value: Value) -> str:
        if key != ANY_RULE:
            return key
        found = (held for held in self.ethtool.rules() if self.same(key, rule_value(held.spec), value))
        return next((f"{Kind.RULE} {held.location}" for held in found), key)

    def same(self, key: str, one: Value, other: Value) -> bool:
        if not key.startswith(Kind.RULE) or not isinstance(one, str) or not isinstance(other, str):
            return one == other
        rule = flow_rule(bytes.fromhex(one))
        return one == other or (rule is not None and rule == flow_rule(bytes.fromhex(other)))


def rule_value(spec: bytes) -> str:
    """Return a flow spec as a value: without its location, which is in the key."""
    return abi.with_location(spec, 0).hex()


def restore(journal_: Journal) -> list[Outcome]:
    """Undo what programs left that died, on NICs of this network namespace; see ``journal.replay``."""
    return journal.replay(journal_, find_nic)


def find_nic(identity: NicIdentity) -> AbstractContextManager[EthtoolState] | None:
    """Find a NIC of the journal in this network namespace, whatever it is called by now; None: it is not here."""
    names = calls.interface_names()
    for name in sorted(names, key=lambda one: one != identity.name):
        try:
            state = EthtoolState(name)
        except KernelError:  # it went this moment
            continue
        if state.identity.same(identity):
            return state
        state.close()
    return None
