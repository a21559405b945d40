"""recv_frags, recv_into and discard: the right bytes in TCP order, and what their columns say."""

from __future__ import annotations

import errno
import socket

from devmem_tcp.contract import DevmemSocket
from devmem_tcp.errors import ETOOSMALL, ControlTruncated, KernelError, NotZeroCopy
from devmem_tcp.testing.contract.expect import raises
from devmem_tcp.testing.contract.rig import PUSH_BLOCK, BoundPair, Rig
from devmem_tcp.types import DmabufFrag, FragKind, LinearFrag
from devmem_tcp.uapi.socket import CONTROL_SPACE_PER_FRAG


def finish(rig: Rig, pair: BoundPair) -> None:
    """Check that the connection still works, and ends well."""
    rig.transfer(pair.collector, pair.peer, 1000)
    pair.peer.shutdown(socket.SHUT_WR)
    assert pair.collector.recv_to_end() == b""


def recv_unless_fault(sock: DevmemSocket, target: bytearray) -> int:
    """Receive without the flag; 0 if that was EFAULT, as it must be for data in device memory."""
    try:
        count = sock.recv_into(target)
    except KernelError as error:
        if error.errno != errno.EFAULT:
            raise
        assert not any(target), "the refused call wrote bytes"
        return 0
    assert 0 < count <= len(target)
    return count


def test_bytes_come_right_and_in_order(rig: Rig) -> None:
    for host in rig.hosts:
        with rig.bind() as rx:
            pair = rig.pair_on(rx, host=host)
            rig.transfer(pair.collector, pair.peer, 3 * rx.buffer.size_bytes + 1234)
            finish(rig, pair)
            pair.sock.close()


def test_connection_made_by_us_receives_too(rig: Rig) -> None:
    rig.bind()
    with rig.peer_listener() as far:
        host, port = far.getsockname()[:2]
        rig.nic.add_ntuple(src_port=port, queue=rig.queue)
        sock = rig.nic.connect((host, port), timeout_s=rig.patience_s)
        peer = rig.accept_peer(far)
    assert sock.gettimeout() is None
    rig.keep(sock)
    collector = rig.collect(sock)
    rig.transfer(collector, peer, 300_000)
    assert sock.remote_address[:2] == (host, port)
    assert sock.local_address[:2] == peer.getpeername()[:2]
    assert sock.rx_queue == rig.queue


