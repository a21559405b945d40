"""Serve many senders by one asyncio program: each array is added up as it comes.

    python examples/asyncio_server.py

Runs on any machine: see numpy_tensors.py on backends. The senders are tasks of the same event loop here; they might as
well be programs on other hosts, blocking or asyncio. No thread is started.
"""

import asyncio

import devmem_tcp as dmt
from devmem_tcp.aio import Receiver, open_receiver, open_sender

MIB = 1 << 20
SENDERS = 4
ARRAYS = 25  # of each


async def serve(receiver: Receiver, sums: dict[str, float]) -> None:
    """Add up what each sender sends. A server of your own may go on for ever: senders come and go."""
    for _ in range(SENDERS * ARRAYS):
        with await receiver.receive(timeout_s=30.0) as message:
            array = message.gather().numpy()
            sums[message.name] = sums.get(message.name, 0.0) + float(array.sum())


async def send(name: str, to: tuple[str, int] | None) -> None:
    """Send arrays alike, one after the other: as a series, in which a message costs no frame of its own."""
    with dmt.open_nic("soft1", backend="software") as nic:
        async with open_sender(nic, to=to, size=MIB) as sender:
            with sender.reserve((64, 64), "float64") as slot:
                async with sender.series(slot.shape, slot.dtype, name) as series:
                    for step in range(ARRAYS):
                        slot.numpy()[:] = step
                        sent = await series.send(slot)
                        await sent.wait()  # before the slot is changed


async def main() -> None:
    sums: dict[str, float] = {}
    with dmt.open_nic("soft0", backend="software") as nic:
        # Each of max_peers senders has an even share of the memory, so that none can starve another.
        receiving = open_receiver(nic, listen=("127.0.0.1", 0), size=16 * MIB, max_peers=SENDERS)
        async with receiving as receiver, asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(receiver, sums))
            for number in range(SENDERS):
                tasks.create_task(send(f"sender {number}", receiver.address))
    for name, total in sorted(sums.items()):
        print(f"{name}: {ARRAYS} arrays, sum {total:,.0f}")


if __name__ == "__main__":
    asyncio.run(main())
