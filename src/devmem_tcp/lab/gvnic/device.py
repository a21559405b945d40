"""The gVNIC: a PCI function towards the guest, a port towards the wire."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from devmem_tcp.lab.dma import DmaSpace
from devmem_tcp.lab.frames import ETHERNET_BYTES, parse
from devmem_tcp.lab.gvnic import pci
from devmem_tcp.lab.gvnic import registers as reg
from devmem_tcp.lab.gvnic.adminq import AdminQueue
from devmem_tcp.lab.gvnic.commands import MIN_MTU
from devmem_tcp.lab.gvnic.faults import Faults
from devmem_tcp.lab.gvnic.late import LatePackets
from devmem_tcp.lab.gvnic.mistakes import Mistakes
from devmem_tcp.lab.gvnic.receive import Receiver
from devmem_tcp.lab.gvnic.registers import DeviceStatus, DriverStatus, Register, RegisterFile
from devmem_tcp.lab.gvnic.state import DeviceState
from devmem_tcp.lab.gvnic.statistics import GvnicStats, QueueStats
from devmem_tcp.lab.wire import Packet, Switch

MAX_MTU: Final = 9216
MAX_QUEUES: Final = 32
_MAC_BYTES: Final = 6
_MAX_VERSION_BYTES: Final = 64
_RETRY_REPORT_S: Final = 1.0


class Gvnic:
    """A Google virtual NIC with DQO-RDA queues, header split, RSC, TSO, RSS and flow rules.

    Work is done where it arises: packets are sent, and land in the other guest's memory, before the write to the
    doorbell returns. What only time brings about (late packets, a flapping link, statistics reports) is done by
    ``tick``, which the owner calls when ``deadline_s`` has come.

    Nothing that the guest does raises: its mistakes are counted and logged (``mistakes``), and do no more harm than to
    its own packets.

    Args:
        mac: its MAC address, 6 bytes.
        queues: how many TX queues and how many RX queues it can have, 1 to MAX_QUEUES.
        mtu: the largest MTU, 68 to MAX_MTU bytes; the driver starts with it.
        dma: the guest's memory.
        switch: what it is plugged into, until ``close``.
        faults: what goes wrong with what it receives.
        name: of the port and in the log; made of the MAC address if None.
        clock: seconds, never going back.

    Raises:
        ValueError: an argument is out of range, or the switch has a port of that name.
    """

    def __init__(
        self,
        *,
        mac: bytes,
        queues: int,
        mtu: int,
        dma: DmaSpace,
        switch: Switch,
        faults: Faults,
        name: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if len(mac) != _MAC_BYTES or mac[0] & 1:
            raise ValueError(f"a MAC address of one NIC has 6 bytes, the first of them even, got {mac.hex(':')}")
        if not 1 <= queues <= MAX_QUEUES:
            raise ValueError(f"queues must be 1 to {MAX_QUEUES}, got {queues}")
        if not MIN_MTU <= mtu <= MAX_MTU:
            raise ValueError(f"mtu must be {MIN_MTU} to {MAX_MTU} bytes, got {mtu}")
        self.name: Final = name or f"gvnic-{mac.hex(':')}"
        self.faults: Final = faults
        self.mistakes: Final = Mistakes(self.name)
        self.driver_version = ""  #: as the driver spelt it
        self._switch = switch
        self._clock = clock
        self._drops: Counter[str] = Counter()
        self._resets = 0
        self._registers = RegisterFile()
        self._msix = bytearray(reg.BAR_BYTES)
        self._state = DeviceState(dma, mac=mac, queues=queues, mtu=mtu, mistakes=self.mistakes, send=self._send)
        self._adminq = AdminQueue(self._state)
        self._receiver = Receiver(self._state, faults, self._drops)
        self._late = LatePackets()
        self._flap_s: float | None = None  # when the link changes next
        self._report_s: float | None = None  # when statistics are reported next
        self.config: bytearray = pci.make_config(self.msix_vectors)
        self.bars: Mapping[int, int] = pci.BARS
        self._link_up = True
        self._closed = False
        self._power_on()
        switch.attach(self)

    def close(self) -> None:
        """Pull the device out of the switch. Idempotent."""
        if not self._closed:
            self._closed = True
            self._switch.detach(self)

    # --- towards the guest: PciFunction -----------------------------------------------------------------------------

    @property
    def msix_vectors(self) -> int:
        """One for each queue, and the management vector."""
        return self._state.vectors.count

    def set_irq(self, vector: int, eventfd: int | None) -> None:
        """Give an MSI-X vector its eventfd, which stays the caller's; None takes it away."""
        self._state.vectors.assign(vector, eventfd)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a write to PCI configuration space."""
        if not pci.write_config(self.config, offset, data):
            self.mistakes.note("config-write", f"{len(data)} bytes at {offset:#x}")

    def read_bar(self, bar: int, offset: int, size: int) -> bytes:
        """Return what the guest reads; all ones outside of the BARs, as on a PCI bus where nobody answers."""
        if not self._in_bar(bar, offset, size):
            self.mistakes.note("bar-read", f"{size} bytes at {offset:#x} of BAR {bar}")
            return b"\xff" * max(size, 0)
        if bar == reg.BAR_REGISTERS:
            self._registers[reg.ADMINQ_COUNTER] = self._adminq.counter
            return self._registers.read(offset, size)
        if bar == reg.BAR_MSIX:
            return bytes(self._msix[offset : offset + size])
        return bytes(size)  # doorbells are for writing

    def write_bar(self, bar: int, offset: int, data: bytes) -> None:
        """Take a write of the guest, and do all that follows from it."""
        if bar == reg.BAR_DOORBELLS and len(data) == reg.DOORBELL_BYTES and not offset % reg.DOORBELL_BYTES:
            ring = self._state.doorbells.get(offset // reg.DOORBELL_BYTES)
            if ring is not None:
                ring(int.from_bytes(data, "little"))
                return
        if not self._in_bar(bar, offset, len(data)) or bar == reg.BAR_DOORBELLS:
            self.mistakes.note("bar-write", f"{len(data)} bytes at {offset:#x} of BAR {bar}")
        elif bar == reg.BAR_MSIX:
            self._msix[offset : offset + len(data)] = data
        else:
            register = self._registers.written(offset, data)
            if register is None:
                self.mistakes.note("register-write", f"{len(data)} bytes at {offset:#x}")
            else:
                self._register_written(register)

    def reset(self) -> None:
        """Do a reset of the PCI function: all is as after power-on, but the link and the eventfds."""
        self.config[:] = pci.make_config(self.msix_vectors)
        self._msix[:] = bytes(reg.BAR_BYTES)
        self._power_on()

    def _in_bar(self, bar: int, offset: int, size: int) -> bool:
        return bar in self.bars and offset >= 0 and 0 < size <= self.bars[bar] - offset

    def _power_on(self) -> None:
        self._adminq.stop()
        self._state.reset()
        self._registers = RegisterFile()
        self._registers[reg.MAX_TX_QUEUES] = self._registers[reg.MAX_RX_QUEUES] = self._state.queues
        self._set_status(DeviceStatus.LINK if self._link_up else DeviceStatus(0))
        self._report_s = None
        self.driver_version = ""

    def _register_written(self, register: Register) -> None:
        value = self._registers[register]
        if register is reg.ADMINQ_DOORBELL:
            self._adminq.doorbell(value)
            if self._state.report is None:
                self._report_s = None
            elif self._report_s is None:
                self._report_s = self._clock()
        elif register is reg.DRIVER_STATUS:
            self._driver_status(DriverStatus(value & (DriverStatus.RUN | DriverStatus.RESET)))
        elif register is reg.DRIVER_VERSION and len(self.driver_version) < _MAX_VERSION_BYTES:
            self.driver_version += chr(value) if 0x20 <= value < 0x7F else ""

    def _driver_status(self, status: DriverStatus) -> None:
        """Reset, or take the admin queue that the registers name (gve_adminq_alloc, gve_adminq_release)."""
        if status & DriverStatus.RESET:
            self._resets += 1
            version = self.driver_version
            self._power_on()
            self.driver_version = version
            self._set_status(self._status | DeviceStatus.IS_RESET)
        elif status & DriverStatus.RUN:
            base = self._registers[reg.ADMINQ_BASE_HIGH] << 32 | self._registers[reg.ADMINQ_BASE_LOW]
            self._adminq.start(base, self._registers[reg.ADMINQ_LENGTH])
            self._set_status(self._status & ~DeviceStatus.IS_RESET)

    @property
    def _status(self) -> DeviceStatus:
        return DeviceStatus(self._registers[reg.DEVICE_STATUS])

    def _set_status(self, status: DeviceStatus) -> None:
        self._registers[reg.DEVICE_STATUS] = int(status)

    # --- towards the wire: Port -------------------------------------------------------------------------------------

    def deliver(self, packet: Packet) -> None:
        """Take a packet from the wire."""
        if self._link_up and len(packet.data) < ETHERNET_BYTES:
            self._drops["malformed"] += 1
        else:
            self.deliver_train((packet,))

    def deliver_train(self, packets: Sequence[Packet]) -> None:
        """Take packets from the wire, in order; each has an Ethernet header, which the switch has seen to."""
        settings = self.faults.settings
        if not self._link_up:
            self._drops["link_down"] += len(packets)
        elif not settings.touches_packets:
            self._receiver.receive(packets)
        else:
            for packet in packets:
                if packet.gso_size and settings.hits_single_packets:
                    for frame in self._receiver.cut(packet, parse(packet.data, superframe=True)):
                        self._deliver_faulty(frame)
                else:
                    self._deliver_faulty(packet)

    def _deliver_faulty(self, packet: Packet) -> None:
        now_s = self._clock()
        for due_s, arrival in self.faults.arrivals(packet, now_s):
            if due_s <= now_s:
                self._receiver.receive((arrival,))
            elif not self._late.add(due_s, arrival):
                self._drops["too_many_late"] += 1

    def _send(self, packets: Sequence[Packet]) -> None:
        if self._link_up and not self._closed:
            self._switch.send_train(self, packets)
        else:
            self._drops["tx_link_down"] += len(packets)

    # --- towards the lab --------------------------------------------------------------------------------------------

    @property
    def link_up(self) -> bool:
        return self._link_up

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it out, and tell the driver."""
        if up != self._link_up:
            self._link_up = up
            self._set_status(self._status ^ DeviceStatus.LINK)
            self._state.notify_management()

    def request_reset(self) -> None:
        """Ask the driver to reset the device, as after an error of the hardware."""
        self._set_status(self._status | DeviceStatus.RESET)
        self._state.notify_management()

    def deadline_s(self) -> float | None:
        """Return when ``tick`` has something to do, by ``clock``; None: never, as things are."""
        if not self.faults.settings.link_flap_s:
            self._flap_s = None
        elif self._flap_s is None:
            self._flap_s = self._clock() + self.faults.settings.link_flap_s
        times = [due_s for due_s in (self._late.due_s, self._flap_s, self._report_s) if due_s is not None]
        return min(times, default=None)

    def tick(self) -> None:
        """Do what the time has come for."""
        now_s = self._clock()
        for packet in self._late.pop_due(now_s):
            if self._link_up:
                self._receiver.receive((packet,))
            else:
                self._drops["link_down"] += 1
        deadline_s = self.deadline_s()
        if deadline_s is None or deadline_s > now_s:
            return
        if self._flap_s is not None and self._flap_s <= now_s:
            self._flap_s = now_s + self.faults.settings.link_flap_s
            self.faults.counts["link_flap_s"] += 1
            self.set_link(not self._link_up)
        report = self._state.report
        if report is not None and self._report_s is not None and self._report_s <= now_s:
            self._report_s = now_s + (report.interval_s if self._state.write_report() else _RETRY_REPORT_S)

    def statistics(self) -> GvnicStats:
        """Return what has been counted so far."""
        return GvnicStats(
            link_up=self._link_up,
            resets=self._resets,
            interrupts=self._state.vectors.fired,
            tx={number: QueueStats(queue.packets, queue.bytes) for number, queue in self._state.tx.items()},
            rx={
                number: QueueStats(queue.packets, queue.bytes, queue.drops, queue.drops_no_buffer, queue.posted)
                for number, queue in self._state.rx.items()
            },
            drops=dict(self._drops),
            faults=dict(self.faults.counts),
            mistakes=dict(self.mistakes.counts),
        )
