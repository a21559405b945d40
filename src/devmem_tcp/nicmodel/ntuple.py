"""The ntuple rule table of a NIC: which TCP flows are steered to which RX queue, ahead of RSS."""

from __future__ import annotations

import errno
from dataclasses import replace
from itertools import islice
from typing import Final, TypeAlias

from devmem_tcp.errors import NicSettingError
from devmem_tcp.nicmodel.flow import ADDRESS_BYTES, MAX_PORT, Network, check_port, parse_network
from devmem_tcp.types import Family, FlowRule

_CALL: Final = "ethtool -N"
_PORT_BITS: Final = 16

Lookups: TypeAlias = dict[int, dict[int, tuple[int, int]]]
"""For each mask: the masked flow key that a rule wants, and that rule's (location, queue)."""


class NtupleTable:
    """Flow rules by location; of several rules that match a flow, the one with the lowest location wins.

    Args:
        rx_queues: how many RX queues the NIC has.
        size: how many locations the table has.
    """

    def __init__(self, rx_queues: int, size: int = 1024) -> None:
        self.rx_queues: Final = rx_queues
        self.size: Final = size
        self._rules: dict[int, FlowRule] = {}
        self._lookups: dict[Family, Lookups] = {family: {} for family in Family}
        self._version = 0

    @property
    def rules(self) -> tuple[FlowRule, ...]:
        """All rules as the NIC holds them, in order of location, which is their priority."""
        return tuple(rule for _, rule in sorted(self._rules.items()))

    @property
    def version(self) -> int:
        """A number that grows with every change of the rules."""
        return self._version

    def insert(self, rule: FlowRule) -> tuple[FlowRule, ...]:
        """Add a rule and return what the NIC holds for it, with ``family`` and ``location`` filled in.

        That is one rule, or two (tcp4 and tcp6) where neither ``family`` nor an address says which. All or none are
        added. Without ``location`` a rule takes the highest free one, as ethtool's rule manager does (rxclass.c,
        rmgr_find_empty_slot), so that rules placed by hand lower down win; with one, it replaces the rule that is
        there.

        Raises:
            ValueError: a malformed address, a port or port mask out of range, nothing to match on, an address of
                another IP version than ``family`` or the other address, or one ``location`` for two rules.
            NicSettingError: EINVAL: no such queue or location; ENOSPC: no free location. The table is as it was.
        """
        held = as_held(rule)
        self._check_queue(rule.queue)
        if rule.location is None:
            locations = self._free_locations(len(held))
        else:
            if len(held) > 1:
                raise ValueError(
                    f"a rule for IPv4 and IPv6 takes two locations, so location={rule.location} needs a family, "
                    "Family.TCP4 or Family.TCP6"
                )
            self._check_location(rule.location)
            locations = [rule.location]
        placed = tuple(replace(one, location=location) for one, location in zip(held, locations, strict=True))
        self._rules.update(zip(locations, placed, strict=True))
        self._changed()
        return placed

    def delete(self, location: int) -> None:
        """Remove the rule at ``location``.

        Raises:
            NicSettingError: ENOENT: there is none.
        """
        if location not in self._rules:
            held = ", ".join(map(str, sorted(self._rules))) or "none"
            raise NicSettingError(errno.ENOENT, _CALL, hint=f"no rule at location {location}; rules are at: {held}")
        del self._rules[location]
        self._changed()

    def match(self, family: Family, src: bytes | int, dst: bytes | int, sport: int, dport: int) -> int | None:
        """Return the queue that the rules steer a packet to, or None if no rule matches.

        One dictionary look-up per distinct mask in the table, however many rules there are.

        Args:
            family: the packet's IP version.
            src, dst: its addresses: packed, or as numbers.
            sport, dport: its TCP ports, 0 to 65535.

        Raises:
            ValueError: a packed address is not as long as ``family`` wants.
        """
        key = _flow_key(family, _number(family, src), _number(family, dst), sport, dport)
        best: tuple[int, int] | None = None
        for mask, wanted in self._lookups[family].items():
            hit = wanted.get(key & mask)
            if hit is not None and (best is None or hit < best):
                best = hit
        return None if best is None else best[1]

    def _check_queue(self, queue: int) -> None:
        if not 0 <= queue < self.rx_queues:
            raise NicSettingError(
                errno.EINVAL, _CALL, hint=f"queue {queue} does not exist; queues are 0 to {self.rx_queues - 1}"
            )

    def _check_location(self, location: int) -> None:
        if not 0 <= location < self.size:
            raise NicSettingError(
                errno.EINVAL, _CALL, hint=f"location {location} does not exist; locations are 0 to {self.size - 1}"
            )

    def _free_locations(self, count: int) -> list[int]:
        free = (location for location in reversed(range(self.size)) if location not in self._rules)
        found = list(islice(free, count))
        if len(found) < count:
            raise NicSettingError(
                errno.ENOSPC,
                _CALL,
                hint=f"{len(self._rules)} of {self.size} locations are in use and {count} more wanted; "
                "delete a rule first   # ethtool -N NIC delete LOCATION",
            )
        return found

    def _changed(self) -> None:
        self._version += 1
        self._lookups = {family: {} for family in Family}
        for location, rule in sorted(self._rules.items()):
            assert rule.family is not None  # as_held filled it in
            value, mask = _value_and_mask(rule, rule.family)
            # The first to come, with the lower location, wins among rules that want the same.
            self._lookups[rule.family].setdefault(mask, {}).setdefault(value, (location, rule.queue))


