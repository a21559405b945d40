"""A connected socket of a kernel NIC: Inbound and Outbound, and all the waiting.

Waiting is done within recvmsg and sendmsg themselves, bounded by SO_RCVTIMEO and SO_SNDTIMEO. poll(2) would not do: it
reports POLLERR whether asked to or not, so that a reader would spin while completions wait to be collected.
"""

from __future__ import annotations

import errno
import struct
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Final, TypeVar, TypeVarTuple

from devmem_tcp import contract
from devmem_tcp.contract import DEFAULT_MAX_BYTES, DEFAULT_MAX_FRAGS
from devmem_tcp.endpoints import WaitLimits, congestion_control, plain, show
from devmem_tcp.errors import (
    ClosedError,
    ControlTruncated,
    LeakWarning,
    LocalProtocolError,
    StarvationWarning,
    Timeout,
    TokenError,
)
from devmem_tcp.kernel.attachment import Registry
from devmem_tcp.kernel.receiving import Inbound
from devmem_tcp.kernel.sending import Outbound, Pieces
from devmem_tcp.kernel.starvation import starvation
from devmem_tcp.sys import calls
from devmem_tcp.types import Address, CompletionRange, FragBatch, SocketStats, TokenHolder, TokenRangeArray
from devmem_tcp.uapi.socket import CONTROL_SPACE_PER_FRAG, SO_INCOMING_NAPI_ID

