"""Network namespaces other than this one: their names, work done there, and the numbers they know each other by."""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from devmem_tcp.closing import Closing
from devmem_tcp.errors import BrokenError, KernelError
from devmem_tcp.sys import calls, namespaces
from devmem_tcp.sys.netlink import RECEIVE_BYTES
from devmem_tcp.uapi import netlink
from devmem_tcp.uapi.netlink import Attributes, Message, attr_s32, attr_u32

Result = TypeVar("Result")

HERE: Final = "/proc/thread-self/ns/net"
"""The path of the calling thread's own network namespace."""

_NETLINK_ROUTE: Final = 0
_RTM_NEWNSID: Final = 88  # uapi/linux/rtnetlink.h
_RTM_GETNSID: Final = 90
_RTGENMSG: Final = struct.Struct("<Bxxx")
_NETNSA_NSID: Final = 1  # uapi/linux/net_namespace.h
_NETNSA_FD: Final = 3
_NOT_ASSIGNED: Final = -1  # NETNSA_NSID_NOT_ASSIGNED; in a request: the kernel is to choose
_HINTS: Final = {
    errno.ENOENT: "name one of: ip netns list; or a process in it: lsns --type net",
    errno.EPERM: "entering a namespace needs CAP_SYS_ADMIN: run as root on the host (sudo)",
    errno.EACCES: "entering a namespace needs CAP_SYS_ADMIN: run as root on the host (sudo)",
    errno.EINVAL: "this is no network namespace: name one of ip netns list, a process, or /proc/PID/ns/net",
}


def namespace_path(name: str | int) -> str:
    """Return the path that stands for a network namespace.

    Args:
        name: a process in it, by number; what ``ip netns`` calls it; or, with a slash in it, such a path.
    """
    text = str(name)
    if "/" in text:
        return text
    return f"/proc/{text}/ns/net" if text.isascii() and text.isdecimal() else f"/run/netns/{text}"


class NetworkNamespace(Closing):
    """A network namespace, held open: it lives as long as this does.

    Args:
        name: as of ``namespace_path``.

    Raises:
        KernelError: ENOENT: there is none of this name; EACCES: it is another user's.
    """

    def __init__(self, name: str | int) -> None:
        self.path: Final = namespace_path(name)
        try:
            self.fd: Final = namespaces.open_namespace(self.path)
        except OSError as error:
            raise _refused(error, f"open {self.path}") from error
        self._open = True

    def close(self) -> None:
        if self._open:
            self._open = False
            calls.close_fd(self.fd)

    def run(self, work: Callable[[], Result]) -> Result:
        """Return what ``work()`` returns in this namespace, in a thread that moves there and then ends.

        Raises:
            KernelError: EPERM: no privilege to enter; EINVAL: it is no network namespace. And what ``work`` raises.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="devmem-tcp-netns") as threads:
            return threads.submit(self._enter_and, work).result()

    def _enter_and(self, work: Callable[[], Result]) -> Result:
        try:
            namespaces.enter_network_namespace(self.fd)
        except OSError as error:
            raise _refused(error, f"setns {self.path}") from error
        return work()


def known_number(other: NetworkNamespace) -> int | None:
    """Return the number that this thread's network namespace knows another one by; None if it has none.

    Kernel: RTM_GETNSID; net/core/net_namespace.c, rtnl_net_getid.
    """
    call = "rtnetlink getnsid"
    answer = _ask(_RTM_GETNSID, 0, call, attr_u32(_NETNSA_FD, other.fd))
    try:
        number = Attributes(answer.payload[_RTGENMSG.size :]).s32(_NETNSA_NSID)
    except ValueError as error:
        raise BrokenError(f"{call}: the kernel's answer makes no sense: {error}") from error
    return None if number == _NOT_ASSIGNED else number


def number_of(other: NetworkNamespace) -> int:
    """Return the number that this thread's network namespace knows another one by; it is given one, if it has none.

    Kernel: RTM_NEWNSID, which needs CAP_NET_ADMIN; a number lasts as long as both namespaces.
    """
    number = known_number(other)
    if number is None:
        wanted = (attr_u32(_NETNSA_FD, other.fd), attr_s32(_NETNSA_NSID, _NOT_ASSIGNED))
        _ask(_RTM_NEWNSID, netlink.NLM_F_ACK, "rtnetlink newnsid", *wanted)
        number = known_number(other)
    if number is None:
        raise BrokenError(f"rtnetlink newnsid: the kernel gave {other.path} no number")
    return number


def _ask(kind: int, flags: int, call: str, *attributes: bytes) -> Message:
    """Make one request of rtnetlink and return its answer, which may be an ack."""
    request = netlink.message(kind, netlink.NLM_F_REQUEST | flags, 1, _RTGENMSG.pack(0) + b"".join(attributes))
    try:
        with contextlib.closing(calls.open_netlink(_NETLINK_ROUTE)) as sock:
            calls.bind(sock, (0, 0))
            calls.send(sock, request)
            datagram, _, _ = calls.recv_datagram(sock, RECEIVE_BYTES, calls.MSG_DONTWAIT)
        (answer,) = netlink.parse_messages(datagram)
        number = netlink.parse_ack(answer)[0] if answer.kind == netlink.NLMSG_ERROR else 0
    except OSError as error:
        raise KernelError(error.errno or 0, call) from error
    except ValueError as error:
        raise BrokenError(f"{call}: the kernel's answer makes no sense: {error}") from error
    if number:
        raise KernelError(number, call, hint=_HINTS.get(number, ""))
    return answer


def _refused(error: OSError, call: str) -> KernelError:
    number = error.errno or 0
    return KernelError(number, call, hint=_HINTS.get(number, ""))
