"""FlowRules as the kernel's flow specs, both ways. Pure.

Kernel: include/uapi/linux/ethtool.h, struct ethtool_rx_flow_spec: in a mask, bits that are 1 must match.
"""

from __future__ import annotations

import ipaddress
from typing import Final, NamedTuple

from devmem_tcp.nicmodel.flow import ADDRESS_BYTES, parse_network
from devmem_tcp.types import Family, FlowRule
from devmem_tcp.uapi import ethtool as abi

_TYPES: Final = {Family.TCP4: abi.TCP_V4_FLOW, Family.TCP6: abi.TCP_V6_FLOW}
_FAMILIES: Final = {kind: family for family, kind in _TYPES.items()}
_SPECS: Final = {Family.TCP4: abi.TCPIP4_SPEC, Family.TCP6: abi.TCPIP6_SPEC}
_QUEUE_MASK: Final = 0xFFFFFFFF  # ETHTOOL_RX_FLOW_SPEC_RING; the bits above name a virtual function


class HeldRule(NamedTuple):
    """One rule in a NIC's table, of any protocol."""

    location: int
    queue: int | None  # None: it drops, wakes up, or goes to an RSS context or a virtual function
    kind: str  # the flow type in ethtool's words
    rule: FlowRule | None  # None: it says what a FlowRule cannot
    spec: bytes  # struct ethtool_rx_flow_spec

    @classmethod
    def parse(cls, spec: bytes) -> HeldRule:
        """Make one of what the kernel answered, 168 bytes."""
        flow_type, _, _, _, _, cookie, location = abi.FLOW_SPEC.unpack(spec)
        plain = not flow_type & abi.FLOW_RSS and cookie <= _QUEUE_MASK
        number = flow_type & ~abi.FLOW_FLAGS
        kind = abi.FLOW_NAMES.get(number, f"flow type {number}")
        return cls(location, cookie if plain else None, kind, flow_rule(spec), spec)


def flow_spec(rule: FlowRule) -> bytes:
    """Return struct ethtool_rx_flow_spec, 168 bytes, of a rule of one family; no location: RX_CLS_LOC_ANY.

    Raises:
        ValueError: ``family`` is None (see ``nicmodel.ntuple.as_held``), or an address is malformed.
    """
    if rule.family is None:
        raise ValueError("a flow spec is for one IP version: give the rule a family")
    layout = _SPECS[rule.family]
    src, src_mask = _address(rule.src_ip, rule.family)
    dst, dst_mask = _address(rule.dst_ip, rule.family)
    sport, sport_mask = _port(rule.src_port, rule.src_port_mask)
    dport, dport_mask = _port(rule.dst_port, rule.dst_port_mask)
    return abi.FLOW_SPEC.pack(
        _TYPES[rule.family],
        layout.pack(src, dst, sport, dport, 0),
        b"",
        layout.pack(src_mask, dst_mask, sport_mask, dport_mask, 0),
        b"",
        rule.queue,
        abi.RX_CLS_LOC_ANY if rule.location is None else rule.location,
    )


def flow_rule(spec: bytes) -> FlowRule | None:
    """Return the FlowRule that a flow spec stands for; None if it says something that a FlowRule cannot.

    That is: another protocol, a match on MAC address, VLAN, user data or traffic class, an address mask that is no
    prefix, or a target that is not a queue.
    """
    flow_type, h_u, _, m_u, m_ext, cookie, location = abi.FLOW_SPEC.unpack(spec)
    family = _FAMILIES.get(flow_type & ~abi.FLOW_FLAGS)
    matches_more = flow_type & (abi.FLOW_EXT | abi.FLOW_MAC_EXT) and any(m_ext)
    if family is None or flow_type & abi.FLOW_RSS or matches_more or cookie > _QUEUE_MASK:
        return None
    layout = _SPECS[family]
    src, dst, sport, dport, _ = layout.unpack_from(h_u)
    src_mask, dst_mask, sport_mask, dport_mask, class_mask = layout.unpack_from(m_u)
    src_prefix, dst_prefix = _prefix_bits(src_mask), _prefix_bits(dst_mask)
    if class_mask or src_prefix is None or dst_prefix is None:
        return None
    return FlowRule(
        queue=cookie,
        family=family,
        src_ip=_network(src, src_prefix),
        dst_ip=_network(dst, dst_prefix),
        src_port=sport & sport_mask if sport_mask else None,
        dst_port=dport & dport_mask if dport_mask else None,
        src_port_mask=sport_mask or 0xFFFF,
        dst_port_mask=dport_mask or 0xFFFF,
        location=None if location == abi.RX_CLS_LOC_ANY else location,
    )


def _address(text: str | None, family: Family) -> tuple[bytes, bytes]:
    """Return an address and its mask, packed; all zeros match anything."""
    if text is None:
        return bytes(ADDRESS_BYTES[family]), bytes(ADDRESS_BYTES[family])
    network = parse_network(text)
    if len(network.netmask.packed) != ADDRESS_BYTES[family]:
        raise ValueError(f"{text} is not an address for a {family.value} rule")
    return network.network_address.packed, network.netmask.packed


def _port(port: int | None, mask: int) -> tuple[int, int]:
    return (0, 0) if port is None else (port & mask, mask)


def _prefix_bits(mask: bytes) -> int | None:
    """Return how many leading bits a mask has; None if others follow."""
    number, size = int.from_bytes(mask, "big"), 8 * len(mask)
    bits = number.bit_count()
    return bits if number == (1 << bits) - 1 << size - bits else None


def _network(packed: bytes, prefix_bits: int) -> str | None:
    """Return an address, in CIDR form where its mask is not whole; None where it hides everything."""
    if not prefix_bits:
        return None
    network = ipaddress.ip_network((packed, prefix_bits), strict=False)
    return str(network) if int(network.hostmask) else str(network.network_address)
