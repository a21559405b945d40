"""Places of the software backend: who closes them when, what a receive into one costs, and many at once."""

from __future__ import annotations

import gc
import random
import signal
import socket
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest

import devmem_tcp as dmt
from devmem_tcp.errors import ClosedError, LeakWarning, Timeout
from devmem_tcp.software.binding import PageLock, PageWaiter, Reserved, SoftwareRxBinding
from devmem_tcp.software.socket import SoftwareSocket
from devmem_tcp.sys import calls

PAGES = 16
QUEUE = 3
PATIENCE_S = 20.0


class Ends(NamedTuple):
    """A binding of 16 pages, a connection that lands in it, and its far end."""

    rx: dmt.RxBinding
    sock: dmt.DevmemSocket
    peer: socket.socket
    nic: dmt.Nic

    def reserve(self, size_bytes: int) -> dmt.Place:
        place = self.rx.reserve(QUEUE, size_bytes)
        assert place is not None
        return place


@pytest.fixture
def ends() -> Iterator[Ends]:
    with ExitStack() as held:
        nic = held.enter_context(dmt.open_nic("soft0", "software"))
        buffer = held.enter_context(dmt.memory.Host().allocate(PAGES * 4096))
        nic.set_header_split("on")
        rx = held.enter_context(nic.bind_rx(buffer, [QUEUE]))
        listener = nic.listen(("127.0.0.1", 0))
        nic.add_ntuple(dst_port=listener.address[1], queue=QUEUE)
        peer = held.enter_context(socket.create_connection(listener.address))
        yield Ends(rx, held.enter_context(listener.accept()), peer, nic)


class Receive(threading.Thread):
    """A blocking receive into a place, in a thread; ``started`` once it is about to ask the system."""

    def __init__(self, sock: dmt.DevmemSocket, place: dmt.Place) -> None:
        super().__init__()
        self._sock = sock
        self._place = place
        self.started = threading.Event()
        self.taken = -1

    def run(self) -> None:
        self.taken = self._sock.recv_placed(self._place, 0, 10, all=True)

    def on_call(self, name: str) -> None:
        if name == "recv":
            self.started.set()


def test_a_blocking_receive_is_one_system_call(ends: Ends) -> None:
    made: list[str] = []
    with ends.reserve(100) as place:
        ends.peer.sendall(bytes(100))
        with calls.intercept(made.append):
            assert ends.sock.recv_placed(place, 0, 60, all=True) == 60
            assert ends.sock.recv_placed(place, 60, 40) == 40
    assert made == ["recv", "recv"]


def test_a_signal_cuts_a_receive_of_all_short(ends: Ends) -> None:
    ends.peer.sendall(b"some")
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        with ends.reserve(100) as place:
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # again and again: one may come before the receive waits
            assert ends.sock.recv_placed(place, 0, 100, all=True) == 4
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert bytes(place.view()[:4]) == b"some"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_closed_while_a_receive_is_under_way_it_keeps_its_pages_until_that_ends(ends: Ends) -> None:
    place = ends.reserve(10)
    receive = Receive(ends.sock, place)
    with calls.intercept(receive.on_call):
        receive.start()
        assert receive.started.wait(PATIENCE_S)
    place.close()
    with pytest.raises(ClosedError):
        place.view()
    assert not ends.rx.drained
    other = ends.reserve((PAGES - 1) * 4096)
    other.view()[:] = bytes(other.size_bytes)
    ends.peer.sendall(bytes(range(1, 11)))
    receive.join()
    assert receive.taken == 10
    assert not any(other.view())
    other.close()
    assert ends.rx.drained


def test_closing_a_place_wakes_a_reader_that_starves(ends: Ends) -> None:
    place = ends.reserve(PAGES * 4096)
    waiting = threading.Event()
    found: list[int] = []
    ends.peer.sendall(b"here")

    def read() -> None:
        with ends.sock.recv_frags() as batch:
            found.append(batch.nbytes)

    def on_call(name: str) -> None:
        if name == "eventfd2":  # the reader is about to wait for pages
            waiting.set()

    reader = threading.Thread(target=read)
    with calls.intercept(on_call):
        reader.start()
        assert waiting.wait(PATIENCE_S)
        place.close()
        reader.join()
    assert found == [4]


def test_a_report_names_tokens_and_places(ends: Ends) -> None:
    ends.reserve(1).close()
    ends.peer.sendall(bytes(4096))
    batch = ends.sock.recv_frags(4096)
    places = [ends.reserve(4097), ends.reserve((PAGES - 3) * 4096)]
    ends.peer.sendall(b"waits")
    ends.sock.settimeout(0.01)
    with pytest.raises(Timeout) as caught:
        ends.sock.recv_frags()
    assert "1 tokens (4096 bytes) for" in str(caught.value)
    assert f"; 2 places ({(PAGES - 1) * 4096} bytes) that the program reserved" in str(caught.value)
    batch.release()
    for place in places:
        place.close()


