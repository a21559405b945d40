"""The server side of vfio-user: a UNIX socket on which QEMU's ``vfio-user-pci`` finds a PCI function.

One client at a time; another one waits in the socket's backlog. Nothing that a client sends raises here, blocks, or
makes the server spin: a bad request gets an error reply, a stream that cannot be trusted any more is closed, and the
server listens again. Both are counted and logged.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import select
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from devmem_tcp.closing import Closing
from devmem_tcp.errors import ClosedError, RemoteProtocolError
from devmem_tcp.lab import vfio_protocol as wire
from devmem_tcp.lab.dma import DmaError, DmaSpace
from devmem_tcp.lab.vfio_protocol import Header, Refused
from devmem_tcp.lab.vfio_requests import PciFunction, RequestHandler

__all__ = ["PciFunction", "ServerStats", "VfioUserServer"]

_LOG: Final = logging.getLogger(__name__)
_CHUNK_BYTES: Final = 1 << 16  # read at once; a message of QEMU is 20 to 300 bytes
_READS_PER_CALL: Final = 64  # so that one client cannot keep the loop from the others
_FD_BYTES: Final = array.array("i").itemsize
_CONTROL_BYTES: Final = socket.CMSG_SPACE(wire.MAX_MESSAGE_FDS * _FD_BYTES)


@dataclass(slots=True)
class ServerStats:
    """What a server has seen since it was made."""

    connections: int = 0
    messages: int = 0
    errors: int = 0  # requests that were refused
    broken: int = 0  # connections closed by the server, or by the client in the middle of a message
    function_faults: int = 0  # exceptions of the PCI function that are not the guest's doing


class VfioUserServer(Closing):
    """Serves ``function`` to one vfio-user client after the other.

    Whoever waits for several of these waits for their ``fileno()`` to become readable, and then calls ``ready()``.

    Args:
        path: of the UNIX socket to make, at most 107 bytes. Whoever may write to it controls the function, so its
            directory should be private.
        function: what is presented. When a client goes, it is reset and loses its interrupts and memory.
        dma: the memory that clients map. Nothing else may map or unmap there.

    Raises:
        OSError: the socket cannot be made there; EADDRINUSE: there is a file.

    Lifetime: owns the socket, its path, the client's connection and every fd that a client sends; neither
        ``function`` nor ``dma``, which must outlive it.
    """

    def __init__(self, path: str, function: PciFunction, dma: DmaSpace) -> None:
        self.counters = ServerStats()
        self._path = path
        self._handler = RequestHandler(function, dma)
        self._connection: socket.socket | None = None
        self._chunk = memoryview(bytearray(_CHUNK_BYTES))
        self._incoming = bytearray()  # received, not handled yet; starts with a header
        self._fds: list[tuple[int, int]] = []  # (index in _incoming of the last byte that it came with, fd)
        self._outgoing = b""  # rest of a reply; while there is one, no request is handled
        with contextlib.ExitStack() as undo:
            self._listener = undo.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            )
            self._listener.bind(path)
            undo.callback(Path(path).unlink, missing_ok=True)
            self._listener.listen(1)
            # An epoll instance, because what is waited for changes: a client, its requests, room for replies.
            self._epoll = undo.enter_context(select.epoll())
            self._epoll.register(self._listener, select.EPOLLIN)
            self._release = undo.pop_all()
        self.closed = False

    def fileno(self) -> int:
        """Return the fd that is readable when ``ready()`` has something to do; it stays the same until ``close()``."""
        return self._epoll.fileno()

    def ready(self) -> None:
        """Accept a client if one is waiting, and handle every complete message that has come. Never blocks.

        Of a client that sends without end at most 4 MiB are read in one call; ``fileno()`` is readable again then.

        Raises:
            ClosedError: after ``close()``.
        """
        if self.closed:
            raise ClosedError("the vfio-user server is closed")
        if self._connection is None:
            self._accept()
        if self._connection is None:
            return
        try:
            self._serve(self._connection)
        except RemoteProtocolError as broken:
            self.counters.broken += 1
            if _worth_logging(self.counters.broken):
                _LOG.warning("%s: closing the connection: %s", self._path, broken.message)
            self._disconnect()
        except (EOFError, OSError) as gone:
            _LOG.info("%s: the client is gone: %s", self._path, gone)
            self._disconnect()

    def close(self) -> None:
        """Close the connection and the socket, and remove its path. Idempotent."""
        if self.closed:
            return
        self.closed = True
        if self._connection is not None:
            self._disconnect()
        self._release.close()

    # --- the connection --------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        connection.setblocking(False)
        self._epoll.unregister(self._listener)  # or it would be readable all the time while another client waits
        self._epoll.register(connection, select.EPOLLIN)
        self._connection = connection
        self.counters.connections += 1

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        assert connection is not None  # both callers have looked
        self._epoll.unregister(connection)
        connection.close()
        for _, fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._incoming.clear()
        self._outgoing = b""
        try:
            self._handler.disconnect()
        except Exception:  # every step of it was done nevertheless
            self._note_fault("the end of the connection")
        self._epoll.register(self._listener, select.EPOLLIN)

    # --- bytes -----------------------------------------------------------------------------------------------------

    def _serve(self, connection: socket.socket) -> None:
        if self._outgoing:
            self._flush(connection)
        self._handle_incoming(connection)
        for _ in range(_READS_PER_CALL):
            if self._outgoing:
                return
            more = self._receive(connection)
            self._handle_incoming(connection)
            if not more:
                return

    def _receive(self, connection: socket.socket) -> bool:
        """Read once; return whether there may be more to read."""
        try:
            count, control, flags, _ = connection.recvmsg_into([self._chunk], _CONTROL_BYTES, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        self._incoming += self._chunk[:count]
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i", data[: len(data) // _FD_BYTES * _FD_BYTES])
                self._fds += [(len(self._incoming) - 1, fd) for fd in fds]
        if flags & socket.MSG_CTRUNC or len(self._fds) > wire.MAX_MESSAGE_FDS:
            raise RemoteProtocolError(
                f"more fds than the {wire.MAX_MESSAGE_FDS} of a message, or than can be open here"
            )
        if count == 0:
            if self._incoming:
                self.counters.broken += 1
            raise EOFError(f"end of stream, {len(self._incoming)} bytes into a message")
        return count == _CHUNK_BYTES or bool(control)

    def _handle_incoming(self, connection: socket.socket) -> None:
        """Handle the complete messages received, up to one whose reply cannot be sent at once."""
        incoming, position = self._incoming, 0
        try:
            while not self._outgoing and len(incoming) - position >= wire.HEADER.size:
                header = wire.parse_header(incoming, position)
                end = position + header.size
                if end > len(incoming):
                    break
                payload = bytes(incoming[position + wire.HEADER.size : end])
                position = end
                self._handle(connection, header, payload, self._take_fds(end) if self._fds else [])
        finally:
            del incoming[:position]
            self._fds = [(at - position, fd) for at, fd in self._fds]

    def _take_fds(self, end: int) -> list[int]:
        """Take the fds of the message that ends before index ``end``.

        Reading a UNIX stream stops after the piece that fds came with (unix(7); net/unix/af_unix.c,
        unix_stream_read_generic), so they belong to the message that holds the last byte read.
        """
        fds = [fd for at, fd in self._fds if at < end]
        self._fds = [(at, fd) for at, fd in self._fds if at >= end]
        return fds

    def _send(self, connection: socket.socket, reply: bytes) -> None:
        try:
            sent = connection.send(reply, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        if sent < len(reply):
            self._outgoing = reply[sent:]
            self._epoll.modify(connection, select.EPOLLOUT)

    def _flush(self, connection: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            self._outgoing = self._outgoing[connection.send(self._outgoing, socket.MSG_NOSIGNAL) :]
        if not self._outgoing:
            self._epoll.modify(connection, select.EPOLLIN)

    # --- messages --------------------------------------------------------------------------------------------------

    def _handle(self, connection: socket.socket, header: Header, payload: bytes, fds: list[int]) -> None:
        self.counters.messages += 1
        try:
            reply = wire.build_reply(header, self._handler.answer(header.command, payload, fds))
        except (Refused, DmaError) as refused:
            self._note_error(header, refused)
            reply = wire.build_error(header, refused.errno)
        except Exception:  # a fault of the PCI function must not take the other functions of this process with it
            self._note_fault(f"command {header.command}")
            reply = wire.build_error(header, errno.EIO)
        finally:
            for fd in fds:
                os.close(fd)
        if not header.no_reply:
            self._send(connection, reply)
        if not self._handler.negotiated:
            raise RemoteProtocolError("the client did not begin with a VERSION that the server speaks")

    def _note_error(self, header: Header, refused: Refused | DmaError) -> None:
        self.counters.errors += 1
        if _worth_logging(self.counters.errors):
            _LOG.warning(
                "%s: refused command %d with %s (%d so far): %s",
                self._path,
                header.command,
                errno.errorcode.get(refused.errno, refused.errno),
                self.counters.errors,
                refused.message,
            )

    def _note_fault(self, where: str) -> None:
        self.counters.function_faults += 1
        if _worth_logging(self.counters.function_faults):
            _LOG.exception("%s: the PCI function failed in %s", self._path, where)


def _worth_logging(count: int) -> bool:
    """Say yes to the first 16 and then to each power of two: a client must not be able to fill the disk."""
    return count <= 16 or count & (count - 1) == 0
