"""Questions to bind-rx and bind-tx that bind nothing: they name an fd that no process can have.

The kernel looks for the caller's privilege first, then for the device and whether its driver and DMA can do it, and
only then for the memory; queues are touched last. So EBADF says that all but the memory is right.

Kernel: net/netlink/genetlink.c, genl_family_rcv_msg; net/core/netdev-genl.c, netdev_nl_bind_rx_doit and
netdev_nl_bind_tx_doit; net/core/devmem.c, net_devmem_bind_dmabuf.
"""

from __future__ import annotations

import errno
from typing import Final

from devmem_tcp.errors import BindError, BrokenError, KernelError
from devmem_tcp.kernel import netdev
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.uapi import netdev as abi
from devmem_tcp.uapi import netlink
from devmem_tcp.uapi.netdev import Command

_NO_FD: Final = 0x7FFFFFFF  # above every limit of open files: fs/file.c, sysctl_nr_open_max
_LOOPBACK_IFINDEX: Final = 1  # in every network namespace; net/core/dev.c, register_netdevice; uapi linux/net.h
_CTRL_ATTR_OPS: Final = 6
_CTRL_ATTR_OP_ID: Final = 1


def netdev_commands() -> frozenset[int]:
    """Return the commands that this kernel's netdev family knows; none if there is no such family.

    Kernel: nlctrl getfamily; include/uapi/linux/genetlink.h, CTRL_ATTR_OPS.
    """
    with GenericNetlink("nlctrl") as controller:
        try:
            wanted = netlink.attr_string(netlink.CTRL_ATTR_FAMILY_NAME, abi.FAMILY)
            found = controller.request(netlink.CTRL_CMD_GETFAMILY, wanted)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            return frozenset()
    try:
        listed = found.nested(_CTRL_ATTR_OPS)
        return frozenset(listed.nested(index).u32(_CTRL_ATTR_OP_ID) for index in listed)
    except ValueError as error:
        raise BrokenError(f"nlctrl getfamily {abi.FAMILY}: the kernel's answer makes no sense: {error}") from error


def may_bind() -> bool:
    """Whether this process has the privilege to bind in its network namespace."""
    refusal = ask_rx(_LOOPBACK_IFINDEX, 0)
    return refusal is None or refusal.errno != errno.EPERM


def ask_rx(ifindex: int, queue: int) -> BindError | None:
    """Ask whether an RX queue could be bound; returns what speaks against it, None if nothing does."""
    return _ask(Command.BIND_RX, ifindex, queue)


def ask_tx(ifindex: int) -> BindError | None:
    """Ask whether a device sends from device memory; returns what speaks against it, None if nothing does."""
    return _ask(Command.BIND_TX, ifindex, 0)


def _ask(command: Command, ifindex: int, queue: int) -> BindError | None:
    with GenericNetlink(abi.FAMILY) as nl:
        try:
            if command is Command.BIND_RX:
                netdev.bind_rx(nl, ifindex, _NO_FD, [queue])
            else:
                netdev.bind_tx(nl, ifindex, _NO_FD)
        except BindError as error:
            return None if error.errno == errno.EBADF else error
    raise BrokenError(f"netdev {netlink.spell(command)}: the kernel bound an fd that is not open")
