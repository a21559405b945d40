"""Places: payload received into one contiguous run of the Buffer, where a backend can do that."""

from __future__ import annotations

import gc
import socket
import threading
import warnings

from devmem_tcp.contract import DevmemSocket, Place, RxBinding
from devmem_tcp.errors import BusyError, ClosedError, LeakWarning, LocalProtocolError, Timeout
from devmem_tcp.testing.contract.exhaustion import ready
from devmem_tcp.testing.contract.expect import needs, raises
from devmem_tcp.testing.contract.rig import STARVE_WAIT_S, BoundPair, Rig
from devmem_tcp.types import PAGE_SIZE


def reserve(rx: RxBinding, size_bytes: int) -> Place:
    place = rx.reserve(rx.queues[0], size_bytes)
    assert place is not None, f"no place of {size_bytes} bytes"
    return place


def fill(sock: DevmemSocket, place: Place, at: int, size: int) -> None:
    """Receive ``size`` bytes from byte ``at`` on, in as many calls as it takes."""
    end = at + size
    while at < end:
        taken = sock.recv_placed(place, at, end - at)
        assert 0 < taken <= end - at, f"{taken} bytes came where {end - at} were missing"
        at += taken


def reserve_every_page(rx: RxBinding) -> list[Place]:
    places = []
    while (place := rx.reserve(rx.queues[0], 1)) is not None:
        places.append(place)
    return places


def still_works(rig: Rig, pair: BoundPair) -> None:
    """Check that nothing is held any more, and that payload lands in frags as ever."""
    assert pair.rx.drained
    rig.transfer(pair.collector, pair.peer, 2 * pair.rx.buffer.size_bytes)


@needs(lacking=("placement",))
def test_nothing_is_reserved_where_nothing_can_be_placed(rig: Rig) -> None:
    pair = rig.bound_pair()
    assert pair.rx.reserve(rig.queue, 1) is None
    assert pair.sock.lands_in is None
    with raises(ValueError):
        pair.rx.reserve(rig.queue, 0)
    with raises(ValueError):
        pair.rx.reserve(rig.second_queue, 1)
    pair.rx.close()
    with raises(ClosedError):
        pair.rx.reserve(rig.queue, 1)


@needs("placement")
def test_payload_is_contiguous_and_exact(rig: Rig) -> None:
    pair = rig.bound_pair()
    size = 20 * PAGE_SIZE + 17
    data = rig.payload(size)
    with reserve(pair.rx, size) as place:
        assert place.binding is pair.rx
        assert place.size_bytes == size
        assert place.offset % PAGE_SIZE == 0
        before = bytes(pair.rx.buffer.view())
        pair.peer.sendall(data)
        assert pair.sock.lands_in is pair.rx
        fill(pair.sock, place, 0, size)
        view = place.view()
        assert (view.format, view.nbytes, view.readonly) == ("B", size, False)
        assert view == data
        end = place.offset + size
        assert pair.rx.buffer.view() == before[: place.offset] + data + before[end:], "bytes outside it were written"
        view[:3] = b"abc"
        assert bytes(pair.rx.buffer.view()[place.offset : place.offset + 3]) == b"abc"
    still_works(rig, pair)


@needs("placement")
def test_several_sockets_fill_one_place(rig: Rig) -> None:
    rx = rig.bind()
    pairs = [rig.pair_on(rx) for _ in range(3)]
    stripe = 2 * PAGE_SIZE + 5
    data = rig.payload(6 * stripe)
    with reserve(rx, len(data)) as place:
        for index in range(6):
            pairs[index % 3].peer.sendall(data[index * stripe : (index + 1) * stripe])
        for index in (2, 5, 1, 4, 0, 3):
            fill(pairs[index % 3].sock, place, index * stripe, stripe)
        assert place.view() == data
    for pair in pairs:
        still_works(rig, pair)


@needs("placement")
def test_several_threads_fill_one_place(rig: Rig) -> None:
    rx = rig.bind()
    pairs = [rig.pair_on(rx) for _ in range(3)]
    stripe = 10 * PAGE_SIZE + 3
    data = rig.payload(3 * stripe)
    with reserve(rx, len(data)) as place:
        threads = [
            threading.Thread(target=fill, args=(pair.sock, place, index * stripe, stripe))
            for index, pair in enumerate(pairs)
        ]
        for thread in threads:
            thread.start()
        for index, pair in enumerate(pairs):
            pair.peer.sendall(data[index * stripe : (index + 1) * stripe])
        for thread in threads:
            thread.join()
        assert place.view() == data


