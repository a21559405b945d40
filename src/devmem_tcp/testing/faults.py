"""Faults put in at the one syscall seam: make the n-th call fail, and sweep n over a whole scenario."""

from __future__ import annotations

import contextlib
import errno as _errno
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from devmem_tcp.errors import DevmemError, errno_name
from devmem_tcp.sys import calls
from devmem_tcp.testing.leaks import leak_check

DEFAULT_SWEEP_LIMIT: Final = 2000  # calls; a scenario that makes more is not a scenario but a load test


@dataclass(slots=True)
class Fault:
    """What ``fail_nth`` saw: the ``calls`` in order, and the name of the one that was made to fail."""

    calls: list[str] = field(default_factory=list)
    failed_call: str | None = None

    @property
    def fired(self) -> bool:
        return self.failed_call is not None


@contextlib.contextmanager
def fail_nth(n: int, *, errno: int = _errno.ENOMEM, only: Collection[str] | None = None) -> Iterator[Fault]:
    """Make the n-th system call of this package fail with ``errno``; all others go through.

    Args:
        n: which call, from 1; 0 fails none and just lists them.
        errno: of the OSError raised instead of the call. As everywhere in Python, some become a subclass
            (EAGAIN: BlockingIOError).
        only: count and fail only calls of these names (those of ``devmem_tcp.sys.calls``); others are not seen.

    Raises:
        ValueError: ``n`` is negative.
        RuntimeError: another fault is in place.
    """
    if n < 0:
        raise ValueError(f"calls are counted from 1, got n={n}")
    fault = Fault()

    def hook(name: str) -> None:
        if only is not None and name not in only:
            return
        fault.calls.append(name)
        if len(fault.calls) == n:
            fault.failed_call = name
            raise OSError(errno, f"{os.strerror(errno)} (put in at call {n}, {name})")

    with calls.intercept(hook):
        yield fault


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One run of a sweep: which call failed how, and what the scenario did about it."""

    n: int
    call: str
    errno: int
    outcome: str  # "passed", or the error the scenario raised
    broke: str  # what is wrong with that; empty if nothing

    def __str__(self) -> str:
        return f"call {self.n}, {self.call} -> {errno_name(self.errno)}: {self.broke or self.outcome}"


def sweep(
    scenario: Callable[[], object],
    *,
    errnos: Sequence[int] = (_errno.ENOMEM,),
    limit: int = DEFAULT_SWEEP_LIMIT,
    only: Collection[str] | None = None,
) -> tuple[SweepRun, ...]:
    """Run ``scenario`` with call 1, 2, 3 … failing until it runs through without meeting a fault; check each run.

    A run is good if the scenario passes all the same or raises OSError or DevmemError, and in both cases leaves
    nothing behind (``leak_check``). The scenario does all its set-up and tear-down itself and bounds its waits.

    Args:
        errnos: each is tried at every call.
        limit: calls at most; a scenario that never gets through is an error.
        only: as of ``fail_nth``: for calls that a scenario makes now earlier and now later, which a sweep may miss.

    Returns:
        Every run that met a fault, in order.

    Raises:
        AssertionError: some runs were not good; names which call, failing how, broke what.
    """
    runs: list[SweepRun] = []
    for errno in errnos:
        for n in range(1, limit + 1):
            run = _run_once(scenario, n, errno, only)
            if run is None:
                break
            runs.append(run)
        else:
            raise AssertionError(f"scenario still met faults after {limit} calls: raise limit, or make it shorter")
    broken = [str(run) for run in runs if run.broke]
    if broken:
        raise AssertionError(f"{len(broken)} of {len(runs)} runs went wrong:\n" + "\n".join(broken))
    return tuple(runs)


def _run_once(scenario: Callable[[], object], n: int, errno: int, only: Collection[str] | None) -> SweepRun | None:
    """Run with call ``n`` failing; None if the scenario passed without meeting it."""
    outcome, broke = "passed", ""
    try:
        with leak_check(), fail_nth(n, errno=errno, only=only) as fault:
            # Only text of an error may outlive the run: its traceback would keep the scenario's objects alive.
            try:
                scenario()
            except (OSError, DevmemError) as error:
                outcome = f"{type(error).__name__}: {error}"
            except Exception as error:
                outcome = broke = f"unexpected {type(error).__name__}: {error}"
    except AssertionError as error:
        broke = "\n".join(filter(None, (broke, f"after {outcome!r}, {error}")))
    if not fault.fired:
        if outcome == "passed" and not broke:
            return None
        raise AssertionError(f"scenario fails without any fault: {broke or outcome}")
    return SweepRun(n, fault.failed_call or "", errno, outcome, broke)
