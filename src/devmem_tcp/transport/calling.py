"""The end that connects: the control connection, the handshake, then the data connections."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final

from devmem_tcp.contract import DevmemSocket, Nic
from devmem_tcp.endpoints import explain, is_loopback, resolve, show
from devmem_tcp.errors import BrokenError, DevmemError, KernelError, Timeout
from devmem_tcp.sansio.frames import NONCE_BYTES, Role
from devmem_tcp.sansio.handshake import Agreed, Connector
from devmem_tcp.sys import calls
from devmem_tcp.transport.control import ControlConnection, TlsEnd
from devmem_tcp.transport.poller import WRITABLE, Poller
from devmem_tcp.transport.reception import Established
from devmem_tcp.transport.terms import SessionOptions
from devmem_tcp.types import Address
from devmem_tcp.uapi.tcp import SO_ERROR


class Calling:
    """One attempt to reach a peer that listens.

    Nothing waits, but for the data connections: the peer has answered by then, and takes one round trip for each.

    Args:
        nic: by which data connections go.
        before_lanes: called with the address that they go to.
        on_session: takes the session, once it is agreed on.
    """

    def __init__(
        self,
        nic: Nic,
        to: Address,
        poller: Poller,
        options: SessionOptions,
        *,
        role: Role,
        before_lanes: Callable[[Address], None],
        on_session: Callable[[Established], None],
        strict: bool = False,
    ) -> None:
        self._nic = nic
        self._to: Final = to
        self._poller = poller
        self._options = options
        self._role = role
        self._before_lanes = before_lanes
        self._on_session = on_session
        self._strict = strict
        self._end = time.monotonic() + options.handshake_timeout_s
        self._tls = TlsEnd(options.tls, server=False, hostname=to[0]) if options.tls is not None else None
        self._candidates = resolve(to, passive=False)
        self._sock: calls.Socket | None = None
        self._control: ControlConnection | None = None
        self._connector: Connector | None = None
        self._established = False
        self._error: Exception | None = None
        try:
            self._try_next()
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raise why it failed, if it has.

        Raises:
            OSError: nobody listens there, with a hint.
            Timeout: the peer did not answer in time.
            AuthenticationFailed, RemoteProtocolError, LocalProtocolError: as ``Connector``.
        """
        if self._error is not None:
            raise self._error

    # --- the control connection ---

    def _try_next(self) -> None:
        """Begin to connect to the next address of the host."""
        family, where = self._candidates.pop(0)
        self._sock = calls.open_tcp(family)
        try:
            calls.set_timeout(self._sock, 0)
            calls.connect(self._sock, where)
        except BlockingIOError:
            self._poller.watch(self._sock.fileno(), WRITABLE, self._connected)
        except OSError as error:
            self._not_connected(error)
        else:
            self._connected()

    def _connected(self) -> None:
        assert self._sock is not None
        self._poller.forget(self._sock.fileno())
        number = int.from_bytes(calls.getsockopt_bytes(self._sock, calls.SOL_SOCKET, SO_ERROR, 4), "little")
        if number:
            self._not_connected(KernelError(number, "connect"))
            return
        sock, self._sock = self._sock, None
        try:
            self._shake(sock)
        except (DevmemError, OSError) as error:
            if self._control is None:
                calls.close_socket(sock)
            self._fail(error)

    def _not_connected(self, error: OSError) -> None:
        assert self._sock is not None
        calls.close_socket(self._sock)
        self._sock = None
        if self._candidates:
            self._try_next()
        else:
            self._error = explain(KernelError(error.errno or 0, "connect"), "connect", self._to)

    # --- the handshake ---

    def _shake(self, sock: calls.Socket) -> None:
        options = self._options
        local = is_loopback(calls.remote_address(sock))
        self._connector = Connector(
            options.terms(self._role, self._nic.capabilities.backend, peer_is_local=local),
            nonce=secrets.token_bytes(NONCE_BYTES),
            now=time.monotonic(),
            timeout_s=max(0.0, self._end - time.monotonic()),
        )
        self._control = ControlConnection(sock, self._poller, self._hear, self._tls)
        self._control.send(self._connector.data_to_send())

    def _hear(self) -> None:
        assert self._control is not None
        assert self._connector is not None
        try:
            while (data := self._control.receive()) is not None:
                if not data:
                    self._connector.control_ended()
                    break
                self._connector.receive_data(data)
        except BrokenError as error:
            self._fail(error)
            return
        self._advance()

    def _advance(self) -> None:
        assert self._control is not None
        assert self._connector is not None
        try:
            agreed = self._connector.next_event()
            self._control.send(self._connector.data_to_send())
            if agreed is not None:
                lanes = self._connect_lanes(agreed)
                self._established = True
                self._on_session(Established(agreed, self._control, self._connector.take_rest(), lanes))
        except (DevmemError, OSError) as error:
            self._fail(error)

    def _connect_lanes(self, agreed: Agreed) -> list[DevmemSocket]:
        assert self._control is not None
        where = (self._control.remote[0], agreed.data_port or self._to[1])
        self._before_lanes(where)
        lanes: list[DevmemSocket] = []
        try:
            for preamble in agreed.preambles:
                left = max(0.001, self._end - time.monotonic())
                sock = self._nic.connect(where, strict=self._strict, timeout_s=left)
                lanes.append(sock)
                try:
                    sock.send(preamble)
                except ConnectionError as error:
                    raise explain(error, "send to", where) from None
        except BaseException:
            for sock in lanes:
                sock.close()
            raise
        return lanes

    # --- time and the end ---

    def deadline(self) -> float | None:
        """Return when to call ``tick``."""
        return None if self._established or self._error is not None else self._end

    def tick(self, now: float) -> None:
        """Give up, if it is time."""
        due = self.deadline()
        if due is None or now < due:
            return
        if self._connector is not None:
            self._connector.tick(now)
            self._advance()
        if self.deadline() is not None:
            words = f"connect {show(self._to)}: no answer in {self._options.handshake_timeout_s:g} s"
            self._fail(Timeout(words, hint="see that host and port are right, and that no firewall is in between"))

    def _fail(self, error: Exception) -> None:
        self._error = error
        self.close()

    def close(self) -> None:
        """Give up what is not established. Idempotent."""
        if self._sock is not None:
            self._poller.forget(self._sock.fileno())
            calls.close_socket(self._sock)
            self._sock = None
        if self._control is not None and not self._established:
            self._control.close()
