"""Checks of one NIC: whether devmem TCP can run on it. None of them changes anything."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from devmem_tcp.errors import KernelError
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.ethtool import NTUPLE, Ethtool, feature_words, header_split_words
from devmem_tcp.kernel.leasing import is_lessee
from devmem_tcp.kernel.leasing import leased_queues as queues_leased_to
from devmem_tcp.probe.binding import ask_rx, ask_tx
from devmem_tcp.probe.finding import OTHER_NIC, error, looked_at, ok, said, warning
from devmem_tcp.probe.link import XdpMode, read_link
from devmem_tcp.types import HeaderSplitMode, ProbeCheck
from devmem_tcp.uapi.netdev import QueueType

NicCheck = Callable[[Ethtool], ProbeCheck]

_MIN_QUEUES: Final = 2
_GOOD_QUEUES: Final = 4
_DETACH: Final = {
    XdpMode.DRIVER: ("xdpdrv",),
    XdpMode.GENERIC: ("xdpgeneric",),
    XdpMode.OFFLOADED: ("xdpoffload",),
    XdpMode.SEVERAL: ("xdpdrv", "xdpgeneric"),
}
_NTUPLE_FEATURE: Final = "rx-ntuple-filter"


def header_split(nic: Ethtool) -> ProbeCheck:
    """Whether the driver splits headers from payload."""
    name, needed = "header split", "on, with hds-thresh 0, while a queue is bound: set_header_split does it"
    try:
        rings = nic.rings()
    except KernelError as refused:
        if refused.errno != errno.EOPNOTSUPP:
            raise
        return error(name, "the driver has none", needed, OTHER_NIC)
    if rings.header_split is HeaderSplitMode.UNKNOWN:
        return error(name, "the driver does not say that it can", needed, OTHER_NIC)
    if rings.hds_thresh:
        found = f"{rings.header_split.value}, and packets of up to {rings.hds_thresh} bytes are not split"
        return warning(name, found, needed, f"sudo ethtool -G {nic.nic} hds-thresh 0")
    if rings.header_split is HeaderSplitMode.OFF:
        return ok(name, "off; can be turned on", needed, f"sudo {header_split_words(nic.nic, HeaderSplitMode.ON)}")
    return ok(name, "on", needed)


def ntuple(nic: Ethtool) -> ProbeCheck:
    """Whether flows can be steered by rule."""
    name, needed = "ntuple rules", "on while a flow is steered: add_ntuple does it"
    feature = nic.features().get(_NTUPLE_FEATURE)
    if feature is None or (feature.fixed and not feature.on):
        return error(name, "the driver has none", needed, OTHER_NIC)
    if not feature.on:
        return ok(name, "off; can be turned on", needed, f"sudo {feature_words(nic.nic, NTUPLE, True)}")
    table = nic.rule_table()
    return ok(name, f"on; {len(table.locations)} of {table.size:,} locations in use", needed)


def rx_queues(nic: Ethtool) -> ProbeCheck:
    """Whether there is an RX queue to bind, and another one for everything else."""
    name, needed = "RX queues", "two or more: one to bind, one for all other traffic"
    try:
        count = nic.rx_queues()
    except KernelError as refused:
        if refused.errno != errno.EOPNOTSUPP:
            raise
        return error(name, "the driver tells of none", needed, OTHER_NIC)
    if count >= _MIN_QUEUES:
        return ok(name, str(count), needed)
    limits = nic.channels()
    kind, limit = ("combined", limits.combined_max) if limits.combined_max >= _MIN_QUEUES else ("rx", limits.rx_max)
    if limit < _MIN_QUEUES:
        return error(name, f"{count}, and no more to be had", needed, OTHER_NIC)
    fix = f"sudo ethtool -L {nic.nic} {kind} {min(limit, _GOOD_QUEUES)}"
    return error(name, f"{count}, of {limit} possible", needed, fix)


def rss(nic: Ethtool) -> ProbeCheck:
    """Whether RSS can be kept off a queue."""
    name, needed = "RSS", "an indirection table, to keep other traffic off the bound queue: set_rss does it"
    try:
        table = nic.rss().table
    except KernelError as refused:
        if refused.errno != errno.EOPNOTSUPP:
            raise
        return error(name, "the driver has none", needed, OTHER_NIC)
    if not table:
        return error(name, "no indirection table", needed, OTHER_NIC)
    queues = ", ".join(map(str, sorted(set(table))))
    return ok(name, f"a table of {len(table)}, onto queues {queues}", needed)


def xdp(nic: Ethtool) -> ProbeCheck:
    """Whether an XDP program is attached. Kernel: net/core/netdev_rx_queue.c, __netif_mp_open_rxq refuses it."""
    name, needed = "XDP", "no program: it would read what the CPU cannot"
    mode = read_link(nic.ifindex).xdp
    if mode is XdpMode.NONE:
        return ok(name, "none attached", needed)
    typed = " && ".join(f"sudo ip link set dev {nic.nic} {word} off" for word in _DETACH[mode])
    fix = f"{typed}   # or end the program that attached it: bpftool net"
    return error(name, f"a program is attached ({mode.name.lower()})", needed, fix)


def queue_management(nic: Ethtool) -> ProbeCheck:
    """Whether the driver restarts single queues, on memory that the NIC reaches by itself."""
    name, needed = "binding", "a driver that restarts single queues, and DMA"
    refusal = ask_rx(nic.ifindex, _queue_to_ask_for(nic))
    if refusal is None:
        return ok(name, "bind-rx takes this NIC", needed)
    if refusal.errno == errno.EPERM:
        fix = f"sudo devmem-tcp doctor {nic.nic}   # asks with the privilege it takes"
        return warning(name, "not asked: bind-rx answers only CAP_NET_ADMIN", needed, fix)
    found, fix = said(refusal)
    return error(name, found, needed, fix)


def _queue_to_ask_for(nic: Ethtool) -> int:
    """Return the last RX queue that is not leased to another interface, which would be refused as if by the driver."""
    with contextlib.suppress(KernelError):
        free = [one.queue for one in netdev.queues(nic.ifindex) if one.type is QueueType.RX and one.lease is None]
        if free:
            return max(free)
    try:
        return max(0, nic.rx_queues() - 1)
    except KernelError:
        return 0


def leased_queues(nic: Ethtool) -> ProbeCheck:
    """Whether a virtual interface has RX queues of a NIC."""
    name, needed = "leased queues", "one or more RX queues of the host's NIC, with header split on there"
    leased = queues_leased_to(nic.ifindex)
    if leased:
        text = ", ".join(map(str, leased))
        return ok(name, f"{text}; header split, RSS and ntuple rules are the host's to set", needed)
    if not read_link(nic.ifindex).up:
        return error(name, "not told while the interface is down", needed, f"sudo ip link set dev {nic.nic} up")
    fix = (
        f"sudo devmem-tcp lease NIC QUEUE --to {nic.nic} --netns PID   # on the host; PID: a process of this container"
    )
    return error(name, "none", needed, fix)


def sending(nic: Ethtool) -> ProbeCheck:
    """Whether the driver sends from device memory; receiving does without."""
    name, needed = "sending", "to send from device memory; host memory can always be sent"
    refusal = ask_tx(nic.ifindex)
    if refusal is None:
        return ok(name, "bind-tx takes this NIC", needed)
    found, fix = said(refusal)
    return warning(name, found, needed, fix)


NECESSARY: Final[dict[str, NicCheck]] = {
    "header split": header_split,
    "ntuple rules": ntuple,
    "RX queues": rx_queues,
    "RSS": rss,
    "XDP": xdp,
    "binding": queue_management,
    "sending": sending,
}
"""What decides whether the kernel backend can run on a NIC."""

_OF_THE_HOST: Final = frozenset({"header split", "ntuple rules", "RX queues", "RSS"})


def checks_of(nic: Ethtool, checks: Mapping[str, NicCheck]) -> dict[str, NicCheck]:
    """Return the checks to make: of a virtual interface not those of what its host's NIC has."""
    if not is_lessee(nic):
        return dict(checks)
    return {"leased queues": leased_queues} | {name: one for name, one in checks.items() if name not in _OF_THE_HOST}


