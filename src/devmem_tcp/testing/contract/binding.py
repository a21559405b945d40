"""bind_rx and bind_tx: what is refused and how, ids, and what may not change while a queue is bound."""

from __future__ import annotations

import errno

from devmem_tcp.buffers import BufferUse
from devmem_tcp.errors import BindError, BusyError, ClosedError, NicSettingError
from devmem_tcp.testing.contract.expect import needs, raises
from devmem_tcp.testing.contract.rig import Rig
from devmem_tcp.types import PAGE_SIZE, HeaderSplitMode

HEADER_SPLIT_IS_OFF = "tcp-data-split is disabled"
THRESH_IS_SET = "hds-thresh is not zero"
QUEUE_IS_BOUND = "designated queue already memory provider bound"
HEADER_SPLIT_IS_NEEDED = "can't disable tcp-data-split while device has memory provider enabled"


def refuse_bind(rig: Rig, *queues: int, code: int, rx_page_size: int = PAGE_SIZE, pages: int = 64) -> BindError:
    """Try to bind a fresh Buffer, expect ``code``, and check that nothing stays of the attempt."""
    buffer = rig.allocate(pages * PAGE_SIZE)
    with raises(BindError, code) as caught:
        rig.nic.bind_rx(buffer, queues, rx_page_size=rx_page_size)
    assert buffer.holders == (), "a refused bind still holds the buffer"
    assert "bind-rx" in caught.error.call
    assert caught.error.hint, "the error does not say what to do"
    return caught.error


def test_attaches_the_buffer(rig: Rig) -> None:
    buffer = rig.allocate()
    rx = rig.nic.bind_rx(buffer, [rig.queue])
    assert rx.buffer is buffer
    assert rx.queues == (rig.queue,)
    assert rx.dmabuf_id >= 1
    assert rig.nic.queue_stats(rig.queue).dmabuf_id == rx.dmabuf_id
    assert buffer.holders
    assert not rx.closed
    assert rx.drained
    assert rx.holders() == ()


def test_attaches_several_queues(rig: Rig) -> None:
    rx = rig.bind(rig.second_queue, rig.queue)
    assert sorted(rx.queues) == [rig.second_queue, rig.queue]
    for queue in rx.queues:
        assert rig.nic.queue_stats(queue).dmabuf_id == rx.dmabuf_id


def test_unbinding_leaves_queue_and_buffer_free(rig: Rig) -> None:
    rx = rig.bind()
    buffer = rx.buffer
    rx.close()
    assert rx.closed
    assert rx.drained
    assert rig.nic.queue_stats(rig.queue).dmabuf_id == 0
    assert buffer.holders == ()
    again = rig.bind(buffer=buffer)
    assert rig.nic.queue_stats(rig.queue).dmabuf_id == again.dmabuf_id


def test_header_split_off_is_refused(rig: Rig) -> None:
    rig.nic.set_header_split(HeaderSplitMode.OFF)
    error = refuse_bind(rig, rig.queue, code=errno.EINVAL)
    assert error.extack == HEADER_SPLIT_IS_OFF


def test_header_split_unknown_is_refused(rig: Rig) -> None:
    rig.nic.set_header_split(HeaderSplitMode.UNKNOWN)
    error = refuse_bind(rig, rig.queue, code=errno.EINVAL)
    assert error.extack == HEADER_SPLIT_IS_OFF


@needs("hds_thresh")
def test_hds_thresh_is_refused(rig: Rig) -> None:
    rig.nic.set_hds_thresh(64)
    error = refuse_bind(rig, rig.queue, code=errno.EINVAL)
    assert error.extack == THRESH_IS_SET


def test_queue_out_of_range_is_refused(rig: Rig) -> None:
    for queue in (rig.capabilities.rx_queues, 1 << 20):
        error = refuse_bind(rig, queue, code=errno.EINVAL)
        assert error.extack == ""
        assert "id" in error.attr.lower(), f"attribute {error.attr!r} is not the queue's id"


