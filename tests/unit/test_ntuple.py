"""The ntuple table: placing, matching, refusing, and how people would type a rule."""

from __future__ import annotations

import errno
import ipaddress
from dataclasses import replace

import pytest

from devmem_tcp.errors import NicSettingError
from devmem_tcp.nicmodel.ntuple import NtupleTable, as_held, ethtool_command
from devmem_tcp.types import Family, FlowRule

TCP4, TCP6 = Family.TCP4, Family.TCP6


def match(table: NtupleTable, src: str, sport: int, dst: str, dport: int) -> int | None:
    source, destination = ipaddress.ip_address(src), ipaddress.ip_address(dst)
    family = TCP4 if source.version == 4 else TCP6
    found = table.match(family, source.packed, destination.packed, sport, dport)
    assert table.match(family, int(source), int(destination), sport, dport) == found
    return found


def refused(table: NtupleTable, rule: FlowRule) -> NicSettingError:
    before = table.rules, table.version
    with pytest.raises(NicSettingError) as caught:
        table.insert(rule)
    assert (table.rules, table.version) == before
    assert caught.value.call == "ethtool -N"
    return caught.value


# --- where rules go --------------------------------------------------------------------------------------------------


def test_a_rule_takes_the_highest_free_location() -> None:
    table = NtupleTable(16, size=4)
    rule = FlowRule(queue=1, family=TCP4, dst_port=80)
    assert table.insert(rule) == (replace(rule, location=3),)
    table.insert(replace(rule, location=1))
    assert table.insert(rule) == (replace(rule, location=2),)
    assert table.insert(rule) == (replace(rule, location=0),)
    table.delete(2)
    assert table.insert(rule) == (replace(rule, location=2),)


def test_the_table_has_1024_locations_unless_told() -> None:
    assert NtupleTable(16).insert(FlowRule(queue=1, family=TCP4, dst_port=80))[0].location == 1023


def test_rules_are_listed_in_order_of_location() -> None:
    table = NtupleTable(16)
    for location in (5, 900, 0):
        table.insert(FlowRule(queue=1, family=TCP4, dst_port=80, location=location))
    assert [rule.location for rule in table.rules] == [0, 5, 900]


def test_a_location_given_again_replaces_its_rule() -> None:
    table = NtupleTable(16, size=1)
    table.insert(FlowRule(queue=1, family=TCP4, dst_port=80, location=0))
    (second,) = table.insert(FlowRule(queue=2, family=TCP4, dst_port=81, location=0))
    assert table.rules == (second,)
    assert match(table, "10.0.0.1", 1, "10.0.0.2", 80) is None
    assert match(table, "10.0.0.1", 1, "10.0.0.2", 81) == 2


def test_a_rule_without_family_becomes_two() -> None:
    table = NtupleTable(16, size=4)
    rule = FlowRule(queue=7, dst_port=5201)
    assert table.insert(rule) == (replace(rule, family=TCP4, location=3), replace(rule, family=TCP6, location=2))
    assert match(table, "10.0.0.1", 1, "10.0.0.2", 5201) == 7
    assert match(table, "fd00::1", 1, "fd00::2", 5201) == 7


def test_an_address_decides_the_family() -> None:
    table = NtupleTable(16)
    assert [rule.family for rule in table.insert(FlowRule(queue=7, src_ip="10.0.0.1"))] == [TCP4]
    assert [rule.family for rule in table.insert(FlowRule(queue=7, dst_ip="fd00::1"))] == [TCP6]


def test_rules_are_held_without_the_bits_outside_their_masks() -> None:
    rule = FlowRule(
        queue=1, src_ip="10.1.2.3/8", dst_ip="10.0.0.1/32", src_port=0x1234, src_port_mask=0xFF00, dst_port=80
    )
    assert as_held(rule) == (
        replace(rule, family=TCP4, src_ip="10.0.0.0/8", dst_ip="10.0.0.1", src_port=0x1200, dst_port=80),
    )
    assert as_held(FlowRule(queue=1, dst_port=0x1234, dst_port_mask=0xF, family=TCP6))[0].dst_port == 4


def test_mapped_and_scoped_addresses_become_what_packets_carry() -> None:
    assert as_held(FlowRule(queue=1, src_ip="::ffff:10.0.0.2")) == (FlowRule(queue=1, family=TCP4, src_ip="10.0.0.2"),)
    assert as_held(FlowRule(queue=1, src_ip="::ffff:10.1.2.3/104"))[0].src_ip == "10.0.0.0/8"
    assert as_held(FlowRule(queue=1, src_ip="::ffff:10.1.2.3/64"))[0].family is TCP6
    assert as_held(FlowRule(queue=1, src_ip="fe80::1%eth0"))[0].src_ip == "fe80::1"


