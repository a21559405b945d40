"""What a receiver changes of RSS: as little as it can."""

from __future__ import annotations

from dataclasses import replace

import pytest

import devmem_tcp as dmt
from devmem_tcp.transport import open_receiver

MIB = 1 << 20
ANYWHERE = ("127.0.0.1", 0)


def test_queues_that_are_out_of_rss_are_left_alone() -> None:
    with dmt.open_nic("soft0", backend="software") as nic:
        table = [0, 0, 1, 2]
        with nic.set_rss(table=table), open_receiver(nic, listen=ANYWHERE, size=MIB):
            assert nic.rss_table == (0, 0, 1, 2) * (len(nic.rss_table) // 4)


def test_a_queue_that_is_out_of_rss_is_not_taken_in_again() -> None:
    with dmt.open_nic("soft0", backend="software") as nic:
        last = nic.capabilities.rx_queues - 1
        with (
            open_receiver(nic, listen=ANYWHERE, size=MIB, queues=[last]),
            open_receiver(nic, listen=ANYWHERE, size=MIB, queues=[last - 1]),
        ):
            assert set(nic.rss_table) == set(range(last - 1))
        assert set(nic.rss_table) == set(range(last + 1))


def test_all_traffic_on_the_queue_to_be_bound_goes_to_the_others() -> None:
    with dmt.open_nic("soft0", backend="software") as nic:
        queues = nic.capabilities.rx_queues
        with nic.set_rss(equal=1), open_receiver(nic, listen=ANYWHERE, size=MIB, queues=[0]):
            assert set(nic.rss_table) == set(range(1, queues))


def test_a_nic_whose_settings_are_the_hosts_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with dmt.open_nic("soft0", backend="software") as nic, nic.set_header_split("on"):
        table = nic.rss_table
        theirs = replace(nic.capabilities, settings=False)
        monkeypatch.setattr(type(nic), "capabilities", property(lambda nic: theirs))
        with open_receiver(nic, listen=ANYWHERE, size=MIB):
            assert nic.ntuple_rules == ()
            assert nic.rss_table == table
