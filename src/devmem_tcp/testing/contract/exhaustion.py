"""A queue without free pages: data waits, nothing is lost, and it can be seen who holds what."""

from __future__ import annotations

import select
import socket

from devmem_tcp.errors import Timeout
from devmem_tcp.testing.contract.collector import Collector
from devmem_tcp.testing.contract.expect import needs, raises
from devmem_tcp.testing.contract.rig import STARVE_WAIT_S, BoundPair, Rig


def ready(sock_fd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(sock_fd, select.POLLIN | select.POLLERR)
    return bool(poller.poll(timeout_s * 1000))


def finish(pair: BoundPair, sent: bytes) -> None:
    """Give everything back and check that the rest of ``sent`` comes."""
    pair.collector.release()
    pair.peer.shutdown(socket.SHUT_WR)
    pair.collector.recv_to_end()
    assert pair.collector.data.endswith(sent)


def recv_all_but_pages(collector: Collector) -> None:
    """Receive until that raises. What comes while no page is free can only be packets that landed in host memory."""
    while True:
        held = len(collector.live)
        assert collector.recv(), "stream ended"
        assert len(collector.live) == held, "a frag in device memory, though no page was free"


def test_waits_and_loses_nothing(rig: Rig) -> None:
    pair = rig.bound_pair()
    drops = rig.nic.queue_stats(rig.queue).rx_alloc_fail
    sent = rig.starve(pair.collector, pair.peer)
    assert rig.nic.queue_stats(rig.queue).rx_alloc_fail > drops
    pair.sock.settimeout(STARVE_WAIT_S)
    for _ in range(2):
        with raises(Timeout):
            recv_all_but_pages(pair.collector)
    pair.sock.settimeout(0)
    with raises(BlockingIOError):
        recv_all_but_pages(pair.collector)
    pair.sock.settimeout(rig.patience_s)
    finish(pair, sent)
    assert pair.rx.drained


def test_happens_again_after_recovery(rig: Rig) -> None:
    pair = rig.bound_pair()
    for _ in range(3):
        sent = rig.starve(pair.collector, pair.peer)
        missing = len(sent)
        pair.collector.release()
        while not pair.collector.data.endswith(sent):
            assert missing > 0
            missing -= pair.collector.recv().nbytes
            pair.collector.release()


def test_page_accounting(rig: Rig) -> None:
    pair = rig.bound_pair()
    before = rig.nic.queue_stats(rig.queue)
    assert before.pages_total > 0
    sent = rig.starve(pair.collector, pair.peer)
    starved = rig.nic.queue_stats(rig.queue)
    assert starved.pages_total == before.pages_total
    assert starved.pages_inflight == starved.pages_total
    assert starved.rx_bytes >= before.rx_bytes + pair.collector.bytes_live
    finish(pair, sent)


def test_holders_are_reported(rig: Rig) -> None:
    rx = rig.bind()
    hog, victim = rig.pair_on(rx), rig.pair_on(rx)
    sent = rig.starve(hog.collector, hog.peer)
    victim.peer.sendall(b"waits")
    (holder,) = rx.holders()
    assert holder.queue == rig.queue
    assert holder.local == hog.sock.local_address
    assert holder.remote == hog.sock.remote_address
    assert holder.tokens == hog.sock.stats.tokens_out == len(hog.collector.live)
    assert holder.bytes_held >= hog.collector.bytes_live
    assert holder.oldest_age_s > 0
    assert [held.local for held in rig.nic.stats().holders] == [holder.local]
    assert rx.holders()[0].oldest_age_s > holder.oldest_age_s
    finish(hog, sent)
    assert victim.collector.recv_exactly(5) == b"waits"
    assert rx.holders() == ()
    assert rig.nic.stats().holders == ()


def test_oldest_holder_comes_first(rig: Rig) -> None:
    rx = rig.bind()
    pairs = [rig.pair_on(rx) for _ in range(2)]
    for pair in reversed(pairs):
        rig.hold_tokens(pair.collector, pair.peer, 1, max_bytes=10)
    assert [held.local for held in rx.holders()] == [pair.sock.local_address for pair in reversed(pairs)]
    ages = [held.oldest_age_s for held in rx.holders()]
    assert ages == sorted(ages, reverse=True)


def test_hog_stops_others_only_until_it_closes(rig: Rig) -> None:
    rx = rig.bind()
    hog, victim = rig.pair_on(rx), rig.pair_on(rx)
    rig.starve(hog.collector, hog.peer)
    hog.collector.close()
    rig.transfer(victim.collector, victim.peer, 100_000)
    assert rx.holders() == ()


def test_does_not_reach_another_binding(rig: Rig) -> None:
    hog = rig.bound_pair()
    other = rig.pair_on(rig.bind(rig.second_queue))
    rig.starve(hog.collector, hog.peer)
    rig.transfer(other.collector, other.peer, 2 * other.rx.buffer.size_bytes)


@needs("queue_shares")
def test_does_not_reach_another_queue_of_the_binding(rig: Rig) -> None:
    rx = rig.bind(rig.queue, rig.second_queue)
    hog, other = rig.pair_on(rx, queue=rig.queue), rig.pair_on(rx, queue=rig.second_queue)
    sent = rig.starve(hog.collector, hog.peer)
    rig.transfer(other.collector, other.peer, 2 * rx.buffer.size_bytes)
    finish(hog, sent)


def test_does_not_reach_unsteered_flows(rig: Rig) -> None:
    hog = rig.bound_pair()
    sock, peer, _ = rig.pair(steer=False)
    rig.starve(hog.collector, hog.peer)
    rig.transfer(rig.collect(sock), peer, 100_000)


def test_starved_socket_is_not_ready(rig: Rig) -> None:
    """The way of an event loop: the fd is registered early, and a receive that would block has to wait for it."""
    pair = rig.bound_pair()
    fd = pair.sock.fileno()
    sent = rig.starve(pair.collector, pair.peer)
    pair.sock.settimeout(0)
    with raises(BlockingIOError):
        recv_all_but_pages(pair.collector)
    assert not ready(fd, STARVE_WAIT_S)
    pair.sock.settimeout(rig.patience_s)
    pair.collector.release()
    assert ready(fd, rig.patience_s)
    finish(pair, sent)


def test_fd_asked_for_while_starved_is_not_ready(rig: Rig) -> None:
    pair = rig.bound_pair()
    sent = rig.starve(pair.collector, pair.peer)
    assert not ready(pair.sock.fileno(), STARVE_WAIT_S)
    pair.collector.release()
    assert ready(pair.sock.fileno(), rig.patience_s)
    finish(pair, sent)


def test_victim_is_ready_when_the_hog_returns(rig: Rig) -> None:
    rx = rig.bind()
    hog, victim = rig.pair_on(rx), rig.pair_on(rx)
    sent = rig.starve(hog.collector, hog.peer)
    victim.peer.sendall(b"waits")
    hog.collector.release()
    assert ready(victim.sock.fileno(), rig.patience_s)
    assert victim.collector.recv_exactly(5) == b"waits"
    finish(hog, sent)
