"""One connection over loopback: the software backend against plain C and plain Python, in one interleaved run.

Every variant runs once a round, in an order shuffled anew each round, so that what else the machine does falls on all
of them alike; medians and their ratios are what counts. README.md says how to read the figures.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from loopback import GIB, MIB, SYSTEM, allowed_congestion, system_congestion
from pairs import PLAIN_ENDS, SOFTWARE_ENDS, Pair, PairFailed, Placement, built_limit, cpus_apart, run_pair

NO_COMPILER: Final = "no C compiler: the C limit is not measured"


class Settings(msgspec.Struct, frozen=True):
    """What is run: how often, how much, through how much memory (in bytes), how and where."""

    rounds: int
    seed: int
    total_bytes: int
    buffer_bytes: int
    send_buffer_bytes: int
    read_bytes: int
    congestion: str  # "-": the system's
    placement: Placement | None  # CPUs of receiver and sender; None: wherever the scheduler puts them


@dataclass(frozen=True)
class Variant:
    """Who receives, who sends."""

    name: str
    receiver: tuple[str, ...]
    sender: tuple[str, ...]
    one_read_buffer: bool = False  # the receive buffer is one read long and stays in the cache
    holds: bool = False  # tokens of 15/16 of the buffer are kept out, so that the whole buffer is gone through

    def run(self, settings: Settings) -> Pair:
        read = str(settings.read_bytes)
        buffer = read if self.one_read_buffer else str(settings.buffer_bytes)
        held = [str(settings.buffer_bytes // 16 * 15)] if self.holds else []
        transfer = [str(settings.total_bytes), str(settings.send_buffer_bytes), read, settings.congestion]
        receiver = [*self.receiver, buffer, read, settings.congestion, *held]
        return run_pair(receiver, [*self.sender, "send"], transfer, settings.placement)


class Row(msgspec.Struct, frozen=True):
    """One variant's medians over the rounds, and what its last run said of its path."""

    name: str
    backend: str
    congestion_control: str
    gb_per_s: float
    gb_per_s_least: float
    gb_per_s_most: float
    receiver_cpu_s_per_gib: float
    sender_cpu_s_per_gib: float
    both_cpu_s_per_gib: float
    recv_calls_per_mib: float
    reach_bytes: int  # how much of the Buffer was used
    dontneed_calls_per_mib: float
    dmabuf_bytes: int
    linear_bytes: int
    host_bytes: int
    speed_over_c: float | None
    speed_over_recv_into: float
    cpu_over_c: float | None
    runs: list[Pair]


class Limit(msgspec.Struct, frozen=True):
    """One promise about speed: ``value`` against ``bar``."""

    name: str
    value: float
    bar: float
    holds: bool


class Report(msgspec.Struct, frozen=True):
    """Everything ``--json`` writes."""

    machine: dict[str, str]
    settings: Settings
    congestion: str  # the name of what all sockets used
    variants: list[Row]
    limits: list[Limit]
    not_measured: dict[str, str]


def variants(limit: tuple[str, ...] | None) -> list[Variant]:
    """List what can run here; all but the ``-both`` ones have one and the same sender, C where there is a compiler."""
    plain = (*PLAIN_ENDS, "recv")
    software = (*SOFTWARE_ENDS, "recv")
    sender = limit or PLAIN_ENDS
    listed = [
        Variant("recv_into", plain, sender),
        Variant("recv_into-reused", plain, sender, one_read_buffer=True),
        Variant("recv_into-both", plain, PLAIN_ENDS),
        Variant("software", software, sender),
        Variant("software-held", software, sender, holds=True),
        Variant("software-both", software, SOFTWARE_ENDS),
    ]
    if limit is not None:
        listed.insert(0, Variant("c", (*limit, "recv", "0"), limit))
    return listed


