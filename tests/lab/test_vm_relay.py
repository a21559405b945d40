"""The relay between a guest's channels and this process."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Iterator

import pytest

from devmem_tcp.lab.vm import guest_init
from devmem_tcp.lab.vm.relay import Relay, Resizes


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    mine, other = socket.socketpair()
    with mine, other:
        yield mine, other


@pytest.fixture
def relay() -> Iterator[Relay]:
    with contextlib.closing(Relay()) as made:
        yield made


def test_output_is_handed_on_until_its_peer_closes(relay: Relay, pair: tuple[socket.socket, socket.socket]) -> None:
    mine, other = pair
    got = bytearray()
    relay.add_output(mine, got.extend)
    other.sendall(b"one ")
    relay.turn(1.0)
    other.sendall(b"two")
    other.close()
    while relay.has_output(mine):
        relay.turn(1.0)
    assert bytes(got) == b"one two"


@pytest.mark.parametrize("size", [0, 1, 1 << 16, 3_000_001])
def test_input_from_a_file_arrives_whole_at_a_slow_job(
    relay: Relay, pair: tuple[socket.socket, socket.socket], size: int
) -> None:
    mine, guest = pair
    sent, got = os.urandom(size), bytearray()
    job, feeds_job = os.pipe()
    feed = threading.Thread(
        target=guest_init.feed_input, args=(guest.fileno(), feeds_job, lambda: os.close(feeds_job)), daemon=True
    )

    def read_job() -> None:
        while data := os.read(job, 1000):
            got.extend(data)

    reader = threading.Thread(target=read_job, daemon=True)
    with tempfile.TemporaryFile() as source:
        source.write(sent)
        source.seek(0)
        relay.set_input(source.fileno(), mine)
        feed.start()
        reader.start()
        while reader.is_alive():
            relay.turn(0.01)
    feed.join()
    reader.join()
    os.close(job)
    assert bytes(got) == sent


def test_input_for_a_guest_that_is_gone_is_dropped(relay: Relay, pair: tuple[socket.socket, socket.socket]) -> None:
    mine, other = pair
    readable, writable = os.pipe()
    os.write(writable, b"text")
    relay.set_input(readable, mine)
    other.close()
    for _ in range(4):
        relay.turn(0.0)
    os.close(readable)
    os.close(writable)


def test_sizes_of_the_terminal_go_between_the_pieces_of_input(
    relay: Relay, pair: tuple[socket.socket, socket.socket]
) -> None:
    mine, guest = pair
    keys, types = os.pipe()
    changed, changes = os.pipe()
    sizes = iter([(50, 132), (24, 80)])
    relay.set_input(keys, mine, Resizes(changed, lambda: next(sizes)))
    os.write(types, b"before")
    relay.turn(1.0)  # read
    os.write(changes, b"several at once")
    os.write(types, b"after")
    for _ in range(3):
        relay.turn(0.0)
    os.write(changes, b"again")
    os.close(types)
    for _ in range(10):
        relay.turn(0.0)
    resize = b"\xff\xff\xff\xff"
    sent = guest.recv(1000)
    assert sent.startswith(b"\x06\0\0\0before" + resize + b"\x32\0\x84\0" + b"\x05\0\0\0after")
    assert resize + b"\x18\0\x50\0" in sent
    assert sent.count(resize) == 2
    os.write(changes, b"after the end")
    relay.turn(0.0)
    guest.setblocking(False)
    with pytest.raises(BlockingIOError):
        guest.recv(1)
    for fd in (keys, changed, changes):
        os.close(fd)


def test_a_size_for_a_guest_that_is_gone_is_dropped(relay: Relay, pair: tuple[socket.socket, socket.socket]) -> None:
    mine, guest = pair
    keys, types = os.pipe()
    changed, changes = os.pipe()
    relay.set_input(keys, mine, Resizes(changed, lambda: (24, 80)))
    guest.close()
    for _ in range(3):
        os.write(changes, b"x")
        relay.turn(0.0)
        relay.turn(0.0)
    for fd in (keys, types, changed, changes):
        os.close(fd)
