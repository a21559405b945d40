"""The broker's loop: one thread, one epoll, one message of one client at a time.

A hostile client costs the others little: each turn takes one message of each client that has some, a client that does
not read its answer is not read from, and what is not a message ends the connection. Nothing here waits for a client.
"""

from __future__ import annotations

import contextlib
import errno
import struct
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Final

from devmem_tcp.broker import protocol
from devmem_tcp.broker.leasing import Client, Leasing, Log
from devmem_tcp.broker.policy import Peer
from devmem_tcp.errors import BusyError, DevmemError, KernelError, RemoteProtocolError, SettingWarning
from devmem_tcp.sys import calls

MAX_CONNECTIONS: Final = 1024  # of all users; what one may have is its quota
BACKLOG: Final = 128
_LOOK_EVERY_S: Final = 1.0
_UCRED: Final = struct.Struct("=iII")  # struct ucred of linux/socket.h: pid, uid, gid
_MOST_GROUP_BYTES: Final = 1024  # what Python's getsockopt reads at most: 256 groups
_FIRST_INHERITED_FD: Final = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
_OVERFLOW_USER: Final = "/proc/sys/kernel/overflowuid"


def peer_of(sock: calls.Socket) -> Peer:
    """Return who is at the far end of a UNIX socket, as it was when it connected.

    Kernel: getsockopt(SO_PEERCRED) and (SO_PEERGROUPS). Of a user in more than 256 groups the supplementary ones are
    not looked at.

    Raises:
        KernelError: EACCES: this process has no name for that user or process: it is in a user or PID namespace
            outside of this one.
    """
    size = _UCRED.size
    pid, user_id, group_id = _UCRED.unpack(calls.getsockopt_bytes(sock, calls.SOL_SOCKET, calls.SO_PEERCRED, size))
    if pid <= 0 or user_id == int(calls.read_text(_OVERFLOW_USER)):
        raise KernelError(
            errno.EACCES,
            "use the broker",
            extack=f"the broker cannot tell who this is (uid {user_id}, pid {pid})",
            hint="run the program as a user that the broker's machine knows, and not behind another PID namespace",
        )
    try:
        packed = calls.getsockopt_bytes(sock, calls.SOL_SOCKET, calls.SO_PEERGROUPS, _MOST_GROUP_BYTES)
    except OSError as error:
        if error.errno not in (errno.ERANGE, errno.ENODATA):
            raise
        packed = b""
    return Peer(pid, user_id, group_id, frozenset(group for (group,) in struct.iter_unpack("=I", packed)))


class _Connection:
    """A client's socket, and the answer that it did not take yet."""

    def __init__(self, sock: calls.Socket, client: Client) -> None:
        self.sock: Final = sock
        self.client: Final = client
        self.pending: tuple[bytes, int | None] | None = None

    def __str__(self) -> str:
        return str(self.client.peer)


