"""Both ends of a session in one event loop, and what must hold whenever a test with them is over."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

import devmem_tcp as dmt
from devmem_tcp import aio
from devmem_tcp.errors import Timeout
from devmem_tcp.types import U8Array

LOOPBACK = ("127.0.0.1", 0)
MIB = 1 << 20
SIZE = 2 * MIB  # of both Buffers, unless a test says otherwise
PATIENCE_S = 20.0  # far above what anything here takes: a test that waits so long has failed

Result = TypeVar("Result")
Scenario = Callable[[int], Awaitable[bool]]


class Pair(NamedTuple):
    """A sender and the receiver that it went to."""

    sender: aio.Sender
    receiver: aio.Receiver


def run(main: Callable[[], Awaitable[Result]]) -> Result:
    """Run ``main`` in a fresh loop; it may leave no task behind, and nothing for the loop's exception handler."""

    async def judged() -> Result:
        problems: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, problem: problems.append(problem))
        loop.run_in_executor = forbidden  # type: ignore[assignment]
        async with asyncio.timeout(2 * PATIENCE_S):
            result = await main()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        gc.collect()  # exceptions that nobody asked for are told when their futures go
        await asyncio.sleep(0)
        assert problems == []
        return result

    return asyncio.run(judged())


def forbidden(*_: object) -> None:
    raise AssertionError("an executor is asked for")


@contextlib.asynccontextmanager
async def receiving(**options: Any) -> AsyncIterator[aio.Receiver]:
    """A receiver on a NIC of its own."""
    options = dict[str, Any](listen=LOOPBACK, size=SIZE) | options
    with dmt.open_nic("soft0", backend="software") as nic:
        async with aio.open_receiver(nic, **options) as receiver:
            yield receiver


@contextlib.asynccontextmanager
async def sending(to: aio.Receiver, **options: Any) -> AsyncIterator[aio.Sender]:
    """A sender on a NIC of its own."""
    options = dict[str, Any](to=to.address, size=SIZE) | options
    with dmt.open_nic("soft1", backend="software") as nic:
        async with aio.open_sender(nic, **options) as sender:
            yield sender


@contextlib.asynccontextmanager
async def paired(receiver: dict[str, Any] | None = None, sender: dict[str, Any] | None = None) -> AsyncIterator[Pair]:
    """Both, connected. At the end the sender leaves first."""
    async with receiving(**(receiver or {})) as end, sending(end, **(sender or {})) as source:
        yield Pair(source, end)


def pattern(nbytes: int, seed: int = 0) -> U8Array:
    """Return bytes that differ from place to place and from seed to seed."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


async def take(receiver: aio.Receiver) -> tuple[str, bytes]:
    """Receive a message; returns its name and bytes."""
    with await receiver.receive(PATIENCE_S) as message:
        return message.name, bytes(message.gather().tobytes())


async def use_up_credit(pair: Pair) -> list[aio.Message]:
    """Pass messages, and hold them, until the sender may send no more; returns them."""
    held: list[aio.Message] = []
    with contextlib.suppress(Timeout):
        while True:
            await pair.sender.send(b"x", timeout_s=0.05)
            held.append(await pair.receiver.receive(PATIENCE_S))
    assert len(held) == 64  # SIZE has a message for each eight pages
    return held


async def check_passes(pair: Pair, name: str = "probe") -> None:
    """Pass a message of a few pieces, and compare it."""
    data = pattern(3 * MIB + 5, 99)
    task = asyncio.create_task(pair.sender.send(data, name, confirm=True))
    assert await take(pair.receiver) == (name, data.tobytes())
    await (await task).wait_delivered(PATIENCE_S)


def check_idle(pair: Pair) -> None:
    """Compare what both ends hold with what they hold while nothing is under way."""
    outbox = pair.sender._engine.outbox
    assert outbox.free_bytes == outbox.buffer.size_bytes
    assert not pair.sender._attendant._first
    assert not pair.receiver._attendant._first


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def turns(count: int) -> None:
    """Let the loop turn so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


def cancel_everywhere(scenario: Scenario, at_least: int) -> None:
    """Run a scenario with its verb cancelled ever later; ``at_least`` so many times it must have been in time."""
    before = open_fds()
    count = 1
    while not run(partial(scenario, count)):
        assert open_fds() == before
        count += 1
    assert open_fds() == before
    assert count > at_least


async def cancel_after(count: int, verb: Coroutine[Any, Any, Any]) -> bool:
    """Cancel a verb after so many turns of the loop; answers whether it was done before."""
    task = asyncio.create_task(verb)
    await turns(count)
    task.cancel()
    await asyncio.wait([task])
    if task.cancelled():
        return False
    task.result()
    return True
