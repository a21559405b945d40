"""The kernel backend's socket and bindings against Linux and a NIC's own driver: run in a guest of the lab.

    devmem-tcp lab run --memory 2G -- .venv/bin/pytest tests/guest/test_kernel_socket.py

The NIC is NETIF, driven by gve; the far end is in the network namespace ``peer``.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, cast

import numpy as np
import pytest

from devmem_tcp.buffers import Buffer, CpuAccess
from devmem_tcp.contract import RxBinding, TxBinding
from devmem_tcp.errors import BusyError, KernelError, NotZeroCopy, StarvationWarning, Timeout
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.attachment import Registry
from devmem_tcp.kernel.binding import KernelRxBinding, bind_rx, bind_tx
from devmem_tcp.kernel.control import NicControl
from devmem_tcp.kernel.settings import NicSettings
from devmem_tcp.kernel.socket import KernelSocket
from devmem_tcp.memory import Udmabuf
from devmem_tcp.sys import calls
from devmem_tcp.sys.messages import ReceivedMessage
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.types import PAGE_SIZE, CompletionRange, FlowRule, FragBatch, FragKind, QueueStats
from devmem_tcp.uapi.netdev import FAMILY, QueueType
from devmem_tcp.uapi.socket import MSG_SOCK_DEVMEM, pack_tokens
from far_end import FarEnd

NIC: Final = os.environ["NETIF"]
NEAR: Final = {4: os.environ["LOCAL_V4"], 6: os.environ["LOCAL_V6"]}
FAR: Final = FarEnd("peer", os.environ["REMOTE_V4"], os.environ["REMOTE_V6"])
QUEUE: Final = 1  # gve cannot restart queue 0
STEERED_PORT: Final = 5201
PATIENCE_S: Final = 30.0
MIB: Final = 1 << 20


class Attached(NamedTuple):
    """Queues with a dma-buf attached, for as long as a netlink socket is open."""

    dmabuf_id: int
    netlink: GenericNetlink

    def close(self) -> None:
        self.netlink.close()


class Control:
    """As much of a NicControl as binding takes."""

    def attach(self, dmabuf_fd: int, queues: Sequence[int], rx_page_size: int) -> Attached:
        netlink = GenericNetlink(FAMILY)
        try:
            return Attached(netdev.bind_rx(netlink, ifindex(), dmabuf_fd, queues), netlink)
        except BaseException:
            netlink.close()
            raise


CONTROL: Final = cast(NicControl, Control())


def ifindex() -> int:
    return socket.if_nametoindex(NIC)


def queue_of_napi(napi_id: int) -> int:
    found = netdev.queues(ifindex())
    return {one.napi_id: one.queue for one in found if one.type is QueueType.RX}.get(napi_id, -1)


def queue_stats(queue: int) -> QueueStats:
    counters = {one.queue: one.counters for one in netdev.queue_statistics(ifindex()) if one.type is QueueType.RX}
    drops = counters[queue].get("rx-alloc-fail", 0)
    return QueueStats(queue, 0, rx_bytes=0, rx_alloc_fail=drops, pages_total=SMALL_PAGES, pages_inflight=0)


SMALL_PAGES: Final = 128


@pytest.fixture(scope="module", autouse=True)
def steering() -> Iterator[None]:
    """Header split on, RSS on queue 0, one port steered to the queue that is bound."""
    with NicSettings(NIC) as settings:
        settings.set_header_split("on")
        settings.set_rss(equal=1)
        settings.add_ntuple(FlowRule(dst_port=STEERED_PORT, queue=QUEUE))
        yield


class Ends(NamedTuple):
    """One connection: our end and the far one's plain socket."""

    sock: KernelSocket
    far: socket.socket


class Near:
    """The near end of the wire: makes bindings and connections, and closes them in order."""

    def __init__(self) -> None:
        self.registry = Registry(queue_of_napi, queue_stats)
        self._ends: list[Ends] = []
        self._buffers: list[Buffer] = []

    def allocate(self, size_bytes: int) -> Buffer:
        buffer = Udmabuf().allocate(size_bytes)
        self._buffers.append(buffer)
        return buffer

    def bind(self, size_bytes: int) -> KernelRxBinding:
        return bind_rx(self.registry, CONTROL, self.allocate(size_bytes), [QUEUE])

    def connect(self, *, version: int = 4, steered: bool = True, strict: bool = False) -> Ends:
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        with socket.create_server((NEAR[version], STEERED_PORT if steered else 0), family=family) as listener:
            far = FAR.connect(listener.getsockname()[:2], PATIENCE_S)
            accepted, _ = listener.accept()
        sock = KernelSocket(accepted, self.registry, strict=strict)
        sock.settimeout(PATIENCE_S)
        self._ends.append(Ends(sock, far))
        return self._ends[-1]

    def close(self) -> None:
        for sock, far in self._ends:
            sock.close()
            far.close()
        for binding in [*self.registry.rx.values(), *self.registry.tx.values()]:
            binding.close()
        for buffer in self._buffers:
            buffer.close()


