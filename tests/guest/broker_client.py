"""A program without privileges that receives into device memory by the broker: run by ``test_broker.py`` in a guest.

``broker_client.py NIC BROKER USER HOST PORT QUEUE``: becomes USER, opens NIC via BROKER, says ``listening``, receives
one stream to its end, and says by JSON what came of it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sys

import devmem_tcp as dmt
from devmem_tcp.broker.client import BrokerMemory
from devmem_tcp.buffers import CpuAccess

MIB = 1 << 20


def become(user: int) -> None:
    """Become another user, for good: no capability is left."""
    codecs.lookup("idna")  # which getaddrinfo would load later, from where another user may not read
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def main() -> None:
    nic_name, broker, user, host, port, queue = sys.argv[1:]
    become(int(user))
    with (
        dmt.open_nic(nic_name, backend="kernel", via=broker) as nic,
        BrokerMemory(broker).allocate(16 * MIB) as buffer,
        nic.set_header_split("on"),
        nic.set_rss(equal=1),
        nic.add_ntuple(dst_port=int(port), queue=int(queue)),
        nic.bind_rx(buffer, [int(queue)]) as rx,
        nic.listen((host, int(port)), strict=True) as listener,
    ):
        print("listening", flush=True)
        digest = hashlib.sha256()
        with listener.accept() as sock:
            while batch := sock.recv_frags():
                with batch, buffer.cpu_access(CpuAccess.READ) as memory:
                    for offset, size in zip(batch.offsets.tolist(), batch.sizes.tolist(), strict=True):
                        digest.update(memory[offset : offset + size])
            stats = sock.stats
        print(
            json.dumps(
                {
                    "sha256": digest.hexdigest(),
                    "dmabuf_bytes": stats.dmabuf_bytes,
                    "host_bytes": stats.host_bytes,
                    "dmabuf_id": rx.dmabuf_id,
                    "user": os.geteuid(),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
