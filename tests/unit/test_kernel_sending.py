"""The kernel backend's send side: what sendmsg is given, what is refused before, and how completions are counted."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator

import pytest

from devmem_tcp.buffers import BufferUse
from devmem_tcp.closing import Closing
from devmem_tcp.errors import KernelError, LocalProtocolError, RemoteProtocolError, Timeout
from devmem_tcp.kernel.attachment import Registry
from devmem_tcp.kernel.binding import KernelTxBinding
from devmem_tcp.kernel.socket import KernelSocket
from devmem_tcp.memory import Host
from devmem_tcp.sys import calls
from devmem_tcp.sys.messages import OffsetsMessage, ReceivedMessage
from devmem_tcp.testing.faults import sweep
from devmem_tcp.types import PAGE_SIZE, CompletionRange
from devmem_tcp.uapi.errqueue import SOL_IP, build_errqueue
from devmem_tcp.uapi.socket import MSG_ZEROCOPY
from scripted_kernel import connection, queue_stats

ID = 9
SIZE = 16 * PAGE_SIZE


class ScriptedSender:
    """The kernel's side of devmem sends: what each sendmsg was given, what it answers, and the error queue."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, list[tuple[int, int]]]] = []
        self.flags: list[int] = []
        self.answers: deque[int | OSError] = deque()  # how many bytes are taken; all, where there is none
        self.errors: deque[bytes] = deque()

    def send_offsets(self, sock: calls.Socket, message: OffsetsMessage, flags: int) -> int:
        calls._enter("sendmsg")
        self.flags.append(flags)
        answer = self.answers.popleft() if self.answers else sum(size for _, size in message.pieces)
        if isinstance(answer, OSError):
            raise answer
        self.sent.append((message.dmabuf_id, message.pieces))
        return answer

    def receive_message(self, sock: calls.Socket, message: ReceivedMessage, flags: int) -> int:
        calls._enter("recvmsg")
        assert flags == calls.MSG_ERRQUEUE | calls.MSG_DONTWAIT
        if not self.errors:
            raise BlockingIOError(errno.EAGAIN, "EAGAIN")
        control = self.errors.popleft()
        message.control[: len(control)] = control
        message.control_length = len(control)
        return 0

    def complete(self, low: int, high: int) -> None:
        self.errors.append(build_errqueue([(low, high)], level=SOL_IP))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ScriptedSender:
    model = ScriptedSender()
    monkeypatch.setattr(calls, "send_offsets", model.send_offsets)
    monkeypatch.setattr(calls, "receive_message", model.receive_message)
    return model


@pytest.fixture
def registry() -> Registry:
    return Registry(lambda napi_id: -1, queue_stats)


@pytest.fixture
def sock(registry: Registry) -> Iterator[KernelSocket]:
    with connection() as (near, _), KernelSocket(near, registry) as made:
        yield made


class NetlinkSocket(Closing):
    """Stands for the netlink socket that a binding lives by."""

    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def tx(registry: Registry) -> Iterator[KernelTxBinding]:
    with Host().allocate(SIZE) as buffer:
        pin = buffer.pin("a test", BufferUse.TX)
        with KernelTxBinding(ID, buffer, pin, NetlinkSocket(), registry) as made:
            yield made


# --- sendmsg ----------------------------------------------------------------------------------------------------------


def test_offsets_stand_for_addresses(kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding) -> None:
    assert sock.send_frags(tx, [8195, 0, 77, SIZE - 1], [10, 4096, 0, 1]) == 4107
    assert sock.send_frags(ID, [5], [6]) == 6
    assert kernel.sent == [(ID, [(8195, 10), (0, 4096), (SIZE - 1, 1)]), (ID, [(5, 6)])]
    assert all(flags & ~calls.MSG_EOR == MSG_ZEROCOPY | calls.MSG_NOSIGNAL for flags in kernel.flags)
    assert (sock.stats.sent_dmabuf_bytes, sock.stats.send_calls, sock.stats.sends_incomplete) == (4113, 2, 2)


def test_an_id_that_is_not_ours_is_the_kernels_to_judge(kernel: ScriptedSender, sock: KernelSocket) -> None:
    assert sock.send_frags(1234, [1 << 40], [10]) == 10
    assert kernel.sent == [(1234, [(1 << 40, 10)])]


