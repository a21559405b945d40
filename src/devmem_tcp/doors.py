"""The one door: ``open_nic`` alone chooses a backend, once."""

from __future__ import annotations

import warnings
from enum import Enum

from devmem_tcp.contract import Nic
from devmem_tcp.errors import BackendFallbackWarning, BackendUnavailable
from devmem_tcp.probe import probe_kernel
from devmem_tcp.software.nic import SoftwareNic
from devmem_tcp.software.options import SoftwareOptions
from devmem_tcp.types import ProbeReport


class Backend(Enum):
    """Who does the work behind the contract."""

    AUTO = "auto"
    KERNEL = "kernel"
    SOFTWARE = "software"


def open_nic(name: str, backend: Backend | str = Backend.AUTO, *, software: SoftwareOptions | None = None) -> Nic:
    """Open a NIC by name.

    The backend is settled here, once: nothing in the environment changes it, and it never changes later.

    Args:
        name: a network interface (``eth1``); the software backend also takes ``soft0``, ``soft1``, …, which need none.
        backend: ``kernel`` (Linux devmem TCP), ``software`` (the same contract over ordinary TCP), or ``auto``: kernel
            where every check passes, else software with a BackendFallbackWarning that says why.
        software: options of the software backend.

    Raises:
        BackendUnavailable: the backend asked for cannot run here; its ``report`` has every check.
        KernelError: ENODEV: no such interface.
        ValueError: no such backend.
    """
    chosen = Backend(backend)
    if chosen is Backend.SOFTWARE:
        return SoftwareNic(name, software or SoftwareOptions())
    report = probe_kernel()
    if chosen is Backend.KERNEL:
        raise BackendUnavailable(
            f"the kernel backend cannot run: {reasons(report)}",
            report=report,
            hint='open_nic(name, backend="software") runs anywhere, over ordinary TCP',
        )
    warnings.warn(
        f"{name}: software backend, which is not zero copy; the kernel backend cannot run: {reasons(report)}",
        BackendFallbackWarning,
        stacklevel=2,
    )
    return SoftwareNic(name, software or SoftwareOptions())


def reasons(report: ProbeReport) -> str:
    """Return what speaks against a backend, in one line."""
    return "; ".join(f"{check.name}: {check.found}" for check in report.checks)
