"""From runs to medians, and from medians to tables and JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec
from rich.console import Console
from rich.table import Table

from peers.turn import Run
from peers.works import Kind, Work, size_name

PACKAGES: Final = (
    "pyzmq", "torch", "grpcio", "ucxx-cu12", "nixl", "mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda",
)  # fmt: skip


class Settings(msgspec.Struct, frozen=True):
    """What is run: how often, what, and how."""

    rounds: int
    seed: int
    works: list[Work]
    congestion: str  # "-": the system's
    cpus: tuple[int, int] | None  # of server and driver; None: wherever the scheduler puts them
    limit_s: float  # for one work of one peer


class Failure(msgspec.Struct, frozen=True):
    """A work that a peer did not do, and why."""

    work: Work
    words: str


class Row(msgspec.Struct, frozen=True):
    """One work of one peer: medians over the rounds, with the range. GB/s: 10^9 bytes a second, one way."""

    peer: str
    work: Work
    gb_per_s: float
    gb_per_s_least: float
    gb_per_s_most: float
    cpu_s_per_gib: float  # both processes, user and system
    cpu_s_per_gib_least: float
    cpu_s_per_gib_most: float
    round_trip_us: float | None  # median of the medians of each round
    round_trip_us_least: float | None
    round_trip_us_most: float | None
    tcp_sockets: list[int]  # the fewest that server and driver had; 0: not by TCP, or by what cannot be seen
    congestion_controls: list[str]
    runs: int


class Report(msgspec.Struct, frozen=True):
    """Everything ``--json`` writes."""

    settings: Settings
    complete: bool  # False: ended early, by Ctrl-C
    machine: dict[str, str]
    congestion: str
    system_congestion: str
    rows: list[Row]
    failures: dict[str, list[Failure]]
    not_measured: dict[str, str]


Column: TypeAlias = tuple[str, Work, Callable[[Row], str]]
"""A table's column: its heading, the work, and what to write of that work's row."""


def rows(name: str, runs: list[Run]) -> list[Row]:
    """Take the medians of a peer's runs, a row for each work."""
    by_work: dict[Work, list[Run]] = {}
    for run in runs:
        by_work.setdefault(run.work, []).append(run)
    return [_row(name, work, same) for work, same in by_work.items()]


def _row(name: str, work: Work, runs: list[Run]) -> Row:
    speeds = [run.gb_per_s for run in runs]
    cpu = [run.cpu_s_per_gib for run in runs]
    trips = [statistics.median(run.driver.laps_us) for run in runs if work.kind is Kind.ROUND_TRIP]
    ends = [end for run in runs for end in (run.server, run.driver)]
    return Row(
        peer=name,
        work=work,
        gb_per_s=statistics.median(speeds),
        gb_per_s_least=min(speeds),
        gb_per_s_most=max(speeds),
        cpu_s_per_gib=statistics.median(cpu),
        cpu_s_per_gib_least=min(cpu),
        cpu_s_per_gib_most=max(cpu),
        round_trip_us=statistics.median(trips) if trips else None,
        round_trip_us_least=min(trips, default=None),
        round_trip_us_most=max(trips, default=None),
        tcp_sockets=[min(run.server.tcp_sockets for run in runs), min(run.driver.tcp_sockets for run in runs)],
        congestion_controls=sorted({name for end in ends for name in end.congestion_controls}),
        runs=len(runs),
    )


def machine() -> dict[str, str]:
    """Describe what the figures depend on besides the code."""
    found = {"kernel": platform.release(), "python": platform.python_version(), "cpus": str(os.cpu_count())}
    found["load"] = f"{os.getloadavg()[0]:.1f}"
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def show(report: Report, console: Console) -> None:
    """Print how it was run, the tables, then what is not in them and why."""
    cpus = report.settings.cpus
    if not report.complete:
        console.print("ended early: these are the medians of the turns until then")
    console.print(
        f"congestion control on every TCP socket: {report.congestion} (the system's: {report.system_congestion})"
    )
    console.print("load when it began: {load}, on {cpus} CPUs".format(**report.machine))
    console.print("placement: " + ("free" if cpus is None else "server on CPU {}, driver on CPU {}".format(*cpus)))
    rounds = max((row.runs for row in report.rows), default=0)
    for title, columns in _tables(report.settings.works):
        if columns:
            console.print(_table(report, f"{title}; {rounds} interleaved rounds, medians", columns))
    for name, reason in report.not_measured.items():
        console.print(f"not measured: {name}: {reason}", markup=False)
    for name, failures in report.failures.items():
        for failure in failures:
            console.print(f"failed: {name}, {_heading(failure.work)}: {failure.words}", markup=False)
    for row in report.rows:
        others = set(row.congestion_controls) - {report.congestion}
        if 0 in row.tcp_sockets or others:
            console.print(
                f"look: {row.peer}, {_heading(row.work)}: TCP sockets {row.tcp_sockets}, of {row.congestion_controls}",
                markup=False,
            )


def _heading(work: Work) -> str:
    if work.kind is Kind.CONNECTIONS:
        return f"{work.connections} × {size_name(work.size_bytes)}"
    return f"{work.kind.value} {work.name}"


def _tables(works: list[Work]) -> list[tuple[str, list[Column]]]:
    """Say what is in each table; three, so that none is wider than 80 characters."""
    throughput = [work for work in works if work.kind is Kind.THROUGHPUT]
    costs: list[Column] = [
        (f"{work.name}\nround trip, µs", work, _trip) for work in works if work.kind is Kind.ROUND_TRIP
    ]
    if throughput:
        largest = max(throughput, key=lambda work: work.size_bytes)
        costs.append((f"{largest.name}\nCPU s/GiB, both ends", largest, _cpu))
    many = [work for work in works if work.kind is Kind.CONNECTIONS]
    return [
        ("one connection", [(f"{work.name}\nGB/s", work, _speed) for work in throughput]),
        ("round trip and CPU", costs),
        ("connections", [(f"{work.name}\nGB/s", work, _speed) for work in many]),
    ]


def _table(report: Report, title: str, columns: list[Column]) -> Table:
    """Lay out a table: a line a peer, its median and below it the range."""
    cells = {(row.peer, row.work): row for row in report.rows}
    failed = {(name, failure.work) for name, failures in report.failures.items() for failure in failures}
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    table.add_column("peer\n  range", no_wrap=True)
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for name in report.failures:
        texts = []
        for _, work, text in columns:
            row = cells.get((name, work))
            texts.append("failed" if (name, work) in failed else text(row) if row else "–")
        table.add_row(name, *texts)
    return table


def _speed(row: Row) -> str:
    return f"{row.gb_per_s:.2f}\n{row.gb_per_s_least:.2f}–{row.gb_per_s_most:.2f}"


def _cpu(row: Row) -> str:
    return f"{row.cpu_s_per_gib:.2f}\n{row.cpu_s_per_gib_least:.2f}–{row.cpu_s_per_gib_most:.2f}"


def _trip(row: Row) -> str:
    if row.round_trip_us is None:
        return "–"
    return f"{row.round_trip_us:.0f}\n{row.round_trip_us_least:.0f}–{row.round_trip_us_most:.0f}"
