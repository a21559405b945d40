"""A trial of devmem TCP inside a guest: set the NIC up, receive into a udmabuf and send from one, compare every byte.

Run by ``python -m devmem_tcp.lab.trial`` in a guest of ``devmem-tcp lab run``, which gives two NICs in two network
namespaces and says in NETIF, LOCAL_V4, REMOTE_V4, LOCAL_V6, REMOTE_V6 what they are called. The peer is this module
again, in the other namespace, with plain sockets. One line a step; exit status 1 at the first that fails.

With ``--node N`` the buffers lie on that NUMA node; with ``--outside`` too, each receive then says where in the node's
memory each piece of the stream lies, and waits, so that it can be looked at from outside (``lab/outside.py``).
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from devmem_tcp.buffers import Buffer, CpuAccess
from devmem_tcp.errors import DevmemError
from devmem_tcp.lab.netdev import NetdevSocket
from devmem_tcp.lab.second_memory import PAGE_BYTES, allocate_on, node_start
from devmem_tcp.memory import Udmabuf
from devmem_tcp.sansio.tokens import dontneed_calls
from devmem_tcp.types import FragKind
from devmem_tcp.uapi import errqueue
from devmem_tcp.uapi import socket as abi

MIB: Final = 1 << 20
QUEUE: Final = 1  # gve cannot restart queue 0
RX_PORT: Final = 5201
TX_PORT: Final = 5202
PEER_NAMESPACE: Final = "peer"
BUFFER_BYTES: Final = 64 * MIB  # udmabuf's default limit
NODE_BYTES: Final = 16 * MIB  # to be looked at from outside; more might need pages twice, at MTU 1500
WINDOW_BYTES: Final = 256 << 10  # of one sendmsg
LIMIT_S: Final = 120.0  # of any one wait; a lossy wire under emulation is slow
_SEED: Final = 5201
_FAMILIES: Final = ((socket.AF_INET, "4"), (socket.AF_INET6, "6"))


class TrialFailed(Exception):
    """A byte, a count or a completion is not what it has to be."""


class Whereabouts(msgspec.Struct, frozen=True, kw_only=True):
    """Where a stream lies that was received into memory of a NUMA node.

    ``node_start`` is the physical address of the node's first byte; each piece is its offset in the stream, its
    physical address, and its length in bytes, in the order of the stream.
    """

    node_start: int
    pieces: list[tuple[int, int, int]]


def content(size: int) -> npt.NDArray[np.uint8]:
    """Return the bytes that are moved: pseudo-random, the same on both ends."""
    words: npt.NDArray[np.uint64] = np.random.SFC64(_SEED).random_raw(-(-size // 8))
    return words.view(np.uint8)[:size]


# --- the peer: plain sockets in the other namespace -----------------------------------------------------------------


def peer_send(address: tuple[str, int], size: int) -> None:
    with socket.create_connection(address, timeout=LIMIT_S) as sock:
        sock.sendall(content(size).data)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)


def peer_receive(address: tuple[str, int], size: int) -> None:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.create_server(address, family=family) as listener:
        listener.settimeout(LIMIT_S)
        print("listening", flush=True)
        sock, _ = listener.accept()
    wanted, got = content(size), 0
    piece = bytearray(MIB)
    with sock:
        sock.settimeout(LIMIT_S)
        while count := sock.recv_into(piece):
            if not np.array_equal(np.frombuffer(piece, np.uint8)[:count], wanted[got : got + count]):
                raise TrialFailed(f"the peer received a wrong byte between {got} and {got + count}")
            got += count
    if got != size:
        raise TrialFailed(f"the peer received {got} of {size} bytes")


@contextmanager
def peer(role: str, address: tuple[str, int], size: int) -> Iterator[subprocess.Popen[str]]:
    """Run a role in the other namespace while the block runs; it must then end well."""
    command = ["ip", "netns", "exec", PEER_NAMESPACE, sys.executable, "-m", "devmem_tcp.lab.trial", "--role", role]
    command += ["--address", address[0], "--port", str(address[1]), "--bytes", str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
            if process.wait(LIMIT_S):
                raise TrialFailed(f"the peer that should {role} failed")
        finally:
            process.kill()


# --- where the buffers are ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the trial's buffers are: on a NUMA node, None: on any. ``outside``: say where in it, and wait."""

    node: int | None = None
    outside: bool = False

    def allocate(self) -> tuple[Buffer, npt.NDArray[np.uint64]]:
        """Return a buffer and its pages' physical addresses, which are known only if a node was asked for."""
        if self.node is None:
            return Udmabuf().allocate(BUFFER_BYTES), np.empty(0, np.uint64)
        return allocate_on(self.node, BUFFER_BYTES)


# --- receiving ------------------------------------------------------------------------------------------------------