BACKEND: Final = "kernel"
REPORT_AFTER_S: Final = 1.0  # of waiting; a wait is also cut into pieces of this length, to look who holds what
_PAUSE_S: Final = 0.001
_MEMINFO: Final = struct.Struct("<9I")  # SK_MEMINFO_VARS of include/uapi/linux/sock_diag.h
_MEMINFO_RECEIVED: Final = (0, 7)  # SK_MEMINFO_RMEM_ALLOC, _BACKLOG: bytes of memory in packets that were not read

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class KernelSocket(contract.DevmemSocket):
    """See ``contract.DevmemSocket``.

    Limits: a blocking ``send_frags`` that ran into net.core.optmem_max has collected completions to go on; the next
    ``read_completions`` returns them, but ``fileno()`` is not ready for them.

    Args:
        sock: a connected TCP socket, which is this object's to close once it is made.
        registry: of the NIC.
        strict: ordinary data raises NotZeroCopy.
    """

    _closed = True  # until __init__ is through: __del__ also meets an object that was never finished

    def __init__(self, sock: calls.Socket, registry: Registry, *, strict: bool = False) -> None:
        self._sock = sock
        self._registry = registry
        self._local = plain(calls.local_address(sock))
        self._remote = plain(calls.remote_address(sock))
        self._congestion_control = congestion_control(sock)
        calls.set_timeout(sock, None)
        self._inbound = Inbound(sock, strict=strict)
        self._outbound = Outbound(sock, registry.tx)
        self._timeout_s: float | None = None
        self._limits = WaitLimits(sock)
        self._queue = -1
        self._recv_calls = 0
        self._key = registry.add(self)
        self._closed = False

    # --- receiving ---

    def recv_frags(self, max_bytes: int = DEFAULT_MAX_BYTES, *, max_frags: int = DEFAULT_MAX_FRAGS) -> FragBatch:
        self._check_open()
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        if max_frags <= 0:
            raise ControlTruncated(needed=CONTROL_SPACE_PER_FRAG)
        self._recv_calls += 1
        return self._receive(self._inbound.receive, max_bytes, max_frags, self)

    @property
    def lands_in(self) -> contract.RxBinding | None:
        """None: a NIC chooses the pages that payload lands in."""
        return None

    def recv_placed(self, place: contract.Place, at: int, max_bytes: int, *, all: bool = False) -> int:
        self._check_open()
        raise LocalProtocolError("a NIC chooses the pages that payload lands in", hint="go on with recv_frags()")

    def recv_into(self, target: bytearray | memoryview) -> int:
        self._check_open()
        window = memoryview(target).cast("B")
        if not len(window):
            raise ValueError("recv_into needs room for at least one byte")
        return self._receive(self._inbound.receive_ordinary, window)

    def discard(self, max_bytes: int) -> int:
        self._check_open()
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        return self._receive(self._inbound.discard, max_bytes)

    def _receive(self, attempt: Callable[[int, *Arguments], Result], *arguments: *Arguments) -> Result:
        """Make an attempt, which waits in the kernel, and again until it succeeds, within the time limit."""
        limit = self._timeout_s
        if limit != 0:
            self._limits.set(calls.SO_RCVTIMEO, REPORT_AFTER_S if limit is None else min(limit, REPORT_AFTER_S))
        started = time.monotonic()
        reported = False
        while True:
            try:
                done = attempt(calls.MSG_DONTWAIT if limit == 0 else 0, *arguments)
                break
            except (BlockingIOError, InterruptedError):  # nothing came, or a signal, whose handler has run
                if limit == 0:
                    raise
            self._check_open()
            waited = time.monotonic() - started
            if not reported and waited >= REPORT_AFTER_S and (text := self._starvation(waited)):
                reported = True
                warnings.warn(text, StarvationWarning, stacklevel=3)
            if limit is not None:
                if waited >= limit:
                    raise self._nothing_came(limit)
                self._limits.set(calls.SO_RCVTIMEO, min(limit - waited, REPORT_AFTER_S))
        self._registry.look_for_drained()
        return done

    def _nothing_came(self, limit: float) -> Timeout:
        if text := self._starvation(limit):
            return Timeout(text, hint="release() batches sooner, or bind a larger buffer")
        return Timeout(f"nothing arrived from {show(self._remote)} in {limit} s")

    def _starvation(self, waited_s: float) -> str:
        """Say who holds the pages of this flow's queue, if that is why nothing comes."""
        return starvation(self._registry, self.rx_queue, waited_s) if self._registry.rx else ""

    # --- tokens ---

    def dontneed(self, tokens: TokenRangeArray | bytes) -> int:
        self._check_open()
        freed = self._inbound.dontneed(tokens)
        self._registry.look_for_drained()
        return freed

    def release(self, batch: FragBatch) -> None:
        if self._closed:
            return
        asked, freed = self._inbound.release(batch.frags)
        self._registry.look_for_drained()
        if freed != asked:
            raise TokenError(
                f"{asked} tokens of a batch were returned and {freed} of them were out",
                asked=asked,
                freed=freed,
                hint="return tokens either by dontneed() or by release(), not both",
            )

    # --- sending ---

    def set_zerocopy(self) -> None:
        self._check_open()
        self._outbound.allow_zerocopy()

    def send_frags(self, tx: contract.TxBinding | int, offsets: Sequence[int], sizes: Sequence[int]) -> int:
        self._check_open()
        pieces = self._outbound.pieces(tx, offsets, sizes)
        with self._outbound.one_call():
            if self._timeout_s == 0:
                return self._send_now(pieces)
            return self._send_all(pieces)

    def _send_now(self, pieces: Pieces) -> int:
        """Send what fits; a failure after a part shows at the next call."""
        wanted, taken = pieces.nbytes, 0
        while taken < wanted:
            part, flags = self._outbound.next_part(pieces)
            try:
                sent = self._outbound.send(part, flags | calls.MSG_DONTWAIT)
            except OSError as error:
                if taken:
                    break
                if error.errno == errno.ENOBUFS and self._outbound.under_way:
                    text = "too many sends are incomplete: read_completions(), then send again"
                    raise BlockingIOError(errno.EAGAIN, text) from None
                raise
            taken += sent
            if sent < part.nbytes:
                break
            pieces = pieces.after(sent)
        return taken

    def _send_all(self, pieces: Pieces) -> int:
        """Send everything, or what was taken when the time was over; a failure after a part shows at the next call."""
        wanted, taken = pieces.nbytes, 0
        left = self._timeout_s
        deadline = None if left is None else time.monotonic() + left
        while taken < wanted and (left is None or left > 0):
            self._limits.set(calls.SO_SNDTIMEO, left)
            try:
                sent = self._outbound.send(*self._outbound.next_part(pieces))
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                if error.errno == errno.ENOBUFS and self._outbound.under_way:
                    self._wait_reports(deadline)
                    sent = 0
                elif taken:
                    break
                else:
                    raise
            taken += sent
            pieces = pieces.after(sent)
            left = self._left(deadline)
        if not taken:
            raise self._nothing_taken()
        return taken

    def send(self, data: bytes | bytearray | memoryview) -> int:
        self._check_open()
        if self._timeout_s == 0:
            return self._outbound.send_ordinary(data, calls.MSG_DONTWAIT)
        self._limits.set(calls.SO_SNDTIMEO, self._timeout_s)
        try:
            return self._outbound.send_ordinary(data, 0)
        except BlockingIOError:
            raise self._nothing_taken() from None

    def _nothing_taken(self) -> Timeout:
        return Timeout(f"{show(self._remote)} took nothing in {self._timeout_s} s: it does not read")

    # --- completions ---

    def read_completions(self) -> list[CompletionRange]:
        self._check_open()
        self._outbound.collect()
        return self._outbound.take()

    def wait_completions(self, timeout_s: float | None = None) -> list[CompletionRange]:
        self._check_open()
        if not self._outbound.incomplete:
            raise LocalProtocolError("every send is complete already", hint="count sends, and wait for those alone")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not (ranges := self.read_completions()):
            if not self._wait_reports(deadline):
                raise Timeout(f"none of {self._outbound.incomplete} sends completed in {timeout_s} s")
        return ranges

    def _wait_reports(self, deadline: float | None) -> bool:
        """Wait until there is something on the error queue, and collect it; False if the time ran out before."""
        poller = calls.poller(self._sock.fileno(), 0)  # POLLERR comes unasked
        while not self._outbound.collect():
            left = self._left(deadline)
            if (left is not None and left <= 0) or not calls.wait(poller, left):
                return False
            if self._outbound.collect():
                return True
            calls.pause(_PAUSE_S)  # the connection is over, which poll tells at once, for ever; completions still come
        return True

    def shutdown_send(self) -> None:
        self._check_open()
        calls.shutdown(self._sock, calls.SHUT_WR)

    # --- time ---

    @staticmethod
    def _left(deadline: float | None) -> float | None:
        return None if deadline is None else deadline - time.monotonic()

    def settimeout(self, timeout_s: float | None) -> None:
        if timeout_s is not None and timeout_s < 0:
            raise ValueError(f"a time limit cannot be negative: {timeout_s} s")
        self._timeout_s = timeout_s

    def gettimeout(self) -> float | None:
        return self._timeout_s

    # --- the rest ---

    def fileno(self) -> int:
        self._check_open()
        return self._sock.fileno()

    def send_fileno(self) -> int:
        self._check_open()
        return self._sock.fileno()

    def set_low_water(self, size_bytes: int) -> None:
        self._check_open()
        self._limits.set_low_water(size_bytes)

    @property
    def local_address(self) -> Address:
        return self._local

    @property
    def remote_address(self) -> Address:
        return self._remote

    @property
    def rx_queue(self) -> int:
        """The RX queue that the last packet came over, -1 if it is unknown. Kernel: SO_INCOMING_NAPI_ID."""
        napi_id = self._option(SO_INCOMING_NAPI_ID, 4)
        if napi_id:
            self._queue = self._registry.queue_of_napi(int.from_bytes(napi_id, "little"))
        return self._queue

    @property
    def stats(self) -> SocketStats:
        inbound, outbound = self._inbound, self._outbound
        return SocketStats(
            backend=BACKEND,
            dmabuf_bytes=inbound.dmabuf_bytes,
            linear_bytes=inbound.linear_bytes,
            host_bytes=inbound.host_bytes,
            frags=inbound.frags,
            recv_calls=self._recv_calls,
            dontneed_calls=inbound.dontneed_calls,
            tokens_out=inbound.tokens.outstanding,
            sent_dmabuf_bytes=outbound.dmabuf_bytes,
            sent_host_bytes=outbound.host_bytes,
            send_calls=outbound.send_calls,
            sends_incomplete=outbound.incomplete,
            congestion_control=self._congestion_control,
        )

    def holds(self, dmabuf_id: int) -> bool:
        """Whether a token of a binding is out."""
        return self._inbound.tokens.outstanding > 0 and self._inbound.tokens.held(dmabuf_id)[0] > 0

    def holder(self, dmabuf_id: int) -> TokenHolder | None:
        """Return what this socket holds of a binding, or None."""
        tokens, size, since = self._inbound.tokens.held(dmabuf_id)
        if not tokens:
            return None
        return TokenHolder(self.rx_queue, self._local, self._remote, tokens, size, time.monotonic() - since)

    @property
    def has_unread(self) -> bool:
        """Whether data is queued that was not received, in order or not; also if the kernel does not tell.

        Kernel: SO_MEMINFO.
        """
        try:
            memory = self._option(calls.SO_MEMINFO, _MEMINFO.size)
        except OSError:
            return True
        return bool(memory) and any(_MEMINFO.unpack(memory)[index] for index in _MEMINFO_RECEIVED)

    def _option(self, option: int, size: int) -> bytes:
        """Ask for a socket option; nothing if the socket is closed, be it by another thread meanwhile."""
        try:
            return b"" if self._closed else calls.getsockopt_bytes(self._sock, calls.SOL_SOCKET, option, size)
        except OSError:
            if not self._closed:
                raise
            return b""

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._inbound.return_all()
            calls.close_socket(self._sock)
            self._registry.forget(self._key)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this socket is closed")

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"{self!r} was dropped without close()", LeakWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected"
        return f"<DevmemSocket kernel {state} {show(self._local)} from {show(self._remote)}>"