@pytest.fixture
def near() -> Iterator[Near]:
    made = Near()
    yield made
    made.close()


def content(size: int, seed: int = 1) -> bytes:
    words: np.ndarray = np.random.SFC64(seed).random_raw(-(-size // 8))
    return words.tobytes()[:size]


def read(batch: FragBatch, buffer: Buffer) -> bytes:
    """Return the bytes of a batch, in TCP order."""
    with buffer.cpu_access(CpuAccess.READ) as memory:
        return b"".join(
            bytes((memory if kind == FragKind.DMABUF else batch.inline)[offset : offset + size])
            for offset, size, _, _, kind in batch.frags.tolist()
        )


def receive(ends: Ends, buffer: Buffer, size: int, *, max_bytes: int = MIB) -> bytes:
    got = bytearray()
    while len(got) < size:
        with ends.sock.recv_frags(min(max_bytes, size - len(got))) as batch:
            assert batch, "the stream ended early"
            got += read(batch, buffer)
    return bytes(got)


def drained(rx: RxBinding) -> bool:
    return rx.drained


# --- receiving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
def test_payload_lands_in_the_buffer(near: Near, version: int) -> None:
    rx = near.bind(16 * MIB)
    ends = near.connect(version=version)
    data = content(8 * MIB)
    sender = threading.Thread(target=ends.far.sendall, args=[data])
    sender.start()
    assert receive(ends, rx.buffer, len(data)) == data
    sender.join()
    ends.far.shutdown(socket.SHUT_WR)
    assert not ends.sock.recv_frags()
    stats = ends.sock.stats
    print(stats)
    assert stats.dmabuf_bytes == len(data)
    assert stats.frags >= 20 * stats.dontneed_calls
    assert stats.tokens_out == 0
    assert ends.sock.rx_queue == QUEUE
    assert drained(rx)


def test_small_reads_give_a_token_a_piece(near: Near) -> None:
    rx = near.bind(MIB)
    ends = near.connect()
    ends.far.sendall(b"0123456789")
    batches = [ends.sock.recv_frags(3) for _ in range(3)]
    assert [batch.tokens.tolist() for batch in batches] == [[1], [2], [3]]
    assert b"".join(read(batch, rx.buffer) for batch in batches) == b"012345678"
    assert {batch.dmabuf_ids[0] for batch in batches} == {rx.dmabuf_id}
    assert ends.sock.dontneed(pack_tokens([2, 2, 77], [1, 5, 3])) == 2
    assert ends.sock.stats.tokens_out == 1
    assert [holder.tokens for holder in rx.holders()] == [1]
    assert ends.sock.recv_frags(1).tokens.tolist() == [2], "the lowest free token comes first"


def test_without_the_flag_nothing_is_consumed(near: Near) -> None:
    rx = near.bind(MIB)
    ends = near.connect()
    ends.far.sendall(b"0123456789")
    with pytest.raises(KernelError) as caught:
        ends.sock.recv_into(bytearray(10))
    assert caught.value.errno == errno.EFAULT
    assert receive(ends, rx.buffer, 10) == b"0123456789"


def test_no_room_for_a_control_message_is_etoosmall(near: Near) -> None:
    rx = near.bind(MIB)
    ends = near.connect()
    ends.far.sendall(b"0123456789")
    ends.sock.recv_frags(1).release()
    message = ReceivedMessage()
    message.prepare(10, 39)
    with pytest.raises(OSError, match="525") as caught:
        calls.receive_message(ends.sock._sock, message, MSG_SOCK_DEVMEM)
    assert caught.value.errno == 525
    assert receive(ends, rx.buffer, 9) == b"123456789"


def test_few_control_messages_make_reads_short(near: Near) -> None:
    rx = near.bind(MIB)
    ends = near.connect()
    data = content(20_000)
    ends.far.sendall(data)
    got = b""
    while len(got) < len(data):
        with ends.sock.recv_frags(max_frags=2) as batch:
            assert 1 <= len(batch) <= 2
            got += read(batch, rx.buffer)
    assert got == data


def test_discarded_bytes_cost_no_token(near: Near) -> None:
    rx = near.bind(MIB)
    ends = near.connect()
    ends.far.sendall(bytes(9_990) + b"0123456789")
    dropped = 0
    while dropped < 9_990:
        dropped += ends.sock.discard(9_990 - dropped)
    assert ends.sock.stats.tokens_out == 0
    assert receive(ends, rx.buffer, 10) == b"0123456789"


def test_unsteered_data_is_ordinary(near: Near) -> None:
    near.bind(MIB)
    ends = near.connect(steered=False, strict=True)
    ends.far.sendall(b"plain")
    with pytest.raises(NotZeroCopy) as caught:
        ends.sock.recv_frags()
    assert caught.value.data == b"plain"
    assert ends.sock.rx_queue == 0
    ends.far.sendall(b"again")
    target = bytearray(10)
    assert ends.sock.recv_into(target) == 5
    assert target[:5] == b"again"


def test_the_fd_is_for_selectors(near: Near) -> None:
    near.bind(MIB)
    ends = near.connect()
    ends.sock.settimeout(0)
    with pytest.raises(BlockingIOError):
        ends.sock.recv_frags()
    with selectors.DefaultSelector() as selector:
        selector.register(ends.sock, selectors.EVENT_READ)
        assert selector.select(0) == []
        ends.far.sendall(b"x")
        assert selector.select(PATIENCE_S)
        assert ends.sock.recv_frags().nbytes == 1
        assert selector.select(0) == []


# --- exhaustion -------------------------------------------------------------------------------------------------------


def test_a_slow_consumer_is_reported_and_loses_nothing(near: Near) -> None:
    rx = near.bind(SMALL_PAGES * PAGE_SIZE)
    ends = near.connect()
    data = content(2 * MIB)
    sender = threading.Thread(target=ends.far.sendall, args=[data])
    sender.start()
    held: list[FragBatch] = []
    ends.sock.settimeout(4.0)
    started = time.monotonic()
    with pytest.warns(StarvationWarning, match=f"RX queue {QUEUE}") as caught, pytest.raises(Timeout) as timed_out:
        held.extend(iter(ends.sock.recv_frags, None))
    print(caught[0].message, f"after {time.monotonic() - started:.1f} s")
    assert "by the connection from" in str(timed_out.value)
    got = b"".join(read(batch, rx.buffer) for batch in held)
    for batch in held:
        batch.release()
    ends.sock.settimeout(PATIENCE_S)
    assert got + receive(ends, rx.buffer, len(data) - len(got)) == data
    sender.join()
    assert drained(rx)


# --- bindings ---------------------------------------------------------------------------------------------------------


def test_a_binding_that_closes_with_tokens_out(near: Near) -> None:
    rx = near.bind(MIB)
    ends = near.connect()
    ends.far.sendall(b"0123456789")
    held = ends.sock.recv_frags(4)
    rx.close()
    assert not drained(rx)
    with pytest.raises(BusyError):
        bind_rx(near.registry, CONTROL, rx.buffer, [QUEUE])
    rest = ends.sock.recv_frags()
    assert read(held, rx.buffer) + read(rest, rx.buffer) == b"0123456789"
    ends.far.sendall(b"later")
    assert bytes(ends.sock.recv_frags().inline) == b"later"
    held.release()
    assert rx.buffer.holders
    rest.release()
    assert rx.buffer.holders == ()
    assert drained(rx)
    with bind_rx(near.registry, CONTROL, rx.buffer, [QUEUE]) as again:
        assert again.dmabuf_id > rx.dmabuf_id
        ends.far.sendall(b"landed")
        assert receive(ends, rx.buffer, 6) == b"landed"
    assert drained(again)


def test_a_binding_that_closes_over_unread_data(near: Near) -> None:
    rx = near.bind(MIB)
    ends = near.connect()
    ends.far.sendall(b"0123456789")
    with selectors.DefaultSelector() as selector:
        selector.register(ends.sock, selectors.EVENT_READ)
        assert selector.select(PATIENCE_S)
    rx.close()
    assert rx.buffer.holders, "unread data may lie in the buffer"
    batch = ends.sock.recv_frags()
    assert batch.dmabuf_ids.tolist() == [rx.dmabuf_id]
    batch.release()
    assert rx.buffer.holders == ()


def test_a_socket_that_closes_frees_its_pages(near: Near) -> None:
    rx = near.bind(SMALL_PAGES * PAGE_SIZE)
    hog = near.connect()
    hog.far.sendall(content(100_000))
    held = 0
    while held < 100_000:
        held += hog.sock.recv_frags(100_000 - held).nbytes
    assert rx.holders()
    hog.sock.close()
    assert rx.holders() == ()
    assert drained(rx)
    other = near.connect()
    data = content(MIB)
    sender = threading.Thread(target=other.far.sendall, args=[data])
    sender.start()
    assert receive(other, rx.buffer, len(data)) == data
    sender.join()


# --- sending ----------------------------------------------------------------------------------------------------------


def read_exactly(far: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        part = far.recv(size - len(got))
        assert part, "the stream ended early"
        got += part
    return bytes(got)


def wait_for(sock: KernelSocket, sends: int) -> list[CompletionRange]:
    """Wait until all sends are complete; each comes once, in order."""
    ranges: list[CompletionRange] = []
    upcoming = 0
    while upcoming < sends:
        for low, high in sock.wait_completions(PATIENCE_S):
            assert low == upcoming <= high
            upcoming = high + 1
            ranges.append(CompletionRange(low, high))
    assert upcoming == sends
    return ranges


@pytest.mark.parametrize("version", [4, 6])
def test_sends_pieces_by_offset(near: Near, version: int) -> None:
    buffer = near.allocate(MIB)
    data = content(MIB)
    with buffer.cpu_access(CpuAccess.WRITE) as memory:
        memory[:] = data
    tx = bind_tx(near.registry, ifindex(), buffer)
    ends = near.connect(version=version, steered=False)
    ends.sock.set_zerocopy()
    assert ends.sock.send_frags(tx, [8195, 0, 4095, 0], [10, 5, 4000, 0]) == 4015
    assert ends.sock.send(b"plain") == 5
    assert ends.sock.send_frags(tx.dmabuf_id, [len(data) - 1], [1]) == 1
    expected = data[8195:8205] + data[:5] + data[4095:8095] + b"plain" + data[-1:]
    assert read_exactly(ends.far, len(expected)) == expected
    wait_for(ends.sock, 2)
    assert ends.sock.stats.sends_incomplete == 0
    assert ends.sock.stats.sent_dmabuf_bytes == 4016


def test_a_blocking_send_takes_everything(near: Near) -> None:
    buffer = near.allocate(16 * MIB)
    data = content(16 * MIB)
    with buffer.cpu_access(CpuAccess.WRITE) as memory:
        memory[:] = data
    tx = bind_tx(near.registry, ifindex(), buffer)
    ends = near.connect(steered=False)
    ends.sock.set_zerocopy()
    ends.sock.settimeout(None)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read_exactly(ends.far, len(data))))
    reader.start()
    assert ends.sock.send_frags(tx, [0], [len(data)]) == len(data)
    reader.join()
    assert got == [data]
    assert wait_for(ends.sock, 1) == [CompletionRange(0, 0)]


def send_for_ever(sock: KernelSocket, tx: TxBinding) -> None:
    while True:
        assert sock.send_frags(tx, [0], [tx.buffer.size_bytes]) > 0


def test_a_peer_that_does_not_read(near: Near) -> None:
    buffer = near.allocate(16 * MIB)
    tx = bind_tx(near.registry, ifindex(), buffer)
    ends = near.connect(steered=False)
    ends.sock.set_zerocopy()
    ends.sock.settimeout(0.3)
    taken = ends.sock.send_frags(tx, [0], [buffer.size_bytes])
    assert 0 < taken < buffer.size_bytes
    with pytest.raises(Timeout, match="it does not read"):
        send_for_ever(ends.sock, tx)
    ends.sock.settimeout(0)
    with pytest.raises(BlockingIOError):
        send_for_ever(ends.sock, tx)
    stats = ends.sock.stats
    assert read_exactly(ends.far, stats.sent_dmabuf_bytes) == bytes(stats.sent_dmabuf_bytes)
    wait_for(ends.sock, stats.send_calls)


def test_many_small_pieces_arrive(near: Near) -> None:
    """gve would drop a packet of more than nine pieces in device memory, again and again."""
    buffer = near.allocate(MIB)
    data = content(MIB)
    with buffer.cpu_access(CpuAccess.WRITE) as memory:
        memory[:] = data
    tx = bind_tx(near.registry, ifindex(), buffer)
    ends = near.connect(steered=False)
    ends.sock.set_zerocopy()
    assert ends.sock.send_frags(tx, list(range(0, 2048, 2)), [1] * 1024) == 1024
    for number in range(40):
        assert ends.sock.send_frags(tx, [number], [1]) == 1
    assert ends.sock.send_frags(tx, list(range(4090, 40 * 4096, 4096)), [100] * 40) == 4000
    expected = data[:2048:2] + data[:40] + b"".join(data[at : at + 100] for at in range(4090, 40 * 4096, 4096))
    assert read_exactly(ends.far, len(expected)) == expected
    wait_for(ends.sock, 42)


@pytest.fixture
def room_for_one_completion() -> Iterator[None]:
    path = Path("/proc/sys/net/core/optmem_max")
    before = path.read_text()
    path.write_text("1000")
    yield
    path.write_text(before)


@pytest.mark.usefixtures("room_for_one_completion")
def test_no_room_for_more_completions(near: Near) -> None:
    """ENOBUFS: a blocking sender collects completions and goes on, another one is told to."""
    buffer = near.allocate(PAGE_SIZE)
    tx = bind_tx(near.registry, ifindex(), buffer)
    ends = near.connect(steered=False)
    ends.sock.set_zerocopy()
    for _ in range(20):
        assert ends.sock.send_frags(tx, [0], [1448]) == 1448
    ends.sock.settimeout(0)
    with pytest.raises(BlockingIOError, match="read_completions"):
        send_for_ever(ends.sock, tx)
    stats = ends.sock.stats
    assert read_exactly(ends.far, stats.sent_dmabuf_bytes) == bytes(stats.sent_dmabuf_bytes)
    wait_for(ends.sock, stats.send_calls)
    assert ends.sock.send_frags(tx, [0], [1448]) == 1448


@pytest.mark.parametrize(
    ("which", "offsets", "sizes", "number"),
    [
        ("tx", [0], [0], errno.EINVAL),
        ("tx", [], [], errno.EINVAL),
        ("tx", [MIB], [1], errno.EFAULT),
        ("tx", [0, MIB - 5], [100, 6], errno.EFAULT),
        ("unknown", [0], [10], errno.EINVAL),
        ("rx", [0], [10], errno.EINVAL),
        ("closed", [0], [10], errno.EINVAL),
        ("zero", [0], [10], errno.EFAULT),
        ("tx", [0] * 1025, [1] * 1025, errno.EMSGSIZE),
    ],
)
def test_refused_sends(near: Near, which: str, offsets: list[int], sizes: list[int], number: int) -> None:
    buffer = near.allocate(MIB)
    tx = bind_tx(near.registry, ifindex(), buffer)
    closed = bind_tx(near.registry, ifindex(), buffer)
    closed.close()
    ids: dict[str, TxBinding | int] = {"tx": tx, "unknown": 0x7FFF_FFFF, "closed": closed.dmabuf_id, "zero": 0}
    if which == "rx":
        ids["rx"] = near.bind(MIB).dmabuf_id
    ends = near.connect(steered=False)
    ends.sock.set_zerocopy()
    with pytest.raises(KernelError) as caught:
        ends.sock.send_frags(ids[which], offsets, sizes)
    assert caught.value.errno == number
    assert caught.value.hint
    ends.sock.send(b"marker")
    assert read_exactly(ends.far, 6) == b"marker"
    assert ends.sock.send_frags(tx, [0], [10]) == 10
    assert wait_for(ends.sock, 1) == [CompletionRange(0, 0)]


def test_without_set_zerocopy_is_einval(near: Near) -> None:
    tx = bind_tx(near.registry, ifindex(), near.allocate(MIB))
    ends = near.connect(steered=False)
    with pytest.raises(KernelError) as caught:
        ends.sock.send_frags(tx, [0], [10])
    assert caught.value.errno == errno.EINVAL
    assert "set_zerocopy" in caught.value.hint


def test_both_ways_at_once(near: Near) -> None:
    """Completions that nobody has collected yet are no reason to spin or to fail for who receives."""
    rx = near.bind(4 * MIB)
    buffer = near.allocate(MIB)
    tx = bind_tx(near.registry, ifindex(), buffer)
    ends = near.connect()
    ends.sock.set_zerocopy()
    for _ in range(10):
        ends.sock.send_frags(tx, [0], [1000])
    assert read_exactly(ends.far, 10_000) == bytes(10_000)
    ends.sock.settimeout(0.3)
    used = time.process_time()
    with pytest.raises(Timeout):
        ends.sock.recv_frags()
    assert time.process_time() - used < 0.2
    ends.sock.settimeout(PATIENCE_S)
    data = content(200_000)
    ends.far.sendall(data)
    assert receive(ends, rx.buffer, len(data)) == data
    wait_for(ends.sock, 10)
