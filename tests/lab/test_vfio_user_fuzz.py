"""The vfio-user server under hostile clients; what must hold is said in ``vfio_fuzzer``."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vfio_fuzzer
from devmem_tcp.lab import vfio_protocol as wire
from devmem_tcp.lab import vfio_requests, vfio_user
from devmem_tcp.lab.dma import DmaSpace
from devmem_tcp.lab.vfio_protocol import Command
from fuzz_engines import Session, cases, run_random
from vfio_client import PAGE, REGISTERS, Client, engine, message, region_write
from vfio_fuzzer import CANARY, Arena


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep refusals, which are what this is about, out of the log; faults of the function too: they are judged."""
    log = logging.getLogger(vfio_user.__name__)
    before = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(before)


@given(case=cases())
def test_a_hostile_client_does_no_harm(case: bytes) -> None:
    vfio_fuzzer.run(case, Counter())


def test_hostile_clients_are_hostile_and_get_far() -> None:
    session = Session(vfio_fuzzer.run, 4000)
    run_random(session, seed=0)
    tally = session.tally
    assert tally["messages refused"] > 1000
    assert tally["messages"] - tally["messages refused"] > 1000
    assert tally["connections broken"] > 100
    assert tally["memory accesses refused"] > 200
    assert tally["memory accesses"] - tally["memory accesses refused"] > 200


@given(pieces=st.lists(st.binary(min_size=1, max_size=200), max_size=4), negotiated=st.booleans())
def test_arbitrary_bytes_do_no_harm(pieces: list[bytes], negotiated: bool) -> None:
    with closing(Arena()) as made:
        if not negotiated:
            made.client.close()
            made.client = Client(made.server, made.path, negotiate=False)
        made.feed(pieces)
        made.check()


commands = st.sampled_from([*Command, 0, 11, 12, 15])
requests = st.builds(message, commands, st.binary(max_size=64), flags=st.sampled_from([0, wire.NO_REPLY, 1, 0x20]))


@given(requests=st.lists(requests, min_size=1, max_size=5), fds=st.lists(st.integers(0, 4), max_size=3))
def test_arbitrary_payloads_do_no_harm(requests: list[bytes], fds: list[int]) -> None:
    with closing(Arena()) as made:
        made.feed(requests, [made.fds[index] for index in fds])
        made.check()


def test_the_judgement_notices_a_write_outside_what_was_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A space that forgets where a map ends must not pass here."""

    def careless(self: DmaSpace, address: int, data: bytes) -> None:
        os.pwrite(made.memory, data, address % PAGE)

    with closing(Arena()) as made:
        made.feed([engine(0, 8, 0x55), region_write(REGISTERS, 0, b"ok")])
        monkeypatch.setattr(DmaSpace, "write", careless)
        with pytest.raises(AssertionError):
            made.feed([engine(0, 8, 0xAA)])
        made.function.file[:] = os.pread(made.memory, len(CANARY), 0)  # let it close in peace


def believe_any_region(handler: vfio_requests.RequestHandler, region: int, offset: int, count: int) -> None:
    """Let accesses go past the end of a region."""


def map_all_for_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DmaSpace.map

    def careless(self: DmaSpace, address: int, size: int, fd: int, offset: int, *, writable: bool) -> None:
        honest(self, address, size, fd, offset, writable=True)

    monkeypatch.setattr(DmaSpace, "map", careless)


def check_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vfio_requests.RequestHandler, "_check_access", believe_any_region)


def keep_memory_of_who_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DmaSpace, "unmap_all", lambda self: None)


@pytest.mark.parametrize("plant", [map_all_for_writing, check_no_region, keep_memory_of_who_is_gone])
def test_planted_bugs_are_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run_random(Session(vfio_fuzzer.run, 3000), seed=0)