class Server:
    """Serves clients on a listening socket.

    Lifetime: ``leasing`` and the connections are the server's, and end with ``close()``, which undoes all that was
    given; the listening socket is the caller's.
    """

    def __init__(self, listener: calls.Socket, leasing: Leasing, log: Log) -> None:
        self._listener = listener
        self._leasing = leasing
        self._log = log
        self._connections: dict[int, _Connection] = {}
        self._listen_again_s: float | None = None  # when, if there was no fd for the next client
        self._look_s: float | None = None  # when to look for memory that was freed
        calls.set_timeout(listener, 0)
        self._epoll = calls.epoll_create()
        try:
            calls.epoll_set(self._epoll, listener.fileno(), calls.EPOLLIN, known=False)
        except BaseException:
            self._epoll.close()
            raise

    def serve(self, stop_fd: int) -> None:
        """Serve until ``stop_fd`` is readable."""
        calls.epoll_set(self._epoll, stop_fd, calls.EPOLLIN, known=False)
        try:
            while stop_fd not in self.turn():
                pass
        finally:
            calls.epoll_forget(self._epoll, stop_fd)

    def turn(self) -> list[int]:
        """Wait until there is something to do, and do it: one message of each client. Returns other fds that are ready.

        Raises:
            OSError: waiting itself failed.
        """
        unknown = []
        for fd, _ in calls.epoll_wait(self._epoll, self._wait_s()):
            if fd == self._listener.fileno():
                self._accept()
            elif (connection := self._connections.get(fd)) is not None:
                self._ready(connection)
            else:
                unknown.append(fd)
        self._look_after()
        return unknown

    def close(self) -> None:
        """End all connections and undo all that was given, the last first. Idempotent."""
        self._leasing.close()
        for connection in self._connections.values():
            calls.close_socket(connection.sock)
        self._connections.clear()
        self._epoll.close()

    # --- what waits for a time ---

    def _wait_s(self) -> float | None:
        times = [when for when in (self._listen_again_s, self._look_s) if when is not None]
        return max(min(times) - time.monotonic(), 0.0) if times else None

    def _look_after(self) -> None:
        now = time.monotonic()
        if self._listen_again_s is not None and now >= self._listen_again_s:
            self._listen_again_s = None
            self._watch_listener(calls.EPOLLIN)
        if self._look_s is None or now >= self._look_s:
            self._look_s = now + _LOOK_EVERY_S if self._leasing.look_for_freed() else None

    def _watch_listener(self, events: int) -> None:
        try:
            calls.epoll_set(self._epoll, self._listener.fileno(), events, known=True)
        except OSError as error:
            self._log(f"cannot watch for clients: {error}")
            self._listen_again_s = time.monotonic() + _LOOK_EVERY_S

    # --- clients ---

    def _accept(self) -> None:
        try:
            sock = calls.accept(self._listener)
        except (BlockingIOError, ConnectionError):
            return  # it went away before we came to it
        except OSError as error:
            self._log(f"cannot take the next client: {error}")
            self._listen_again_s = time.monotonic() + _LOOK_EVERY_S  # else the same failure at once, for ever
            self._watch_listener(0)
            return
        try:
            if len(self._connections) >= MAX_CONNECTIONS:
                raise BusyError(f"the broker has {MAX_CONNECTIONS} connections", hint="try again later")
            peer = peer_of(sock)
            client = self._leasing.admit(peer)
        except (DevmemError, OSError) as error:
            self._log(f"refused a client: {_line(error)}")
            with contextlib.suppress(OSError):
                calls.send_with_fds(sock, protocol.encode(protocol.pack_error(error)), [], calls.MSG_DONTWAIT)
            calls.close_socket(sock)
            return
        connection = _Connection(sock, client)
        self._connections[sock.fileno()] = connection
        try:
            calls.epoll_set(self._epoll, sock.fileno(), calls.EPOLLIN, known=False)
        except OSError as error:
            self._drop(connection, f"cannot be watched: {error}")

    def _ready(self, connection: _Connection) -> None:
        try:
            if connection.pending is None:
                if not self._serve_one(connection):
                    self._drop(connection, "gone")
            else:
                self._send(connection, *connection.pending)
        except RemoteProtocolError as error:
            self._send_last(connection, error)
            self._drop(connection, f"broke the protocol: {_line(error)}")
        except OSError as error:
            self._drop(connection, f"connection failed: {error}")
        except Exception as error:  # a mistake of ours: its client is let go whole, the others are served on
            self._log(traceback.format_exc())
            self._send_last(connection, error)
            self._drop(connection, "let go because of a mistake in the broker")

    def _serve_one(self, connection: _Connection) -> bool:
        """Take one message and answer it; False if the client has gone."""
        try:
            data, fds, flags = calls.recv_with_fds(
                connection.sock, protocol.MAX_MESSAGE_BYTES, max_fds=1, flags=calls.MSG_DONTWAIT
            )
        except BlockingIOError:
            return True
        try:
            if not data and not fds:
                return False
            if flags & calls.MSG_TRUNC:
                raise RemoteProtocolError(f"a message has {protocol.MAX_MESSAGE_BYTES} bytes at most")
            if flags & calls.MSG_CTRUNC:
                raise RemoteProtocolError("a message has one fd at most, and the broker must have room for it")
            answer, fd = self._answer(connection, protocol.decode_request(data, fds), fds)
        finally:
            for received in fds:
                calls.close_fd(received)
        self._send(connection, protocol.encode(answer), fd)
        return True

    def _answer(
        self, connection: _Connection, request: protocol.Request, fds: list[int]
    ) -> tuple[protocol.Answer, int | None]:
        if isinstance(request, protocol.Hello) and request.version != protocol.VERSION:
            raise RemoteProtocolError(
                f"the broker speaks version {protocol.VERSION} of its protocol, and the client {request.version}",
                hint="install the same devmem-tcp for both, and restart the broker",
            )
        fd: int | None = None
        answer: protocol.Answer
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                answer, fd = self._leasing.obey(connection.client, request, fds)
            except RemoteProtocolError:
                raise
            except (DevmemError, OSError, ValueError) as error:
                self._log(f"{connection}: {type(request).__name__}: {_line(error)}")
                answer = protocol.pack_error(error)
        for warning in caught:
            self._log(f"{connection}: warning: {warning.message}")
        return protocol.with_warnings(answer, [w.message for w in caught if isinstance(w.message, SettingWarning)]), fd

    def _send(self, connection: _Connection, data: bytes, fd: int | None) -> None:
        """Send an answer, or keep it until there is room; until then nothing more is taken from this client."""
        blocked = connection.pending is not None
        try:
            calls.send_with_fds(connection.sock, data, [] if fd is None else [fd], calls.MSG_DONTWAIT)
            connection.pending = None
        except BlockingIOError:
            connection.pending = data, fd
        if blocked != (connection.pending is not None):
            events = calls.EPOLLIN if connection.pending is None else calls.EPOLLOUT
            calls.epoll_set(self._epoll, connection.sock.fileno(), events, known=True)

    def _send_last(self, connection: _Connection, error: Exception) -> None:
        with contextlib.suppress(OSError):
            answer = protocol.encode(protocol.pack_error(error))
            calls.send_with_fds(connection.sock, answer, [], calls.MSG_DONTWAIT)

    def _drop(self, connection: _Connection, why: str) -> None:
        del self._connections[connection.sock.fileno()]
        calls.close_socket(connection.sock)  # and so out of the epoll
        self._log(f"{connection}: {why}")
        self._leasing.leave(connection.client)


