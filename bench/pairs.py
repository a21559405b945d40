"""Run a receiver and a sender as two processes over loopback, and gather what each of them measured."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import msgspec

from loopback import HOST

HERE: Final = Path(__file__).resolve().parent
PLAIN_ENDS: Final = (sys.executable, str(HERE / "plain_ends.py"))
SOFTWARE_ENDS: Final = (sys.executable, str(HERE / "software_ends.py"))

END_TIMEOUT_S: Final = 120.0
PLAIN: Final = "plain TCP"

T = TypeVar("T")
Placement: TypeAlias = tuple[int, int]


class PairFailed(Exception):
    """One of the two processes ended badly; its own words are on stderr, above this."""


class Announcement(msgspec.Struct, frozen=True):
    """A receiver's first line: where it listens."""

    port: int


class End(msgspec.Struct, frozen=True):
    """A process's last line: what it measured between the connection and the end of stream."""

    bytes: int
    wall_s: float
    cpu_s: float
    calls: int  # system calls
    backend: str = PLAIN
    dmabuf_bytes: int = 0
    linear_bytes: int = 0
    host_bytes: int = 0
    frags: int = 0
    dontneed_calls: int = 0
    congestion_control: str = ""
    reach_bytes: int = 0  # how much of the Buffer was used, from its start


class Pair(msgspec.Struct, frozen=True):
    """One run: both ends."""

    receiver: End
    sender: End

    @property
    def gb_per_s(self) -> float:
        """Speed as the receiver saw it, in 10^9 bytes a second."""
        return self.receiver.bytes / self.receiver.wall_s / 1e9


def built_limit() -> tuple[str, ...] | None:
    """Return the C program that throughput.py measures against; None on a machine without a C compiler."""
    return built("tcp_limit")


def built(name: str) -> tuple[str, ...] | None:
    """Compile ``name``.c if that is missing or older than its source; None on a machine without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source, binary = HERE / f"{name}.c", HERE / "build" / name
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        binary.parent.mkdir(exist_ok=True)
        subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", str(binary), str(source)], check=True)
    return (str(binary),)


def cpus_apart() -> Placement | None:
    """Return one CPU for the receiver and another for the sender; None on a machine of one CPU."""
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 else None


def run_pair(receiver: list[str], sender: list[str], transfer: list[str], placement: Placement | None) -> Pair:
    """Run one connection; returns what both ends measured.

    Args:
        receiver: its whole command line.
        sender: its command line up to and including ``send``; host and port are added.
        transfer: what follows them: bytes, buffer, chunk and congestion control.
        placement: the CPUs to keep the receiver and the sender on, or None: wherever the scheduler puts them.

    Raises:
        PairFailed: an end ended badly, or the two did not count the same bytes.
    """
    output, sent_output = exchange(receiver, lambda port: [*sender, HOST, str(port), *transfer], placement)
    received, sent = decode(output, End), decode(sent_output, End)
    if received.bytes != sent.bytes:
        raise PairFailed(f"{sent.bytes} bytes were sent, {received.bytes} received, by {receiver[:3]}")
    return Pair(_with_path(received), _with_path(sent))


def exchange(
    receiver: list[str], sender_to: Callable[[int], list[str]], placement: Placement | None = None
) -> tuple[bytes, bytes]:
    """Start a receiver, read from it where it listens, run a sender to its end; returns both last lines.

    Raises:
        PairFailed: one of them did not end with exit code 0, or not in time.
    """
    receiver_cpu, sender_cpu = placement or (None, None)
    with _running(receiver, receiver_cpu) as receiving:
        assert receiving.stdout is not None
        port = decode(receiving.stdout.readline(), Announcement).port
        with _running(sender_to(port), sender_cpu) as sending:
            sent = _output(sending)
        return _output(receiving), sent


@contextlib.contextmanager
def _running(command: list[str], cpu: int | None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command, on one CPU if one is given; it does not outlive the block.

    A process has the affinity of the one that starts it, from its first instruction on.
    """
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, allowed if cpu is None else {cpu})
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
    finally:
        os.sched_setaffinity(0, allowed)
    with process:
        try:
            yield process
        finally:
            process.kill()


def _output(process: subprocess.Popen[bytes]) -> bytes:
    """Wait for a process and return what it printed since."""
    try:
        output, _ = process.communicate(timeout=END_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise PairFailed(str(error)) from error
    if process.returncode != 0:
        raise PairFailed(f"exit code {process.returncode} of {process.args!r}")
    return output


def decode(line: bytes, kind: type[T]) -> T:
    """Read a line of figures. Raises PairFailed if it is none."""
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.DecodeError as error:
        raise PairFailed(f"no {kind.__name__} in {line!r}") from error


def _with_path(end: End) -> End:
    """Say of a plain end what is true of every plain socket: all of its bytes go through host memory."""
    return msgspec.structs.replace(end, host_bytes=end.bytes) if end.backend == PLAIN else end
