"""Cancelling every verb after each turn of the loop that it takes: both ends go on, or say why not, and nothing leaks.

Each scenario is run over and over, and its verb is cancelled after one turn of the loop, two, three …, until it is done
before that. Afterwards a message must pass, or both ends must have been told what ended the session.
"""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest

import devmem_tcp as dmt
from aio_ends import (
    LOOPBACK,
    MIB,
    PATIENCE_S,
    SIZE,
    Pair,
    cancel_after,
    cancel_everywhere,
    check_idle,
    check_passes,
    paired,
    pattern,
    receiving,
    run,
    sending,
    take,
    turns,
    use_up_credit,
)
from devmem_tcp import aio
from devmem_tcp.errors import BrokenError

ONE = pattern(3 * MIB + 5, 1)  # larger than what may be under way


async def take_until_probe(pair: Pair) -> list[str]:
    """Send a message, and take everything up to it; returns the names of what came before."""
    names = []
    probe = asyncio.create_task(pair.sender.send(b"probe", "probe"))
    while (came := await take(pair.receiver)) != ("probe", b"probe"):
        assert came == ("one", ONE.tobytes())
        names.append(came[0])
    await (await probe).wait(PATIENCE_S)
    return names


def test_receive() -> None:
    async def scenario(count: int) -> bool:
        async with paired() as pair:
            sent = asyncio.create_task(pair.sender.send(ONE, "one"))
            got: list[tuple[str, bytes]] = []

            async def receive() -> None:
                with await pair.receiver.receive() as message:
                    got.append((message.name, message.gather().tobytes()))

            done = await cancel_after(count, receive())
            if not done:
                got.append(await take(pair.receiver))
            assert got == [("one", ONE.tobytes())]
            await sent
            await check_passes(pair)
            check_idle(pair)
        return done

    cancel_everywhere(scenario, 4)


def test_iterate() -> None:
    async def scenario(count: int) -> bool:
        async with receiving() as receiver:
            names = []

            async def iterate() -> None:
                async for message in receiver:
                    with message:
                        names.append(message.name)

            async def send() -> None:
                async with sending(receiver) as sender:
                    for number in range(3):
                        await sender.send(b"x", str(number))

            source = asyncio.create_task(send())
            done = await cancel_after(count, iterate())
            async for message in receiver:
                with message:
                    names.append(message.name)
            assert names == ["0", "1", "2"]
            await source
        return done

    cancel_everywhere(scenario, 6)


@pytest.mark.parametrize("lanes", [1, 3])
def test_send(lanes: int) -> None:
    async def scenario(count: int) -> bool:
        async with paired(receiver={"lanes": lanes}, sender={"lanes": lanes, "size": 4 * MIB}) as pair:
            done = await cancel_after(count, pair.sender.send(ONE, "one"))
            names = await take_until_probe(pair)
            assert names == ["one"] or (names == [] and not done)
            await check_passes(pair)
            check_idle(pair)
        return done

    cancel_everywhere(scenario, 2)


def test_send_that_waits_for_credit() -> None:
    async def scenario(count: int) -> bool:
        async with paired() as pair:
            held = await use_up_credit(pair)

            async def release() -> None:
                await turns(3)
                for message in held:
                    message.release()

            releasing = asyncio.create_task(release())
            done = await cancel_after(count, pair.sender.send(ONE, "one"))
            await releasing
            names = await take_until_probe(pair)
            assert names == ["one"] or (names == [] and not done)
            await check_passes(pair)
            check_idle(pair)
        return done

    cancel_everywhere(scenario, 4)


def test_sends_behind_one_that_is_cancelled() -> None:
    async def scenario(count: int) -> bool:
        async with paired() as pair:
            first = asyncio.create_task(cancel_after(count, pair.sender.send(pattern(len(ONE), 7), "first")))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            behind = asyncio.create_task(pair.sender.send(ONE, "one"))
            names = [(await pair.receiver.receive()).name]
            if names == ["first"]:
                names.append((await pair.receiver.receive()).name)
            done = await first
            assert names == ["first", "one"] or (names == ["one"] and not done)
            await behind
        return done

    cancel_everywhere(scenario, 2)


def test_slot_sent_and_waited_for() -> None:
    async def scenario(count: int) -> bool:
        async with paired(sender={"size": 4 * MIB}) as pair:

            async def send() -> None:
                with pair.sender.reserve(len(ONE), "uint8") as slot:
                    slot.numpy()[:] = ONE
                    sent = await slot.send("one", confirm=True)
                    await sent.wait()
                    await sent.wait_delivered()

            done = await cancel_after(count, send())
            names = await take_until_probe(pair)
            assert names == ["one"] or (names == [] and not done)
            check_idle(pair)
        return done

    cancel_everywhere(scenario, 4)


def test_wait_reserve() -> None:
    async def scenario(count: int) -> bool:
        async with paired() as pair:
            held = pair.sender.reserve(SIZE, "uint8")

            async def reserve() -> None:
                with await pair.sender.wait_reserve(SIZE, "uint8") as slot:
                    assert slot.nbytes == SIZE

            async def release() -> None:
                await turns(2)
                held.release()

            releasing = asyncio.create_task(release())
            done = await cancel_after(count, reserve())
            await releasing
            await check_passes(pair)
            check_idle(pair)
        return done

    cancel_everywhere(scenario, 3)


