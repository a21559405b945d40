"""Two loops: in two processes, in two threads; and a peer that is killed while something is awaited."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import devmem_tcp as dmt
from aio_ends import LOOPBACK, MIB, PATIENCE_S, SIZE, Pair, check_passes, pattern, receiving, run, sending, take, turns
from devmem_tcp import aio
from devmem_tcp.errors import ClosedError, Timeout
from devmem_tcp.types import Address

PEER = Path(__file__).with_name("aio_peer.py")


class Process:
    """A peer, and what it says."""

    def __init__(self, role: str, *words: object) -> None:
        command = [sys.executable, str(PEER), role, *map(str, words)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def hear(self) -> list[str]:
        """Return the words of its next line; nothing else runs meanwhile."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().split()

    def hear_address(self) -> Address:
        host, port = self.hear()
        return host, int(port)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        with self._process:
            return self._process.wait(PATIENCE_S)


@contextlib.contextmanager
def peer(role: str, *words: object) -> Iterator[Process]:
    process = Process(role, *words)
    try:
        yield process
    finally:
        process.kill()
        process.end()


@contextlib.asynccontextmanager
async def sending_to(address: Address) -> Any:
    with dmt.open_nic("soft0", backend="software") as nic:
        async with aio.open_sender(nic, to=address, size=SIZE) as sender:
            yield sender


def test_messages_of_all_sizes_pass_between_processes() -> None:
    sizes = [0, 1, 4096, 65_537, MIB, 5 * MIB + 3] * 3

    async def main() -> None:
        with peer("take_all") as process:
            async with sending_to(process.hear_address()) as sender:
                for seed, size in enumerate(sizes):
                    await sender.send(pattern(size, seed), str(seed))
            assert process.hear() == [str(len(sizes))]
            assert process.end() == 0

    run(main)


async def ping_pong(receiver: aio.Receiver, sender: aio.Sender, size: int, rounds: int) -> None:
    for number in range(rounds):
        data = pattern(size, number)
        await sender.send(data, str(number))
        assert await take(receiver) == (str(number), data.tobytes())


@pytest.mark.parametrize(("size", "rounds"), [(4096, 100), (MIB, 10)])
def test_ping_pong_between_processes(size: int, rounds: int) -> None:
    async def main() -> None:
        async with receiving() as receiver:
            assert receiver.address is not None
            with peer("echo", *receiver.address) as process:
                async with sending_to(process.hear_address()) as sender:
                    await ping_pong(receiver, sender, size, rounds)
                assert [message async for message in receiver] == []
                assert process.end() == 0

    run(main)


def test_ping_pong_between_two_loops_of_one_process() -> None:
    errors: list[BaseException] = []

    async def echo(address: Address, tell: Callable[[Address], None]) -> None:
        async with receiving() as receiver:
            assert receiver.address is not None
            tell(receiver.address)
            with dmt.open_nic("soft1", backend="software") as nic:
                async with aio.open_sender(nic, to=address, size=SIZE) as sender:
                    async for message in receiver:
                        with message:
                            await sender.send(message.gather(), message.name)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with receiving() as receiver:
            known: asyncio.Future[Address] = loop.create_future()

            def tell(address: Address) -> None:
                loop.call_soon_threadsafe(known.set_result, address)

            def other() -> None:
                try:
                    asyncio.run(echo(receiver.address or LOOPBACK, tell))
                except BaseException as error:
                    errors.append(error)

            thread = threading.Thread(target=other)
            thread.start()
            async with sending_to(await known) as sender:
                await ping_pong(receiver, sender, 4096, 100)
            assert [message async for message in receiver] == []
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    run(main)
    assert errors == []


# --- killed ---


async def check_killed(process: Process, verb: Awaitable[Any]) -> None:
    """Kill the peer while a verb waits for it."""
    task = asyncio.ensure_future(verb)
    await turns(50)
    assert not task.done()
    process.kill()
    with pytest.raises(ConnectionError):
        async with asyncio.timeout(PATIENCE_S):
            await task


async def iterate(receiver: aio.Receiver) -> None:
    async for message in receiver:
        message.release()


async def request(receiver: aio.Receiver) -> None:
    await receiver.request(b"?")


@pytest.mark.parametrize(
    ("role", "verb"),
    [
        ("send_one", aio.Receiver.receive),
        ("send_one", iterate),
        ("send_one_and_a_part", aio.Receiver.receive),
        ("send_one_and_go_deaf", request),
    ],
)
def test_a_receiver_whose_sender_is_killed(role: str, verb: Callable[[aio.Receiver], Awaitable[Any]]) -> None:
    async def main() -> None:
        async with receiving() as receiver:
            assert receiver.address is not None
            with peer(role, *receiver.address) as process:
                assert await take(receiver) == ("one", b"one")
                await check_killed(process, verb(receiver))
            # whoever receives is told once, and who asked for something besides
            with pytest.raises(ConnectionError if verb is request else Timeout):
                await receiver.receive(0.0)
            async with sending(receiver) as another:
                await check_passes(Pair(another, receiver))

    run(main)


async def wait_delivered(sender: aio.Sender) -> None:
    sent = await sender.send(b"two", "two", confirm=True)
    await sent.wait_delivered()


async def send_large(sender: aio.Sender) -> None:
    await sender.send(np.zeros(64 * MIB, np.uint8))


async def send_on(sender: aio.Sender) -> None:
    while True:
        await sender.send(b"more")


@pytest.mark.parametrize("verb", [send_large, send_on, wait_delivered, aio.Sender.aclose])
def test_a_sender_whose_receiver_is_killed(verb: Callable[[aio.Sender], Awaitable[None]]) -> None:
    async def main() -> None:
        role = "receive_and_hold" if verb is send_on else "receive_one_and_go_deaf"
        with peer(role) as process:
            async with sending_to(process.hear_address()) as sender:
                await sender.send(b"one", "one")
                if role == "receive_one_and_go_deaf":
                    assert process.hear() == ["deaf"]
                await check_killed(process, verb(sender))
                with pytest.raises(ClosedError if verb is aio.Sender.aclose else ConnectionError):
                    await sender.send(b"too late")

    run(main)


def test_a_peer_that_is_killed_in_the_handshake() -> None:
    async def main() -> None:
        with peer("never_answer") as process, dmt.open_nic("soft0", backend="software") as nic:
            address = process.hear_address()

            async def go() -> None:
                await aio.open_sender(nic, to=address, size=SIZE)

            await check_killed(process, go())

    run(main)
