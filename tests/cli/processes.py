"""``devmem-tcp`` in a process of its own, for tests: started, listened to, ended."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LIMIT_S = 30.0
SOFTWARE = ("--backend", "software", "--buffer", "4M")  # small: quick to map


@dataclass(frozen=True)
class Finished:
    """How a process ended and what it said."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def report(self) -> dict[str, Any]:
        """The last line of ``--json``."""
        last: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return last


class Running:
    """A started process; its streams are unbuffered here, so that a line can be read before the rest."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def json_line(self) -> dict[str, Any]:
        """Read the next line of ``--json``."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._said()
        event: dict[str, Any] = json.loads(line)
        return event

    def stderr_line(self, wanted: str) -> str:
        """Read stderr up to a line that holds ``wanted``, and return that line."""
        assert self.process.stderr is not None
        seen = b""
        while line := self.process.stderr.readline():
            seen += line
            if wanted in line.decode():
                return line.decode()
        raise AssertionError(f"{wanted!r} was never said, but: {seen.decode()}")

    def port(self) -> int:
        """Wait until it listens, as its ``--json`` or its stderr says, and return the port."""
        if "--json" in self.process.args:  # type: ignore[operator]  # always a list here
            event = self.json_line()
            assert event["event"] == "listening"
            return int(event["port"])
        found = re.search(r":(\d+) ", self.stderr_line("listening on "))
        assert found is not None
        return int(found[1])

    def finish(self, given: bytes | None = None) -> Finished:
        """Wait for the end, giving it stdin if it has one, and return how it ended."""
        stdout, stderr = self.process.communicate(given, timeout=LIMIT_S)
        finished = Finished(self.process.returncode, stdout or b"", (stderr or b"").decode())
        assert "Traceback" not in finished.stderr, finished.stderr
        return finished

    def _said(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()


@contextlib.contextmanager
def running(
    *arguments: str | Path,
    program: Sequence[str] = ("-m", "devmem_tcp"),
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.PIPE,
) -> Iterator[Running]:
    """Run ``devmem-tcp ARGUMENTS``, or another Python program; killed at the end of the block if it still runs."""
    process = subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    with process:
        try:
            yield Running(process)
        finally:
            if process.poll() is None:
                process.kill()


def children(pid: int) -> list[int]:
    """Return the processes that a process started and that still exist."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def exists(pid: int) -> bool:
    """Whether a process exists."""
    return Path(f"/proc/{pid}").exists()
