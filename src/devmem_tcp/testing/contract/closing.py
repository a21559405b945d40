"""What close() does, in whatever order things are closed, and what a vanished peer leaves."""

from __future__ import annotations

import socket
import struct

from devmem_tcp.closing import Closing
from devmem_tcp.errors import BusyError, ClosedError
from devmem_tcp.testing.contract.collector import token_ranges
from devmem_tcp.testing.contract.expect import raises
from devmem_tcp.testing.contract.rig import Rig
from devmem_tcp.types import DmabufFrag, FragKind

LINGER_OF_NOTHING = struct.pack("ii", 1, 0)  # close() sends a reset


def test_closing_twice_is_closing_once(rig: Rig) -> None:
    pair = rig.bound_pair()
    tx = rig.nic.bind_tx(rig.allocate())
    listener = rig.listen()
    things: tuple[Closing, ...] = (pair.sock, pair.rx, tx, listener, pair.rx.buffer, tx.buffer, rig.nic)
    for thing in things:
        thing.close()
        thing.close()


def test_unbound_with_tokens_out_leaves_the_queue_clean(rig: Rig) -> None:
    pair = rig.bound_pair()
    rig.hold_tokens(pair.collector, pair.peer, 1)
    pair.rx.close()
    assert pair.rx.closed
    assert not pair.rx.drained
    assert rig.nic.queue_stats(rig.queue).dmabuf_id == 0
    fresh = rig.pair_on(rig.bind())
    rig.transfer(fresh.collector, fresh.peer, 100_000)
    assert fresh.rx.dmabuf_id > pair.rx.dmabuf_id


def test_unbound_with_tokens_out_keeps_the_stream(rig: Rig) -> None:
    """What is queued may still be in device memory; what comes later cannot be."""
    pair = rig.bound_pair()
    rig.hold_tokens(pair.collector, pair.peer, 1)
    queued = rig.payload(8000)
    pair.peer.sendall(queued)
    head = pair.collector.recv_exactly(1000, hold=True, max_bytes=1000)
    pair.rx.close()
    assert head + pair.collector.recv_exactly(7000, hold=True) == queued
    assert {live.frag.dmabuf_id for live in pair.collector.live.values()} == {pair.rx.dmabuf_id}
    host_bytes = pair.collector.seen[FragKind.HOST]
    rig.transfer(pair.collector, pair.peer, 50_000, hold=True)
    assert pair.collector.seen[FragKind.HOST] == host_bytes + 50_000
    pair.peer.sendall(b"without the flag")
    target = bytearray(100)
    assert bytes(target[: pair.sock.recv_into(target)]) == b"without the flag"


def test_unbound_with_tokens_out_keeps_the_buffer_busy(rig: Rig) -> None:
    pair = rig.bound_pair()
    buffer = pair.rx.buffer
    rig.hold_tokens(pair.collector, pair.peer, 3, max_bytes=10)
    pair.rx.close()
    with raises(BusyError):
        buffer.close()
    with raises(BusyError):
        rig.nic.bind_rx(buffer, [rig.queue])
    with raises(BusyError):
        rig.nic.bind_rx(buffer, [rig.second_queue])
    *others, last = pair.collector.live
    assert pair.collector.dontneed(others) == len(others)
    assert buffer.holders
    with raises(BusyError):
        buffer.close()
    assert pair.collector.dontneed([last]) == 1
    assert pair.rx.drained
    assert buffer.holders == ()
    fresh = rig.pair_on(rig.bind(buffer=buffer))
    rig.transfer(fresh.collector, fresh.peer, 100_000)


def test_unbound_with_tokens_out_reports_its_holders(rig: Rig) -> None:
    pair = rig.bound_pair()
    tokens = rig.hold_tokens(pair.collector, pair.peer, 1)
    pair.rx.close()
    (holder,) = pair.rx.holders()
    assert holder.tokens == len(tokens)
    assert holder.local == pair.sock.local_address
    pair.sock.close()
    assert pair.rx.holders() == ()
    assert pair.rx.drained


def test_flow_lands_in_a_fresh_binding_of_its_queue(rig: Rig) -> None:
    """The old binding's frags and the new one's may be out together, on one socket."""
    pair = rig.bound_pair()
    rig.hold_tokens(pair.collector, pair.peer, 1)
    pair.rx.close()
    fresh = rig.bind()
    before = set(pair.collector.live)
    rig.transfer(pair.collector, pair.peer, 10_000, hold=True)
    later = [live.frag.dmabuf_id for token, live in pair.collector.live.items() if token not in before]
    assert set(later) <= {fresh.dmabuf_id}
    pair.collector.release()
    assert pair.rx.drained
    assert fresh.drained


def test_binding_closes_while_starved(rig: Rig) -> None:
    pair = rig.bound_pair()
    sent = rig.starve(pair.collector, pair.peer)
    pair.rx.close()
    pair.collector.recv_exactly(len(sent) - len(pair.collector.data), hold=True)
    assert pair.collector.data == sent
    pair.collector.release()
    assert pair.rx.drained


def test_socket_returns_everything_it_holds(rig: Rig) -> None:
    pair = rig.bound_pair()
    rig.hold_tokens(pair.collector, pair.peer, 2, max_bytes=10)
    assert pair.rx.holders()
    pair.collector.close()
    assert pair.sock.closed
    assert pair.rx.drained
    assert pair.rx.holders() == ()
    fresh = rig.pair_on(pair.rx)
    rig.transfer(fresh.collector, fresh.peer, 2 * pair.rx.buffer.size_bytes)