def test_version_grows_with_every_change() -> None:
    table = NtupleTable(16)
    versions = [table.version]
    (rule,) = table.insert(FlowRule(queue=1, family=TCP4, dst_port=80))
    versions.append(table.version)
    assert rule.location is not None
    table.delete(rule.location)
    versions.append(table.version)
    assert versions == sorted(set(versions))


# --- what they match -------------------------------------------------------------------------------------------------


def test_an_empty_table_matches_nothing() -> None:
    assert match(NtupleTable(16), "10.0.0.1", 1, "10.0.0.2", 2) is None


def test_every_given_field_must_match() -> None:
    table = NtupleTable(16)
    table.insert(FlowRule(queue=9, src_ip="10.0.0.1", dst_ip="10.0.0.2", src_port=1000, dst_port=2000))
    assert match(table, "10.0.0.1", 1000, "10.0.0.2", 2000) == 9
    assert match(table, "10.0.0.9", 1000, "10.0.0.2", 2000) is None
    assert match(table, "10.0.0.1", 1001, "10.0.0.2", 2000) is None
    assert match(table, "10.0.0.1", 1000, "10.0.0.9", 2000) is None
    assert match(table, "10.0.0.1", 1000, "10.0.0.2", 2001) is None
    assert match(table, "10.0.0.2", 2000, "10.0.0.1", 1000) is None


@pytest.mark.parametrize(
    "rule",
    [
        FlowRule(queue=9, src_ip="fd00::1"),
        FlowRule(queue=9, dst_ip="fd00::2"),
        FlowRule(queue=9, src_port=1000),
        FlowRule(queue=9, dst_port=2000),
    ],
)
def test_a_field_that_is_not_given_matches_anything(rule: FlowRule) -> None:
    table = NtupleTable(16)
    table.insert(rule)
    assert match(table, "fd00::1", 1000, "fd00::2", 2000) == 9
    assert match(table, "fd00::8", 1001, "fd00::9", 2001) is None


def test_a_family_given_keeps_the_other_out() -> None:
    table = NtupleTable(16)
    table.insert(FlowRule(queue=9, family=TCP6, dst_port=80))
    assert match(table, "::1", 1, "::2", 80) == 9
    assert match(table, "10.0.0.1", 1, "10.0.0.2", 80) is None


def test_address_masks() -> None:
    table = NtupleTable(16)
    table.insert(FlowRule(queue=4, dst_ip="10.32.0.0/11"))
    table.insert(FlowRule(queue=6, src_ip="fd00:aa::/32"))
    assert match(table, "1.1.1.1", 1, "10.32.0.0", 2) == 4
    assert match(table, "1.1.1.1", 1, "10.63.255.255", 2) == 4
    assert match(table, "1.1.1.1", 1, "10.64.0.0", 2) is None
    assert match(table, "10.32.0.0", 1, "1.1.1.1", 2) is None
    assert match(table, "fd00:aa:ffff::1", 1, "::1", 2) == 6
    assert match(table, "fd00:ab::1", 1, "::1", 2) is None


def test_port_masks() -> None:
    table = NtupleTable(16)
    table.insert(FlowRule(queue=4, family=TCP4, dst_port=0x1480, dst_port_mask=0xFFF0))
    table.insert(FlowRule(queue=5, family=TCP4, src_port=0x0003, src_port_mask=0x0003))
    assert match(table, "10.0.0.1", 0, "10.0.0.2", 0x148F) == 4
    assert match(table, "10.0.0.1", 0, "10.0.0.2", 0x1490) is None
    assert match(table, "10.0.0.1", 0xFFFF, "10.0.0.2", 0) == 5
    assert match(table, "10.0.0.1", 0xFFFE, "10.0.0.2", 0) is None


@pytest.mark.parametrize(
    "rule",
    [
        FlowRule(queue=4, src_ip="128.0.0.0/1"),
        FlowRule(queue=4, dst_ip="128.0.0.0/1"),
        FlowRule(queue=4, family=TCP4, src_port=1, src_port_mask=1),
        FlowRule(queue=4, family=TCP4, dst_port=1, dst_port_mask=1),
    ],
)
def test_one_bit_is_enough_to_match_on(rule: FlowRule) -> None:
    table = NtupleTable(16)
    table.insert(rule)
    assert match(table, "128.0.0.1", 1, "128.0.0.1", 1) == 4
    assert match(table, "1.0.0.1", 2, "1.0.0.1", 2) is None


