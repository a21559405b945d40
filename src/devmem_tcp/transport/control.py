"""The control connection: bytes in and out of a plain TCP socket, or of TLS over one, and nothing that waits."""

from __future__ import annotations

import contextlib
import ssl
from typing import Any, Final

from devmem_tcp.endpoints import plain
from devmem_tcp.errors import BrokenError
from devmem_tcp.sys import calls
from devmem_tcp.transport.poller import READABLE, WRITABLE, Handler, Poller
from devmem_tcp.types import Address
from devmem_tcp.uapi import tcp

_READ_BYTES: Final = 1 << 16
_MAX_UNSENT: Final = 1 << 24  # bytes: a peer that lets this pile up does not read
_TCP_OPTIONS: Final = (
    (tcp.TCP_NODELAY, 1),
    (tcp.TCP_KEEPIDLE, 15),
    (tcp.TCP_KEEPINTVL, 5),
    (tcp.TCP_KEEPCNT, 3),
    (tcp.TCP_USER_TIMEOUT, 30_000),
)


class ControlConnection:
    """One control connection, connected. Never waits.

    A host that is gone, or a network that is cut, shows within half a minute: TCP probes an idle connection, and gives
    up on data that nobody acknowledges (Kernel: SO_KEEPALIVE, TCP_USER_TIMEOUT; tcp(7)).

    Args:
        sock: connected, non-blocking; the connection's from here on.
        poller: where it is watched.
        on_ready: called when there is something to read.
        tls: this end of TLS; None: plain TCP.
    """

    def __init__(self, sock: calls.Socket, poller: Poller, on_ready: Handler, tls: TlsEnd | None = None) -> None:
        self._sock = sock
        self._poller = poller
        self.on_ready = on_ready
        self._tls = tls
        self._unsent = bytearray()
        self._closed = False
        self._target = bytearray(_READ_BYTES)
        calls.setsockopt(sock, calls.SOL_SOCKET, tcp.SO_KEEPALIVE, 1)
        for option, value in _TCP_OPTIONS:
            calls.setsockopt(sock, calls.IPPROTO_TCP, option, value)
        self.local: Final[Address] = plain(calls.local_address(sock))
        self.remote_socket_address: Final[tuple[Any, ...]] = calls.remote_address(sock)
        self.remote: Final[Address] = plain(self.remote_socket_address)
        poller.watch(sock.fileno(), READABLE, self._handle)
        if tls is not None:
            tls.start()
            self._write(tls.data_to_send())

    def _handle(self) -> None:
        if self._unsent:
            self._flush()
        self.on_ready()

    def receive(self) -> bytes | None:
        """Return what has come; None: nothing; no bytes: the peer ended the connection, or it broke.

        Raises:
            BrokenError: TLS failed. The peer is told, in TLS's own way.
        """
        if self._closed:
            return b""
        try:
            taken = calls.recv_into(self._sock, self._target, calls.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            taken = 0
        data = bytes(memoryview(self._target)[:taken])
        if self._tls is None:
            return data
        try:
            clear = self._tls.receive(data)
        finally:
            self._write(self._tls.data_to_send())  # an answer, or the alert
        return clear or (None if data else b"")

    def send(self, data: bytes) -> None:
        """Send, now or as soon as the connection takes it.

        Raises:
            BrokenError: the peer does not read: too much waits already.
        """
        if not data or self._closed:
            return
        if self._tls is not None:
            self._tls.send(data)
            data = self._tls.data_to_send()
        self._write(data)

    @property
    def unsent_bytes(self) -> int:
        return len(self._unsent)

    def _write(self, data: bytes) -> None:
        if not data:
            return
        if len(self._unsent) + len(data) > _MAX_UNSENT:
            raise BrokenError(f"{len(self._unsent)} bytes wait on the control connection: the peer does not read")
        self._unsent += data
        self._flush()

    def _flush(self) -> None:
        sent = 0
        try:
            while sent < len(self._unsent):
                sent += calls.send(self._sock, memoryview(self._unsent)[sent:].tobytes(), calls.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except OSError:  # it is of no use any more: reading says so, after what has come already
            sent = len(self._unsent)
            with contextlib.suppress(OSError):
                calls.shutdown(self._sock, calls.SHUT_RDWR)
        del self._unsent[:sent]
        events = READABLE | WRITABLE if self._unsent else READABLE
        self._poller.watch(self._sock.fileno(), events, self._handle)

    def close(self) -> None:
        """Send what the connection still takes, and close it. Idempotent."""
        if not self._closed:
            self._closed = True
            self._poller.forget(self._sock.fileno())
            calls.close_socket(self._sock)


class TlsEnd:
    """One end of TLS, without a socket. After every call, and failed ones too, ``data_to_send`` may have something.

    Args:
        context: the user's, with certificates and what it asks of the peer's.
        server: this end accepted the connection.
        hostname: whom the certificate is to name, for the connecting end.

    Raises:
        ValueError: a context for the other end.
    """

    def __init__(self, context: ssl.SSLContext, *, server: bool, hostname: str | None) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            self._object = context.wrap_bio(
                self._incoming, self._outgoing, server_side=server, server_hostname=None if server else hostname
            )
        except ssl.SSLError as error:
            kind = "PROTOCOL_TLS_SERVER" if server else "PROTOCOL_TLS_CLIENT"
            which = "listens" if server else "connects"
            raise ValueError(f"tls= of the end that {which} has to be of ssl.{kind}: {error.reason or error}") from None
        self._shaken = False
        self._early = bytearray()  # to be sent once the handshake is through

    def data_to_send(self) -> bytes:
        """Return what is to be sent next, once."""
        return self._outgoing.read()

    def start(self) -> None:
        """Begin, if it is this end's part to begin."""
        self._shake()

    def receive(self, data: bytes) -> bytes:
        """Take bytes off the wire, none at its end; returns clear text.

        Raises:
            BrokenError: this is not TLS, or the certificate is not the right one.
        """
        if not data and not self._shaken:
            raise _failed("the peer ended the connection")
        self._incoming.write(data)
        self._shake()
        clear = bytearray()
        try:
            while self._shaken and (chunk := self._object.read(_READ_BYTES)):
                clear += chunk
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise _failed(str(error)) from None
        return bytes(clear)

    def send(self, data: bytes) -> None:
        """Take clear text."""
        if self._shaken:
            self._object.write(data)
        else:
            self._early += data

    def _shake(self) -> None:
        if self._shaken:
            return
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as error:
            raise _failed(str(error)) from None
        self._shaken = True
        if self._early:
            self._object.write(bytes(self._early))
            self._early.clear()


def _failed(why: str) -> BrokenError:
    return BrokenError(
        f"TLS on the control connection failed: {why}",
        hint="both ends need tls=, and certificates that the other trusts",
    )
