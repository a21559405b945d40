"""Messages of any sizes, alone and in series, over one lane or several, through Buffers that hold little of them: all
come, whatever is waited for on the way. By chance, but the same each time."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from typing import NamedTuple

import numpy as np
import pytest

from devmem_tcp import SoftwareOptions
from devmem_tcp.errors import Timeout
from devmem_tcp.transport import Message, Receiver, Sender
from tensor_ends import MIB, receiving, sending

KIB = 1 << 10
LIMIT_S = 20.0


class Batch(NamedTuple):
    """Messages alike."""

    nbytes: int
    messages: int
    in_series: bool
    told: bool  # how many there will be


class Plan:
    """What to send and how, for a seed."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self.lanes = chance.choice((1, 1, 2, 3))
        self.buffer_bytes = chance.choice((128 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB))
        self.held = chance.randrange(4)
        self.hostile = chance.choice((None, None, None, seed))
        largest = chance.choice((5_000, 70_000, 300_000, MIB))
        self.batches = [
            Batch(chance.randint(1, largest), chance.randint(1, 10), chance.random() < 0.6, chance.random() < 0.5)
            for _ in range(chance.randint(1, 5))
        ]

    @property
    def messages(self) -> list[tuple[int, int]]:
        """Return size and content of each message."""
        return [
            (batch.nbytes, number % 251) for number, batch in enumerate(self.batches) for _ in range(batch.messages)
        ]

    def send(self, sender: Sender) -> None:
        for number, batch in enumerate(self.batches):
            data = np.full(batch.nbytes, number % 251, np.uint8)
            if not batch.in_series:
                for _ in range(batch.messages):
                    sender.send(data, timeout_s=LIMIT_S)
                continue
            count = batch.messages if batch.told else None
            with sender.reserve(data.shape, data.dtype, LIMIT_S) as slot:
                slot.numpy()[:] = data
                with sender.series(data.shape, data.dtype, count=count) as series:
                    for _ in range(batch.messages):
                        series.send(slot, LIMIT_S)


class Holder:
    """Keeps some messages for a while, as far as there is room for the largest to come besides."""

    def __init__(self, plan: Plan, receiver: Receiver) -> None:
        self._plan = plan
        self._receiver = receiver
        self._messages: deque[Message] = deque()
        self._largest = max(batch.nbytes for batch in plan.batches)

    def take(self, message: Message) -> tuple[int, int]:
        content = np.unique(message.gather().numpy())
        assert len(content) == 1
        message.keep()
        self._messages.append(message)
        while self._messages and (len(self._messages) > self._plan.held or not self._fits()):
            self._messages.popleft().release()
        return message.nbytes, int(content[0])

    def _fits(self) -> bool:
        links = self._receiver._engine.links
        held = sum(message.nbytes for message in self._messages)
        return bool(links) and held + self._largest <= links[0].room_bytes

    def drop(self) -> None:
        while self._messages:
            self._messages.popleft().release()


def test_few_bytes_after_many_that_used_up_all_credit() -> None:
    with receiving(size=128 * KIB) as receiver:
        (thread := threading.Thread(target=receiver.wait_connected)).start()
        with sending(receiver) as sender:
            thread.join()
            room = receiver._engine.links[0].room_bytes
            sender.send(np.ones(room, np.uint8))
            many = receiver.receive(LIMIT_S)
            (thread := threading.Thread(target=sender.send, args=(np.ones(100, np.uint8),))).start()
            while not receiver._engine.links[0]._headers:  # until it is announced
                with contextlib.suppress(Timeout):
                    receiver.receive(0.01)
            many.release()
            few = receiver.receive(LIMIT_S)
            assert (many.nbytes, few.nbytes) == (room, 100)
            few.release()
            thread.join()
            sender._engine.close()


@pytest.mark.parametrize("seed", range(100))
def test_all_messages_come(seed: int) -> None:
    plan = Plan(seed)
    software = None if plan.hostile is None else SoftwareOptions(hostile_seed=plan.hostile)
    with receiving(size=plan.buffer_bytes, lanes=plan.lanes, software=software) as receiver:
        holder = Holder(plan, receiver)
        received: list[tuple[int, int]] = []

        def drive() -> None:
            for message in receiver:
                received.append(holder.take(message))
            holder.drop()

        thread = threading.Thread(target=drive)
        thread.start()
        try:
            with sending(receiver, lanes=plan.lanes) as sender:
                plan.send(sender)
        finally:
            thread.join(LIMIT_S)
        assert received == plan.messages