def driver(nic: Ethtool) -> ProbeCheck:
    """Who drives the NIC."""
    try:
        found = nic.driver()
    except KernelError as refused:
        if refused.errno != errno.EOPNOTSUPP:
            raise
        return ok("driver", "tells no name")
    texts = (found.version and f"version {found.version}", found.firmware and f"firmware {found.firmware}", found.bus)
    return ok("driver", ", ".join([found.driver, *filter(None, texts)]))


def link(nic: Ethtool) -> ProbeCheck:
    """Whether the NIC is up and somebody at the other end."""
    name, needed = "link", "up"
    found = read_link(nic.ifindex)
    if not found.up:
        return warning(name, "down", needed, f"sudo ip link set dev {nic.nic} up")
    if not found.carrier:
        return warning(name, "up, without a carrier", needed, "# see to the cable, or to the other end")
    return ok(name, "up", needed)


def open_ethtool(name: str) -> tuple[ProbeCheck, Ethtool | None]:
    """Look for an interface; returns what was found and, if it is there, what the other checks ask: the caller's."""
    needed = "a network interface of this network namespace"
    try:
        return ok("interface", name, needed), Ethtool(name)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return error("interface", f"there is no {name}", needed, "ip -brief link   # those that there are"), None


def nic_checks(name: str, checks: Mapping[str, NicCheck]) -> list[ProbeCheck]:
    """Make checks of a NIC, all of them; if there is no such NIC, say so and which were not made."""
    first, nic = open_ethtool(name)
    if nic is None:
        left_out = ", ".join(checks)
        return [first, warning("not looked at", f"without an interface: {left_out}", "", "")]
    with nic:
        return [first, *(looked_at(title, partial(check, nic)) for title, check in checks_of(nic, checks).items())]
