"""The kernel backend's receiver against two in C: CPU seconds in the guest for each GiB received into device memory.

Run in a guest of the lab, whose command sees this machine's files, after the C program was compiled outside it:

    .venv/bin/python bench/devmem_cpu.py --build
    .venv/bin/devmem-tcp lab run --memory 2G -- .venv/bin/python bench/devmem_cpu.py --check

All receive from the same plain sender in the other namespace, over the same queue, into the same bound buffer, with the
same read size and SO_RCVLOWAT, on one processor of the guest; the sender is on the other, and so are all interrupts of
the NICs. Every variant runs once a round, in another order each round; medians and their ratios count.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

import devmem_tcp as dmt
from loopback import GIB, MIB, SYSTEM
from pairs import PairFailed, built, cpus_apart, decode, exchange

HERE: Final = Path(__file__).resolve().parent
RECEIVER: Final = "devmem_receiver"
SENDER: Final = "tcp_limit"
OURS: Final = (sys.executable, str(HERE / "devmem_ends.py"))
NO_COMPILER: Final = "there is no C compiler here: apt install gcc"
PORT: Final = 5201
DRIVER: Final = "gve"
QUEUE: Final = 1  # gve cannot restart queue 0
RECEIVE_MEMORY: Final = Path("/proc/sys/net/ipv4/tcp_rmem")
SPARE_BYTES: Final = 64 * MIB  # of the buffer, for what the NIC's rings hold and what is held while a batch is taken
TABLE_WIDTH: Final = 120
ONE_LIMIT: Final = 0.7
BATCH_LIMIT: Final = 1.25
FRAGS_A_DONTNEED: Final = 20


class Received(msgspec.Struct, frozen=True):
    """A receiver's last line: bytes by where they landed, calls and time, from being warm to the end of stream."""

    bytes: int
    dmabuf_bytes: int
    linear_bytes: int
    host_bytes: int
    frags: int
    recv_calls: int  # the last one tells the end of stream
    dontneed_calls: int
    wall_s: float
    user_s: float
    system_s: float
    undisturbed_s_per_gib: float  # of single reads, the lower quartile
    start_s: float  # of CPU, for the bytes before

    @property
    def cpu_s_per_gib(self) -> float:
        return (self.user_s + self.system_s) / (self.bytes / GIB)


class Settings(msgspec.Struct, frozen=True):
    """What is run: how often, how much, in reads of which size, which wait for how much, after how much (bytes)."""

    rounds: int
    seed: int
    total_bytes: int
    read_bytes: int
    lowat_bytes: int
    warm_bytes: int

    @property
    def window_bytes(self) -> int:
        """The largest receive buffer of a socket: SO_RCVLOWAT is cut to half of it (tcp_set_rcvlowat)."""
        return 2 * max(self.lowat_bytes, self.read_bytes)

    @property
    def buffer_bytes(self) -> int:
        """What is bound: a full receive buffer must not use up its pages."""
        return self.window_bytes + self.read_bytes + SPARE_BYTES


class Row(msgspec.Struct, frozen=True):
    """One variant's medians over the rounds."""

    name: str
    cpu_s_per_gib: float
    cpu_s_per_gib_least: float
    cpu_s_per_gib_most: float
    undisturbed_s_per_gib: float
    start_s: float
    user_s_per_gib: float
    system_s_per_gib: float
    gbit_per_s: float
    recv_calls: float
    dontneed_calls: float
    frags: float
    frags_a_dontneed: float
    runs: list[Received]


class Limit(msgspec.Struct, frozen=True):
    """One promise: ``value`` against ``bar``."""

    name: str
    value: float
    bar: float
    holds: bool


def receivers(nic: str, settings: Settings) -> dict[str, list[str]]:
    """Return each variant's command line."""
    (binary,) = built(RECEIVER) or ("",)
    sizes = [str(number) for number in (PORT, settings.read_bytes, settings.lowat_bytes, settings.warm_bytes)]
    return {
        "C, a call a token": [binary, *sizes, "one"],
        "C, ranges": [binary, *sizes, "batch"],
        "ours": [*OURS, nic, *sizes],
    }


