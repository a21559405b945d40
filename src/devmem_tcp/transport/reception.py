"""The end that listens: control connections and data connections come in any order, and are tied to sessions.

Nothing that a stranger sends costs more than one connection for a few seconds: how many may wait is limited, and how
long; what a data connection says is proved before a byte of a message is read from it.
"""

from __future__ import annotations

import errno
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple, TypeVar

import numpy as np

from devmem_tcp.buffers import Buffer
from devmem_tcp.contract import DevmemSocket, Listener
from devmem_tcp.endpoints import is_loopback, plain, show
from devmem_tcp.errors import (
    BrokenError,
    DevmemError,
    NotZeroCopy,
    RemoteProtocolError,
    ShortageWarning,
    SteeringWarning,
    errno_name,
)
from devmem_tcp.sansio.frames import NONCE_BYTES, Role
from devmem_tcp.sansio.handshake import (
    PREAMBLE_BYTES,
    SECRET_BYTES,
    Acceptor,
    Agreed,
    HandshakeState,
    read_preamble,
)
from devmem_tcp.sys import calls
from devmem_tcp.transport.control import ControlConnection, TlsEnd
from devmem_tcp.transport.landing import copy_batch
from devmem_tcp.transport.poller import READABLE, Poller
from devmem_tcp.transport.terms import SessionOptions
from devmem_tcp.types import Address

MAX_WAITING: Final = 128  # connections of either kind that have not shown yet who they are
_ACCEPTS_A_TURN: Final = 16
_SHORTAGE_PAUSE_S: Final = 0.1

_SHORTAGES: Final = {
    errno.EMFILE: "this process has as many files open as it may: ulimit -n 65536, or LimitNOFILE=65536 in its unit",
    errno.ENFILE: "the system has as many files open as it may: sysctl fs.file-nr says how many, fs.file-max sets it",
    errno.ENOBUFS: "the kernel has no memory for more connections: see `free -m` and `ss -s`",
    errno.ENOMEM: "the kernel has no memory for more connections: see `free -m` and `ss -s`",
}
"""What accept(2) says when it cannot go on now, though a connection waits; and what to do about it."""

_MISTAKES: Final = frozenset((errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTSOCK))
"""What accept(2) says of the listening socket. Everything else concerns one connection that is gone already: Linux
passes on what the network reported of it (accept(2), "Error handling"), or a firewall's EPERM."""

Accepted = TypeVar("Accepted")


class Established(NamedTuple):
    """A session that both ends agreed on, and its connections; ``rest`` is what came behind the handshake."""

    agreed: Agreed
    control: ControlConnection
    rest: bytes
    lanes: Sequence[DevmemSocket]


class _Caller:
    """A control connection whose handshake is under way."""

    def __init__(self, control: ControlConnection, acceptor: Acceptor) -> None:
        self.control = control
        self.acceptor = acceptor
        self.proved = False  # it knows the key
        self.lanes: dict[int, DevmemSocket] = {}

    def close(self) -> None:
        self.control.send(self.acceptor.data_to_send())
        self.control.close()
        for sock in self.lanes.values():
            sock.close()


