"""RX queues of a NIC leased to virtual interfaces (netkit), in this network namespace or a container's.

The container binds memory to the queue by its own interface; header split, RSS and ntuple rules stay the host's, on the
NIC. A lease ends with the virtual interface, whoever made it, and in no other way; so there is nothing to put back
here. Kernel: net/core/netdev-genl.c, netdev_nl_queue_create_doit; drivers/net/netkit.c.
"""

from __future__ import annotations

import contextlib
import errno
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from devmem_tcp import refusals
from devmem_tcp.errors import KernelError, SettingWarning, SteeringWarning
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.ethtool import Ethtool, header_split_words
from devmem_tcp.kernel.netns import HERE, NetworkNamespace, known_number, number_of
from devmem_tcp.nicmodel.isolation import OtherRule, isolation_warnings
from devmem_tcp.sys import calls
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.types import HeaderSplitMode
from devmem_tcp.uapi.netdev import FAMILY, QueueType

_LESSEE_DRIVERS: Final = frozenset({"netkit"})
_OWN_QUEUE: Final = 0  # the one that a virtual interface is made with; leased ones are added after it


@dataclass(frozen=True, slots=True)
class QueueLease:
    """An RX queue of a NIC that a virtual interface has."""

    nic: str
    nic_queue: int
    interface: str
    netns: str | None  # the path of the interface's network namespace; None: the NIC's own
    queue: int  # the RX queue's number at the interface


def lease_queue(nic: Ethtool, queue: int, to: str, netns: str | int | None = None) -> QueueLease:
    """Lease an RX queue of a NIC to a virtual interface. Whoever administers that can bind to it from then on.

    What else must be set on the NIC for that, and is not, is a warning: a SettingWarning for header split, a
    SteeringWarning for other traffic that the NIC sends to this queue.

    Lifetime: the lease ends with the virtual interface (``ip link del``), or with the NIC, which takes it along.

    Args:
        nic: a NIC of this network namespace.
        queue: of the NIC; of gve not 0.
        to: the second interface of a netkit pair, made with room for one more queue (numrxqueues).
        netns: where that is, as of ``netns.namespace_path``; None: in this network namespace.

    Kernel: netdev queue-create, asked in the interface's namespace; needs CAP_NET_ADMIN in the first user namespace,
    and CAP_SYS_ADMIN to enter another network namespace.

    Raises:
        KernelError: ENODEV: no such interface; EBUSY: the queue is bound, leased or used by AF_XDP; EOPNOTSUPP: this
            kernel has no leasing; ERANGE: no such queue, or gve's queue 0; ENOENT: no such namespace.
    """
    if queue == 0 and _driver(nic) == "gve":  # Linux would lease it, and warn in its log once it is bound
        hint = "no memory can be bound to queue 0 of gve: lease queue 1 or higher"
        raise refusals.GVE_FIRST_QUEUE.error(KernelError, call="netdev queue-create", hint=hint)
    if netns is None:
        made = QueueLease(nic.nic, queue, to, None, _create(nic.ifindex, queue, to, None))
    else:
        with NetworkNamespace(HERE) as here, NetworkNamespace(netns) as there:
            number = there.run(partial(_create, nic.ifindex, queue, to, here, there.path))
            made = QueueLease(nic.nic, queue, to, there.path, number)
    with contextlib.suppress(KernelError):  # the lease is made, whatever the driver does not tell
        _warn_of_settings(nic, queue)
    return made


def _create(nic_ifindex: int, queue: int, to: str, here: NetworkNamespace | None, path: str = "") -> int:
    """Lease a queue to an interface of this thread's namespace; ``here`` is the NIC's, if that is another."""
    ifindex = _index(to, path)
    number = None if here is None else number_of(here)
    with GenericNetlink(FAMILY) as netlink:
        return netdev.lease_queue(ifindex, nic_ifindex, queue, nic_netns_id=number, netlink=netlink)


def _index(interface: str, path: str) -> int:
    try:
        return calls.interface_index(interface)
    except OSError as error:
        hint = f"interfaces: {_there(path)}ip -brief link"
        raise KernelError(errno.ENODEV, f"lease a queue to {interface}", hint=hint) from error


def lease_words(nic: Ethtool, queue: int, to: str, netns: str | int | None = None) -> list[str]:
    """Return the commands that do by hand what ``lease_queue`` would do; changes nothing.

    Raises:
        KernelError: ENODEV: no such interface; ENOENT: no such namespace.
    """
    lease: dict[str, Any] = {"ifindex": nic.ifindex, "queue": {"type": "rx", "id": queue}}
    if netns is None:
        return [_queue_create(_index(to, ""), lease, "")]
    with NetworkNamespace(HERE) as here, NetworkNamespace(netns) as there:
        ifindex = there.run(partial(_index, to, there.path))
        number = there.run(partial(known_number, here))
        path = there.path
    if number is not None:
        return [_queue_create(ifindex, lease | {"netns-id": number}, path)]
    first = f"# {path} has no number for the network namespace of {nic.nic} yet: N is the one that it gets"
    return [first, _queue_create(ifindex, lease | {"netns-id": "N"}, path)]


def _queue_create(ifindex: int, lease: dict[str, Any], path: str) -> str:
    wanted = json.dumps({"ifindex": ifindex, "type": "rx", "lease": lease})
    return f"{_there(path)}ynl --family netdev --do queue-create --json '{wanted}'"


def _there(path: str) -> str:
    return f"nsenter --net={path} " if path else ""


# --- what the host has to see to ------------------------------------------------------------------------------------


def other_traffic(nic: Ethtool, queues: Sequence[int]) -> list[str]:
    """Say what else a NIC sends to queues that are bound or leased, and what keeps it off them."""
    foreign = [OtherRule(one.location, one.queue, one.kind) for one in nic.rules() if one.rule is None]
    return isolation_warnings(nic.rss().table, foreign, queues, nic=nic.nic)


def _warn_of_settings(nic: Ethtool, queue: int) -> None:
    rings = nic.rings()
    if rings.header_split is not HeaderSplitMode.ON:
        fix = header_split_words(nic.nic, HeaderSplitMode.ON)
        text = f"header split of {nic.nic} is not on, so RX queue {queue} cannot be bound by anybody; fix: {fix}"
        warnings.warn(text, SettingWarning, stacklevel=4)
    for text in other_traffic(nic, [queue]):
        warnings.warn(text, SteeringWarning, stacklevel=4)


# --- what the other side sees ---------------------------------------------------------------------------------------


def is_lessee(nic: Ethtool) -> bool:
    """Whether an interface is of a kind that queues can be leased to. Kernel: ETHTOOL_GDRVINFO."""
    return _driver(nic) in _LESSEE_DRIVERS


def leased_queues(ifindex: int) -> tuple[int, ...]:
    """Return the RX queues that a virtual interface has by leases; none while it is down.

    Linux says of the NIC's queue where it is leased to, but not of the interface's whose it is; each one but the first
    is leased (drivers/net/netkit.c, netkit_queue_create).

    Kernel: netdev queue-get.
    """
    found = netdev.queues(ifindex)
    return tuple(one.queue for one in found if one.type is QueueType.RX and one.queue != _OWN_QUEUE)


def _driver(nic: Ethtool) -> str:
    """Return the driver's name; empty if it tells none."""
    try:
        return nic.driver().driver
    except KernelError:
        return ""
