"""Which RX queue a packet goes to, and the hash that the driver is told: flow rules first, then RSS.

Hash, table and rules are the NIC model's; here is what the model leaves to the device: UDP and other protocols, which
of them are hashed, and the default table.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final

from devmem_tcp.lab.frames import ParsedFrame
from devmem_tcp.lab.gvnic.flow_rules import MAX_FLOW_RULES, FlowRules
from devmem_tcp.nicmodel.indirection import IndirectionTable
from devmem_tcp.nicmodel.steering import Steering
from devmem_tcp.types import Family

RSS_KEY_BYTES: Final = 40
RSS_TABLE_SIZE: Final = 128
_MAX_FLOWS: Final = 4096  # remembered at a time

_Flow = tuple[int, bytes, bytes, int, int, bool]


class HashTypes(IntFlag):
    """Which packets are hashed by what; enum gve_rss_hash_type, gve_adminq.h."""

    IPV4 = 1 << 0
    TCPV4 = 1 << 1
    IPV6 = 1 << 2
    TCPV6 = 1 << 4
    UDPV4 = 1 << 6
    UDPV6 = 1 << 7


ALL_HASH_TYPES: Final = 0x1FF


class QueueChoice:
    """The steering of one device. Until the driver sets a table, RSS spreads over the queues that there are.

    Args:
        queues: how many RX queues the device can have.
    """

    def __init__(self, queues: int) -> None:
        self.model: Final = Steering(queues, table_size=RSS_TABLE_SIZE, ntuple_size=MAX_FLOW_RULES)
        self.rules: Final = FlowRules(self.model.ntuple)
        self.hash_types = ALL_HASH_TYPES
        self._table_set = False
        self._spread = queues
        self._flows: dict[_Flow, tuple[int, int]] = {}
        self._flows_version = -1

    def set_key(self, key: bytes) -> None:
        """Replace the hash key.

        Raises:
            ValueError: it is too short.
        """
        self.model.set_key(key)

    def set_table(self, entries: tuple[int, ...]) -> None:
        """Replace the indirection table.

        Raises:
            ValueError: it has not RSS_TABLE_SIZE entries, or names a queue that the device cannot have.
        """
        self.model.set_table(IndirectionTable(entries))
        self._table_set = True

    def set_hash_types(self, types: int) -> None:
        """Replace the set of packets that are hashed, bits of HashTypes."""
        self.hash_types = types
        self._flows.clear()

    def spread_over(self, queues: int) -> None:
        """Make RSS spread over the first ``queues`` queues; a table that the driver has set is folded onto them.

        Kernel: gve_set_channels leaves the table of ``ethtool -X default`` as it is when there are fewer queues then.
        """
        if not queues:
            return
        self._spread = queues
        self._flows.clear()
        if not self._table_set:
            self.model.set_table(IndirectionTable.default(queues, RSS_TABLE_SIZE))

    def choose(self, parsed: ParsedFrame) -> tuple[int, int]:
        """Return the queue of a packet and its hash; the hash is 0 if its kind is not hashed."""
        version = self.model.version + self.rules.udp.version
        if version != self._flows_version or len(self._flows) >= _MAX_FLOWS:
            self._flows.clear()
            self._flows_version = version
        flow = (parsed.protocol, parsed.src, parsed.dst, parsed.sport, parsed.dport, parsed.fragment)
        chosen = self._flows.get(flow)
        if chosen is None:
            chosen = self._flows[flow] = self._choose(parsed)
        return chosen

    def _choose(self, parsed: ParsedFrame) -> tuple[int, int]:
        hash_value = self._hash(parsed)
        queue = None
        if parsed.is_tcp or parsed.is_udp:
            table = self.rules.tcp if parsed.is_tcp else self.rules.udp
            family = Family.TCP4 if parsed.version == 4 else Family.TCP6
            queue = table.match(family, parsed.src, parsed.dst, parsed.sport, parsed.dport)
        return self.model.table.queue_for(hash_value) % self._spread if queue is None else queue, hash_value

    def _hash(self, parsed: ParsedFrame) -> int:
        four, six = parsed.version == 4, parsed.version == 6
        toeplitz = self.model.toeplitz
        wanted = 0
        if parsed.is_tcp:
            wanted = HashTypes.TCPV4 if four else HashTypes.TCPV6
        elif parsed.is_udp:
            wanted = HashTypes.UDPV4 if four else HashTypes.UDPV6
        if self.hash_types & wanted:
            hash_tuple = toeplitz.hash_tcp4 if four else toeplitz.hash_tcp6
            return hash_tuple(parsed.src, parsed.dst, parsed.sport, parsed.dport)
        if four and self.hash_types & HashTypes.IPV4:
            return toeplitz.hash_ip4(parsed.src, parsed.dst)
        if six and self.hash_types & HashTypes.IPV6:
            return toeplitz.hash_ip6(parsed.src, parsed.dst)
        return 0
