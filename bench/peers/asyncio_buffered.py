"""asyncio without a copy: a BufferedProtocol receives straight into the message's memory, sock_sendall sends.

A transport would copy what the socket does not take at once (asyncio/selector_events.py of Python 3.11,
_SelectorSocketTransport.write), so that the driver has none: it uses the loop's own calls on its socket.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from loopback import HOST
from peers import exchange
from peers.control import Control
from peers.plain import connected

_EMPTY: Final = memoryview(bytearray(1))


class MessageProtocol(asyncio.BufferedProtocol):
    """Fills the memory that it is given; reads nothing while it has none."""

    def __init__(self, control: Control, wires: list[MessageProtocol], complete: asyncio.Event) -> None:
        self._count = control.work.connections
        self._wires = wires
        self._complete = complete
        self._into = _EMPTY
        self._at = 0
        self._waiter: asyncio.Future[None] | None = None
        self._lost = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.pause_reading()
        self._wires.append(self)
        if len(self._wires) == self._count:
            self._complete.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._into[self._at :] if self._at else self._into

    def buffer_updated(self, nbytes: int) -> None:
        self._at += nbytes
        if self._at == len(self._into) and self._waiter is not None:
            self._waiter.set_result(None)
            self._waiter = None
            # Runs after whoever waits has been woken, and before the socket is looked at again.
            asyncio.get_running_loop().call_soon(self._rest)

    def _rest(self) -> None:
        """Read nothing while there is no memory; pausing at each message would cost two system calls."""
        if self._waiter is None and not self._lost:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(exc or EOFError(f"the connection ended after {self._at} bytes"))

    async def receive(self, into: memoryview) -> memoryview:
        if self._lost:
            raise EOFError("the connection has ended")
        self._into, self._at = into, 0
        self._waiter = asyncio.get_running_loop().create_future()
        if not self._transport.is_reading():
            self._transport.resume_reading()
        await self._waiter
        return into

    async def send(self, message: memoryview) -> None:
        self._transport.write(message)

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()


class LoopWire:
    """A socket, by the event loop's own calls."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, message: memoryview) -> None:
        await self._loop.sock_sendall(self._sock, message)

    async def receive(self, into: memoryview) -> memoryview:
        at = 0
        while at < len(into):
            count = await self._loop.sock_recv_into(self._sock, into[at:])
            if not count:
                raise EOFError(f"the connection ended after {at} bytes")
            at += count
        return into


class AsyncioBuffered:
    most_connections = 512

    def available(self) -> str:
        return ""

    def serve(self, control: Control) -> None:
        asyncio.run(_serve(control))

    def drive(self, control: Control) -> None:
        with connected(control) as socks:
            for sock in socks:
                sock.setblocking(False)
            asyncio.run(_drive(control, socks))


async def _serve(control: Control) -> None:
    wires: list[MessageProtocol] = []
    complete = asyncio.Event()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: MessageProtocol(control, wires, complete), HOST, 0, backlog=control.work.connections
    )
    async with server:
        control.tell(str(server.sockets[0].getsockname()[1]))
        await complete.wait()
        try:
            await exchange.serve_async(control, wires)
        finally:
            for wire in wires:
                wire.close()


async def _drive(control: Control, socks: list[socket.socket]) -> None:
    await exchange.drive_async(control, [LoopWire(sock) for sock in socks])