def test_one_byte(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.peer.sendall(b"x")
    batch = pair.collector.recv()
    assert bytes(pair.collector.data) == b"x"
    assert (len(batch), batch.nbytes) == (1, 1)


def test_columns_say_what_typed_frags_say(rig: Rig) -> None:
    pair = rig.bound_pair()
    while pair.collector.seen[FragKind.DMABUF] == 0:
        pair.peer.sendall(rig.payload(5000))
        batch = pair.collector.recv()
        typed = list(batch)
        assert len(typed) == len(batch) == len(batch.frags)
        for index, frag in enumerate(typed):
            columns = (batch.offsets, batch.sizes, batch.tokens, batch.dmabuf_ids)
            offset, size, token, dmabuf_id = (int(column[index]) for column in columns)
            if isinstance(frag, DmabufFrag):
                assert batch.kinds[index] == FragKind.DMABUF
                assert frag == (offset, size, token, dmabuf_id)
                assert dmabuf_id == pair.rx.dmabuf_id
            else:
                assert batch.kinds[index] == (FragKind.LINEAR if isinstance(frag, LinearFrag) else FragKind.HOST)
                assert (size, token, dmabuf_id) == (len(frag.data), 0, 0)
                assert frag.data == batch.inline[offset : offset + size]


def test_unsteered_data_is_ordinary(rig: Rig) -> None:
    rig.bind()
    sock, peer, _ = rig.pair(steer=False)
    collector = rig.collect(sock)
    rig.transfer(collector, peer, 100_000)
    assert collector.seen == {FragKind.HOST: 100_000, FragKind.LINEAR: 0, FragKind.DMABUF: 0}
    assert sock.stats.host_bytes == 100_000


def test_held_ordinary_data_is_not_written_over(rig: Rig) -> None:
    """Memory of released batches may be used again, but not for two at a time."""
    sock, peer, _ = rig.pair(steer=False)
    collector = rig.collect(sock)
    for _ in range(3):
        for _ in range(3):
            data = rig.payload(1000)
            peer.sendall(data)
            assert collector.recv_exactly(len(data), hold=True) == data
        collector.release()


def test_end_of_stream_is_falsy_and_stays(rig: Rig) -> None:
    pair = rig.bound_pair()
    data = rig.payload(10_000)
    pair.peer.sendall(data)
    pair.peer.shutdown(socket.SHUT_WR)
    assert pair.collector.recv_to_end() == data
    for _ in range(2):
        batch = pair.sock.recv_frags()
        assert not batch
        assert (len(batch), batch.nbytes, list(batch)) == (0, 0, [])
        batch.release()
    assert pair.sock.recv_into(bytearray(10)) == 0
    assert pair.sock.discard(10) == 0


def test_max_bytes_is_respected(rig: Rig) -> None:
    pair = rig.bound_pair()
    for limit in (1, 7, 4095, 4096, 4097, 65_536):
        rig.transfer(pair.collector, pair.peer, 40 * limit if limit < 10 else 3 * limit, max_bytes=limit)
    finish(rig, pair)


def test_max_bytes_must_be_positive(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.peer.sendall(b"kept")
    for limit in (0, -1):
        with raises(ValueError):
            pair.sock.recv_frags(limit)
    assert pair.sock.stats.tokens_out == 0
    assert pair.collector.recv_exactly(4) == b"kept"


def test_max_frags_makes_reads_short(rig: Rig) -> None:
    pair = rig.bound_pair()
    for limit in (1, 2, 3):
        data = rig.payload(PUSH_BLOCK)
        pair.peer.sendall(data)
        assert pair.collector.recv_exactly(len(data), max_frags=limit) == data
    finish(rig, pair)


def test_no_control_space_consumes_nothing(rig: Rig) -> None:
    """A packet that landed in host memory needs no control message, so a NIC may hand that out even so."""
    pair = rig.bound_pair()
    data = rig.payload(20_000)
    pair.peer.sendall(data)
    with raises(ControlTruncated, ETOOSMALL) as caught:
        while pair.sock.stats.host_bytes < len(data):
            assert set(pair.collector.recv(max_frags=0).kinds.tolist()) == {FragKind.HOST}
        raise ControlTruncated(needed=CONTROL_SPACE_PER_FRAG)  # all of it was ordinary data: nothing to refuse
    assert caught.error.needed == CONTROL_SPACE_PER_FRAG
    assert pair.sock.stats.tokens_out == 0
    pair.collector.recv_exactly(len(data) - len(pair.collector.data))
    assert pair.collector.data == data
    finish(rig, pair)


def test_without_the_flag_devmem_data_is_efault(rig: Rig) -> None:
    pair = rig.bound_pair()
    faults = 0
    while faults == 0:
        data = rig.payload(20_000)
        pair.peer.sendall(data)
        start = len(pair.collector.data)
        while (missing := start + len(data) - len(pair.collector.data)) > 0:
            target = bytearray(missing)
            if count := recv_unless_fault(pair.sock, target):
                pair.collector.data += target[:count]
            else:
                faults += 1
                pair.collector.recv(missing)
                pair.collector.release()
        assert pair.collector.data[start:] == data
    finish(rig, pair)


def test_recv_into_takes_ordinary_data(rig: Rig) -> None:
    rig.bind()
    sock, peer, _ = rig.pair(steer=False)
    data = rig.payload(10_000)
    peer.sendall(data)
    got = bytearray()
    while len(got) < len(data):
        target = bytearray(3000)
        count = sock.recv_into(memoryview(target))
        assert count > 0
        got += target[:count]
    assert got == data
    assert sock.stats.host_bytes == len(data)
    assert sock.stats.tokens_out == 0


def test_discard_hands_out_no_token(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.peer.sendall(rig.payload(3 * PUSH_BLOCK))
    dropped = 0
    while dropped < 3 * PUSH_BLOCK:
        count = pair.sock.discard(min(10_000, 3 * PUSH_BLOCK - dropped))
        assert 0 < count <= 10_000
        assert pair.sock.stats.tokens_out == 0
        dropped += count
    assert pair.rx.drained
    finish(rig, pair)


def test_discard_starts_where_reading_ended(rig: Rig) -> None:
    pair = rig.bound_pair()
    data = rig.payload(3000)
    pair.peer.sendall(data)
    head = pair.collector.recv_exactly(1000)
    left = 1000
    while left:
        left -= pair.sock.discard(left)
    assert head + data[1000:2000] + pair.collector.recv_exactly(1000) == data


def test_every_piece_of_a_page_has_its_token(rig: Rig) -> None:
    pair = rig.bound_pair()
    tokens = rig.hold_tokens(pair.collector, pair.peer, 3, max_bytes=10)
    assert len(set(tokens)) == len(tokens)
    assert pair.sock.stats.tokens_out == len(tokens)
    assert pair.rx.holders()
    pair.collector.release()
    assert pair.rx.drained
    finish(rig, pair)


def test_page_is_kept_until_its_last_piece_is_back(rig: Rig) -> None:
    """The collector compares held bytes with what came: a page that is filled again too early is found out."""
    pair = rig.bound_pair()
    first, *others = rig.hold_tokens(pair.collector, pair.peer, 2, max_bytes=10)
    assert pair.collector.dontneed(others) == len(others)
    held = pair.collector.live[first]
    expected = bytes(pair.collector.data[held.position : held.position + held.frag.size])
    hog = rig.collect(pair.sock)
    for _ in range(20):
        data = rig.payload(PUSH_BLOCK)
        pair.peer.sendall(data)
        assert hog.recv_exactly(len(data)) == data
    assert bytes(pair.rx.buffer.view()[held.frag.offset : held.frag.offset + held.frag.size]) == expected


def test_one_binding_serves_several_queues(rig: Rig) -> None:
    rx = rig.bind(rig.queue, rig.second_queue)
    pairs = [rig.pair_on(rx, queue=queue) for queue in rx.queues]
    for _ in range(3):
        for pair in pairs:
            rig.transfer(pair.collector, pair.peer, 5000, max_bytes=3000)
    for queue, pair in zip(rx.queues, pairs, strict=True):
        assert pair.sock.rx_queue == queue


def test_frags_of_many_sockets_never_overlap(rig: Rig) -> None:
    rx = rig.bind()
    pairs = [rig.pair_on(rx) for _ in range(5)]
    for _ in range(4):
        blocks = [rig.payload(300) for _ in pairs]
        for pair, block in zip(pairs, blocks, strict=True):
            pair.peer.sendall(block)
        for pair, block in zip(pairs, blocks, strict=True):
            assert pair.collector.recv_exactly(len(block), hold=True) == block
        for pair in pairs:
            pair.collector.release()
    assert rx.drained


def test_stats_account_for_every_byte(rig: Rig) -> None:
    pair = rig.bound_pair()
    total = 2 * pair.rx.buffer.size_bytes
    rig.transfer(pair.collector, pair.peer, total)
    stats = pair.sock.stats
    assert stats.backend == rig.capabilities.backend
    assert stats.dmabuf_bytes + stats.linear_bytes + stats.host_bytes == total
    assert stats.dmabuf_bytes == pair.collector.seen[FragKind.DMABUF]
    assert stats.linear_bytes == pair.collector.seen[FragKind.LINEAR]
    assert stats.host_bytes == pair.collector.seen[FragKind.HOST]
    assert stats.tokens_out == 0
    assert rig.nic.queue_stats(rig.queue).rx_bytes >= stats.dmabuf_bytes


def test_stats_count_calls_and_frags(rig: Rig) -> None:
    pair = rig.bound_pair()
    frags = 0
    for calls in range(1, 6):
        pair.peer.sendall(rig.payload(100))
        frags += len(pair.collector.recv())
        assert (pair.sock.stats.recv_calls, pair.sock.stats.frags) == (calls, frags)
        assert pair.sock.stats.tokens_out == len(pair.collector.live)


def test_strict_refuses_ordinary_data_and_loses_none(rig: Rig) -> None:
    sock, peer, _ = rig.pair(steer=False, strict=True)
    for rounds in (1, 2):
        data = rig.payload(5000)
        peer.sendall(data)
        got = b""
        while len(got) < len(data):
            with raises(NotZeroCopy) as caught:
                sock.recv_frags()
            assert caught.error.host_bytes == len(caught.error.data) > 0
            assert caught.error.linear_bytes == 0
            got += caught.error.data
        assert got == data
        assert sock.stats.host_bytes == rounds * len(data)
