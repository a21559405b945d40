"""THE CONTRACT: what a Nic, a binding, a socket, a Buffer and an Allocator must do, on every backend.

``Kernel:`` names the exact operation; where the software backend differs on purpose, ``docs/kernel-contract.md`` says
so and why. Everything that is acquired here is a context manager with an idempotent ``close()``.

Threads: a Nic and its bindings may be used from several threads; one socket by one receiving and one sending thread.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import Enum, IntFlag
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from devmem_tcp import refusals
from devmem_tcp.errors import BindError, BusyError, ClosedError
from devmem_tcp.types import (
    PAGE_SIZE,
    Address,
    Capabilities,
    CompletionRange,
    Family,
    FlowRule,
    FragBatch,
    HeaderSplitMode,
    NicStats,
    QueueStats,
    SocketStats,
    TokenHolder,
    TokenRangeArray,
)
from devmem_tcp.uapi.socket import CONTROL_SPACE_PER_FRAG

DEFAULT_MAX_FRAGS: Final = 65536 // CONTROL_SPACE_PER_FRAG  # 64 KiB of control space: enough for 1 MiB of 4 KiB pages
DEFAULT_MAX_BYTES: Final = 1 << 20


class Closing(ABC):
    """``with`` releases; ``close()`` may be called any number of times."""

    @abstractmethod
    def close(self) -> None:
        """Release everything held. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class CpuAccess(IntFlag):
    """DMA_BUF_IOCTL_SYNC directions."""

    READ = 1
    WRITE = 2
    READ_WRITE = 3


class BufferUse(Enum):
    """What a binding does with a Buffer. At most one binding receives into a Buffer; any number send from it."""

    RX = "rx"
    TX = "tx"


class Buffer(Closing):
    """Device memory: ``size_bytes`` that a NIC can fill and send from. Made by an Allocator.

    Lifetime: bindings hold it, and so do the frags of an RX binding until their tokens are back. ``close()`` before
    that raises BusyError and changes nothing: two flows would be handed the same pages (kernel: rebinding a dma-buf
    whose old frags are out corrupts silently).
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes: Final = size_bytes
        self._pins: dict[int, tuple[str, BufferUse]] = {}
        self._next_pin = 1

    @property
    @abstractmethod
    def kind(self) -> str:
        """What memory this is, for people: ``host memfd``, ``udmabuf``, ``dma-heap system`` …"""

    @property
    @abstractmethod
    def closed(self) -> bool: ...

    @property
    @abstractmethod
    def dmabuf_fd(self) -> int | None:
        """The dma-buf's fd, for bind-rx and bind-tx; None for memory that is not a dma-buf (software backend only)."""

    @abstractmethod
    def view(self) -> memoryview:
        """Return all bytes as a writable memoryview of format B, shape (size_bytes,).

        Raises:
            ClosedError: the buffer is closed.
            KernelError: the memory cannot be mapped for the CPU.
        """

    @abstractmethod
    def cpu_access(self, mode: CpuAccess = CpuAccess.READ_WRITE) -> AbstractContextManager[memoryview]:
        """Bracket CPU access, so that CPU and device see each other's writes; yields ``view()``.

        Kernel: ioctl DMA_BUF_IOCTL_SYNC START and END on the dma-buf; nothing for plain host memory.
        """

    @abstractmethod
    def array(self, dtype: npt.DTypeLike = np.uint8, *, offset: int = 0, count: int = -1) -> npt.NDArray[Any]:
        """Return a writable NumPy view, shape (count,), of ``dtype`` from byte ``offset`` on; -1: to the end.

        Raises:
            ValueError: the range does not fit the buffer or ``dtype``.
        """

    @abstractmethod
    def __dlpack__(self, **options: Any) -> Any: ...

    @abstractmethod
    def __dlpack_device__(self) -> tuple[int, int]: ...

    def pin(self, holder: str, use: BufferUse) -> int:
        """Note a holder (for bindings) and return its pin, to give to ``unpin``.

        Raises:
            ClosedError: the buffer is closed.
            BusyError: ``use`` is RX, and another binding receives into this buffer or has frags out.
        """
        if self.closed:
            raise ClosedError(f"{self.kind} buffer is closed", hint="allocate() a new one")
        if use is BufferUse.RX:
            for other, their_use in self._pins.values():
                if their_use is BufferUse.RX:
                    raise BusyError(
                        f"buffer is still received into by {other}: bound again, its pages would be handed out twice",
                        hint="return that binding's tokens (or close its sockets) first, or allocate() another buffer",
                    )
        number = self._next_pin
        self._next_pin += 1
        self._pins[number] = (holder, use)
        return number

    def unpin(self, number: int) -> None:
        """Forget a holder. Unknown pins are ignored."""
        self._pins.pop(number, None)

    @property
    def holders(self) -> tuple[str, ...]:
        """Who holds this buffer now, for people."""
        return tuple(holder for holder, _ in self._pins.values())

    def check_unused(self) -> None:
        """Raise BusyError if anybody holds this buffer: the first line of every ``close()``."""
        if self._pins:
            raise BusyError(
                f"buffer is in use by {', '.join(self.holders)}",
                hint="first close the binding and release its batches (or close its sockets); `with` does it in order",
            )


