"""The doctor's examination: everything that devmem TCP needs of this machine and one of its NICs."""

from __future__ import annotations

import contextlib
from typing import Final

from devmem_tcp.probe.finding import OTHER_NIC, error, looked_at, ok, reasons
from devmem_tcp.probe.memory import memory_checks
from devmem_tcp.probe.network import mtu, retransmission
from devmem_tcp.probe.nic import NECESSARY, NicCheck, driver, link, nic_checks
from devmem_tcp.probe.system import broker, kernel_checks, netdev_family, privilege, process_checks
from devmem_tcp.probe.usage import bound_queues, journal, page_pools
from devmem_tcp.sys import calls
from devmem_tcp.types import ProbeCheck, ProbeReport

_ALL: Final[dict[str, NicCheck]] = {
    "driver": driver,
    "link": link,
    **NECESSARY,
    "bound queues": bound_queues,
    "page pools": page_pools,
    "MTU": mtu,
}
_LOOPBACK: Final = "lo"


def probe_kernel(name: str, via: str | None = None) -> ProbeReport:
    """Say whether the kernel backend can run on a NIC: the checks that decide it, quickly, changing nothing.

    Args:
        name: a network interface of this network namespace.
        via: the socket of the broker that is to bind; None: this process, which needs CAP_NET_ADMIN for it.
    """
    allowed = looked_at("CAP_NET_ADMIN", privilege) if via is None else broker(via, name)
    family = looked_at("netdev family", netdev_family)
    return ProbeReport((family, allowed, *nic_checks(name, NECESSARY)))


def probe_machine(nic: str | None = None) -> ProbeReport:
    """Examine this machine for devmem TCP, and one NIC whole; changes nothing.

    Args:
        nic: a network interface of this network namespace; None: all of them, each in a line.
    """
    checks = [*kernel_checks(), *process_checks()]
    checks += candidates() if nic is None else nic_checks(nic, _ALL)
    checks += memory_checks()
    checks += [looked_at("sender's RTO", retransmission), looked_at("journal", journal)]
    return ProbeReport(tuple(checks))


def candidates() -> list[ProbeCheck]:
    """Say of each NIC whether devmem TCP can run on it, and whether there is such a one."""
    checks, fit = [], []
    for name in _interfaces():
        found = nic_checks(name, {"driver": driver, **NECESSARY})
        against = reasons(ProbeReport(tuple(found)))
        who = next((check.found.partition(",")[0] for check in found if check.name == "driver"), "gone")
        checks.append(ok(f"NIC {name}", f"{who}: " + (f"no. {against}" if against else "can carry devmem TCP")))
        if not against:
            fit.append(name)
    needed = "one with header split, ntuple rules, RSS, and queues that can be bound"
    if fit:
        return [*checks, ok("NICs", f"{', '.join(fit)}; more about it: devmem-tcp doctor {fit[0]}", needed)]
    return [*checks, error("NICs", "none here can carry devmem TCP", needed, OTHER_NIC)]


def _interfaces() -> list[str]:
    """Return the interfaces that may be NICs; none if this machine does not tell."""
    with contextlib.suppress(OSError):
        return [name for name in calls.interface_names() if name != _LOOPBACK]
    return []
