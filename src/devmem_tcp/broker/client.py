"""A program's side of the broker: ``NicControl`` and ``Allocator`` without a privilege of its own.

A connection is a lease: when it ends, by ``close()`` or by the end of the process, the broker undoes all that was given
over it. A child that was forked meanwhile holds it too, until it ends or execs.
"""

from __future__ import annotations

import contextlib
import errno
import struct
import threading
import warnings
from collections.abc import Sequence
from typing import Final

from devmem_tcp import contract
from devmem_tcp.broker import protocol
from devmem_tcp.broker.protocol import AnswerType
from devmem_tcp.buffers import Allocator, check_buffer_size
from devmem_tcp.closing import Closing
from devmem_tcp.errors import (
    BindError,
    BrokenError,
    ClosedError,
    KernelError,
    LeakWarning,
    RemoteProtocolError,
    SettingWarning,
)
from devmem_tcp.memory.dmabuf import DmabufBuffer
from devmem_tcp.sys import calls, namespaces
from devmem_tcp.types import FlowRule, HeaderSplitMode

DEFAULT_PATH: Final = protocol.DEFAULT_PATH
ANSWER_TIMEOUT_S: Final = 30.0  # a bind takes milliseconds; the rest is for a machine that is busy
_START: Final = "sudo systemctl start devmem-tcp-broker.socket   # or: sudo devmem-tcp broker"
_TIMEVAL: Final = struct.Struct("ll")  # struct timeval: seconds, microseconds
_GONE: Final = (
    "open the NIC again. A broker that ended in order has put the NIC's settings back; after kill -9 its bindings are "
    "gone, and the settings wait for: sudo devmem-tcp doctor --restore"
)


class Connection(Closing):
    """A connection to the broker, past its ``Hello``. Thread-safe.

    Raises:
        KernelError: the broker cannot be reached, or does not let this program in; the hint says what to do.
        RemoteProtocolError: it speaks another version.
    """

    closed = True  # until __init__ is through

    def __init__(self, path: str) -> None:
        self.path: Final = path
        self._lock = threading.Lock()
        self._broken = ""
        self._sock = calls.open_local()
        try:
            self._reach()
            self.welcome: Final = self.ask(protocol.Hello(version=protocol.VERSION), protocol.Welcome)
            if self.welcome.version != protocol.VERSION:
                raise RemoteProtocolError(
                    f"the broker at {path} speaks version {self.welcome.version} of its protocol, and this program "
                    f"{protocol.VERSION}",
                    hint="install the same devmem-tcp for both",
                )
        except BaseException:
            calls.close_socket(self._sock)
            raise
        self.closed = False

    def _reach(self) -> None:
        hints = {
            errno.ENOENT: _START,
            errno.ECONNREFUSED: _START,
            errno.EACCES: f"join the group that may use it (`ls -l {self.path}`), and log in again",
            errno.EPROTOTYPE: "this is no broker's socket: see that the path is right",
            errno.EAGAIN: "the broker does not answer: systemctl status devmem-tcp-broker",
        }
        try:
            # The kernel's own limit, which also waits for a place in the queue (af_unix.c, unix_stream_connect).
            calls.setsockopt(self._sock, calls.SOL_SOCKET, calls.SO_SNDTIMEO, _TIMEVAL.pack(int(ANSWER_TIMEOUT_S), 0))
            calls.connect_local(self._sock, self.path)
            calls.set_timeout(self._sock, ANSWER_TIMEOUT_S)
        except OSError as error:
            number = error.errno or errno.EINVAL  # of a path that is too long, which Python itself finds
            call = f"connect to the broker at {self.path}"
            raise KernelError(number, call, hint=hints.get(number, "see that the path is right")) from error

    def ask(self, request: protocol.Request, kind: type[AnswerType], fds: Sequence[int] = ()) -> AnswerType:
        """Ask, wait for the answer, and return it.

        Raises:
            KernelError, BusyError, OutOfDeviceMemory, ValueError …: what the broker refused.
            BrokenError: the broker is gone, or does not answer; nothing can be asked any more.
            RemoteProtocolError: its answer makes no sense.
        """
        answer, received = self._exchange(request, fds)
        for fd in received:
            calls.close_fd(fd)
        return _expected(answer, kind)

    def ask_for_fd(self, request: protocol.Allocate) -> tuple[protocol.Allocated, int]:
        """Ask for memory; returns the answer, and the fd that came with it, which is the caller's."""
        answer, received = self._exchange(request, ())
        return _expected(answer, protocol.Allocated), received[0]  # decode_answer has seen to it that there is one

    def _exchange(self, request: protocol.Request, fds: Sequence[int]) -> tuple[protocol.Answer, list[int]]:
        data = protocol.encode_request(request)
        with self._lock:
            if self._broken:
                raise BrokenError(f"the broker at {self.path} is gone: {self._broken}", hint=_GONE)
            self._broken = "an earlier request was interrupted"  # if this one is, its answer would come to the next
            try:
                answer, received = self._send_and_receive(data, fds)
            except TimeoutError as error:
                self._broken = f"no answer in {ANSWER_TIMEOUT_S:g} s"
                raise BrokenError(f"the broker at {self.path} gives {self._broken}", hint=_GONE) from error
            except OSError as error:
                if fds and error.errno == errno.EBADF:  # the fd to send is not open: nothing was sent
                    self._broken = ""
                    raise BindError(errno.EBADF, "bind-rx", hint="give the fd of a dma-buf that is open") from error
                self._broken = error.strerror or str(error)
                raise BrokenError(f"the broker at {self.path} is gone: {self._broken}", hint=_GONE) from error
            self._broken = ""
            return answer, received

    def _send_and_receive(self, data: bytes, fds: Sequence[int]) -> tuple[protocol.Answer, list[int]]:
        told: OSError | None = None
        try:
            calls.send_with_fds(self._sock, data, fds)
        except (BrokenPipeError, ConnectionResetError) as error:
            told = error  # the broker may have said why before it closed
        try:
            answer, received, flags = calls.recv_with_fds(self._sock, protocol.MAX_MESSAGE_BYTES, max_fds=1)
        except ConnectionResetError:
            # Once, if the broker closed with a request of ours unread; what it sent before that comes after it.
            # Kernel: net/unix/af_unix.c, unix_release_sock.
            answer, received, flags = calls.recv_with_fds(self._sock, protocol.MAX_MESSAGE_BYTES, max_fds=1)
        try:
            if not answer:
                raise told or ConnectionResetError(errno.ECONNRESET, "it ended the connection")
            if flags & calls.MSG_CTRUNC:
                raise OSError(errno.EMFILE, "this program has too many open files to take the memory's fd")
            return protocol.decode_answer(answer, received), received
        except BaseException:
            for fd in received:
                calls.close_fd(fd)
            raise

    def undo(self, handle: int) -> None:
        """Undo what a handle stands for; nothing, if the broker is gone and with it the lease.

        Raises:
            RestoreError, KernelError: the broker could not put it back.
        """
        if not self.closed and not self._broken:
            with contextlib.suppress(BrokenError):
                self.ask(protocol.Undo(handle=handle), protocol.Done)

    def close(self) -> None:
        """Have all undone that is left, and end the connection. Idempotent.

        Raises:
            RestoreError, KernelError: the broker could not put something back; the connection is closed all the same.
        """
        if self.closed:
            return
        self.closed = True
        try:
            if not self._broken:
                with contextlib.suppress(BrokenError):
                    self.ask(protocol.UndoAll(), protocol.Done)
        finally:
            self._broken = "this program closed the connection"
            calls.close_socket(self._sock)

    def __del__(self) -> None:
        if not self.closed:
            self.closed = True
            calls.close_socket(self._sock)
            warnings.warn(f"connection to the broker at {self.path} was never closed", LeakWarning, stacklevel=2)


