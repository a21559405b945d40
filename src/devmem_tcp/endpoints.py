"""TCP addresses, listening and connecting: what both backends do alike, before devmem comes into it."""

from __future__ import annotations

import errno
import ipaddress
import struct
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

from devmem_tcp import contract
from devmem_tcp.errors import ClosedError, KernelError, LeakWarning, Timeout
from devmem_tcp.sys import calls
from devmem_tcp.types import Address, TokenHolder
from devmem_tcp.uapi import tcp

_FEW: Final = 256 << 10  # bytes
_MANY: Final = 2 << 20
_TIMEVAL: Final = struct.Struct("<qq")  # struct __kernel_sock_timeval: seconds, microseconds
_CONGESTION_NAME_BYTES: Final = 16  # TCP_CA_NAME_MAX, include/net/tcp.h


def resolve(address: Address, *, passive: bool) -> list[tuple[int, tuple[Any, ...]]]:
    """Return (family, socket address) candidates, in the system's order.

    Raises:
        ValueError: the host cannot be resolved, or the port is out of range.
    """
    host, port = address
    if not 0 <= port <= 0xFFFF:
        raise ValueError(f"TCP port {port} is out of range 0 to 65535")
    try:
        return calls.resolve(host, port, passive=passive)
    except OSError as error:
        if error.errno is not None and error.errno < 0:  # getaddrinfo's own numbers are negative
            raise ValueError(f"cannot resolve host {host!r}: {error.strerror}") from error
        raise


