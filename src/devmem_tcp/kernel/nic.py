"""A real NIC: what Linux does for devmem TCP, in the words of the contract."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, NamedTuple

from devmem_tcp import contract
from devmem_tcp.buffers import Buffer
from devmem_tcp.closing import Closing
from devmem_tcp.contract import check_rx_page_size
from devmem_tcp.endpoints import TcpListener, open_connection, open_listening
from devmem_tcp.errors import SteeringWarning
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.attachment import Registry
from devmem_tcp.kernel.binding import KernelRxBinding, KernelTxBinding, bind_rx, bind_tx
from devmem_tcp.kernel.control import NicControl
from devmem_tcp.kernel.counters import QueueCounters
from devmem_tcp.kernel.ethtool import Ethtool
from devmem_tcp.kernel.leasing import QueueLease, lease_queue, other_traffic
from devmem_tcp.kernel.settings import rss_words
from devmem_tcp.kernel.socket import BACKEND, KernelSocket
from devmem_tcp.nicmodel.indirection import IndirectionTable
from devmem_tcp.nicmodel.misdirection import check_steering
from devmem_tcp.sys import calls
from devmem_tcp.types import (
    PAGE_SIZE,
    Address,
    Capabilities,
    FlowRule,
    HeaderSplitMode,
    NicStats,
    QueueStats,
)
from devmem_tcp.uapi.netdev import QueueType

_UNKNOWN_QUEUE: Final = -1


class Limits(NamedTuple):
    """What there is of a NIC, once and for all."""

    rx_queues: int
    rss_table_size: int
    hds_thresh: bool


class KernelNic(contract.Nic):
    """See ``contract.Nic``. Settings, rules and RX bindings need CAP_NET_ADMIN, or a broker; all else does not.

    Thread-safe but for its sockets.

    Args:
        name: a network interface of this network namespace.
        control: makes the changes; this object's to close once it is made.

    Raises:
        KernelError: ENODEV: no such interface; EOPNOTSUPP: it has no RSS, so no queues to choose between.
    """

    def __init__(self, name: str, control: NicControl) -> None:
        self._name = name
        self._control = control
        self._closed = False
        self._lock = threading.RLock()
        self._listeners: weakref.WeakSet[TcpListener] = weakref.WeakSet()
        self._sockets: weakref.WeakSet[KernelSocket] = weakref.WeakSet()
        self._napi_queues: dict[int, int] = {}
        self._ethtool = Ethtool(name)
        try:
            self._rx_queues, self._rss_table_size, self._hds_thresh = self._limits()
        except BaseException:
            self._ethtool.close()
            raise
        self._registry = Registry(self._queue_of_napi, self.queue_stats)
        self._counters = QueueCounters(self._ethtool.ifindex, self._rx_queues, self._registry)

    def _limits(self) -> Limits:
        ethtool = self._ethtool
        return Limits(ethtool.rx_queues(), len(ethtool.rss().table), ethtool.rings().hds_thresh is not None)

    # --- what it is ---

    @property
    def name(self) -> str:
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            backend=BACKEND,
            zero_copy=True,
            unprivileged_bind=False,
            rx_page_size=False,  # of the drivers there are, none that this was tried with takes another one
            hds_thresh=self._hds_thresh,
            loopback=False,
            merged_frags=False,
            queue_shares=False,
            placement=False,
            rx_queues=self._rx_queues,
            rss_table_size=self._rss_table_size,
        )

    @property
    def closed(self) -> bool:
        return self._closed

    # --- settings ---

    @property
    def header_split(self) -> HeaderSplitMode:
        self._check_open()
        return self._ethtool.rings().header_split

    def set_header_split(self, mode: HeaderSplitMode | str) -> contract.Setting:
        self._check_open()
        return self._control.set_header_split(HeaderSplitMode(mode))

    def set_hds_thresh(self, size_bytes: int) -> contract.Setting:
        self._check_open()
        return self._control.set_hds_thresh(size_bytes)

    def set_rss(
        self, *, equal: int | None = None, weights: Sequence[int] | None = None, table: Sequence[int] | None = None
    ) -> contract.Setting:
        self._check_open()
        words = rss_words(self._name, equal=equal, weights=weights, table=table)
        if equal is not None:
            new = IndirectionTable.equal(equal, self._rss_table_size)
        elif weights is not None:
            new = IndirectionTable.weights(weights, self._rss_table_size)
        else:
            new = IndirectionTable.explicit(table or (), self._rss_table_size)
        return self._control.set_rss(new.entries, words)

    @property
    def rss_table(self) -> tuple[int, ...]:
        self._check_open()
        return self._ethtool.rss().table

    def insert_rule(self, rule: FlowRule) -> contract.NtupleRule:
        self._check_open()
        return self._control.add_ntuple(rule)

    @property
    def ntuple_rules(self) -> tuple[FlowRule, ...]:
        self._check_open()
        return tuple(held.rule for held in self._ethtool.rules() if held.rule is not None)

    # --- bindings ---

    def bind_rx(self, buffer: Buffer, queues: Sequence[int], *, rx_page_size: int = PAGE_SIZE) -> KernelRxBinding:
        """See ``contract.Nic.bind_rx``. A SteeringWarning says what other traffic the NIC sends to these queues."""
        self._check_open()
        check_rx_page_size(rx_page_size)  # kernels that know no page size say something else of it
        self._warn_of_other_traffic(queues)
        self._counters.sample()  # the queues' counters start anew
        return bind_rx(self._registry, self._control, buffer, queues, rx_page_size)

    def _warn_of_other_traffic(self, queues: Sequence[int]) -> None:
        for text in other_traffic(self._ethtool, queues):
            warnings.warn(text, SteeringWarning, stacklevel=3)

    def bind_tx(self, buffer: Buffer) -> KernelTxBinding:
        self._check_open()
        return bind_tx(self._registry, self._ethtool.ifindex, buffer)

    def lease_queue(self, queue: int, to: str, netns: str | int | None = None) -> QueueLease:
        """Lease an RX queue to a virtual interface (netkit), which may be a container's.

        A program there opens that interface as its NIC, and binds the queue by the number that this returns.

        Lifetime: the lease ends with the virtual interface; closing this NIC leaves it alone. So header split, RSS and
        rules for it are better set by ethtool than by this object, which puts them back.

        Args, Kernel, Raises: as ``kernel.leasing.lease_queue``.
        """
        self._check_open()
        return lease_queue(self._ethtool, queue, to, netns)

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
    ) -> KernelSocket:
        """See ``contract.Nic.connect``. Kernel: SO_BINDTODEVICE too: devmem is sent by the NIC it is bound to alone."""
        self._check_open()

        def prepare(sock: calls.Socket, where: tuple[Any, ...]) -> None:
            calls.setsockopt(sock, calls.SOL_SOCKET, calls.SO_BINDTODEVICE, self._name.encode() + b"\0")

        sock = open_connection(address, source=source, timeout_s=timeout_s, prepare=prepare)
        try:
            return self._adopt(sock, strict=strict)
        except BaseException:
            calls.close_socket(sock)
            raise

    def _accepted(self, sock: calls.Socket, *, strict: bool) -> KernelSocket:
        made = self._adopt(sock, strict=strict)
        try:
            self._prove_steering(made, strict=strict)
        except BaseException:
            made.close()
            raise
        return made

    def _prove_steering(self, made: KernelSocket, *, strict: bool) -> None:
        bound = sorted(queue for binding in list(self._registry.rx.values()) for queue in binding.queues)
        check_steering(self, made, bound, strict=strict, stacklevel=4)

    def _adopt(self, sock: calls.Socket, *, strict: bool) -> KernelSocket:
        made = KernelSocket(sock, self._registry, strict=strict)
        self._sockets.add(made)
        return made

    def _queue_of_napi(self, napi_id: int) -> int:
        """Return the RX queue that a NAPI instance serves; the ids are new whenever the queues are.

        Kernel: netdev queue-get.
        """
        if napi_id not in self._napi_queues:
            found = netdev.queues(self._ethtool.ifindex)
            self._napi_queues |= {
                one.napi_id: one.queue for one in found if one.type is QueueType.RX and one.napi_id is not None
            }
        return self._napi_queues.get(napi_id, _UNKNOWN_QUEUE)

    # --- counters ---

    def queue_stats(self, queue: int) -> QueueStats:
        if not 0 <= queue < self._rx_queues:
            raise ValueError(f"{self._name} has RX queues 0 to {self._rx_queues - 1}, got {queue}")
        return self._counters.sample()[queue]

    def stats(self) -> NicStats:
        found = self._counters.sample()
        holders = [holder for dmabuf_id in sorted(self._registry.rx) for holder in self._registry.holders(dmabuf_id)]
        return NicStats(self._name, BACKEND, found, tuple(holders))

    # --- the end ---

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with ExitStack() as undo:  # the last first, and all of them, whatever one raises
            undo.callback(self._ethtool.close)
            undo.callback(self._control.close)
            children: list[Closing] = [*self._registry.rx.values(), *self._registry.tx.values()]
            children += [*self._listeners, *self._sockets]
            for child in children:
                undo.callback(child.close)

    def __repr__(self) -> str:
        return f"<Nic {self._name} kernel, {self._rx_queues} RX queues>"
