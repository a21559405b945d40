"""The kernel backend's socket against a scripted kernel, and on real connections without devmem."""

from __future__ import annotations

import errno
import os
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator

import pytest

from devmem_tcp.contract import RxBinding
from devmem_tcp.errors import (
    ETOOSMALL,
    ClosedError,
    ControlTruncated,
    KernelError,
    NotZeroCopy,
    StaleFragError,
    StarvationWarning,
    Timeout,
    TokenError,
)
from devmem_tcp.kernel.attachment import Registry
from devmem_tcp.kernel.socket import KernelSocket
from devmem_tcp.memory import Host
from devmem_tcp.sys import calls
from devmem_tcp.testing.faults import SweepRun, sweep
from devmem_tcp.types import PAGE_SIZE, DmabufFrag, FragBatch, FragKind, HostFrag, LinearFrag
from devmem_tcp.uapi.socket import CONTROL_SPACE_PER_FRAG, MSG_SOCK_DEVMEM, pack_tokens
from scripted_kernel import (
    BINDING,
    PAGES,
    QUEUE,
    Dmabuf,
    Linear,
    ScriptedKernel,
    connection,
    install,
    make_binding,
    make_registry,
    pages,
    queue_stats,
)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ScriptedKernel:
    model = ScriptedKernel()
    install(monkeypatch, model)
    return model


@pytest.fixture
def registry() -> Registry:
    return make_registry()


@pytest.fixture
def sock(kernel: ScriptedKernel, registry: Registry) -> Iterator[KernelSocket]:
    with connection() as (near, _), KernelSocket(near, registry) as made:
        made.settimeout(0)
        yield made


# --- receiving --------------------------------------------------------------------------------------------------------