@pytest.mark.parametrize("specific_first", [True, False])
def test_the_lowest_location_wins_whatever_the_masks(specific_first: bool) -> None:
    table = NtupleTable(16)
    specific, general = (3, 8) if specific_first else (8, 3)
    table.insert(FlowRule(queue=1, family=TCP4, dst_port=80, location=specific))
    table.insert(FlowRule(queue=2, src_ip="10.0.0.0/8", location=general))
    assert match(table, "10.0.0.1", 1, "10.0.0.2", 80) == (1 if specific_first else 2)
    assert match(table, "11.0.0.1", 1, "10.0.0.2", 80) == 1
    assert match(table, "10.0.0.1", 1, "10.0.0.2", 81) == 2


def test_the_lowest_of_two_equal_rules_wins_and_the_other_takes_over() -> None:
    table = NtupleTable(16)
    table.insert(FlowRule(queue=1, family=TCP4, dst_port=80, location=3))
    table.insert(FlowRule(queue=2, family=TCP4, dst_port=80, location=2))
    assert match(table, "10.0.0.1", 1, "10.0.0.2", 80) == 2
    table.delete(2)
    assert match(table, "10.0.0.1", 1, "10.0.0.2", 80) == 1
    table.delete(3)
    assert match(table, "10.0.0.1", 1, "10.0.0.2", 80) is None


def test_queue_zero_and_port_zero_are_like_any_other() -> None:
    table = NtupleTable(16)
    table.insert(FlowRule(queue=0, family=TCP4, dst_port=0))
    assert match(table, "10.0.0.1", 1, "10.0.0.2", 0) == 0
    assert match(table, "10.0.0.1", 1, "10.0.0.2", 1) is None


def test_packed_addresses_must_fit_the_family() -> None:
    with pytest.raises(ValueError, match="tcp4 have 4 bytes, got 16"):
        NtupleTable(16).match(TCP4, bytes(16), bytes(4), 1, 2)
    with pytest.raises(ValueError, match="tcp6 have 16 bytes, got 4"):
        NtupleTable(16).match(TCP6, bytes(16), bytes(4), 1, 2)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [-1, 16])
def test_a_queue_that_does_not_exist_is_refused(queue: int) -> None:
    error = refused(NtupleTable(16), FlowRule(queue=queue, family=TCP4, dst_port=80))
    assert error.errno == errno.EINVAL
    assert error.hint == f"queue {queue} does not exist; queues are 0 to 15"


@pytest.mark.parametrize("location", [-1, 4])
def test_a_location_that_does_not_exist_is_refused(location: int) -> None:
    error = refused(NtupleTable(16, size=4), FlowRule(queue=1, family=TCP4, dst_port=80, location=location))
    assert error.errno == errno.EINVAL
    assert error.hint == f"location {location} does not exist; locations are 0 to 3"


def test_a_full_table_refuses_but_still_replaces() -> None:
    table = NtupleTable(16, size=2)
    rule = FlowRule(queue=1, family=TCP4, dst_port=80)
    table.insert(rule)
    table.insert(rule)
    error = refused(table, rule)
    assert error.errno == errno.ENOSPC
    assert "2 of 2 locations are in use" in error.hint
    assert "ethtool -N NIC delete LOCATION" in error.hint
    assert table.insert(replace(rule, queue=3, location=1))[0].queue == 3


def test_both_ip_versions_find_room_or_neither() -> None:
    table = NtupleTable(16, size=2)
    table.insert(FlowRule(queue=1, family=TCP4, dst_port=80))
    assert refused(table, FlowRule(queue=1, dst_port=81)).errno == errno.ENOSPC
    table.delete(1)
    assert len(table.insert(FlowRule(queue=1, dst_port=81))) == 2


def test_one_location_does_not_hold_both_ip_versions() -> None:
    table = NtupleTable(16)
    with pytest.raises(ValueError, match="location=3 needs a family"):
        table.insert(FlowRule(queue=1, dst_port=80, location=3))
    assert table.rules == ()
    assert table.insert(FlowRule(queue=1, dst_port=80, family=TCP6, location=3))[0].location == 3


