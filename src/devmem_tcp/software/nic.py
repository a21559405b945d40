"""A NIC in software: named, with RX queues, header split, RSS and ntuple rules, over ordinary TCP sockets.

It belongs to who opened it: two opens of one name are two NICs, and nothing of this machine is changed.
"""

from __future__ import annotations

import errno
import re
import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

from devmem_tcp import contract, refusals
from devmem_tcp.buffers import Buffer
from devmem_tcp.closing import Closing
from devmem_tcp.contract import check_rx_page_size
from devmem_tcp.endpoints import TcpListener, open_connection, open_listening
from devmem_tcp.errors import BindError, KernelError
from devmem_tcp.nicmodel.header_split import HeaderSplit
from devmem_tcp.nicmodel.indirection import IndirectionTable
from devmem_tcp.nicmodel.misdirection import check_steering
from devmem_tcp.nicmodel.ntuple import ethtool_command
from devmem_tcp.nicmodel.page_pool import PagePool
from devmem_tcp.nicmodel.steering import Steering
from devmem_tcp.software import congestion
from devmem_tcp.software.binding import SoftwareRxBinding, SoftwareTxBinding, next_dmabuf_id
from devmem_tcp.software.flow import SteeredFlow
from devmem_tcp.software.inbound import Inbound, InlinePool
from devmem_tcp.software.landing import planner
from devmem_tcp.software.options import SoftwareOptions
from devmem_tcp.software.outbound import Outbound
from devmem_tcp.software.settings import InsertedRule, ValueSetting
from devmem_tcp.software.socket import BACKEND, SoftwareSocket
from devmem_tcp.sys import calls
from devmem_tcp.types import (
    PAGE_SIZE,
    Address,
    Capabilities,
    FlowRule,
    HeaderSplitMode,
    NicStats,
    QueueStats,
    TokenHolder,
)

_VIRTUAL_NAME: Final = re.compile(r"soft[0-9]+")
_HOSTILE_PAGES_A_QUEUE: Final = 64


def check_name(name: str) -> None:
    """Raise KernelError ENODEV unless ``name`` is an interface of this machine, or soft0, soft1, …"""
    if _VIRTUAL_NAME.fullmatch(name):
        return
    names = calls.interface_names()
    if name not in names:
        hint = f"interfaces here: {', '.join(names)}; a software NIC needs none: soft0"
        raise KernelError(errno.ENODEV, f"open NIC {name!r}", hint=hint)


