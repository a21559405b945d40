"""Bindings as the kernel makes them: a Buffer's dma-buf attached to RX queues, or offered for sending.

A binding lives as long as the netlink socket that asked for it (net/core/netdev-genl.c, netdev_nl_sock_priv_destroy):
each has a socket of its own, and closing that is the only way to unbind. An RX binding's is a NicControl's to open.
"""

from __future__ import annotations

from collections.abc import Sequence

from devmem_tcp import contract
from devmem_tcp.buffers import Buffer, BufferUse
from devmem_tcp.closing import Closing
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.attachment import Registry
from devmem_tcp.kernel.control import AttachedQueues, NicControl
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.types import PAGE_SIZE, TokenHolder
from devmem_tcp.uapi.netdev import FAMILY


class KernelRxBinding(contract.RxBinding):
    """See ``contract.RxBinding``. Made by ``bind_rx``.

    The Buffer stays pinned until the binding is closed, every token is back and no socket of the NIC has data from
    before: bound again earlier, its pages would be handed out twice, and the kernel would not mind.

    Limits: what nobody can see from here keeps nothing pinned: data of connections that are not accepted yet or are
    another process's, and tokens that a receive in another thread brings at the moment of ``close()``.
    """

    def __init__(
        self,
        buffer: Buffer,
        pin: int,
        queues: tuple[int, ...],
        attached: AttachedQueues,
        registry: Registry,
    ) -> None:
        self._id = attached.dmabuf_id
        self._buffer = buffer
        self._pin = pin
        self._queues = queues
        self._attached = attached
        self._registry = registry
        self._closed = False
        registry.rx[self._id] = self

    @property
    def dmabuf_id(self) -> int:
        return self._id

    @property
    def queues(self) -> tuple[int, ...]:
        return self._queues

    @property
    def buffer(self) -> Buffer:
        return self._buffer

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def drained(self) -> bool:
        """Whether no token is out and no socket of the NIC has unread data, which may lie in this binding's memory."""
        return not self._registry.in_use(self._id)

    def reserve(self, queue: int, size_bytes: int) -> contract.Place | None:
        """Check the arguments and return None: a NIC chooses the pages that payload lands in."""
        self._check_reservation(queue, size_bytes)
        return None

    def holders(self) -> tuple[TokenHolder, ...]:
        return self._registry.holders(self._id)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._registry.rx.pop(self._id, None)
            self._attached.close()
            self._registry.unbound(self)

    def let_go(self) -> None:
        """Unpin the Buffer: nothing of it is in use."""
        self._buffer.unpin(self._pin)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "bound"
        return f"<RxBinding {self._id} {state}, queues {list(self._queues)}, {self._buffer.size_bytes} bytes>"


class KernelTxBinding(contract.TxBinding):
    """See ``contract.TxBinding``. Made by ``bind_tx``. What is under way keeps the dma-buf, even a closed one."""

    def __init__(self, dmabuf_id: int, buffer: Buffer, pin: int, netlink: Closing, registry: Registry) -> None:
        self._id = dmabuf_id
        self._buffer = buffer
        self._pin = pin
        self._netlink = netlink
        self._registry = registry
        self._closed = False
        registry.tx[dmabuf_id] = self

    @property
    def dmabuf_id(self) -> int:
        return self._id

    @property
    def buffer(self) -> Buffer:
        return self._buffer

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._registry.tx.pop(self._id, None)
            self._netlink.close()
            self._buffer.unpin(self._pin)

    def __repr__(self) -> str:
        return f"<TxBinding {self._id} {'closed' if self._closed else 'bound'}, {self._buffer.size_bytes} bytes>"


def bind_rx(
    registry: Registry, control: NicControl, buffer: Buffer, queues: Sequence[int], rx_page_size: int = PAGE_SIZE
) -> KernelRxBinding:
    """Attach a Buffer to RX queues of a NIC. Kernel: netdev bind-rx; needs CAP_NET_ADMIN, or a broker that has it.

    Raises:
        BindError: refused; nothing stays bound.
        BusyError: another binding receives into the Buffer, or its frags are out.
        ClosedError: the Buffer is closed.
        ValueError: the Buffer is no dma-buf.
    """
    wanted = tuple(sorted(set(queues)))  # a queue named twice counts once
    pin = buffer.pin(f"the RX binding of queues {list(wanted)}", BufferUse.RX)
    try:
        attached = control.attach(dmabuf_fd(buffer), wanted, rx_page_size)
    except BaseException:
        buffer.unpin(pin)
        raise
    return KernelRxBinding(buffer, pin, wanted, attached, registry)


def bind_tx(registry: Registry, ifindex: int, buffer: Buffer) -> KernelTxBinding:
    """Let sockets that send over an interface send from a Buffer. Kernel: netdev bind-tx; unprivileged.

    Raises:
        BindError: refused; nothing stays bound.
        ClosedError: the Buffer is closed.
        ValueError: the Buffer is no dma-buf.
    """
    pin = buffer.pin("a TX binding", BufferUse.TX)
    try:
        fd = dmabuf_fd(buffer)
        netlink = GenericNetlink(FAMILY)
        try:
            dmabuf_id = netdev.bind_tx(netlink, ifindex, fd)
        except BaseException:
            netlink.close()
            raise
    except BaseException:
        buffer.unpin(pin)
        raise
    return KernelTxBinding(dmabuf_id, buffer, pin, netlink, registry)


def dmabuf_fd(buffer: Buffer) -> int:
    """Return the fd that a NIC can be given. Raises ValueError: the Buffer is no dma-buf."""
    fd = buffer.dmabuf_fd
    if fd is None:
        raise ValueError(f"{buffer.kind} is no dma-buf, so a NIC cannot reach it: allocate it with Udmabuf or DmaHeap")
    return fd
