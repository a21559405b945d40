"""A connected socket of a software NIC: Inbound and Outbound, and all the waiting.

The TCP socket itself is always in blocking mode; time limits are kept here, by poll, so that no page is held while
nothing arrives. Receiving into a place, whose pages are held anyway, may wait in recv(2) itself.
"""

from __future__ import annotations

import errno
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Final, TypeVar, TypeVarTuple

from devmem_tcp import contract
from devmem_tcp.contract import DEFAULT_MAX_BYTES, DEFAULT_MAX_FRAGS
from devmem_tcp.endpoints import WaitLimits, show
from devmem_tcp.errors import (
    ClosedError,
    ControlTruncated,
    LeakWarning,
    LocalProtocolError,
    Timeout,
    TokenError,
)
from devmem_tcp.sansio.tokens import dontneed_calls, token_array
from devmem_tcp.software.flow import SteeredFlow
from devmem_tcp.software.inbound import Inbound, Starved
from devmem_tcp.software.outbound import Outbound
from devmem_tcp.software.place import SoftwarePlace
from devmem_tcp.software.readiness import Readiness, Starvation
from devmem_tcp.sys import calls
from devmem_tcp.types import Address, CompletionRange, FragBatch, SocketStats, TokenHolder, TokenRangeArray
from devmem_tcp.uapi.socket import CONTROL_SPACE_PER_FRAG

BACKEND: Final = "software"

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")
Sendable = TypeVar("Sendable")