def test_series() -> None:
    async def scenario(count: int) -> bool:
        async with paired(sender={"size": 8 * MIB}) as pair:

            async def send() -> None:
                with pair.sender.reserve(len(ONE), "uint8") as slot:
                    slot.numpy()[:] = ONE
                    async with pair.sender.series(len(ONE), "uint8", "one") as series:
                        for _ in range(3):
                            await (await series.send(slot)).wait()

            done = await cancel_after(count, send())
            assert len(await take_until_probe(pair)) in ((3,) if done else (0, 1, 2, 3))
            await check_passes(pair)
            check_idle(pair)
        return done

    cancel_everywhere(scenario, 4)


def test_request() -> None:
    async def scenario(count: int) -> bool:
        async with paired() as pair:
            await check_passes(pair)
            done = await cancel_after(count, pair.receiver.request(b"?"))
            assert pair.receiver._engine._answers == {}
            assert await pair.receiver.request(b"again?", PATIENCE_S) == b""
            await check_passes(pair)
        return done

    cancel_everywhere(scenario, 2)


def test_open_sender() -> None:
    async def scenario(count: int) -> bool:
        async with receiving(max_peers=2) as receiver:
            with dmt.open_nic("soft1", backend="software") as nic:

                async def go() -> None:
                    async with aio.open_sender(nic, to=receiver.address, size=SIZE):
                        pass

                done = await cancel_after(count, go())
            async with sending(receiver) as sender:
                sent = asyncio.create_task(sender.send(ONE, "one"))
                while True:  # the session that was cancelled may have come about
                    with contextlib.suppress(BrokenError, ConnectionError):
                        assert await take(receiver) == ("one", ONE.tobytes())
                        break
                await sent
        return done

    cancel_everywhere(scenario, 5)


def test_open_receiver_and_wait_connected() -> None:
    async def scenario(count: int) -> bool:
        with dmt.open_nic("soft0", backend="software") as nic, dmt.open_nic("soft1", backend="software") as far:
            sender = await aio.open_sender(far, listen=LOOPBACK, size=SIZE)
            connected = asyncio.create_task(cancel_after(count, sender.wait_connected()))
            await asyncio.sleep(0)

            async def come() -> None:
                async with aio.open_receiver(nic, to=sender.address, size=SIZE):
                    pass

            done = await cancel_after(count, come())
            await connected
            await wait_gone(sender)
            async with aio.open_receiver(nic, to=sender.address, size=SIZE) as receiver:
                await sender.wait_connected(PATIENCE_S)
                await check_passes(Pair(sender, receiver))
            with contextlib.nullcontext() if done else contextlib.suppress(BrokenError):
                await sender.aclose()  # which may say how the session ended that was cancelled
            assert sender.closed
        return done

    cancel_everywhere(scenario, 5)


async def wait_gone(sender: aio.Sender) -> None:
    """Wait until a receiver that left, or was about to come, is gone: there may be one at a time."""
    reception = sender._engine.reception
    assert reception is not None
    async with asyncio.timeout(PATIENCE_S):
        while sender._engine.links or reception.waiting or reception._strangers:
            await asyncio.sleep(0)


def test_aclose_of_a_sender() -> None:
    async def scenario(count: int) -> bool:
        async with receiving() as receiver:
            with dmt.open_nic("soft1", backend="software") as nic:
                sender = await aio.open_sender(nic, to=receiver.address, size=SIZE)
                sent = [asyncio.create_task(sender.send(ONE, "one")) for _ in range(2)]
                await turns(3)
                done = await cancel_after(count, sender.aclose())
                assert sender.closed
                ended = await asyncio.gather(*sent, return_exceptions=True)
            whole = 0
            with contextlib.suppress(BrokenError):
                async for message in receiver:
                    with message:
                        assert message.gather().tobytes() == ONE.tobytes()
                        whole += 1
            if done:
                assert whole == 2
                assert not any(isinstance(end, Exception) for end in ended)
            async with sending(receiver) as another:
                await check_passes(Pair(another, receiver))
        return done

    cancel_everywhere(scenario, 3)


def test_aclose_of_a_receiver() -> None:
    async def scenario(count: int) -> bool:
        with dmt.open_nic("soft0", backend="software") as nic:
            receiver = await aio.open_receiver(nic, listen=LOOPBACK, size=SIZE)
            with dmt.open_nic("soft1", backend="software") as far:
                sender = await aio.open_sender(far, to=receiver.address, size=SIZE)
                await check_passes(Pair(sender, receiver))
                done = await cancel_after(count, receiver.aclose())
                assert receiver.closed
                if done:
                    await sender.aclose()
                else:
                    with contextlib.suppress(BrokenError):  # unless it had answered by then
                        await sender.aclose()
                assert sender.closed
        return done

    cancel_everywhere(scenario, 2)


def test_a_task_group_that_fails_cancels_what_is_sent() -> None:
    async def fail(pair: Pair) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(pair.sender.send(np.zeros(64 * MIB, np.uint8), "large"))
            group.create_task(pair.sender.send(np.zeros(64 * MIB, np.uint8), "large, too"))
            group.create_task(pair.receiver.receive())
            await turns(5)
            raise KeyError

    async def main() -> None:
        async with paired() as pair:
            with pytest.raises(ExceptionGroup):
                await fail(pair)
            assert await take_until_probe(pair) == []
            await check_passes(pair)
            check_idle(pair)

    run(main)


def test_a_loop_that_ends_in_the_midst_of_it_leaves_nothing() -> None:
    async def whole() -> None:
        async with paired() as pair:
            await asyncio.gather(pair.receiver.receive(), pair.sender.send(np.zeros(64 * MIB, np.uint8)))

    async def main() -> None:
        task = asyncio.create_task(whole())
        await turns(20)
        assert not task.done()

    asyncio.run(main())  # which cancels what is left