def plain(socket_address: tuple[Any, ...]) -> Address:
    """Return (host, port) of a socket address; an IPv4-mapped IPv6 address is the IPv4 one that is on the wire."""
    ip = ipaddress.ip_address(str(socket_address[0]).partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return str(ip), int(socket_address[1])


def is_loopback(socket_address: tuple[Any, ...]) -> bool:
    """Whether packets to this address stay on this machine's loopback interface."""
    return ipaddress.ip_address(plain(socket_address)[0]).is_loopback


def explain(error: OSError, call: str, address: Address) -> OSError:
    """Return what listen or connect refused, of the same class, with the address and, as a note, the next command."""
    number = error.errno or 0
    told = OSError(number, f"{call} {show(address)}: {error.strerror or error}")
    hint = {
        errno.EADDRINUSE: f"see who listens there: ss -ltnp 'sport = :{address[1]}'; port 0 takes any free one",
        errno.EADDRNOTAVAIL: "no interface here has this address: see `ip address`",
        errno.EACCES: "ports below 1024 need privileges: take a higher one",
        errno.ECONNREFUSED: "nobody listens there: start the receiver first, and see that host and port are right",
    }.get(number)
    if hint:
        told.add_note(f"hint: {hint}")
    return told


def show(address: Address) -> str:
    """Return ``host:port``, with brackets around an IPv6 host."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tell_holders(holders: Sequence[TokenHolder]) -> str:
    """Say who holds how many tokens and for how long, the first three by name; nothing if nobody does."""
    told = [
        f"{holder.tokens} tokens ({holder.bytes_held} bytes) for {holder.oldest_age_s:.1f} s "
        f"by the connection from {show(holder.remote)}"
        for holder in holders[:3]
    ]
    if len(holders) > 3:
        told.append(f"and {len(holders) - 3} more connections")
    return "; ".join(told)


def congestion_control(sock: calls.Socket) -> str:
    """Return the name of the congestion control that a socket uses. Kernel: getsockopt(TCP_CONGESTION)."""
    name = calls.getsockopt_bytes(sock, calls.IPPROTO_TCP, calls.TCP_CONGESTION, _CONGESTION_NAME_BYTES)
    return name.split(b"\0")[0].decode()


def open_listening(address: Address, backlog: int) -> calls.Socket:
    """Return a listening socket, non-blocking; host ``::`` takes IPv4 and IPv6.

    Raises:
        ValueError: as ``resolve``.
        OSError: as from bind(2), with a hint.
    """
    family, where = resolve(address, passive=True)[0]
    sock = calls.open_tcp(family)
    try:
        if family == calls.AF_INET6:
            calls.setsockopt(sock, calls.IPPROTO_IPV6, calls.IPV6_V6ONLY, 0)
        calls.setsockopt(sock, calls.SOL_SOCKET, calls.SO_REUSEADDR, 1)
        try:
            calls.bind(sock, where)
            calls.listen(sock, backlog)
        except OSError as error:
            raise explain(error, "listen on", address) from None
        calls.set_timeout(sock, 0)
    except BaseException:
        calls.close_socket(sock)
        raise
    return sock


def _send_at_once(sock: calls.Socket) -> None:
    """Have the last bytes of each send go at once. Else they wait for the acknowledgement of those before, which a
    receiver delays by 40 ms if it has no reason to read yet. Kernel: TCP_NODELAY; tcp(7).
    """
    calls.setsockopt(sock, calls.IPPROTO_TCP, tcp.TCP_NODELAY, 1)


def open_connection(
    address: Address,
    *,
    source: Address | None,
    timeout_s: float | None,
    prepare: Callable[[calls.Socket, tuple[Any, ...]], object],
) -> calls.Socket:
    """Return a connected socket, without a timeout; of a host with several addresses, to the first that answers.

    Args:
        prepare: called with each socket and the address it is about to connect to; what it raises is raised.

    Raises:
        ValueError: as ``resolve``.
        Timeout: no answer in ``timeout_s`` seconds.
        OSError: as from connect(2), with a hint.
    """
    candidates = resolve(address, passive=False)
    for index, (family, where) in enumerate(candidates):
        sock = calls.open_tcp(family)
        try:
            prepare(sock, where)
            if source is not None:
                calls.bind(sock, resolve(source, passive=True)[0][1])
            calls.set_timeout(sock, timeout_s)
            calls.connect(sock, where)
            calls.set_timeout(sock, None)
            _send_at_once(sock)
            return sock
        except KernelError:
            calls.close_socket(sock)
            raise
        except OSError as error:
            calls.close_socket(sock)
            if isinstance(error, TimeoutError):
                raise Timeout(f"connect {show(address)}: no answer in {timeout_s} s") from None
            if index == len(candidates) - 1:
                raise explain(error, "connect", address) from None
        except BaseException:
            calls.close_socket(sock)
            raise
    raise AssertionError("getaddrinfo gave no address and no error")


def worth_waking(nbytes: int) -> int:
    """Return how many bytes a reader should sleep for that ``nbytes`` are sure to come to: its low-water mark.

    Of few, all: they come at once, or nearly. Of many, so many that wake-ups cost nothing beside the copying. Between
    the two, any: to take what is there keeps the memory of the other end in the CPU's cache.
    """
    if nbytes >= _MANY:
        return _MANY
    return nbytes if nbytes <= _FEW else 1


class WaitLimits:
    """How long calls on a socket wait in the kernel, and for how much; set only when that changes.

    Kernel: SO_RCVTIMEO, SO_SNDTIMEO, SO_RCVLOWAT.
    """

    __slots__ = ("_set", "_sock", "low_water")

    def __init__(self, sock: calls.Socket) -> None:
        self._sock = sock
        self._set: dict[int, float] = {}
        self.low_water = 1  #: bytes, as last set

    def set(self, option: int, limit_s: float | None) -> None:
        """Bound the wait of one direction to so many seconds; None, or 0: no bound."""
        limit_s = limit_s or 0.0
        if self._set.get(option, 0.0) != limit_s:
            seconds, rest = divmod(limit_s, 1)
            microseconds = max(int(rest * 1e6), 1 if limit_s and not seconds else 0)  # 0 and 0 would be no limit
            calls.setsockopt(self._sock, calls.SOL_SOCKET, option, _TIMEVAL.pack(int(seconds), microseconds))
            self._set[option] = limit_s

    def set_low_water(self, size_bytes: int) -> None:
        """See ``contract.DevmemSocket.set_low_water``."""
        if size_bytes < 1:
            raise ValueError(f"a low-water mark is at least 1 byte, got {size_bytes}")
        if size_bytes != self.low_water:
            calls.setsockopt(self._sock, calls.SOL_SOCKET, calls.SO_RCVLOWAT, size_bytes)
            self.low_water = size_bytes


class TcpListener(contract.Listener):
    """See ``contract.Listener``.

    Args:
        sock: from ``open_listening``; the listener's from here on.
        adopt: makes a NIC's socket of an accepted one, which is its to close once it returns.
    """

    def __init__(self, sock: calls.Socket, adopt: Callable[[calls.Socket], contract.DevmemSocket]) -> None:
        self._sock = sock
        self._adopt = adopt
        self._address = plain(calls.local_address(sock))
        self._timeout_s: float | None = None
        self._closed = False

    @property
    def address(self) -> Address:
        return self._address

    def accept(self) -> contract.DevmemSocket:
        if self._closed:
            raise ClosedError("this listener is closed")
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        while True:
            try:
                sock = calls.accept(self._sock)
                break
            except BlockingIOError:
                if self._timeout_s == 0:
                    raise
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not calls.wait(calls.poller(self._sock.fileno(), calls.POLLIN), left):
                raise Timeout(f"nobody connected to {show(self._address)} in {self._timeout_s} s")
        try:
            _send_at_once(sock)
            return self._adopt(sock)
        except BaseException:
            calls.close_socket(sock)
            raise

    def settimeout(self, timeout_s: float | None) -> None:
        if timeout_s is not None and timeout_s < 0:
            raise ValueError(f"a time limit cannot be negative: {timeout_s} s")
        self._timeout_s = timeout_s

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            calls.close_socket(self._sock)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"listener on {show(self._address)} was dropped without close()", LeakWarning, stacklevel=2)
            self.close()