def run_rounds(listed: list[Variant], settings: Settings) -> dict[str, list[Pair]]:
    """Run every variant once a round, each round in another order."""
    shuffled = random.Random(settings.seed)
    runs: dict[str, list[Pair]] = {variant.name: [] for variant in listed}
    with click.progressbar(length=settings.rounds * len(listed), label="measuring", file=sys.stderr) as progress:
        for _ in range(settings.rounds):
            for variant in shuffled.sample(listed, len(listed)):
                runs[variant.name].append(variant.run(settings))
                progress.update(1)
    return runs


def _speed(runs: list[Pair]) -> float:
    return statistics.median(pair.gb_per_s for pair in runs)


def _cpu(runs: list[Pair]) -> float:
    """Return the median of both ends' CPU seconds per GiB."""
    return statistics.median((pair.receiver.cpu_s + pair.sender.cpu_s) / (pair.receiver.bytes / GIB) for pair in runs)


def _row(name: str, all_runs: dict[str, list[Pair]], congestion: str) -> Row:
    runs = all_runs[name]
    last = runs[-1].receiver
    gib, mib = last.bytes / GIB, last.bytes / MIB
    speed, cpu = _speed(runs), _cpu(runs)
    c = all_runs.get("c")
    return Row(
        name=name,
        backend=last.backend,
        congestion_control=last.congestion_control or congestion,
        gb_per_s=speed,
        gb_per_s_least=min(pair.gb_per_s for pair in runs),
        gb_per_s_most=max(pair.gb_per_s for pair in runs),
        receiver_cpu_s_per_gib=statistics.median(pair.receiver.cpu_s for pair in runs) / gib,
        sender_cpu_s_per_gib=statistics.median(pair.sender.cpu_s for pair in runs) / gib,
        both_cpu_s_per_gib=cpu,
        recv_calls_per_mib=statistics.median(pair.receiver.calls for pair in runs) / mib,
        dontneed_calls_per_mib=statistics.median(pair.receiver.dontneed_calls for pair in runs) / mib,
        reach_bytes=last.reach_bytes,
        dmabuf_bytes=last.dmabuf_bytes,
        linear_bytes=last.linear_bytes,
        host_bytes=last.host_bytes,
        speed_over_c=speed / _speed(c) if c else None,
        speed_over_recv_into=speed / _speed(all_runs["recv_into"]),
        cpu_over_c=cpu / _cpu(c) if c else None,
        runs=runs,
    )


def limits(rows: dict[str, Row]) -> list[Limit]:
    """Hold the rows against what is promised; without the C rows, only the rest."""
    software, held, both = rows["software"], rows["software-held"], rows["software-both"]
    found = []
    for row in (software, held):
        if row.speed_over_c is not None:
            found.append(Limit(f"{row.name}: speed over C, at least", row.speed_over_c, 0.9, row.speed_over_c >= 0.9))
    if both.cpu_over_c is not None:
        found.append(
            Limit(f"{both.name}: CPU of both ends over C, at most", both.cpu_over_c, 1.2, both.cpu_over_c <= 1.2)
        )
    speed = software.speed_over_recv_into
    found.append(Limit(f"{software.name}: speed over recv_into, at least", speed, 1.0, speed >= 1.0))
    return found


def measure(settings: Settings) -> Report:
    """Run all variants and put their figures together.

    Raises:
        PairFailed: a process ended badly.
    """
    limit = built_limit()
    runs = run_rounds(variants(limit), settings)
    congestion = system_congestion() if settings.congestion == SYSTEM else settings.congestion
    rows = {name: _row(name, runs, congestion) for name in runs}
    return Report(
        machine=machine(),
        settings=settings,
        congestion=congestion,
        variants=list(rows.values()),
        limits=limits(rows),
        not_measured={} if limit else {"c": NO_COMPILER},
    )


