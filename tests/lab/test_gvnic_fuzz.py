"""A hostile guest gets nothing out of the gVNIC but answers; what must hold is said in ``gvnic_fuzzer``."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given

import gvnic_fuzzer
from choices import Choices
from devmem_tcp.lab.dma import DmaSpace
from devmem_tcp.lab.gvnic.rings import Ring
from devmem_tcp.lab.gvnic.state import DeviceState
from fuzz_engines import Session, cases, run_random
from gvnic_fuzzer import HostileGuest


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Keep mistakes, which are what this is about, out of the log."""
    caplog.set_level(logging.ERROR)


@given(case=cases())
def test_a_hostile_guest_does_no_harm(case: bytes) -> None:
    gvnic_fuzzer.run(case, Counter())


def test_hostile_guests_are_hostile_and_get_far() -> None:
    session = Session(gvnic_fuzzer.run, 4000)
    run_random(session, seed=0)
    tally = session.tally
    assert tally["guest mistakes"] > 1000
    assert tally["packets to the wire"] > 500
    assert tally["packets received"] > 200
    assert tally["memory accesses refused"] > 200
    assert tally["memory accesses"] - tally["memory accesses refused"] > 1000


def write_where_it_is_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DmaSpace.map

    def careless(self: DmaSpace, address: int, size: int, fd: int, offset: int, *, writable: bool) -> None:
        honest(self, address, size, fd, offset, writable=True)

    monkeypatch.setattr(DmaSpace, "map", careless)


def raise_at_the_end_of_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Ring, dma: DmaSpace, first: int, end: int) -> memoryview:
        data = dma.read(self.address + first * self.entry_bytes, (end - first) * self.entry_bytes)
        if end == self.entries > 64:
            raise IndexError("off by one")
        return data

    monkeypatch.setattr(Ring, "_read", careless)


def keep_state_over_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DeviceState.reset

    def careless(self: DeviceState) -> None:
        if not hasattr(self, "tx"):
            honest(self)

    monkeypatch.setattr(DeviceState, "reset", careless)


@pytest.mark.parametrize("plant", [write_where_it_is_read_only, raise_at_the_end_of_a_ring, keep_state_over_resets])
def test_planted_bugs_are_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        run_random(Session(gvnic_fuzzer.run, 3000), seed=0)


def test_mistakes_are_logged_without_flooding(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    guest = HostileGuest(Choices())
    before = guest.nic.mistakes.counts["bar-write"]
    for _ in range(1000):
        guest.nic.write_bar(0, 0x1000, b"\0")
    assert (before, guest.nic.mistakes.counts["bar-write"]) == (0, 1000)
    lines = [record for record in caplog.records if "bar-write" in record.getMessage()]
    assert len(lines) == 10
    guest.close()
