"""Processes of the lab: started with a log of their own, ended with this one, whatever ends it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

_GRACE_S: Final = 5.0  # from being asked to end to being killed


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None, fds: Sequence[int] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command while the block runs; at its end the process has ended too, asked or killed.

    It is outside the terminal's foreground group, so that Ctrl-C is for this process alone, which then ends it; and the
    kernel ends it when this process dies without a chance to.

    Args:
        log: file that its output goes to.
        environment: variables on top of this process's own.
        fds: inherited by it under the same numbers.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*_ended_with_parent(), *command],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
            pass_fds=tuple(fds),
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, and wait until it has."""
    process.terminate()  # nothing happens if it has been waited for
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail(log: Path, lines: int) -> str:
    """Return the last lines of a log; empty if there is none."""
    try:
        with log.open(encoding="utf-8", errors="replace") as text:
            return "".join(deque(text, lines)).rstrip()
    except FileNotFoundError:
        return ""


def _ended_with_parent() -> list[str]:
    setpriv = shutil.which("setpriv")  # util-linux, on every Debian and Ubuntu; without it only kill -9 leaves a trace
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []
