"""The asyncio drivers: every verb, and how they end."""

from __future__ import annotations

import asyncio
import gc
import threading

import numpy as np
import pytest

import devmem_tcp as dmt
from aio_ends import (
    LOOPBACK,
    MIB,
    PATIENCE_S,
    SIZE,
    Pair,
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
from devmem_tcp.errors import BrokenError, ClosedError, LocalProtocolError, OutOfDeviceMemory, Timeout
from devmem_tcp.sansio.session import KeepAlive

# --- verbs ---


def test_an_array_comes_with_all_that_was_said_of_it() -> None:
    async def main() -> None:
        async with paired() as pair:
            array = np.arange(600_000, dtype=np.float32).reshape(600, 1000)
            task = asyncio.create_task(pair.sender.send(array, "weights", metadata={"step": 7}, confirm=True))
            with await pair.receiver.receive() as message:
                assert isinstance(message, aio.Message)
                assert (message.name, message.dtype, message.shape) == ("weights", "float32", (600, 1000))
                assert message.metadata == {"step": 7}
                assert np.array_equal(message.gather().numpy(), array)
            sent = await task
            await sent.wait_delivered()
            assert sent.delivered
            await sent.wait()
            assert sent.done

    run(main)


def test_an_end_can_be_awaited_and_closed_by_hand() -> None:
    async def main() -> None:
        with dmt.open_nic("soft0", backend="software") as nic, dmt.open_nic("soft1", backend="software") as far:
            receiver = await aio.open_receiver(nic, listen=LOOPBACK, size=SIZE)
            sender = await aio.open_sender(far, to=receiver.address, size=SIZE)
            await check_passes(Pair(sender, receiver))
            assert len(receiver.peers) == 1
            await asyncio.gather(sender.aclose(), sender.aclose())
            assert sender.closed
            await receiver.aclose()
            await receiver.aclose()
            assert receiver.closed

    run(main)


def test_a_sender_may_listen_and_a_receiver_go_to_it() -> None:
    async def main() -> None:
        with dmt.open_nic("soft0", backend="software") as nic, dmt.open_nic("soft1", backend="software") as far:
            async with aio.open_sender(far, listen=LOOPBACK, size=SIZE) as sender:
                connected = asyncio.create_task(sender.wait_connected(PATIENCE_S))
                async with aio.open_receiver(nic, to=sender.address, size=SIZE) as receiver:
                    assert (await connected)[0] == "127.0.0.1"
                    await check_passes(Pair(sender, receiver))

    run(main)


def test_a_slot_is_filled_in_place_and_sent_again() -> None:
    async def main() -> None:
        async with paired() as pair:
            with pair.sender.reserve((4, 8), "int32") as slot:
                for number in range(3):
                    slot.numpy()[:] = number
                    sent = await slot.send(f"slot {number}")
                    with await pair.receiver.receive() as message:
                        assert message.name == f"slot {number}"
                        assert np.array_equal(message.gather().numpy(), np.full((4, 8), number, np.int32))
                    await sent.wait()
            check_idle(pair)

    run(main)


def test_a_series_sends_messages_alike_and_then_anything_goes_again() -> None:
    async def main() -> None:
        async with paired() as pair:
            with pair.sender.reserve(1000, "uint8") as slot, pair.sender.reserve(999, "uint8") as other:
                async with pair.sender.series(1000, "uint8", "step") as series:
                    for number in range(5):
                        slot.numpy()[:] = pattern(1000, number)
                        sent = await series.send(slot)
                        assert await take(pair.receiver) == ("step", pattern(1000, number).tobytes())
                        await sent.wait()
                    with pytest.raises(LocalProtocolError, match="series"):
                        await pair.sender.send(b"between")
                    with pytest.raises(ValueError, match="999"):
                        await series.send(other)
                with pytest.raises(ClosedError, match="series has ended"):
                    await series.send(slot)
            await check_passes(pair)

    run(main)


def test_messages_of_one_series_may_be_sent_by_several_tasks() -> None:
    async def main() -> None:
        async with paired() as pair:
            slots = [pair.sender.reserve(100, "uint8") for _ in range(4)]
            async with pair.sender.series(100, "uint8", "step") as series:
                for number, slot in enumerate(slots):
                    slot.numpy()[:] = number
                await asyncio.gather(*(series.send(slot) for slot in slots))
                for number in range(4):
                    assert await take(pair.receiver) == ("step", bytes([number]) * 100)
            for slot in slots:
                slot.release()

    run(main)


def test_a_request_is_answered_or_says_why_not() -> None:
    async def main() -> None:
        async with paired() as pair:
            await pair.receiver.wait_connected()
            assert await pair.receiver.request(b"anything?", PATIENCE_S) == b""
            assert await asyncio.gather(*(pair.receiver.request(bytes([n])) for n in range(5))) == [b""] * 5
            pair.sender._attendant._unwatch()
            with pytest.raises(Timeout, match="no answer"):
                await pair.receiver.request(b"you, who do not run", 0.05)
            waiting = asyncio.create_task(pair.receiver.request(b"and now?"))
            await asyncio.sleep(0)
            await pair.sender.aclose()
            with pytest.raises(BrokenError, match="without an answer"):
                await waiting
        async with receiving() as alone:
            with pytest.raises(Timeout, match="1 senders"):
                await alone.wait_connected(timeout_s=0.02)
            with pytest.raises(LocalProtocolError, match="0 are connected"):
                await alone.request(b"")

    run(main)


def test_iterating_ends_once_every_sender_has_left() -> None:
    async def main() -> None:
        async with receiving(max_peers=2) as receiver:

            async def collect() -> list[str]:
                names = []
                async for message in receiver:
                    with message:
                        names.append(message.name)
                return names

            readers = [asyncio.create_task(collect()) for _ in range(2)]
            async with sending(receiver) as first, sending(receiver) as second:
                for number in range(3):
                    await first.send(b"x", f"first {number}")
                    await second.send(b"x", f"second {number}")
            found = [await reader for reader in readers]
            assert sorted(found[0] + found[1]) == [f"{who} {n}" for who in ("first", "second") for n in range(3)]

    run(main)


# --- room and credit ---


def test_a_reservation_waits_for_room_in_turn() -> None:
    async def main() -> None:
        async with paired() as pair:
            sender = pair.sender
            held = sender.reserve(SIZE, "uint8")
            with pytest.raises(OutOfDeviceMemory):
                sender.reserve(1, "uint8")
            with pytest.raises(OutOfDeviceMemory):
                await sender.wait_reserve(1, "uint8", timeout_s=0.02)
            large = asyncio.create_task(sender.wait_reserve(SIZE, "uint8"))
            small = asyncio.create_task(sender.wait_reserve(1, "uint8"))
            await asyncio.sleep(0)
            held.release()
            with pytest.raises(OutOfDeviceMemory):
                sender.reserve(1, "uint8")  # there is room, and others wait for it
            with await large as slot:
                assert slot.nbytes == SIZE
                assert not small.done()
            with await small as slot:
                assert slot.nbytes == 1
            check_idle(pair)

    run(main)


def test_a_slow_reader_holds_the_sender_up_and_lets_it_go() -> None:
    async def main() -> None:
        async with paired() as pair:
            held = await use_up_credit(pair)
            with pytest.raises(Timeout, match="no credit"):
                await pair.sender.send(b"x", timeout_s=0.02)
            waiting = asyncio.create_task(pair.sender.send(b"y", "late"))
            await asyncio.sleep(0)
            for message in held:
                message.release()
            await waiting
            assert await take(pair.receiver) == ("late", b"y")
            await check_passes(pair)

    run(main)


def test_memory_that_another_thread_gives_back_wakes_the_loop() -> None:
    async def main() -> None:
        async with paired() as pair:
            held = await use_up_credit(pair)
            waiting = asyncio.create_task(pair.sender.send(b"y", "late"))
            await asyncio.sleep(0)
            assert not waiting.done()

            def release() -> None:
                for message in held:
                    message.release()

            other = threading.Thread(target=release)
            other.start()
            other.join()
            await waiting
            assert await take(pair.receiver) == ("late", b"y")

    run(main)


# --- time ---


def test_what_does_not_come_in_time_is_a_timeout_and_may_be_waited_for_again() -> None:
    async def main() -> None:
        async with paired() as pair:
            with pytest.raises(Timeout, match=r"no message came in 0\.02 s"):
                await pair.receiver.receive(0.02)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await pair.receiver.receive()
            pair.receiver._attendant._unwatch()
            sent = await pair.sender.send(b"small", "small", confirm=True)
            with pytest.raises(Timeout, match="'small' was not confirmed"):
                await sent.wait_delivered(0.02)
            with pytest.raises(Timeout, match="'large' was not sent"):
                await pair.sender.send(np.zeros(64 * MIB, np.uint8), "large", timeout_s=0.05)
            assert await take(pair.receiver) == ("small", b"small")
            await sent.wait_delivered(PATIENCE_S)
            await check_passes(pair)
            check_idle(pair)

    run(main)


def test_nobody_there_is_a_timeout() -> None:
    async def main() -> None:
        with dmt.open_nic("soft0", backend="software") as nic:
            async with aio.open_sender(nic, listen=LOOPBACK, size=SIZE) as sender:
                with pytest.raises(Timeout, match=r"in 0\.02 s"):
                    await sender.wait_connected(0.02)
                with pytest.raises(ClosedError, match="no receiver has come"):
                    await sender.send(b"to whom?")

    run(main)


def test_a_peer_that_does_not_answer_the_handshake_is_a_timeout() -> None:
    async def main() -> None:
        async with receiving() as silent:
            silent._attendant._unwatch()
            with dmt.open_nic("soft1", backend="software") as nic:
                with pytest.raises(Timeout):
                    await aio.open_sender(nic, to=silent.address, size=SIZE, timeout_s=0.05)
                with pytest.raises(Timeout):
                    await aio.open_sender(nic, to=silent.address, size=SIZE, handshake_timeout_s=0.05)

    run(main)


def test_a_silent_peer_is_given_up_by_the_loops_clock() -> None:
    async def main() -> None:
        async with paired(sender={"keep_alive": KeepAlive(idle_s=0.02, pings=2)}) as pair:
            sent = await pair.sender.send(b"x", confirm=True)
            await take(pair.receiver)
            await sent.wait_delivered(PATIENCE_S)
            pair.receiver._attendant._unwatch()
            sent = await pair.sender.send(b"x", confirm=True)
            with pytest.raises(Timeout, match="no sign of life"):
                await sent.wait_delivered(PATIENCE_S)

    run(main)


# --- endings ---


def test_closing_waits_until_the_receiver_has_all() -> None:
    async def main() -> None:
        async with receiving() as receiver:
            data = pattern(SIZE)
            async with sending(receiver) as sender:
                sent = [await sender.send(data, str(number)) for number in range(3)]
                reader = asyncio.create_task(_collect(receiver, 3))
            assert all(each.delivered for each in sent)
            assert await reader == ["0", "1", "2"]

    run(main)


async def _collect(receiver: aio.Receiver, count: int) -> list[str]:
    return [(await take(receiver))[0] for _ in range(count)]


def test_who_waits_is_told_of_a_close() -> None:
    async def main() -> None:
        async with receiving() as receiver:
            waiting = [asyncio.create_task(receiver.receive()) for _ in range(3)]
            await asyncio.sleep(0)
            await receiver.aclose()
            for task in waiting:
                with pytest.raises(ClosedError):
                    await task
            with pytest.raises(ClosedError):
                await receiver.receive()

    run(main)


def test_an_exception_closes_at_once_and_the_peer_is_told() -> None:
    async def fail(receiver: aio.Receiver, waiting: list[asyncio.Task[aio.Sent]]) -> None:
        async with sending(receiver) as sender:
            await sender.send(b"x", "before")
            waiting.append(asyncio.create_task(sender.send(np.zeros(64 * MIB, np.uint8), "large")))
            await asyncio.sleep(0)
            raise KeyError

    async def main() -> None:
        async with receiving() as receiver:
            waiting: list[asyncio.Task[aio.Sent]] = []
            with pytest.raises(KeyError):
                await fail(receiver, waiting)
            with pytest.raises(ClosedError):
                await waiting[0]
            with pytest.raises(BrokenError, match="the sender was closed"):
                await _collect(receiver, 2)
            async with sending(receiver) as sender:  # others are not concerned
                await check_passes(Pair(sender, receiver))

    run(main)


def test_what_a_step_fails_with_is_told_who_waits_or_comes_next() -> None:
    async def main() -> None:
        wrong: list[OSError] = []

        async with paired() as pair:
            await check_passes(pair)
            poller = pair.receiver._engine.poller
            step = poller.step

            def failing(timeout_s: float | None, slice_s: float | None = None) -> None:
                for error in wrong:
                    raise error
                step(timeout_s, slice_s)

            poller.step = failing  # type: ignore[method-assign]
            waiting = [asyncio.create_task(pair.receiver.receive()) for _ in range(2)]
            await asyncio.sleep(0)
            wrong.append(OSError("first"))
            await pair.sender.send(b"x", "a")
            for task in waiting:
                with pytest.raises(OSError, match="first"):
                    await task
            with pytest.raises(OSError, match="first"):  # it has not got better
                await pair.receiver.receive(PATIENCE_S)
            wrong.clear()
            assert await take(pair.receiver) == ("a", b"x")
            wrong.append(OSError("second"))
            await pair.sender.send(b"y", "b")
            while pair.receiver._attendant._watching:
                await asyncio.sleep(0)
            wrong.clear()
            with pytest.raises(OSError, match="second"):
                await pair.receiver.receive(PATIENCE_S)
            assert await take(pair.receiver) == ("b", b"y")

    run(main)


def test_an_end_belongs_to_its_loop() -> None:
    with dmt.open_nic("soft0", backend="software") as nic:
        mine, other = asyncio.new_event_loop(), asyncio.new_event_loop()

        async def opened() -> aio.Receiver:
            return await aio.open_receiver(nic, listen=LOOPBACK, size=SIZE)

        receiver = mine.run_until_complete(opened())
        with pytest.raises(RuntimeError, match="another event loop"):
            other.run_until_complete(receiver.receive())
        with pytest.raises(RuntimeError, match="another event loop"):
            other.run_until_complete(receiver.aclose())
        with pytest.raises(Timeout):  # nothing was closed
            mine.run_until_complete(receiver.receive(0.0))
        mine.close()
        other.run_until_complete(receiver.aclose())
        assert receiver.closed
        other.close()


@pytest.mark.parametrize("verb", ["receive", "send"])
def test_what_waits_when_its_loop_is_closed_is_collected_in_peace(verb: str) -> None:
    mine, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    mine.set_exception_handler(lambda loop, problem: None)  # of the task that is destroyed
    nics = [dmt.open_nic(f"soft{number}", backend="software") for number in range(2)]

    async def begin() -> tuple[Pair, list[asyncio.Task[object]]]:
        receiver = await aio.open_receiver(nics[0], listen=LOOPBACK, size=SIZE)
        sender = await aio.open_sender(nics[1], to=receiver.address, size=SIZE, keep_alive=KeepAlive())
        large = np.zeros(64 * MIB, np.uint8)
        tasks: list[asyncio.Task[object]] = [
            asyncio.create_task(receiver.receive() if verb == "receive" else sender.send(large)) for _ in range(3)
        ]
        await turns(3)
        return Pair(sender, receiver), tasks

    async def end() -> None:
        for each in pair:
            await each.aclose()
            assert each.closed

    pair, tasks = mine.run_until_complete(begin())
    assert not any(task.done() for task in tasks)
    mine.close()
    while tasks:
        tasks.pop()
        gc.collect()
    other.run_until_complete(end())
    other.close()
    for nic in nics:
        nic.close()


def test_what_is_refused_when_it_is_opened_is_raised_where_it_is_entered() -> None:
    async def main() -> None:
        with dmt.open_nic("soft0", backend="software") as nic:
            with pytest.raises(ValueError, match="exactly one"):
                await aio.open_sender(nic)
            with pytest.raises(OutOfDeviceMemory):
                async with aio.open_receiver(nic, listen=LOOPBACK, size=4096):
                    raise AssertionError
            async with receiving() as receiver:
                gone = receiver.address
            with pytest.raises(ConnectionRefusedError):
                async with aio.open_sender(nic, to=gone, size=SIZE):
                    raise AssertionError

    run(main)
