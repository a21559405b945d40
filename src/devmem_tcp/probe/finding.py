"""How a check says what it found.

Conventions: ``needed`` is empty where nothing is; a ``fix`` on an OK check is advice. A fix is a command to type; what
is not to be typed stands behind ``#``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from devmem_tcp import refusals
from devmem_tcp.errors import DevmemError, KernelError, errno_name
from devmem_tcp.types import ProbeCheck, ProbeReport, Severity

OTHER_NIC: Final = (
    "devmem-tcp lab shell   # a NIC that needs no hardware; of real ones, the drivers gve, bnxt, mlx5 (ConnectX-7 and "
    "later) and fbnic can"
)


def ok(name: str, found: str, needed: str = "", advice: str = "") -> ProbeCheck:
    """Say that something is as it must be."""
    return ProbeCheck(name, Severity.OK, found, needed, advice)


def warning(name: str, found: str, needed: str, fix: str) -> ProbeCheck:
    """Say that something works, but not as well as it could, or could not be found out."""
    return ProbeCheck(name, Severity.WARNING, found, needed, fix)


def error(name: str, found: str, needed: str, fix: str) -> ProbeCheck:
    """Say that devmem TCP cannot work like this."""
    return ProbeCheck(name, Severity.ERROR, found, needed, fix)


def looked_at(name: str, look: Callable[[], ProbeCheck]) -> ProbeCheck:
    """Return what ``look`` finds; what it cannot find out is a warning, so that the other checks are made."""
    try:
        return look()
    except DevmemError as failed:
        return warning(name, f"could not be found out: {failed.message}", "", failed.hint)
    except (OSError, ValueError) as failed:
        return warning(name, f"could not be found out: {failed}", "", "")


def said(refusal: KernelError) -> tuple[str, str]:
    """Return what a refusal of the kernel means, with its errno and words, and what to do about it."""
    known = refusals.find(refusal)
    words = ": ".join(filter(None, (errno_name(refusal.errno or 0), refusal.extack)))
    return (f"{known.cause} ({words})", f"# {known.fix}") if known else (refusal.message, f"# {refusal.hint}")


def reasons(report: ProbeReport) -> str:
    """Return what makes devmem TCP impossible, in one line; empty if nothing does."""
    against = (check for check in report.checks if check.severity is Severity.ERROR)
    return "; ".join(f"{check.name}: {check.found}" for check in against)
