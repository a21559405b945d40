"""Every raw system call of this package, and the one seam where faults are put in.

Each function is one call (or one library call that makes one), passes ``_enter`` with its name first, and raises what
the operating system raised. Tests install a hook with ``intercept`` and so make the n-th call fail; nothing else ever
does. Nothing here decides anything: no retries, no fallbacks, no defaults.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

Hook: TypeAlias = Callable[[str], None]
Socket: TypeAlias = socket.socket
Epoll: TypeAlias = select.epoll
Poller: TypeAlias = select.poll
MemoryMap: TypeAlias = mmap.mmap

AF_INET: Final = socket.AF_INET
AF_INET6: Final = socket.AF_INET6
IPPROTO_IPV6: Final = socket.IPPROTO_IPV6
IPPROTO_TCP: Final = socket.IPPROTO_TCP
IPV6_V6ONLY: Final = socket.IPV6_V6ONLY
MSG_DONTWAIT: Final = socket.MSG_DONTWAIT
MSG_PEEK: Final = socket.MSG_PEEK
MSG_TRUNC: Final = socket.MSG_TRUNC
SOL_SOCKET: Final = socket.SOL_SOCKET
SO_REUSEADDR: Final = socket.SO_REUSEADDR
SHUT_WR: Final = socket.SHUT_WR
TCP_CONGESTION: Final = socket.TCP_CONGESTION
POLLIN: Final = select.POLLIN
POLLOUT: Final = select.POLLOUT
EPOLLIN: Final = select.EPOLLIN
MFD_HUGETLB: Final = os.MFD_HUGETLB
MAP_PRIVATE_ANONYMOUS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MAP_SHARED: Final = mmap.MAP_SHARED
MAP_HUGETLB: Final = 0x40000  # asm-generic/mman-common.h; the mmap module has no name for it
MADV_HUGEPAGE: Final = mmap.MADV_HUGEPAGE
SEAL_SHRINK: Final = fcntl.F_SEAL_SHRINK

_hook: Hook | None = None


@contextlib.contextmanager
def intercept(hook: Hook) -> Iterator[None]:
    """Call ``hook(name)`` before every system call made here, in this process, until the block ends; for tests.

    The hook may raise what the call could raise. Raises RuntimeError if a hook is in place already.
    """
    global _hook
    if _hook is not None:
        raise RuntimeError("a fault hook is in place already")
    _hook = hook
    try:
        yield
    finally:
        _hook = None


def _enter(name: str) -> None:
    if _hook is not None:
        _hook(name)


# --- sockets -------------------------------------------------------------------------------------------------------


def open_tcp(family: int) -> Socket:
    """Open a TCP socket, close-on-exec. Kernel: socket(2)."""
    _enter("socket")
    return socket.socket(family, socket.SOCK_STREAM)


def resolve(host: str, port: int, *, passive: bool) -> list[tuple[int, tuple[Any, ...]]]:
    """Return (family, socket address) candidates for a host name or literal. Library: getaddrinfo(3)."""
    _enter("getaddrinfo")
    flags = socket.AI_PASSIVE if passive else 0
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    return [(int(family), address) for family, _, _, _, address in found]


def interface_names() -> list[str]:
    """Return the names of this machine's network interfaces. Library: if_nameindex(3)."""
    _enter("if_nameindex")
    return [name for _, name in socket.if_nameindex()]


def bind(sock: Socket, address: tuple[Any, ...]) -> None:
    _enter("bind")
    sock.bind(address)


def listen(sock: Socket, backlog: int) -> None:
    _enter("listen")
    sock.listen(backlog)


def accept(sock: Socket) -> Socket:
    """Accept a connection within the socket's own timeout. Kernel: accept4(2)."""
    _enter("accept4")
    return sock.accept()[0]


def connect(sock: Socket, address: tuple[Any, ...]) -> None:
    """Connect within the socket's own timeout. Kernel: connect(2)."""
    _enter("connect")
    sock.connect(address)


def set_timeout(sock: Socket, timeout_s: float | None) -> None:
    """Set a socket's own time limit: None blocks, 0 does not. Kernel: ioctl(FIONBIO)."""
    _enter("set_timeout")
    sock.settimeout(timeout_s)


def setsockopt(sock: Socket, level: int, option: int, value: int | bytes) -> None:
    _enter("setsockopt")
    sock.setsockopt(level, option, value)


def getsockopt_bytes(sock: Socket, level: int, option: int, size: int) -> bytes:
    _enter("getsockopt")
    return sock.getsockopt(level, option, size)