class _Stranger:
    """A data connection that has not said yet whose it is."""

    def __init__(self, sock: DevmemSocket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline
        self.preamble = bytearray()


class Reception:
    """Takes in peers.

    Args:
        control: a listening socket, not blocking; the reception's from here on.
        data: where data connections come; the same.
        buffer: what they land in, if they are steered to a binding.
        role: of this end.
        on_session: takes each session that is agreed on.
        may_enter: asked of each peer that has proved itself, which ``entering`` counts already: why there is no room
            for its session, or nothing.
    """

    def __init__(
        self,
        control: calls.Socket,
        data: Listener,
        poller: Poller,
        options: SessionOptions,
        *,
        role: Role,
        backend: str,
        buffer: Buffer | None,
        on_session: Callable[[Established], None],
        may_enter: Callable[[], str],
    ) -> None:
        self._control = control
        self._data = data
        self._poller = poller
        self._options = options
        self._role = role
        self._backend = backend
        self._buffer = buffer
        self._on_session = on_session
        self._may_enter = may_enter
        self._callers: dict[bytes, _Caller] = {}  # by session id
        self._strangers: dict[int, _Stranger] = {}  # by fd
        self._closed = False
        self._resume_at: float | None = None  # nobody is taken in before, by time.monotonic
        self._told_shortage = False
        self.refused = 0  #: connections that were turned away, for whatever reason
        self.last_refusal = ""
        try:
            self._tls_end()  # an error belongs here
            self.address: Final[Address] = plain(calls.local_address(control))
            data.settimeout(0)
            self._watch()
        except BaseException:
            calls.close_socket(control)
            raise

    @property
    def waiting(self) -> int:
        """How many sessions are being agreed on, strangers' among them."""
        return len(self._callers)

    @property
    def entering(self) -> int:
        """How many of them are with peers that have proved to know the key."""
        return sum(caller.proved for caller in self._callers.values())

    # --- who comes ---

    def _watch(self) -> None:
        self._poller.watch(self._control.fileno(), READABLE, self._accept_control)
        self._poller.watch(self._data.fileno(), READABLE, self._accept_data)

    def _arrivals(self, accept: Callable[[], Accepted]) -> Iterator[Accepted]:
        """Accept those who wait, as many as a turn may take."""
        for _ in range(_ACCEPTS_A_TURN):
            try:
                arrived = accept()
            except BlockingIOError:
                return
            except NotZeroCopy as error:
                self._note_refusal(str(error))
                continue
            except OSError as error:
                if error.errno in _SHORTAGES:
                    self._pause(error)
                    return
                if error.errno in _MISTAKES:
                    raise
                self._note_refusal(str(error))  # gone before it said anything
                continue
            yield arrived

    def _pause(self, shortage: OSError) -> None:
        """Take in nobody for a moment: who waits stays ready, and would be met in vain again and again."""
        self._unwatch()
        self._resume_at = time.monotonic() + _SHORTAGE_PAUSE_S
        if not self._told_shortage:
            self._told_shortage = True
            number = shortage.errno or 0
            warnings.warn(
                f"connections to {show(self.address)} wait: accept says {errno_name(number)} ({shortage.strerror}). "
                "Sessions under way go on; who waits is taken in when that is over."
                f"\n  hint: {_SHORTAGES[number]}",
                ShortageWarning,
                stacklevel=2,
            )

    def _unwatch(self) -> None:
        self._poller.forget(self._control.fileno())
        self._poller.forget(self._data.fileno())

    # --- control connections ---

    def _accept_control(self) -> None:
        for sock in self._arrivals(lambda: calls.accept(self._control)):
            if len(self._callers) >= MAX_WAITING and not self._drop_slowest():
                calls.close_socket(sock)
                self._note_refusal(f"{MAX_WAITING} peers are shaking hands already")
                continue
            try:
                self._take_caller(sock)
            except OSError as error:  # gone before it said anything
                calls.close_socket(sock)
                self._note_refusal(str(error))

    def _take_caller(self, sock: calls.Socket) -> None:
        calls.set_timeout(sock, 0)
        options = self._options
        control = ControlConnection(sock, self._poller, lambda: None, self._tls_end())
        acceptor = Acceptor(
            options.terms(self._role, self._backend, peer_is_local=is_loopback(control.remote_socket_address)),
            nonce=secrets.token_bytes(NONCE_BYTES),
            secret=secrets.token_bytes(SECRET_BYTES),
            now=time.monotonic(),
            data_port=self._data.address[1],
            timeout_s=options.handshake_timeout_s,
        )
        caller = self._callers[acceptor.session_id] = _Caller(control, acceptor)
        control.on_ready = partial(self._hear, caller)
        self._advance(caller)

    def _tls_end(self) -> TlsEnd | None:
        return TlsEnd(self._options.tls, server=True, hostname=None) if self._options.tls is not None else None

    def _drop_slowest(self) -> bool:
        """Drop who has taken longest to prove anything; who comes after many strangers is heard even so."""
        slowest = next((caller for caller in self._callers.values() if not caller.proved), None)
        if slowest is not None:
            self._drop(slowest, f"{MAX_WAITING} others came before it had proved that it knows the key")
        return slowest is not None

    def _hear(self, caller: _Caller) -> None:
        try:
            while (data := caller.control.receive()) is not None:
                if not data:
                    caller.acceptor.control_ended()
                    break
                caller.acceptor.receive_data(data)
        except BrokenError as error:
            self._drop(caller, str(error))
            return
        self._advance(caller)

    def _advance(self, caller: _Caller) -> None:
        acceptor = caller.acceptor
        try:
            agreed = acceptor.next_event()
            if acceptor.state is HandshakeState.AWAITS_LANES and not caller.proved:
                caller.proved = True
                self._check_room(acceptor)
            caller.control.send(acceptor.data_to_send())
        except (DevmemError, OSError) as error:
            self._drop(caller, str(error))
            return
        if agreed is not None:
            del self._callers[acceptor.session_id]
            lanes = [caller.lanes[lane] for lane in range(len(caller.lanes))]
            self._on_session(Established(agreed, caller.control, acceptor.take_rest(), lanes))

    def _check_room(self, acceptor: Acceptor) -> None:
        """Refuse a peer that has proved itself, if there are too many: strangers take nobody's room."""
        reason = self._may_enter()
        if reason:
            acceptor.data_to_send()  # the welcome, which is not said
            acceptor.refuse("full", reason)
            acceptor.next_event()

    def _drop(self, caller: _Caller, why: str) -> None:
        self._note_refusal(why)
        self._callers.pop(caller.acceptor.session_id, None)
        caller.close()

    def _note_refusal(self, why: str) -> None:
        self.refused += 1
        self.last_refusal = why

    # --- data connections ---

    def _accept_lane(self) -> DevmemSocket:
        """Accept a data connection; a sender's need not be steered: nothing comes back but acknowledgements."""
        with warnings.catch_warnings():
            if self._role is Role.SENDER:
                warnings.simplefilter("ignore", SteeringWarning)
            return self._data.accept()

    def _accept_data(self) -> None:
        for sock in self._arrivals(self._accept_lane):
            if len(self._strangers) >= MAX_WAITING:
                slowest = next(iter(self._strangers.values()))
                self._turn_away(slowest, f"{MAX_WAITING} data connections came before this one said whose it is")
            try:
                self._take_stranger(sock)
            except OSError as error:
                sock.close()
                self._note_refusal(str(error))
                if error.errno in _SHORTAGES:  # to watch it takes file descriptors, too
                    self._pause(error)
                    return

    def _take_stranger(self, sock: DevmemSocket) -> None:
        sock.settimeout(0)
        fd = sock.fileno()
        stranger = _Stranger(sock, time.monotonic() + self._options.handshake_timeout_s)
        self._poller.watch(fd, READABLE, partial(self._read_preamble, stranger))
        self._strangers[fd] = stranger
        self._read_preamble(stranger)

    def _read_preamble(self, stranger: _Stranger) -> None:
        missing = PREAMBLE_BYTES - len(stranger.preamble)
        try:
            with stranger.sock.recv_frags(missing) as batch:
                piece = np.empty(batch.nbytes, np.uint8)
                copy_batch(batch, self._buffer, piece)
        except BlockingIOError:
            return
        except (NotZeroCopy, OSError) as error:
            self._turn_away(stranger, str(error))
            return
        stranger.preamble += piece.tobytes()
        if not len(piece):
            self._turn_away(stranger, "a data connection ended before it said whose it is")
        elif len(stranger.preamble) == PREAMBLE_BYTES:
            self._admit(stranger)

    def _admit(self, stranger: _Stranger) -> None:
        try:
            preamble = read_preamble(stranger.preamble)
            caller = self._callers.get(preamble.session_id)
            if caller is None:
                raise RemoteProtocolError("a data connection of no session that is being agreed on")
            lane = caller.acceptor.admit(preamble)
        except DevmemError as error:
            self._turn_away(stranger, str(error))
            return
        self._forget(stranger)
        caller.lanes[lane] = stranger.sock
        self._advance(caller)

    def _turn_away(self, stranger: _Stranger, why: str) -> None:
        self._note_refusal(why)
        self._forget(stranger)
        stranger.sock.close()

    def _forget(self, stranger: _Stranger) -> None:
        fd = stranger.sock.fileno()
        self._poller.forget(fd)
        del self._strangers[fd]

    # --- time ---

    def deadline(self) -> float | None:
        """Return when to call ``tick``."""
        if not self._strangers and not self._callers:
            return self._resume_at
        due = [stranger.deadline for stranger in self._strangers.values()]
        due += [] if self._resume_at is None else [self._resume_at]
        due += [at for caller in self._callers.values() if (at := caller.acceptor.deadline()) is not None]
        return min(due, default=None)

    def tick(self, now: float) -> None:
        """Turn away whoever took too long, and take in others again after a shortage."""
        for stranger in list(self._strangers.values()):
            if now >= stranger.deadline:
                self._turn_away(stranger, "a data connection did not say in time whose it is")
        for caller in list(self._callers.values()):
            caller.acceptor.tick(now)
            self._advance(caller)
        if self._resume_at is not None and now >= self._resume_at:
            self._watch()
            self._resume_at = None

    def close(self) -> None:
        """Listen no more, and drop who is not in yet. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._resume_at = None
        self._unwatch()
        calls.close_socket(self._control)
        self._data.close()
        for stranger in list(self._strangers.values()):
            self._forget(stranger)
            stranger.sock.close()
        while self._callers:
            self._callers.popitem()[1].close()
