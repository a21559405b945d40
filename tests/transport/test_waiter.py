"""Looking again before sleeping: where what was waited for came soon, and nowhere else."""

from __future__ import annotations

import pytest

import devmem_tcp as dmt
from devmem_tcp.contract import Place
from devmem_tcp.sys import calls
from devmem_tcp.transport.inbox import Share, SparePlaces
from devmem_tcp.transport.landing import PlacedLanding
from devmem_tcp.types import PAGE_SIZE
from tensor_ends import receiving

PAGES = 32


def test_who_was_not_kept_waiting_looks_again_the_next_time() -> None:
    with receiving() as receiver:
        engine = receiver._engine
        assert engine.looks == 0
        engine.wake()
        assert engine.wait_briefly()
        assert engine.looks > 0
        engine.step(0)
        assert not engine.wait_briefly(), "nothing happens"
        assert engine.looks == 0


def test_on_one_cpu_nobody_keeps_the_other_from_working(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "usable_cpus", lambda: 1)
    with receiving() as receiver:
        receiver._engine.wake()
        assert receiver._engine.wait_briefly()
        assert receiver._engine.looks == 0


class Lane:
    """A socket by which the bytes of ``comes`` come, one number for each read; 0: nothing yet."""

    def __init__(self, *comes: int) -> None:
        self.comes = list(comes)

    def recv_placed(self, place: Place, at: int, max_bytes: int) -> int:
        came = self.comes.pop(0)
        if not came:
            raise BlockingIOError
        return came

    def set_low_water(self, size_bytes: int) -> None:
        pass


class Waiter:
    def __init__(self, looks: int, *happens: bool) -> None:
        self.looks = looks
        self.happens = list(happens)

    def wait_briefly(self) -> bool:
        return self.happens.pop(0)


@pytest.mark.parametrize(
    ("comes", "looks", "happens", "whole"),
    [
        ((60, 40), 0, (), True),
        ((60, 0), None, (), False),  # takes what is here
        ((60, 0, 40), 0, (True,), True),
        ((60, 0, 0), 0, (True,), False),  # something else happened
        ((60, 0), 0, (False,), False),
        ((0, 0, 0, 100), 3, (), True),
        ((0, 0, 0, 0, 100), 3, (True,), True),
        ((0, 0, 0, 0, 0), 3, (True,), False),
        ((0, 0, 60, 0, 0, 40), 2, (), True),  # what comes begins it anew
        ((0, 0, 0, 60, 0, 0, 0), 2, (True, False), False),
    ],
)
def test_a_landing_looks_waits_and_gives_up(
    comes: tuple[int, ...], looks: int | None, happens: tuple[bool, ...], whole: bool
) -> None:
    with (
        dmt.open_nic("soft0", backend="software") as nic,
        dmt.memory.Host().allocate(PAGES * PAGE_SIZE) as buffer,
        nic.set_header_split("on"),
        nic.bind_rx(buffer, [0]) as binding,
    ):
        share = Share(binding, SparePlaces(binding, PAGES), PAGES * PAGE_SIZE, PAGES, placement=True)
        place = share.take(100)
        assert place
        landing = PlacedLanding(100, place, share)
        lane, waiter = Lane(*comes), None if looks is None else Waiter(looks, *happens)
        assert landing.receive_whole(lane, waiter) is whole  # type: ignore[arg-type]
        assert not lane.comes
        assert waiter is None or not waiter.happens
        assert landing.landed == landing.path.dmabuf == sum(comes)
        landing.close()
        share.drop_spare()
