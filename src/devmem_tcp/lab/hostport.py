"""A port of the switch for a process of the host: one end of a UNIX socket, a whole frame in each message.

The process needs no more than ``socket.send`` and ``socket.recv`` (and its own idea of Ethernet: ``crafting`` makes
and ``frames`` reads packets). What it is sent is plain frames; superframes are segmented here.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from typing import Final

from devmem_tcp.lab.frames import FrameBytes, parse
from devmem_tcp.lab.segments import SegmentError, segment
from devmem_tcp.lab.wire import Packet, Switch

MAX_FRAME_BYTES: Final = 1 << 16
"""The longest frame that passes, either way; more than any MTU of the lab."""

_QUEUED_BYTES: Final = 1 << 20  # asked for each way; the system may grant less (net.core.wmem_max)
_FRAMES_AT_ONCE: Final = 64  # so that a busy process does not keep the lab's loop from its other work


@dataclass(slots=True)
class HostPortCounters:
    """What a host port could not pass on."""

    not_taken: int = 0  #: frames to the process, dropped because its socket was full or closed
    not_segmented: int = 0  #: superframes to the process, dropped because they were not valid TCP
    too_long: int = 0  #: frames either way, dropped because they were longer than MAX_FRAME_BYTES


class HostPort:
    """A switch port whose far end a host process holds. Frames to it are dropped while it does not read them.

    Made by ``pair``, or by a ``HostSocket`` for who connects to it; ``ready()`` is called by the lab's loop whenever
    ``fileno()`` is readable.

    Lifetime: ``close()`` closes this end only. When the process closes its own, ``ready()`` closes this one.
    """

    def __init__(self, name: str, switch: Switch, end: socket.socket) -> None:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUED_BYTES)
        self.name: Final = name
        self.counters: Final = HostPortCounters()
        self._switch = switch
        self._end = end
        switch.attach(self)

    @classmethod
    def pair(cls, name: str, switch: Switch) -> tuple[HostPort, socket.socket]:
        """Plug a port in, and return it with the process's end: a connected, blocking SOCK_SEQPACKET socket.

        The caller closes that end, and passes it to a child process by its file descriptor.

        Raises:
            ValueError: the switch has a port of this name.
        """
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUED_BYTES)
            return cls(name, switch, near), far
        except BaseException:
            near.close()
            far.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether either side has closed."""
        return self._end.fileno() < 0

    def fileno(self) -> int:
        """Return the file descriptor to wait on, for reading; -1 when closed."""
        return self._end.fileno()

    def ready(self) -> None:
        """Send on what the process has sent, up to 64 frames; never blocks. An empty message is a hang-up."""
        for _ in range(_FRAMES_AT_ONCE):
            if self.closed:
                return
            try:
                frame, _, flags, _ = self._end.recvmsg(MAX_FRAME_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it closed with frames from here unread
                frame, flags = b"", 0
            if not frame:
                self.close()
            elif flags & socket.MSG_TRUNC:
                self.counters.too_long += 1
            else:
                self._switch.send(self, Packet(frame))

    def deliver(self, packet: Packet) -> None:
        """Pass a packet to the process: as it is, or the segments of a superframe."""
        if not packet.gso_size:
            self._pass_on(packet.data)
            return
        header_length = parse(packet.data, superframe=True).payload_offset
        try:
            frames = segment(packet.data, header_length, packet.gso_size)
        except SegmentError:
            self.counters.not_segmented += 1
            return
        for frame in frames:
            self._pass_on(frame)

    def close(self) -> None:
        """Unplug the port and close its end; the process then reads the end of the stream. Idempotent."""
        if not self.closed:
            self._switch.detach(self)
            self._end.close()

    def __enter__(self) -> HostPort:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _pass_on(self, frame: FrameBytes) -> None:
        if len(frame) > MAX_FRAME_BYTES:
            self.counters.too_long += 1
            return
        try:
            self._end.send(frame)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            self.counters.not_taken += 1


class HostSocket:
    """A UNIX socket at which host processes are plugged into a switch: each connection is a port, while it lasts.

    The ports are named ``host0``, ``host1`` … in the order of their coming.

    Args:
        path: where the socket is made; removed by ``close``.

    Raises:
        OSError: it cannot be made there.
    """

    def __init__(self, path: str, switch: Switch) -> None:
        self.ports: Final[list[HostPort]] = []
        self._path: Final = path
        self._switch: Final = switch
        self._accepted = 0
        self._listener: Final = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(path)
            self._listener.listen()
        except OSError as error:
            self._listener.close()
            raise OSError(error.errno, error.strerror or str(error), path) from None

    def fileno(self) -> int:
        """Return the file descriptor to wait on, for reading, before ``accept``."""
        return self._listener.fileno()

    def accept(self) -> HostPort:
        """Plug in the process that has connected; its port is closed when the process closes its end."""
        end, _ = self._listener.accept()
        port = HostPort(f"host{self._accepted}", self._switch, end)
        self._accepted += 1
        self.ports[:] = [*(other for other in self.ports if not other.closed), port]
        return port

    def close(self) -> None:
        """Unplug every process, and remove the socket."""
        for port in self.ports:
            port.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
