"""One network interface as rtnetlink tells it: up or down, MTU, XDP.

Source: Documentation/netlink/specs/rt-link.yaml; include/uapi/linux/if_link.h.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from devmem_tcp.errors import BrokenError, KernelError
from devmem_tcp.sys import calls
from devmem_tcp.sys.netlink import RECEIVE_BYTES
from devmem_tcp.uapi import netlink
from devmem_tcp.uapi.netlink import Attributes, attr_u32

_NETLINK_ROUTE: Final = 0
_RTM_NEWLINK: Final = 16
_RTM_GETLINK: Final = 18
_IFINFOMSG: Final = struct.Struct("<BxHiII")  # family, type, index, flags, change
_EXT_MASK: Final = 29
_SKIP_STATS: Final = 1 << 3  # RTEXT_FILTER_SKIP_STATS: they make an answer long
_IFF_UP: Final = 0x1
_IFF_LOWER_UP: Final = 0x10000


class _Link(IntEnum):
    MTU = 4
    XDP = 43


class _Xdp(IntEnum):
    ATTACHED = 2


class XdpMode(IntEnum):
    """Where an XDP program is attached: IFLA_XDP_ATTACHED."""

    NONE = 0
    DRIVER = 1
    GENERIC = 2
    OFFLOADED = 3
    SEVERAL = 4


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. ``carrier``: somebody is at the other end."""

    up: bool
    carrier: bool
    mtu: int
    xdp: XdpMode


def read_link(ifindex: int) -> Link:
    """Ask the kernel about an interface; unprivileged.

    Kernel: RTM_GETLINK; net/core/rtnetlink.c, rtnl_getlink, which answers within the call that asks.

    Raises:
        KernelError: ENODEV: there is none.
        BrokenError: the answer makes no sense.
    """
    call = f"rtnetlink getlink {ifindex}"
    wanted = _IFINFOMSG.pack(0, 0, ifindex, 0, 0) + attr_u32(_EXT_MASK, _SKIP_STATS)
    try:
        sock = calls.open_netlink(_NETLINK_ROUTE)
        with contextlib.closing(sock):
            calls.bind(sock, (0, 0))
            calls.send(sock, netlink.message(_RTM_GETLINK, netlink.NLM_F_REQUEST, 1, wanted))
            datagram, _, _ = calls.recv_datagram(sock, RECEIVE_BYTES, calls.MSG_DONTWAIT)
    except OSError as error:
        raise KernelError(error.errno or 0, call) from error
    try:
        answer = netlink.parse_messages(datagram)[0]
        if answer.kind == netlink.NLMSG_ERROR:
            number, _ = netlink.parse_ack(answer)
            raise KernelError(number, call)
        if answer.kind != _RTM_NEWLINK:
            raise ValueError(f"message of type {answer.kind}")
        flags = _IFINFOMSG.unpack_from(answer.payload)[3]
        found = Attributes(answer.payload[_IFINFOMSG.size :])
        xdp = XdpMode(found.nested(_Link.XDP).u8(_Xdp.ATTACHED, 0))
        return Link(bool(flags & _IFF_UP), bool(flags & _IFF_LOWER_UP), found.u32(_Link.MTU), xdp)
    except (ValueError, IndexError, struct.error) as error:
        raise BrokenError(f"{call}: the kernel's answer makes no sense: {error}") from error