def machine() -> dict[str, str]:
    """Describe what the figures depend on besides the code."""
    names = {"tcp_rmem": "net/ipv4/tcp_rmem", "tcp_wmem": "net/ipv4/tcp_wmem"}
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": str(os.cpu_count()),
        "system_congestion": system_congestion(),
        **{name: " ".join(Path("/proc/sys", path).read_text().split()) for name, path in names.items()},
    }


def show(report: Report, console: Console) -> None:
    """Print how it was run, the table, then the limits. Each variant's second line is its path."""
    placement = report.settings.placement
    console.print(f"congestion control on every socket: {report.congestion} (the system's is {system_congestion()})")
    console.print(
        "placement: " + ("free" if placement is None else "receiver on CPU {}, sender on CPU {}".format(*placement))
    )
    table = Table(
        title=f"one connection, {report.settings.rounds} interleaved rounds, medians", box=None, padding=(0, 1, 0, 0)
    )
    table.add_column("variant\n  dmabuf/linear/host MiB", no_wrap=True)
    headings = (
        "GB/s\nrange",
        "CPU s/GiB\nreceiver",
        "both\nends",
        "recvs\n/MiB",
        "÷ C",
        "÷ recv\n_into",
        "CPU\n÷ C",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.variants:
        path = "/".join(f"{size / MIB:.0f}" for size in (row.dmabuf_bytes, row.linear_bytes, row.host_bytes))
        ratios = (row.speed_over_c, row.speed_over_recv_into, row.cpu_over_c)
        table.add_row(
            f"{row.name}\n  {row.backend} {path}",
            f"{row.gb_per_s:.2f}\n{row.gb_per_s_least:.1f}–{row.gb_per_s_most:.1f}",
            f"{row.receiver_cpu_s_per_gib:.3f}",
            f"{row.both_cpu_s_per_gib:.3f}",
            f"{row.recv_calls_per_mib:.2f}",
            *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )
    console.print(table)
    for name, reason in report.not_measured.items():
        console.print(f"{name}: {reason}")
    for limit in report.limits:
        console.print(f"{'holds ' if limit.holds else 'MISSED'}  {limit.name} {limit.bar}: {limit.value:.2f}")


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order of variants in each round.")
@click.option("--total-mib", type=click.IntRange(1), default=2048, show_default=True, help="Moved in each run.")
@click.option("--buffer-mib", type=click.IntRange(1), default=256, show_default=True, help="Receive buffer.")
@click.option("--send-buffer-mib", type=click.IntRange(1), default=16, show_default=True, help="Send buffer.")
@click.option(
    "--read-kib", type=click.IntRange(4, 1024), default=1024, show_default=True, help="Of one receive or send."
)
@click.option(
    "--congestion", default="auto", show_default=True, help="auto: cubic or reno where allowed; -: the system's."
)
@click.option(
    "--placement",
    type=click.Choice(["apart", "free"]),
    default="apart",
    show_default=True,
    help="apart: receiver and sender on a CPU each; free: where the scheduler puts them.",
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure there.")
@click.option("--check", is_flag=True, help="Exit with 1 if a limit is missed.")
def main(
    rounds: int,
    seed: int,
    total_mib: int,
    buffer_mib: int,
    send_buffer_mib: int,
    read_kib: int,
    congestion: str,
    placement: str,
    json_path: Path | None,
    check: bool,
) -> None:
    settings = Settings(
        rounds=rounds,
        seed=seed,
        total_bytes=total_mib * MIB,
        buffer_bytes=buffer_mib * MIB,
        send_buffer_bytes=send_buffer_mib * MIB,
        read_bytes=read_kib << 10,
        congestion=allowed_congestion() if congestion == "auto" else congestion,
        placement=cpus_apart() if placement == "apart" else None,
    )
    try:
        report = measure(settings)
    except PairFailed as error:
        raise click.ClickException(str(error)) from error
    show(report, Console())
    if json_path is not None:
        json_path.write_bytes(msgspec.json.encode(report))
    if check and not all(limit.holds for limit in report.limits):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