def test_queue_out_of_range_binds_none_of_the_others(rig: Rig) -> None:
    refuse_bind(rig, rig.queue, rig.capabilities.rx_queues, code=errno.EINVAL)
    assert rig.nic.queue_stats(rig.queue).dmabuf_id == 0
    rig.bind()


def test_no_queue_is_refused(rig: Rig) -> None:
    error = refuse_bind(rig, code=errno.EINVAL)
    assert "queues" in error.attr.lower(), f"attribute {error.attr!r} is not the missing one"


def test_bound_queue_is_refused(rig: Rig) -> None:
    rx = rig.bind()
    error = refuse_bind(rig, rig.queue, code=errno.EEXIST)
    assert error.extack == QUEUE_IS_BOUND
    assert rig.nic.queue_stats(rig.queue).dmabuf_id == rx.dmabuf_id


def test_bound_queue_rolls_back_the_whole_request(rig: Rig) -> None:
    rx = rig.bind()
    error = refuse_bind(rig, rig.second_queue, rig.queue, code=errno.EEXIST)
    assert error.extack == QUEUE_IS_BOUND
    assert rig.nic.queue_stats(rig.second_queue).dmabuf_id == 0
    assert rig.nic.queue_stats(rig.queue).dmabuf_id == rx.dmabuf_id
    rig.bind(rig.second_queue)


def test_queue_named_twice_is_one_queue_or_none(rig: Rig) -> None:
    """Recent kernels collect queues in a bitmap, older ones refuse the second mention; nothing else will do."""
    buffer = rig.allocate()
    try:
        rx = rig.nic.bind_rx(buffer, [rig.queue, rig.queue])
    except BindError as error:
        if error.errno != errno.EEXIST:
            raise
    else:
        assert rx.queues == (rig.queue,)
        assert rig.nic.queue_stats(rig.queue).dmabuf_id == rx.dmabuf_id
        rx.close()
    assert buffer.holders == ()
    assert rig.nic.queue_stats(rig.queue).dmabuf_id == 0


def test_small_rx_page_size_is_refused(rig: Rig) -> None:
    refuse_bind(rig, rig.queue, rx_page_size=2048, code=errno.ERANGE)


def test_odd_rx_page_size_is_refused(rig: Rig) -> None:
    error = refuse_bind(rig, rig.queue, rx_page_size=5000, code=errno.EINVAL)
    assert error.extack == "rx-page-size must be a power of 2"


@needs(lacking=("rx_page_size",))
def test_large_rx_page_size_is_refused(rig: Rig) -> None:
    buffer = rig.allocate()
    with raises(BindError) as caught:
        rig.nic.bind_rx(buffer, [rig.queue], rx_page_size=2 * PAGE_SIZE)
    if caught.error.errno != errno.EOPNOTSUPP:  # looked at first: memory of single pages, and what an old kernel knows
        assert caught.error.errno == errno.EINVAL
        assert "niov size" in caught.error.extack or "Unknown attribute" in caught.error.extack
    assert caught.error.hint
    assert buffer.holders == ()


@needs("rx_page_size")
def test_rx_page_size_larger_than_the_segments_is_refused(rig: Rig) -> None:
    error = refuse_bind(rig, rig.queue, rx_page_size=2 * PAGE_SIZE, pages=3, code=errno.EINVAL)
    assert "niov size" in error.extack


@needs("rx_page_size")
def test_large_rx_page_size_is_used(rig: Rig) -> None:
    rx = rig.nic.bind_rx(rig.allocate(), [rig.queue], rx_page_size=4 * PAGE_SIZE)
    rig.watch(rx)
    pair = rig.pair_on(rx)
    rig.transfer(pair.collector, pair.peer, 2 * rx.buffer.size_bytes)


def test_ids_grow_and_are_never_used_again(rig: Rig) -> None:
    ids = []
    for _ in range(3):
        with rig.nic.bind_rx(rig.allocate(), [rig.queue]) as rx:
            ids.append(rx.dmabuf_id)
    assert ids[0] >= 1
    assert ids == sorted(set(ids)), f"ids {ids} do not grow"


