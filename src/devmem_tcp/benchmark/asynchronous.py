"""The works by the asyncio driver. Each function is one end's side of one work: see ``drill``."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeAlias, TypeVar

from devmem_tcp.aio import Receiver, Sender, Slot, open_receiver, open_sender
from devmem_tcp.benchmark.blocking import ELEMENT
from devmem_tcp.benchmark.drill import LOOK_EVERY_S, NAME, Drill, ListeningTurn, MeasuringTurn, Tally
from devmem_tcp.benchmark.figures import Run
from devmem_tcp.benchmark.plan import Form
from devmem_tcp.benchmark.site import Site
from devmem_tcp.errors import Timeout

Outlet: TypeAlias = Callable[[], Awaitable[object]]
"""Sends the next message."""

Answer = TypeVar("Answer")


def receive(site: Site, turn: ListeningTurn) -> None:
    """See ``blocking.receive``."""
    asyncio.run(_receive(site, turn))


async def _receive(site: Site, turn: ListeningTurn) -> None:
    work = turn.work
    async with open_receiver(
        site.nic, listen=turn.listen, buffer=site.rx(work), max_peers=work.connections, **site.session
    ) as receiver:
        assert receiver.address is not None
        turn.ready(receiver.address, receiver.address)
        tally = Tally(turn, site.backend, receiver.stats)
        while not tally.over:
            with await patiently(turn, receiver.receive) as message:
                tally.take(message)
        turn.over(tally.figures)  # waits without the loop: nothing is measured any more


def echo(site: Site, turn: ListeningTurn) -> None:
    """See ``blocking.echo``."""
    asyncio.run(_echo(site, turn))


async def _echo(site: Site, turn: ListeningTurn) -> None:
    work = turn.work
    async with (
        open_sender(site.nic, listen=turn.listen_back, buffer=site.tx(work), **site.session) as sender,
        open_receiver(site.nic, listen=turn.listen, buffer=site.rx(work), **site.session) as receiver,
    ):
        assert receiver.address is not None
        assert sender.address is not None
        turn.ready(receiver.address, sender.address)
        await patiently(turn, sender.wait_connected)
        tally = Tally(turn, site.backend, lambda: [*receiver.stats(), *sender.stats()])
        with sender.reserve(work.size_bytes, ELEMENT) as slot:
            async with outlet(sender, slot, work.form) as answer:
                while not tally.over:
                    with await patiently(turn, receiver.receive) as message:
                        is_message = tally.take(message)
                    if is_message:
                        await answer()
        turn.over(tally.figures)


def send(site: Site, turn: MeasuringTurn) -> Run:
    """See ``blocking.send``; on one connection."""
    return asyncio.run(_send(site, turn))


async def _send(site: Site, turn: MeasuringTurn) -> Run:
    work = turn.work
    async with open_sender(
        site.nic, to=turn.to, buffer=site.tx(work), timeout_s=site.timeout_s, **site.session
    ) as sender:
        with sender.reserve(work.size_bytes, ELEMENT) as slot:
            drill = Drill(turn, site.backend, sender.stats)
            for step in drill.steps():
                async with outlet(sender, slot, work.form) as send_next:
                    for _ in range(step.messages):
                        await send_next()
                await mark(sender, step.mark, site.timeout_s)
        return drill.run([])


def ask(site: Site, turn: MeasuringTurn) -> Run:
    """See ``blocking.ask``."""
    return asyncio.run(_ask(site, turn))


async def _ask(site: Site, turn: MeasuringTurn) -> Run:
    work = turn.work
    laps_us: list[float] = []
    async with (
        open_receiver(
            site.nic, to=turn.back, buffer=site.rx(work), timeout_s=site.timeout_s, **site.session
        ) as receiver,
        open_sender(site.nic, to=turn.to, buffer=site.tx(work), timeout_s=site.timeout_s, **site.session) as sender,
    ):
        with sender.reserve(work.size_bytes, ELEMENT) as slot:
            drill = Drill(turn, site.backend, lambda: [*receiver.stats(), *sender.stats()])
            for step in drill.steps():
                async with outlet(sender, slot, work.form) as send_next:
                    laps_us = await _trips(drill, receiver, send_next, step.messages, site.timeout_s)
                await mark(sender, step.mark, site.timeout_s)
        return drill.run(laps_us)


async def _trips(drill: Drill, receiver: Receiver, send_next: Outlet, count: int, timeout_s: float) -> list[float]:
    laps_us = []
    for _ in range(count):
        began = time.perf_counter()
        await send_next()
        with await receiver.receive(timeout_s) as message:
            drill.meter.take(message)
        laps_us.append((time.perf_counter() - began) * 1e6)
    return laps_us


async def patiently(turn: ListeningTurn, attempt: Callable[[float], Awaitable[Answer]]) -> Answer:
    """See ``blocking.patiently``."""
    waited_s = 0.0
    while True:
        try:
            return await attempt(LOOK_EVERY_S)
        except Timeout:
            waited_s += LOOK_EVERY_S
            turn.look()
            if waited_s >= turn.timeout_s:
                raise


@contextlib.asynccontextmanager
async def outlet(sender: Sender, slot: Slot, form: Form) -> AsyncIterator[Outlet]:
    """See ``blocking.outlet``."""
    if form is Form.MESSAGES:
        yield partial(slot.send, NAME)
    else:
        async with sender.series(slot.shape, slot.dtype, NAME) as series:
            yield partial(series.send, slot)


async def mark(sender: Sender, name: str, timeout_s: float) -> None:
    """See ``blocking.mark``."""
    sent = await sender.send(b"", name, confirm=True)
    await sent.wait_delivered(timeout_s)
