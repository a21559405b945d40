"""TCP addresses: resolving what a user typed, and the 4-tuple that steering looks at."""

from __future__ import annotations

import errno
import ipaddress
from typing import Any

from devmem_tcp.nicmodel.flow import Flow
from devmem_tcp.nicmodel.steering import Steering
from devmem_tcp.sys import calls
from devmem_tcp.types import Address


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


class SteeredFlow:
    """One connection as the NIC sees its incoming packets; caches the queue until steering changes."""

    __slots__ = ("_flow", "_queue", "_steering", "_version", "local", "remote")

    def __init__(self, local: tuple[Any, ...], remote: tuple[Any, ...], steering: Steering) -> None:
        self.local: Address = plain(local)
        self.remote: Address = plain(remote)
        self._flow = Flow.between(self.remote, self.local)
        self._steering = steering
        self._version = -1
        self._queue = -1

    @property
    def queue(self) -> int:
        """The RX queue that packets of this connection go to now."""
        if self._version != self._steering.version:
            self._version = self._steering.version
            self._queue = self._steering.queue_for(*self._flow)
        return self._queue
