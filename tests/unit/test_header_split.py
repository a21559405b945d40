"""Header split: what the kernel refuses, and where a NIC puts a packet."""

from __future__ import annotations

import errno

import pytest

from devmem_tcp.errors import BindError, NicSettingError
from devmem_tcp.nicmodel.header_split import HeaderSplit, Placement
from devmem_tcp.types import HeaderSplitMode

ON, OFF, UNKNOWN = HeaderSplitMode.ON, HeaderSplitMode.OFF, HeaderSplitMode.UNKNOWN


def place(
    split: HeaderSplit,
    *,
    tcp: bool = True,
    payload_bytes: int = 1448,
    header_bytes: int = 66,
    header_buffer_bytes: int = 256,
    bound: bool = True,
) -> Placement:
    return split.place(
        tcp=tcp,
        payload_bytes=payload_bytes,
        header_bytes=header_bytes,
        header_buffer_bytes=header_buffer_bytes,
        bound=bound,
    )


def test_the_beginning() -> None:
    split = HeaderSplit()
    assert (split.mode, split.hds_thresh, split.hds_thresh_max) == (UNKNOWN, 0, 1023)
    split = HeaderSplit(OFF, 64)
    assert (split.mode, split.hds_thresh) == (OFF, 64)


@pytest.mark.parametrize("mode", [ON, OFF, UNKNOWN])
def test_any_mode_can_be_set_while_nothing_is_bound(mode: HeaderSplitMode) -> None:
    split = HeaderSplit(ON)
    split.set_mode(mode, bound=False)
    assert split.mode is mode


@pytest.mark.parametrize("mode", [OFF, UNKNOWN])
def test_header_split_stays_on_while_bound(mode: HeaderSplitMode) -> None:
    split = HeaderSplit(ON)
    split.set_mode(ON, bound=True)
    with pytest.raises(NicSettingError) as caught:
        split.set_mode(mode, bound=True)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.call == "ethtool -G"
    assert caught.value.extack == "can't disable tcp-data-split while device has memory provider enabled"
    assert "close the RX bindings" in caught.value.hint
    assert split.mode is ON


def test_thresh_stays_zero_while_bound() -> None:
    split = HeaderSplit(ON)
    split.set_thresh(0, bound=True)
    with pytest.raises(NicSettingError) as caught:
        split.set_thresh(1, bound=True)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.call == "ethtool -G"
    assert caught.value.extack == "can't set non-zero hds_thresh while device is memory provider enabled"
    assert "close the RX bindings" in caught.value.hint
    assert split.hds_thresh == 0


def test_thresh_has_a_range() -> None:
    split = HeaderSplit(ON, hds_thresh_max=100)
    split.set_thresh(100, bound=False)
    with pytest.raises(NicSettingError) as caught:
        split.set_thresh(101, bound=False)
    assert (caught.value.errno, caught.value.call) == (errno.EINVAL, "ethtool -G")
    assert caught.value.extack == "requested ring size exceeds maximum"
    assert caught.value.hint == "hds-thresh is 0 to 100 bytes, got 101"
    with pytest.raises(ValueError, match="got -1"):
        split.set_thresh(-1, bound=False)
    assert split.hds_thresh == 100
    split.set_thresh(0, bound=False)
    assert split.hds_thresh == 0


def test_the_binding_is_looked_at_before_the_range() -> None:
    with pytest.raises(NicSettingError) as caught:
        HeaderSplit(ON, hds_thresh_max=100).set_thresh(101, bound=True)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("mode", [OFF, UNKNOWN])
def test_bind_needs_header_split(mode: HeaderSplitMode) -> None:
    with pytest.raises(BindError) as caught:
        HeaderSplit(mode, 64).check_bind()  # off is found before the threshold is
    assert (caught.value.errno, caught.value.call) == (errno.EINVAL, "bind-rx")
    assert caught.value.extack == "tcp-data-split is disabled"
    assert caught.value.hint == 'nic.set_header_split("on")   # ethtool -G NIC tcp-data-split on'


def test_bind_needs_thresh_zero() -> None:
    split = HeaderSplit(ON, 1)
    with pytest.raises(BindError) as caught:
        split.check_bind()
    assert (caught.value.errno, caught.value.call) == (errno.EINVAL, "bind-rx")
    assert caught.value.extack == "hds-thresh is not zero"
    assert caught.value.hint == "nic.set_hds_thresh(0)   # ethtool -G NIC hds-thresh 0"
    split.set_thresh(0, bound=False)
    split.check_bind()


@pytest.mark.parametrize("mode", [ON, OFF, UNKNOWN])
@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize("header_bytes", [66, 300])
def test_an_unbound_queue_takes_everything_to_host_memory(mode: HeaderSplitMode, tcp: bool, header_bytes: int) -> None:
    assert place(HeaderSplit(mode), tcp=tcp, header_bytes=header_bytes, bound=False) is Placement.HOST


@pytest.mark.parametrize("payload_bytes", [1, 10, 1448, 65000])
def test_payload_goes_to_a_page_however_small(payload_bytes: int) -> None:
    assert place(HeaderSplit(ON), payload_bytes=payload_bytes) is Placement.SPLIT


def test_a_packet_without_payload_stays_in_the_header_buffer() -> None:
    assert place(HeaderSplit(ON), payload_bytes=0) is Placement.LINEAR
    assert place(HeaderSplit(ON, 1000), payload_bytes=0) is Placement.LINEAR


@pytest.mark.parametrize("payload_bytes", [0, 1448])
def test_headers_must_fit_the_header_buffer(payload_bytes: int) -> None:
    split = HeaderSplit(ON)
    assert place(split, payload_bytes=payload_bytes, header_bytes=256) is not Placement.DROP
    assert place(split, payload_bytes=payload_bytes, header_bytes=257) is Placement.DROP


@pytest.mark.parametrize("payload_bytes", [0, 1448])
def test_other_protocols_are_not_split(payload_bytes: int) -> None:
    assert place(HeaderSplit(ON), tcp=False, payload_bytes=payload_bytes) is Placement.DROP


@pytest.mark.parametrize("mode", [OFF, UNKNOWN])
def test_nothing_is_split_unless_header_split_is_on(mode: HeaderSplitMode) -> None:
    assert place(HeaderSplit(mode)) is Placement.DROP
    assert place(HeaderSplit(mode), payload_bytes=0) is Placement.DROP


def test_only_packets_larger_than_the_threshold_are_split() -> None:
    split = HeaderSplit(ON, 200)
    assert place(split, header_bytes=66, payload_bytes=135) is Placement.SPLIT
    assert place(split, header_bytes=66, payload_bytes=134) is Placement.LINEAR


def test_an_unsplit_packet_that_overflows_the_header_buffer_is_dropped() -> None:
    split = HeaderSplit(ON, 500)
    assert place(split, header_bytes=66, payload_bytes=190, header_buffer_bytes=256) is Placement.LINEAR
    assert place(split, header_bytes=66, payload_bytes=191, header_buffer_bytes=256) is Placement.DROP
    assert place(split, header_bytes=66, payload_bytes=434, header_buffer_bytes=256) is Placement.DROP
    assert place(split, header_bytes=66, payload_bytes=435, header_buffer_bytes=256) is Placement.SPLIT
