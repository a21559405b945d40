"""A small driver for tests: does to a Gvnic what the gve driver does, with its own idea of every layout.

Offsets and formats here are written out from the driver's headers (gve_adminq.h, gve_desc_dqo.h), not taken from the
device, so that the two can disagree.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack, pack_into, unpack_from
from types import TracebackType

from devmem_tcp.lab.crafting import Path
from devmem_tcp.lab.dma import DmaSpace
from devmem_tcp.lab.gvnic.device import Gvnic
from devmem_tcp.lab.gvnic.faults import Faults
from devmem_tcp.lab.wire import Switch

PASSED = 1
BASE = 0x10_0000
RAW = 0xFFFFFFFF
MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")
PATH4 = Path.between(MACS[0], "10.0.0.1", MACS[1], "10.0.0.2")
PATH6 = Path.between(MACS[0], "fd00::1", MACS[1], "fd00::2")
QUEUES = 4


class GuestMemory:
    """Memory of a guest in a memfd, mapped for DMA at BASE, and handed out from the start on."""

    def __init__(self, size: int = 32 << 20) -> None:
        self.size = size
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        self.bytes = mmap.mmap(fd, size)
        self.dma = DmaSpace()
        self.dma.map(BASE, size, fd, 0, writable=True)
        os.close(fd)
        self._next = 0

    def allocate(self, size: int, align: int = 4096) -> int:
        """Return the address of ``size`` zero bytes."""
        start = -(-self._next // align) * align
        self._next = start + size
        assert self._next <= self.size, "the guest needs more memory"
        return BASE + start

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        self.bytes[address - BASE : address - BASE + len(data)] = bytes(data)

    def read(self, address: int, size: int) -> bytes:
        return self.bytes[address - BASE : address - BASE + size]

    def close(self) -> None:
        self.dma.close()
        self.bytes.close()


@dataclass
class Received:
    """A packet as the driver put it together."""

    data: bytes
    header_bytes: int  # 0: not split
    packet_type: int
    status: int  # of the last completion
    errors: int
    hash: int
    segment_bytes: int
    rsc: bool
    sizes: list[int]  # what each buffer holds


class TxRing:
    def __init__(self, driver: Driver, number: int, entries: int) -> None:
        memory = driver.memory
        self.entries = entries
        self.ring = memory.allocate(16 * entries)
        self.completions = memory.allocate(8 * entries)
        self.resources = memory.allocate(64, 64)
        self.tail = 0
        self.completion_head = 0
        self.generation = 0
        body = (number, 0, self.resources, self.ring, RAW, number, self.completions, entries, entries)
        status = driver.command(0x5, pack(">IIQQIIQHH4x", *body))
        assert status == PASSED
        self.doorbell = unpack_from(">I", memory.read(self.resources, 4))[0]


class RxRing:
    def __init__(
        self, driver: Driver, number: int, entries: int, *, rsc: bool, header_bytes: int, buffer_bytes: int
    ) -> None:
        memory = driver.memory
        self.entries = entries
        self.header_bytes = header_bytes
        self.buffer_bytes = buffer_bytes
        self.buffer_ring = memory.allocate(32 * entries)
        self.completions = memory.allocate(32 * entries)
        self.resources = memory.allocate(64, 64)
        self.headers = memory.allocate(max(header_bytes, 1) * entries)
        self.pages = [memory.allocate(buffer_bytes, 64) for _ in range(entries)]
        self.free = list(range(entries))
        self.tail = 0
        self.completion_head = 0
        self.generation = 0
        self.parts: list[tuple[int, ...]] = []  # completions of a packet that is not complete
        status = driver.command(
            0x6,
            pack(
                ">IIIIQQQIHHHBBH2x",
                number, number, 0, driver.queues + number,
                self.resources, self.completions, self.buffer_ring, RAW,
                entries, buffer_bytes, entries, rsc, 0, header_bytes,
            ),
        )  # fmt: skip
        assert status == PASSED
        self.doorbell = unpack_from(">I", memory.read(self.resources, 4))[0]


class Driver:
    """Drives one device. Use as ``with``; closes the device, its memory and its eventfds."""

    def __init__(self, nic: Gvnic, memory: GuestMemory, queues: int) -> None:
        self.nic = nic
        self.memory = memory
        self.queues = queues
        self.tx: dict[int, TxRing] = {}
        self.rx: dict[int, RxRing] = {}
        self.produced = 0
        self.adminq = memory.allocate(4096)
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(nic.msix_vectors)]
        for vector, fd in enumerate(self.eventfds):
            nic.set_irq(vector, fd)
        self.tx_buffers = memory.allocate(1 << 20)
        self.tags = 0

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.nic.close()
        for fd in self.eventfds:
            os.close(fd)
        self.memory.close()

    # --- registers and commands ---

    def read32(self, offset: int) -> int:
        return int.from_bytes(self.nic.read_bar(0, offset, 4), "big")

    def write32(self, offset: int, value: int) -> None:
        self.nic.write_bar(0, offset, value.to_bytes(4, "big"))

    def ring_doorbell(self, index: int, value: int) -> None:
        self.nic.write_bar(2, 4 * index, value.to_bytes(4, "little"))

    def start_adminq(self) -> None:
        self.produced = 0
        self.nic.write_bar(0, 0x28, (4096).to_bytes(2, "big"))
        self.write32(0x20, self.adminq >> 32)
        self.write32(0x24, self.adminq & 0xFFFFFFFF)
        self.write32(0x04, 1)

    def command(self, opcode: int, body: bytes = b"") -> int:
        """Run one admin command; return its status."""
        place = self.adminq + self.produced % 64 * 64
        self.memory.write(place, pack(">II", opcode, 0) + body.ljust(56, b"\0"))
        self.produced += 1
        self.write32(0x14, self.produced)
        assert self.read32(0x18) == self.produced
        return int.from_bytes(self.memory.read(place + 4, 4), "big")

    def start(self) -> None:
        """Do what probing does, up to the notify blocks."""
        self.start_adminq()
        self.blocks = self.memory.allocate(64 * 2 * self.queues)
        self.counters = self.memory.allocate(4 * 2 * self.queues)
        body = pack(">QQIIIIB7x", self.counters, self.blocks, 2 * self.queues, 2 * self.queues, 64, 0, 3)
        assert self.command(0x2, body) == PASSED

    def open(
        self,
        *,
        entries: int = 256,
        rsc: bool = True,
        header_bytes: int = 0,
        buffer_bytes: int = 4096,
        post: bool = True,
    ) -> None:
        """Make all queues, give them buffers, enable their interrupts."""
        for number in range(self.queues):
            self.tx[number] = TxRing(self, number, entries)
        for number in range(self.queues):
            self.rx[number] = RxRing(
                self, number, entries, rsc=rsc, header_bytes=header_bytes, buffer_bytes=buffer_bytes
            )
            if post:
                self.post(number, entries - 32)
        for block in range(2 * self.queues):
            self.enable(block)

    def destroy_queues(self) -> None:
        """Take all queues down."""
        for number in self.tx:
            assert self.command(0x7, pack(">I", number)) == PASSED
        for number in self.rx:
            assert self.command(0x8, pack(">I", number)) == PASSED
        self.tx.clear()
        self.rx.clear()

    # --- interrupts ---

    def enable(self, block: int) -> None:
        index = unpack_from(">I", self.memory.read(self.blocks + 64 * block, 4))[0]
        self.ring_doorbell(index, 1 | 3 << 3)

    def interrupts(self, vector: int) -> int:
        """Return and forget how often a vector has fired."""
        try:
            return os.eventfd_read(self.eventfds[vector])
        except BlockingIOError:
            return 0

    # --- receive ---

    def post(self, queue: int, count: int) -> None:
        """Post buffers, and ring the doorbell."""
        ring = self.rx[queue]
        for _ in range(count):
            page = ring.free.pop(0)
            header = ring.headers + ring.header_bytes * ring.tail if ring.header_bytes else 0
            descriptor = pack("<HHIQQQ", page, 0, 0, ring.pages[page], header, 0)
            self.memory.write(ring.buffer_ring + 32 * ring.tail, descriptor)
            ring.tail = (ring.tail + 1) % ring.entries
        self.ring_doorbell(ring.doorbell, ring.tail)

    def receive(self, queue: int) -> list[Received]:
        """Take all whole packets of a queue; their buffers are free again, but not posted."""
        ring = self.rx[queue]
        packets: list[Received] = []
        while True:
            place = ring.completions + 32 * ring.completion_head
            raw = self.memory.read(place, 32)
            kind, errors, packet_type, length, header, status, _, _, page, segment, value = unpack_from(
                "<BBHHHBBHHHI", raw
            )
            if length >> 14 & 1 == ring.generation:
                return packets
            assert kind == 1
            assert status & 1
            assert length >> 15 == 0
            ring.parts.append((page, length & 0x3FFF, header, ring.completion_head))
            ring.free.append(page)
            ring.completion_head = (ring.completion_head + 1) % ring.entries
            ring.generation ^= ring.completion_head == 0
            if status & 2:
                packets.append(self._assemble(ring, packet_type, status, errors, value, segment))

    def _assemble(self, ring: RxRing, packet_type: int, status: int, errors: int, value: int, segment: int) -> Received:
        data = b""
        header_bytes = 0
        for position, (page, size, header, index) in enumerate(ring.parts):
            if header >> 11 & 1:
                assert position == 0, "only the first buffer of a packet has a header"
                header_bytes = header & 0x3FF
                # the driver finds headers by the completion's index (gve_rx_dqo)
                data = self.memory.read(ring.headers + ring.header_bytes * index, header_bytes)
            assert size <= ring.buffer_bytes
            data += self.memory.read(ring.pages[page], size)
        rsc = bool(ring.parts[-1][2] >> 10 & 1)
        sizes = [size for _, size, _, _ in ring.parts]
        ring.parts = []
        return Received(data, header_bytes, packet_type, status, errors, value, segment, rsc, sizes)

    # --- transmit ---

    def put_packet(
        self,
        queue: int,
        frame: bytes,
        *,
        checksum: bool = True,
        mss: int = 0,
        header_bytes: int = 0,
        pieces: Sequence[int] = (),
        report: bool = False,
        ring: bool = True,
    ) -> int:
        """Put a packet in the ring, in pieces of these sizes (the last takes the rest); return its completion tag."""
        tag = self.tags = (self.tags + 1) % 0x7FFF
        if mss:
            total = len(frame) - header_bytes
            self._descriptor(queue, pack("<IHBBBBHI", total, mss, header_bytes, 0, 0x25, 0, 0, 0))
        self._descriptor(queue, pack("<QBBHI", 0, 0x4, 0, 0, 0))
        self.memory.write(self.tx_buffers, frame)
        sizes = [size for size in pieces if size]
        rest = len(frame) - sum(sizes)
        while rest > 0:
            sizes.append(min(rest, 16383))
            rest -= sizes[-1]
        start = self.tx_buffers
        for number, size in enumerate(sizes):
            last = number == len(sizes) - 1
            flags = 0xC | last << 5 | checksum << 6 | (report and last) << 7
            self._descriptor(queue, pack("<QBBHHH", start, flags, 0, 0, tag, size))
            start += size
        if ring:
            self.ring_doorbell(self.tx[queue].doorbell, self.tx[queue].tail)
        return tag

    def _descriptor(self, queue: int, data: bytes) -> None:
        ring = self.tx[queue]
        assert len(data) == 16
        self.memory.write(ring.ring + 16 * ring.tail, data)
        ring.tail = (ring.tail + 1) % ring.entries

    def completions(self, queue: int) -> list[tuple[int, int]]:
        """Take all TX completions: (type, tag or head)."""
        ring = self.tx[queue]
        found: list[tuple[int, int]] = []
        while True:
            word, value = unpack_from("<HH", self.memory.read(ring.completions + 8 * ring.completion_head, 4))
            if word >> 15 == ring.generation:
                return found
            assert word & 0x7FF == queue
            found.append((word >> 11 & 7, value))
            ring.completion_head = (ring.completion_head + 1) % ring.entries
            ring.generation ^= ring.completion_head == 0


class Pair:
    """Two devices on one wire, and a driver for each; ``a`` sends in these tests."""

    def __init__(self, driver: type[Driver] = Driver) -> None:
        switch = Switch()
        memories = GuestMemory(), GuestMemory()
        self.now_s = 0.0
        self.a, self.b = (
            driver(
                Gvnic(
                    mac=bytes.fromhex(mac.replace(":", "")),
                    queues=QUEUES,
                    mtu=9000,
                    dma=memory.dma,
                    switch=switch,
                    faults=Faults(),
                    clock=lambda: self.now_s,
                ),
                memory,
                QUEUES,
            )
            for mac, memory in zip(MACS, memories, strict=True)
        )

    def open(self, **options: int) -> None:
        for driver in (self.a, self.b):
            driver.start()
        self.a.open(rsc=False)
        self.b.open(**{"rsc": False, **options})  # type: ignore[arg-type]  # each option's own type is bool or int

    def carry(self, frame: bytes, **options: int) -> list[tuple[int, Received]]:
        """Send a frame from ``a`` and return what ``b`` received: (queue, packet)."""
        tag = self.a.put_packet(0, frame, **options)  # type: ignore[arg-type]
        assert (2, tag) in self.a.completions(0)
        return self.received()

    def carry_one(self, frame: bytes, **options: int) -> Received:
        ((_, packet),) = self.carry(frame, **options)
        return packet

    def received(self) -> list[tuple[int, Received]]:
        found = [(queue, packet) for queue in range(QUEUES) for packet in self.b.receive(queue)]
        for queue in range(QUEUES):
            self.b.post(queue, min(len(self.b.rx[queue].free) - 32, 200))
        return found


def payload(size: int) -> bytes:
    return bytes(index * 7 + (index >> 8) & 0xFF for index in range(size))


def flow_rule(
    flow_type: int,
    queue: int,
    *,
    src: bytes = b"",
    dst: bytes = b"",
    sport: int = 0,
    dport: int = 0,
    src_mask: bytes | None = None,
    dst_mask: bytes | None = None,
) -> bytes:
    """Return struct gve_adminq_flow_rule for exact matches of what is given."""
    key, mask = bytearray(40), bytearray(40)
    for place, address, address_mask in ((0, src, src_mask), (16, dst, dst_mask)):
        key[place : place + len(address)] = address
        bits = b"\xff" * len(address) if address_mask is None else address_mask
        mask[place : place + len(bits)] = bits
    pack_into(">HH", key, 32, sport, dport)
    pack_into(">HH", mask, 32, 0xFFFF * bool(sport), 0xFFFF * bool(dport))
    return pack(">HH", flow_type, queue) + bytes(key) + bytes(mask)


def set_flow_rule(driver: Driver, change: int, rule: bytes = bytes(84), location: int = 0) -> int:
    """Run the extended command that changes flow rules; return its status."""
    place = driver.memory.allocate(92, 64)
    driver.memory.write(place, pack(">HH", change, 0) + rule + pack(">I", location))
    return driver.command(0xFF, pack(">IIQ", 0x101, 92, place))