@pytest.mark.parametrize("rules", [[], [4, 2]])
def test_deleting_what_is_not_there(rules: list[int]) -> None:
    table = NtupleTable(16)
    for location in rules:
        table.insert(FlowRule(queue=1, family=TCP4, dst_port=80, location=location))
    before = table.version
    with pytest.raises(NicSettingError) as caught:
        table.delete(3)
    assert (caught.value.errno, caught.value.call) == (errno.ENOENT, "ethtool -N")
    assert caught.value.hint == f"no rule at location 3; rules are at: {'2, 4' if rules else 'none'}"
    assert table.version == before


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (FlowRule(queue=1), "something to match on"),
        (FlowRule(queue=1, family=TCP4), "something to match on"),
        (FlowRule(queue=1, src_ip="0.0.0.0/0", dst_ip="0.0.0.0/0"), "something to match on"),
        (FlowRule(queue=1, src_port=80, src_port_mask=0), "something to match on"),
        (FlowRule(queue=1, dst_port=80, dst_port_mask=0), "something to match on"),
        (FlowRule(queue=1, src_ip="10.0.0.256"), "'10.0.0.256' is not an IPv4 or IPv6 address"),
        (FlowRule(queue=1, dst_ip="localhost"), "'localhost' is not an IPv4 or IPv6 address"),
        (FlowRule(queue=1, dst_ip="10.0.0.0/33"), "'10.0.0.0/33' is not"),
        (FlowRule(queue=1, src_port=-1), "src_port must be 0 to 65535, got -1"),
        (FlowRule(queue=1, src_port=65536), "src_port must be 0 to 65535, got 65536"),
        (FlowRule(queue=1, dst_port=-1), "dst_port must be 0 to 65535, got -1"),
        (FlowRule(queue=1, dst_port=65536), "dst_port must be 0 to 65535, got 65536"),
        (FlowRule(queue=1, src_port=1, src_port_mask=0x10000), "src_port_mask must be 0 to 0xffff, got 0x10000"),
        (FlowRule(queue=1, dst_port=1, dst_port_mask=-1), "dst_port_mask must be 0 to 0xffff, got -0x1"),
        (FlowRule(queue=1, family=TCP6, dst_ip="10.0.0.1"), "10.0.0.1 is not an address for a tcp6 rule"),
        (FlowRule(queue=1, family=TCP4, src_ip="::1"), "::1 is not an address for a tcp4 rule"),
        (FlowRule(queue=1, src_ip="10.0.0.1", dst_ip="::1"), "not of one IP version"),
        (FlowRule(queue=1, family=TCP4, src_ip="10.0.0.1", dst_ip="::1"), "not of one IP version"),
    ],
)
def test_senseless_rules_are_refused(rule: FlowRule, message: str) -> None:
    table = NtupleTable(16)
    with pytest.raises(ValueError, match=message):
        table.insert(rule)
    with pytest.raises(ValueError, match=message):
        ethtool_command("eth1", rule)
    assert (table.rules, table.version) == ((), 0)


# --- how people type them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "command"),
    [
        (
            FlowRule(queue=15, family=TCP4, dst_port=5201),
            "ethtool -N eth1 flow-type tcp4 dst-port 5201 action 15",
        ),
        (
            FlowRule(queue=2, src_ip="fd00::1", dst_ip="fd00::2", src_port=1000, dst_port=2000, location=7),
            "ethtool -N eth1 flow-type tcp6 src-ip fd00::1 dst-ip fd00::2 src-port 1000 dst-port 2000 action 2 loc 7",
        ),
        (
            FlowRule(queue=0, src_ip="10.1.2.3/8", dst_port=0x1480, dst_port_mask=0xFFF0, location=0),
            "ethtool -N eth1 flow-type tcp4 src-ip 10.0.0.0 m 0.255.255.255 dst-port 5248 m 0x000f action 0 loc 0",
        ),
        (
            FlowRule(queue=0, dst_ip="fd00::/8", src_port=80, src_port_mask=0x00FF),
            "ethtool -N eth1 flow-type tcp6 dst-ip fd00:: m ff:ffff:ffff:ffff:ffff:ffff:ffff:ffff "
            "src-port 80 m 0xff00 action 0",
        ),
        (
            FlowRule(queue=15, dst_port=5201),
            "ethtool -N eth1 flow-type tcp4 dst-port 5201 action 15 && "
            "ethtool -N eth1 flow-type tcp6 dst-port 5201 action 15",
        ),
    ],
)
def test_ethtool_command(rule: FlowRule, command: str) -> None:
    assert ethtool_command("eth1", rule) == command
