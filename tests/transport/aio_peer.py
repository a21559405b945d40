"""A peer in a process of its own: ``aio_peer.py ROLE [HOST PORT]``. It says a line when it is where its role has it."""

from __future__ import annotations

import asyncio
import sys

import numpy as np

import devmem_tcp as dmt
from aio_ends import LOOPBACK, MIB, SIZE, pattern
from devmem_tcp import aio


def say(*words: object) -> None:
    print(*words, flush=True)


async def for_ever() -> None:
    await asyncio.Event().wait()


async def take_all(nic: dmt.Nic) -> None:
    """Compare each message with the pattern that its name is the seed of."""
    async with aio.open_receiver(nic, listen=LOOPBACK, size=SIZE) as receiver:
        assert receiver.address is not None
        say(*receiver.address)
        taken = 0
        async for message in receiver:
            with message:
                assert np.array_equal(message.gather().numpy(), pattern(message.nbytes, int(message.name)))
                taken += 1
        say(taken)


async def echo(nic: dmt.Nic, host: str, port: str) -> None:
    """Send back what comes."""
    async with aio.open_receiver(nic, listen=LOOPBACK, size=SIZE) as receiver:
        assert receiver.address is not None
        say(*receiver.address)
        async with aio.open_sender(nic, to=(host, int(port)), size=SIZE) as sender:
            async for message in receiver:
                with message:
                    await sender.send(message.gather(), message.name)


async def receive_one_and_go_deaf(nic: dmt.Nic) -> None:
    async with aio.open_receiver(nic, listen=LOOPBACK, size=SIZE) as receiver:
        assert receiver.address is not None
        say(*receiver.address)
        await receiver.receive()
        receiver._attendant._unwatch()
        say("deaf")
        await for_ever()


async def receive_and_hold(nic: dmt.Nic) -> None:
    async with aio.open_receiver(nic, listen=LOOPBACK, size=SIZE) as receiver:
        assert receiver.address is not None
        say(*receiver.address)
        held = []
        async for message in receiver:
            held.append(message)


async def never_answer(nic: dmt.Nic) -> None:
    async with aio.open_receiver(nic, listen=LOOPBACK, size=SIZE) as receiver:
        receiver._attendant._unwatch()
        assert receiver.address is not None
        say(*receiver.address)
        await for_ever()


async def send_one(nic: dmt.Nic, host: str, port: str) -> None:
    async with aio.open_sender(nic, to=(host, int(port)), size=SIZE) as sender:
        await sender.send(b"one", "one")
        await for_ever()


async def send_one_and_go_deaf(nic: dmt.Nic, host: str, port: str) -> None:
    async with aio.open_sender(nic, to=(host, int(port)), size=SIZE) as sender:
        await sender.send(b"one", "one")
        sender._attendant._unwatch()
        await for_ever()


async def send_one_and_a_part(nic: dmt.Nic, host: str, port: str) -> None:
    async with aio.open_sender(nic, to=(host, int(port)), size=SIZE) as sender:
        await sender.send(b"one", "one")
        try:
            await sender.send(np.zeros(64 * MIB, np.uint8), "large", timeout_s=0.0)
        finally:
            sender._attendant._unwatch()
            await for_ever()


ROLES = {
    role.__name__: role
    for role in (
        take_all,
        echo,
        receive_one_and_go_deaf,
        receive_and_hold,
        never_answer,
        send_one,
        send_one_and_go_deaf,
        send_one_and_a_part,
    )
}


async def main() -> None:
    with dmt.open_nic("soft0", backend="software") as nic:
        await ROLES[sys.argv[1]](nic, *sys.argv[2:])


if __name__ == "__main__":
    asyncio.run(main())
