"""Every system call of a whole scenario fails once: no other error than its own comes out, and nothing stays behind."""

from __future__ import annotations

import errno
import socket

import pytest

import devmem_tcp as dmt
from devmem_tcp.memory import Host, HostKind
from devmem_tcp.testing.faults import SweepRun, sweep
from devmem_tcp.types import PAGE_SIZE

SIZE = 8 * PAGE_SIZE
PATIENCE_S = 10.0
OPTIONS = dmt.SoftwareOptions(rx_queues=4)


def open_nic() -> dmt.Nic:
    return dmt.open_nic("soft0", backend="software", software=OPTIONS)


def connected(nic: dmt.Nic, listener: dmt.Listener) -> tuple[dmt.DevmemSocket, socket.socket]:
    """Return an accepted connection and the plain socket at its far end."""
    peer = socket.create_connection(listener.address[:2], PATIENCE_S)
    try:
        listener.settimeout(PATIENCE_S)
        return listener.accept(), peer
    except BaseException:
        peer.close()
        raise


def receive() -> None:
    """Set up a NIC, receive into device memory past the end of the pool, and give everything back."""
    with (
        open_nic() as nic,
        Host(HostKind.MEMFD).allocate(SIZE) as buffer,
        nic.set_header_split("on"),
        nic.set_rss(equal=3),
        nic.bind_rx(buffer, [3]) as rx,
        nic.listen(("127.0.0.1", 0)) as listener,
        nic.add_ntuple(dst_port=listener.address[1], queue=3),
    ):
        sock, peer = connected(nic, listener)
        with sock, peer:
            sock.settimeout(PATIENCE_S)
            peer.sendall(bytes(2 * SIZE))
            peer.shutdown(socket.SHUT_WR)
            sock.fileno()
            received = 0
            while batch := sock.recv_frags(PAGE_SIZE + 100):
                received += batch.nbytes
                batch.release()
            assert received == 2 * SIZE
            assert rx.drained


def starve() -> None:
    """Run a pool dry, wait in both ways, and go on after tokens came back."""
    with (
        open_nic() as nic,
        Host().allocate(2 * PAGE_SIZE) as buffer,
        nic.set_header_split("on"),
        nic.bind_rx(buffer, [3]),
        nic.listen(("127.0.0.1", 0)) as listener,
        nic.add_ntuple(dst_port=listener.address[1], queue=3),
    ):
        sock, peer = connected(nic, listener)
        with sock, peer:
            sock.settimeout(PATIENCE_S)
            peer.sendall(bytes(3 * PAGE_SIZE))
            held = [sock.recv_frags(PAGE_SIZE), sock.recv_frags(PAGE_SIZE)]
            sock.fileno()
            sock.settimeout(0)
            with pytest.raises(BlockingIOError):
                sock.recv_frags()
            sock.settimeout(0.001)
            with pytest.raises(dmt.errors.Timeout):
                sock.recv_frags()
            for batch in held:
                batch.release()
            sock.settimeout(PATIENCE_S)
            sock.recv_frags().release()


def place() -> None:
    """Receive into a place in each way of waiting, with the pool run dry by it, and give everything back."""
    with (
        open_nic() as nic,
        Host().allocate(SIZE) as buffer,
        nic.set_header_split("on"),
        nic.bind_rx(buffer, [3]) as rx,
        nic.listen(("127.0.0.1", 0)) as listener,
        nic.add_ntuple(dst_port=listener.address[1], queue=3),
    ):
        sock, peer = connected(nic, listener)
        with sock, peer:
            reserved = rx.reserve(3, SIZE)
            assert reserved is not None
            with reserved:
                peer.sendall(bytes(100))
                sock.fileno()
                assert sock.recv_placed(reserved, 0, 100, all=True) == 100
                sock.settimeout(0)
                with pytest.raises(BlockingIOError):
                    sock.recv_placed(reserved, 0, 1)
                sock.settimeout(0.001)
                with pytest.raises(dmt.errors.Timeout):
                    sock.recv_placed(reserved, 0, 1)
                peer.sendall(b"x")
                with pytest.raises(dmt.errors.Timeout):
                    sock.recv_frags()
                sock.settimeout(PATIENCE_S)
                assert sock.recv_placed(reserved, 0, 1) == 1
            assert rx.drained


def send() -> None:
    """Connect to a plain peer, send from device memory, and wait for the completion."""
    with (
        socket.create_server(("127.0.0.1", 0)) as far,
        open_nic() as nic,
        Host().allocate(SIZE) as buffer,
        nic.bind_tx(buffer) as tx,
        nic.connect(far.getsockname()[:2], source=("127.0.0.1", 0), timeout_s=PATIENCE_S) as sock,
    ):
        far.settimeout(PATIENCE_S)
        peer, _ = far.accept()
        with peer:
            sock.set_zerocopy()
            sock.settimeout(PATIENCE_S)
            sock.fileno()
            sock.send_frags(tx, [0, PAGE_SIZE], [100, 100])
            sock.send(b"tail")
            sock.shutdown_send()
            assert sock.wait_completions(PATIENCE_S)
            peer.settimeout(PATIENCE_S)
            received = 0
            while part := peer.recv(1000):
                received += len(part)
            assert received == 204


def names(runs: tuple[SweepRun, ...]) -> set[str]:
    return {run.call for run in runs}


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EPERM, errno.ECONNRESET], ids=errno.errorcode.get)
def test_receive(code: int) -> None:
    runs = sweep(receive, errnos=[code])
    assert {"memfd_create", "mmap", "socket", "bind", "listen", "accept4", "recv"} <= names(runs)
    assert {"epoll_create1", "eventfd2", "eventfd_write"} <= names(runs)


def test_starve() -> None:
    assert {"eventfd2", "epoll_ctl", "poll"} <= names(sweep(starve))


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ECONNRESET], ids=errno.errorcode.get)
def test_place(code: int) -> None:
    assert {"recv", "poll", "epoll_ctl"} <= names(sweep(place, errnos=[code]))


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EPERM, errno.EPIPE], ids=errno.errorcode.get)
def test_send(code: int) -> None:
    runs = sweep(send, errnos=[code])
    assert {"connect", "sendmsg", "send", "shutdown"} <= names(runs)


@pytest.mark.parametrize("kind", HostKind)
def test_allocate_host(kind: HostKind) -> None:
    def allocate() -> None:
        with Host(kind=kind).allocate(SIZE) as buffer:
            assert len(buffer.view()) == SIZE

    assert "mmap" in names(sweep(allocate, errnos=[errno.ENOMEM, errno.EPERM]))
