"""Processes of the lab, each with a log of its own, and folders for their sockets: gone with this one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

_GRACE_S: Final = 5.0  # from being asked to end to being killed
_FOLDER_PREFIX: Final = "devmem-lab-"
_UNLOCKED_S: Final = 10.0  # a younger folder may be about to be locked


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


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """Make a folder for UNIX sockets, whose paths have to be short, and remove it at the end of the block.

    It is locked for as long as its process lives. Those of runs that were killed are not, and are removed here.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_FOLDER_PREFIX) as name, _locked(Path(name)):
        yield Path(name)


def _remove_abandoned(places: Path) -> None:
    for folder in places.glob(f"{_FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is in use, another user's, or removed by another run just now
            if time.time() - folder.stat().st_mtime > _UNLOCKED_S:
                with _locked(folder):
                    shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; raises BlockingIOError if somebody else does. Kernel: flock(2)."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _ended_with_parent() -> list[str]:
    setpriv = shutil.which("setpriv")  # util-linux, on every Debian and Ubuntu; without it only kill -9 leaves a trace
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []
