"""asyncio streams: readexactly, which returns new bytes each time; write and drain."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from loopback import HOST, MIB
from peers import exchange
from peers.control import Control

LIMIT: Final = MIB
"""Of a StreamReader's own buffer: the best of 64 KiB, which is the default, 1 MiB and 8 MiB."""


class StreamWire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, message: memoryview) -> None:
        self._writer.write(message)
        await self._writer.drain()

    async def receive(self, into: memoryview) -> memoryview:
        return memoryview(await self._reader.readexactly(len(into)))

    async def close(self) -> None:
        """Close the connection."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


class AsyncioStreams:
    most_connections = 512

    def available(self) -> str:
        return ""

    def serve(self, control: Control) -> None:
        asyncio.run(_serve(control))

    def drive(self, control: Control) -> None:
        asyncio.run(_drive(control))


async def _serve(control: Control) -> None:
    wires: list[StreamWire] = []
    complete = asyncio.Event()

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wires.append(StreamWire(reader, writer))
        if len(wires) == control.work.connections:
            complete.set()

    server = await asyncio.start_server(take, HOST, 0, limit=LIMIT, backlog=control.work.connections)
    async with server, _closing(wires):
        control.tell(str(server.sockets[0].getsockname()[1]))
        await complete.wait()
        await exchange.serve_async(control, wires)


async def _drive(control: Control) -> None:
    port = int(control.hear())
    wires: list[StreamWire] = []
    async with _closing(wires):
        for _ in range(control.work.connections):
            wires.append(StreamWire(*await asyncio.open_connection(HOST, port, limit=LIMIT)))
        await exchange.drive_async(control, wires)


@contextlib.asynccontextmanager
async def _closing(wires: list[StreamWire]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for wire in wires:
            await wire.close()
