"""Time limits, non-blocking calls, and the fd that poll, select and asyncio are given."""

from __future__ import annotations

import errno
import select
import socket
import threading

from devmem_tcp.contract import DevmemSocket
from devmem_tcp.errors import Timeout
from devmem_tcp.testing.contract.expect import raises
from devmem_tcp.testing.contract.rig import STARVE_WAIT_S, Rig
from devmem_tcp.testing.contract.sending import read_exactly, tx_pair


def ready(sock: DevmemSocket, timeout_s: float) -> bool:
    """Whether the socket's fd becomes ready within ``timeout_s``."""
    poller = select.poll()
    poller.register(sock.fileno(), select.POLLIN | select.POLLERR)
    return bool(poller.poll(timeout_s * 1000))


def test_sockets_start_without_a_timeout(rig: Rig) -> None:
    with rig.listen() as listener:
        rig.peer_to((rig.host, listener.address[1]))
        with listener.accept() as sock:
            assert sock.gettimeout() is None
            for timeout_s in (1.5, 0.0, None):
                sock.settimeout(timeout_s)
                assert sock.gettimeout() == timeout_s


def test_nothing_there_times_out(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.sock.settimeout(STARVE_WAIT_S)
    for call in (pair.sock.recv_frags, lambda: pair.sock.recv_into(bytearray(1)), lambda: pair.sock.discard(1)):
        with raises(Timeout) as caught:
            call()
        assert isinstance(caught.error, TimeoutError)
    pair.peer.sendall(b"after all")
    pair.sock.settimeout(rig.patience_s)
    assert pair.collector.recv_exactly(9) == b"after all"


def test_nothing_there_would_block(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.sock.settimeout(0)
    for call in (pair.sock.recv_frags, lambda: pair.sock.recv_into(bytearray(1)), lambda: pair.sock.discard(1)):
        with raises(BlockingIOError):
            call()


def test_blocked_receive_wakes_up(rig: Rig) -> None:
    pair = rig.bound_pair()
    sender = threading.Timer(STARVE_WAIT_S, pair.peer.sendall, [b"late"])
    sender.start()
    assert pair.collector.recv_exactly(4) == b"late"
    sender.join()


def test_blocked_receive_wakes_up_when_another_thread_returns_tokens(rig: Rig) -> None:
    pair = rig.bound_pair()
    sent = rig.starve(pair.collector, pair.peer)
    start = len(pair.collector.data)
    returner = threading.Timer(STARVE_WAIT_S, pair.collector.release)
    returner.start()
    batch = pair.sock.recv_frags()
    returner.join()
    assert batch
    batch.release()
    pair.peer.shutdown(socket.SHUT_WR)
    rest = sent[start + batch.nbytes :]
    assert pair.collector.recv_to_end() == rest


def test_accept_times_out(rig: Rig) -> None:
    with rig.listen() as listener:
        listener.settimeout(STARVE_WAIT_S)
        with raises(Timeout):
            listener.accept()
        listener.settimeout(0)
        with raises(BlockingIOError):
            listener.accept()
        peer = rig.peer_to((rig.host, listener.address[1]))
        listener.settimeout(rig.patience_s)
        with listener.accept() as sock:
            assert sock.remote_address[:2] == peer.getsockname()[:2]


def test_listener_fd_is_ready_for_a_connection(rig: Rig) -> None:
    with rig.listen() as listener:
        poller = select.poll()
        poller.register(listener.fileno(), select.POLLIN)
        assert poller.poll(0) == []
        rig.peer_to((rig.host, listener.address[1]))
        assert poller.poll(rig.patience_s * 1000)
        listener.accept().close()


def test_fd_is_ready_when_data_is_there(rig: Rig) -> None:
    pair = rig.bound_pair()
    assert not ready(pair.sock, 0)
    for _ in range(3):
        data = rig.payload(5000)
        pair.peer.sendall(data)
        assert ready(pair.sock, rig.patience_s)
        pair.sock.settimeout(0)
        start = len(pair.collector.data)
        while len(pair.collector.data) < start + len(data):
            assert ready(pair.sock, rig.patience_s)
            assert pair.collector.recv(1000)
            pair.collector.release()
        assert not ready(pair.sock, 0)


def test_fd_is_ready_for_ordinary_data(rig: Rig) -> None:
    sock, peer, _ = rig.pair(steer=False)
    assert not ready(sock, 0)
    peer.sendall(b"x")
    assert ready(sock, rig.patience_s)
    rig.collect(sock).recv_exactly(1)
    assert not ready(sock, 0)


def test_fd_is_ready_at_the_end_of_the_stream(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.peer.shutdown(socket.SHUT_WR)
    assert ready(pair.sock, rig.patience_s)
    assert not pair.sock.recv_frags()
    assert ready(pair.sock, rig.patience_s)


def test_fd_is_ready_for_completions(rig: Rig) -> None:
    pair = tx_pair(rig)
    assert not ready(pair.sock, 0)
    pair.sock.send_frags(pair.tx, [0], [100])
    assert read_exactly(pair.peer, 100) == pair.content[:100]
    completed = 0
    while completed < 1:
        assert ready(pair.sock, rig.patience_s)
        completed += sum(high - low + 1 for low, high in pair.sock.read_completions())
    assert not ready(pair.sock, 0)


def test_fd_is_ready_at_the_low_water_mark(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.sock.settimeout(0)
    pair.sock.set_low_water(10_000)
    pair.peer.sendall(rig.payload(9_999))
    assert not ready(pair.sock, STARVE_WAIT_S)
    pair.peer.sendall(b"!")
    assert ready(pair.sock, rig.patience_s)
    while len(pair.collector.data) < 10_000:
        pair.collector.recv(10_000)
    pair.peer.sendall(b"few")
    assert not ready(pair.sock, STARVE_WAIT_S)
    pair.sock.set_low_water(1)
    assert ready(pair.sock, rig.patience_s)


def test_what_is_under_the_low_water_mark_can_be_received(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.peer.sendall(b"few")
    assert ready(pair.sock, rig.patience_s)
    pair.sock.set_low_water(10_000)
    pair.sock.settimeout(0)
    pair.collector.recv(100)
    assert pair.collector.data == b"few"
    for size_bytes in (0, -1):
        with raises(ValueError):
            pair.sock.set_low_water(size_bytes)


def test_fd_is_ready_at_the_end_of_the_stream_whatever_the_low_water_mark(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.sock.set_low_water(10_000)
    pair.peer.sendall(b"few")
    assert not ready(pair.sock, STARVE_WAIT_S)
    pair.peer.shutdown(socket.SHUT_WR)
    assert ready(pair.sock, rig.patience_s)
    assert pair.collector.recv_to_end() == b"few"


def test_fd_stays_the_same(rig: Rig) -> None:
    """Event loops register it once."""
    pair = rig.bound_pair()
    fd = pair.sock.fileno()
    rig.transfer(pair.collector, pair.peer, 10_000)
    sent = rig.starve(pair.collector, pair.peer)
    assert sent
    pair.collector.release()
    pair.rx.close()
    assert pair.sock.fileno() == fd >= 0


def test_connect_is_refused(rig: Rig) -> None:
    with rig.peer_listener() as far:
        address = far.getsockname()[:2]
    with raises(ConnectionRefusedError):
        rig.nic.connect(address, timeout_s=rig.patience_s)


def test_connect_from_a_given_source(rig: Rig) -> None:
    with rig.peer_listener() as far:
        host, port = far.getsockname()[:2]
        with rig.nic.connect((host, port), source=(rig.host, 0), timeout_s=rig.patience_s) as sock:
            peer = rig.accept_peer(far)
            assert sock.local_address[0] == rig.host
            assert peer.getpeername()[:2] == sock.local_address[:2]


def test_address_in_use(rig: Rig) -> None:
    with rig.listen() as listener, raises(OSError, errno.EADDRINUSE) as caught:
        rig.nic.listen((rig.host, listener.address[1]))
    assert str(listener.address[1]) in str(caught.error)


def test_address_of_another_machine(rig: Rig) -> None:
    address = "2001:db8::1" if ":" in rig.host else "192.0.2.1"  # set aside for documentation: nobody's
    with raises(OSError, errno.EADDRNOTAVAIL):
        rig.nic.listen((address, 0))


def test_any_address_takes_both_families(rig: Rig) -> None:
    rig.bind()
    with rig.nic.listen(("::", 0)) as listener:
        listener.settimeout(rig.patience_s)
        port = listener.address[1]
        rig.nic.add_ntuple(dst_port=port, queue=rig.queue)
        for host in rig.hosts:
            peer = rig.peer_to((host, port))
            with listener.accept() as sock:
                sock.settimeout(rig.patience_s)
                rig.transfer(rig.collect(sock), peer, 20_000)
                assert sock.rx_queue == rig.queue
