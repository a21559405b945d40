"""The loops of a work over connections that send and receive whole messages, blocking and asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from peers.control import ACKNOWLEDGEMENT, Control, Part
from peers.works import Kind


class Wire(Protocol):
    """A connection; its calls return when they are done."""

    def send(self, message: memoryview) -> None:
        """Send a whole message; its memory may be used again when this returns, or is never changed before."""

    def receive(self, into: memoryview) -> memoryview:
        """Receive a message of ``len(into)`` bytes; returns where it lies: there, or in memory of the library's."""


class AsyncWire(Protocol):
    """The same for asyncio."""

    async def send(self, message: memoryview) -> None:
        """See Wire."""

    async def receive(self, into: memoryview) -> memoryview:
        """See Wire."""


def serve(control: Control, wire: Wire) -> None:
    """Do the server's side of a work on one connection."""
    echoing = control.work.kind is Kind.ROUND_TRIP
    for part in control.parts():
        landed, into = memoryview(b""), part.landing[0]
        with part:
            for _ in range(part.messages):
                landed = wire.receive(into)
                if echoing:
                    wire.send(landed)
            if not echoing:
                wire.send(ACKNOWLEDGEMENT)
        part.check([landed])


def drive(control: Control, wire: Wire) -> None:
    """Do the driver's side of a work on one connection."""
    if control.work.kind is Kind.ROUND_TRIP:
        for part in control.parts():
            landed, into = memoryview(b""), part.landing[0]
            with part:
                for _ in range(part.messages):
                    wire.send(part.message)
                    landed = wire.receive(into)
                    part.lap()
            part.check([landed])
        return
    answer = memoryview(bytearray(1))
    for part in control.parts():
        with part:
            for _ in range(part.messages):
                wire.send(part.message)
            wire.receive(answer)


async def serve_async(control: Control, wires: Sequence[AsyncWire]) -> None:
    """Do the server's side of a work on all connections at once, a task each."""
    echoing = control.work.kind is Kind.ROUND_TRIP

    async def receive(wire: AsyncWire, into: memoryview, part: Part) -> memoryview:
        landed = memoryview(b"")
        for _ in range(part.messages):
            landed = await wire.receive(into)
            if echoing:
                await wire.send(landed)
        if not echoing:
            await wire.send(ACKNOWLEDGEMENT)
        return landed

    for part in control.parts():
        with part:
            tasks = (receive(wire, into, part) for wire, into in zip(wires, part.landing, strict=True))
            landed = await asyncio.gather(*tasks)
        part.check(landed)


async def drive_async(control: Control, wires: Sequence[AsyncWire]) -> None:
    """Do the driver's side of a work on all connections at once, a task each."""
    if control.work.kind is Kind.ROUND_TRIP:
        await _round_trips(control, wires[0])
        return

    async def send(wire: AsyncWire, part: Part) -> None:
        for _ in range(part.messages):
            await wire.send(part.message)
        await wire.receive(memoryview(bytearray(1)))

    for part in control.parts():
        with part:
            await asyncio.gather(*(send(wire, part) for wire in wires))


async def _round_trips(control: Control, wire: AsyncWire) -> None:
    for part in control.parts():
        landed, into = memoryview(b""), part.landing[0]
        with part:
            for _ in range(part.messages):
                await wire.send(part.message)
                landed = await wire.receive(into)
                part.lap()
        part.check([landed])
