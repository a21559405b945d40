"""Every raw system call of this package, and the one seam where faults are put in.

Each function is one call (or one library call that makes one), passes ``_enter`` with its name first, and raises what
the operating system raised. Tests install a hook with ``intercept`` and so make the n-th call fail; nothing else ever
does. Nothing here decides anything: no retries, no fallbacks, no defaults.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import grp
import mmap
import os
import pwd
import select
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NoReturn, TypeAlias

from devmem_tcp.sys.messages import OffsetsMessage, ReceivedMessage
from devmem_tcp.uapi.socket import SO_DEVMEM_DONTNEED

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
MSG_EOR: Final = socket.MSG_EOR
MSG_ERRQUEUE: Final = socket.MSG_ERRQUEUE
MSG_NOSIGNAL: Final = socket.MSG_NOSIGNAL
MSG_PEEK: Final = socket.MSG_PEEK
MSG_TRUNC: Final = socket.MSG_TRUNC
MSG_WAITALL: Final = socket.MSG_WAITALL
MSG_CTRUNC: Final = socket.MSG_CTRUNC
SOL_SOCKET: Final = socket.SOL_SOCKET
SO_MEMINFO: Final = 55  # asm-generic/socket.h; the socket module has no name for it
SO_BINDTODEVICE: Final = socket.SO_BINDTODEVICE
SO_RCVLOWAT: Final = socket.SO_RCVLOWAT
SO_RCVTIMEO: Final = socket.SO_RCVTIMEO
SO_REUSEADDR: Final = socket.SO_REUSEADDR
SO_PEERCRED: Final = socket.SO_PEERCRED
SO_PEERGROUPS: Final = 59  # asm-generic/socket.h; the socket module has no name for it
SO_SNDTIMEO: Final = socket.SO_SNDTIMEO
SHUT_RDWR: Final = socket.SHUT_RDWR
SHUT_WR: Final = socket.SHUT_WR
TCP_CONGESTION: Final = socket.TCP_CONGESTION
TCP_MAXSEG: Final = socket.TCP_MAXSEG
POLLIN: Final = select.POLLIN
POLLOUT: Final = select.POLLOUT
EPOLLIN: Final = select.EPOLLIN
EPOLLOUT: Final = select.EPOLLOUT
MFD_HUGETLB: Final = os.MFD_HUGETLB
MAP_PRIVATE_ANONYMOUS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MAP_SHARED: Final = mmap.MAP_SHARED
MAP_HUGETLB: Final = 0x40000  # asm-generic/mman-common.h; the mmap module has no name for it
MADV_HUGEPAGE: Final = mmap.MADV_HUGEPAGE
SEAL_SHRINK: Final = fcntl.F_SEAL_SHRINK

_FD_BYTES: Final = 4

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


_libc: Final = ctypes.CDLL(None, use_errno=True)  # a call through it gives up the GIL
_libc.recvmsg.argtypes = _libc.sendmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.recvmsg.restype = _libc.sendmsg.restype = ctypes.c_ssize_t
_libc.setsockopt.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


def _raise_errno() -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


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


def receive_message(sock: Socket, message: ReceivedMessage, flags: int) -> int:
    """Receive into a message's own memory, control messages and all, without the GIL. Kernel: recvmsg(2)."""
    _enter("recvmsg")
    taken: int = _libc.recvmsg(sock.fileno(), message.address, flags)
    if taken < 0:
        _raise_errno()
    return taken


def send_offsets(sock: Socket, message: OffsetsMessage, flags: int) -> int:
    """Send pieces of a dma-buf by their offsets, without the GIL. Kernel: sendmsg(2)."""
    _enter("sendmsg")
    taken: int = _libc.sendmsg(sock.fileno(), message.address, flags)
    if taken < 0:
        _raise_errno()
    return taken


def return_tokens(sock: Socket, tokens: bytes) -> int:
    """Return tokens, an array of struct dmabuf_token; answers how many were freed, which Python's own call does not.

    Kernel: setsockopt(SOL_SOCKET, SO_DEVMEM_DONTNEED).
    """
    _enter("setsockopt")
    freed: int = _libc.setsockopt(sock.fileno(), SOL_SOCKET, SO_DEVMEM_DONTNEED, tokens, len(tokens))
    if freed < 0:
        _raise_errno()
    return freed


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


