"""What a run of the benchmark says in the end: medians and ranges over the rounds, and all that they depend on.

These structs are the JSON file. A field is never removed or given another meaning without another ``FORMAT``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Final

import msgspec

from devmem_tcp.benchmark.figures import EndFigures, Machine, Run
from devmem_tcp.benchmark.plan import GIB, Kind, Plan, Work

FORMAT: Final = 1


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure: its median over the rounds, and the least and the most of them."""

    median: float
    least: float
    most: float


class Path(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The way that payload took at one end, in bytes, all measured parts together.

    ``dmabuf`` landed in, or was sent from, the bound Buffer; ``linear`` and ``host`` landed in host memory; ``copied``
    of them were copied by the CPU since, to be contiguous.
    """

    backend: str
    congestion_controls: list[str]
    received_dmabuf: int
    received_linear: int
    received_host: int
    copied: int
    sent_dmabuf: int
    sent_host: int


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One work. GB/s are 10^9 bytes of payload a second, one way, from the first send until the receiver has all."""

    work: Work
    rounds: int
    messages: int  # that were measured, in all; of a round trip, one way
    payload_bytes: int  # that were measured, in all, one way
    gb_per_s: Range
    messages_per_s: Range
    cpu_s_per_gib: Range  # both ends; of a round trip, by the payload of one way
    cpu_s_per_gib_sender: Range
    cpu_s_per_gib_receiver: Range
    cpu_us_per_message: Range  # both ends
    round_trip_us: Range | None  # the median trip of each round
    round_trip_p99_us: Range | None  # the trip that 99 % of each round are not longer than
    sender: Path
    receiver: Path


class LeftOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A work without figures, and why."""

    work: Work
    words: str


class End(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One end: its NIC, the backend of that, how much memory it binds at most, and the machine."""

    nic: str
    backend: str
    buffer_bytes: int
    machine: Machine


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it."""

    format: int
    began_at: str  # UTC
    took_s: float
    command: str
    same_machine: bool
    lanes: int
    plan: Plan
    sender: End
    receiver: End
    rows: list[Row]
    left_out: list[LeftOut]
    failed: list[LeftOut]


def summarize(work: Work, runs: list[Run]) -> Row:
    """Make one row of the runs of one work."""
    trips = work.kind is Kind.ROUND_TRIP
    size = work.size_bytes
    return Row(
        work=work,
        rounds=len(runs),
        messages=sum(run.total for run in runs),
        payload_bytes=sum(run.total for run in runs) * size,
        gb_per_s=_range(run.total * size / run.sender.wall_s / 1e9 for run in runs),
        messages_per_s=_range(run.total / run.sender.wall_s for run in runs),
        cpu_s_per_gib=_range(run.cpu_s * GIB / (run.total * size) for run in runs),
        cpu_s_per_gib_sender=_range(run.sender.cpu_s * GIB / (run.total * size) for run in runs),
        cpu_s_per_gib_receiver=_range(run.receiver.cpu_s * GIB / (run.total * size) for run in runs),
        cpu_us_per_message=_range(run.cpu_s * 1e6 / run.total for run in runs),
        round_trip_us=_range(statistics.median(run.laps_us) for run in runs) if trips else None,
        round_trip_p99_us=_range(_p99(run.laps_us) for run in runs) if trips else None,
        sender=_path([run.sender for run in runs]),
        receiver=_path([run.receiver for run in runs]),
    )


def _range(values: Iterable[float]) -> Range:
    found = sorted(values)
    return Range(statistics.median(found), found[0], found[-1])


def _p99(laps_us: list[float]) -> float:
    ordered = sorted(laps_us)
    return ordered[-(-len(ordered) * 99 // 100) - 1]


def _path(figures: list[EndFigures]) -> Path:
    return Path(
        backend=figures[0].backend,
        congestion_controls=sorted({name for one in figures for name in one.congestion_controls}),
        received_dmabuf=sum(one.dmabuf_bytes for one in figures),
        received_linear=sum(one.linear_bytes for one in figures),
        received_host=sum(one.host_bytes for one in figures),
        copied=sum(one.copied_bytes for one in figures),
        sent_dmabuf=sum(one.sent_dmabuf_bytes for one in figures),
        sent_host=sum(one.sent_host_bytes for one in figures),
    )
