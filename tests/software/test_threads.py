"""Several readers of one small binding, each in its thread: no wake-up is lost, no byte, no page."""

from __future__ import annotations

import hashlib
import random
import socket
import threading

import pytest

import devmem_tcp as dmt
from devmem_tcp.sys import calls

READERS = 6
PAGES = 3
READ = 2 * 4096
SIZE = 1 << 20
QUEUE = 1


def send(address: tuple[str, int], data: bytes) -> None:
    with socket.create_connection(address) as peer:
        peer.sendall(data)


def digest_of(sock: dmt.DevmemSocket, buffer: dmt.Buffer) -> bytes:
    digest = hashlib.sha256()
    while batch := sock.recv_frags(READ):
        with batch:
            digest.update(dmt.gather(batch, buffer).data)
    return digest.digest()


def hold_every_page(hog: dmt.DevmemSocket, nic: dmt.Nic) -> None:
    while nic.queue_stats(QUEUE).pages_inflight < nic.queue_stats(QUEUE).pages_total:
        hog.recv_frags(4096)


@pytest.mark.filterwarnings("ignore::devmem_tcp.errors.StarvationWarning")  # a busy machine: over a second
@pytest.mark.parametrize("hostile_seed", [None, 1, 2])
def test_readers_that_starve_are_all_woken_and_finish(hostile_seed: int | None) -> None:
    contents = [random.Random(index).randbytes(SIZE) for index in range(READERS)]
    found: list[bytes] = []
    waiting = threading.Semaphore(0)

    def on_call(name: str) -> None:
        if name == "eventfd2":  # a reader is about to wait for pages
            waiting.release()

    with (
        dmt.open_nic("soft0", "software", software=dmt.SoftwareOptions(hostile_seed=hostile_seed)) as nic,
        dmt.memory.Host().allocate(PAGES * 4096) as buffer,
        nic.set_header_split("on"),
        nic.bind_rx(buffer, [QUEUE]) as rx,
        nic.listen(("127.0.0.1", 0)) as listener,
        nic.add_ntuple(dst_port=listener.address[1], queue=QUEUE),
        socket.create_connection(listener.address) as hog_peer,
        listener.accept() as hog,
    ):
        hog_peer.sendall(bytes(1 << 20))
        hold_every_page(hog, nic)
        senders = [threading.Thread(target=send, args=(listener.address, content)) for content in contents]
        for sender in senders:
            sender.start()
        socks = [listener.accept() for _ in range(READERS)]
        readers = [threading.Thread(target=lambda sock=sock: found.append(digest_of(sock, buffer))) for sock in socks]
        with calls.intercept(on_call):
            for reader in readers:
                reader.start()
            for _ in range(READERS):
                assert waiting.acquire(timeout=20)
            hog.close()
            for thread in (*readers, *senders):
                thread.join()
        for sock in socks:
            stats = sock.stats
            assert stats.dmabuf_bytes + stats.linear_bytes + stats.host_bytes == SIZE
            sock.close()
        assert rx.drained
    assert sorted(found) == sorted(hashlib.sha256(content).digest() for content in contents)