class SoftwareNic(contract.Nic):
    """See ``contract.Nic``. Unprivileged; thread-safe but for its sockets."""

    def __init__(self, name: str, options: SoftwareOptions) -> None:
        check_name(name)
        self._name = name
        self._options = options
        self._closed = False
        self._lock = threading.RLock()
        self._steering = Steering(options.rx_queues)
        self._header_split = HeaderSplit(HeaderSplitMode.OFF)
        self._rx_by_queue: dict[int, SoftwareRxBinding] = {}
        self._tx_by_id: dict[int, SoftwareTxBinding] = {}
        self._settings: list[contract.Setting] = []
        self._listeners: weakref.WeakSet[TcpListener] = weakref.WeakSet()
        self._sockets: weakref.WeakSet[SoftwareSocket] = weakref.WeakSet()
        self._planner = planner(options.hostile_seed)
        self._inline = InlinePool()
        self._past_bytes = [0] * options.rx_queues  # of sockets and bindings that are closed
        self._past_alloc_fail = [0] * options.rx_queues

    # --- what it is ---

    @property
    def name(self) -> str:
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            backend=BACKEND,
            zero_copy=False,
            unprivileged_bind=True,
            rx_page_size=True,
            hds_thresh=True,
            loopback=True,
            merged_frags=self._options.frag_size > PAGE_SIZE,
            queue_shares=True,
            placement=self._planner.places,
            rx_queues=self._options.rx_queues,
            rss_table_size=self._steering.table.size,
        )

    @property
    def closed(self) -> bool:
        return self._closed

    # --- settings ---

    @property
    def header_split(self) -> HeaderSplitMode:
        return self._header_split.mode

    def set_header_split(self, mode: HeaderSplitMode | str) -> contract.Setting:
        self._check_open()
        return self._keep(
            ValueSetting(
                f"ethtool -G {self._name} tcp-data-split {HeaderSplitMode(mode).value}",
                lambda: self._header_split.mode,
                lambda value: self._header_split.set_mode(value, bound=bool(self._rx_by_queue)),
                HeaderSplitMode(mode),
            )
        )

    def set_hds_thresh(self, size_bytes: int) -> contract.Setting:
        self._check_open()
        return self._keep(
            ValueSetting(
                f"ethtool -G {self._name} hds-thresh {size_bytes}",
                lambda: self._header_split.hds_thresh,
                lambda value: self._header_split.set_thresh(value, bound=bool(self._rx_by_queue)),
                size_bytes,
            )
        )

    def set_rss(
        self, *, equal: int | None = None, weights: Sequence[int] | None = None, table: Sequence[int] | None = None
    ) -> contract.Setting:
        self._check_open()
        size = self._steering.table.size
        if equal is not None and weights is None and table is None:
            words, new = f"equal {equal}", IndirectionTable.equal(equal, size)
        elif weights is not None and equal is None and table is None:
            words, new = f"weight {' '.join(map(str, weights))}", IndirectionTable.weights(weights, size)
        elif table is not None and equal is None and weights is None:
            words, new = f"indirection table {list(table)}", IndirectionTable.explicit(table, size)
        else:
            raise ValueError("set_rss takes exactly one of equal=, weights= and table=")
        return self._keep(
            ValueSetting(
                f"ethtool -X {self._name} {words}", lambda: self._steering.table, self._steering.set_table, new
            )
        )

    @property
    def rss_table(self) -> tuple[int, ...]:
        return self._steering.table.entries

    def insert_rule(self, rule: FlowRule) -> contract.NtupleRule:
        self._check_open()
        with self._lock:
            held = self._steering.ntuple.insert(rule)
        inserted = InsertedRule(ethtool_command(self._name, rule), held, self._has_rule, self._delete_rule)
        self._settings.append(inserted)
        return inserted

    @property
    def ntuple_rules(self) -> tuple[FlowRule, ...]:
        return self._steering.ntuple.rules

    def _has_rule(self, rule: FlowRule) -> bool:
        return rule in self._steering.ntuple.rules

    def _delete_rule(self, rule: FlowRule) -> None:
        assert rule.location is not None
        with self._lock:
            self._steering.ntuple.delete(rule.location)

    def _keep(self, setting: contract.Setting) -> contract.Setting:
        self._settings.append(setting)
        return setting

    # --- bindings ---

    def bind_rx(self, buffer: Buffer, queues: Sequence[int], *, rx_page_size: int = PAGE_SIZE) -> SoftwareRxBinding:
        self._check_open()
        if not queues:
            raise refusals.NO_QUEUES.error(BindError)
        check_rx_page_size(rx_page_size)
        queues = self._wanted_queues(queues)
        check_segments(buffer, rx_page_size)
        with self._lock:
            dmabuf_id = next_dmabuf_id()  # from here on a refusal burns an id
            for queue in queues:
                self._check_bindable(queue)
            pages = buffer.size_bytes // rx_page_size
            if self._options.hostile_seed is not None:
                pages = min(pages, _HOSTILE_PAGES_A_QUEUE * len(queues))
            if pages < len(queues):
                hint = f"{len(queues)} queues need at least {len(queues) * rx_page_size} bytes"
                raise BindError(errno.ENOMEM, "bind-rx", hint=hint)
            pool = PagePool(pages * rx_page_size, queues, page_size=rx_page_size)
            binding = SoftwareRxBinding(
                dmabuf_id,
                buffer,
                pool,
                queues,
                self._options.frag_size,
                self._unbound_rx,
                self._find_holders,
                places=self._planner.places,
            )
            self._rx_by_queue.update(dict.fromkeys(queues, binding))
            return binding

    def _wanted_queues(self, queues: Sequence[int]) -> tuple[int, ...]:
        """Return the queues in order, each once. Kernel: net/core/netdev-genl.c, netdev_nl_read_rxq_bitmap."""
        for queue in queues:
            if not 0 <= queue < self._options.rx_queues:
                hint = f"{self._name} has RX queues 0 to {self._options.rx_queues - 1}, got {queue}"
                raise BindError(errno.EINVAL, "bind-rx", attr="queue-id", hint=hint)
        return tuple(sorted(set(queues)))

    def _check_bindable(self, queue: int) -> None:
        """Refuse a queue that cannot be bound. Kernel: net/core/netdev_rx_queue.c, __netif_mp_open_rxq."""
        self._header_split.check_bind()
        if queue in self._rx_by_queue:
            hint = f"RX queue {queue} has a binding: close it, or take another queue"
            raise refusals.QUEUE_BOUND.error(BindError, hint=hint)

    def _unbound_rx(self, binding: SoftwareRxBinding) -> None:
        with self._lock:
            for queue in binding.queues:
                if self._rx_by_queue.get(queue) is binding:
                    del self._rx_by_queue[queue]
                self._past_alloc_fail[queue] += binding.pool.alloc_fail(queue)

    def bind_tx(self, buffer: Buffer) -> SoftwareTxBinding:
        self._check_open()
        with self._lock:
            binding = SoftwareTxBinding(next_dmabuf_id(), buffer, self._unbound_tx)
            self._tx_by_id[binding.dmabuf_id] = binding
            return binding

    def _unbound_tx(self, binding: SoftwareTxBinding) -> None:
        with self._lock:
            self._tx_by_id.pop(binding.dmabuf_id, None)

    # --- sockets ---

    def listen(self, address: Address, *, backlog: int = 128, strict: bool = False) -> contract.Listener:
        self._check_open()
        sock = open_listening(address, backlog)
        try:
            listener = TcpListener(sock, partial(self._accepted, strict=strict))
        except BaseException:
            calls.close_socket(sock)
            raise
        self._listeners.add(listener)
        return listener

    def connect(
        self,
        address: Address,
        *,
        source: Address | None = None,
        strict: bool = False,
        timeout_s: float | None = None,
    ) -> SoftwareSocket:
        self._check_open()
        chosen = ""

        def prepare(sock: calls.Socket, where: tuple[Any, ...]) -> None:
            nonlocal chosen
            chosen = congestion.choose(sock, self._options.congestion, [where])

        sock = open_connection(address, source=source, timeout_s=timeout_s, prepare=prepare)
        try:
            return self._adopt(sock, chosen, strict=strict)
        except BaseException:
            calls.close_socket(sock)
            raise

    def _accepted(self, sock: calls.Socket, *, strict: bool) -> SoftwareSocket:
        ends = [calls.local_address(sock), calls.remote_address(sock)]
        made = self._adopt(sock, congestion.choose(sock, self._options.congestion, ends), strict=strict)
        try:
            check_steering(self, made, sorted(self._rx_by_queue), strict=strict, stacklevel=3)
        except BaseException:
            made.close()
            raise
        return made

    def _adopt(self, sock: calls.Socket, chosen: str, *, strict: bool) -> SoftwareSocket:
        local, remote = calls.local_address(sock), calls.remote_address(sock)
        flow = SteeredFlow(local, remote, self._steering)
        inbound = Inbound(sock, flow, self._rx_by_queue, self._planner, self._inline, strict=strict)
        outbound = Outbound(sock, self._tx_by_id.get, self._planner)
        made = SoftwareSocket(sock, flow, inbound, outbound, chosen, self._forget)
        with self._lock:
            self._sockets.add(made)
        return made

    def _forget(self, sock: SoftwareSocket) -> None:
        with self._lock:
            self._sockets.discard(sock)
            for queue, size in sock.bytes_by_queue.items():
                self._past_bytes[queue] += size

    def _find_holders(self, dmabuf_id: int) -> Iterator[TokenHolder]:
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            holder = sock.holder(dmabuf_id)
            if holder is not None:
                yield holder

    # --- counters ---

    def queue_stats(self, queue: int) -> QueueStats:
        if not 0 <= queue < self._options.rx_queues:
            raise ValueError(f"{self._name} has RX queues 0 to {self._options.rx_queues - 1}, got {queue}")
        with self._lock:
            binding = self._rx_by_queue.get(queue)
            pool = binding.pool if binding is not None else None
            live = sum(sock.bytes_by_queue.get(queue, 0) for sock in self._sockets)
            return QueueStats(
                queue=queue,
                dmabuf_id=binding.dmabuf_id if binding is not None else 0,
                rx_bytes=self._past_bytes[queue] + live,
                rx_alloc_fail=self._past_alloc_fail[queue] + (pool.alloc_fail(queue) if pool else 0),
                pages_total=pool.queue_total(queue) if pool else 0,
                pages_inflight=pool.queue_inflight(queue) if pool else 0,
            )

    def stats(self) -> NicStats:
        queues = tuple(self.queue_stats(queue) for queue in range(self._options.rx_queues))
        bound = {binding.dmabuf_id for binding in self._rx_by_queue.values()}
        holders = [holder for dmabuf_id in sorted(bound) for holder in self._find_holders(dmabuf_id)]
        return NicStats(self._name, BACKEND, queues, tuple(holders))

    # --- the end ---

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        children: list[Closing] = [*self._sockets, *self._listeners]
        children += {id(binding): binding for binding in self._rx_by_queue.values()}.values()
        children += self._tx_by_id.values()
        children += reversed(self._settings)
        for child in children:
            child.close()

    def __repr__(self) -> str:
        return f"<Nic {self._name} software, {self._options.rx_queues} RX queues>"


def check_segments(buffer: Buffer, rx_page_size: int) -> None:
    """Refuse a Buffer that is no whole number of pages. Kernel: net/core/devmem.c, net_devmem_bind_dmabuf."""
    if buffer.size_bytes % rx_page_size:
        extack = f"dmabuf sg entry of {buffer.size_bytes} bytes not aligned to niov size {rx_page_size}"
        raise BindError(errno.EINVAL, "bind-rx", extack=extack, hint="allocate a multiple of rx_page_size")
