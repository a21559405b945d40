"""One turn of a peer: its two processes, started, listened to, and ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import msgspec

from loopback import GIB
from peers.control import Figures
from peers.ends import DRIVE, SERVE, Done, Failed, Order
from peers.works import Work

BENCH: Final = Path(__file__).resolve().parents[1]
START_S: Final = 30.0
"""How much longer the first work may take: libraries of a gigabyte are imported first."""

GRACE_S: Final = 2.0
"""How long one process may go on when the other has failed: to say why, if it knows better."""

_LAST_LINES: Final = 3


class Run(msgspec.Struct, frozen=True):
    """One work, done once: what both processes measured."""

    work: Work
    server: Figures
    driver: Figures

    @property
    def gb_per_s(self) -> float:
        """Speed from the first send until the last acknowledgement is there, in 10^9 bytes a second."""
        return self.work.total_bytes / self.driver.wall_s / 1e9

    @property
    def cpu_s_per_gib(self) -> float:
        """CPU time of both processes."""
        return (self.server.cpu_s + self.driver.cpu_s) / (self.work.total_bytes / GIB)


class Outcome(msgspec.Struct, frozen=True):
    """What came of a turn: the works that were done, in order, and why the next one was not."""

    runs: list[Run]
    failure: str = ""


class End:
    """One of the two processes, as its parent sees it."""

    def __init__(self, role: str, process: subprocess.Popen[bytes], results: IO[bytes], log: IO[bytes]) -> None:
        self.role = role
        self.done: list[Figures] = []
        self.failed: Failed | None = None
        self.ended = False
        self.results = results
        self._process = process
        self._log = log
        self._partial = b""

    def read(self) -> bool:
        """Take in what it has written since; returns whether that ended a work."""
        data = os.read(self.results.fileno(), 1 << 20)
        self.ended = not data
        *lines, self._partial = (self._partial + data).split(b"\n")
        before = len(self.done)
        for line in lines:
            found = msgspec.json.decode(line, type=Done | Failed)
            if isinstance(found, Done):
                self.done.append(found.figures)
            else:
                self.failed = found
        return len(self.done) > before

    def words(self) -> str:
        """Say why it failed: its error, or how it died and the last that it printed. Empty if it did not."""
        if self.failed is not None:
            return f"{self.role}: {self.failed.words}" if self.failed.alone else ""
        if not self.ended:
            return ""
        code = self._process.wait()
        if code == 0:
            return ""
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"{self.role} {how}{self.last_printed()}"

    def last_printed(self) -> str:
        """Return the last lines that it printed, after a colon; empty if there are none."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
        return ": " + " / ".join(lines) if lines else ""

    def end(self) -> None:
        """Kill it if it lives, and wait."""
        self._process.kill()
        self._process.wait()


def run(reference: str, works: list[Work], congestion: str, limit_s: float, cpus: tuple[int, int] | None) -> Outcome:
    """Let a peer do works; both of its processes are gone when this returns or raises.

    Args:
        reference: the peer, as module:class.
        works: what to do, in this order.
        congestion: the congestion control of every TCP socket, or "-".
        limit_s: how long one work may take, in seconds.
        cpus: the CPUs to keep the server and the driver on, or None: wherever the scheduler puts them.
    """
    order = msgspec.json.encode(Order(works, congestion)).decode()
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        with ours, theirs:
            server_cpu, driver_cpu = cpus or (None, None)
            ends = (
                stack.enter_context(_started(SERVE, reference, order, ours, server_cpu)),
                stack.enter_context(_started(DRIVE, reference, order, theirs, driver_cpu)),
            )
        failure = _listen(ends, len(works), limit_s)
        server, driver = ends
        pairs = zip(works, server.done, driver.done, strict=False)
        return Outcome([Run(work, received, sent) for work, received, sent in pairs], failure)


@contextlib.contextmanager
def _started(role: str, reference: str, order: str, channel: socket.socket, cpu: int | None) -> Iterator[End]:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as results, tempfile.TemporaryFile() as log:
        fds = (channel.fileno(), writing)
        command = [sys.executable, "-m", "peers.ends", role, reference, *map(str, fds), order]
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, allowed if cpu is None else {cpu})  # a process has that of who starts it
        try:
            process = subprocess.Popen(
                command, cwd=BENCH, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        finally:
            os.sched_setaffinity(0, allowed)
            os.close(writing)
        end = End(role, process, results, log)
        try:
            yield end
        finally:
            end.end()


def _listen(ends: tuple[End, End], count: int, limit_s: float) -> str:
    """Read both ends until all works are done or one has failed; returns why, in the words of those who know."""
    deadline = time.monotonic() + START_S + limit_s
    with selectors.DefaultSelector() as selector:
        for end in ends:
            selector.register(end.results, selectors.EVENT_READ, end)
        while selector.get_map() and any(len(end.done) < count for end in ends):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for key, _ in ready:
                speaker: End = key.data
                if speaker.read():
                    deadline = time.monotonic() + limit_s
                if speaker.ended:
                    selector.unregister(key.fileobj)
                    deadline = min(deadline, time.monotonic() + GRACE_S)
    if all(len(end.done) == count for end in ends):
        return ""
    words = [text for end in ends if (text := end.words())]
    words = words or [f"{end.role}: {end.failed.words}" for end in ends if end.failed]
    if words:
        return "; ".join(words)
    printed = "".join(end.last_printed() for end in ends)
    return f"cut off: no result within {limit_s:g} s{printed}"