class SoftwareSocket(contract.DevmemSocket):
    """See ``contract.DevmemSocket``."""

    def __init__(
        self,
        sock: calls.Socket,
        flow: SteeredFlow,
        inbound: Inbound,
        outbound: Outbound,
        congestion_control: str,
        on_close: Callable[[SoftwareSocket], None],
    ) -> None:
        self._sock = sock
        self._flow = flow
        self._inbound = inbound
        self._outbound = outbound
        self._congestion_control = congestion_control
        self._on_close = on_close
        self._timeout_s: float | None = None
        self._closed = False
        self._limits = WaitLimits(sock)
        self._readable = calls.poller(sock.fileno(), calls.POLLIN)
        self._readiness = Readiness(sock)
        self._recv_calls = 0
        self._dontneed_calls = 0

    # --- receiving ---

    def recv_frags(self, max_bytes: int = DEFAULT_MAX_BYTES, *, max_frags: int = DEFAULT_MAX_FRAGS) -> FragBatch:
        if self._closed or max_bytes <= 0:
            self._check_open()
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        if max_frags <= 0:
            raise ControlTruncated(needed=CONTROL_SPACE_PER_FRAG)
        self._recv_calls += 1
        return self._wait_readable(self._inbound.receive, max_bytes, max_frags, self)

    @property
    def lands_in(self) -> contract.RxBinding | None:
        return self._inbound.lands_in(self._flow.queue)

    def recv_placed(self, place: contract.Place, at: int, max_bytes: int, *, all: bool = False) -> int:
        if self._closed:
            self._check_open()
        queue = self._flow.queue
        if not isinstance(place, SoftwarePlace) or self._inbound.lands_in(queue) is not place.binding:
            raise LocalProtocolError(
                f"the next payload, over RX queue {queue}, cannot land in {place!r}", hint="go on with recv_frags()"
            )
        window = place.start(at, max_bytes)
        try:
            self._recv_calls += 1
            if self._timeout_s == 0:
                self._readiness.wants_data()
                taken = calls.recv_into(self._sock, window, calls.MSG_DONTWAIT)
            elif all:  # no page could be held in vain: it may wait in the system itself
                taken = self._recv_all(window)
            elif self._timeout_s is None and self._limits.low_water == 1:
                self._limits.set(calls.SO_RCVTIMEO, None)
                taken = calls.recv_into(self._sock, window)
            else:
                self._readiness.wants_data()
                taken = self._wait_readable(self._inbound.receive_placed, window)
        finally:
            place.end()
        self._inbound.placed(queue, taken)
        return taken

    def _recv_all(self, window: memoryview) -> int:
        self._limits.set_low_water(1)  # MSG_WAITALL would not be woken for a rest below the mark
        self._limits.set(calls.SO_RCVTIMEO, self._timeout_s)
        self._readiness.wants_data()
        try:
            return calls.recv_into(self._sock, window, calls.MSG_WAITALL)
        except BlockingIOError:
            raise self._nothing_came() from None

    def recv_into(self, target: bytearray | memoryview) -> int:
        self._check_open()
        window = memoryview(target).cast("B")
        if not len(window):
            raise ValueError("recv_into needs room for at least one byte")
        return self._wait_readable(self._inbound.receive_ordinary, window)

    def discard(self, max_bytes: int) -> int:
        self._check_open()
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        return self._wait_readable(self._inbound.discard, max_bytes)

    def _wait_readable(self, attempt: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Make an attempt, and again whenever there may be more to get, within the time limit."""
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        starvation: Starvation | None = None
        if self._inbound.drained_tcp and self._timeout_s is None and self._inbound.rest is None:
            calls.wait(self._readable, None)
        try:
            while True:
                try:
                    return attempt(*arguments)
                except BlockingIOError:
                    if self._timeout_s == 0:
                        raise
                    self._wait_for_data(deadline)
                except Starved as shortage:
                    starvation = starvation or Starvation(self._readiness, shortage)
                    if self._timeout_s == 0:
                        starvation.mute()
                        raise BlockingIOError(errno.EAGAIN, starvation.report()) from None
                    starvation.wait(deadline)
        finally:
            self._update_readiness()

    def _wait_for_data(self, deadline: float | None) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        if (left is not None and left <= 0) or not calls.wait(self._readable, left):
            raise self._nothing_came()

    def _nothing_came(self) -> Timeout:
        return Timeout(f"nothing arrived from {show(self.remote_address)} in {self._timeout_s} s")

    # --- tokens ---

    def dontneed(self, tokens: TokenRangeArray | bytes) -> int:
        self._check_open()
        returned = self._inbound.ledger.dontneed(token_array(tokens))
        self._dontneed_calls += 1
        return self._inbound.give_back_pages(returned)

    def release(self, batch: FragBatch) -> None:
        if self._closed:
            return
        tokens = batch.tokens
        if len(tokens) == 1 and (token := tokens.item()):
            asked, freed = 1, self._inbound.give_back_one(token)
            self._dontneed_calls += 1
        else:
            asked = freed = 0
            for ranges in dontneed_calls(tokens):
                asked += int(ranges["count"].sum())
                freed += self.dontneed(ranges)
        if len(batch.inline):
            self._inbound.recycle(batch)
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
        self._outbound.zerocopy = True

    def send_frags(self, tx: contract.TxBinding | int, offsets: Sequence[int], sizes: Sequence[int]) -> int:
        self._check_open()
        windows = self._outbound.windows(tx, offsets, sizes)
        try:
            return self._wait_writable(self._outbound.send_windows, windows)
        finally:
            if self._readiness.watched:
                self._update_readiness()

    def send(self, data: bytes | bytearray | memoryview) -> int:
        self._check_open()
        return self._wait_writable(self._outbound.send_ordinary, data)

    def _wait_writable(self, attempt: Callable[[Sendable, int], int], data: Sendable) -> int:
        if self._timeout_s == 0:
            return attempt(data, calls.MSG_DONTWAIT)
        self._limits.set(calls.SO_SNDTIMEO, self._timeout_s)
        try:
            return attempt(data, 0)
        except BlockingIOError:
            raise Timeout(f"{show(self.remote_address)} took nothing in {self._timeout_s} s") from None

    def read_completions(self) -> list[CompletionRange]:
        self._check_open()
        ranges = self._outbound.read_completions()
        self._update_readiness()
        return ranges

    def wait_completions(self, timeout_s: float | None = None) -> list[CompletionRange]:
        self._check_open()
        if not self._outbound.incomplete:
            raise LocalProtocolError("every send is complete already", hint="count sends, and wait for those alone")
        self._outbound.report_all()
        return self.read_completions()

    def shutdown_send(self) -> None:
        self._check_open()
        calls.shutdown(self._sock, calls.SHUT_WR)

    # --- the rest ---

    def _update_readiness(self) -> None:
        if self._readiness.watched:
            self._readiness.update(pending=self._pending)

    @property
    def _pending(self) -> bool:
        return self._inbound.rest is not None or self._outbound.has_completions

    def settimeout(self, timeout_s: float | None) -> None:
        if timeout_s is not None and timeout_s < 0:
            raise ValueError(f"a time limit cannot be negative: {timeout_s} s")
        self._timeout_s = timeout_s

    def gettimeout(self) -> float | None:
        return self._timeout_s

    def fileno(self) -> int:
        self._check_open()
        return self._readiness.fileno(pending=self._pending)

    def send_fileno(self) -> int:
        self._check_open()
        return self._sock.fileno()

    def set_low_water(self, size_bytes: int) -> None:
        self._check_open()
        self._limits.set_low_water(size_bytes)

    @property
    def local_address(self) -> Address:
        return self._flow.local

    @property
    def remote_address(self) -> Address:
        return self._flow.remote

    @property
    def rx_queue(self) -> int:
        return self._flow.queue

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
            dontneed_calls=self._dontneed_calls,
            tokens_out=inbound.ledger.outstanding,
            sent_dmabuf_bytes=outbound.dmabuf_bytes,
            sent_host_bytes=outbound.host_bytes,
            send_calls=outbound.send_calls,
            sends_incomplete=outbound.incomplete,
            congestion_control=self._congestion_control,
        )

    @property
    def bytes_by_queue(self) -> dict[int, int]:
        """Bytes received, by the RX queue they came over."""
        return self._inbound.bytes_by_queue

    def holder(self, dmabuf_id: int) -> TokenHolder | None:
        """Return what this socket holds of a binding, or None."""
        tokens, size, since = self._inbound.ledger.held(dmabuf_id)
        if not tokens:
            return None
        age_s = time.monotonic() - since
        return TokenHolder(self._flow.queue, self._flow.local, self._flow.remote, tokens, size, age_s)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._readiness.close()
            calls.close_socket(self._sock)
            self._inbound.close()
            self._on_close(self)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this socket is closed")

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was dropped without close()", LeakWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected"
        return f"<DevmemSocket software {state} {show(self.local_address)} from {show(self.remote_address)}>"
