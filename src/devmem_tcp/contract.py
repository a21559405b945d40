"""THE CONTRACT: what a Nic, a binding and a socket must do, on every backend; of memory, ``buffers`` says it.

``Kernel:`` names the exact operation; where the software backend differs on purpose, ``docs/kernel-contract.md`` says
so and why. Everything that is acquired here is a context manager with an idempotent ``close()``.

Threads: a Nic and its bindings may be used from several threads; one socket by one receiving and one sending thread.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Sequence
from typing import Final

from devmem_tcp import refusals
from devmem_tcp.buffers import Buffer
from devmem_tcp.closing import Closing
from devmem_tcp.errors import BindError, ClosedError
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


class Place(Closing):
    """A contiguous run of a bound Buffer, set apart for a program to receive into. Made by ``RxBinding.reserve``.

    Any number of sockets, in as many threads, may receive into it at once. ``close()`` gives its pages back, from any
    thread, and wakes who waits for pages; its bytes may change from then on. Closed while a ``recv_placed`` into it is
    under way, it keeps its pages until that ends.

    Lifetime: outlives its binding, its Nic and every socket, and pins the Buffer as tokens do. Dropped without
    ``close()`` it warns (LeakWarning) and closes.
    """

    @property
    @abstractmethod
    def binding(self) -> RxBinding: ...

    @property
    @abstractmethod
    def offset(self) -> int:
        """Where it starts in the Buffer, in bytes; a page starts there too."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Bytes in it, as asked for: the rest of its last page belongs to nobody."""

    @property
    @abstractmethod
    def closed(self) -> bool: ...

    @abstractmethod
    def view(self) -> memoryview:
        """Return all bytes as a writable memoryview of format B, shape (size_bytes,).

        Raises:
            ClosedError: the place is closed.
        """


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

    def _check_reservation(self, queue: int, size_bytes: int) -> None:
        """Raise what ``reserve`` says of its arguments, and of a binding that is closed."""
        if size_bytes <= 0:
            raise ValueError(f"a place needs at least one byte, got {size_bytes}")
        if queue not in self.queues:
            raise ValueError(f"the binding is of RX queues {list(self.queues)}, got {queue}")
        if self.closed:
            raise ClosedError(f"RX binding {self.dmabuf_id} is closed", hint="bind_rx() again")

    @property
    @abstractmethod
    def drained(self) -> bool:
        """Whether no page is in use, by a token, a Place or bytes not read: with ``closed``, the Buffer is free."""

    @abstractmethod
    def reserve(self, queue: int, size_bytes: int) -> Place | None:
        """Set ``size_bytes`` contiguous bytes of the Buffer apart, out of a queue's share of it. Never waits.

        Kernel: none. A NIC chooses the pages that payload lands in; only with ``capabilities.placement`` is there ever
        a place.

        Returns:
            None: this backend cannot, or there is no such run free now. Payload goes by ``recv_frags`` then.

        Raises:
            ValueError: ``size_bytes`` is not positive, or the queue is not of this binding.
            ClosedError: the binding is closed.
        """

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

    @property
    @abstractmethod
    def lands_in(self) -> RxBinding | None:
        """The binding whose Buffer the next payload can be placed in: what ``recv_placed`` needs. Costs no system call.

        None: it lands in host memory, or has landed already (a page read in pieces), or this backend cannot place it.
        ``recv_frags`` gets it.
        """

    @abstractmethod
    def recv_placed(self, place: Place, at: int, max_bytes: int, *, all: bool = False) -> int:
        """Receive up to ``max_bytes`` to byte ``at`` of a place; answers how many came, 0 at the end of stream.

        No token is handed out: the place holds the pages. In the counters it is one frag in device memory.

        Args:
            at: in bytes from the start of the place.
            all: wait for all ``max_bytes``: fewer only at the end of stream, on a signal, or when the time limit ends.

        Kernel: none; over ordinary TCP, recv(2) with MSG_WAITALL for ``all``.

        Raises:
            ValueError: ``max_bytes`` is not positive, or the range does not fit the place.
            LocalProtocolError: the next payload cannot land there: ``lands_in`` is not the place's binding. Nothing
                was consumed; ``recv_frags`` gets it.
            ClosedError: the socket or the place is closed.
            Timeout, BlockingIOError, ConnectionError.
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

    @abstractmethod
    def send_fileno(self) -> int:
        """An fd for poll, select and asyncio alone: ready for writing when ``send_frags`` takes something."""

    @abstractmethod
    def set_low_water(self, size_bytes: int) -> None:
        """Let ``fileno`` be ready to read only once so many bytes are here, or the end of the stream; 1: any.

        Fewer wake-ups, for a program that knows how much is to come, and receives with a time limit of 0: what is here
        it gets as before. A receive that waits may not be woken by less (docs/gotchas.md).

        Kernel: SO_RCVLOWAT, which is cut to half of the receive buffer (net/ipv4/tcp.c, tcp_set_rcvlowat).

        Raises:
            ValueError: it is not positive.
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