def test_ids_are_shared_by_rx_and_tx(rig: Rig) -> None:
    ids = [
        rig.bind().dmabuf_id,
        rig.nic.bind_tx(rig.allocate()).dmabuf_id,
        rig.bind(rig.second_queue).dmabuf_id,
        rig.nic.bind_tx(rig.allocate()).dmabuf_id,
    ]
    assert ids == sorted(set(ids)), f"ids {ids} do not grow"


def test_refused_bind_burns_an_id(rig: Rig) -> None:
    first = rig.bind().dmabuf_id
    refuse_bind(rig, rig.queue, code=errno.EEXIST)
    assert rig.bind(rig.second_queue).dmabuf_id >= first + 2


def test_buffer_receives_for_one_binding(rig: Rig) -> None:
    rx = rig.bind()
    with raises(BusyError):
        rig.nic.bind_rx(rx.buffer, [rig.second_queue])
    assert rig.nic.queue_stats(rig.second_queue).dmabuf_id == 0
    assert len(rx.buffer.holders) == 1


def test_buffer_may_receive_and_send(rig: Rig) -> None:
    buffer = rig.allocate()
    rig.bind(buffer=buffer)
    rig.nic.bind_tx(buffer)
    rig.nic.bind_tx(buffer)
    assert len(buffer.holders) == 3


def test_bound_buffer_cannot_be_closed(rig: Rig) -> None:
    buffer = rig.allocate()
    for binding in (rig.bind(buffer=buffer), rig.nic.bind_tx(buffer)):
        with raises(BusyError):
            buffer.close()
        assert not buffer.closed
        binding.close()
    buffer.close()
    assert buffer.closed


def test_closed_buffer_cannot_be_bound(rig: Rig) -> None:
    buffer = rig.allocate()
    buffer.close()
    with raises(ClosedError):
        rig.nic.bind_rx(buffer, [rig.queue])
    with raises(ClosedError):
        rig.nic.bind_tx(buffer)
    assert rig.nic.queue_stats(rig.queue).dmabuf_id == 0


def test_tx_binding_holds_its_buffer(rig: Rig) -> None:
    buffer = rig.allocate()
    with rig.nic.bind_tx(buffer) as tx:
        assert tx.buffer is buffer
        assert tx.dmabuf_id >= 1
        assert buffer.holders
    assert tx.closed
    assert buffer.holders == ()


def test_header_split_stays_on_while_bound(rig: Rig) -> None:
    rx = rig.bind()
    for mode in ("off", "unknown"):
        with raises(NicSettingError, errno.EINVAL) as caught:
            rig.nic.set_header_split(mode)
        assert caught.error.extack == HEADER_SPLIT_IS_NEEDED
        assert caught.error.hint
        assert rig.nic.header_split is HeaderSplitMode.ON
    rx.close()
    with rig.nic.set_header_split("off"):
        assert rig.nic.header_split is not HeaderSplitMode.ON


@needs("hds_thresh")
def test_hds_thresh_stays_zero_while_bound(rig: Rig) -> None:
    rx = rig.bind()
    with raises(NicSettingError, errno.EINVAL) as refused:
        rig.nic.set_hds_thresh(1)
    assert refused.error.hint
    rig.nic.set_hds_thresh(0)
    rx.close()
    rig.bind()  # the threshold really stayed 0


def test_rss_may_include_a_bound_queue(rig: Rig) -> None:
    """The kernel does not check RSS isolation: an unsteered flow may well land in the bound queue's memory."""
    rx = rig.bind()
    rig.nic.set_rss(table=[rig.queue])
    assert set(rig.nic.rss_table) == {rig.queue}
    sock, peer, _ = rig.pair(steer=False)
    collector = rig.collect(sock)
    rig.transfer(collector, peer, 2 * rx.buffer.size_bytes)
    assert sock.rx_queue == rig.queue


def test_pins_name_the_use(rig: Rig) -> None:
    buffer = rig.allocate()
    pin = buffer.pin("a test", BufferUse.RX)
    with raises(BusyError) as caught:
        rig.nic.bind_rx(buffer, [rig.queue])
    assert "a test" in str(caught.error)
    buffer.unpin(pin)
    rig.bind(buffer=buffer)