@needs("placement")
def test_placed_read_returns_short(rig: Rig) -> None:
    pair = rig.bound_pair()
    with reserve(pair.rx, 100) as place:
        for timeout_s in (rig.patience_s, None, 0):
            pair.peer.sendall(b"0123456789")
            if not timeout_s:
                assert ready(pair.sock.fileno(), rig.patience_s)
            pair.sock.settimeout(timeout_s)
            assert pair.sock.recv_placed(place, 90, 6) == 6
            assert pair.sock.recv_placed(place, 96, 4) == 4
            assert bytes(place.view()[90:]) == b"0123456789"
            pair.peer.sendall(b"short")
            assert ready(pair.sock.fileno(), rig.patience_s)
            assert pair.sock.recv_placed(place, 0, 100) == 5
            assert bytes(place.view()[:5]) == b"short"
            place.view()[:] = bytes(100)


@needs("placement")
def test_all_waits_for_all(rig: Rig) -> None:
    pair = rig.bound_pair()
    data = rig.payload(30 * PAGE_SIZE)
    pair.sock.settimeout(None)

    def send_in_pieces() -> None:
        for at in range(0, len(data), 3000):
            pair.peer.sendall(data[at : at + 3000])

    with reserve(pair.rx, len(data)) as place:
        sender = threading.Thread(target=send_in_pieces)
        sender.start()
        taken = pair.sock.recv_placed(place, 0, len(data), all=True)
        sender.join()
        assert taken == len(data)
        assert place.view() == data


