"""Many tasks at one end, and one loop for many ends: who is served when, and that nobody is held up meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections import Counter

import pytest

from aio_ends import (
    MIB,
    PATIENCE_S,
    SIZE,
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
from devmem_tcp.aio import attendant
from devmem_tcp.memory import Host
from devmem_tcp.transport.engine import Engine
from devmem_tcp.transport.outbox import Outbox
from devmem_tcp.transport.poller import READABLE, Poller


def test_many_sends_at_once_go_in_the_order_in_which_they_began() -> None:
    async def main() -> None:
        async with paired() as pair:
            names = [str(number) for number in range(300)]  # more than there is credit for
            sends = [asyncio.create_task(pair.sender.send(name.encode(), name)) for name in names]
            assert [await take(pair.receiver) for _ in names] == [(name, name.encode()) for name in names]
            for task in sends:
                await (await task).wait(PATIENCE_S)
            check_idle(pair)

    run(main)


def test_large_sends_at_once_share_a_small_buffer() -> None:
    async def main() -> None:
        async with paired(receiver={"lanes": 3}, sender={"lanes": 3, "size": 3 * MIB}) as pair:
            arrays = [pattern(5 * MIB + 7 * number, number) for number in range(6)]
            sends = [asyncio.create_task(pair.sender.send(array)) for array in arrays]
            for array in arrays:
                assert (await take(pair.receiver))[1] == array.tobytes()
            await asyncio.gather(*sends)

    run(main)


def test_messages_go_to_those_who_wait_in_turn() -> None:
    async def main() -> None:
        async with paired() as pair:
            waiting = [asyncio.create_task(take(pair.receiver)) for _ in range(20)]
            await asyncio.sleep(0)
            for number in range(20):
                await pair.sender.send(b"", str(number))
            assert [(await task)[0] for task in waiting] == [str(number) for number in range(20)]

    run(main)


def test_one_who_gives_up_in_the_middle_of_a_line_holds_nobody_up() -> None:
    async def main() -> None:
        async with paired() as pair:
            waiting = [asyncio.create_task(take(pair.receiver)) for _ in range(5)]
            await asyncio.sleep(0)
            for index in (0, 2):
                waiting[index].cancel()
            for number in range(3):
                await pair.sender.send(b"", str(number))
            assert [(await waiting[index])[0] for index in (1, 3, 4)] == ["0", "1", "2"]
            with pytest.raises(asyncio.CancelledError):
                await waiting[0]

    run(main)


def test_what_one_takes_from_the_network_another_is_woken_for() -> None:
    async def main() -> None:
        async with paired() as pair:
            receiver = pair.receiver
            await check_passes(pair)
            asyncio.get_running_loop().remove_reader(receiver._engine.fileno())  # who waits first looks for itself
            asking = asyncio.create_task(receiver.request(b"?"))
            await turns(10)
            assert not asking.done()
            receiving = asyncio.create_task(receiver.receive())
            await turns(10)
            assert not receiving.done()
            assert asking.done()
            assert await asking == b""
            receiving.cancel()
            await asyncio.wait([receiving])
            receiver._attendant._watch()

    run(main)


def test_twenty_senders_to_one_receiver() -> None:
    async def main() -> None:
        async with receiving(max_peers=20, size=20 * MIB) as receiver:

            async def send_all(seed: int) -> None:
                async with sending(receiver, size=MIB) as sender:
                    for number in range(10):
                        await sender.send(pattern(50_000 + number, seed), f"{seed} {number}")

            async with asyncio.TaskGroup() as group:
                for seed in range(20):
                    group.create_task(send_all(seed))
                taken: Counter[int] = Counter()
                for _ in range(200):
                    with await receiver.receive(PATIENCE_S) as message:
                        seed, number = map(int, message.name.split())
                        assert number == taken[seed]
                        assert message.gather().tobytes() == pattern(50_000 + number, seed).tobytes()
                        taken[seed] += 1
            assert taken == dict.fromkeys(range(20), 10)

    run(main)


def test_a_loop_turns_while_work_never_has_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        turned = 0

        async def turn() -> None:
            nonlocal turned
            while True:
                await asyncio.sleep(0)
                turned += 1

        async with paired() as pair:
            sent = await pair.sender.send(b"x")
            await sent.wait()
            await take(pair.receiver)
            turning = asyncio.create_task(turn())
            await asyncio.sleep(0)
            turned = 0
            for _ in range(100):
                await sent.wait()
            found = turned
            turning.cancel()
            await asyncio.wait([turning])
        return found

    monkeypatch.setattr(attendant, "_SLICE_S", 0.0)
    assert run(main) >= 100
    monkeypatch.setattr(attendant, "_SLICE_S", 3600.0)
    assert run(main) == 0  # else the above says nothing


def test_an_end_with_nothing_to_do_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Engine] = []
    step = Engine.step

    def counted(self: Engine, timeout_s: float | None, slice_s: float | None = None) -> None:
        assert (timeout_s, self.may_block) == (0, False)  # nothing waits but the loop
        steps.append(self)
        step(self, timeout_s, slice_s)

    monkeypatch.setattr(Engine, "step", counted)

    async def main() -> None:
        async with paired() as pair:
            await check_passes(pair)
            held = await use_up_credit(pair)
            steps.clear()
            waiting = [
                asyncio.create_task(pair.sender.send(b"y")),
                asyncio.create_task(pair.receiver.receive()),
            ]
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await asyncio.wait(waiting)
            assert len(steps) <= 4
            for message in held:
                message.release()
            await asyncio.wait(waiting)
            waiting[1].result().release()  # type: ignore[attr-defined]

    run(main)


def test_a_poller_serves_everybody_by_turns_in_slices() -> None:
    poller = Poller()
    fds = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(5)]
    served: list[int] = []
    for fd in fds:
        poller.watch(fd, READABLE, lambda fd=fd: served.append(fd))  # type: ignore[misc]
    try:
        for turn in range(1, 11):
            poller.step(0, slice_s=0.0)
            assert len(served) == turn
        assert Counter(served) == dict.fromkeys(fds, 2)
        poller.step(0, slice_s=0.0)
        last = served[-1]
        rest = [fd for fd in fds if fd != last]
        for fd in rest:
            poller.forget(fd)  # among them those whose turn was postponed
        served.clear()
        poller.step(0)
        poller.step(0)
        assert set(served) == {last}
        poller.watch(rest[0], READABLE, lambda: served.append(rest[0]))
        served.clear()
        poller.step(0)
        assert sorted(served) == sorted([last, rest[0]])
    finally:
        poller.close()
        for fd in fds:
            os.close(fd)


def test_an_outbox_tells_of_room_whoever_found_none() -> None:
    class Binding:
        def close(self) -> None:
            pass

    told: list[bool] = []
    with Host().allocate(SIZE) as buffer:
        outbox = Outbox(buffer, Binding(), lambda: told.append(True))  # type: ignore[arg-type]
        window = outbox.take(SIZE - 4096)
        assert window is not None
        window.drop()
        assert told == []  # nobody had asked
        window = outbox.take(SIZE - 4096)
        assert window is not None
        assert outbox.fits(4096)
        assert not outbox.fits(4097)
        window.drop()
        assert told == [True]
        assert outbox.fits(SIZE)
        outbox.close()