def open_netlink(protocol: int) -> Socket:
    """Open a netlink socket, close-on-exec. Kernel: socket(2), AF_NETLINK."""
    _enter("socket")
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)


def recv_datagram(sock: Socket, size: int, flags: int = 0) -> tuple[bytes, int, Any]:
    """Receive one datagram of up to ``size`` bytes; returns it, its msg_flags and who sent it. Kernel: recvmsg(2)."""
    _enter("recvmsg")
    data, _, msg_flags, address = sock.recvmsg(size, 0, flags)
    return data, msg_flags, address


def interface_index(name: str) -> int:
    """Return the index of the interface of a name. Library: if_nametoindex(3)."""
    _enter("if_nametoindex")
    return socket.if_nametoindex(name)


def interface_name(ifindex: int) -> str:
    """Return the name of the interface of an index. Library: if_indextoname(3)."""
    _enter("if_indextoname")
    return socket.if_indextoname(ifindex)


def open_control() -> Socket:
    """Open a socket for ioctls on network interfaces, close-on-exec; it is tied to this thread's network namespace."""
    _enter("socket")
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def ioctl_by_pointer(sock: Socket, request: int, make: Callable[[int], bytes], argument: bytearray) -> None:
    """Make an ioctl whose argument holds a pointer to another, which the kernel may write to.

    Args:
        make: packs the ioctl's argument, given the address of ``argument``.
    """
    _enter("ioctl")
    view = (ctypes.c_char * len(argument)).from_buffer(argument)
    fcntl.ioctl(sock, request, make(ctypes.addressof(view)))


# --- local sockets: datagrams in order on a connection, with fds (unix(7), SOCK_SEQPACKET) ------------------------


def open_local() -> Socket:
    """Open a UNIX socket for datagrams in order, close-on-exec. Kernel: socket(AF_UNIX, SOCK_SEQPACKET)."""
    _enter("socket")
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def adopt_listening(fd: int) -> Socket:
    """Return the listening UNIX socket of an fd that another program opened; close-on-exec from now on.

    Raises:
        OSError: ENOTSOCK: it is no socket; EPROTOTYPE: not one of ``open_local`` that listens.
    """
    _enter("getsockopt")
    os.fstat(fd)  # EBADF here, where nothing owns the number yet
    sock = socket.socket(fileno=fd)
    right = (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not (right and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
        sock.detach()
        raise OSError(errno.EPROTOTYPE, os.strerror(errno.EPROTOTYPE))
    sock.set_inheritable(False)
    return sock


def bind_local(sock: Socket, path: str) -> None:
    _enter("bind")
    sock.bind(path)


def connect_local(sock: Socket, path: str) -> None:
    _enter("connect")
    sock.connect(path)


def send_with_fds(sock: Socket, data: bytes, fds: Sequence[int], flags: int = 0) -> int:
    """Send one datagram, and fds with it. Kernel: sendmsg(2), SCM_RIGHTS."""
    _enter("sendmsg")
    packed = array.array("i", fds).tobytes()
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)] if fds else (), flags)