@pytest.mark.parametrize(
    ("offsets", "sizes", "number"),
    [
        ([], [], errno.EINVAL),
        ([0, 5], [0, 0], errno.EINVAL),
        ([SIZE], [1], errno.EFAULT),
        ([SIZE + PAGE_SIZE], [1], errno.EFAULT),
        ([0, SIZE - 5], [100, 6], errno.EFAULT),
        ([1 << 62], [1], errno.EFAULT),
        ([0], [1 << 63], errno.EFAULT),
        (list(range(1025)), [1] * 1025, errno.EMSGSIZE),
    ],
)
def test_what_is_refused_before_the_kernel_is_asked(
    kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding, offsets: list[int], sizes: list[int], number: int
) -> None:
    with pytest.raises(KernelError) as caught:
        sock.send_frags(tx, offsets, sizes)
    assert (caught.value.errno, kernel.sent, sock.stats.send_calls) == (number, [], 0)
    assert caught.value.hint
    assert "sendmsg" in caught.value.call


def test_the_id_zero_never_reaches_the_kernel(kernel: ScriptedSender, sock: KernelSocket) -> None:
    """The kernel would take the offset for an address in this process, and send what is there."""
    with pytest.raises(KernelError) as caught:
        sock.send_frags(0, [0], [10])
    assert caught.value.errno == errno.EFAULT
    assert kernel.sent == []


@pytest.mark.parametrize(("offsets", "sizes"), [([0, 1], [10]), ([-1], [10]), ([0], [-10])])
def test_bad_arguments(
    kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding, offsets: list[int], sizes: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"offsets"):
        sock.send_frags(tx, offsets, sizes)
    assert kernel.sent == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EFAULT, errno.ENODEV, errno.ENOBUFS])
def test_what_the_kernel_refuses_uses_no_number(
    kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding, number: int
) -> None:
    kernel.answers.append(OSError(number, os.strerror(number)))
    with pytest.raises(KernelError) as caught:
        sock.send_frags(tx, [0], [10])
    assert caught.value.errno == number
    assert caught.value.hint
    with pytest.raises(LocalProtocolError):
        sock.wait_completions()
    sock.send_frags(tx, [0], [10])
    kernel.complete(0, 0)
    assert sock.wait_completions() == [CompletionRange(0, 0)]


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ECONNRESET])
def test_ordinary_trouble_stays_what_it_is(
    kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding, number: int
) -> None:
    kernel.answers.append(OSError(number, os.strerror(number)))
    with pytest.raises(ConnectionError):
        sock.send_frags(tx, [0], [10])


# --- sends in parts ---------------------------------------------------------------------------------------------------


def test_a_send_that_signals_break_off_is_one_call(
    kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding
) -> None:
    kernel.answers.extend([150, InterruptedError(errno.EINTR, ""), 100])
    assert sock.send_frags(tx, [0, 1000, 2000], [100, 100, 100]) == 300
    assert sock.send_frags(tx, [0], [1]) == 1
    assert [pieces for _, pieces in kernel.sent] == [
        [(0, 100), (1000, 100), (2000, 100)],
        [(1050, 50), (2000, 100)],
        [(2050, 50)],
        [(0, 1)],
    ]
    kernel.complete(0, 1)
    assert sock.read_completions() == []
    assert sock.stats.sends_incomplete == 2
    kernel.complete(2, 3)
    assert sock.read_completions() == [CompletionRange(0, 1)]
    assert sock.stats.sends_incomplete == 0


def test_a_failure_after_a_part_answers_the_part(
    kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding
) -> None:
    kernel.answers.extend([150, ConnectionResetError(errno.ECONNRESET, "")])
    assert sock.send_frags(tx, [0], [300]) == 150
    kernel.complete(0, 0)
    assert sock.read_completions() == [CompletionRange(0, 0)]


def test_a_time_limit_answers_what_was_taken(kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding) -> None:
    sock.settimeout(0.001)
    kernel.answers.append(150)
    kernel.answers.extend(BlockingIOError(errno.EAGAIN, "") for _ in range(100_000))
    assert sock.send_frags(tx, [0], [300]) == 150
    with pytest.raises(Timeout, match="it does not read"):
        sock.send_frags(tx, [0], [300])
    assert sock.stats.send_calls == 1


