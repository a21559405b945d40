"""Progress while bytes move: a bar on a terminal, or lines of JSON."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, TypeAlias

from devmem_tcp.cli.report import ProgressEvent, print_json

if TYPE_CHECKING:
    from rich.progress import Progress

Advance: TypeAlias = Callable[[int], None]

_INTERVAL_S: Final = 0.1  # between two updates


@contextlib.contextmanager
def progress(kind: str, what: str, total: int | None, *, quiet: bool) -> Iterator[Advance]:
    """Show progress of ``what`` until the block ends; yields a function to call with each number of bytes moved.

    Args:
        kind: ``auto``, ``json`` or ``none``, as the option ``--progress``.
        total: bytes in all, if known.
    """
    if kind == "json":
        yield _Throttled(lambda moved: print_json(ProgressEvent(bytes=moved)))
    elif kind == "none" or quiet or not sys.stderr.isatty():
        yield lambda count: None
    else:
        with _bar(known=total is not None) as shown:
            task = shown.add_task(what, total=total)
            throttled = _Throttled(lambda moved: shown.update(task, completed=moved))
            yield throttled
            throttled.flush()


def _bar(*, known: bool) -> Progress:
    """Make a progress bar for bytes, on stderr, shown while it is entered; ``known``: how many there will be."""
    from rich import progress as parts
    from rich.console import Console

    return parts.Progress(
        parts.TextColumn("{task.description}"),
        *([parts.BarColumn(), parts.DownloadColumn()] if known else [parts.SpinnerColumn(), parts.FileSizeColumn()]),
        parts.TransferSpeedColumn(),
        parts.TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


class _Throttled:
    """Adds up bytes and tells the sum at most once an interval: telling costs more than moving a megabyte."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._moved = 0
        self._next_s = 0.0

    def __call__(self, count: int) -> None:
        self._moved += count
        now = time.monotonic()
        if now >= self._next_s:
            self._next_s = now + _INTERVAL_S
            self._tell(self._moved)

    def flush(self) -> None:
        self._tell(self._moved)
