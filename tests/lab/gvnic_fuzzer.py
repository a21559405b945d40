"""A hostile guest, and a hostile wire, for the gVNIC: anything within reach of what the device looks at.

An input is one access of registers or configuration space, one admin command, one ring written with descriptors and
its doorbell rung, one packet that arrives, one change of faults, eventfds or time, or one reset. What must hold besides
what ``fuzz_judge`` says of every subject: guards around the guest's memory, and memory mapped read-only, keep every
byte; after a reset a driver that does it right sends and receives a packet.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from struct import pack
from typing import Final

from choices import Choices
from devmem_tcp.lab.crafting import Path, tcp_frame, udp_frame
from devmem_tcp.lab.gvnic.device import Gvnic
from devmem_tcp.lab.gvnic.faults import Faults, FaultSettings
from devmem_tcp.lab.wire import Packet, Switch
from fuzz_judge import JudgedSpace, run_case
from gvnic_driver import BASE, RAW, Driver, GuestMemory, flow_rule, payload

WRITABLE: Final = 4 << 20
READ_ONLY_BASE: Final = BASE + WRITABLE
READ_ONLY: Final = 1 << 14
GUARD: Final = 1 << 14
CANARY: Final = b"\xa5"
QUEUES: Final = 3
ENTRIES: Final = 64  # of the rings that the driver makes
BIG_RINGS: Final = BASE + (3 << 20)  # room for larger ones, of each queue; the driver's own memory ends before
BIG_RING_BYTES: Final = 1 << 16
PACKET_PLACE: Final = BASE + (3 << 20) + (1 << 19)  # of a packet to send, of a rule, of a table
MAX_PACKET_BYTES: Final = 1 << 18
MACS: Final = ("02:00:00:00:00:09", "02:00:00:00:00:01")
PATH: Final = Path.between(MACS[0], "10.0.0.9", MACS[1], "10.0.0.1")
PATH6: Final = Path.between(MACS[0], "fd00::9", MACS[1], "fd00::1")

# How many bytes of fields admin commands have, so that most of them are mostly right: gve_adminq.h.
_ADMIN_BYTES: Final = dict(
    zip(
        (0x1, 0x2, 0x5, 0x6, 0x7, 0x8, 0x9, 0xA, 0xB, 0xC, 0xD, 0xE, 0xF, 0x10, 0x11, 0x12, 0xFF),
        (16, 40, 48, 56, 4, 4, 0, 24, 16, 24, 8, 16, 16, 24, 16, 16, 16),
        strict=True,
    )
)
_REGISTERS: Final = ((0x14, 4), (0x04, 4), (0x18, 4), (0x1F, 1), (0x20, 4), (0x24, 4), (0x28, 2))  # gve_register.h
_TAKING_DOWN: Final = (0x7, 0x8, 0x9)
_ADMIN_OPCODES: Final = tuple(opcode for opcode in _ADMIN_BYTES if opcode not in _TAKING_DOWN) * 4 + _TAKING_DOWN


class Sink:
    """The other end of the wire: takes everything, answers nothing, and remembers the last."""

    name = "sink"
    last = b""

    def deliver(self, packet: Packet) -> None:
        assert len(packet.data) < MAX_PACKET_BYTES
        self.last = bytes(packet.data)


class GuardedMemory(GuestMemory):
    """Memory of a guest: a writable map at BASE, right behind it a read-only one, each with guards around it."""

    def __init__(self) -> None:  # instead of the other's, which maps all of its file
        self.size = WRITABLE
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(fd, GUARD + WRITABLE + GUARD + READ_ONLY + GUARD)
        self.bytes = mmap.mmap(fd, WRITABLE, offset=GUARD)
        self.judged = JudgedSpace(fd)
        self.dma = self.judged
        self.dma.map(BASE, WRITABLE, fd, GUARD, writable=True)
        self.dma.map(READ_ONLY_BASE, READ_ONLY, fd, GUARD + WRITABLE + GUARD, writable=False)
        os.close(fd)
        self._next = 0
        for place in self._guards():
            self.judged.whole[place] = CANARY * (place.stop - place.start)

    def _guards(self) -> tuple[slice, slice]:
        return slice(0, GUARD), slice(GUARD + WRITABLE, self.judged.size_bytes)

    def check(self) -> None:
        """Check that nothing outside of what the guest may write has changed."""
        for place in self._guards():
            assert self.judged.whole[place] == CANARY * (place.stop - place.start), "a guard or read-only byte changed"

    def start_again(self) -> None:
        """Hand out everything anew."""
        self._next = 0

    def allocate(self, size: int, align: int = 4096) -> int:
        address = super().allocate(size, align)
        self.write(address, bytes(size))
        return address


class HostileGuest:
    """A guest that does what its choices say to one device, and a wire that does the same."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.memory = GuardedMemory()
        self.switch = Switch()
        self.sink = Sink()
        self.switch.attach(self.sink)
        self.now_s = 0.0
        self.nic = Gvnic(
            mac=PATH.dst_mac,
            queues=QUEUES,
            mtu=9000,
            dma=self.memory.dma,
            switch=self.switch,
            faults=Faults(),
            clock=lambda: self.now_s,
        )
        self.driver = Driver(self.nic, self.memory, QUEUES)
        self.received = 0  #: packets that queues took which are gone
        self.set_up()

    def step(self) -> None:
        """Throw one input at the device."""
        self.choices.one_of(_INPUTS)(self)

    def finish(self) -> None:
        """Check that the device works after a reset, and that nothing outside of the guest's memory has changed."""
        self.nic.faults.settings = FaultSettings()
        self.nic.set_link(True)
        self.now_s += 1000.0
        self.nic.tick()  # what was late, and a report if there is one to write
        self.note_received()
        self.nic.reset()
        self.memory.start_again()
        driver = self.driver
        driver.start()
        driver.open(entries=ENTRIES)

        frame, reply = tcp_frame(PATH, 5, 6, payload(1000)), udp_frame(PATH.back(), 6, 5, payload(900))
        self.switch.send(self.sink, Packet(frame))  # may not arrive, if the switch was told lies, which this corrects
        tag = driver.put_packet(1, reply, pieces=(42,))
        assert (2, tag) in driver.completions(1)
        assert self.sink.last == reply, "a packet did not leave as it was sent"
        self.switch.send(self.sink, Packet(frame))
        received = [packet.data for queue in range(QUEUES) for packet in driver.receive(queue)]
        assert received in ([frame], [frame, frame]), "a packet was not received as it came"
        self.memory.check()

    def count(self, tally: Counter[str]) -> None:
        stats = self.nic.statistics()
        counters = self.switch.counters[self.nic]
        tally["guest mistakes"] += sum(stats.mistakes.values())
        tally["packets to the wire"] += counters.sent_packets
        tally["packets received"] += self.received
        tally["memory accesses"] += self.memory.judged.accesses
        tally["memory accesses refused"] += self.memory.judged.refusals

    def note_received(self) -> None:
        """Count what the queues have received, which their end makes forget."""
        self.received += sum(queue.packets for queue in self.nic.statistics().rx.values())

    def close(self) -> None:
        self.driver.__exit__(None, None, None)

    def set_up(self) -> None:
        """Reset, and make resources and queues as a driver does, so that inputs get deep."""
        self.memory.start_again()
        driver, choices = self.driver, self.choices
        driver.start()
        buffer_bytes, header_bytes = choices.one_of((4096, 2048, 2048, 100)), choices.one_of((0, 64, 256))
        rsc = bool(choices.integer(0, 1))
        driver.open(entries=ENTRIES, rsc=rsc, header_bytes=header_bytes, buffer_bytes=buffer_bytes)
        self.tx_rings = [(driver.tx[queue].ring, ENTRIES) for queue in range(QUEUES)]
        self.rx_rings = [(driver.rx[queue].buffer_ring, ENTRIES) for queue in range(QUEUES)]
        self.rx_tails = [driver.rx[queue].tail for queue in range(QUEUES)]

    def command(self, opcode: int, body: bytes) -> None:
        """Do an admin command, whatever has become of the admin queue meanwhile."""
        driver = self.driver
        done = driver.read32(0x18)
        self.memory.write(driver.adminq + done % 64 * 64, pack(">II", opcode, 0) + body[:56].ljust(56, b"\0"))
        driver.write32(0x14, (done + 1) & 0xFFFFFFFF)

    # --- values near what matters ---

    def address(self) -> int:
        """Choose an address: mostly valid, sometimes at an edge, sometimes anything."""
        choices = self.choices
        kind = choices.integer(0, 9)
        if kind < 6:
            return BASE + choices.integer(0, WRITABLE - 1)
        if kind < 8:
            edge = choices.one_of((0, BASE, READ_ONLY_BASE, READ_ONLY_BASE + READ_ONLY, 1 << 32, 1 << 64))
            return (edge + choices.integer(-64, 63)) % (1 << 64)
        return READ_ONLY_BASE + choices.integer(0, READ_ONLY - 1) if kind == 8 else self.anything(64)

    def number(self, bits: int) -> int:
        """Choose a number: small, around a power of two, or anything."""
        kind = self.choices.integer(0, 2)
        if kind == 0:
            return self.choices.integer(0, 7) % (1 << bits)
        if kind == 1:
            return ((1 << self.choices.integer(0, bits)) + self.choices.integer(-2, 2)) % (1 << bits)
        return self.anything(bits)

    def anything(self, bits: int) -> int:
        """Choose any number of so many bits."""
        return self.choices.integer(0, (1 << bits) - 1)

    # --- inputs: registers and commands ---

    def access_bar(self) -> None:
        choices = self.choices
        if choices.once_in(2):
            bar, (offset, size) = 0, choices.one_of(_REGISTERS)
        else:
            bar, size = choices.one_of((0, 1, 2, -1, 3)), choices.one_of((4, 8, 1, 2, 0))
            offset = choices.one_of((0, 4096, self.number(12))) - choices.integer(0, 8)
        assert len(self.nic.read_bar(bar, offset, size)) == size
        if (bar, offset) != (0, 0x04) or choices.once_in(20):
            self.nic.write_bar(bar, offset, self.number(8 * size).to_bytes(size, "big"))

    def write_config(self) -> None:
        self.nic.write_config(self.number(9), self.choices.data(self.choices.integer(0, 4)))

    def run_command(self) -> None:
        opcode = self.number(32) if self.choices.once_in(16) else self.choices.one_of(_ADMIN_OPCODES)
        body = b""
        while len(body) < _ADMIN_BYTES.get(opcode, 56):
            size = self.choices.one_of((4, 8, 2))
            value = self.address() if size == 8 else self.number(8 * size)
            body += value.to_bytes(size, "big")
        self.command(opcode, body)

    def remake_queue(self) -> None:
        """Take a queue down and make it again, of any size and mostly at a place that fits."""
        choices = self.choices
        queue = choices.integer(0, QUEUES - 1)
        entries, completions = choices.one_of((64, 8, 512, 2048)), choices.one_of((64, 8, 512, 2048))
        place = BIG_RINGS + 2 * BIG_RING_BYTES * queue
        ring, done = place, self.address() if choices.once_in(8) else place + BIG_RING_BYTES
        resources = self.driver.blocks + choices.integer(0, 255)
        if choices.once_in(2):
            self.command(0x7, pack(">I", queue))
            body = pack(">IIQQIIQHH4x", queue, 0, resources, ring, RAW, queue, done, entries, completions)
            self.command(0x5, body)
            self.tx_rings[queue] = ring, entries
            return
        self.command(0x8, pack(">I", queue))
        head = pack(">IIIIQQQI", queue, queue, 0, QUEUES + queue, resources, done, ring, RAW)
        buffer_bytes, header_bytes = choices.one_of((2048, 4096, 16383, 100, 1)), choices.one_of((0, 64, 256, 1023))
        tail = pack(">HHHBBH2x", completions, buffer_bytes, entries, choices.integer(0, 1), 0, header_bytes)
        self.command(0x6, head + tail)
        self.rx_rings[queue] = ring, entries
        self.rx_tails[queue] = 0

    def change_flow_rules(self) -> None:
        choices = self.choices
        change, flow_type, queue = choices.integer(0, 3), choices.integer(0, 11), choices.integer(0, QUEUES)
        path, keys = choices.one_of((PATH, PATH6)), choices.data(4)
        if choices.once_in(4):
            rule = pack(">HH", flow_type, queue) + keys * 20
        else:
            src, dst = choices.one_of((path.src, b"")), choices.one_of((path.dst, b""))
            mask = choices.one_of((None, b"\xff\xff\xff", keys))
            sport, dport = choices.integer(0, 8), choices.integer(0, 8)
            rule = flow_rule(flow_type, queue, src=src, dst=dst, sport=sport, dport=dport, src_mask=mask)
        self.memory.write(PACKET_PLACE, pack(">HH", change, 0) + rule + pack(">I", self.number(12)))
        self.command(0xFF, pack(">IIQ", 0x101, 92, PACKET_PLACE))

    def ask_for_reports(self) -> None:
        size = self.choices.one_of((4096, 1024, 64, 0))
        self.command(0xC, pack(">QQQ", size, self.address(), self.number(16)))

    def change_rss(self) -> None:
        choices = self.choices
        table = [byte & 3 if choices.once_in(8) else byte % QUEUES for byte in choices.data(4)] * 32
        self.memory.write(PACKET_PLACE, choices.data(4) * 10 + pack(">128I", *table))
        sizes = choices.one_of((40, 0)), choices.one_of((128, 0))
        self.command(0xA, pack(">HBBHHQQ", self.number(9), 1, 0, *sizes, PACKET_PLACE, PACKET_PLACE + 40))

    # --- inputs: data ---

    def send(self) -> None:
        """Write descriptors to a TX ring, mostly of whole packets, and ring its doorbell."""
        choices = self.choices
        queue = choices.integer(0, QUEUES - 1)
        descriptors = self.packet_descriptors() if choices.once_in(2) else []
        ring, entries = self.tx_rings[queue]
        for _ in range(choices.integer(0, 3)):
            kind = choices.one_of((0xC, 0xC, 0xC, 4, 5, 0, 31)) | choices.integer(0, 7) << 5
            descriptor = pack("<QBBHHH", self.address(), kind, 0, 0, choices.integer(0, 255), self.number(16))
            descriptors += [descriptor] * choices.one_of((1, 1, 1, 1, 1, 2, 60, 500))
        start = choices.integer(0, entries - 1)
        for at, descriptor in enumerate(descriptors):
            self.memory.write(ring + 16 * ((start + at) % entries), descriptor)
        tails = [start, (start + len(descriptors)) % entries]
        for tail in [*tails, self.number(32)] if choices.once_in(4) else tails:
            self.driver.ring_doorbell(2 * QUEUES + queue, tail)

    def packet_descriptors(self) -> list[bytes]:
        """Place a packet in memory and return descriptors that send it, with TSO or without."""
        choices = self.choices
        head, rest = self.packet()
        self.memory.write(PACKET_PLACE, head + rest)
        descriptors = []
        if choices.once_in(2):
            mss = choices.one_of((1448, 88, self.number(14)))
            descriptors.append(pack("<IHBBBBHI", len(rest) & 0xFFFFFF, mss, len(head), 0, 5, 0, 0, 0))
        place, sizes = PACKET_PLACE, [len(head)] + [min(len(rest) - at, 16383) for at in range(0, len(rest), 16383)]
        for number, size in enumerate(sizes, 1):
            flags = 0xC | (number == len(sizes)) << 5 | choices.integer(0, 3) << 6
            descriptors.append(pack("<QBBHHH", place, flags, 0, 0, choices.integer(0, 255), size))
            place += size
        return descriptors

    def post(self) -> None:
        """Write buffers to an RX ring, and ring its doorbell."""
        choices = self.choices
        queue = choices.integer(0, QUEUES - 1)
        ring, entries = self.rx_rings[queue]
        first = choices.integer(0, entries - 1) if choices.once_in(8) else self.rx_tails[queue]
        count, step = choices.one_of((16, 4, 64, 300)), choices.one_of((4096, 0, 64))
        address, header = self.address(), self.address()
        for at in range(count):
            descriptor = pack("<HHIQQQ", at, 0, 0, (address + at * step) % (1 << 64), header, 0)
            self.memory.write(ring + 32 * ((first + at) % entries), descriptor)
        tail = self.number(32) if choices.once_in(8) else (first + count) % entries
        self.driver.ring_doorbell(3 * QUEUES + queue, tail)
        self.rx_tails[queue] = tail % entries

    def packet(self) -> tuple[bytes, bytes]:
        """Choose headers and payload of a packet, mostly valid, some bytes of the headers changed."""
        choices = self.choices
        path, make = choices.one_of((PATH, PATH6)), choices.one_of((tcp_frame, udp_frame))
        size = choices.one_of((100, 1448, 8000, 0, 1, choices.integer(0, 30_000)))
        if make is tcp_frame and choices.once_in(64):
            size = choices.one_of((70_000, 250_000))
        frame = bytearray(make(path, choices.integer(0, 8), choices.integer(0, 8), bytes(size)))
        head = len(frame) - size
        between = choices.integer(0, 7)
        if between == 7:
            frame[12:12] = b"\x81\0\0\5"  # a VLAN tag
            head += 4
        elif between == 6 and path is PATH6:
            frame[54:54] = bytes((frame[20], *bytes(7)))  # an extension header of 8 bytes
            frame[20] = choices.one_of((0, 43, 44, 51, 60))
            frame[18:20] = ((len(frame) - 54) & 0xFFFF).to_bytes(2, "big")
            head += 8
        for _ in range(choices.one_of((0, 0, 1, 3))):
            frame[choices.integer(0, head - 1)] = choices.integer(0, 255)
        return bytes(frame[:head]), bytes(frame[head:])

    def arrive(self) -> None:
        """Let packets come from the wire, or superframes of at most some hundred segments: more take their time."""
        choices = self.choices
        data = choices.data(choices.integer(0, 24)) if choices.once_in(8) else b"".join(self.packet())
        mss = choices.one_of((0, 0, 1448, self.number(17)))
        least = 1 if choices.once_in(200) else len(data) // 300 + 1
        packet = Packet(data, max(mss, least) if mss else 0, not choices.integer(0, 1))
        self.switch.send_train(self.sink, [packet] * choices.one_of((1, 1, 1, 2, 3, 1 if mss else 40)))

    # --- inputs: the rest ---

    def interrupt(self) -> None:
        choices = self.choices
        self.nic.set_irq(choices.integer(-1, 8), choices.one_of((self.driver.eventfds[0], None)))
        self.driver.ring_doorbell(choices.integer(0, 2 * QUEUES - 1), self.number(32))

    def change_faults(self) -> None:
        choices = self.choices
        names = ("drop", "corrupt", "duplicate", "reorder", "delay_s")
        values: dict[str, float] = {name: choices.one_of((0.0, 0.0, 0.3)) for name in names}
        values["header_payload_bytes"] = self.number(12)
        values["unsplit_every"] = choices.integer(0, 2)
        values["withheld_buffers"] = choices.one_of((0, 0, 0, 0, 0, 0, 5, 1000))
        values["link_flap_s"] = choices.one_of((0.0, 0.0, 0.0, 0.5))
        values["rate_bps"] = choices.one_of((0, 0, 0, 1_000_000))
        self.nic.faults.set(**values)

    def pass_time(self) -> None:
        self.now_s += self.choices.integer(0, 255) / 8
        self.nic.tick()
        self.nic.statistics()
        self.nic.set_link(not self.choices.once_in(4))

    def start_again(self) -> None:
        """Reset, by the register or as the bus does, and mostly make queues again."""
        self.note_received()
        kind = self.choices.integer(0, 2)
        if kind != 1:
            self.driver.write32(0x04, 2)
        if kind != 0:
            self.nic.reset()
        if not self.choices.once_in(16):
            self.set_up()


_INPUTS: Final = (
    *(HostileGuest.send,) * 6,
    *(HostileGuest.arrive,) * 6,
    *(HostileGuest.post,) * 4,
    *(HostileGuest.run_command,) * 4,
    *(HostileGuest.change_flow_rules, HostileGuest.remake_queue) * 2,
    *(HostileGuest.access_bar, HostileGuest.write_config, HostileGuest.interrupt, HostileGuest.change_rss),
    *(HostileGuest.ask_for_reports, HostileGuest.change_faults, HostileGuest.pass_time, HostileGuest.start_again),
)


def run(case: bytes, tally: Counter[str]) -> None:
    """Run one case; see ``run_case``."""
    run_case(HostileGuest, case, tally)