@contextlib.contextmanager
def interrupts_on(cpu: int) -> Iterator[None]:
    """Keep the NICs' interrupts on one processor until the block ends.

    What a processor does for interrupts is charged to the process that they come upon: the longer a receiver computes,
    the more of the sender's and the NICs' work it would be charged for.
    """
    lines = Path("/proc/interrupts").read_text(encoding="ascii").splitlines()
    numbers = [line.partition(":")[0].strip() for line in lines if DRIVER in line]
    files = [Path("/proc/irq", number, "smp_affinity_list") for number in numbers]
    before = [file.read_text(encoding="ascii") for file in files]
    try:
        for file in files:
            file.write_text(str(cpu), encoding="ascii")
        yield
    finally:
        for file, old in zip(files, before, strict=True):
            file.write_text(old, encoding="ascii")


@contextlib.contextmanager
def receive_memory(most_bytes: int) -> Iterator[None]:
    """Let a TCP socket receive so much ahead of its reader, until the block ends."""
    before = RECEIVE_MEMORY.read_text(encoding="ascii")
    least, first, _ = before.split()
    RECEIVE_MEMORY.write_text(f"{least} {first} {most_bytes}", encoding="ascii")
    try:
        yield
    finally:
        RECEIVE_MEMORY.write_text(before, encoding="ascii")


@contextlib.contextmanager
def bound(nic_name: str, buffer_bytes: int) -> Iterator[None]:
    """Have the port's flow arrive in device memory, until the block ends."""
    with (
        dmt.open_nic(nic_name, backend="kernel") as nic,
        dmt.memory.Udmabuf().allocate(buffer_bytes) as buffer,
        nic.set_header_split("on"),
        nic.set_rss(weights=[int(queue != QUEUE) for queue in range(nic.capabilities.rx_queues)]),
        nic.add_ntuple(dst_port=PORT, queue=QUEUE),
        nic.bind_rx(buffer, [QUEUE]),
    ):
        yield


def measure(settings: Settings) -> dict[str, list[Received]]:
    """Run every variant once a round.

    Raises:
        PairFailed: an end ended badly, or not all payload arrived in device memory.
    """
    nic, address, peer = os.environ["NETIF"], os.environ["LOCAL_V4"], os.environ["REMOTE_ARGS"]
    sender_binary = built(SENDER)
    if sender_binary is None or built(RECEIVER) is None:
        raise PairFailed(NO_COMPILER)
    sender = ["ip", "netns", "exec", peer, *sender_binary, "send", address, str(PORT)]
    transfer = [str(settings.warm_bytes + settings.total_bytes), str(16 * MIB), str(MIB), SYSTEM]
    commands = receivers(nic, settings)
    runs: dict[str, list[Received]] = {name: [] for name in commands}
    shuffled = random.Random(settings.seed)
    placement = cpus_apart()
    if placement is None:
        raise PairFailed("receiver and sender need a processor each: lab run --smp 2")
    with receive_memory(settings.window_bytes), bound(nic, settings.buffer_bytes), interrupts_on(placement[1]):
        for _ in range(settings.rounds):
            for name in shuffled.sample(list(commands), len(commands)):
                output, _ = exchange(commands[name], lambda port: [*sender, *transfer], placement)
                received = decode(output, Received)
                missing = settings.total_bytes - received.bytes  # the last read before may have brought some of them
                if received.host_bytes or not 0 <= missing < settings.read_bytes:
                    raise PairFailed(f"{name}: not all payload landed in device memory: {received}")
                runs[name].append(received)
    return runs


def row(name: str, runs: list[Received]) -> Row:
    """Put the runs of one variant together."""

    def median(values: Iterator[float]) -> float:
        return statistics.median(values)

    return Row(
        name=name,
        cpu_s_per_gib=median(run.cpu_s_per_gib for run in runs),
        cpu_s_per_gib_least=min(run.cpu_s_per_gib for run in runs),
        cpu_s_per_gib_most=max(run.cpu_s_per_gib for run in runs),
        undisturbed_s_per_gib=median(run.undisturbed_s_per_gib for run in runs),
        start_s=median(run.start_s for run in runs),
        user_s_per_gib=median(run.user_s / run.bytes * GIB for run in runs),
        system_s_per_gib=median(run.system_s / run.bytes * GIB for run in runs),
        gbit_per_s=median(run.bytes * 8 / run.wall_s / 1e9 for run in runs),
        recv_calls=median(run.recv_calls for run in runs),
        dontneed_calls=median(run.dontneed_calls for run in runs),
        frags=median(run.frags for run in runs),
        frags_a_dontneed=median(run.frags / max(run.dontneed_calls, 1) for run in runs),
        runs=runs,
    )


