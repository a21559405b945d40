"""ucxx, the Python interface of UCX, with its TCP transport alone: tagged send and recv between endpoints, by asyncio.

Left free, UCX takes shared memory between two processes of one machine, which compares with nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any, Final

from loopback import HOST
from peers import exchange
from peers.contract import missing
from peers.control import Control

CONNECT_S: Final = 30.0
"""The library's own 5 seconds are not enough for a machine that does much else."""


class EndpointWire:
    """One endpoint."""

    def __init__(self, endpoint: Any) -> None:
        self._endpoint = endpoint

    async def send(self, message: memoryview) -> None:
        await self._endpoint.send(message)

    async def receive(self, into: memoryview) -> memoryview:
        await self._endpoint.recv(into)
        return into

    async def close(self) -> None:
        """Close the endpoint."""
        await self._endpoint.close()


class UcxxTcp:
    most_connections = 64

    def available(self) -> str:
        return missing("ucxx", "ucxx-cu12")

    def serve(self, control: Control) -> None:
        asyncio.run(_serve(control))

    def drive(self, control: Control) -> None:
        asyncio.run(_drive(control))


async def _serve(control: Control) -> None:
    wires: list[EndpointWire] = []
    complete = asyncio.Event()

    async def take(endpoint: Any) -> None:
        wires.append(EndpointWire(endpoint))
        if len(wires) == control.work.connections:
            complete.set()

    async with _ucxx(wires) as ucxx:
        listener = ucxx.create_listener(take, connect_timeout=CONNECT_S)
        control.tell(str(listener.port))
        await complete.wait()
        await exchange.serve_async(control, wires)
        listener.close()


async def _drive(control: Control) -> None:
    port = int(control.hear())
    wires: list[EndpointWire] = []
    async with _ucxx(wires) as ucxx:
        for _ in range(control.work.connections):
            wires.append(EndpointWire(await ucxx.create_endpoint(HOST, port, connect_timeout=CONNECT_S)))
        await exchange.drive_async(control, wires)


@contextlib.asynccontextmanager
async def _ucxx(wires: list[EndpointWire]) -> AsyncIterator[Any]:
    """Give the module, set to TCP over loopback; closes the wires and ends its threads after."""
    os.environ |= {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
    import ucxx

    ucxx.init(progress_mode="polling")  # its other modes are slower, or hang in a round trip
    yield ucxx
    for wire in wires:
        await wire.close()
    wires.clear()
    ucxx.stop_notifier_thread()
    ucxx.reset()
