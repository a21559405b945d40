"""devmem-tcp by asyncio: the same sessions as in devmem_tensors.py, driven by an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import devmem_tcp as dmt
from devmem_tcp import aio
from devmem_tcp.transport.arrangement import DEFAULT_SIZE
from loopback import HOST, MIB
from peers.control import Control, Part
from peers.devmem_tensors import PATIENCE_S
from peers.works import Kind, Work


class DevmemAsyncio:
    most_connections = 1

    def available(self) -> str:
        return ""

    def serve(self, control: Control) -> None:
        asyncio.run(_serve(control))

    def drive(self, control: Control) -> None:
        asyncio.run(_drive(control))


async def _serve(control: Control) -> None:
    echo = control.work.kind is Kind.ROUND_TRIP
    async with contextlib.AsyncExitStack() as stack:
        receiver = await _receiver(stack, control.work)
        control.tell(str(_port(receiver)))
        port = int(await asyncio.to_thread(control.hear)) if echo else 0  # the loop sees to the sender meanwhile
        line = await _line(stack, control.work, port) if echo else None
        await receiver.wait_connected(timeout_s=PATIENCE_S)
        for part in control.parts():
            await _receive(part, receiver, line)
        async for message in receiver:
            message.release()


async def _receive(part: Part, receiver: aio.Receiver, line: tuple[aio.Sender, aio.Slot] | None) -> None:
    with part:
        async with contextlib.AsyncExitStack() as stack:
            send = await _sending(stack, *line) if line is not None else None
            for number in range(part.messages):
                message = await receiver.receive(PATIENCE_S)
                if number == 0 and line is not None:
                    line[1].numpy()[:] = message.gather().numpy()
                if send is not None:
                    await send()
                if number < part.messages - 1:
                    message.release()
    with message:
        part.check([memoryview(message.gather().tobytes())])


async def _drive(control: Control) -> None:
    work, port = control.work, int(control.hear())
    async with contextlib.AsyncExitStack() as stack:
        receiver = None
        if work.kind is Kind.ROUND_TRIP:
            receiver = await _receiver(stack, work)
            control.tell(str(_port(receiver)))
        sender, slot = await _line(stack, work, port)
        if receiver is not None:
            await receiver.wait_connected(timeout_s=PATIENCE_S)
        for part in control.parts():
            part.message = slot.data
            if receiver is None:
                await _send(part, sender, slot)
            else:
                await _round_trips(part, sender, slot, receiver)
        await sender.aclose()
        if receiver is not None:
            async for message in receiver:
                message.release()


async def _send(part: Part, sender: aio.Sender, slot: aio.Slot) -> None:
    with part:
        async with contextlib.AsyncExitStack() as stack:
            send = await _sending(stack, sender, slot)
            for _ in range(part.messages - 1):
                await send()
        await (await slot.send(confirm=True)).wait_delivered(PATIENCE_S)


async def _round_trips(part: Part, sender: aio.Sender, slot: aio.Slot, receiver: aio.Receiver) -> None:
    landed = b""
    with part:
        async with contextlib.AsyncExitStack() as stack:
            send = await _sending(stack, sender, slot)
            for number in range(part.messages):
                await send()
                with await receiver.receive(PATIENCE_S) as message:
                    part.lap()
                    if number == part.messages - 1:
                        landed = message.gather().tobytes()
    part.check([memoryview(landed)])


async def _sending(
    stack: contextlib.AsyncExitStack, sender: aio.Sender, slot: aio.Slot
) -> Callable[[], Awaitable[object]]:
    series = await stack.enter_async_context(sender.series(slot.shape, slot.dtype))
    return lambda: series.send(slot)


async def _receiver(stack: contextlib.AsyncExitStack, work: Work) -> aio.Receiver:
    nic = stack.enter_context(dmt.open_nic("soft0", backend="software"))
    size = max(DEFAULT_SIZE, -(-work.size_bytes * 5 // 4096) * 4096 + MIB)
    return await stack.enter_async_context(aio.open_receiver(nic, listen=(HOST, 0), size=size))


async def _line(stack: contextlib.AsyncExitStack, work: Work, port: int) -> tuple[aio.Sender, aio.Slot]:
    nic = stack.enter_context(dmt.open_nic("soft1", backend="software"))
    size = -(-work.size_bytes // 4096) * 4096
    sender = await stack.enter_async_context(aio.open_sender(nic, to=(HOST, port), size=size))
    return sender, stack.enter_context(sender.reserve(work.size_bytes, "uint8"))


def _port(receiver: aio.Receiver) -> int:
    assert receiver.address is not None
    return receiver.address[1]
