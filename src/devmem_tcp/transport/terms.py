"""What a program brings to its sessions: keys, limits, patience; the same for both roles."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import TypedDict

from devmem_tcp.sansio.frames import MAX_LANES, Limits, Role
from devmem_tcp.sansio.handshake import DEFAULT_TIMEOUT_S, MIN_KEY_BYTES, Terms
from devmem_tcp.sansio.session import KeepAlive
from devmem_tcp.transport.checksums import available_checksums


class SessionArguments(TypedDict, total=False):
    """What ``open_receiver``, ``open_sender`` and the like pass on to ``SessionOptions``, where it is explained."""

    key: bytes | None
    insecure: bool
    lanes: int
    max_message_bytes: int
    keep_alive: KeepAlive | None
    tls: ssl.SSLContext | None
    handshake_timeout_s: float


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How sessions are made.

    Args:
        key: shared with the peer, at least 16 random bytes; a session without one is for peers on this machine only,
            unless ``insecure``.
        insecure: accept, or go to, peers on other machines without a key.
        lanes: data connections of a session, at most; the smaller number of both ends holds.
        max_message_bytes: refuse messages above; the sender is told so when it announces one.
        keep_alive: how long a peer may be silent; None: as long as TCP holds. A program that computes for longer than
            that between two calls does not answer.
        tls: for the control connection, of either end's own making; None: plain TCP.
        handshake_timeout_s: seconds that a peer has for all of its part of the handshake.
    """

    key: bytes | None = field(default=None, repr=False)
    insecure: bool = False
    lanes: int = 1
    max_message_bytes: int = 1 << 40
    keep_alive: KeepAlive | None = None
    tls: ssl.SSLContext | None = None
    handshake_timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        if not 1 <= self.lanes <= MAX_LANES:
            raise ValueError(f"lanes must be 1 to {MAX_LANES}, got {self.lanes}")
        if self.key is not None and len(self.key) < MIN_KEY_BYTES:
            raise ValueError(f"a key of {len(self.key)} bytes is easily guessed: give at least {MIN_KEY_BYTES}, random")

    def terms(self, role: Role, backend: str, *, peer_is_local: bool) -> Terms:
        """Return what is brought to the handshake with one peer."""
        return Terms(
            role=role,
            backend=backend,
            limits=Limits(self.lanes, self.max_message_bytes),
            features=frozenset(kind.value for kind in available_checksums()),
            key=self.key,
            peer_is_local=peer_is_local,
            insecure=self.insecure,
        )