def test_a_sender_that_would_block(kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding) -> None:
    sock.settimeout(0)
    kernel.answers.extend([150, BlockingIOError(errno.EAGAIN, "")])
    assert sock.send_frags(tx, [0], [300]) == 150
    with pytest.raises(BlockingIOError):
        sock.send_frags(tx, [0], [300])
    assert all(flags & calls.MSG_DONTWAIT for flags in kernel.flags)
    assert sock.stats.send_calls == 1


def test_no_room_for_another_completion(kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding) -> None:
    sock.send_frags(tx, [0], [1])
    kernel.complete(0, 0)
    kernel.answers.append(OSError(errno.ENOBUFS, ""))
    assert sock.send_frags(tx, [0], [1]) == 1, "a blocking sender collects completions, and goes on"
    assert sock.read_completions() == [CompletionRange(0, 0)]
    sock.settimeout(0)
    kernel.answers.append(OSError(errno.ENOBUFS, ""))
    with pytest.raises(BlockingIOError, match="read_completions"):
        sock.send_frags(tx, [0], [1])
    kernel.complete(1, 1)
    assert sock.read_completions() == [CompletionRange(1, 1)]


def split(kernel: ScriptedSender) -> list[tuple[int, bool]]:
    """Return of each sendmsg how many pieces it had, and whether the next one has to go into another packet."""
    return [
        (len(pieces), bool(flags & calls.MSG_EOR)) for (_, pieces), flags in zip(kernel.sent, kernel.flags, strict=True)
    ]


def test_no_packet_gets_more_pieces_than_a_nic_takes(
    kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "getsockopt_bytes", lambda *_: (1448).to_bytes(4, "little"))
    assert sock.send_frags(tx, [0] * 10, [1] * 10) == 10
    assert split(kernel) == [(4, True), (4, True), (2, True)]
    assert [offset for _, pieces in kernel.sent for offset, _ in pieces] == [0] * 10
    kernel.complete(0, 1)
    assert sock.read_completions() == []
    kernel.complete(2, 2)
    assert sock.read_completions() == [CompletionRange(0, 0)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([16 * PAGE_SIZE], [(1, False)]),
        ([PAGE_SIZE] * 1024, [(1024, False)]),
        ([PAGE_SIZE] * 1023 + [10], [(1024, True)]),
        ([362] * 1024, [(1024, True)]),
        ([1447], [(1, True)]),
        ([1448], [(1, False)]),
        ([PAGE_SIZE, 100, 100, 100, 100, PAGE_SIZE], [(4, True), (2, False)]),
    ],
)
def test_large_pieces_go_in_one_call(
    kernel: ScriptedSender,
    sock: KernelSocket,
    tx: KernelTxBinding,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    expected: list[tuple[int, bool]],
) -> None:
    monkeypatch.setattr(calls, "getsockopt_bytes", lambda *_: (1448).to_bytes(4, "little"))
    assert sock.send_frags(tx, [0] * len(sizes), sizes) == sum(sizes)
    assert split(kernel) == expected


def test_small_pieces_on_a_socket_that_would_block(
    kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding
) -> None:
    sock.settimeout(0)
    kernel.answers.extend([4, 3])
    assert sock.send_frags(tx, [0] * 10, [1] * 10) == 7
    kernel.answers.extend([4, BlockingIOError(errno.EAGAIN, "")])
    assert sock.send_frags(tx, [0] * 10, [1] * 10) == 4
    kernel.complete(0, 2)
    assert sock.read_completions() == [CompletionRange(0, 1)]


# --- completions ------------------------------------------------------------------------------------------------------


def test_completions_are_coalesced_and_count_on_past_32_bits(
    kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding
) -> None:
    for _ in range(4):
        sock.send_frags(tx, [0], [1])
    kernel.complete(0, 1)
    kernel.complete(2, 2)
    assert sock.wait_completions() == [CompletionRange(0, 2)]
    assert sock.read_completions() == []
    assert sock.stats.sends_incomplete == 1
    with pytest.raises(Timeout, match="none of 1 sends"):
        sock.wait_completions(0.001)
    kernel.complete(3, 3)
    assert sock.wait_completions(10.0) == [CompletionRange(3, 3)]


