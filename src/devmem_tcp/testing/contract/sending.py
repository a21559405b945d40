"""send_frags: the bytes of the pieces in their order, what is refused and how, and completions."""

from __future__ import annotations

import errno
import socket
from itertools import pairwise
from typing import NamedTuple

from devmem_tcp.buffers import Buffer, CpuAccess
from devmem_tcp.contract import DevmemSocket, TxBinding
from devmem_tcp.errors import KernelError, LocalProtocolError, Timeout
from devmem_tcp.testing.contract.expect import raises
from devmem_tcp.testing.contract.rig import Rig
from devmem_tcp.types import PAGE_SIZE, CompletionRange, DmabufFrag
from devmem_tcp.uapi.socket import MAX_IOVECS

UNKNOWN_ID = 0x7FFF_FFFF
MARKER = b"nothing was sent before this"


class TxPair(NamedTuple):
    """A connection that may send from a bound Buffer, whose bytes are ``content``."""

    sock: DevmemSocket
    peer: socket.socket
    tx: TxBinding
    content: bytes


def fill(rig: Rig, buffer: Buffer) -> bytes:
    content = rig.payload(buffer.size_bytes)
    with buffer.cpu_access(CpuAccess.WRITE) as view:
        view[:] = content
    return content


def tx_pair(rig: Rig, *, host: str | None = None) -> TxPair:
    buffer = rig.allocate()
    content = fill(rig, buffer)
    sock, peer, _ = rig.pair(steer=False, host=host)
    sock.set_zerocopy()
    return TxPair(sock, peer, rig.nic.bind_tx(buffer), content)