def limits(rows: list[Row]) -> list[Limit]:
    """Hold our receiver against both of C's, and the calls that return tokens against the frags."""
    one, batch, ours = rows
    over_one, over_batch = ours.cpu_s_per_gib / one.cpu_s_per_gib, ours.cpu_s_per_gib / batch.cpu_s_per_gib
    frags = ours.frags_a_dontneed
    return [
        Limit(f"ours: CPU over {one.name}, at most", over_one, ONE_LIMIT, over_one <= ONE_LIMIT),
        Limit(f"ours: CPU over {batch.name}, at most", over_batch, BATCH_LIMIT, over_batch <= BATCH_LIMIT),
        Limit("ours: frags a call that returns tokens, at least", frags, FRAGS_A_DONTNEED, frags >= FRAGS_A_DONTNEED),
    ]


def show(rows: list[Row], console: Console) -> None:
    """Print the table."""
    table = Table(title=f"{len(rows[0].runs)} interleaved rounds, medians", box=None, padding=(0, 2, 0, 0))
    table.add_column("receiver\n  dmabuf/linear/host MiB", no_wrap=True)
    headings = (
        "CPU s/GiB\nrange",
        "user\nsystem",
        "ours ÷\nthis",
        "undis-\nturbed",
        "ours ÷\nthis",
        "start\nms",
        "Gbit/s",
        "recvmsg",
        "DONTNEED",
        "frags",
        "frags a\nDONTNEED",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    ours = rows[-1]
    for one in rows:
        last = one.runs[-1]
        path = "/".join(f"{size / MIB:.0f}" for size in (last.dmabuf_bytes, last.linear_bytes, last.host_bytes))
        table.add_row(
            f"{one.name}\n  {path}",
            f"{one.cpu_s_per_gib:.2f}\n{one.cpu_s_per_gib_least:.2f}–{one.cpu_s_per_gib_most:.2f}",
            f"{one.user_s_per_gib:.2f}\n{one.system_s_per_gib:.2f}",
            f"{ours.cpu_s_per_gib / one.cpu_s_per_gib:.2f}",
            f"{one.undisturbed_s_per_gib:.2f}",
            f"{ours.undisturbed_s_per_gib / one.undisturbed_s_per_gib:.2f}",
            f"{one.start_s * 1e3:.0f}",
            f"{one.gbit_per_s:.2f}",
            f"{one.recv_calls:.0f}",
            f"{one.dontneed_calls:.0f}",
            f"{one.frags:.0f}",
            f"{one.frags_a_dontneed:.0f}",
        )
    console.print(table)


def machine() -> dict[str, str]:
    """Describe what the figures depend on besides the code."""
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": str(os.cpu_count()),
    }


@click.command(help=__doc__)
@click.option("--build", is_flag=True, help="Compile the C programs, and end: outside the guest, where it is quick.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order of variants in each round.")
@click.option("--bytes", "total_mib", type=click.IntRange(1), default=1024, show_default=True, help="MiB of each run.")
@click.option("--warm", "warm_mib", type=click.IntRange(1), default=64, show_default=True, help="MiB before it.")
@click.option("--read-size", "read_kib", type=click.IntRange(4), default=16384, show_default=True, help="KiB.")
@click.option("--lowat", "lowat_kib", type=click.IntRange(0), default=32768, show_default=True, help="KiB to wait for.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure there.")
@click.option("--check", is_flag=True, help="Exit with 1 if a limit is missed.")
def main(
    build: bool,
    rounds: int,
    seed: int,
    total_mib: int,
    warm_mib: int,
    read_kib: int,
    lowat_kib: int,
    json_path: Path | None,
    check: bool,
) -> None:
    if build:
        if not (built(RECEIVER) and built(SENDER)):
            raise click.ClickException(NO_COMPILER)
        return
    settings = Settings(rounds, seed, total_mib * MIB, read_kib << 10, lowat_kib << 10, warm_mib * MIB)
    try:
        runs = measure(settings)
    except PairFailed as error:
        raise click.ClickException(str(error)) from error
    rows = [row(name, found) for name, found in runs.items()]
    console = Console(width=max(Console().width, TABLE_WIDTH))
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    show(rows, console)
    found = limits(rows)
    for limit in found:
        console.print(f"{'holds ' if limit.holds else 'MISSED'}  {limit.name} {limit.bar}: {limit.value:.2f}")
    if json_path is not None:
        written = {"machine": machine(), "settings": settings, "variants": rows, "limits": found}
        json_path.write_bytes(msgspec.json.encode(written))
    if check and not all(limit.holds for limit in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
