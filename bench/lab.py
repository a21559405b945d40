"""TCP in the lab: Gbit/s between two namespaces of one guest, and what the process of its NICs takes for it.

Boots a stock kernel on NICs that are a Python process (devmem-tcp lab setup has fetched it), and sends over one TCP
connection at a time, IPv4. Every case runs once a round, in another order each round; medians count.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab import control
from devmem_tcp.lab.stage import Stage, StagePlan, Streams
from devmem_tcp.lab.vm import acceleration
from devmem_tcp.lab.vm.cache import Cache
from devmem_tcp.lab.vm.kernels import Kernel
from devmem_tcp.lab.vm.machine import Job
from devmem_tcp.lab.vm.packages import Installation
from devmem_tcp.lab.vm.programs import Programs
from devmem_tcp.lab.vm.qemu import GuestShape

ENDS: Final = Path(__file__).resolve().parent / "lab_ends.py"
LIMIT_GBIT: Final = 1.0
LIMITED: Final = ("MTU 1500", "MTU 9000")
EXTRA_S: Final = 120.0  # beyond the sending itself, for each run's setting up, and the boot


class Case(msgspec.Struct, frozen=True):
    """How both ends are set."""

    name: str
    mtu: int
    features: dict[str, str]  # ethtool -K


CASES: Final = (
    Case("MTU 1500", 1500, {"tso": "on", "gso": "on", "rx-gro-hw": "on"}),  # as the driver starts
    Case("MTU 9000", 9000, {"tso": "on", "gso": "on", "rx-gro-hw": "on"}),
    Case("MTU 1500, cut in the NIC", 1500, {"tso": "on", "gso": "on", "rx-gro-hw": "off"}),
    Case("MTU 1500, cut in the guest", 1500, {"tso": "off", "gso": "on", "rx-gro-hw": "off"}),
)


class Run(msgspec.Struct, frozen=True):
    """One connection: bytes and seconds as its receiver saw them; the rest is of the NICs' process, meanwhile."""

    bytes: int
    wall_s: float
    nic_wall_s: float
    nic_cpu_s: float
    sent: int  # packets on the wire, both ways; a superframe is one
    received: int  # packets in RX queues, both ways
    interrupts: int
    messages: int  # of QEMU's to the process: doorbells, nearly all

    @property
    def gbit_per_s(self) -> float:
        return self.bytes * 8 / self.wall_s / 1e9


class Row(msgspec.Struct, frozen=True):
    """One case's medians."""

    name: str
    gbit_per_s: float
    gbit_per_s_least: float
    gbit_per_s_most: float
    nic_cpu_share: float  # of one processor
    bytes_a_packet: float  # of payload, by packets sent, acknowledgements among them
    us_a_packet_sent: float
    us_a_packet_received: float
    runs: list[Run]


class Limit(msgspec.Struct, frozen=True):
    """One promise about speed: ``value`` against ``bar``, in Gbit/s."""

    name: str
    value: float
    bar: float
    holds: bool


class Watcher:
    """Reads the guest's lines, and the NICs' counters at the start and the end of each run.

    Args:
        ask: gives the process of the NICs a command, and returns its result.
    """

    def __init__(self, ask: Callable[[control.Command], Any]) -> None:
        self._ask: Final = ask
        self._rest = b""
        self._before: tuple[float, dict[str, Any]] | None = None
        self.runs: dict[str, list[Run]] = {}

    def feed(self, data: bytes) -> None:
        """Take what the guest's job has written."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            now = time.monotonic(), self._ask(control.GetStatistics())
            if "start" in said:
                self._before = now
            elif self._before is not None:
                run = _run(said["bytes"], said["wall_s"], self._before, now)
                self.runs.setdefault(said["end"], []).append(run)


def _run(size: int, wall_s: float, before: tuple[float, dict[str, Any]], after: tuple[float, dict[str, Any]]) -> Run:
    def grown(*path: str) -> int:
        return sum(_at(nic, path) for nic in after[1]["nics"].values()) - sum(
            _at(nic, path) for nic in before[1]["nics"].values()
        )

    return Run(
        bytes=size,
        wall_s=wall_s,
        nic_wall_s=after[0] - before[0],
        nic_cpu_s=after[1]["cpu_s"] - before[1]["cpu_s"],
        sent=grown("wire", "sent_packets"),
        received=grown("device", "rx", "packets"),
        interrupts=grown("device", "interrupts"),
        messages=grown("socket", "messages"),
    )


def _at(found: Any, path: tuple[str, ...]) -> int:
    """Return a counter; where it is one of each queue, their sum."""
    for name in path:
        if name in found:
            found = found[name]
        else:
            return sum(queue[name] for queue in found.values())
    return int(found)


def measure(rounds: int, seconds: float, seed: int) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Boot a guest and run every case once a round; returns the runs by case, and what the machine is.

    Raises:
        DevmemError: the lab is not set up, or the guest failed.
    """
    shuffled = random.Random(seed)
    plan = [case for _ in range(rounds) for case in shuffled.sample(CASES, len(CASES))]
    cache = Cache.of_user()
    programs, kernel = _parts(cache)
    accelerator = acceleration.accelerator(programs, kernel, cache.root / "kvm.json")
    stage = Stage(
        StagePlan(shape=GuestShape(memory_mib=1024, cpus=2)),
        programs,
        kernel,
        folder=cache.new_run(),
        accelerator=accelerator,
    )
    with stage:
        assert stage.nics is not None
        watcher = Watcher(stage.nics.ask)
        command = (sys.executable, str(ENDS), "run", msgspec.json.encode(plan).decode(), str(seconds))
        streams = Streams(watcher.feed, sys.stderr.buffer.write)
        (code,) = stage.run([Job(command=command)], [streams], timeout_s=len(plan) * (seconds + 10) + EXTRA_S)
    if code:
        raise DevmemError(f"the guest's job ended with {code}")
    machine = {
        "guest_kernel": kernel.name,
        "accelerator": accelerator,
        "host_kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": str(os.cpu_count()),
    }
    return watcher.runs, machine


