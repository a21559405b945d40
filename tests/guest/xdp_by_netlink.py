"""An XDP program that lets every packet pass, attached as ip(8) does, so that ip(8) can detach it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

from devmem_tcp.uapi import netlink as nl

_GENERIC: Final = 1 << 1  # XDP_FLAGS_SKB_MODE, include/uapi/linux/if_link.h
_SYS_BPF: Final = 321  # x86-64
_BPF_PROG_LOAD: Final = 5  # include/uapi/linux/bpf.h
_BPF_PROG_TYPE_XDP: Final = 6
_IN_PIECES: Final = 1 << 5  # BPF_F_XDP_HAS_FRAGS
_PROG_LOAD: Final = struct.Struct("<IIQQIIQII")  # of union bpf_attr, from prog_type to prog_flags
_PASS: Final = struct.pack("<BBhi", 0xB7, 0, 0, 2) + struct.pack("<BBhi", 0x95, 0, 0, 0)  # r0 = XDP_PASS; exit
_RTM_SETLINK: Final = 19
_IFINFOMSG: Final = struct.Struct("<BxHiII")
_IFLA_XDP, _IFLA_XDP_FD, _IFLA_XDP_FLAGS = 43, 1, 3
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def generic_xdp(nic: str, *, in_pieces: bool = False) -> Iterator[None]:
    """Keep a program attached; no error if somebody detaches it meanwhile.

    Args:
        in_pieces: it takes packets in several pieces; the others want them in one.
    """
    ifindex = socket.if_nametoindex(nic)
    program = _load(_IN_PIECES if in_pieces else 0)
    try:
        _set(ifindex, program)
        try:
            yield
        finally:
            _set(ifindex, -1)
    finally:
        os.close(program)


def _load(flags: int) -> int:
    """Load the program and return its fd. Kernel: bpf(BPF_PROG_LOAD)."""
    instructions, licence = ctypes.create_string_buffer(_PASS), ctypes.create_string_buffer(b"Apache-2.0")
    addresses = ctypes.addressof(instructions), ctypes.addressof(licence)
    packed = _PROG_LOAD.pack(_BPF_PROG_TYPE_XDP, len(_PASS) // 8, *addresses, 0, 0, 0, 0, flags)
    attributes = ctypes.create_string_buffer(packed, 128)
    program = int(_LIBC.syscall(_SYS_BPF, _BPF_PROG_LOAD, attributes, len(attributes)))
    if program < 0:
        raise OSError(ctypes.get_errno(), "bpf(BPF_PROG_LOAD)")
    return program


def _set(ifindex: int, program: int) -> None:
    """Attach a program, or detach it (-1). Kernel: RTM_SETLINK, IFLA_XDP."""
    wanted = nl.nest(_IFLA_XDP, nl.attr_s32(_IFLA_XDP_FD, program), nl.attr_u32(_IFLA_XDP_FLAGS, _GENERIC))
    payload = _IFINFOMSG.pack(0, 0, ifindex, 0, 0) + wanted
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.setsockopt(nl.SOL_NETLINK, nl.NETLINK_EXT_ACK, 1)
        sock.bind((0, 0))
        sock.send(nl.message(_RTM_SETLINK, nl.NLM_F_REQUEST | nl.NLM_F_ACK, 1, payload))
        number, said = nl.parse_ack(nl.parse_messages(sock.recv(1 << 16))[0])
    if number:
        raise OSError(number, f"{os.strerror(number)}: {said.message}")
