"""Statistics: what the device counts, and the report that it shares with the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import Struct
from typing import Final

from devmem_tcp.lab.dma import DmaSpace
from devmem_tcp.lab.gvnic.rx import RxQueue
from devmem_tcp.lab.gvnic.tx import TxQueue

_HEADER: Final = Struct("!Q")
_STAT: Final = Struct("!IIQ")  # name, queue, value
_DRIVER_TX_STATS: Final = 6  # GVE_TX_STATS_REPORT_NUM, gve.h: of each TX queue, written by the driver
_DRIVER_RX_STATS: Final = 2  # GVE_RX_STATS_REPORT_NUM
_DROPS, _NO_BUFFERS, _TOO_LONG, _BAD_CHECKSUMS = range(65, 69)  # enum gve_stat_names, gve_adminq.h


@dataclass(frozen=True, slots=True)
class QueueStats:
    """One queue, since it was created. A superframe received whole is one packet."""

    packets: int
    bytes: int
    drops: int = 0  #: for any reason
    drops_no_buffer: int = 0
    posted: int = 0  #: buffers that wait for packets


@dataclass(frozen=True, slots=True)
class GvnicStats:
    """One device. Packets that never found a queue are in ``drops`` by reason; mistakes are the driver's, by kind."""

    link_up: bool
    resets: int
    interrupts: int
    tx: Mapping[int, QueueStats]
    rx: Mapping[int, QueueStats]
    drops: Mapping[str, int] = field(default_factory=dict)
    faults: Mapping[str, int] = field(default_factory=dict)
    mistakes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StatsReport:
    """Where the driver wants statistics, and how often. First come its own, then the device's, 4 for each RX queue.

    Layout: struct gve_stats_report, gve_adminq.h; what comes where: gve_ethtool.c, gve_get_ethtool_stats.
    """

    address: int
    size_bytes: int
    interval_s: float

    def write(self, dma: DmaSpace, tx: Mapping[int, TxQueue], rx: Mapping[int, RxQueue]) -> bool:
        """Write the device's part; return whether it was written.

        Nothing is written while a queue is being restarted, or if there are more than the driver made room for: the
        place of each entry follows from the number of queues, and the driver believes what it finds there.

        Raises:
            DmaError: the report is not in mapped memory.
        """
        first = _HEADER.size + _STAT.size * (_DRIVER_TX_STATS * len(tx) + _DRIVER_RX_STATS * len(rx))
        stats = b"".join(self._queue(number, queue) for number, queue in sorted(rx.items()))
        complete = all(queues and max(queues) + 1 == len(queues) for queues in (tx, rx))
        fits = complete and first + len(stats) <= self.size_bytes
        if fits:
            dma.write(self.address + first, stats)
        return fits

    def _queue(self, number: int, queue: RxQueue) -> bytes:
        values = (
            (_DROPS, queue.drops),
            (_NO_BUFFERS, queue.drops_no_buffer),
            (_TOO_LONG, queue.drops_too_long),
            (_BAD_CHECKSUMS, queue.bad_checksums),
        )
        return b"".join(_STAT.pack(name, number, value) for name, value in values)