@needs("placement")
def test_all_is_short_at_the_end_of_stream(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.peer.sendall(b"the end")
    pair.peer.shutdown(socket.SHUT_WR)
    pair.sock.settimeout(None)
    with reserve(pair.rx, 100) as place:
        assert pair.sock.recv_placed(place, 0, 100, all=True) == 7
        assert bytes(place.view()[:7]) == b"the end"
        for _ in range(2):
            assert pair.sock.recv_placed(place, 7, 93, all=True) == 0


@needs("placement")
def test_all_has_no_effect_with_a_time_limit(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.peer.sendall(b"some")
    with reserve(pair.rx, 100) as place:
        assert pair.sock.recv_placed(place, 0, 100, all=True) == 4


@needs("placement")
def test_end_of_stream_is_zero_and_stays(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.peer.shutdown(socket.SHUT_WR)
    with reserve(pair.rx, 100) as place:
        for timeout_s in (rig.patience_s, None):
            pair.sock.settimeout(timeout_s)
            assert pair.sock.recv_placed(place, 0, 100) == 0
    assert not pair.collector.recv()
    assert pair.sock.stats.frags == 0


@needs("placement")
def test_time_limits_lose_nothing(rig: Rig) -> None:
    pair = rig.bound_pair()
    with reserve(pair.rx, PAGE_SIZE) as place:
        pair.sock.settimeout(0)
        with raises(BlockingIOError):
            pair.sock.recv_placed(place, 0, 10)
        pair.sock.settimeout(STARVE_WAIT_S)
        with raises(Timeout):
            pair.sock.recv_placed(place, 0, 10)
        pair.sock.settimeout(rig.patience_s)
        pair.peer.sendall(b"at last")
        fill(pair.sock, place, 0, 7)
        assert bytes(place.view()[:7]) == b"at last"


@needs("placement")
def test_takes_turns_with_frags(rig: Rig) -> None:
    """What a page read in pieces still holds comes first, by recv_frags alone."""
    pair = rig.bound_pair()
    data = rig.payload(60_000)
    pair.peer.sendall(data)
    placed = 0
    with reserve(pair.rx, PAGE_SIZE) as place:
        while len(pair.collector.data) < len(data):
            pair.collector.recv_exactly(100, max_bytes=100)
            while pair.sock.lands_in is None:
                with raises(LocalProtocolError):
                    pair.sock.recv_placed(place, 0, 1)
                assert pair.collector.recv()
                pair.collector.release()
            assert pair.sock.lands_in is pair.rx
            missing = min(1234, len(data) - len(pair.collector.data))
            if missing:
                fill(pair.sock, place, 0, missing)
                placed += missing
                pair.collector.data += place.view()[:missing]
    assert pair.collector.data == data
    assert placed >= 1234
    still_works(rig, pair)


@needs("placement")
def test_only_what_lands_in_the_binding_can_be_placed(rig: Rig) -> None:
    place = reserve(rig.bind(), 100)
    other = rig.pair_on(rig.bind(rig.second_queue))
    sock, peer, _ = rig.pair(steer=False)
    assert other.sock.lands_in is other.rx
    assert sock.lands_in is None
    with place:
        for wrong, its_peer in ((other.sock, other.peer), (sock, peer)):
            its_peer.sendall(b"goes on")
            with raises(LocalProtocolError):
                wrong.recv_placed(place, 0, 7)
            collector = rig.collect(wrong)
            assert collector.recv_exactly(7) == b"goes on"


@needs("placement")
def test_lands_in_follows_rules_and_bindings(rig: Rig) -> None:
    sock, peer, rule = rig.pair()
    assert rule is not None
    seen = [sock.lands_in]
    first, second = rig.bind(), rig.bind(rig.second_queue)
    seen.append(sock.lands_in)
    rule.close()
    seen.append(sock.lands_in)
    rig.nic.add_ntuple(src_port=sock.remote_address[1], queue=rig.second_queue)
    seen.append(sock.lands_in)
    second.close()
    seen.append(sock.lands_in)
    assert seen == [None, first, None, second, None]
    peer.sendall(b"ordinary")
    assert rig.collect(sock).recv_exactly(8) == b"ordinary"


@needs("placement")
def test_arguments_are_looked_at_first(rig: Rig) -> None:
    pair = rig.bound_pair()
    for size in (0, -1):
        with raises(ValueError):
            pair.rx.reserve(rig.queue, size)
    with raises(ValueError):
        pair.rx.reserve(rig.second_queue, 1)
    pair.peer.sendall(b"kept")
    with reserve(pair.rx, 100) as place:
        for at, size in ((0, 0), (0, -1), (-1, 1), (0, 101), (100, 1), (99, 2), (-100, 100)):
            with raises(ValueError):
                pair.sock.recv_placed(place, at, size)
        fill(pair.sock, place, 96, 4)
        assert bytes(place.view()[96:]) == b"kept"
    still_works(rig, pair)


@needs("placement")
def test_closed_things_say_so(rig: Rig) -> None:
    pair = rig.bound_pair()
    with reserve(pair.rx, 100) as place:
        pass
    place.close()
    assert place.closed
    with raises(ClosedError):
        place.view()
    pair.peer.sendall(b"pending")
    with raises(ClosedError):
        pair.sock.recv_placed(place, 0, 7)
    assert pair.collector.recv_exactly(7) == b"pending"
    with reserve(pair.rx, 100) as place:
        pair.sock.close()
        with raises(ClosedError):
            pair.sock.recv_placed(place, 0, 7)
    pair.rx.close()
    with raises(ClosedError):
        pair.rx.reserve(rig.queue, 100)


@needs("placement")
def test_closed_with_data_pending(rig: Rig) -> None:
    pair = rig.bound_pair()
    data = rig.payload(3 * PAGE_SIZE)
    pair.peer.sendall(data)
    with reserve(pair.rx, len(data)) as place:
        fill(pair.sock, place, 0, 1000)
    assert pair.rx.drained
    assert pair.collector.recv_exactly(len(data) - 1000) == data[1000:]


@needs("placement")
def test_no_place_when_full_or_scattered(rig: Rig) -> None:
    pair = rig.bound_pair()
    size = pair.rx.buffer.size_bytes
    assert pair.rx.reserve(rig.queue, size + 1) is None
    with reserve(pair.rx, size):
        assert pair.rx.reserve(rig.queue, 1) is None
    places = reserve_every_page(pair.rx)
    assert len({place.offset for place in places}) == len(places) == size // PAGE_SIZE
    for place in places[::2]:
        place.close()
    assert pair.rx.reserve(rig.queue, PAGE_SIZE + 1) is None
    assert rig.nic.queue_stats(rig.queue).rx_alloc_fail == 0
    places.append(reserve(pair.rx, PAGE_SIZE))
    for place in places:
        place.close()
    reserve(pair.rx, size).close()
    still_works(rig, pair)


@needs("placement", "queue_shares")
def test_a_place_comes_out_of_its_queues_share(rig: Rig) -> None:
    rx = rig.bind(rig.queue, rig.second_queue)
    total = rig.nic.queue_stats(rx.queues[0]).pages_total
    assert rx.reserve(rx.queues[0], total * PAGE_SIZE + 1) is None
    with reserve(rx, total * PAGE_SIZE):
        other = rig.pair_on(rx, queue=rx.queues[1])
        rig.transfer(other.collector, other.peer, 2 * rx.buffer.size_bytes)


@needs("placement")
def test_tokens_and_places_do_not_overlap(rig: Rig) -> None:
    pair = rig.bound_pair()
    data = rig.payload(5 * PAGE_SIZE)
    rig.hold_tokens(pair.collector, pair.peer, 3)
    with reserve(pair.rx, len(data)) as place:
        pair.peer.sendall(data)
        fill(pair.sock, place, 0, len(data))
        rig.transfer(pair.collector, pair.peer, 2 * pair.rx.buffer.size_bytes)
        with reserve(pair.rx, PAGE_SIZE) as second:
            second.view()[:] = bytes(PAGE_SIZE)
        assert place.view() == data
    still_works(rig, pair)


@needs("placement")
def test_places_starve_readers_until_they_close(rig: Rig) -> None:
    pair = rig.bound_pair()
    place = reserve(pair.rx, pair.rx.buffer.size_bytes)
    fd = pair.sock.fileno()
    pair.peer.sendall(b"waits")
    assert ready(fd, rig.patience_s)
    pair.sock.settimeout(STARVE_WAIT_S)
    with raises(Timeout) as caught:
        pair.sock.recv_frags()
    assert f"1 places ({place.size_bytes} bytes)" in str(caught.error)
    assert not ready(fd, STARVE_WAIT_S)
    place.close()
    assert ready(fd, rig.patience_s)
    assert pair.collector.recv_exactly(5) == b"waits"
    still_works(rig, pair)


@needs("placement")
def test_starved_socket_is_ready_for_its_place(rig: Rig) -> None:
    pair = rig.bound_pair()
    fd = pair.sock.fileno()
    pair.sock.settimeout(0)
    with reserve(pair.rx, pair.rx.buffer.size_bytes) as place:
        pair.peer.sendall(b"first")
        assert ready(fd, rig.patience_s)
        with raises(BlockingIOError):
            pair.sock.recv_frags()
        assert pair.sock.recv_placed(place, 0, 100) == 5
        with raises(BlockingIOError):
            pair.sock.recv_placed(place, 5, 100)
        pair.peer.sendall(b"second")
        assert ready(fd, rig.patience_s)
        assert pair.sock.recv_placed(place, 5, 100) == 6
        assert bytes(place.view()[:11]) == b"firstsecond"


@needs("placement")
def test_outlives_socket_binding_and_nic(rig: Rig) -> None:
    pair = rig.bound_pair()
    buffer = pair.rx.buffer
    data = rig.payload(2 * PAGE_SIZE)
    pair.peer.sendall(data)
    with reserve(pair.rx, len(data)) as place:
        fill(pair.sock, place, 0, len(data))
        pair.sock.close()
        pair.rx.close()
        drained = pair.rx.drained
        with raises(BusyError):
            buffer.close()
        with raises(BusyError):
            rig.nic.bind_rx(buffer, [rig.queue])
        rig.nic.close()
        assert place.view() == data
        assert not place.closed
    assert (drained, pair.rx.drained) == (False, True)
    assert buffer.holders == ()
    buffer.close()


@needs("placement")
def test_buffer_is_free_once_the_place_closed(rig: Rig) -> None:
    pair = rig.bound_pair()
    with reserve(pair.rx, 1):
        pair.rx.close()
    still_works(rig, rig.pair_on(rig.bind(buffer=pair.rx.buffer)))


@needs("placement")
def test_dropped_place_warns_and_gives_back(rig: Rig) -> None:
    pair = rig.bound_pair()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reserve(pair.rx, 1)
        gc.collect()
    assert [warning.category for warning in caught] == [LeakWarning]
    still_works(rig, pair)


@needs("placement")
def test_counters_of_placed_payload(rig: Rig) -> None:
    pair = rig.bound_pair()
    data = rig.payload(2 * PAGE_SIZE + 1)
    pair.peer.sendall(data)
    with reserve(pair.rx, len(data)) as place:
        assert rig.nic.queue_stats(rig.queue).pages_inflight == 3
        for at in range(0, len(data), PAGE_SIZE):
            fill(pair.sock, place, at, min(PAGE_SIZE, len(data) - at))
        stats = pair.sock.stats
        assert (stats.dmabuf_bytes, stats.linear_bytes, stats.host_bytes) == (len(data), 0, 0)
        assert stats.frags == stats.recv_calls >= 3
        assert stats.tokens_out == 0
        assert pair.rx.holders() == ()
        assert rig.nic.queue_stats(rig.queue).rx_bytes == len(data)
    assert rig.nic.queue_stats(rig.queue).pages_inflight == 0
