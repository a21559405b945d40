"""torch.distributed with the gloo backend: send and recv of uint8 tensors between two ranks."""

from __future__ import annotations

import os
from typing import Any, Final

from loopback import HOST
from peers import exchange
from peers.contract import missing
from peers.control import Control

SERVER: Final = 0
DRIVER: Final = 1


class TensorWire:
    """The other rank. A tensor is made once for each memory: they are few, and go again and again."""

    def __init__(self, distributed: Any, torch: Any, other: int) -> None:
        self._distributed = distributed
        self._torch = torch
        self._other = other
        self._tensors: dict[int, Any] = {}

    def send(self, message: memoryview) -> None:
        self._distributed.send(self._tensor(message), self._other)

    def receive(self, into: memoryview) -> memoryview:
        self._distributed.recv(self._tensor(into), self._other)
        return into

    def _tensor(self, memory: memoryview) -> Any:
        key = id(memory)
        if key not in self._tensors:
            writable = memory if not memory.readonly else bytearray(memory)
            self._tensors[key] = self._torch.frombuffer(writable, dtype=self._torch.uint8), memory
        return self._tensors[key][0]


class TorchGloo:
    most_connections = 1

    def available(self) -> str:
        return missing("torch", "torch")

    def serve(self, control: Control) -> None:
        import torch.distributed

        store = torch.distributed.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        control.tell(str(store.port))
        exchange.serve(control, _wire(store, SERVER))
        control.meet()  # who has the store closes last
        torch.distributed.destroy_process_group()

    def drive(self, control: Control) -> None:
        import torch.distributed

        store = torch.distributed.TCPStore(HOST, int(control.hear()), is_master=False)
        exchange.drive(control, _wire(store, DRIVER))
        torch.distributed.destroy_process_group()
        control.meet()


def _wire(store: Any, rank: int) -> TensorWire:
    import torch
    import torch.distributed

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    return TensorWire(torch.distributed, torch, SERVER + DRIVER - rank)
