"""One end of a session, as a program: ``tensor_end.py send|receive BACKEND NIC HOST PORT BYTES [BROKER]``.

It says JSON lines.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

import devmem_tcp as dmt
from devmem_tcp.broker.client import BrokerMemory
from devmem_tcp.buffers import Allocator
from devmem_tcp.transport import open_receiver, open_sender

KEY = b"the key that both ends of a test have"
MESSAGE_BYTES = 4 << 20
BUFFER_BYTES = 32 << 20
PATIENCE_S = 60.0


def tensor(number: int, nbytes: int) -> npt.NDArray[np.uint32]:
    """Return message ``number``, like no other and nowhere like itself."""
    words = np.arange(nbytes // 4, dtype=np.uint32)
    return (words * np.uint32(2654435761)) ^ np.uint32(number * 0x9E3779B1 & 0xFFFFFFFF)


def sizes(total: int) -> list[int]:
    """Return the sizes of messages that come to so many bytes, one of them larger than what a receiver is granted."""
    large = min(total // 4, BUFFER_BYTES // 2)
    rest = total - large
    return [large] + [min(MESSAGE_BYTES, rest - at) for at in range(0, rest, MESSAGE_BYTES)]


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def receive(nic: dmt.Nic, memory: Allocator | None, host: str, port: int) -> None:
    found = {"dmabuf": 0, "linear": 0, "host": 0, "messages": 0, "wrong": 0}
    with open_receiver(nic, listen=(host, port), memory=memory, size=BUFFER_BYTES, key=KEY, lanes=2) as receiver:
        say(listening=receiver.address)
        for message in receiver:
            with message:
                array = message.gather().numpy()
                found["wrong"] += not np.array_equal(array, tensor(found["messages"], message.nbytes))
                del array
                found["messages"] += 1
                for path in ("dmabuf", "linear", "host"):
                    found[path] += getattr(message.path, path)
    say(**found)


def send(nic: dmt.Nic, memory: Allocator | None, host: str, port: int, total: int) -> None:
    bound: dict[str, Any] = {"memory": memory, "size": BUFFER_BYTES // 2}
    with open_sender(nic, to=(host, port), key=KEY, lanes=2, timeout_s=PATIENCE_S, **bound) as sender:
        for number, nbytes in enumerate(sizes(total)):
            sender.send(tensor(number, nbytes), f"tensor {number}")
        stats = sender.stats()
    say(
        sent_dmabuf=sum(one.sent_dmabuf_bytes for one in stats),
        sent_host=sum(one.sent_host_bytes for one in stats),
    )


def main(role: str, backend: str, nic_name: str, host: str, port: str, total: str, broker: str = "") -> None:
    memory = BrokerMemory(broker) if broker else None
    with dmt.open_nic(nic_name, backend=backend, via=broker or None) as nic:
        if role == "receive":
            receive(nic, memory, host, int(port))
        else:
            send(nic, memory, host, int(port), int(total))


if __name__ == "__main__":
    main(*sys.argv[1:])
