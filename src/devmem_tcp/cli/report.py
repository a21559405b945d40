"""What recv and send say at the end: the proof of path, for people and as JSON."""

from __future__ import annotations

import sys
from typing import Final

import click
import msgspec

from devmem_tcp.types import SocketStats

_LABEL_WIDTH: Final = 12


class ListeningEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="listening"):
    """The socket listens, and this is where."""

    host: str
    port: int


class ProgressEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="progress"):
    """``bytes`` have moved so far."""

    bytes: int


class ReceivedReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="received"):
    """One finished reception. ``path`` is the socket's proof of path; sizes are in bytes."""

    bytes: int
    seconds: float
    gigabytes_per_second: float
    nic: str
    queue: int
    rx_queue: int
    dmabuf_id: int
    memory: str
    buffer_bytes: int
    local: str
    remote: str
    path: SocketStats
    smallest_frag: int
    largest_frag: int
    output: str
    verified_pattern: int | None
    sha256: str | None


class SentReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="sent"):
    """One finished sending. ``completions`` counts the ranges that reported completed sends."""

    bytes: int
    seconds: float
    gigabytes_per_second: float
    nic: str
    dmabuf_id: int
    memory: str
    buffer_bytes: int
    window_bytes: int
    local: str
    remote: str
    path: SocketStats
    completions: int
    source: str
    sha256: str | None


class DemoReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="demo"):
    """One finished demo: the file (``made`` by the demo or not), its hash, what both ends said, the copy if kept."""

    file: str
    made: bool
    bytes: int
    sha256: str
    received: ReceivedReport
    sent: SentReport
    kept: str | None


Event = ListeningEvent | ProgressEvent | ReceivedReport | SentReport | DemoReport

_encoder: Final = msgspec.json.Encoder()
_decoder: Final[msgspec.json.Decoder[Event]] = msgspec.json.Decoder(Event)


def print_json(event: msgspec.Struct) -> None:
    """Print an event as one line of JSON on stdout, at once."""
    click.echo(_encoder.encode(event))
    sys.stdout.flush()


def read_json(line: bytes) -> Event:
    """Read a line that ``print_json`` wrote.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return _decoder.decode(line)


def rate(moved: int, seconds: float) -> float:
    """Return 10**9 bytes a second; 0 if no time passed."""
    return moved / seconds / 1e9 if seconds > 0 else 0.0


def binary(count: int) -> str:
    """Write bytes for people: ``1 GiB``, ``1.5 MiB``, ``512 bytes``."""
    value = float(count)
    units = ["TiB", "GiB", "MiB", "KiB", "bytes"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop()
    return f"{value:.4g} {units[-1]}"


def amount(count: int) -> str:
    """Write bytes exactly, and for people where that differs: ``1,536 bytes (1.5 KiB)``."""
    exact = f"{count:,} bytes"
    return exact if count < 1024 else f"{exact} ({binary(count)})"


def frag_sizes(report: ReceivedReport) -> str:
    """Write the range of frag sizes: ``848 to 4,096 bytes``."""
    if report.smallest_frag == report.largest_frag:
        return f"{report.largest_frag:,} bytes"
    return f"{report.smallest_frag:,} to {report.largest_frag:,} bytes"


def print_received(report: ReceivedReport) -> None:
    """Print the proof of path of a reception on stderr."""
    path = report.path
    _headline("received", report.bytes, report.seconds, f"from {report.remote}")
    _line(
        "backend",
        f"{path.backend}, {report.nic}, queue {report.rx_queue if report.rx_queue >= 0 else 'not told'}, "
        f"dmabuf id {report.dmabuf_id} ({binary(report.buffer_bytes)}, {report.memory})",
    )
    _line("path", f"dmabuf {path.dmabuf_bytes:,} bytes, linear {path.linear_bytes:,}, host {path.host_bytes:,}")
    _line("frags", f"{path.frags:,} of {frag_sizes(report)}")
    _line(
        "calls",
        f"{path.recv_calls:,} recv, {path.dontneed_calls:,} DONTNEED; {path.tokens_out:,} tokens out",
    )
    _congestion(path)
    if report.verified_pattern is not None:
        _line("verified", f"every byte, pattern of {report.verified_pattern}")
    if report.sha256 is not None:
        _line("sha256", report.sha256)


def print_sent(report: SentReport) -> None:
    """Print the proof of path of a sending on stderr."""
    path = report.path
    _headline("sent", report.bytes, report.seconds, f"to {report.remote}")
    _line(
        "backend",
        f"{path.backend}, {report.nic}, dmabuf id {report.dmabuf_id} "
        f"({binary(report.buffer_bytes)}, {report.memory}), windows of {binary(report.window_bytes)}",
    )
    _line("path", f"dmabuf {path.sent_dmabuf_bytes:,} bytes, host {path.sent_host_bytes:,}")
    _line(
        "calls",
        f"{path.send_calls:,} send, completed in {report.completions:,} ranges; {path.sends_incomplete:,} incomplete",
    )
    _congestion(path)
    if report.sha256 is not None:
        _line("sha256", report.sha256)


def _headline(verb: str, moved: int, seconds: float, peer: str) -> None:
    click.echo(f"{verb} {amount(moved)} {peer} in {seconds:.2f} s, {rate(moved, seconds):.2f} GB/s", err=True)


def _congestion(path: SocketStats) -> None:
    if path.congestion_control:
        _line("congestion", path.congestion_control)


def _line(label: str, text: str) -> None:
    click.echo(f"  {label:<{_LABEL_WIDTH}}{text}", err=True)