def test_frags_in_device_memory(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    kernel.queue.extend([Dmabuf(8192, 4096), Dmabuf(0, 100, dmabuf_id=9), Dmabuf(4096, 3720)])
    batch = sock.recv_frags()
    assert list(batch) == [DmabufFrag(8192, 4096, 1, 7), DmabufFrag(0, 100, 2, 9), DmabufFrag(4096, 3720, 3, 7)]
    assert (batch.nbytes, len(batch.inline)) == (7916, 0)
    stats = sock.stats
    assert (stats.dmabuf_bytes, stats.frags, stats.recv_calls, stats.tokens_out) == (7916, 3, 1, 3)
    assert sock.holds(7)
    assert sock.holds(9)
    assert not sock.holds(8)


def test_the_batch_owns_its_columns(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    kernel.queue.extend([Linear(b"first"), *pages(3)])
    first = sock.recv_frags()
    before = first.frags.copy()
    kernel.queue.extend([Linear(b"other"), *pages(3)])
    second = sock.recv_frags()
    assert (first.frags == before).all()
    assert (bytes(first.inline), bytes(second.inline)) == (b"first", b"other")


def test_header_buffer_bytes_are_packed_in_order(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    kernel.queue.extend([Linear(b"ab"), Dmabuf(0, 10), Linear(b"cde"), Dmabuf(4096, 20)])
    batch = sock.recv_frags()
    assert list(batch) == [
        LinearFrag(memoryview(b"ab")),
        DmabufFrag(0, 10, 1, 7),
        LinearFrag(memoryview(b"cde")),
        DmabufFrag(4096, 20, 2, 7),
    ]
    assert bytes(batch.inline) == b"abcde"
    assert (sock.stats.linear_bytes, sock.stats.dmabuf_bytes, sock.stats.tokens_out) == (5, 30, 2)
    batch.release()
    assert not kernel.live


def test_header_buffer_bytes_alone(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    kernel.queue.append(Linear(b"ab"))
    batch = sock.recv_frags()
    assert list(batch) == [LinearFrag(memoryview(b"ab"))]
    assert sock.stats.tokens_out == 0
    batch.release()
    assert kernel.dontneeds == []


def test_ordinary_and_devmem_data_do_not_mix(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    kernel.queue.extend([b"plain", Dmabuf(0, 10), b"again"])
    batches = [sock.recv_frags() for _ in range(3)]
    assert [list(batch) for batch in batches] == [
        [HostFrag(memoryview(b"plain"))],
        [DmabufFrag(0, 10, 1, 7)],
        [HostFrag(memoryview(b"again"))],
    ]
    assert sock.stats.host_bytes == 10


def test_max_bytes_and_max_frags(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    kernel.queue.extend(pages(10))
    assert sock.recv_frags(5000).sizes.tolist() == [4096, 904]
    assert sock.recv_frags(max_frags=2).offsets.tolist() == [4096 + 904, 8192]
    assert len(sock.recv_frags(1 << 40, max_frags=1 << 40)) == 7


def test_the_end_of_the_stream(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    kernel.ended = True
    batch = sock.recv_frags()
    assert not batch
    assert list(batch) == []
    batch.release()


def test_bad_arguments_consume_nothing(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    kernel.queue.extend(pages(1))
    for limit in (0, -1):
        with pytest.raises(ValueError, match="positive"):
            sock.recv_frags(limit)
        with pytest.raises(ValueError, match="positive"):
            sock.discard(limit)
    with pytest.raises(ControlTruncated) as caught:
        sock.recv_frags(max_frags=0)
    assert caught.value.needed == CONTROL_SPACE_PER_FRAG
    with pytest.raises(ValueError, match="one byte"):
        sock.recv_into(bytearray())
    assert kernel.flags == []


@pytest.mark.parametrize(
    ("number", "raised"),
    [
        (ETOOSMALL, ControlTruncated),
        (errno.ENODEV, KernelError),
        (errno.EFAULT, KernelError),
        (errno.ECONNRESET, ConnectionResetError),
    ],
)
def test_what_recvmsg_refuses(kernel: ScriptedKernel, sock: KernelSocket, number: int, raised: type[OSError]) -> None:
    kernel.queue.append(OSError(number, os.strerror(number)))
    with pytest.raises(raised) as caught:
        sock.recv_frags()
    assert caught.value.errno == number
    if isinstance(caught.value, KernelError):
        assert caught.value.hint


def test_strict_refuses_ordinary_data_and_loses_none(kernel: ScriptedKernel, registry: Registry) -> None:
    with connection() as (near, _), KernelSocket(near, registry, strict=True) as sock:
        kernel.queue.extend([Linear(b"ok"), Dmabuf(0, 5), b"plain"])
        assert len(sock.recv_frags()) == 2
        with pytest.raises(NotZeroCopy) as caught:
            sock.recv_frags()
        assert (caught.value.data, caught.value.host_bytes, caught.value.linear_bytes) == (b"plain", 5, 0)
        assert sock.stats.host_bytes == 5


def test_discard_hands_out_no_token(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    kernel.queue.extend([*pages(2), b"plain"])
    assert sock.discard(5000) == 5000
    assert sock.discard(1 << 20) == 2 * 4096 + 5 - 5000
    assert kernel.live == set()
    assert all(flags & calls.MSG_TRUNC for flags in kernel.flags)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_release_needs_few_calls(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    kernel.queue.extend(pages(1600))
    batch = sock.recv_frags(1600 * PAGE_SIZE)
    assert len(batch) == 1600
    batch.release()
    assert kernel.dontneeds == [[(1, 1024)], [(1025, 576)]]
    assert kernel.live == set()
    assert (sock.stats.tokens_out, sock.stats.dontneed_calls) == (0, 2)


def test_dontneed_answers_what_the_kernel_freed(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    kernel.queue.extend(pages(5))
    batch = sock.recv_frags()
    assert sock.dontneed(pack_tokens([2, 2, 900], [2, 1, 5])) == 2
    assert sock.stats.tokens_out == 3
    assert sock.dontneed(pack_tokens([1], [1]).tobytes()) == 1
    assert sock.stats.tokens_out == 2 == len(kernel.live)
    with pytest.raises(TokenError) as caught:
        batch.release()
    assert (caught.value.asked, caught.value.freed) == (5, 2)
    assert sock.stats.tokens_out == 0 == len(kernel.live)


def test_release_while_another_thread_returns_some_of_the_tokens(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    """The last of 1600 go back by dontneed() after the first call of release()."""
    kernel.queue.extend(pages(1600))
    batch = sock.recv_frags(1600 * PAGE_SIZE)
    returned: list[int] = []

    def hook(name: str) -> None:
        if name == "setsockopt" and len(kernel.dontneeds) == 1 and not returned:
            returned.append(-1)
            returned[0] = sock._inbound.tokens.strike(pack_tokens([1600], [1]))
            kernel.live.discard(1600)

    with calls.intercept(hook), pytest.raises(TokenError) as caught:
        batch.release()
    assert returned == [1]
    assert (caught.value.asked, caught.value.freed) == (1600, 1599)
    assert sock.stats.tokens_out == 0 == len(kernel.live)


@pytest.mark.parametrize("raw", [b"", b"1234567", bytes(8 * 129)])
def test_dontneed_refused_frees_nothing(kernel: ScriptedKernel, sock: KernelSocket, raw: bytes) -> None:
    kernel.queue.extend(pages(1))
    sock.recv_frags()
    with pytest.raises(KernelError) as caught:
        sock.dontneed(raw)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.hint
    assert sock.stats.tokens_out == 1


def test_tokens_handed_out_again_while_others_are_returned(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    """Two threads: whatever one returns the other may be handed at once, and the counts must stay right."""
    rounds = 300
    batches: deque[FragBatch] = deque()

    def give_back() -> None:
        for _ in range(rounds):
            while not batches:
                time.sleep(0)
            batches.popleft().release()

    returner = threading.Thread(target=give_back)
    returner.start()
    for _ in range(rounds):
        kernel.queue.extend(pages(4))
        batches.append(sock.recv_frags())
    returner.join()
    assert sock.stats.tokens_out == 0 == len(kernel.live)
    assert sock.holder(BINDING) is None


def test_close_returns_every_token(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    kernel.queue.extend(pages(1300))
    batch = sock.recv_frags(1300 * PAGE_SIZE)
    sock.close()
    assert kernel.live == set()
    assert kernel.dontneeds == [[(1, 1024)], [(1025, 276)]]
    with pytest.raises(StaleFragError):
        _ = batch.frags
    batch.release()
    assert len(kernel.dontneeds) == 2


def test_a_dropped_socket_warns_and_closes(kernel: ScriptedKernel, registry: Registry) -> None:
    with connection() as (near, far):
        sock = KernelSocket(near, registry)
        with pytest.warns(ResourceWarning, match="dropped without close"):
            del sock
        assert far.recv(1) == b""


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_a_reader_that_would_block(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    with pytest.raises(BlockingIOError):
        sock.recv_frags()
    assert kernel.flags == [MSG_SOCK_DEVMEM | calls.MSG_DONTWAIT]


def test_waits_go_on_after_signals(kernel: ScriptedKernel, sock: KernelSocket) -> None:
    sock.settimeout(None)
    kernel.queue.extend([InterruptedError(errno.EINTR, ""), BlockingIOError(errno.EAGAIN, ""), Dmabuf(0, 5)])
    assert sock.recv_frags().nbytes == 5
    assert kernel.flags == [MSG_SOCK_DEVMEM] * 3


def test_starvation_is_reported_once_with_who_holds_what(
    kernel: ScriptedKernel, sock: KernelSocket, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with Host().allocate(PAGES * PAGE_SIZE) as buffer, make_binding(registry, buffer):
        kernel.queue.extend(pages(60))
        sock.recv_frags()
        sock.settimeout(None)
        kernel.queue.extend([BlockingIOError(errno.EAGAIN, "") for _ in range(3)])
        kernel.queue.append(Dmabuf(0, 1))
        with pytest.warns(StarvationWarning) as caught:
            sock.recv_frags()
        sock.close()
    (warning,) = caught
    text = str(warning.message)
    assert f"RX queue {QUEUE}" in text
    assert "60 tokens (245760 bytes)" in text
    assert f"127.0.0.1:{sock.remote_address[1]}" in text
    assert warning.filename == __file__


def test_few_tokens_out_are_no_starvation(kernel: ScriptedKernel, sock: KernelSocket, registry: Registry) -> None:
    with Host().allocate(PAGES * PAGE_SIZE) as buffer, make_binding(registry, buffer):
        kernel.queue.extend(pages(PAGES // 4 - 1))
        sock.recv_frags()
        sock.settimeout(0.001)
        with pytest.raises(Timeout, match="nothing arrived from 127"):
            sock.recv_frags()
        sock.close()


def test_a_starved_reader_that_times_out_says_who_holds_the_pages(
    kernel: ScriptedKernel, sock: KernelSocket, registry: Registry
) -> None:
    with Host().allocate(PAGES * PAGE_SIZE) as buffer, make_binding(registry, buffer) as rx:
        kernel.queue.extend(pages(60))
        sock.recv_frags()
        sock.settimeout(0.001)
        with pytest.raises(Timeout, match=r"held: 60 tokens .* by the connection from 127\.0\.0\.1:"):
            sock.recv_frags()
        (holder,) = rx.holders()
        assert (holder.queue, holder.tokens, holder.bytes_held) == (QUEUE, 60, 60 * PAGE_SIZE)
        assert holder.local == sock.local_address
        assert holder.remote == sock.remote_address
        sock.close()
        assert rx.holders() == ()


# --- bindings ---------------------------------------------------------------------------------------------------------


def drained(rx: RxBinding) -> bool:
    return rx.drained


def test_the_buffer_stays_pinned_until_the_last_token_is_back(
    kernel: ScriptedKernel, sock: KernelSocket, registry: Registry
) -> None:
    with Host().allocate(PAGES * PAGE_SIZE) as buffer:
        rx = make_binding(registry, buffer)
        kernel.queue.extend(pages(4))
        batch = sock.recv_frags()
        rx.close()
        assert rx.closed
        assert not drained(rx)
        assert len(rx.holders()) == 1
        assert sock.dontneed(pack_tokens([1], [3])) == 3
        assert buffer.holders
        assert sock.dontneed(pack_tokens([4], [1])) == 1
        assert buffer.holders == ()
        assert drained(rx)
        assert batch.nbytes


def test_the_buffer_stays_pinned_while_data_from_before_is_unread(
    kernel: ScriptedKernel, sock: KernelSocket, registry: Registry
) -> None:
    with Host().allocate(PAGES * PAGE_SIZE) as buffer:
        rx = make_binding(registry, buffer)
        kernel.unread = True
        kernel.queue.extend(pages(2))
        rx.close()
        assert buffer.holders
        first = sock.recv_frags(PAGE_SIZE)
        first.release()
        assert buffer.holders
        assert not drained(rx)
        kernel.unread = False
        sock.recv_frags().release()
        assert buffer.holders == ()
        kernel.unread = True  # what comes later cannot lie in a closed binding's memory
        assert drained(rx)


def test_a_socket_that_closes_frees_the_buffer(kernel: ScriptedKernel, sock: KernelSocket, registry: Registry) -> None:
    with Host().allocate(PAGES * PAGE_SIZE) as buffer:
        rx = make_binding(registry, buffer)
        kernel.queue.extend(pages(2))
        kernel.unread = True
        sock.recv_frags()
        rx.close()
        assert buffer.holders
        sock.close()
        assert drained(rx)
        assert buffer.holders == ()


def test_an_open_binding_is_drained_while_nothing_is_out(
    kernel: ScriptedKernel, sock: KernelSocket, registry: Registry
) -> None:
    with Host().allocate(PAGES * PAGE_SIZE) as buffer, make_binding(registry, buffer) as rx:
        assert drained(rx)
        kernel.queue.extend(pages(1))
        batch = sock.recv_frags()
        assert not drained(rx)
        batch.release()
        assert drained(rx)
        kernel.unread = True
        assert not drained(rx)
        kernel.unread = False


# --- real connections, without devmem ---------------------------------------------------------------------------------


@pytest.fixture
def plain(registry: Registry) -> Iterator[tuple[KernelSocket, socket.socket]]:
    registry = Registry(lambda napi_id: -1, queue_stats)  # loopback has no NAPI
    with connection() as (near, far), KernelSocket(near, registry) as sock:
        sock.settimeout(10.0)
        yield sock, far


def test_ordinary_data(plain: tuple[KernelSocket, socket.socket]) -> None:
    sock, far = plain
    data = os.urandom(300_000)
    sender = threading.Thread(target=far.sendall, args=[data])
    sender.start()
    got = bytearray()
    while len(got) < len(data):
        with sock.recv_frags(100_000) as batch:
            assert [FragKind(kind) for kind in batch.kinds] == [FragKind.HOST]
            got += batch.inline
    sender.join()
    assert got == data
    assert sock.stats.host_bytes == len(data)
    assert sock.rx_queue == -1
    assert not sock.has_unread
    assert sock.dontneed(pack_tokens([1], [10])) == 0


def test_reads_without_the_flag(plain: tuple[KernelSocket, socket.socket]) -> None:
    sock, far = plain
    far.sendall(b"0123456789")
    target = bytearray(4)
    assert sock.recv_into(target) == 4
    assert target == b"0123"
    assert sock.has_unread
    assert sock.discard(3) == 3
    assert bytes(sock.recv_frags().inline) == b"789"
    far.shutdown(socket.SHUT_WR)
    assert sock.recv_into(target) == 0
    assert sock.discard(1) == 0
    assert not sock.recv_frags()


@pytest.mark.parametrize("limit_s", [0.0004, 0.03])
def test_time_limits(plain: tuple[KernelSocket, socket.socket], limit_s: float) -> None:
    sock, far = plain
    sock.settimeout(limit_s)
    assert sock.gettimeout() == limit_s
    for receive in (sock.recv_frags, lambda: sock.recv_into(bytearray(1)), lambda: sock.discard(1)):
        started = time.monotonic()
        with pytest.raises(Timeout, match="nothing arrived"):
            receive()
        assert limit_s <= time.monotonic() - started < limit_s + 1.0
    far.sendall(b"x")
    assert sock.recv_frags().nbytes == 1
    with pytest.raises(ValueError, match="negative"):
        sock.settimeout(-1)


def test_would_block(plain: tuple[KernelSocket, socket.socket]) -> None:
    sock, _ = plain
    sock.settimeout(0)
    for receive in (sock.recv_frags, lambda: sock.recv_into(bytearray(1)), lambda: sock.discard(1)):
        with pytest.raises(BlockingIOError):
            receive()


def test_the_fd_is_for_selectors(plain: tuple[KernelSocket, socket.socket]) -> None:
    sock, far = plain
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        assert selector.select(0) == []
        far.sendall(b"x")
        assert selector.select(10)
        sock.recv_frags()
        assert selector.select(0) == []


def test_a_blocked_reader_is_interrupted(plain: tuple[KernelSocket, socket.socket]) -> None:
    """A signal handler that returns lets the wait go on; one that raises ends it."""
    sock, far = plain
    sock.settimeout(None)
    seen: list[int] = []

    def handler(number: int, frame: object) -> None:
        seen.append(number)
        if len(seen) == 2:
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, 0.02)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        with pytest.raises(KeyboardInterrupt):
            sock.recv_frags()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    far.sendall(b"x")
    assert sock.recv_frags().nbytes == 1


def test_a_peer_that_resets(plain: tuple[KernelSocket, socket.socket]) -> None:
    sock, far = plain
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    far.close()
    with pytest.raises(ConnectionResetError):
        sock.recv_frags()


def test_a_closed_socket_does_nothing_more(plain: tuple[KernelSocket, socket.socket]) -> None:
    sock, _ = plain
    sock.close()
    sock.close()
    for use in (
        sock.recv_frags,
        lambda: sock.recv_into(bytearray(1)),
        lambda: sock.discard(1),
        lambda: sock.dontneed(pack_tokens([1], [1])),
        sock.fileno,
        sock.shutdown_send,
    ):
        with pytest.raises(ClosedError):
            use()
    assert sock.rx_queue == -1
    assert not sock.has_unread


# --- faults -----------------------------------------------------------------------------------------------------------


def names(runs: tuple[SweepRun, ...]) -> set[str]:
    return {run.call for run in runs}


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EPERM, errno.ECONNRESET, errno.EINTR], ids=errno.errorcode.get)
def test_every_call_fails_once(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Whatever fails, the tokens are back and the buffer is free once all is closed."""
    leftovers: list[object] = []

    def scenario() -> None:
        model, registry = ScriptedKernel(), make_registry()
        install(monkeypatch, model)
        with Host().allocate(PAGES * PAGE_SIZE) as buffer:
            try:
                with (
                    connection() as (near, far),
                    make_binding(registry, buffer) as rx,
                    KernelSocket(near, registry) as sock,
                ):
                    sock.settimeout(5.0)
                    model.queue.extend([*pages(40), Linear(b"abc"), Dmabuf(0, 10), b"plain"])
                    sock.recv_frags(20 * PAGE_SIZE).release()
                    held = sock.recv_frags()
                    rx.close()
                    held.release()
                    sock.recv_frags()
                    far.sendall(b"x")
                    sock.recv_into(bytearray(1))
                    sock.send(b"y")
            finally:
                leftovers.extend(buffer.holders)

    runs = sweep(scenario, errnos=[code])
    assert {"recvmsg", "setsockopt", "getsockopt", "getsockname", "send", "recv"} <= names(runs)
    assert leftovers == []
