"""Congestion control: a word about loopback, where a model-based one such as bbr halves the speed of a transfer.

On loopback addresses cubic or reno is chosen per socket, where the system allows it, and the socket says so. On a real
network nothing is changed unless the user names one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from devmem_tcp.endpoints import congestion_control, is_loopback
from devmem_tcp.errors import KernelError
from devmem_tcp.sys import calls

LOSS_BASED: Final = ("cubic", "reno")


def choose(sock: calls.Socket, option: str, addresses: Sequence[tuple[Any, ...]]) -> str:
    """Set what ``option`` asks for on a socket with these ends; returns the name in use, and why if it was chosen.

    Raises:
        KernelError: the user named one that the system does not have or allow.
    """
    default = congestion_control(sock)
    if option == "system":
        return default
    if option != "auto":
        try:
            _set(sock, option)
        except OSError as error:
            hint = "see sysctl net.ipv4.tcp_available_congestion_control and tcp_allowed_congestion_control"
            raise KernelError(error.errno or 0, f"setsockopt(TCP_CONGESTION, {option!r})", hint=hint) from error
        return f"{option} (as asked)"
    if default in LOSS_BASED or not any(is_loopback(address) for address in addresses):
        return default
    for name in LOSS_BASED:
        try:
            _set(sock, name)
        except OSError:  # not built in, or not allowed to the unprivileged: the next, or none
            continue
        return f"{name} (chosen on loopback; the system's is {default})"
    return default


def _set(sock: calls.Socket, name: str) -> None:
    calls.setsockopt(sock, calls.IPPROTO_TCP, calls.TCP_CONGESTION, name.encode())
