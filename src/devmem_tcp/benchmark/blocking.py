"""The works by the blocking driver. Each function is one end's side of one work: see ``drill``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, TypeAlias, TypeVar

from devmem_tcp.benchmark.drill import LOOK_EVERY_S, NAME, Drill, ListeningTurn, MeasuringTurn, Tally
from devmem_tcp.benchmark.figures import Run
from devmem_tcp.benchmark.plan import Form
from devmem_tcp.benchmark.site import Site
from devmem_tcp.errors import Timeout
from devmem_tcp.transport import Receiver, Sender, Slot, open_receiver, open_sender

Outlet: TypeAlias = Callable[[], object]
"""Sends the next message of one connection."""

ELEMENT: Final = "uint8"

Answer = TypeVar("Answer")


def receive(site: Site, turn: ListeningTurn) -> None:
    """Receive all messages of a work."""
    work = turn.work
    with open_receiver(
        site.nic, listen=turn.listen, buffer=site.rx(work), max_peers=work.connections, **site.session
    ) as receiver:
        assert receiver.address is not None
        turn.ready(receiver.address, receiver.address)
        tally = Tally(turn, site.backend, receiver.stats)
        while not tally.over:
            with patiently(turn, receiver.receive) as message:
                tally.take(message)
        turn.over(tally.figures)


def echo(site: Site, turn: ListeningTurn) -> None:
    """Answer each message with one of the same size, by a session of the other direction."""
    work = turn.work
    with (  # the sender is closed last: the other end closes its own first, and waits for the receiver meanwhile
        open_sender(site.nic, listen=turn.listen_back, buffer=site.tx(work), **site.session) as sender,
        open_receiver(site.nic, listen=turn.listen, buffer=site.rx(work), **site.session) as receiver,
    ):
        assert receiver.address is not None
        assert sender.address is not None
        turn.ready(receiver.address, sender.address)
        patiently(turn, sender.wait_connected)
        tally = Tally(turn, site.backend, lambda: [*receiver.stats(), *sender.stats()])
        with sender.reserve(work.size_bytes, ELEMENT) as slot, outlet(sender, slot, work.form) as answer:
            while not tally.over:
                with patiently(turn, receiver.receive) as message:
                    is_message = tally.take(message)
                if is_message:
                    answer()
        turn.over(tally.figures)


def send(site: Site, turn: MeasuringTurn) -> Run:
    """Send all messages of a work, on all of its connections by turns."""
    work = turn.work
    to_peer = partial(open_sender, site.nic, to=turn.to, buffer=site.tx(work), timeout_s=site.timeout_s, **site.session)
    with contextlib.ExitStack() as held:
        senders = [held.enter_context(to_peer()) for _ in range(work.connections)]
        slots = [held.enter_context(sender.reserve(work.size_bytes, ELEMENT)) for sender in senders]
        drill = Drill(turn, site.backend, lambda: [one for sender in senders for one in sender.stats()])
        for step in drill.steps():
            with contextlib.ExitStack() as outlets:
                pairs = zip(senders, slots, strict=True)
                sends = [outlets.enter_context(outlet(sender, slot, work.form)) for sender, slot in pairs]
                for _ in range(step.messages):
                    for send_next in sends:
                        send_next()
            mark(senders, step.mark, site.timeout_s)
        return drill.run([])


def ask(site: Site, turn: MeasuringTurn) -> Run:
    """Send messages and wait for the answer to each; returns how long each took as well."""
    work = turn.work
    laps_us: list[float] = []
    with (  # the receiver first: the other end waits for it before it looks at anything else
        open_receiver(
            site.nic, to=turn.back, buffer=site.rx(work), timeout_s=site.timeout_s, **site.session
        ) as receiver,
        open_sender(site.nic, to=turn.to, buffer=site.tx(work), timeout_s=site.timeout_s, **site.session) as sender,
        sender.reserve(work.size_bytes, ELEMENT) as slot,
    ):
        drill = Drill(turn, site.backend, lambda: [*receiver.stats(), *sender.stats()])
        for step in drill.steps():
            with outlet(sender, slot, work.form) as send_next:
                laps_us = _trips(drill, receiver, send_next, step.messages, site.timeout_s)
            mark([sender], step.mark, site.timeout_s)
        return drill.run(laps_us)


def _trips(drill: Drill, receiver: Receiver, send_next: Outlet, count: int, timeout_s: float) -> list[float]:
    laps_us = []
    for _ in range(count):
        began = time.perf_counter()
        send_next()
        with receiver.receive(timeout_s) as message:
            drill.meter.take(message)
        laps_us.append((time.perf_counter() - began) * 1e6)
    return laps_us


def patiently(turn: ListeningTurn, attempt: Callable[[float], Answer]) -> Answer:
    """Wait for the other end by attempts of a limited time, as long as it is there.

    Raises:
        Timeout: not in the time that it has.
        DevmemError, ConnectionError: it is not there any more.
    """
    waited_s = 0.0
    while True:
        try:
            return attempt(LOOK_EVERY_S)
        except Timeout:
            waited_s += LOOK_EVERY_S
            turn.look()
            if waited_s >= turn.timeout_s:
                raise


@contextlib.contextmanager
def outlet(sender: Sender, slot: Slot, form: Form) -> Iterator[Outlet]:
    """Yield what sends a slot once more, as messages or as a series."""
    if form is Form.MESSAGES:
        yield partial(slot.send, NAME)
    else:
        with sender.series(slot.shape, slot.dtype, NAME) as series:
            yield partial(series.send, slot)


def mark(senders: Sequence[Sender], name: str, timeout_s: float) -> None:
    """Send a mark on each connection, and wait until the receiver has all that was sent."""
    for sent in [sender.send(b"", name, confirm=True) for sender in senders]:
        sent.wait_delivered(timeout_s)