def recv_with_fds(sock: Socket, size: int, max_fds: int, flags: int = 0) -> tuple[bytes, list[int], int]:
    """Receive one datagram of up to ``size`` bytes, and fds with it, which are close-on-exec and the caller's.

    Returns the data, the fds and msg_flags; fds over ``max_fds`` are closed by the kernel (MSG_CTRUNC).

    Kernel: recvmsg(2), SCM_RIGHTS, MSG_CMSG_CLOEXEC (net/core/scm.c, scm_detach_fds).
    """
    _enter("recvmsg")
    room = socket.CMSG_LEN(max_fds * _FD_BYTES)  # not CMSG_SPACE, whose padding is room for one more
    data, control, msg_flags, _ = sock.recvmsg(size, room, flags | socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
    return data, fds.tolist(), msg_flags


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


def pause(seconds: float) -> None:
    """Wait for a short while, of which nobody can tell when it would better end. Kernel: clock_nanosleep(2)."""
    _enter("clock_nanosleep")
    time.sleep(seconds)


def epoll_create() -> select.epoll:
    _enter("epoll_create1")
    return select.epoll()


def epoll_set(epoll: select.epoll, fd: int, events: int, *, known: bool) -> None:
    """Set which events of an fd the epoll reports; ``known``: the fd is in it already. Kernel: epoll_ctl(2)."""
    _enter("epoll_ctl")
    (epoll.modify if known else epoll.register)(fd, events)


def epoll_forget(epoll: select.epoll, fd: int) -> None:
    """Take an fd out of the epoll. Never made to fail: there is nothing a caller could do about it."""
    epoll.unregister(fd)


def epoll_wait(epoll: select.epoll, timeout_s: float | None) -> list[tuple[int, int]]:
    """Wait until fds of an epoll are ready, and return them with their events. Kernel: epoll_wait(2)."""
    _enter("epoll_wait")
    return epoll.poll(timeout_s)


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


# --- files ---------------------------------------------------------------------------------------------------------


def read_bytes(path: str) -> bytes:
    """Read a small file."""
    _enter("open")
    with open(path, "rb") as file:
        return file.read()


def make_directory(path: str, mode: int) -> None:
    """Make a directory; no error if there is one."""
    _enter("mkdir")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, mode)


def directory_owner(path: str) -> tuple[int, int]:
    """Return the owner's user id and the permission bits of a directory; NotADirectoryError for anything else."""
    _enter("stat")
    found = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    return found.st_uid, stat.S_IMODE(found.st_mode)


def directory_entries(path: str) -> list[str]:
    """Return the names in a directory, in no order."""
    _enter("getdents64")
    return os.listdir(path)


def open_directory(path: str) -> int:
    """Open a directory, close-on-exec, to lock it or to sync it."""
    _enter("open")
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def create_file(path: str, mode: int) -> int:
    """Open a file for writing, new or emptied, close-on-exec; a symbolic link is refused (ELOOP)."""
    _enter("open")
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def write(fd: int, data: bytes | memoryview) -> int:
    _enter("write")
    return os.write(fd, data)


def sync(fd: int) -> None:
    """Wait until what was written to a file, or which names are in a directory, is on its disk. Kernel: fsync(2)."""
    _enter("fsync")
    os.fsync(fd)


def rename(old: str, new: str) -> None:
    """Give a file another name, in place of what has it, at one stroke."""
    _enter("rename")
    os.rename(old, new)


def remove_file(path: str) -> None:
    _enter("unlink")
    os.unlink(path)


def is_socket(path: str) -> bool:
    """Whether a path is a UNIX socket's; FileNotFoundError if there is nothing."""
    _enter("stat")
    return stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode)


def change_mode(path: str, mode: int) -> None:
    _enter("chmod")
    os.chmod(path, mode)


def change_group(path: str, group_id: int) -> None:
    _enter("chown")
    os.chown(path, -1, group_id)


def lock(fd: int) -> None:
    """Wait for the exclusive lock of an open file; closing the fd gives it back. Kernel: flock(2)."""
    _enter("flock")
    fcntl.flock(fd, fcntl.LOCK_EX)


# --- this process --------------------------------------------------------------------------------------------------


def process_id() -> int:
    return os.getpid()


def usable_cpus() -> int:
    """Return how many CPUs this process may run on. Kernel: sched_getaffinity(2)."""
    return len(os.sched_getaffinity(0))


def user_id() -> int:
    """Return the effective user id."""
    return os.geteuid()


def user_id_of(name: str) -> int:
    """Return the id of a user; KeyError if there is none. Library: getpwnam(3)."""
    _enter("getpwnam")
    return pwd.getpwnam(name).pw_uid


def group_id_of(name: str) -> int:
    """Return the id of a group; KeyError if there is none. Library: getgrnam(3)."""
    _enter("getgrnam")
    return grp.getgrnam(name).gr_gid


def environment(name: str) -> str:
    """Return an environment variable; empty if it is not set."""
    return os.environ.get(name, "")


def load_library(name: str) -> ctypes.CDLL:
    """Load a shared library; OSError if there is none. Library: dlopen(3)."""
    _enter("dlopen")
    return ctypes.CDLL(name)
