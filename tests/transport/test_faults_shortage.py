"""accept(2) fails: the receiver lives on, at rest, serves whom it has, takes others later."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import struct
import time
import warnings
from collections.abc import Iterator

import pytest

import aio_ends
import devmem_tcp as dmt
from devmem_tcp import aio
from devmem_tcp.errors import ShortageWarning
from devmem_tcp.sys import calls
from devmem_tcp.transport import open_sender
from devmem_tcp.transport.engine import Engine
from fault_ends import LOOPBACK, MIB, Nursery, Survivor, nursery, same, surviving
from fault_peer import KEY, OPTIONS, pattern

SHORTAGES = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]
GONE = [
    errno.ECONNABORTED,
    errno.ENETDOWN,
    errno.EPROTO,
    errno.ENOPROTOOPT,
    errno.EHOSTDOWN,
    errno.ENONET,
    errno.EHOSTUNREACH,
    errno.EOPNOTSUPP,
    errno.ENETUNREACH,
    errno.EPERM,
]
"""accept(2), "Error handling": what the network reported of a connection before it was accepted; a firewall's."""


@pytest.fixture(scope="module")
def peers() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


class Failing:
    """Counts calls of one name, and has those after ``after`` fail, ``failing`` of them."""

    def __init__(self, code: int, *, call: str = "accept4", after: int = 0, failing: int = 1 << 30) -> None:
        self.count = 0
        self.failing = failing
        self._code = code
        self._call = call
        self._after = after

    def __call__(self, name: str) -> None:
        if name == self._call:
            self.count += 1
            if self.count > self._after and self.failing:
                self.failing -= 1
                raise OSError(self._code, os.strerror(self._code))


def see_that_it_rests(engine: Engine) -> None:
    """Step for a third of a second: what is tried again each tenth of it takes few steps."""
    end, steps = time.monotonic() + 0.35, 0
    while (left := end - time.monotonic()) > 0:
        engine.step(left)
        steps += 1
    assert 2 <= steps <= 12


@contextlib.contextmanager
def no_file_descriptors() -> Iterator[None]:
    """Let this process open nothing more. Kernel: RLIMIT_NOFILE is above the highest number that a new fd may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def told_once() -> Iterator[list[str]]:
    """Expect one warning of a shortage, and no other; yields its text, once it was given."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
        (warning,) = caught
        assert warning.category is ShortageWarning
        told.append(str(warning.message))


# --- shortages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", SHORTAGES, ids=errno.errorcode.get)
@pytest.mark.parametrize(
    "after", [0, 2], ids=["control", "data"]
)  # 2: the control connection, and that there is no more
def test_who_comes_in_a_shortage_waits_until_it_is_over(peers: Nursery, code: int, after: int) -> None:
    with (
        surviving(max_peers=2) as end,
        peers.peer("honest_sender", address=address_of(end), seeds=[1, 2], lanes=1) as old,
    ):
        old.go()
        end.drive(lambda: end.names == ["honest 1"], old)
        short = Failing(code, after=after)
        with (
            told_once() as told,
            calls.intercept(short),
            peers.peer("honest_sender", address=address_of(end), seeds=[3], lanes=1) as new,
        ):
            end.drive(lambda: short.count > after, new)
            see_that_it_rests(end.receiver._engine)
            assert short.count <= after + 12
            old.go()
            end.drive(lambda: end.names == ["honest 1", "honest 2"], old)
            assert not end.errors
            assert len(end.receiver.peers) <= 1
            short.failing = 0
            new.go()
            end.drive(lambda: "honest 3" in end.names and not end.receiver.peers, new)
        assert same(end.messages[-1][1], pattern(3))
        assert not end.errors
        assert not end.receiver.refused
        assert f"accept says {errno.errorcode[code]} ({os.strerror(code)})" in told[0]
        assert "hint: " in told[0]


def address_of(end: Survivor) -> tuple[str, int]:
    assert end.receiver.address is not None
    return end.receiver.address


def test_a_process_without_file_descriptors(peers: Nursery) -> None:
    with (
        surviving(max_peers=2) as end,
        peers.peer("honest_sender", address=address_of(end), seeds=[1, 2], lanes=1) as old,
    ):
        old.go()
        end.drive(lambda: end.names == ["honest 1"], old)
        with told_once() as told, peers.peer("honest_sender", address=address_of(end), seeds=[3], lanes=1) as new:
            new.go()
            with no_file_descriptors():
                end.drive(lambda: end.receiver._engine.deadline() is not None, new)
                see_that_it_rests(end.receiver._engine)
                old.go()
                end.drive(lambda: "honest 2" in end.names, old)
                assert "honest 3" not in end.names
            end.drive(lambda: "honest 3" in end.names and not end.receiver.peers, new)
        assert not end.errors
        assert not end.receiver.refused
        assert "EMFILE (Too many open files)" in told[0]
        assert "ulimit -n" in told[0]
        assert "LimitNOFILE=" in told[0]


