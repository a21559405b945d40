"""Completions of MSG_ZEROCOPY sends on a socket's error queue: include/uapi/linux/errqueue.h, as data."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from devmem_tcp.uapi.socket import CMSG_HEADER_SIZE, CMSGHDR, Buffer, align_control, walk_control

SOL_IP: Final = 0
IP_RECVERR: Final = 11
SOL_IPV6: Final = 41
IPV6_RECVERR: Final = 25

SO_EE_ORIGIN_ZEROCOPY: Final = 5
SO_EE_CODE_ZEROCOPY_COPIED: Final = 1

SOCK_EXTENDED_ERR: Final = struct.Struct("<IBBBBII")
"""struct sock_extended_err, 16 bytes: ee_errno, ee_origin, ee_type, ee_code, ee_pad, ee_info, ee_data."""

_RECVERR_TYPES: Final = {SOL_IP: IP_RECVERR, SOL_IPV6: IPV6_RECVERR}
_OFFENDER_SIZES: Final = {SOL_IP: 16, SOL_IPV6: 28}  # struct sockaddr_in, sockaddr_in6; zeros for a completion


def pack_completion(low: int, high: int, *, code: int = 0) -> bytes:
    """Pack the sock_extended_err that says sends ``low`` to ``high`` inclusive are complete, 16 bytes.

    Kernel: net/core/skbuff.c, __msg_zerocopy_callback. Numbers are of 32 bits and wrap, so
    ``high`` may be below ``low``.

    Args:
        low, high: numbers of the first and the last send, from 0.
        code: 0, or SO_EE_CODE_ZEROCOPY_COPIED: the kernel copied the bytes after all.

    Raises:
        ValueError: a number does not fit its field.
    """
    try:
        return SOCK_EXTENDED_ERR.pack(0, SO_EE_ORIGIN_ZEROCOPY, 0, code, 0, low, high)
    except struct.error as error:
        raise ValueError(f"completion {low} to {high}, code {code}: {error}") from None


def build_errqueue(completions: Iterable[tuple[int, int]], *, level: int) -> bytes:
    """Build the control messages that recvmsg(MSG_ERRQUEUE) gives for zerocopy completions.

    Kernel: net/ipv4/ip_sockglue.c, ip_recv_error, and net/ipv6/datagram.c, ipv6_recv_error: the error, then the address
    of who caused it, zeros here. The kernel gives one message a call; several in one buffer parse all the same.

    Args:
        completions: (low, high) of each range, as in ``pack_completion``.
        level: SOL_IP on an IPv4 socket, SOL_IPV6 on an IPv6 socket.

    Raises:
        ValueError: a number does not fit 32 bits, or the level is another one.
    """
    if level not in _RECVERR_TYPES:
        raise ValueError(f"completions come with level SOL_IP ({SOL_IP}) or SOL_IPV6 ({SOL_IPV6}), not {level}")
    size = CMSG_HEADER_SIZE + SOCK_EXTENDED_ERR.size + _OFFENDER_SIZES[level]
    header = CMSGHDR.pack(size, level, _RECVERR_TYPES[level])
    records = (header + pack_completion(low, high) for low, high in completions)
    return b"".join(record.ljust(align_control(size), b"\0") for record in records)


def parse_errqueue(control: Buffer, length: int) -> list[tuple[int, int]]:
    """Parse the control messages of one recvmsg(MSG_ERRQUEUE) into ranges of completed sends, (low, high) inclusive.

    Ranges come as the kernel gives them, wrapped ones included; other errors (ICMP, timestamps) and other control
    messages are passed over.

    Kernel: Documentation/networking/msg_zerocopy.rst, "Notification Parsing".

    Args:
        control: msg_control, one contiguous range of bytes.
        length: msg_controllen as recvmsg left it, in bytes.

    Raises:
        ValueError: as ``walk_control``, or an error message shorter than struct sock_extended_err.
    """
    completed: list[tuple[int, int]] = []
    for level, kind, start, end in walk_control(control, length):
        if _RECVERR_TYPES.get(level) != kind:
            continue
        if end - start < SOCK_EXTENDED_ERR.size:
            raise ValueError(
                f"control message at byte {start - CMSG_HEADER_SIZE}: {end - start} bytes of data are less than"
                f" struct sock_extended_err's {SOCK_EXTENDED_ERR.size}"
            )
        number, origin, _, _, _, low, high = SOCK_EXTENDED_ERR.unpack_from(control, start)
        if number == 0 and origin == SO_EE_ORIGIN_ZEROCOPY:
            completed.append((low, high))
    return completed
