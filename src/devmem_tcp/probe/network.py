"""Checks of how well the network serves devmem TCP: pages filled by packets, and what a stall costs."""

from __future__ import annotations

from typing import Final

from devmem_tcp.kernel.ethtool import Ethtool
from devmem_tcp.probe.finding import ok
from devmem_tcp.probe.link import read_link
from devmem_tcp.sys import calls
from devmem_tcp.types import PAGE_SIZE, ProbeCheck

# IP and TCP headers, with the timestamps that Linux sends: RFC 791, RFC 8200, RFC 9293, RFC 7323
_HEADERS: Final = {"IPv4": 20 + 20 + 12, "IPv6": 40 + 20 + 12}
_WELL_FILLED: Final = 0.9
_GOOD_RTO_MAX_MS: Final = 1000
_RTO_MAX: Final = "/proc/sys/net/ipv4/tcp_rto_max_ms"
_RTO_MIN: Final = "/proc/sys/net/ipv4/tcp_rto_min_us"
_DEFAULT_RTO_MAX_MS: Final = 120_000  # TCP_RTO_MAX, include/net/tcp.h


def mtu(nic: Ethtool) -> ProbeCheck:
    """How much of each page a full packet fills.

    A packet starts on a page of its own and is not merged with the next one, so what is left of its last page is lost
    for the time that the frag is held.
    """
    name, needed = "MTU", "payload that fills whole pages: 4148 or 8244 for IPv4, 4168 or 8264 for IPv6"
    size = read_link(nic.ifindex).mtu
    filled = {family: _filled(size - headers) for family, headers in _HEADERS.items()}
    found = f"{size}: " + ", ".join(f"{family} fills {share:.0%} of its pages" for family, share in filled.items())
    if max(filled.values()) >= _WELL_FILLED:
        return ok(name, found, needed)
    best = PAGE_SIZE + _HEADERS["IPv4"]
    advice = f"sudo ip link set dev {nic.nic} mtu {best}   # if all of the way to the peer takes it"
    return ok(name, found, needed, advice)


def _filled(payload: int) -> float:
    pages = -(-payload // PAGE_SIZE)
    return payload / (pages * PAGE_SIZE) if payload > 0 else 0.0


def retransmission() -> ProbeCheck:
    """How long the sender may wait before it sends again what the NIC dropped for want of a page.

    Kernel: net/ipv4/sysctl_net_ipv4.c; the wait doubles with each try, from tcp_rto_min_us to tcp_rto_max_ms.
    """
    name, needed = "sender's RTO", "on the sender, short: after a stall data resumes with a retransmission"
    try:
        longest = int(calls.read_text(_RTO_MAX))
    except FileNotFoundError:
        found = f"up to {_DEFAULT_RTO_MAX_MS / 1000:g} s, fixed in this kernel"
        return ok(name, found, needed, "# Linux 6.15 and newer have net.ipv4.tcp_rto_max_ms")
    try:
        shortest = f"{int(calls.read_text(_RTO_MIN)) / 1000:g} ms"
    except FileNotFoundError:
        shortest = "200 ms"
    found = f"{shortest} to {longest / 1000:g} s between tries"
    if longest <= _GOOD_RTO_MAX_MS:
        return ok(name, found, needed)
    advice = f"sudo sysctl -w net.ipv4.tcp_rto_max_ms={_GOOD_RTO_MAX_MS}   # on the sender"
    return ok(name, found, needed, advice)
