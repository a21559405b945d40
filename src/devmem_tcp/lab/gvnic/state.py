"""What the driver has set up in the device, from its first admin command to the next reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from devmem_tcp.lab.dma import DmaError, DmaSpace
from devmem_tcp.lab.gvnic.interrupts import NotifyBlock, Vectors
from devmem_tcp.lab.gvnic.mistakes import Mistakes
from devmem_tcp.lab.gvnic.rx import RxQueue
from devmem_tcp.lab.gvnic.statistics import StatsReport
from devmem_tcp.lab.gvnic.steering import QueueChoice
from devmem_tcp.lab.gvnic.tx import SendTrain, TxQueue


class DeviceState:
    """The state that a reset clears, and the parts that admin commands need.

    Doorbells, as indexes of 4-byte words of BAR2: first those of the notify blocks, then TX queues, then RX queues.

    Args:
        dma: the guest's memory.
        mac: 6 bytes.
        queues: how many TX queues, and how many RX queues, there can be.
        mtu: the largest MTU, in bytes.
        mistakes: where the driver's mistakes are counted.
        send: takes the packets that are sent.
    """

    def __init__(
        self, dma: DmaSpace, *, mac: bytes, queues: int, mtu: int, mistakes: Mistakes, send: SendTrain
    ) -> None:
        self.dma: Final = dma
        self.mac: Final = mac
        self.queues: Final = queues
        self.max_mtu: Final = mtu
        self.mistakes: Final = mistakes
        self.send: Final = send
        self.vectors: Final = Vectors(2 * queues + 1)
        self.reset()

    def reset(self) -> None:
        """Forget everything that the driver has set up."""
        self.mtu = self.max_mtu
        self.tx: dict[int, TxQueue] = {}
        self.rx: dict[int, RxQueue] = {}
        self.choice = QueueChoice(self.queues)
        self.blocks: list[NotifyBlock] = []
        self.management_vector: int | None = None
        self.report: StatsReport | None = None
        self.doorbells: dict[int, Callable[[int], None]] = {}
        self.vectors.forget()

    def configure(self, blocks: int, base_vector: int) -> None:
        """Make the notify blocks. The management vector is last, or first if the blocks start at ``base_vector`` 1."""
        self.blocks = [NotifyBlock(self.vectors, base_vector + index) for index in range(blocks)]
        self.management_vector = 0 if base_vector else blocks
        self.doorbells = {index: block.doorbell for index, block in enumerate(self.blocks)}

    def deconfigure(self) -> None:
        """Drop queues, notify blocks and the statistics report; steering stays."""
        self.tx.clear()
        self.rx.clear()
        self.blocks = []
        self.management_vector = None
        self.report = None
        self.doorbells = {}

    def tx_doorbell(self, queue: int) -> int:
        """Return the doorbell index of a TX queue."""
        return 2 * self.queues + queue

    def rx_doorbell(self, queue: int) -> int:
        """Return the doorbell index of an RX queue."""
        return 3 * self.queues + queue

    def add_tx(self, queue: TxQueue, number: int) -> None:
        self.tx[number] = queue
        self.doorbells[self.tx_doorbell(number)] = queue.doorbell

    def add_rx(self, queue: RxQueue) -> None:
        self.rx[queue.id] = queue
        self.doorbells[self.rx_doorbell(queue.id)] = queue.doorbell
        self._spread()

    def remove_tx(self, number: int) -> None:
        del self.tx[number], self.doorbells[self.tx_doorbell(number)]

    def remove_rx(self, number: int) -> None:
        del self.rx[number], self.doorbells[self.rx_doorbell(number)]
        self._spread()

    def _spread(self) -> None:
        """Spread RSS over all queues up to the highest. So the restart of a single one moves no other flow."""
        self.choice.spread_over(max(self.rx, default=-1) + 1)

    def notify_management(self) -> None:
        """Tell the driver to look at the device status."""
        if self.management_vector is not None:
            self.vectors.fire(self.management_vector)

    def write_report(self) -> bool:
        """Write the device's part of the statistics report, if the driver wants one; return whether it was written."""
        if self.report is None:
            return False
        try:
            return self.report.write(self.dma, self.tx, self.rx)
        except DmaError as error:
            self.mistakes.note("stats-report", str(error))
            self.report = None
            return False