def _expected(answer: protocol.Answer, kind: type[AnswerType]) -> AnswerType:
    for text in answer.warnings:
        warnings.warn(text, SettingWarning, stacklevel=5)
    if isinstance(answer, protocol.Failed):
        raise protocol.unpack_error(answer)
    if not isinstance(answer, kind):
        raise RemoteProtocolError(f"the broker answered {type(answer).__name__}, and not {kind.__name__}")
    return answer


class _Lease:
    """What a handle stands for, to be undone once."""

    def __init__(self, connection: Connection, handle: int) -> None:
        self._connection = connection
        self._handle: int | None = handle

    def undo(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._connection.undo(handle)


class _BrokeredSetting(contract.Setting):
    """A setting that the broker changed."""

    def __init__(self, connection: Connection, answer: protocol.Changed) -> None:
        self._lease = _Lease(connection, answer.handle)
        self._description = answer.description

    @property
    def description(self) -> str:
        return self._description

    def close(self) -> None:
        self._lease.undo()


class _BrokeredRule(contract.NtupleRule):
    """A rule that the broker added."""

    def __init__(self, connection: Connection, answer: protocol.RuleAdded) -> None:
        self._lease = _Lease(connection, answer.handle)
        self._description = answer.description
        self._rule = answer.rule.flow_rule()

    @property
    def description(self) -> str:
        return self._description

    @property
    def rule(self) -> FlowRule:
        return self._rule

    def close(self) -> None:
        self._lease.undo()


class _BrokeredQueues:
    """RX queues that the broker attached a dma-buf to."""

    def __init__(self, connection: Connection, answer: protocol.Attached) -> None:
        self._lease = _Lease(connection, answer.handle)
        self.dmabuf_id: Final = answer.dmabuf_id

    def close(self) -> None:
        self._lease.undo()


class BrokerControl:
    """Changes one NIC by asking the broker; a ``NicControl``.

    Raises:
        KernelError: the broker cannot be reached (ENOENT, ECONNREFUSED), or does not let this program have the NIC
            (EACCES); no such NIC (ENODEV).

    Lifetime: what it was given ends with ``close()`` or with this process, however that ends. If the broker ends first,
    the next change raises BrokenError; a ``close()`` of what is left does nothing.
    """

    def __init__(self, path: str, nic: str) -> None:
        self._connection = Connection(path)
        try:
            self._connection.ask(
                protocol.OpenNic(nic=nic, network_namespace=namespaces.namespace("net")), protocol.Done
            )
        except BaseException:
            self._connection.close()
            raise

    def set_header_split(self, mode: HeaderSplitMode) -> contract.Setting:
        answer = self._ask(protocol.SetHeaderSplit(mode=mode), protocol.Changed)
        return _BrokeredSetting(self._connection, answer)

    def set_hds_thresh(self, size_bytes: int) -> contract.Setting:
        answer = self._ask(protocol.SetHdsThresh(size_bytes=size_bytes), protocol.Changed)
        return _BrokeredSetting(self._connection, answer)

    def set_rss(self, table: Sequence[int], words: str) -> contract.Setting:
        """Set the whole RSS indirection table; long ``words`` are cut: they are for people."""
        request = protocol.SetRss(table=list(table), words=words[: protocol.MAX_WORDS])
        return _BrokeredSetting(self._connection, self._ask(request, protocol.Changed))

    def add_ntuple(self, rule: FlowRule) -> contract.NtupleRule:
        answer = self._ask(protocol.AddNtuple(rule=protocol.Rule.of(rule)), protocol.RuleAdded)
        return _BrokeredRule(self._connection, answer)

    def attach(self, dmabuf_fd: int, queues: Sequence[int], rx_page_size: int) -> _BrokeredQueues:
        request = protocol.Attach(queues=list(queues), rx_page_size=rx_page_size)
        return _BrokeredQueues(self._connection, self._ask(request, protocol.Attached, [dmabuf_fd]))

    def status(self) -> protocol.Status:
        """Return what this user has of its quotas, and which queues are leased to its programs."""
        return self._ask(protocol.GetStatus(), protocol.Status)

    def close(self) -> None:
        """Have all undone that is left, the last first. Idempotent.

        Raises:
            RestoreError, KernelError: something could not be put back.
        """
        self._connection.close()

    def _ask(self, request: protocol.Request, kind: type[AnswerType], fds: Sequence[int] = ()) -> AnswerType:
        if self._connection.closed:
            raise ClosedError("this lease of the broker is closed", hint="open the NIC again")
        return self._connection.ask(request, kind, fds)


class BrokeredBuffer(DmabufBuffer):
    """A dma-buf that the broker made. Its ``close()`` ends the connection that it came by.

    The memory counts for its user's quota until nobody has it any more: views and bindings of it, and copies of its fd.
    """

    def __init__(self, size_bytes: int, kind: str, fd: int, connection: Connection) -> None:
        self._connection = connection
        super().__init__(size_bytes, kind, fd)

    def _let_go(self) -> None:
        super()._let_go()
        self._connection.close()


class BrokerMemory(Allocator):
    """Allocate dma-bufs by the broker, for programs that cannot open the device that makes them.

    Args:
        path: the broker's socket.
        kind: of memory: ``udmabuf``, or ``dma-heap NAME``, as far as the administrator allows it.
    """

    def __init__(self, path: str = DEFAULT_PATH, kind: str = "udmabuf") -> None:
        self.path: Final = path
        self.kind: Final = kind

    def allocate(self, size_bytes: int) -> BrokeredBuffer:
        """Allocate ``size_bytes`` of zeroed memory, a positive multiple of 4096, as a dma-buf.

        Kernel: as ``memory.Udmabuf`` and ``memory.DmaHeap``, done by the broker; the fd comes by SCM_RIGHTS.

        Raises:
            ValueError: size is zero, negative or not page-aligned.
            OutOfDeviceMemory: more than the quota leaves, than there is, or than the exporter's limit.
            KernelError: the broker cannot be reached, does not let this program in, or was refused by the kernel.
        """
        check_buffer_size(size_bytes)
        connection = Connection(self.path)
        try:
            _, fd = connection.ask_for_fd(protocol.Allocate(kind=self.kind, size_bytes=size_bytes))
        except BaseException:
            connection.close()
            raise
        return BrokeredBuffer(size_bytes, f"{self.kind} by the broker", fd, connection)

    def __repr__(self) -> str:
        return f"BrokerMemory({self.path!r}, {self.kind!r})"
