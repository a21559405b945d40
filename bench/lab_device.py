"""What the lab's NIC costs: CPU time of the device for each packet, without a guest.

Two devices on one switch, and for each a small driver that does what gve does. What is timed is the device alone, from
a write to a doorbell to its end: descriptors read, the packet gathered, carried and steered, its checksum filled in,
headers and payload written where they belong, completions, interrupts. The other half of a packet's cost in a lab, the
messages by which QEMU passes doorbells on, is in what lab.py measures.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from struct import pack
from typing import Final

import click
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "lab"))

from devmem_tcp.lab.crafting import tcp_frame
from gvnic_driver import PASSED, PATH4, Driver, Pair, payload
from loopback import MIB

TIMESTAMPS: Final = bytes(12)  # the TCP options of nearly every connection: 66 bytes of headers over IPv4
HEADER_BYTES: Final = 66
ETHERNET_BYTES: Final = 14
PORTS: Final = (40000, 5201)
SUPERFRAME_BYTES: Final = 60_000  # of payload
RING_ENTRIES: Final = 512
SPARE_BUFFERS: Final = 32

PACKETS_A_SAMPLE: Final = 128
TRAIN: Final = 64  # packets at one doorbell, when hot
BURST: Final = 8
COLD_MIB: Final = 4  # more than a processor's own caches hold

LIMITS_US: Final = {"frame 1500, bursts": 15.0, "superframe, whole, bursts": 120.0}
"""What is promised of each packet, or superframe."""


def clock_ns() -> int:
    """Return what reading the clock, a system call, adds to every span of CPU time."""
    times = [time.process_time_ns() for _ in range(1000)]
    return int(statistics.median(after - before for before, after in pairwise(times)))


CLOCK_NS: Final = clock_ns()


class TimedDriver(Driver):
    """A driver that knows how much CPU time its device has taken."""

    device_ns = 0

    def ring_doorbell(self, index: int, value: int) -> None:
        start = time.process_time_ns()
        super().ring_doorbell(index, value)
        self.device_ns += time.process_time_ns() - start - CLOCK_NS


@dataclass(frozen=True)
class Case:
    """What is sent, how it is received, how many at a time.

    ``mss`` 0 is a plain frame. ``cold``: before each doorbell the caches are filled with something else, which is what
    a guest does to the device; otherwise the device has them to itself, but for the driver.
    """

    name: str
    frame: bytes
    at_once: int
    cold: bool
    mss: int = 0
    rsc: bool = False
    mtu: int = 9000


class Row(msgspec.Struct, frozen=True):
    """One case: microseconds of CPU for each packet or superframe, over the rounds."""

    name: str
    bytes: int
    at_once: int
    us: float
    us_least: float
    us_most: float


class Limit(msgspec.Struct, frozen=True):
    """One promise about cost: ``value`` against ``bar``, in microseconds."""

    name: str
    value: float
    bar: float
    holds: bool


def cases() -> list[Case]:
    """List everything that is measured."""
    found = []
    for cold, pace in ((False, "hot"), (True, "bursts")):
        at_once = BURST if cold else TRAIN
        for size in (64, 1500, 9000):
            found.append(Case(f"frame {size}, {pace}", plain_frame(size), at_once, cold))
        superframe = tcp_frame(PATH4, *PORTS, payload(SUPERFRAME_BYTES), options=TIMESTAMPS)
        at_once = 1 if cold else 4
        for mss, mtu in ((1448, 1500), (8948, 9000)):
            found.append(Case(f"superframe, cut to {mss}, {pace}", superframe, at_once, cold, mss, mtu=mtu))
        found.append(Case(f"superframe, whole, {pace}", superframe, at_once, cold, 1448, rsc=True))
    found.append(Case("frame 64, alone", plain_frame(64), 1, cold=True))
    return found


def plain_frame(size: int) -> bytes:
    """Return a TCP frame of so many bytes from IP's header on."""
    return tcp_frame(PATH4, *PORTS, payload(size - HEADER_BYTES + ETHERNET_BYTES), options=TIMESTAMPS)


