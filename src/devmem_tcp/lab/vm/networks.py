"""Which NIC goes where: MAC and IP addresses, namespaces, and the names the job knows them by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PEER_NAMESPACE: Final = "peer"
MAX_NICS: Final = 16

_IPV4: Final = "10.77.0.{}"
_IPV6: Final = "fd77::{:x}"


@dataclass(frozen=True, kw_only=True)
class NicPlace:
    """Where a NIC goes in a guest: ``namespace`` is empty for the guest's own. Addresses have no prefix length."""

    mac: str
    mtu: int
    ipv4: str
    ipv6: str
    namespace: str = ""

    @property
    def addresses(self) -> tuple[str, str]:
        """Both addresses with their prefix lengths: all NICs are on one wire, and in one subnet of each kind."""
        return f"{self.ipv4}/24", f"{self.ipv6}/64"


def places(nics: int, *, hosts: int, mtu: int) -> list[tuple[NicPlace, ...]]:
    """Return the NICs of each guest.

    In a single guest the first NIC stays in the guest's own namespace and each other one gets a namespace: ``peer``,
    ``peer2`` …, so that their traffic takes the wire. Of two guests each keeps its NICs to itself.

    Args:
        nics: of each guest.
        hosts: how many guests there are.

    Raises:
        ValueError: more NICs in all than the wire's subnet is laid out for.
    """
    if not 0 <= nics * hosts <= MAX_NICS:
        raise ValueError(f"0 to {MAX_NICS} NICs in all, not {nics * hosts}")
    return [
        tuple(
            _place(1 + host * nics + index, mtu, "" if hosts > 1 or index == 0 else _namespace(index))
            for index in range(nics)
        )
        for host in range(hosts)
    ]


def job_environment(all_places: list[tuple[NicPlace, ...]], host: int) -> dict[str, str]:
    """Return what a job on ``host`` is told of its own address and its peer's; empty where there are not two NICs.

    The names are those that the kernel's selftests read (tools/testing/selftests/drivers/net/README.rst), so that they
    run unmodified. NETIF, the name of the first interface, is added in the guest, where it is known.
    """
    mine = all_places[host]
    others = mine[1:] if len(all_places) == 1 else tuple(nic for other in all_places if other != mine for nic in other)
    if not mine or not others:
        return {}
    local, remote = mine[0], others[0]
    environment = {
        "LOCAL_V4": local.ipv4,
        "LOCAL_V6": local.ipv6,
        "REMOTE_V4": remote.ipv4,
        "REMOTE_V6": remote.ipv6,
    }
    if remote.namespace:
        environment |= {"REMOTE_TYPE": "netns", "REMOTE_ARGS": remote.namespace}
    return environment


def _place(number: int, mtu: int, namespace: str) -> NicPlace:
    return NicPlace(
        mac=f"02:00:00:00:00:{number:02x}",  # locally administered
        mtu=mtu,
        ipv4=_IPV4.format(number),
        ipv6=_IPV6.format(number),
        namespace=namespace,
    )


def _namespace(index: int) -> str:
    return PEER_NAMESPACE if index == 1 else f"{PEER_NAMESPACE}{index}"
