"""Many connections on one binding of the software backend: are the bytes right, what does one weigh, how fast is it.

For each number of connections one receiver process takes them all on one queue and one bound buffer, and one sender
process writes to all of them in turn. README.md says how to read the figures.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from loopback import GIB, MIB, SYSTEM, allowed_congestion, system_congestion
from pairs import HERE, PairFailed, cpus_apart, decode, exchange

ENDS: Final = (sys.executable, str(HERE / "connection_ends.py"))
MEMORY_LIMIT_BYTES: Final = 64 << 10


class Outcome(msgspec.Struct, frozen=True):
    """What the receiver of one run found."""

    bytes: int
    expected_bytes: int
    wrong_bytes: int
    wall_s: float
    cpu_s: float
    resident_bytes_each: float
    traced_bytes_each: float
    tokens_held: int
    dmabuf_bytes: int
    linear_bytes: int
    host_bytes: int
    backend: str


class Row(msgspec.Struct, frozen=True):
    """One number of connections: a run for speed and resident memory, one for the bytes and traced memory."""

    connections: int
    speed: Outcome
    looked_at: Outcome

    @property
    def bytes_are_right(self) -> bool:
        return self.looked_at.wrong_bytes == 0 and all(
            run.bytes == run.expected_bytes for run in (self.speed, self.looked_at)
        )

    @property
    def weight_bytes(self) -> float:
        """What one connection weighs, by the heavier of the two measures."""
        return max(self.speed.resident_bytes_each, self.looked_at.traced_bytes_each)


class Report(msgspec.Struct, frozen=True):
    """Everything ``--json`` writes."""

    congestion: str
    rows: list[Row]
    holds: bool


def run(connections: int, bytes_each: int, buffer_bytes: int, congestion: str, look: str) -> Outcome:
    """Run one receiver and one sender of so many connections."""
    count, each = str(connections), str(bytes_each)
    output, _ = exchange(
        [*ENDS, "recv", count, each, str(buffer_bytes), congestion, look],
        lambda port: [*ENDS, "send", str(port), count, each, congestion],
        cpus_apart(),
    )
    return decode(output, Outcome)


def show(rows: list[Row], console: Console) -> None:
    """Print the table. Each row's second line is its path."""
    table = Table(title="connections on one binding", box=None, padding=(0, 2, 0, 0))
    table.add_column("connections\n  dmabuf/linear/host MiB", no_wrap=True)
    for heading in ("GB/s", "CPU s/GiB\nreceiver", "resident\nKiB each", "traced\nKiB each", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        speed, looked_at = row.speed, row.looked_at
        path = "/".join(f"{size / MIB:.0f}" for size in (speed.dmabuf_bytes, speed.linear_bytes, speed.host_bytes))
        table.add_row(
            f"{row.connections}\n  {speed.backend} {path}",
            f"{speed.bytes / speed.wall_s / 1e9:.2f}",
            f"{speed.cpu_s / (speed.bytes / GIB):.3f}",
            f"{speed.resident_bytes_each / 1024:.1f}",
            f"{looked_at.traced_bytes_each / 1024:.1f}",
            "right" if row.bytes_are_right else f"{looked_at.wrong_bytes} WRONG",
        )
    console.print(table)


@click.command(help=__doc__)
@click.option("--connections", type=click.IntRange(1), multiple=True, default=(8, 512, 1000), show_default=True)
@click.option("--total-mib", type=click.IntRange(1), default=1024, show_default=True, help="Of each run for speed.")
@click.option("--looked-at-mib", type=click.IntRange(1), default=128, show_default=True, help="Of each run for bytes.")
@click.option("--buffer-mib", type=click.IntRange(1), default=256, show_default=True, help="Receive buffer.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure there.")
@click.option("--check", is_flag=True, help="Exit with 1 if bytes are wrong or one connection is too heavy.")
def main(
    connections: tuple[int, ...],
    total_mib: int,
    looked_at_mib: int,
    buffer_mib: int,
    json_path: Path | None,
    check: bool,
) -> None:
    congestion = allowed_congestion()
    rows = []
    try:
        for count in connections:
            speed = run(count, total_mib * MIB // count, buffer_mib * MIB, congestion, "speed")
            looked_at = run(count, looked_at_mib * MIB // count, buffer_mib * MIB, congestion, "bytes")
            rows.append(Row(count, speed, looked_at))
    except PairFailed as error:
        raise click.ClickException(str(error)) from error
    console = Console()
    named = system_congestion() if congestion == SYSTEM else congestion
    console.print(f"congestion control on every socket: {named} (the system's is {system_congestion()})")
    show(rows, console)
    most = max(rows, key=lambda row: row.connections)
    light = most.weight_bytes < MEMORY_LIMIT_BYTES
    holds = light and all(row.bytes_are_right for row in rows)
    console.print(
        f"{'holds ' if light else 'MISSED'}  memory of one of {most.connections} connections, under 64 KiB:"
        f" {most.weight_bytes / 1024:.1f} KiB"
    )
    if json_path is not None:
        json_path.write_bytes(msgspec.json.encode(Report(named, rows, holds)))
    if check and not holds:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