def receive(nic: str, family: int, host: str, size: int, place: Place) -> str:
    """Receive ``size`` bytes into a bound udmabuf, compare them where they landed, return every token."""
    wanted = content(size)
    buffer, physical = place.allocate()
    with (
        buffer,
        NetdevSocket() as netdev,
        socket.create_server((host, RX_PORT), family=family) as listener,
    ):
        dmabuf_id = netdev.bind_rx(nic, _fd(buffer), [QUEUE])
        listener.settimeout(LIMIT_S)
        with peer("send", (host, RX_PORT), size):
            sock, _ = listener.accept()
            with sock, buffer.cpu_access(CpuAccess.READ) as memory:
                kinds, landed = _receive_all(sock, np.frombuffer(memory, np.uint8), wanted, keep=place.outside)
                if place.outside and place.node is not None:
                    show(landed, physical, node_start(place.node))
    if kinds[FragKind.DMABUF] * 2 < size:
        raise TrialFailed(f"most bytes did not land in the dma-buf: {kinds}")
    told = ", ".join(f"{kinds[kind]:,} {kind.name.lower()}" for kind in reversed(FragKind))
    return f"dmabuf id {dmabuf_id}: {told} bytes, all right"


def _receive_all(
    sock: socket.socket, memory: npt.NDArray[np.uint8], wanted: npt.NDArray[np.uint8], *, keep: bool
) -> tuple[Counter[FragKind], list[tuple[int, int, int]]]:
    """Receive the stream; to ``keep`` it where it is, tokens are left to the socket's end, and each frag is listed."""
    sock.settimeout(LIMIT_S)
    kinds: Counter[FragKind] = Counter()
    kept: list[tuple[int, int, int]] = []
    inline, got = np.zeros(MIB, np.uint8), 0
    while True:
        count, control, _, _ = sock.recvmsg_into([inline.data], 1 << 16, abi.MSG_SOCK_DEVMEM)
        if not count:
            break
        tokens, used = [], 0
        for level, kind, data in control:
            if level != abi.SOL_SOCKET or kind not in (FragKind.LINEAR, FragKind.DMABUF):
                continue
            offset, length, token, _, _ = abi.DMABUF_CMSG.unpack_from(data)
            if kind == FragKind.DMABUF:
                if keep:
                    kept.append((got, offset, length))
                else:
                    tokens.append(token)
                landed = memory[offset : offset + length]
            else:
                landed = inline[used : used + length]
                used += length
            _compare(landed, wanted, got)
            kinds[FragKind(kind)] += length
            got, count = got + length, count - length
        if count:
            _compare(inline[used : used + count], wanted, got)
            kinds[FragKind.HOST] += count
            got += count
        for ranges in dontneed_calls(np.array(tokens, np.uint32)):
            sock.setsockopt(abi.SOL_SOCKET, abi.SO_DEVMEM_DONTNEED, ranges.tobytes())
    if got != len(wanted):
        raise TrialFailed(f"the stream ended after {got} of {len(wanted)} bytes")
    return kinds, kept


def show(landed: list[tuple[int, int, int]], physical: npt.NDArray[np.uint64], start: int) -> None:
    """Say where the pieces of a stream (its offset, the buffer's, the length) lie, and wait to be told to go on."""
    pieces: list[tuple[int, int, int]] = []
    for at, offset, length in landed:
        while length:
            page, within = divmod(offset, PAGE_BYTES)
            part = min(length, PAGE_BYTES - within)
            pieces.append((at, int(physical[page]) + within, part))
            at, offset, length = at + part, offset + part, length - part
    print(msgspec.json.encode(Whereabouts(node_start=start, pieces=pieces)).decode(), flush=True)
    sys.stdin.readline()


def _compare(landed: npt.NDArray[np.uint8], wanted: npt.NDArray[np.uint8], at: int) -> None:
    if not np.array_equal(landed, wanted[at : at + len(landed)]):
        raise TrialFailed(f"a wrong byte between {at} and {at + len(landed)} of the stream")


# --- sending --------------------------------------------------------------------------------------------------------


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _MsgHdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_IoVec)),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_char_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def send(nic: str, family: int, host: str, size: int, place: Place) -> str:
    """Send ``size`` bytes from a bound udmabuf by offset, and wait for every completion."""
    buffer, _ = place.allocate()
    with (
        buffer,
        NetdevSocket() as netdev,
        peer("receive", (host, TX_PORT), size) as far,
    ):
        with buffer.cpu_access(CpuAccess.WRITE) as memory:
            memory[:size] = content(size).data
        dmabuf_id = netdev.bind_tx(nic, _fd(buffer))
        if far.stdout is None or far.stdout.readline() != "listening\n":
            raise TrialFailed("the peer does not listen")
        with socket.socket(family) as sock:
            sock.setsockopt(abi.SOL_SOCKET, socket.SO_BINDTODEVICE, nic.encode())
            sock.settimeout(LIMIT_S)
            sock.connect((host, TX_PORT))
            sock.setsockopt(abi.SOL_SOCKET, abi.SO_ZEROCOPY, 1)
            sends = _send_all(sock, dmabuf_id, size)
            sock.shutdown(socket.SHUT_WR)
    return f"dmabuf id {dmabuf_id}: {size:,} bytes in {sends} sends, all complete, all right at the peer"


