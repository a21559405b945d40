"""The report for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from devmem_tcp.benchmark import words
from devmem_tcp.benchmark.plan import Kind
from devmem_tcp.benchmark.results import Report, Row

_WIDTH: Final = 120  # characters that medians with their ranges take


def print_tables(report: Report, console: Console) -> None:
    """Print a table of each kind of work, then by which paths all bytes went, and what is missing."""
    for kind, title in (
        (Kind.THROUGHPUT, "throughput by size"),
        (Kind.ROUND_TRIP, "round trip, two sessions"),
        (Kind.CONNECTIONS, "senders to one receiver"),
    ):
        rows = [row for row in report.rows if row.work.kind is kind]
        if rows:
            console.print(_table(title, rows, ranges=console.width >= _WIDTH))
    for line in _paths(report):
        console.print(line, highlight=False, soft_wrap=True)


def console() -> Console:
    """Return the console to print tables on: standard output. Where it is narrow, ranges are left out."""
    found = Console()
    return found if found.is_terminal else Console(width=_WIDTH)


def _table(title: str, rows: Sequence[Row], *, ranges: bool) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("size", no_wrap=True)
    table.add_column("how", no_wrap=True)
    trips = rows[0].round_trip_us is not None
    heads = ("median µs", "99 % within µs") if trips else ("GB/s", "CPU s/GiB")
    for head in (*heads, "CPU µs/message", "messages"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        if row.round_trip_us is not None and row.round_trip_p99_us is not None:
            figures = row.round_trip_us, row.round_trip_p99_us
        else:
            figures = row.gb_per_s, row.cpu_s_per_gib
        texts = [words.both(one) if ranges else words.number(one.median) for one in (*figures, row.cpu_us_per_message)]
        table.add_row(words.what(row.work), words.way(row.work), *texts, f"{row.messages:,}")
    return table


def _paths(report: Report) -> list[str]:
    """Say by which paths the bytes of all works went, and what was not measured."""
    receivers = [row.receiver for row in report.rows]
    sums = [
        sum(getattr(one, name) for one in receivers)
        for name in ("received_dmabuf", "received_linear", "received_host", "copied")
    ]
    path = "dmabuf {:,}, linear {:,}, host {:,}, copied {:,} bytes".format(*sums)
    names = sorted(
        {name for row in report.rows for end in (row.sender, row.receiver) for name in end.congestion_controls}
    )
    sender, receiver = report.sender, report.receiver
    return [
        f"backend     {sender.backend} to {receiver.backend}, NIC {sender.nic} to {receiver.nic}",
        f"received    {path}",
        f"sent        dmabuf {sum(row.sender.sent_dmabuf for row in report.rows):,}, "
        f"host {sum(row.sender.sent_host for row in report.rows):,} bytes",
        f"congestion  {', '.join(names)}",
        *(f"left out    {one.work.name}: {one.words}" for one in report.left_out),
        *(f"failed      {one.work.name}: {one.words}" for one in report.failed),
    ]
