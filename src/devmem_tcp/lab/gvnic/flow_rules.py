"""Flow rules as the driver writes them, in the terms of the NIC model.

Layout: struct gve_adminq_flow_rule, gve_adminq.h; struct gve_flow_spec, gve.h. All big-endian.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import Final

from devmem_tcp.errors import NicSettingError
from devmem_tcp.nicmodel.ntuple import NtupleTable
from devmem_tcp.types import Family, FlowRule

MAX_FLOW_RULES: Final = 1024
RULE: Final = Struct("!HH16s16s4sB3x16s16s4sB3x")  # flow type, queue; addresses, ports, traffic class; their masks

_TCP: Final = {0: Family.TCP4, 5: Family.TCP6}  # enum gve_adminq_flow_type
_UDP: Final = {1: Family.TCP4, 6: Family.TCP6}
_FLOW_TYPES: Final = 10
_PORTS: Final = Struct("!HH")


class RuleError(Exception):
    """A rule cannot be had: this device does not do its kind (``unsupported``), or it makes no sense."""

    def __init__(self, message: str, *, unsupported: bool = False) -> None:
        super().__init__(message)
        self.unsupported = unsupported


class FlowRules:
    """All flow rules of the device, TCP's and UDP's, by location; and each rule's bytes, for the driver to read back.

    The two protocols share locations. SCTP, AH and ESP rules are refused, as are rules that match every packet, masks
    of addresses that are no prefix, and traffic classes.

    Args:
        tcp: the TCP rules' table, which is the NIC model's.
    """

    def __init__(self, tcp: NtupleTable) -> None:
        self.tcp: Final = tcp
        self.udp: Final = NtupleTable(tcp.rx_queues, tcp.size)  # its families stand for UDP over each IP version
        self._raw: dict[int, bytes] = {}

    @property
    def version(self) -> int:
        """A number that grows with every change."""
        return self.tcp.version + self.udp.version

    def __len__(self) -> int:
        return len(self._raw)

    def since(self, location: int) -> list[tuple[int, bytes]]:
        """Return (location, bytes) of the rules from ``location`` on, in order."""
        return sorted(item for item in self._raw.items() if item[0] >= location)

    def add(self, location: int, raw: bytes) -> None:
        """Add a rule, in place of what is at ``location``.

        Args:
            raw: struct gve_adminq_flow_rule, 84 bytes.

        Raises:
            RuleError: it cannot be had. What was at ``location`` is still there.
        """
        flow_type = RULE.unpack(raw)[0]
        if flow_type not in _TCP and flow_type not in _UDP:
            raise RuleError(f"flow type {flow_type}", unsupported=flow_type < _FLOW_TYPES)
        table, other = (self.tcp, self.udp) if flow_type in _TCP else (self.udp, self.tcp)
        try:
            table.insert(_read(raw, (_TCP | _UDP)[flow_type], location))
        except (ValueError, NicSettingError) as error:
            raise RuleError(f"{error} {getattr(error, 'hint', '')}".strip()) from None
        if any(rule.location == location for rule in other.rules):
            other.delete(location)
        self._raw[location] = bytes(raw)

    def delete(self, location: int) -> bool:
        """Remove the rule at ``location``; False if there is none."""
        if self._raw.pop(location, None) is None:
            return False
        for table in (self.tcp, self.udp):
            if any(rule.location == location for rule in table.rules):
                table.delete(location)
        return True

    def clear(self) -> None:
        """Remove all rules."""
        for location in list(self._raw):
            self.delete(location)


def _read(raw: bytes, family: Family, location: int) -> FlowRule:
    """Make a FlowRule of the driver's.

    Raises:
        ValueError: it says what a FlowRule cannot.
    """
    _, queue, src, dst, ports, _, src_mask, dst_mask, port_masks, class_mask = RULE.unpack(raw)
    if class_mask:
        raise ValueError("rules by traffic class are not supported")
    sport, dport = _PORTS.unpack(ports)
    sport_mask, dport_mask = _PORTS.unpack(port_masks)
    return FlowRule(
        queue=queue,
        family=family,
        src_ip=_network(src, src_mask, family),
        dst_ip=_network(dst, dst_mask, family),
        src_port=sport if sport_mask else None,
        dst_port=dport if dport_mask else None,
        src_port_mask=sport_mask,
        dst_port_mask=dport_mask,
        location=location,
    )


def _network(address: bytes, mask: bytes, family: Family) -> str | None:
    """Return an address and its mask in CIDR form; None where the mask hides all of it."""
    kind, size = (IPv4Address, 4) if family is Family.TCP4 else (IPv6Address, 16)
    bits = int.from_bytes(mask[:size], "big")
    if not bits:
        return None
    prefix_bits = bits.bit_count()
    if bits != (1 << prefix_bits) - 1 << 8 * size - prefix_bits:
        raise ValueError(f"the address mask {mask[:size].hex()} is no prefix")
    return f"{kind(address[:size])}/{prefix_bits}"