def test_queue_counters_never_go_back(rig: Rig) -> None:
    pair = rig.bound_pair()
    sent = rig.starve(pair.collector, pair.peer)
    before = rig.nic.queue_stats(rig.queue)
    assert 0 < before.rx_bytes <= len(sent)
    assert before.rx_alloc_fail > 0
    pair.collector.close()
    pair.rx.close()
    after = rig.nic.queue_stats(rig.queue)
    assert after.rx_bytes >= before.rx_bytes
    assert after.rx_alloc_fail >= before.rx_alloc_fail
    rig.bind()
    assert rig.nic.queue_stats(rig.queue).rx_alloc_fail >= before.rx_alloc_fail


def test_peer_sees_the_end_when_the_socket_closes(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.sock.close()
    assert pair.peer.recv(1) == b""


def test_closed_socket_does_nothing_more(rig: Rig) -> None:
    pair = rig.bound_pair()
    tx = rig.nic.bind_tx(rig.allocate())
    sock = pair.sock
    sock.close()
    for use in (
        lambda: sock.recv_frags(),
        lambda: sock.recv_into(bytearray(10)),
        lambda: sock.discard(10),
        lambda: sock.dontneed(token_ranges((1, 1))),
        lambda: sock.set_zerocopy(),
        lambda: sock.send_frags(tx, [0], [10]),
        lambda: sock.send(b"x"),
        lambda: sock.read_completions(),
        lambda: sock.wait_completions(1.0),
        lambda: sock.shutdown_send(),
    ):
        with raises(ClosedError):
            use()


def test_closed_nic_does_nothing_more(rig: Rig) -> None:
    buffer = rig.allocate()
    rig.nic.close()
    assert rig.nic.closed
    for use in (
        lambda: rig.nic.bind_rx(buffer, [rig.queue]),
        lambda: rig.nic.bind_tx(buffer),
        lambda: rig.nic.listen((rig.host, 0)),
        lambda: rig.nic.connect((rig.host, 9)),
        lambda: rig.nic.set_header_split("off"),
        lambda: rig.nic.set_rss(equal=2),
        lambda: rig.nic.add_ntuple(dst_port=9, queue=0),
    ):
        with raises(ClosedError):
            use()
    assert buffer.holders == ()


def test_nic_closes_all_it_made(rig: Rig) -> None:
    pair = rig.bound_pair()
    rig.hold_tokens(pair.collector, pair.peer, 1)
    tx = rig.nic.bind_tx(pair.rx.buffer)
    listener = rig.listen()
    address = listener.address
    rig.nic.close()
    assert pair.sock.closed
    assert pair.rx.closed
    assert pair.rx.drained
    assert tx.closed
    assert pair.rx.buffer.holders == ()
    with raises(ClosedError):
        listener.accept()
    with raises(ConnectionRefusedError):
        rig.peer_to(address)
    assert pair.peer.recv(1) == b""


def test_listener_leaves_accepted_sockets_alone(rig: Rig) -> None:
    rig.bind()
    with rig.listen() as listener:
        rig.nic.add_ntuple(dst_port=listener.address[1], queue=rig.queue)
        peer = rig.peer_to((rig.host, listener.address[1]))
        sock = rig.accept(listener)
    rig.transfer(rig.collect(sock), peer, 10_000)


def test_peer_resets_in_the_middle(rig: Rig) -> None:
    pair = rig.bound_pair()
    rig.hold_tokens(pair.collector, pair.peer, 2, max_bytes=10)
    pair.peer.sendall(rig.payload(5000))
    pair.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_OF_NOTHING)
    pair.peer.close()
    with raises(ConnectionError):
        while pair.collector.recv():
            pass
    assert pair.sock.stats.tokens_out == len(pair.collector.live)
    first = next(iter(pair.collector.live))
    assert pair.collector.dontneed([first]) == 1
    assert pair.sock.stats.tokens_out == len(pair.collector.live)
    if others := list(pair.collector.live):
        assert pair.collector.dontneed(others[:128]) == len(others[:128])
    pair.sock.close()
    assert pair.rx.drained


def test_peer_ends_with_tokens_out(rig: Rig) -> None:
    pair = rig.bound_pair()
    rig.hold_tokens(pair.collector, pair.peer, 1)
    pair.peer.close()
    assert not pair.collector.recv()
    pair.collector.release()
    assert pair.sock.stats.tokens_out == 0
    assert pair.rx.drained


def test_with_blocks_close_in_order(rig: Rig) -> None:
    buffer = rig.allocate()
    with buffer, rig.bind(buffer=buffer) as rx:
        pair = rig.pair_on(rx)
        with pair.sock:
            rig.hold_tokens(pair.collector, pair.peer, 1)
            frags = [live.frag for live in pair.collector.live.values()]
            assert all(isinstance(frag, DmabufFrag) for frag in frags)
    assert (pair.sock.closed, rx.closed, buffer.closed) == (True, True, True)


def test_tx_binding_closes_while_sends_are_under_way(rig: Rig) -> None:
    """Sends that are not complete keep their bytes: the peer gets what was there when they were made."""
    buffer = rig.allocate()
    content = rig.payload(buffer.size_bytes)
    with buffer.cpu_access() as view:
        view[:] = content
    sock, peer, _ = rig.pair(steer=False)
    sock.set_zerocopy()
    sock.settimeout(0)
    tx = rig.nic.bind_tx(buffer)
    taken = sock.send_frags(tx, [0], [len(content)])
    tx.close()
    got = b""
    while len(got) < taken:
        got += peer.recv(taken - len(got))
    assert got == content[:taken]
    assert sock.wait_completions(rig.patience_s) == [(0, 0)]
