"""A container's network, as a host makes it: a network namespace, a netkit pair into it, and a way for packets there.

IP forwards packets to it, and those that it sends. An eBPF program makes the way in shorter: it moves them from the NIC
to the far end of the pair (bpf_redirect_peer). It is put together here, so nothing has to be compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from devmem_tcp.uapi import netlink as nl
from far_end import NEAR, FarEnd

CONTAINER: Final = "container"
LESSOR, LESSEE = "lessor", "lessee"
ADDRESS: Final = "198.51.100.2"  # documentation: RFC 5737
_HOST: Final = "198.51.100.1"

_RTM_NEWLINK: Final = 16  # include/uapi/linux/rtnetlink.h
_NLM_F_CREATE: Final = 0x400
_IFINFOMSG: Final = bytes(16)  # struct ifinfomsg: of no index yet
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES = 3, 18, 31, 32
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_NETKIT_PEER_INFO: Final = 1

_SYS_BPF: Final = 321  # x86-64
_BPF_PROG_LOAD, _BPF_LINK_CREATE = 5, 28  # include/uapi/linux/bpf.h
_BPF_PROG_TYPE_SCHED_CLS: Final = 3
_BPF_TCX_INGRESS: Final = 46
_REDIRECT_PEER: Final = 155  # bpf_redirect_peer
_TCX_NEXT: Final = -1  # to the next program, or on into the stack
_PROG_LOAD: Final = struct.Struct("<IIQQIIQII")  # of union bpf_attr, from prog_type to prog_flags
_LINK_CREATE: Final = struct.Struct("<IIII")  # prog_fd, target_ifindex, attach_type, flags
_ETHERTYPE_AT, _IPV4, _DESTINATION_AT = 12, 0x0800, 30
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def netkit(near: str, far: str, *, rx_queues: int) -> None:
    """Make a pair of netkit interfaces, the second with room for ``rx_queues``, its own one included."""
    room = nl.attr_u32(_IFLA_NUM_RX_QUEUES, rx_queues) + nl.attr_u32(_IFLA_NUM_TX_QUEUES, 1)
    peer = nl.attr(_IFLA_NETKIT_PEER_INFO, _IFINFOMSG + nl.attr_string(_IFLA_IFNAME, far) + room)
    info = nl.nest(_IFLA_LINKINFO, nl.attr_string(_IFLA_INFO_KIND, "netkit"), nl.nest(_IFLA_INFO_DATA, peer))
    request = _IFINFOMSG + nl.attr_string(_IFLA_IFNAME, near) + info
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as rtnetlink:
        rtnetlink.send(nl.message(_RTM_NEWLINK, nl.NLM_F_REQUEST | nl.NLM_F_ACK | _NLM_F_CREATE, 1, request))
        number, said = nl.parse_ack(nl.parse_messages(rtnetlink.recv(1 << 16))[0])
    if number:
        raise OSError(number, f"{os.strerror(number)}: {said.message}")


@contextlib.contextmanager
def container(far: FarEnd) -> Iterator[FarEnd]:
    """Make a container's network while the block runs: LESSEE in it has ADDRESS, and room for two leased queues.

    The far end of the wire reaches it by this host, which forwards packets.
    """
    forwarding = Path("/proc/sys/net/ipv4/ip_forward")
    before = forwarding.read_text(encoding="ascii")
    with contextlib.ExitStack() as undo:
        _ip("netns", "add", CONTAINER)
        undo.callback(_ip, "netns", "del", CONTAINER)
        netkit(LESSOR, LESSEE, rx_queues=3)
        undo.callback(_delete, LESSOR)
        _ip("link", "set", LESSEE, "netns", CONTAINER)
        _ip("link", "set", LESSOR, "up")
        _ip("-netns", CONTAINER, "link", "set", LESSEE, "up")
        _ip("address", "add", f"{_HOST}/32", "dev", LESSOR)
        _ip("route", "add", f"{ADDRESS}/32", "dev", LESSOR)
        _ip("-netns", CONTAINER, "address", "add", f"{ADDRESS}/32", "dev", LESSEE)
        _ip("-netns", CONTAINER, "route", "add", f"{_HOST}/32", "dev", LESSEE)
        _ip("-netns", CONTAINER, "route", "add", "default", "via", _HOST, "dev", LESSEE)
        _ip("-netns", far.namespace, "route", "add", f"{ADDRESS}/32", "via", NEAR[0])
        undo.callback(_ip, "-netns", far.namespace, "route", "del", f"{ADDRESS}/32")
        forwarding.write_text("1", encoding="ascii")
        undo.callback(forwarding.write_text, before, encoding="ascii")
        yield FarEnd(CONTAINER, ADDRESS, "")


def _delete(interface: str) -> None:
    """Delete an interface; a test may have done so."""
    subprocess.run(["ip", "link", "del", interface], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def redirected(nic: str, address: str, near: str) -> Iterator[None]:
    """Take packets to an IPv4 address from a NIC to the interface whose peer is ``near``, while the block runs."""
    program = _load(_program(int(ipaddress.IPv4Address(address)), socket.if_nametoindex(near)))
    try:
        link = _bpf(_BPF_LINK_CREATE, _LINK_CREATE.pack(program, socket.if_nametoindex(nic), _BPF_TCX_INGRESS, 0))
        try:
            yield
        finally:
            os.close(link)  # which detaches it
    finally:
        os.close(program)


def _program(address: int, ifindex: int) -> bytes:
    return b"".join(
        (
            _instruction(0xBF, dst=6, src=1),  # r6 = the packet, where ld_abs looks for it
            _instruction(0x28, imm=_ETHERTYPE_AT),  # r0 = two bytes there, in the order of the machine
            _instruction(0x55, off=6, imm=_IPV4),  # not IPv4: on
            _instruction(0x20, imm=_DESTINATION_AT),  # r0 = four bytes
            _instruction(0x56, off=4, imm=address),  # not that address: on
            _instruction(0xB7, dst=1, imm=ifindex),
            _instruction(0xB7, dst=2),  # no flags
            _instruction(0x85, imm=_REDIRECT_PEER),
            _instruction(0x95),  # return what it says
            _instruction(0xB7, imm=_TCX_NEXT),
            _instruction(0x95),
        )
    )


def _instruction(code: int, *, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    """Make one struct bpf_insn."""
    return struct.pack("<BBhI", code, src << 4 | dst, off, imm & 0xFFFFFFFF)


def _load(instructions: bytes) -> int:
    """Load a program and return its fd. Kernel: bpf(BPF_PROG_LOAD)."""
    code, licence = ctypes.create_string_buffer(instructions), ctypes.create_string_buffer(b"Apache-2.0")
    addresses = ctypes.addressof(code), ctypes.addressof(licence)
    return _bpf(
        _BPF_PROG_LOAD, _PROG_LOAD.pack(_BPF_PROG_TYPE_SCHED_CLS, len(instructions) // 8, *addresses, 0, 0, 0, 0, 0)
    )


def _bpf(command: int, arguments: bytes) -> int:
    """Make a bpf(2) call that returns an fd."""
    attributes = ctypes.create_string_buffer(arguments, 128)
    made = int(_LIBC.syscall(_SYS_BPF, command, attributes, len(attributes)))
    if made < 0:
        raise OSError(ctypes.get_errno(), f"bpf({command}): {os.strerror(ctypes.get_errno())}")
    return made