def test_a_data_connection_that_cannot_be_watched_is_refused_and_the_receiver_lives_on(peers: Nursery) -> None:
    short = Failing(errno.EMFILE, call="eventfd2", failing=1)  # what a lane is watched by, besides its own fd
    with surviving() as end:
        with (
            told_once(),
            calls.intercept(short),
            peers.peer("honest_sender", address=address_of(end), seeds=[1], lanes=1) as new,
        ):
            end.drive(lambda: end.receiver.refused == 1, new)
            assert "Too many open files" in end.receiver.last_refusal
        with peers.peer("honest_sender", address=address_of(end), seeds=[2], lanes=1) as new:
            new.go()
            end.drive(lambda: end.names == ["honest 2"], new)
        assert not end.errors


def test_a_listening_sender_rests_as_well() -> None:
    short = Failing(errno.EMFILE)
    with (
        dmt.open_nic("soft1", backend="software", software=OPTIONS) as nic,
        told_once(),
        open_sender(nic, listen=LOOPBACK, size=MIB, key=KEY) as sender,
    ):
        assert sender.address is not None
        with calls.intercept(short), socket.create_connection(sender.address):
            see_that_it_rests(sender._engine)
        assert short.count >= 2


def test_by_asyncio_the_loop_rests_as_well(peers: Nursery) -> None:
    short = Failing(errno.EMFILE)

    async def serve() -> None:
        with dmt.open_nic("soft0", backend="software", software=OPTIONS) as nic:
            async with aio.open_receiver(nic, listen=LOOPBACK, size=4 * MIB, key=KEY) as receiver:
                loop = asyncio.get_running_loop()
                with peers.peer("honest_sender", address=receiver.address, seeds=[1], lanes=1) as peer:
                    peer.go()
                    came = asyncio.create_task(receiver.receive(aio_ends.PATIENCE_S))
                    began = loop.time()
                    async with asyncio.timeout(aio_ends.PATIENCE_S):
                        while short.count < 4:
                            await asyncio.sleep(0.01)
                    assert loop.time() - began > 0.15, "it tries again and again"
                    assert not came.done()
                    short.failing = 0
                    with await came as message:
                        assert message.name == "honest 1"

    with told_once(), calls.intercept(short):
        aio_ends.run(serve)


# --- errors of one connection --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", GONE, ids=errno.errorcode.get)
@pytest.mark.parametrize("after", [0, 2], ids=["control", "data"])
def test_what_the_network_reported_of_a_connection_is_no_error_of_the_receiver(
    peers: Nursery, code: int, after: int
) -> None:
    broken = Failing(code, after=after, failing=1)
    with surviving() as end, calls.intercept(broken):
        with peers.peer("honest_sender", address=address_of(end), seeds=[1], lanes=1) as peer:
            peer.go()
            end.drive(lambda: end.names == ["honest 1"] and not end.receiver.peers, peer)
        assert not end.errors
        assert end.receiver.refused == 1
        assert end.receiver.last_refusal.endswith(os.strerror(code))
    assert not broken.failing


@pytest.mark.parametrize("data", [False, True], ids=["control", "data"])
def test_who_resets_the_connection_before_it_is_accepted_harms_nobody(peers: Nursery, data: bool) -> None:
    with surviving() as end:
        host, port = address_of(end)
        reception = end.receiver._engine.reception
        assert reception is not None
        with socket.create_connection((host, reception._data.address[1] if data else port)) as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close resets it
        end.drive(lambda: end.receiver.refused == 1)
        with peers.peer("honest_sender", address=(host, port), seeds=[1], lanes=1) as peer:
            peer.go()
            end.drive(lambda: end.names == ["honest 1"], peer)
        assert not end.errors


def test_a_mistake_with_the_listening_socket_is_told() -> None:
    with (
        surviving() as end,
        calls.intercept(Failing(errno.EINVAL, failing=1)),
        socket.create_connection(address_of(end)),
        pytest.raises(OSError, match="Invalid argument"),
    ):
        end.receiver._engine.step(5.0)