class Lane:
    """One case, set up: a sender, a receiver, and something to fill the caches with.

    Lifetime: holds two devices and the memory of two guests until ``close``.
    """

    def __init__(self, case: Case) -> None:
        self.case: Final = case
        self._pair: Final = Pair(TimedDriver)
        self._held = ExitStack()
        self._held.enter_context(self._pair.a)
        self._held.enter_context(self._pair.b)
        self._pair.open(entries=RING_ENTRIES, rsc=case.rsc, header_bytes=256)
        if self._pair.b.command(0xB, pack(">I4xQ", 1, case.mtu)) != PASSED:
            raise RuntimeError(f"the device refuses an MTU of {case.mtu}")
        self._other = np.zeros(COLD_MIB * MIB // 8, np.uint64)
        self._pair.b.put_packet(0, tcp_frame(PATH4.back(), PORTS[1], PORTS[0]))  # the switch is to know both
        ((self._queue, _),) = self._pair.carry(tcp_frame(PATH4, *PORTS))  # RSS keeps one flow on one queue

    def close(self) -> None:
        self._held.close()

    def warm_up(self) -> None:
        """Go once round the ring, so that no page of the guests' memory is touched for the first time later."""
        for _ in range(RING_ENTRIES // PACKETS_A_SAMPLE + 1):
            self.sample()

    def sample(self) -> float:
        """Send packets, and return the microseconds of the devices' CPU time for each."""
        if not self.case.cold:
            self._send()
        before = self._device_ns()
        packets = 0
        while packets < PACKETS_A_SAMPLE:
            self._send()
            packets += self.case.at_once
        return (self._device_ns() - before) / packets / 1e3

    def _device_ns(self) -> int:
        return sum(driver.device_ns for driver in (self._pair.a, self._pair.b) if isinstance(driver, TimedDriver))

    def _send(self) -> None:
        """Send as many as go at once, take them out at the other end, give the buffers back."""
        case, a, b = self.case, self._pair.a, self._pair.b
        for left in reversed(range(case.at_once)):
            if left == 0 and case.cold:
                self._other += 1
            a.put_packet(0, case.frame, mss=case.mss, header_bytes=HEADER_BYTES, pieces=(HEADER_BYTES,), ring=left == 0)
        a.completions(0)
        a.enable(0)
        received = b.receive(self._queue)
        b.post(self._queue, len(b.rx[self._queue].free) - SPARE_BUFFERS)
        b.enable(b.queues + self._queue)
        size = sum(len(packet.data) - HEADER_BYTES for packet in received)
        if size != case.at_once * (len(case.frame) - HEADER_BYTES):
            raise RuntimeError(f"{case.name}: {size} bytes of payload arrived")


def measure(rounds: int, seed: int) -> list[Row]:
    """Take a sample of every case in every round, each round in another order."""
    shuffled = random.Random(seed)
    with ExitStack() as held:
        lanes = [Lane(case) for case in cases()]
        for lane in lanes:
            held.callback(lane.close)
            lane.warm_up()
        found: dict[str, list[float]] = {lane.case.name: [] for lane in lanes}
        for _ in range(rounds):
            for lane in shuffled.sample(lanes, len(lanes)):
                found[lane.case.name].append(lane.sample())
    return [
        Row(
            name=lane.case.name,
            bytes=len(lane.case.frame),
            at_once=lane.case.at_once,
            us=statistics.median(found[lane.case.name]),
            us_least=min(found[lane.case.name]),
            us_most=max(found[lane.case.name]),
        )
        for lane in lanes
    ]


def limits(rows: list[Row]) -> list[Limit]:
    """Hold the rows against what is promised."""
    return [
        Limit(row.name, row.us, LIMITS_US[row.name], row.us <= LIMITS_US[row.name])
        for row in rows
        if row.name in LIMITS_US
    ]


def show(rows: list[Row], console: Console) -> None:
    """Print the table."""
    table = Table(title="device CPU, microseconds each (medians)", box=None, padding=(0, 2, 0, 0))
    table.add_column("case", no_wrap=True)
    for heading in ("bytes", "at once", "µs", "range"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name, str(row.bytes), str(row.at_once), f"{row.us:.1f}", f"{row.us_least:.1f}–{row.us_most:.1f}"
        )
    console.print(table)


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order of cases in each round.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure there.")
@click.option("--check", is_flag=True, help="Exit with 1 if a limit is missed.")
def main(rounds: int, seed: int, json_path: Path | None, check: bool) -> None:
    rows = measure(rounds, seed)
    console = Console()
    show(rows, console)
    found = limits(rows)
    for limit in found:
        word = "holds " if limit.holds else "MISSED"
        console.print(f"{word}  {limit.name}, at most {limit.bar:.0f} µs: {limit.value:.1f}")
    if json_path is not None:
        json_path.write_bytes(msgspec.json.encode({"cases": rows, "limits": found}))
    if check and not all(limit.holds for limit in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