def test_a_place_in_a_cycle_is_given_back_by_the_garbage_collector_whoever_holds_the_pages(ends: Ends) -> None:
    """The collector runs where it likes: here within the lock that it needs itself."""
    loop: list[object] = [ends.reserve(PAGES * 4096)]
    loop.append(loop)
    del loop
    lock = ends.rx._lock  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lock:
            gc.collect()
            assert not ends.rx.drained
    assert [warning.category for warning in caught] == [LeakWarning]
    assert ends.rx.drained


def test_pages_handed_in_under_the_lock_are_taken_back_once_and_wake_who_waits() -> None:
    class Waiter:
        woken = 0

        def pages_freed(self) -> None:
            self.woken += 1

    waiter = Waiter()
    taken: list[Reserved] = []

    def take_back(all_reserved: Iterable[Reserved]) -> list[PageWaiter]:
        taken.extend(all_reserved)
        return [waiter]

    lock = PageLock(take_back)
    first, second, third = (Reserved(QUEUE, page, 1) for page in range(3))
    lock.hand_in(first)
    assert (taken, waiter.woken) == ([first], 1)
    with lock:
        lock.hand_in(second)
        lock.hand_in(third)
        assert taken == [first]
    assert (taken, waiter.woken) == ([first, second, third], 2)


def test_a_place_closed_while_its_waiter_is_being_told_tells_it_again(ends: Ends) -> None:
    """As the garbage collector may do it: in the thread that holds the waiter's own lock."""
    assert isinstance(ends.rx, SoftwareRxBinding)
    assert isinstance(ends.sock, SoftwareSocket)
    rx, readiness = ends.rx, ends.sock._readiness
    first, second, rest = ends.reserve(4096), ends.reserve(4096), ends.reserve((PAGES - 2) * 4096)
    ends.peer.sendall(b"waits")
    ends.sock.settimeout(0.001)
    with pytest.raises(Timeout):
        ends.sock.recv_frags()
    taken: list[dmt.Place] = []

    def on_call(name: str) -> None:
        if name == "eventfd_write" and not taken:
            taken.append(ends.reserve(4096))
            assert rx.wait_for_pages(readiness, QUEUE)
            second.close()

    assert rx.wait_for_pages(readiness, QUEUE)
    with calls.intercept(on_call):
        first.close()
    for place in (*taken, rest):
        place.close()
    assert rx.drained
    with ends.sock.recv_frags() as batch:
        assert batch.nbytes == 5


def test_a_hostile_nic_places_nothing() -> None:
    with dmt.open_nic("soft0", "software", software=dmt.SoftwareOptions(hostile_seed=1)) as nic:
        assert not nic.capabilities.placement


def test_many_threads_reserve_fill_look_and_close(ends: Ends) -> None:
    """No run is ever two places, and none is lost."""
    wrong: list[int] = []

    def use(mark: int) -> None:
        chance = random.Random(mark)
        for _ in range(300):
            place = ends.rx.reserve(QUEUE, chance.randint(1, 5 * 4096))
            if place is None:
                continue
            with place:
                pattern = bytes([mark]) * place.size_bytes
                place.view()[:] = pattern
                if place.view() != pattern:
                    wrong.append(mark)

    threads = [threading.Thread(target=use, args=(mark,)) for mark in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert ends.rx.drained
    ends.reserve(PAGES * 4096).close()


def test_places_and_frags_at_once_on_many_sockets(ends: Ends) -> None:
    """Readers by frags and by places share a pool that is too small for all: everybody finishes, byte-exact."""
    size = 1 << 19
    contents = [random.Random(index).randbytes(size) for index in range(4)]
    found: dict[int, bytes] = {}
    with ExitStack() as held:
        listener = held.enter_context(ends.nic.listen(("127.0.0.1", 0)))
        ends.nic.add_ntuple(dst_port=listener.address[1], queue=QUEUE)
        peers, socks = [], []
        for _ in contents:
            peers.append(held.enter_context(socket.create_connection(listener.address)))
            socks.append(held.enter_context(listener.accept()))

        def send(index: int) -> None:
            peers[index].sendall(contents[index])

        def read(index: int) -> None:
            data = bytearray()
            while len(data) < size:
                wanted = min(4 * 4096, size - len(data))
                place = ends.rx.reserve(QUEUE, wanted) if index % 2 and socks[index].lands_in else None
                if place is None:
                    with socks[index].recv_frags(3000) as batch:
                        data += bytes(dmt.gather(batch, ends.rx.buffer).data)
                else:
                    with place:
                        taken = socks[index].recv_placed(place, 0, wanted, all=True)
                        data += place.view()[:taken]
            found[index] = bytes(data)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4) for work in (send, read)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[index] for index in range(4)] == contents
    assert ends.rx.drained
