"""Flow steering: which RX queue a TCP packet goes to, by ntuple rules first, then by RSS."""

from __future__ import annotations

from typing import Final

from devmem_tcp.nicmodel.indirection import DEFAULT_SIZE, IndirectionTable
from devmem_tcp.nicmodel.ntuple import NtupleTable
from devmem_tcp.nicmodel.toeplitz import HASH_BYTES, MICROSOFT_KEY, Toeplitz
from devmem_tcp.types import Family

TCP6_INPUT_BYTES: Final = 2 * 16 + 2 * 2  # two addresses, two ports


class Steering:
    """The steering of one NIC: its ntuple rules, RSS key and indirection table.

    Args:
        rx_queues: how many RX queues the NIC has; RSS starts out spreading over all of them.
        key: the RSS hash key.
        table_size: entries of the RSS indirection table, a power of two.
        ntuple_size: locations of the ntuple table.

    Raises:
        ValueError: no queue, a table size that is not a power of two, or a key too short for an IPv6 4-tuple.
    """

    def __init__(
        self, rx_queues: int, *, key: bytes = MICROSOFT_KEY, table_size: int = DEFAULT_SIZE, ntuple_size: int = 1024
    ) -> None:
        self.rx_queues: Final = rx_queues
        self.ntuple: Final = NtupleTable(rx_queues, ntuple_size)
        self._table = IndirectionTable.default(rx_queues, table_size)
        self._toeplitz = _rss_hash(key)
        self._changes = 0

    @property
    def table(self) -> IndirectionTable:
        """The RSS indirection table."""
        return self._table

    @property
    def toeplitz(self) -> Toeplitz:
        """The RSS hash."""
        return self._toeplitz

    @property
    def version(self) -> int:
        """A number that grows with every change of rules, table or key: until then a flow's queue may be cached."""
        return self.ntuple.version + self._changes

    def set_table(self, table: IndirectionTable) -> None:
        """Replace the RSS indirection table.

        Raises:
            ValueError: not the size of the present one, or it names a queue that the NIC has not.
        """
        if table.size != self._table.size:
            raise ValueError(f"the RSS indirection table has {self._table.size} entries, got {table.size}")
        table.check_queues(self.rx_queues)
        self._table = table
        self._changes += 1

    def set_key(self, key: bytes) -> None:
        """Replace the RSS hash key.

        Raises:
            ValueError: the key is too short for an IPv6 4-tuple.
        """
        self._toeplitz = _rss_hash(key)
        self._changes += 1

    def queue_for(self, family: Family, src: bytes, dst: bytes, sport: int, dport: int) -> int:
        """Return the RX queue of a TCP packet; ``queue_for(*Flow.between(remote, local))`` for text addresses.

        Args:
            family: the packet's IP version.
            src, dst: its addresses, packed: 4 or 16 bytes.
            sport, dport: its TCP ports.

        Raises:
            ValueError: an address is not as long as ``family`` wants, or a port is out of range.
        """
        queue = self.ntuple.match(family, src, dst, sport, dport)
        if queue is not None:
            return queue
        hash_tcp = self._toeplitz.hash_tcp4 if family is Family.TCP4 else self._toeplitz.hash_tcp6
        return self._table.queue_for(hash_tcp(src, dst, sport, dport))


def _rss_hash(key: bytes) -> Toeplitz:
    toeplitz = Toeplitz(key)
    if toeplitz.max_input_bytes < TCP6_INPUT_BYTES:
        raise ValueError(f"an RSS key must have at least {TCP6_INPUT_BYTES + HASH_BYTES} bytes, got {len(key)}")
    return toeplitz