def _parts(cache: Cache) -> tuple[Programs, Kernel]:
    installation = Installation(cache, lambda what, part: None)
    return installation.programs(), installation.kernel(None)


def row(name: str, runs: list[Run]) -> Row:
    """Put the runs of one case together."""
    return Row(
        name=name,
        gbit_per_s=statistics.median(run.gbit_per_s for run in runs),
        gbit_per_s_least=min(run.gbit_per_s for run in runs),
        gbit_per_s_most=max(run.gbit_per_s for run in runs),
        nic_cpu_share=statistics.median(run.nic_cpu_s / run.nic_wall_s for run in runs),
        bytes_a_packet=statistics.median(run.bytes / run.sent for run in runs),
        us_a_packet_sent=statistics.median(run.nic_cpu_s / run.sent * 1e6 for run in runs),
        us_a_packet_received=statistics.median(run.nic_cpu_s / run.received * 1e6 for run in runs),
        runs=runs,
    )


def limits(rows: list[Row]) -> list[Limit]:
    """Hold the cases that are as the driver starts against what is promised."""
    return [
        Limit(one.name, one.gbit_per_s, LIMIT_GBIT, one.gbit_per_s >= LIMIT_GBIT) for one in rows if one.name in LIMITED
    ]


def show(rows: list[Row], machine: dict[str, str], console: Console) -> None:
    """Print the machine, then the table."""
    console.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items()))
    table = Table(
        title=f"one TCP connection, {len(rows[0].runs)} interleaved rounds, medians", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("case", no_wrap=True)
    headings = ("Gbit/s\nrange", "NIC\nCPU", "bytes a\npacket", "NIC µs\na packet", "a frame\nreceived")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for one in rows:
        table.add_row(
            one.name,
            f"{one.gbit_per_s:.2f}\n{one.gbit_per_s_least:.2f}–{one.gbit_per_s_most:.2f}",
            f"{one.nic_cpu_share:.0%}",
            f"{one.bytes_a_packet:.0f}",
            f"{one.us_a_packet_sent:.0f}",
            f"{one.us_a_packet_received:.1f}",
        )
    console.print(table)


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=3.0, show_default=True, help="Of sending, each run.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order of cases in each round.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure there.")
@click.option("--check", is_flag=True, help="Exit with 1 if a limit is missed.")
def main(rounds: int, seconds: float, seed: int, json_path: Path | None, check: bool) -> None:
    try:
        runs, machine = measure(rounds, seconds, seed)
    except DevmemError as error:
        raise click.ClickException(str(error)) from error
    rows = [row(case.name, runs[case.name]) for case in CASES]
    console = Console()
    show(rows, machine, console)
    found = limits(rows)
    for limit in found:
        word = "holds " if limit.holds else "MISSED"
        console.print(f"{word}  {limit.name}, at least {limit.bar:.0f} Gbit/s: {limit.value:.2f}")
    if json_path is not None:
        json_path.write_bytes(msgspec.json.encode({"machine": machine, "cases": rows, "limits": found}))
    if check and not all(limit.holds for limit in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