def test_other_reports_on_the_error_queue_are_passed_over(
    kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding
) -> None:
    sock.send_frags(tx, [0], [1])
    kernel.complete(0, 0)
    icmp = bytearray(kernel.errors[0])
    icmp[20] = 2  # ee_origin: SO_EE_ORIGIN_ICMP
    kernel.errors.appendleft(bytes(icmp))
    assert sock.read_completions() == [CompletionRange(0, 0)]


def test_a_completion_of_nothing_is_an_error(kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding) -> None:
    kernel.complete(0, 0)
    with pytest.raises(RemoteProtocolError):
        sock.read_completions()


# --- real connections, without devmem ---------------------------------------------------------------------------------


def test_ordinary_sends(registry: Registry) -> None:
    with connection() as (near, far), KernelSocket(near, registry) as sock:
        assert sock.send(b"one") == 3
        assert far.recv(10) == b"one"
        sock.settimeout(0.05)
        with pytest.raises(Timeout, match="it does not read"):
            send_for_ever(lambda: sock.send(bytes(1 << 20)))
        sock.settimeout(0)
        with pytest.raises(BlockingIOError):
            sock.send(bytes(1 << 20))
        reader = threading.Thread(target=read_to_end, args=[far])
        reader.start()
        sock.settimeout(None)
        assert sock.send(bytes(1 << 22)) == 1 << 22
        assert sock.stats.sent_host_bytes > 1 << 22
        sock.shutdown_send()
        reader.join()


def send_for_ever(send: Callable[[], int]) -> None:
    while True:
        assert send() > 0


def read_to_end(far: socket.socket) -> None:
    while far.recv(1 << 20):
        pass


def test_real_completions(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero-copy sends of this process's memory over loopback: the same error queue, by the same code."""
    memory = bytearray(b"x" * 5000)
    with connection() as (near, far), KernelSocket(near, registry) as sock:
        sock.set_zerocopy()

        def send_memory(sock: calls.Socket, message: OffsetsMessage, flags: int) -> int:
            return near.sendmsg([memory], [], flags)

        monkeypatch.setattr(calls, "send_offsets", send_memory)
        for _ in range(3):
            assert sock.send_frags(77, [0], [5000]) == 5000
        received = 0
        while received < 15_000:
            received += len(far.recv(15_000))
        complete: list[int] = []
        while len(complete) < 3:
            for low, high in sock.wait_completions(10.0):
                complete.extend(range(low, high + 1))
        assert complete == [0, 1, 2]
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        with pytest.raises(ConnectionError):
            send_for_ever(lambda: sock.send_frags(77, [0], [5000]))


def test_waits_on_a_dead_connection_end_in_time(
    kernel: ScriptedSender, sock: KernelSocket, tx: KernelTxBinding
) -> None:
    """poll reports a connection that is over at once and always."""
    sock.send_frags(tx, [0], [1])
    sock._sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(Timeout):
        sock.wait_completions(0.02)


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EPERM, errno.EPIPE], ids=errno.errorcode.get)
def test_every_call_fails_once(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def scenario() -> None:
        model, registry = ScriptedSender(), Registry(lambda napi_id: -1, queue_stats)
        monkeypatch.setattr(calls, "send_offsets", model.send_offsets)
        monkeypatch.setattr(calls, "receive_message", model.receive_message)
        with Host().allocate(SIZE) as buffer:
            pin = buffer.pin("a test", BufferUse.TX)
            with (
                KernelTxBinding(ID, buffer, pin, NetlinkSocket(), registry) as tx,
                connection() as (near, _),
                KernelSocket(near, registry) as sock,
            ):
                sock.set_zerocopy()
                sock.settimeout(5.0)
                model.answers.append(3)
                sock.send_frags(tx, [0], [10])
                model.complete(0, 1)
                sock.wait_completions(1.0)
                sock.send(b"tail")
                sock.shutdown_send()

    assert {"setsockopt", "sendmsg", "recvmsg", "send", "shutdown"} <= {
        run.call for run in sweep(scenario, errnos=[code])
    }