def local_address(sock: Socket) -> tuple[Any, ...]:
    _enter("getsockname")
    address: tuple[Any, ...] = sock.getsockname()
    return address


def remote_address(sock: Socket) -> tuple[Any, ...]:
    _enter("getpeername")
    address: tuple[Any, ...] = sock.getpeername()
    return address


def recv_into(sock: Socket, target: memoryview | bytearray, flags: int = 0) -> int:
    """Receive into one range. Kernel: recvfrom(2)."""
    _enter("recv")
    return sock.recv_into(target, 0, flags)


def recvmsg_into(sock: Socket, targets: Sequence[memoryview], flags: int = 0) -> int:
    """Receive into several ranges in order. Kernel: recvmsg(2)."""
    _enter("recvmsg")
    return sock.recvmsg_into(targets, 0, flags)[0]


def send(sock: Socket, data: bytes | bytearray | memoryview, flags: int = 0) -> int:
    _enter("send")
    return sock.send(data, flags)


def sendmsg(sock: Socket, sources: Sequence[memoryview], flags: int = 0) -> int:
    """Send several ranges in order. Kernel: sendmsg(2)."""
    _enter("sendmsg")
    return sock.sendmsg(sources, (), flags)


def shutdown(sock: Socket, how: int) -> None:
    _enter("shutdown")
    sock.shutdown(how)


def close_socket(sock: Socket) -> None:
    """Close a socket. Never made to fail: there is nothing a caller could do about it."""
    sock.close()


# --- waiting -------------------------------------------------------------------------------------------------------


def poller(fd: int, events: int) -> Poller:
    """Return what ``wait`` needs to wait for events of one fd, as often as wanted."""
    made = select.poll()
    made.register(fd, events)
    return made


def wait(poller: Poller, timeout_s: float | None) -> bool:
    """Wait until the fd of a poller is ready; False when the time ran out. Kernel: poll(2)."""
    _enter("poll")
    return bool(poller.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000.0))


def epoll_create() -> select.epoll:
    _enter("epoll_create1")
    return select.epoll()


def epoll_set(epoll: select.epoll, fd: int, events: int, *, known: bool) -> None:
    """Set which events of an fd the epoll reports; ``known``: the fd is in it already. Kernel: epoll_ctl(2)."""
    _enter("epoll_ctl")
    (epoll.modify if known else epoll.register)(fd, events)


def eventfd_create() -> int:
    """Return a new eventfd, non-blocking and close-on-exec, of value 0."""
    _enter("eventfd2")
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def eventfd_write(fd: int) -> None:
    _enter("eventfd_write")
    os.eventfd_write(fd, 1)


def eventfd_clear(fd: int) -> None:
    """Reset an eventfd to 0; no error if it is."""
    _enter("eventfd_read")
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)


def close_fd(fd: int) -> None:
    """Close an fd. Never made to fail: there is nothing a caller could do about it."""
    os.close(fd)


# --- memory --------------------------------------------------------------------------------------------------------


def memfd_create(name: str, flags: int = 0) -> int:
    """Return a new memory file, close-on-exec and sealable."""
    _enter("memfd_create")
    return os.memfd_create(name, flags | os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def truncate(fd: int, size_bytes: int) -> None:
    _enter("ftruncate")
    os.ftruncate(fd, size_bytes)


def add_seals(fd: int, seals: int) -> None:
    _enter("fcntl")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def map_memory(fd: int, size_bytes: int, flags: int) -> mmap.mmap:
    """Map memory for reading and writing; fd -1 with MAP_PRIVATE_ANONYMOUS for memory of no file. Kernel: mmap(2)."""
    _enter("mmap")
    return mmap.mmap(fd, size_bytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def unmap(mapping: mmap.mmap) -> None:
    """Unmap memory; BufferError while anything views it, and it stays mapped. Never made to fail otherwise."""
    mapping.close()


def advise(mapping: mmap.mmap, advice: int) -> None:
    _enter("madvise")
    mapping.madvise(advice)


def open_device(path: str) -> int:
    """Open a device node for reading and writing, close-on-exec."""
    _enter("open")
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def ioctl(fd: int, request: int, argument: bytes | bytearray) -> int:
    """Make an ioctl; a bytearray is changed in place by what the kernel writes back. Returns the ioctl's result."""
    _enter("ioctl")
    if isinstance(argument, bytearray):
        return int(fcntl.ioctl(fd, request, argument, True))
    fcntl.ioctl(fd, request, argument)
    return 0


def read_text(path: str) -> str:
    """Read a small file of procfs or sysfs."""
    _enter("open")
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()
