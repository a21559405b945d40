"""A hostile guest, and a hostile wire, for the gVNIC: random within reach of everything that the device looks at.

Run as a program for long: ``python tests/lab/gvnic_fuzzer.py 1000000 [SEED]``.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
import time
from random import Random
from struct import pack

from devmem_tcp.lab.crafting import Path, tcp_frame, udp_frame
from devmem_tcp.lab.dma import DmaSpace
from devmem_tcp.lab.gvnic.device import Gvnic
from devmem_tcp.lab.gvnic.faults import Faults
from devmem_tcp.lab.wire import Packet, Switch

BASE = 0x10_0000
WRITABLE = 1 << 20
READ_ONLY_BASE = BASE + WRITABLE
READ_ONLY = 1 << 16
GUARD = 1 << 16
CANARY = b"\xa5"
QUEUES = 3
RING = 64
SLOW_S = 2.0  # far above what any single input needs
PATH = Path.between("02:00:00:00:00:09", "10.0.0.9", "02:00:00:00:00:01", "10.0.0.1")

# Layouts of admin commands, for inputs that are mostly right: gve_adminq.h.
_ADMIN_SIZES = {0x1: 16, 0x2: 40, 0x5: 48, 0x6: 56, 0x7: 4, 0x8: 4, 0x9: 0, 0xA: 24, 0xB: 16, 0xC: 24, 0xD: 8, 0xE: 16}
_ADMIN_SIZES |= {0xF: 16, 0x10: 24, 0x11: 16, 0x12: 16, 0xFF: 16}


class Sink:
    """The other end of the wire: takes everything, answers nothing."""

    name = "sink"

    def deliver(self, packet: Packet) -> None:
        assert len(packet.data) <= 1 << 18


class Fuzzer:
    """One device and what is thrown at it. The guest has a writable and a read-only map, with guards around them."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.steps = 0
        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
        total = GUARD + WRITABLE + GUARD + READ_ONLY + GUARD
        os.ftruncate(fd, total)
        self.bytes = mmap.mmap(fd, total)
        self.bytes[:] = CANARY * total
        self.dma = DmaSpace()
        self.dma.map(BASE, WRITABLE, fd, GUARD, writable=True)
        self.dma.map(READ_ONLY_BASE, READ_ONLY, fd, GUARD + WRITABLE + GUARD, writable=False)
        os.close(fd)
        self.switch = Switch()
        self.sink = Sink()
        self.switch.attach(self.sink)
        self.now_s = 0.0
        self.nic = Gvnic(
            mac=PATH.dst_mac,
            queues=QUEUES,
            mtu=9000,
            dma=self.dma,
            switch=self.switch,
            faults=Faults(seed),
            clock=lambda: self.now_s,
        )
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.produced = 0
        self.set_up()

    def close(self) -> None:
        self.nic.close()
        self.dma.close()
        self.bytes.close()
        os.close(self.eventfd)

    def check(self) -> None:
        """Nothing outside of what the guest may write has changed."""
        end = GUARD + WRITABLE
        assert self.bytes[:GUARD] == CANARY * GUARD
        assert self.bytes[end:] == CANARY * (len(self.bytes) - end)

    # --- a driver that works, to get deep ---

    def set_up(self) -> None:
        """Make a working admin queue, resources and queues; rings at fixed places."""
        self.nic.write_bar(0, 0x04, pack(">I", 2))
        self.nic.write_bar(0, 0x28, pack(">H", 4096))
        self.nic.write_bar(0, 0x20, pack(">II", 0, 0)[:4])
        self.nic.write_bar(0, 0x24, pack(">I", BASE))
        self.nic.write_bar(0, 0x04, pack(">I", 1))
        self.produced = 0
        place = BASE + 0x1000
        self.command(0x2, pack(">QQIIIIB7x", place, place, 2 * QUEUES, 2 * QUEUES, 64, 0, 3))
        for queue in range(QUEUES):
            tx = (queue, 0, place, self.tx_ring(queue), 0xFFFFFFFF, queue, self.scratch(), RING, RING)
            self.command(0x5, pack(">IIQQIIQHH4x", *tx))
            rx = (queue, 0, 0, QUEUES + queue, place, self.scratch(), self.rx_ring(queue), 0xFFFFFFFF)
            sizes = (RING, self.random.choice((2048, 4096, 100)), RING)
            header = self.random.choice((0, 64, 256))
            self.command(0x6, pack(">IIIIQQQIHHHBBH2x", *rx, *sizes, self.random.randrange(2), 0, header))

    def tx_ring(self, queue: int) -> int:
        return BASE + 0x2000 + queue * 0x1000

    def rx_ring(self, queue: int) -> int:
        return BASE + 0x8000 + queue * 0x1000

    def scratch(self) -> int:
        """A place that fits a completion ring, or a packet."""
        return BASE + self.random.randrange(0x10, WRITABLE // 0x1000 - 8) * 0x1000

    def poke(self, address: int, data: bytes) -> None:
        offset = address - BASE
        assert 0 <= offset <= offset + len(data) <= WRITABLE
        self.bytes[GUARD + offset : GUARD + offset + len(data)] = data

    def command(self, opcode: int, body: bytes) -> None:
        self.poke(BASE + self.produced % 64 * 64, pack(">II", opcode, 0) + body[:56].ljust(56, b"\0"))
        self.produced = (self.produced + 1) & 0xFFFFFFFF
        self.nic.write_bar(0, 0x14, pack(">I", self.produced))

    # --- random values near what matters ---

    def address(self) -> int:
        """An address: mostly valid, sometimes at an edge, sometimes anything."""
        random = self.random
        kind = random.randrange(10)
        if kind < 6:
            return BASE + random.randrange(WRITABLE)
        if kind < 8:
            edge = random.choice((0, BASE, BASE + WRITABLE, READ_ONLY_BASE + READ_ONLY, 1 << 32, 1 << 64))
            return (edge + random.randrange(-64, 64)) % (1 << 64)
        return READ_ONLY_BASE + random.randrange(READ_ONLY) if kind == 8 else random.getrandbits(64)

    def number(self, bits: int) -> int:
        """A number: small, around a power of two, or anything."""
        random = self.random
        kind = random.randrange(3)
        if kind == 0:
            return random.randrange(8)
        if kind == 1:
            return ((1 << random.randrange(bits + 1)) + random.randrange(-2, 3)) % (1 << bits)
        return random.getrandbits(bits)

    # --- inputs ---

    def step(self) -> None:
        """Throw one input at the device."""
        self.steps += 1
        started = time.perf_counter()
        self.random.choice(_INPUTS)(self)
        assert time.perf_counter() - started < SLOW_S, "an input kept the device too long"

    def bar_access(self) -> None:
        bar, offset, size = self.random.randrange(-1, 4), self.number(13) - 8, self.random.choice((0, 1, 2, 4, 4, 8))
        assert len(self.nic.read_bar(bar, offset, size)) == size
        if bar != 0 or offset != 0x04 or not self.random.randrange(20):
            self.nic.write_bar(bar, offset, self.random.randbytes(size))

    def config_access(self) -> None:
        self.nic.write_config(self.number(9), self.random.randbytes(self.random.randrange(5)))

    def admin_command(self) -> None:
        opcode = self.random.choice((*_ADMIN_SIZES, self.number(32)))
        body = b""
        while len(body) < _ADMIN_SIZES.get(opcode, 56):
            size = self.random.choice((2, 4, 8))
            value = self.address() if size == 8 else self.number(8 * size)
            body += value.to_bytes(size, "big")
        self.command(opcode, body)

    def flow_rule(self) -> None:
        place = BASE + WRITABLE - 92 - self.random.randrange(64)
        head = pack(">HHHH", self.random.randrange(4), 0, self.random.randrange(12), self.random.randrange(QUEUES + 1))
        body = bytes(self.random.choice((0, 0, 255, 1)) for _ in range(80))
        self.poke(place, head + body + pack(">I", self.number(12)))
        self.command(0xFF, pack(">IIQ", 0x101, 92, place))

    def rss(self) -> None:
        place = BASE + 0x4_0000
        self.poke(
            place, self.random.randbytes(40) + pack(">128I", *(self.random.randrange(QUEUES + 1) for _ in range(128)))
        )
        sizes = self.random.choice((0, 40)), self.random.choice((0, 128))
        self.command(0xA, pack(">HBBHHQQ", self.number(9), 1, 0, *sizes, place, place + 40))

    def send(self) -> None:
        """Write descriptors to a TX ring, mostly of whole packets, and ring its doorbell."""
        queue = self.random.randrange(QUEUES)
        descriptors = []
        if self.random.randrange(2):
            head, rest = self.packet()
            place = self.scratch()
            self.poke(place, head + rest)
            if len(head) < 256 and self.random.randrange(2):
                mss = self.random.choice((88, 1448, self.number(14)))
                descriptors.append(pack("<IHBBBBHI", len(rest) & 0xFFFFFF, mss, len(head), 0, 5, 0, 0, 0))
            for at, size in ((place, len(head)), (place + len(head), len(rest))):
                flags = 0xC | (at != place) << 5 | self.random.randrange(2) << 6 | self.random.randrange(2) << 7
                descriptors.append(pack("<QBBHHH", at, flags, 0, 0, self.number(16), size & 0xFFFF))
        for _ in range(self.random.randrange(RING if not descriptors else 3)):
            kind = self.random.choice((4, 5, 0xC, 0xC, 0xC, 0xC, self.number(5))) | self.random.randrange(8) << 5
            descriptors.append(pack("<QBBHHH", self.address(), kind, 0, 0, self.number(16), self.number(16)))
        ring = self.tx_ring(queue)
        start = self.random.randrange(RING)
        for at, descriptor in enumerate(descriptors):
            self.poke(ring + 16 * ((start + at) % RING), descriptor)
        for tail in (start, (start + len(descriptors)) % RING, self.number(32)):
            self.ring_doorbell(2 * QUEUES + queue, tail)

    def post(self) -> None:
        """Write buffers to an RX ring, and ring its doorbell."""
        queue = self.random.randrange(QUEUES)
        for at in range(RING):
            descriptor = pack("<HHIQQQ", self.number(16), 0, 0, self.address(), self.address(), 0)
            self.poke(self.rx_ring(queue) + 32 * at, descriptor)
        self.ring_doorbell(3 * QUEUES + queue, self.random.choice((self.random.randrange(RING), self.number(32))))

    def ring_doorbell(self, index: int, value: int) -> None:
        self.nic.write_bar(2, 4 * index, pack("<I", value))

    def interrupt(self) -> None:
        self.nic.set_irq(self.random.randrange(-1, 9), self.random.choice((None, self.eventfd)))
        self.ring_doorbell(self.random.randrange(2 * QUEUES), self.number(32))

    def packet(self) -> tuple[bytes, bytes]:
        """Headers and payload of a packet, mostly valid, some bytes of the headers changed."""
        random = self.random
        make = random.choice((tcp_frame, udp_frame))
        size = random.choice((0, 1, 100, 1448, 8000, random.randrange(30_000)))
        frame = bytearray(make(PATH, random.randrange(9), random.randrange(9), bytes(size)))
        head = min(54 if make is tcp_frame else 42, len(frame))
        for _ in range(random.randrange(4)):
            frame[random.randrange(head)] = random.getrandbits(8)
        return bytes(frame[:head]), bytes(frame[head:])

    def arrive(self) -> None:
        data = b"".join(self.packet()) if self.random.randrange(8) else self.random.randbytes(self.number(10))
        mss = self.random.choice((0, 0, 1448, self.number(17)))
        if len(data) // max(mss, 1) < 500 or not mss:
            self.nic.deliver(Packet(data, mss, bool(self.random.randrange(2))))

    def fault(self) -> None:
        names = ("drop", "corrupt", "duplicate", "reorder", "delay_s")
        values: dict[str, float] = {name: self.random.choice((0, 0, 0.3)) for name in names}
        values["header_payload_bytes"] = self.number(12)
        values["unsplit_every"] = self.random.randrange(3)
        values["withheld_buffers"] = self.random.choice((0, 0, 5, 1000))
        values["link_flap_s"] = self.random.choice((0, 0, 0.5))
        self.nic.faults.set(**values)

    def pass_time(self) -> None:
        self.now_s += self.random.random() * 30
        self.nic.tick()
        self.nic.statistics()

    def start_again(self) -> None:
        if self.random.randrange(2):
            self.nic.reset()
        self.set_up()


_INPUTS = (
    *(Fuzzer.bar_access, Fuzzer.config_access, Fuzzer.interrupt, Fuzzer.fault, Fuzzer.pass_time, Fuzzer.rss),
    *(Fuzzer.admin_command,) * 4,
    *(Fuzzer.flow_rule,) * 2,
    *(Fuzzer.send,) * 6,
    *(Fuzzer.post,) * 4,
    *(Fuzzer.arrive,) * 6,
    Fuzzer.start_again,
)


def main() -> None:
    """Fuzz until the count is reached, with a fresh device every 10,000 inputs."""
    logging.disable(logging.WARNING)
    count = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    done = 0
    started = time.perf_counter()
    while done < count:
        fuzzer = Fuzzer(seed)
        try:
            for _ in range(min(10_000, count - done)):
                fuzzer.step()
        except BaseException:
            print(f"seed {seed}, step {fuzzer.steps}", file=sys.stderr)
            raise
        fuzzer.check()
        done += fuzzer.steps
        stats = fuzzer.nic.statistics()
        fuzzer.close()
        seed += 1
    print(f"{done} inputs in {time.perf_counter() - started:.0f} s; last device: {stats}")


if __name__ == "__main__":
    main()