def _line(error: Exception) -> str:
    """Return an error without its hint, which is the client's."""
    return str(error).partition("\n")[0]


@contextlib.contextmanager
def listening(path: str, group_id: int | None = None) -> Iterator[calls.Socket]:
    """Yield a socket that listens at ``path``, whose file goes with the block.

    Args:
        group_id: who besides the owner may connect (mode 0660); None: everybody (0666), for the policy to judge.

    Raises:
        BusyError: a broker listens there already.
        KernelError: the path cannot be bound.
    """
    sock = calls.open_local()
    try:
        try:
            _remove_stale(path)
            calls.bind_local(sock, path)
        except OSError as error:
            hint = f"--socket takes another path, of at most 107 bytes; the default needs root: {protocol.DEFAULT_PATH}"
            raise KernelError(error.errno or errno.EINVAL, f"bind {path}", hint=hint) from error
        try:
            if group_id is not None:
                calls.change_group(path, group_id)
            calls.change_mode(path, 0o666 if group_id is None else 0o660)
            calls.listen(sock, BACKLOG)  # nobody could connect before
            yield sock
        finally:
            with contextlib.suppress(OSError):
                calls.remove_file(path)
    finally:
        calls.close_socket(sock)


def _remove_stale(path: str) -> None:
    """Remove the socket of a broker that was killed; nothing else."""
    try:
        if not calls.is_socket(path):
            return
    except FileNotFoundError:
        return
    probe = calls.open_local()
    try:
        calls.set_timeout(probe, 0)
        with contextlib.suppress(BlockingIOError):  # too many are waiting for it
            calls.connect_local(probe, path)
    except ConnectionRefusedError:
        calls.remove_file(path)
    else:
        raise BusyError(
            f"a broker listens at {path} already", hint="systemctl status devmem-tcp-broker, or --socket PATH"
        )
    finally:
        calls.close_socket(probe)


def inherited() -> calls.Socket | None:
    """Return the socket that systemd listens on for this process; None if it started it without one.

    Source: sd_listen_fds(3): LISTEN_PID and LISTEN_FDS in the environment, the fds from 3 on.

    Raises:
        KernelError: there are several, or it is not one for this protocol.
    """
    if calls.environment("LISTEN_PID") != str(calls.process_id()):
        return None
    count = calls.environment("LISTEN_FDS")
    hint = "the unit needs just one ListenSequentialPacket=, as the devmem-tcp-broker.socket of this package has"
    if count != "1":
        raise KernelError(errno.EINVAL, f"take over {count} sockets of systemd", hint=hint)
    try:
        return calls.adopt_listening(_FIRST_INHERITED_FD)
    except OSError as error:
        raise KernelError(error.errno or errno.EINVAL, "take over the socket of systemd", hint=hint) from error
