"""A thousand connections on one binding, and one hog among them."""

from __future__ import annotations

import contextlib
import resource
import socket
import tracemalloc
from collections.abc import Iterator

import pytest

import devmem_tcp as dmt
from devmem_tcp.errors import Timeout

CONNECTIONS = 1000
QUEUE, HOG_QUEUE = 2, 3
MEMORY_A_CONNECTION = 64 << 10  # bytes


@pytest.fixture(autouse=True)
def enough_fds() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def message(index: int) -> bytes:
    return f"connection {index} ".encode() * (index % 400 + 1)


def test_a_thousand_connections_and_a_hog_on_another_queue() -> None:
    peers: list[socket.socket] = []
    with (
        dmt.open_nic("soft0", "software") as nic,
        dmt.memory.Host().allocate(16 << 20) as buffer,
        nic.set_header_split("on"),
        nic.bind_rx(buffer, [QUEUE, HOG_QUEUE]) as rx,
        nic.listen(("127.0.0.1", 0), backlog=CONNECTIONS) as listener,
    ):
        nic.add_ntuple(dst_port=listener.address[1], queue=QUEUE)

        def connect() -> dmt.DevmemSocket:
            peers.append(socket.create_connection(listener.address))
            return listener.accept()

        hog = connect()
        hog_rule = dmt.FlowRule(HOG_QUEUE, dmt.Family.TCP4, src_port=hog.remote_address[1], location=0)
        nic.add_ntuple(hog_rule)
        starve(hog, peers[0])
        tracemalloc.start()
        socks = [connect() for _ in range(CONNECTIONS)]
        for index, peer in enumerate(peers[1:]):
            peer.sendall(message(index))
        for index, sock in enumerate(socks):
            assert receive(sock, buffer, len(message(index))) == message(index)
        memory, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert memory / CONNECTIONS < MEMORY_A_CONNECTION
        assert {holder.remote for holder in rx.holders()} == {hog.remote_address}
        assert nic.queue_stats(QUEUE).pages_inflight == 0
        for sock in (hog, *socks):
            sock.close()
        assert rx.drained
    for peer in peers:
        peer.close()


def starve(hog: dmt.DevmemSocket, peer: socket.socket) -> None:
    """Hold every page that the hog's queue has."""
    hog.settimeout(0.05)
    with pytest.raises(Timeout, match=f"no free page on RX queue {HOG_QUEUE}"):
        keep_all(hog, peer)


def keep_all(hog: dmt.DevmemSocket, peer: socket.socket) -> None:
    peer.settimeout(0)
    while True:
        with contextlib.suppress(BlockingIOError):
            peer.send(bytes(1 << 20))
        hog.recv_frags()


def receive(sock: dmt.DevmemSocket, buffer: dmt.Buffer, size: int) -> bytes:
    received = b""
    while len(received) < size:
        with sock.recv_frags() as batch:
            received += bytes(dmt.gather(batch, buffer))
    return received
