"""The one door: ``open_nic`` alone chooses a backend, once."""

from __future__ import annotations

import warnings
from enum import Enum

from devmem_tcp.broker.client import BrokerControl
from devmem_tcp.contract import Nic
from devmem_tcp.errors import BackendFallbackWarning, BackendUnavailable
from devmem_tcp.kernel.control import LocalControl, NicControl
from devmem_tcp.kernel.lessee import open_kernel_nic
from devmem_tcp.probe import probe_kernel, reasons
from devmem_tcp.software.nic import SoftwareNic
from devmem_tcp.software.options import SoftwareOptions


class Backend(Enum):
    """Who does the work behind the contract."""

    AUTO = "auto"
    KERNEL = "kernel"
    SOFTWARE = "software"


def open_nic(
    name: str,
    backend: Backend | str = Backend.AUTO,
    *,
    software: SoftwareOptions | None = None,
    via: str | None = None,
) -> Nic:
    """Open a NIC by name.

    The backend is settled here, once: nothing in the environment changes it, and it never changes later.

    Args:
        name: a network interface (``eth1``); the software backend also takes ``soft0``, ``soft1``, …, which need none.
        backend: ``kernel`` (Linux devmem TCP), ``software`` (the same contract over ordinary TCP), or ``auto``: kernel
            where every check passes, else software with a BackendFallbackWarning that says why.
        software: options of the software backend.
        via: the socket of a broker that binds and steers for this program, which then needs no CAP_NET_ADMIN; for the
            software backend it means nothing.

    Raises:
        BackendUnavailable: the backend asked for cannot run here; its ``report`` has every check.
        KernelError: the NIC or the broker went away, or changed, since it was probed.
        ValueError: no such backend.
    """
    chosen = Backend(backend)
    if chosen is Backend.SOFTWARE:
        return SoftwareNic(name, software or SoftwareOptions())
    report = probe_kernel(name, via)
    if report.ok:
        return _open_kernel(name, via)
    if chosen is Backend.KERNEL:
        raise BackendUnavailable(
            f"the kernel backend cannot run on {name}: {reasons(report)}",
            report=report,
            hint='open_nic(name, backend="software") runs anywhere, over ordinary TCP',
        )
    warnings.warn(
        f"{name}: software backend, which is not zero copy; the kernel backend cannot run: {reasons(report)}",
        BackendFallbackWarning,
        stacklevel=2,
    )
    return SoftwareNic(name, software or SoftwareOptions())


def _open_kernel(name: str, via: str | None) -> Nic:
    control: NicControl = LocalControl(name) if via is None else BrokerControl(via, name)
    try:
        return open_kernel_nic(name, control)
    except BaseException:
        control.close()
        raise
