"""What can be asked only of a NIC as it comes up: this file is the first to run.

Once queues were remade (fewer channels, a reset), Linux 7.3.4 may list NAPI instances out of order; a napi-get dump
then leaves some out, and the kernel warns in its log (net/core/netdev-genl.c, netdev_nl_napi_dump_one).
"""

from __future__ import annotations

import socket

from devmem_tcp.kernel import netdev
from devmem_tcp.uapi.netdev import QueueType
from far_end import NETIF


def test_each_queue_has_a_napi_instance_of_its_own() -> None:
    nic = socket.if_nametoindex(NETIF)
    queues = netdev.queues(nic)
    rx = [queue.queue for queue in queues if queue.type is QueueType.RX]
    tx = [queue.queue for queue in queues if queue.type is QueueType.TX]
    assert rx == list(range(len(rx)))
    assert tx == list(range(len(tx)))
    assert len(rx) > 2
    napis = {napi.napi_id: napi for napi in netdev.napis(nic)}
    assert {queue.napi_id for queue in queues} == set(napis)
    assert len(napis) == len(queues)
    assert all(napi.irq for napi in napis.values())