def as_held(rule: FlowRule) -> tuple[FlowRule, ...]:
    """Return ``rule`` as a NIC holds it: one rule per IP version, address and port bits outside their masks cleared.

    Raises:
        ValueError: as ``NtupleTable.insert``, but for ``location``.
    """
    src = None if rule.src_ip is None else parse_network(rule.src_ip)
    dst = None if rule.dst_ip is None else parse_network(rule.dst_ip)
    _check_ports(rule)
    if not _restricts(rule, src, dst):
        raise ValueError("a flow rule needs something to match on: src_ip, dst_ip, src_port or dst_port")
    return tuple(
        replace(
            rule,
            family=family,
            src_ip=None if src is None else _network_text(src),
            dst_ip=None if dst is None else _network_text(dst),
            src_port=None if rule.src_port is None else rule.src_port & rule.src_port_mask,
            dst_port=None if rule.dst_port is None else rule.dst_port & rule.dst_port_mask,
        )
        for family in _families(rule, src, dst)
    )


def ethtool_command(nic: str, rule: FlowRule) -> str:
    """Return the command line that adds ``rule`` to ``nic``, for people; two joined by ``&&`` for two IP versions.

    ethtool's masks are the other way round from FlowRule's: 1 bits are ignored (ethtool's rxclass.c, rxclass_get_mask).

    Raises:
        ValueError: as ``NtupleTable.insert``.
    """
    return " && ".join(_command(nic, held) for held in as_held(rule))


def _command(nic: str, rule: FlowRule) -> str:
    assert rule.family is not None  # as_held filled it in
    words = ["ethtool", "-N", nic, "flow-type", rule.family.value]
    for name, text in (("src-ip", rule.src_ip), ("dst-ip", rule.dst_ip)):
        if text is not None:
            network = parse_network(text)
            words += [name, str(network.network_address)]
            if int(network.hostmask):
                words += ["m", str(network.hostmask)]
    for name, port, mask in (
        ("src-port", rule.src_port, rule.src_port_mask),
        ("dst-port", rule.dst_port, rule.dst_port_mask),
    ):
        if port is not None:
            words += [name, str(port)]
            if mask != MAX_PORT:
                words += ["m", f"{mask ^ MAX_PORT:#06x}"]
    words += ["action", str(rule.queue)]
    if rule.location is not None:
        words += ["loc", str(rule.location)]
    return " ".join(words)


def _check_ports(rule: FlowRule) -> None:
    for name, port, mask in (
        ("src_port", rule.src_port, rule.src_port_mask),
        ("dst_port", rule.dst_port, rule.dst_port_mask),
    ):
        if port is not None:
            check_port(name, port)
        if not 0 <= mask <= MAX_PORT:
            raise ValueError(f"{name}_mask must be 0 to {MAX_PORT:#x}, got {mask:#x}")


def _restricts(rule: FlowRule, src: Network | None, dst: Network | None) -> bool:
    """Whether at least one bit of a flow must have a certain value."""
    return any(
        (
            src is not None and src.prefixlen > 0,
            dst is not None and dst.prefixlen > 0,
            rule.src_port is not None and rule.src_port_mask > 0,
            rule.dst_port is not None and rule.dst_port_mask > 0,
        )
    )


def _families(rule: FlowRule, src: Network | None, dst: Network | None) -> tuple[Family, ...]:
    """Find the IP versions a rule is for: what it says, else what its addresses are, else both."""
    of_addresses = {
        Family.TCP4 if network.version == 4 else Family.TCP6 for network in (src, dst) if network is not None
    }
    if len(of_addresses) > 1:
        raise ValueError(f"src_ip {rule.src_ip} and dst_ip {rule.dst_ip} are not of one IP version")
    if rule.family is None:
        return tuple(of_addresses or Family)
    if of_addresses - {rule.family}:
        raise ValueError(f"{rule.src_ip or rule.dst_ip} is not an address for a {rule.family.value} rule")
    return (rule.family,)


def _network_text(network: Network) -> str:
    return str(network) if int(network.hostmask) else str(network.network_address)


def _number(family: Family, address: bytes | int) -> int:
    if isinstance(address, int):
        return address
    if len(address) != ADDRESS_BYTES[family]:
        raise ValueError(f"packed addresses of {family.value} have {ADDRESS_BYTES[family]} bytes, got {len(address)}")
    return int.from_bytes(address, "big")


def _flow_key(family: Family, src: int, dst: int, sport: int, dport: int) -> int:
    """Join the fields of a flow into one number, so that one AND and one comparison match them all."""
    return ((src << 8 * ADDRESS_BYTES[family] | dst) << _PORT_BITS | sport) << _PORT_BITS | dport


def _value_and_mask(rule: FlowRule, family: Family) -> tuple[int, int]:
    """Return the masked flow key that ``rule`` wants, and its mask."""
    src = (0, 0) if rule.src_ip is None else _address_bits(rule.src_ip)
    dst = (0, 0) if rule.dst_ip is None else _address_bits(rule.dst_ip)
    sport = (0, 0) if rule.src_port is None else (rule.src_port, rule.src_port_mask)
    dport = (0, 0) if rule.dst_port is None else (rule.dst_port, rule.dst_port_mask)
    value, mask = (_flow_key(family, *parts) for parts in zip(src, dst, sport, dport, strict=True))
    return value, mask


def _address_bits(text: str) -> tuple[int, int]:
    network = parse_network(text)
    return int(network.network_address), int(network.netmask)