def _send_all(sock: socket.socket, dmabuf_id: int, size: int) -> int:
    sock.setblocking(False)
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    sent = sends = complete = 0
    deadline = time.monotonic() + LIMIT_S
    while sent < size or complete < sends:
        if time.monotonic() > deadline:
            raise TrialFailed(f"{sent} of {size} bytes sent, {complete} of {sends} sends complete, and nothing goes on")
        taken = _send_some(sock, dmabuf_id, sent, min(WINDOW_BYTES, size - sent)) if sent < size else 0
        sent, sends = sent + taken, sends + bool(taken)
        done = _completions(sock)
        complete += done
        if taken or done:
            deadline = time.monotonic() + LIMIT_S
        else:
            poller.modify(sock, select.POLLOUT if sent < size else 0)  # POLLERR comes unasked
            poller.poll(100)
    return sends


def _send_some(sock: socket.socket, dmabuf_id: int, offset: int, length: int) -> int:
    """Make one sendmsg(MSG_ZEROCOPY) from an offset; 0: the socket is full."""
    control = abi.CMSGHDR.pack(abi.CMSG_HEADER_SIZE + 4, abi.SOL_SOCKET, abi.SCM_DEVMEM_DMABUF)
    control += struct.pack("<I4x", dmabuf_id)
    piece = _IoVec(offset, length)
    message = _MsgHdr(iov=ctypes.pointer(piece), iov_length=1, control=control, control_length=len(control))
    taken = int(_libc.sendmsg(sock.fileno(), ctypes.byref(message), abi.MSG_ZEROCOPY | socket.MSG_NOSIGNAL))
    if taken < 0:
        number = ctypes.get_errno()
        if number == errno.EAGAIN:
            return 0
        raise OSError(number, f"sendmsg(MSG_ZEROCOPY): {os.strerror(number)}")
    return taken


def _completions(sock: socket.socket) -> int:
    """Collect what has completed; returns how many sends."""
    done = 0
    while True:
        try:
            _, control, _, _ = sock.recvmsg(0, 1024, socket.MSG_ERRQUEUE)
        except BlockingIOError:
            return done
        for _, _, data in control:
            _, origin, _, _, _, low, high = errqueue.SOCK_EXTENDED_ERR.unpack_from(data)
            done += high - low + 1 if origin == errqueue.SO_EE_ORIGIN_ZEROCOPY else 0


# --- the whole ------------------------------------------------------------------------------------------------------


def _fd(buffer: Buffer) -> int:
    fd = buffer.dmabuf_fd
    if fd is None:
        raise TrialFailed("a udmabuf without an fd")
    return fd


def set_up(nic: str) -> None:
    """Header split on, RSS away from the queue, one flow rule for each IP version: devmem.rst's own steps."""
    steps = [
        ["-G", nic, "tcp-data-split", "on"],
        ["-K", nic, "ntuple", "on"],
        ["-X", nic, "equal", "1"],
        *(["-N", nic, "flow-type", f"tcp{v}", "dst-port", str(RX_PORT), "action", str(QUEUE)] for _, v in _FAMILIES),
    ]
    for step in steps:
        subprocess.run(["ethtool", *step], check=True, stdout=subprocess.DEVNULL, timeout=LIMIT_S)


def trial(size: int, place: Place) -> None:
    """Run every step, and print what each found."""
    nic = os.environ["NETIF"]
    set_up(nic)
    print(f"set up   {nic}: header split on, RSS on queue 0, port {RX_PORT} steered to queue {QUEUE}", flush=True)
    if place.node is not None:
        print(
            f"placed   every buffer on NUMA node {place.node}, which starts at {node_start(place.node):#x}", flush=True
        )
    for family, version in _FAMILIES:
        for name, step, host in (
            ("receive", receive, os.environ[f"LOCAL_V{version}"]),
            ("send", send, os.environ[f"REMOTE_V{version}"]),
        ):
            started = time.monotonic()
            found = step(nic, family, host, size, place)
            seconds = time.monotonic() - started
            print(f"{name:<8} IPv{version} {found}; {seconds:.1f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m devmem_tcp.lab.trial", description=__doc__)
    parser.add_argument("--bytes", type=int, default=64 * MIB, help="moved each way (at most 64 MiB)")
    parser.add_argument("--node", type=int, metavar="N", help="keep the buffers on this NUMA node")
    parser.add_argument("--outside", action="store_true", help="with --node: say where bytes lie, and wait for a line")
    parser.add_argument("--role", choices=["trial", "send", "receive"], default="trial", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    chosen: Any = parser.parse_args(arguments)
    if not 0 < chosen.bytes <= BUFFER_BYTES:
        parser.error(f"--bytes is 1 to {BUFFER_BYTES}")
    if chosen.outside and (chosen.node is None or chosen.bytes > NODE_BYTES):
        parser.error(f"--outside goes with --node, and with --bytes {NODE_BYTES} at most")
    try:
        if chosen.role == "trial":
            trial(chosen.bytes, Place(node=chosen.node, outside=chosen.outside))
        else:
            {"send": peer_send, "receive": peer_receive}[chosen.role]((chosen.address, chosen.port), chosen.bytes)
    except (TrialFailed, DevmemError, OSError, subprocess.SubprocessError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