class Allocator(ABC):
    """Makes Buffers of one kind of device memory."""

    @abstractmethod
    def allocate(self, size_bytes: int) -> Buffer:
        """Allocate ``size_bytes``, a positive multiple of 4096.

        Raises:
            ValueError: size is zero, negative or not page-aligned.
            OutOfDeviceMemory: more than there is, or than the exporter's limit.
            KernelError: a device node is missing or not permitted; the hint says which.
        """


def check_buffer_size(size_bytes: int) -> None:
    """Raise ValueError unless ``size_bytes`` is a positive multiple of the page size; names the next good size."""
    if size_bytes <= 0:
        raise ValueError(f"buffer size must be positive, got {size_bytes} bytes; the smallest is {PAGE_SIZE}")
    if size_bytes % PAGE_SIZE:
        good = -(-size_bytes // PAGE_SIZE) * PAGE_SIZE
        raise ValueError(f"buffer size {size_bytes} is not a multiple of {PAGE_SIZE} bytes; use {good}")


def check_rx_page_size(rx_page_size: int) -> None:
    """Refuse page sizes that bind-rx refuses. Kernel: net/core/netdev-genl.c, netdev_nl_bind_rx_doit."""
    if rx_page_size < PAGE_SIZE:
        hint = f"at least {PAGE_SIZE}, not {rx_page_size}"
        raise BindError(errno.ERANGE, "bind-rx", attr="rx-page-size", hint=hint)
    if rx_page_size & (rx_page_size - 1):
        hint = f"{PAGE_SIZE}, {2 * PAGE_SIZE}, …, not {rx_page_size}"
        raise refusals.PAGE_SIZE_NO_POWER.error(BindError, hint=hint)


class Setting(Closing):
    """A NIC setting changed by this program. ``close()`` puts the old value back, if nobody else changed it since."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The change in ethtool's words, for instance ``ethtool -G eth1 tcp-data-split on``."""


class NtupleRule(Setting):
    """One ntuple rule in the NIC. ``close()`` deletes it."""

    @property
    @abstractmethod
    def rule(self) -> FlowRule:
        """The rule as the NIC holds it: ``location`` and ``family`` filled in."""


class RxBinding(Closing):
    """A Buffer attached to RX queues. ``close()`` unbinds.

    Kernel: lives as long as the netlink socket that sent bind-rx. Closing it with tokens out leaves the sockets alone:
    queued frags stay readable, later data arrives as HOST frags of the same stream, tokens can still be returned, and
    the Buffer is free once the last one is.
    """

    @property
    @abstractmethod
    def dmabuf_id(self) -> int:
        """The id the kernel answered: global over RX and TX, from 1, never 0; failed binds burn ids too."""

    @property
    @abstractmethod
    def queues(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def buffer(self) -> Buffer: ...

    @property
    @abstractmethod
    def closed(self) -> bool: ...

    @property
    @abstractmethod
    def drained(self) -> bool:
        """Whether no page of it is in use, by a token or by bytes not read: with ``closed``, the Buffer is free."""

    @abstractmethod
    def holders(self) -> tuple[TokenHolder, ...]:
        """Return who holds tokens of this binding, the oldest first."""


class TxBinding(Closing):
    """A Buffer that sockets may send from. ``close()`` unbinds; sends that are not complete keep their bytes."""

    @property
    @abstractmethod
    def dmabuf_id(self) -> int: ...

    @property
    @abstractmethod
    def buffer(self) -> Buffer: ...

    @property
    @abstractmethod
    def closed(self) -> bool: ...


class DevmemSocket(Closing):
    """A connected TCP socket that receives into and sends from device memory.

    Time limits are those of ``socket``: ``settimeout(None)`` blocks, ``0`` raises BlockingIOError at once, a positive
    number of seconds raises Timeout. After any of them nothing is lost and the call may be made again.

    Lifetime: holds its binding's Buffer through the tokens it holds. ``close()`` returns every token.
    """

    @abstractmethod
    def recv_frags(self, max_bytes: int = DEFAULT_MAX_BYTES, *, max_frags: int = DEFAULT_MAX_FRAGS) -> FragBatch:
        """Receive up to ``max_bytes`` and say where each piece landed; an empty (falsy) batch is the end of stream.

        Kernel: one recvmsg(MSG_SOCK_DEVMEM) with control space for ``max_frags`` frags. Returns short where ordinary
        and devmem data meet, and when control space is used up (msg_flags 0, no MSG_CTRUNC).

        Limits: with no free page on the queue it waits (the NIC drops, the peer retransmits) until tokens come back;
        after a second of that a StarvationWarning says who holds how many tokens and for how long.

        Raises:
            ValueError: ``max_bytes`` is not positive (the kernel would hand out tokens for nothing).
            ControlTruncated: ``max_frags`` is 0; nothing was consumed.
            NotZeroCopy: the socket is ``strict`` and ordinary data arrived.
            Timeout, BlockingIOError, ConnectionError, ClosedError.
        """

    @abstractmethod
    def recv_into(self, target: bytearray | memoryview) -> int:
        """Receive ordinary data without the devmem flag; 0 is the end of stream.

        Kernel: recvmsg without MSG_SOCK_DEVMEM.

        Raises:
            KernelError: EFAULT: the next data is in device memory. Nothing was consumed; ``recv_frags`` gets it.
        """

    @abstractmethod
    def discard(self, max_bytes: int) -> int:
        """Drop up to ``max_bytes`` of received data, wherever it landed; hands out no token. Returns bytes dropped.

        Kernel: recvmsg(MSG_SOCK_DEVMEM | MSG_TRUNC).
        """

    @abstractmethod
    def dontneed(self, tokens: TokenRangeArray | bytes) -> int:
        """Return tokens; answers how many were freed.

        Args:
            tokens: shape (n,) of dtype ``uapi.socket.TOKEN_DTYPE`` (start, count), or its raw bytes.

        Kernel: setsockopt(SOL_SOCKET, SO_DEVMEM_DONTNEED), one call. Limits: 128 ranges; of more than 1024 tokens only
        the first 1024 are looked at, unknown ones included. Unknown, foreign and already returned tokens count 0.

        Raises:
            KernelError: EINVAL: no range, more than 128 ranges, or a length that is not a multiple of 8; nothing freed.
        """

    @abstractmethod
    def release(self, batch: FragBatch) -> None:
        """Return all tokens of one of this socket's batches, in as few DONTNEED calls as the limits allow.

        Raises:
            TokenError: fewer were freed than the batch holds: some were returned by ``dontneed`` before.
        """

    @abstractmethod
    def set_zerocopy(self) -> None:
        """Allow ``send_frags`` on this socket. Kernel: setsockopt(SO_ZEROCOPY, 1)."""

    @abstractmethod
    def send_frags(self, tx: TxBinding | int, offsets: Sequence[int], sizes: Sequence[int]) -> int:
        """Send bytes of a bound Buffer; answers how many were taken (all of them, on a blocking socket).

        The bytes may not change until a completion covers this call: the n-th successful call on the socket has the
        number n - 1.

        Args:
            tx: the TxBinding, or its id.
            offsets, sizes: of each piece, in bytes, in sending order.

        Kernel: sendmsg(MSG_ZEROCOPY) with one SCM_DEVMEM_DMABUF (u32 id), iov_base = offset.

        Raises:
            KernelError: EINVAL: no ``set_zerocopy()``, unknown or closed binding, an RX binding's id, nothing to send;
                EFAULT: id 0, an offset at or past the end, a range that crosses it; EMSGSIZE: over 1024 pieces;
                ENODEV: not connected. Nothing was sent, and no number is used.
        """

    @abstractmethod
    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send ordinary bytes; answers how many were taken. Mixes with ``send_frags`` on one stream, uses no number."""

    @abstractmethod
    def read_completions(self) -> list[CompletionRange]:
        """Collect what has completed since the last call, as coalesced ranges in order; empty if nothing. Never waits.

        Kernel: recvmsg(MSG_ERRQUEUE) until EAGAIN; sock_extended_err with ee_origin SO_EE_ORIGIN_ZEROCOPY.
        """

    @abstractmethod
    def wait_completions(self, timeout_s: float | None = None) -> list[CompletionRange]:
        """Wait until something completes and collect it. Kernel: poll for POLLERR, then ``read_completions``.

        Raises:
            Timeout: nothing completed in ``timeout_s`` seconds.
            LocalProtocolError: every send has been completed already: the wait would never end.
        """

    @abstractmethod
    def shutdown_send(self) -> None:
        """End the outgoing stream (shutdown SHUT_WR); the peer reads an end of stream, receiving goes on."""

    @abstractmethod
    def settimeout(self, timeout_s: float | None) -> None: ...

    @abstractmethod
    def gettimeout(self) -> float | None: ...

    @abstractmethod
    def fileno(self) -> int:
        """An fd for poll, select and asyncio alone: ready when ``recv_frags`` or ``read_completions`` gets something.

        Not ready while the queue is out of pages, as on Linux, where the data is dropped by the NIC.
        """

    @property
    @abstractmethod
    def local_address(self) -> Address: ...

    @property
    @abstractmethod
    def remote_address(self) -> Address: ...

    @property
    @abstractmethod
    def rx_queue(self) -> int:
        """The RX queue this flow is steered to now. Kernel: SO_INCOMING_NAPI_ID against queue-get."""

    @property
    @abstractmethod
    def stats(self) -> SocketStats:
        """The proof of path."""

    @property
    @abstractmethod
    def closed(self) -> bool: ...


class Listener(Closing):
    """A listening TCP socket of a Nic. ``close()`` leaves accepted sockets alone."""

    @property
    @abstractmethod
    def address(self) -> Address: ...

    @abstractmethod
    def accept(self) -> DevmemSocket:
        """Wait for a connection, and see where the NIC steers it.

        If the Nic has RX bindings and the flow goes to none of their queues, a SteeringWarning says why and what to do.

        Kernel: accept4, then SO_INCOMING_NAPI_ID against the queues' NAPI ids.

        Raises:
            NotZeroCopy: the same on a ``strict`` listener; the connection is closed.
            Timeout, BlockingIOError, ClosedError.
        """

    @abstractmethod
    def settimeout(self, timeout_s: float | None) -> None: ...

    @abstractmethod
    def fileno(self) -> int: ...


class Nic(Closing):
    """One network interface: its settings, bindings and sockets. Made by ``open_nic``.

    Lifetime: knows its sockets but does not keep them: one that is dropped without ``close()`` warns and closes.
    ``close()`` closes its sockets, listeners and bindings, then puts back every setting in reverse order.
    """

    @property
    @abstractmethod
    def name(self) -> str: ...

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"NIC {self.name} is closed")

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @property
    @abstractmethod
    def header_split(self) -> HeaderSplitMode: ...

    @abstractmethod
    def set_header_split(self, mode: HeaderSplitMode | str) -> Setting:
        """Turn header split on or off. Kernel: ETHTOOL_MSG_RINGS_SET, TCP_DATA_SPLIT (ethtool -G NIC tcp-data-split).

        Raises:
            NicSettingError: EINVAL: off or unknown while a queue is bound.
        """

    @abstractmethod
    def set_hds_thresh(self, size_bytes: int) -> Setting:
        """Split only packets larger than ``size_bytes``; devmem needs 0. Kernel: RINGS_SET, HDS_THRESH.

        Raises:
            NicSettingError: EINVAL: above 0 while a queue is bound, or over the device's limit.
            ValueError: negative.
        """

    @abstractmethod
    def set_rss(
        self, *, equal: int | None = None, weights: Sequence[int] | None = None, table: Sequence[int] | None = None
    ) -> Setting:
        """Spread unsteered flows over queues: exactly one of the three. Kernel: ethtool -X NIC equal/weight/table.

        Args:
            equal: over queues 0 to equal - 1, evenly.
            weights: queue i gets a share of weights[i].
            table: the indirection table itself, its length dividing or equal to ``capabilities.rss_table_size``.
        """

    @property
    @abstractmethod
    def rss_table(self) -> tuple[int, ...]:
        """The RSS indirection table: a queue for each hash bucket."""

    def add_ntuple(
        self,
        rule: FlowRule | None = None,
        *,
        queue: int | None = None,
        src_ip: str | None = None,
        dst_ip: str | None = None,
        src_port: int | None = None,
        dst_port: int | None = None,
        family: Family | str | None = None,
        location: int | None = None,
    ) -> NtupleRule:
        """Steer matching TCP flows to a queue: a FlowRule, or its fields. Kernel: ETHTOOL_SRXCLSRLINS (ethtool -N).

        Without a family or an address it is two rules, one for each IP version, at two locations.

        Raises:
            ValueError: no queue, nothing to match on, a malformed address, a location for two rules.
            NicSettingError: EINVAL: no such queue; ENOSPC: table full.
        """
        self._check_open()
        fields = (queue, src_ip, dst_ip, src_port, dst_port, family, location)
        if rule is not None:
            if any(field is not None for field in fields):
                raise ValueError("give add_ntuple a FlowRule or its fields, not both")
            return self.insert_rule(rule)
        if queue is None:
            raise ValueError("an ntuple rule needs queue=, where matching flows go")
        chosen = Family(family) if family else None
        return self.insert_rule(FlowRule(queue, chosen, src_ip, dst_ip, src_port, dst_port, location=location))

    @abstractmethod
    def insert_rule(self, rule: FlowRule) -> NtupleRule:
        """Do what ``add_ntuple`` says of a FlowRule."""

    @property
    @abstractmethod
    def ntuple_rules(self) -> tuple[FlowRule, ...]:
        """The rules in order of location, which is their priority."""

    @abstractmethod
    def bind_rx(self, buffer: Buffer, queues: Sequence[int], *, rx_page_size: int = PAGE_SIZE) -> RxBinding:
        """Attach a Buffer to RX queues: payload of flows steered there lands in it. All queues, or none.

        A queue named twice counts once.

        Kernel: netdev bind-rx; needs CAP_NET_ADMIN.

        Raises:
            BindError: EINVAL ``tcp-data-split is disabled`` or ``hds-thresh is not zero``; EINVAL queue out of range or
                no queue; EEXIST queue already bound; ERANGE, EINVAL for ``rx_page_size``.
            BusyError: another binding still receives into this Buffer, or its frags are out.
        """

    @abstractmethod
    def bind_tx(self, buffer: Buffer) -> TxBinding:
        """Let sockets send from a Buffer. Kernel: netdev bind-tx; unprivileged."""

    @abstractmethod
    def listen(self, address: Address, *, backlog: int = 128, strict: bool = False) -> Listener:
        """Listen on (host, port); host ``::`` takes IPv4 and IPv6, port 0 any free one.

        Args:
            strict: ordinary data on an accepted socket raises NotZeroCopy.

        Raises:
            OSError: EADDRINUSE, EADDRNOTAVAIL, as from bind(2), with a hint.
        """

    @abstractmethod
    def connect(
        self,
        address: Address,
        *,
        source: Address | None = None,
        strict: bool = False,
        timeout_s: float | None = None,
    ) -> DevmemSocket:
        """Connect to (host, port), from ``source`` if given; the socket then has no timeout."""

    @abstractmethod
    def queue_stats(self, queue: int) -> QueueStats: ...

    @abstractmethod
    def stats(self) -> NicStats:
        """Return each queue's counters, and who holds tokens. Kernel: qstats-get, page-pool-get, -stats-get."""

    @property
    @abstractmethod
    def closed(self) -> bool: ...