def read_exactly(peer: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        part = peer.recv(size - len(got))
        assert part, f"stream ended {size - len(got)} bytes early"
        got += part
    return bytes(got)


def wait_for(rig: Rig, sock: DevmemSocket, sends: int, *, first: int = 0) -> list[CompletionRange]:
    """Wait until ``sends`` sends are complete, the first of number ``first``; they must come once each, in order."""
    ranges: list[CompletionRange] = []
    upcoming = first
    while upcoming < first + sends:
        some = sock.wait_completions(rig.patience_s)
        assert some, "wait_completions came back with nothing"
        for low, high in some:
            assert low == upcoming <= high, f"completion {low} to {high} where {upcoming} was next"
            upcoming = high + 1
        assert all(after.low != before.high + 1 for before, after in pairwise(some)), f"{some} is not coalesced"
        ranges += some
    assert upcoming == first + sends, "completions for sends that were never made"
    return ranges


def check_nothing_was_sent(rig: Rig, pair: TxPair) -> None:
    """Check that no byte of the refused calls went out, and that they used no number."""
    assert pair.sock.send(MARKER) == len(MARKER)
    assert read_exactly(pair.peer, len(MARKER)) == MARKER
    assert pair.sock.read_completions() == []
    with raises(LocalProtocolError):
        pair.sock.wait_completions(rig.patience_s)
    pair.sock.set_zerocopy()
    assert pair.sock.send_frags(pair.tx, [0], [10]) == 10
    assert read_exactly(pair.peer, 10) == pair.content[:10]
    wait_for(rig, pair.sock, 1)


def refuse(rig: Rig, pair: TxPair, code: int, tx: TxBinding | int, offsets: list[int], sizes: list[int]) -> None:
    with raises(KernelError, code) as caught:
        pair.sock.send_frags(tx, offsets, sizes)
    assert "sendmsg" in caught.error.call
    check_nothing_was_sent(rig, pair)


def test_sends_pieces_in_their_order(rig: Rig) -> None:
    for host in rig.hosts:
        pair = tx_pair(rig, host=host)
        offsets, sizes = [2 * PAGE_SIZE + 3, 0, PAGE_SIZE - 1, 0], [10, 5, 4000, 1]
        expected = b"".join(pair.content[at : at + size] for at, size in zip(offsets, sizes, strict=True))
        assert pair.sock.send_frags(pair.tx, offsets, sizes) == len(expected)
        assert read_exactly(pair.peer, len(expected)) == expected
        wait_for(rig, pair.sock, 1)


def test_sends_the_whole_buffer(rig: Rig) -> None:
    pair = tx_pair(rig)
    half = len(pair.content) // 2
    sent = 0
    pair.sock.settimeout(0)
    got = bytearray()
    sends = 0
    while sent < len(pair.content):
        try:
            sent += pair.sock.send_frags(pair.tx, [sent], [min(half, len(pair.content) - sent)])
            sends += 1
        except BlockingIOError:
            got += pair.peer.recv(1 << 20)
    pair.sock.settimeout(rig.patience_s)
    got += read_exactly(pair.peer, sent - len(got))
    assert got == pair.content
    wait_for(rig, pair.sock, sends)


def test_takes_the_bindings_id(rig: Rig) -> None:
    pair = tx_pair(rig)
    assert pair.sock.send_frags(pair.tx.dmabuf_id, [7], [20]) == 20
    assert read_exactly(pair.peer, 20) == pair.content[7:27]
    wait_for(rig, pair.sock, 1)


def test_1024_pieces_are_the_limit(rig: Rig) -> None:
    pair = tx_pair(rig)
    offsets = list(range(0, 2 * MAX_IOVECS, 2))
    assert pair.sock.send_frags(pair.tx, offsets, [1] * MAX_IOVECS) == MAX_IOVECS
    assert read_exactly(pair.peer, MAX_IOVECS) == pair.content[: 2 * MAX_IOVECS : 2]
    wait_for(rig, pair.sock, 1)
    with raises(KernelError, errno.EMSGSIZE):
        pair.sock.send_frags(pair.tx, [*offsets, 0], [1] * (MAX_IOVECS + 1))
    assert pair.sock.send_frags(pair.tx, [0], [3]) == 3
    assert read_exactly(pair.peer, 3) == pair.content[:3]
    wait_for(rig, pair.sock, 1, first=1)


def test_last_byte_can_be_sent(rig: Rig) -> None:
    pair = tx_pair(rig)
    assert pair.sock.send_frags(pair.tx, [len(pair.content) - 1], [1]) == 1
    assert read_exactly(pair.peer, 1) == pair.content[-1:]


def test_without_set_zerocopy_is_einval(rig: Rig) -> None:
    sock, peer, _ = rig.pair(steer=False)
    buffer = rig.allocate()
    pair = TxPair(sock, peer, rig.nic.bind_tx(buffer), fill(rig, buffer))
    refuse(rig, pair, errno.EINVAL, pair.tx, [0], [10])


def test_unknown_id_is_einval(rig: Rig) -> None:
    pair = tx_pair(rig)
    refuse(rig, pair, errno.EINVAL, UNKNOWN_ID, [0], [10])


def test_id_of_an_rx_binding_is_einval(rig: Rig) -> None:
    pair = tx_pair(rig)
    refuse(rig, pair, errno.EINVAL, rig.bind().dmabuf_id, [0], [10])


def test_closed_binding_is_einval(rig: Rig) -> None:
    pair = tx_pair(rig)
    other = rig.nic.bind_tx(pair.tx.buffer)
    other.close()
    with raises(KernelError, errno.EINVAL):
        pair.sock.send_frags(other, [0], [10])
    refuse(rig, pair, errno.EINVAL, other.dmabuf_id, [0], [10])


def test_nothing_to_send_is_einval(rig: Rig) -> None:
    pair = tx_pair(rig)
    for offsets, sizes in (([], []), ([0], [0]), ([0, 5], [0, 0])):
        with raises(KernelError, errno.EINVAL):
            pair.sock.send_frags(pair.tx, offsets, sizes)
    check_nothing_was_sent(rig, pair)


def test_id_zero_is_efault(rig: Rig) -> None:
    pair = tx_pair(rig)
    refuse(rig, pair, errno.EFAULT, 0, [0], [10])


def test_offset_at_the_end_is_efault(rig: Rig) -> None:
    pair = tx_pair(rig)
    refuse(rig, pair, errno.EFAULT, pair.tx, [len(pair.content)], [1])


def test_offset_past_the_end_is_efault(rig: Rig) -> None:
    pair = tx_pair(rig)
    refuse(rig, pair, errno.EFAULT, pair.tx, [len(pair.content) + PAGE_SIZE], [1])


def test_range_across_the_end_is_efault(rig: Rig) -> None:
    pair = tx_pair(rig)
    refuse(rig, pair, errno.EFAULT, pair.tx, [len(pair.content) - 5], [6])


def test_one_bad_piece_sends_none(rig: Rig) -> None:
    pair = tx_pair(rig)
    refuse(rig, pair, errno.EFAULT, pair.tx, [0, len(pair.content) - 5], [100, 6])


def test_unequal_columns_are_a_value_error(rig: Rig) -> None:
    pair = tx_pair(rig)
    with raises(ValueError):
        pair.sock.send_frags(pair.tx, [0, 1], [10])
    check_nothing_was_sent(rig, pair)


def test_completions_cover_every_send_once(rig: Rig) -> None:
    pair = tx_pair(rig)
    for number in range(40):
        assert pair.sock.send_frags(pair.tx, [number], [1]) == 1
    assert read_exactly(pair.peer, 40) == pair.content[:40]
    wait_for(rig, pair.sock, 40)
    assert pair.sock.read_completions() == []
    assert pair.sock.stats.sends_incomplete == 0


def test_completions_go_on_counting(rig: Rig) -> None:
    pair = tx_pair(rig)
    for number in range(5):
        pair.sock.send_frags(pair.tx, [0], [100])
        read_exactly(pair.peer, 100)
        assert wait_for(rig, pair.sock, 1, first=number) == [CompletionRange(number, number)]


def test_wait_without_sends_is_a_protocol_error(rig: Rig) -> None:
    pair = tx_pair(rig)
    assert pair.sock.read_completions() == []
    with raises(LocalProtocolError):
        pair.sock.wait_completions(rig.patience_s)
    pair.sock.send(b"ordinary")
    with raises(LocalProtocolError):
        pair.sock.wait_completions(rig.patience_s)
    pair.sock.send_frags(pair.tx, [0], [1])
    wait_for(rig, pair.sock, 1)
    with raises(LocalProtocolError):
        pair.sock.wait_completions(rig.patience_s)


def test_full_connection_completes_when_the_peer_reads(rig: Rig) -> None:
    pair = tx_pair(rig)
    pair.sock.settimeout(0)
    sent = bytearray()
    sends = 0
    with raises(BlockingIOError):
        while True:
            taken = pair.sock.send_frags(pair.tx, [0], [len(pair.content)])
            assert 0 < taken <= len(pair.content)
            sent += pair.content[:taken]
            sends += 1
    completed = 0
    try:
        completed = sum(high - low + 1 for low, high in pair.sock.wait_completions(0.01))
    except Timeout:
        assert pair.sock.stats.sends_incomplete == sends
    except LocalProtocolError:
        raise AssertionError(f"{sends} sends, and nothing to wait for") from None
    assert read_exactly(pair.peer, len(sent)) == sent
    pair.sock.settimeout(rig.patience_s)
    wait_for(rig, pair.sock, sends - completed, first=completed)


def test_ordinary_and_devmem_sends_mix(rig: Rig) -> None:
    pair = tx_pair(rig)
    expected = bytearray()
    for number in range(10):
        pair.sock.send(b"header")
        pair.sock.send_frags(pair.tx, [100 * number], [50])
        pair.sock.send(memoryview(b"tail"))
        expected += b"header" + pair.content[100 * number : 100 * number + 50] + b"tail"
    assert read_exactly(pair.peer, len(expected)) == expected
    wait_for(rig, pair.sock, 10)


def test_stats_tell_what_was_sent_from_where(rig: Rig) -> None:
    pair = tx_pair(rig)
    pair.sock.send_frags(pair.tx, [0, 5], [100, 1])
    pair.sock.send(b"ordinary")
    stats = pair.sock.stats
    assert (stats.sent_dmabuf_bytes, stats.sent_host_bytes) == (101, 8)
    assert stats.send_calls == 1  # those that have a number
    read_exactly(pair.peer, 109)
    wait_for(rig, pair.sock, 1)
    assert pair.sock.stats.sends_incomplete == 0


def test_end_of_sending(rig: Rig) -> None:
    pair = tx_pair(rig)
    pair.sock.send_frags(pair.tx, [0], [10])
    pair.sock.shutdown_send()
    assert read_exactly(pair.peer, 10) == pair.content[:10]
    assert pair.peer.recv(1) == b""
    pair.peer.sendall(b"still received")
    assert rig.collect(pair.sock).recv_exactly(14) == b"still received"
    wait_for(rig, pair.sock, 1)


def test_received_frags_can_be_sent_on(rig: Rig) -> None:
    """One Buffer bound for both: what came in goes out again from where it lies."""
    buffer = rig.allocate()
    pair = rig.pair_on(rig.bind(buffer=buffer))
    tx = rig.nic.bind_tx(buffer)
    pair.sock.set_zerocopy()
    data = rig.payload(20_000)
    pair.peer.sendall(data)
    echoed = completed = 0
    while echoed < len(data):
        with pair.sock.recv_frags(5000) as batch:
            sends = 0
            for frag in batch:
                if isinstance(frag, DmabufFrag):
                    assert pair.sock.send_frags(tx, [frag.offset], [frag.size]) == frag.size
                    sends += 1
                else:
                    assert pair.sock.send(frag.data) == len(frag.data)
            assert read_exactly(pair.peer, batch.nbytes) == data[echoed : echoed + batch.nbytes]
            if sends:
                wait_for(rig, pair.sock, sends, first=completed)
            completed += sends
            echoed += batch.nbytes
