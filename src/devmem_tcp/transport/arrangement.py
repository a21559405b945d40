"""What a sender or receiver sets up on its NIC: bound memory, header split, steering. Put back in reverse order."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.contract import Nic, RxBinding, TxBinding
from devmem_tcp.errors import DevmemError
from devmem_tcp.memory import Host, Udmabuf
from devmem_tcp.nicmodel.isolation import weights_without
from devmem_tcp.types import Address

DEFAULT_SIZE: Final = 256 << 20


class Arrangement:
    """Everything that is to be closed again, and how to steer.

    Args:
        memory: what to allocate from; None: udmabuf for a NIC that needs a dma-buf, else host memory.
        size_bytes: how much.
        buffer: use this Buffer, which stays the caller's, instead.
    """

    def __init__(self, nic: Nic, memory: Allocator | None, size_bytes: int, buffer: Buffer | None) -> None:
        self.nic: Final = nic
        self.held: Final = contextlib.ExitStack()
        if buffer is None:
            allocator = memory or (Udmabuf() if nic.capabilities.zero_copy else Host())
            buffer = allocator.allocate(size_bytes)
            self.held.callback(buffer.retire)  # not close: arrays of messages outlive the receiver
        self.buffer: Final = buffer

    def bind_tx(self) -> TxBinding:
        return self.held.enter_context(self.nic.bind_tx(self.buffer))

    def bind_rx(self, queues: Sequence[int] | None, *, steer: bool) -> RxBinding:
        """Bind the Buffer to queues (None: the last one), and keep other traffic off them.

        Args:
            steer: turn header split on, and take the queues out of RSS unless they are; if not, that is somebody
                else's to do.

        Raises:
            DevmemError: no queue would be left for other traffic.
            BindError, NicSettingError: as ``Nic.bind_rx``, ``set_header_split`` and ``set_rss``.
        """
        count = self.nic.capabilities.rx_queues
        chosen = list(queues) if queues is not None else [count - 1]
        if steer:
            table = self.nic.rss_table
            others = weights_without(chosen, table, count)
            if not any(others):
                raise DevmemError(
                    f"{self.nic.name} has {count} RX queues, all to be bound: none is left for other traffic",
                    hint="bind fewer queues=, or give the NIC more: ethtool -L NIC combined N",
                )
            self.held.enter_context(self.nic.set_header_split("on"))
            if not set(table).isdisjoint(chosen):
                self.held.enter_context(self.nic.set_rss(weights=others))
        return self.held.enter_context(self.nic.bind_rx(self.buffer, chosen))

    def steer_to(self, port: int, queue: int) -> None:
        """Have connections to a TCP port of this machine land in a queue."""
        self.held.enter_context(self.nic.add_ntuple(dst_port=port, queue=queue))

    def steer_from(self, peer: Address, queue: int) -> None:
        """Have what comes from a peer's address and TCP port land in a queue."""
        self.held.enter_context(self.nic.add_ntuple(src_ip=peer[0], src_port=peer[1], queue=queue))

    def close(self) -> None:
        """Put everything back."""
        self.held.close()


def listening_addresses(listen: Address, data_port: int | None) -> tuple[Address, Address]:
    """Return where control and data connections come: data to the next TCP port, or, for port 0, to any."""
    host, port = listen
    if data_port is None:
        data_port = port + 1 if port else 0
    if port and data_port == port:
        raise ValueError(f"control and data connections need different ports, got {port} for both")
    return (host, port), (host, data_port)
