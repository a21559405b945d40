"""Both ends of the wire, as the guest is told of them, and plain sockets of the far one.

The far end is another network namespace of this machine. A socket belongs to the namespace of the thread that made it,
for good; so each is made in a thread of its own that has moved there (setns(2)) and then ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from devmem_tcp.types import Address

Made = TypeVar("Made")

NETIF: Final = os.environ.get("NETIF", "")
"""The NIC under test."""

NEAR: Final = (os.environ.get("LOCAL_V4", ""), os.environ.get("LOCAL_V6", ""))
"""Its addresses."""

_CLONE_NEWNET: Final = 0x40000000  # include/uapi/linux/sched.h
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class FarEnd:
    """A network namespace, by name (``ip netns``), and its addresses on the wire: IPv4, then IPv6."""

    def __init__(self, namespace: str, ipv4: str, ipv6: str) -> None:
        self.namespace: Final = namespace
        self.ipv4: Final = ipv4
        self.ipv6: Final = ipv6

    def connect(self, address: Address, timeout_s: float) -> socket.socket:
        """Return a plain socket of the far end, connected to ``address``."""
        return self.make(lambda: socket.create_connection(address, timeout_s))

    def listen(self, near: str) -> socket.socket:
        """Return a plain listening socket of the far end, of any free port, in the IP version of address ``near``."""
        host, family = (self.ipv6, socket.AF_INET6) if ":" in near else (self.ipv4, socket.AF_INET)
        return self.make(lambda: socket.create_server((host, 0), family=family))

    def nic(self) -> str:
        """Return the name of its NIC."""
        shown = subprocess.run(["ip", "-netns", self.namespace, "-json", "link"], capture_output=True, check=True)
        (name,) = (one["ifname"] for one in json.loads(shown.stdout) if one["link_type"] == "ether")
        return str(name)

    def make(self, what: Callable[[], Made]) -> Made:
        """Return what ``what()`` returns in the far end's namespace."""
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(self._enter_and, what).result()

    def _enter_and(self, what: Callable[[], Made]) -> Made:
        fd = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _LIBC.setns(fd, _CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, f"setns {self.namespace}: {os.strerror(number)}")
        finally:
            os.close(fd)
        return what()
