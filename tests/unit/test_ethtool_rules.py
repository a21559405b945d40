"""FlowRules and the kernel's flow specs; what is sent over; what keeps bound queues to themselves."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.kernel.ntuple import HeldRule, flow_rule, flow_spec
from devmem_tcp.kernel.settings import plan, rss_words
from devmem_tcp.nicmodel.flow import parse_network
from devmem_tcp.nicmodel.isolation import OtherRule, isolation_warnings
from devmem_tcp.nicmodel.ntuple import as_held
from devmem_tcp.types import Family, FlowRule
from devmem_tcp.uapi import ethtool as abi

PORTS = st.integers(0, 0xFFFF)


def networks(family: Family) -> st.SearchStrategy[str]:
    bits = 32 if family is Family.TCP4 else 128
    numbers = st.integers(0, (1 << bits) - 1)
    if family is Family.TCP4:
        addresses = numbers.map(lambda number: str(ipaddress.IPv4Address(number)))
    else:
        addresses = numbers.map(lambda number: str(ipaddress.IPv6Address(number)))
    return st.builds("{}/{}".format, addresses, st.integers(0, bits)).filter(
        lambda text: (parse_network(text).version == 4) is (family is Family.TCP4)  # IPv4-mapped ones count as IPv4
    )


@st.composite
def rules(draw: st.DrawFn) -> FlowRule:
    family = draw(st.sampled_from(Family))
    address = st.none() | networks(family)
    return FlowRule(
        queue=draw(st.integers(0, 255)),
        family=family,
        src_ip=draw(address),
        dst_ip=draw(address),
        src_port=draw(st.none() | PORTS),
        dst_port=draw(st.none() | PORTS),
        src_port_mask=draw(PORTS),
        dst_port_mask=draw(PORTS),
        location=draw(st.none() | st.integers(0, 4095)),
    )


def meaning(rule: FlowRule) -> tuple[object, ...]:
    """Return what a rule says, whichever way it says it."""
    sides: list[object] = []
    for ip, port, mask in (
        (rule.src_ip, rule.src_port, rule.src_port_mask),
        (rule.dst_ip, rule.dst_port, rule.dst_port_mask),
    ):
        network = None if ip is None else parse_network(ip)
        sides.append(None if network is None or not network.prefixlen else network)
        sides.append(None if port is None or not mask else (port & mask, mask))
    return (rule.queue, rule.family, rule.location, *sides)


@given(rules())
def test_rule_survives_the_kernels_form(rule: FlowRule) -> None:
    spec = flow_spec(rule)
    assert len(spec) == abi.FLOW_SPEC.size
    found = flow_rule(spec)
    assert found is not None
    assert meaning(found) == meaning(rule)
    assert flow_spec(found) == spec, "what was read is not what was written"


@given(rules(), rules())
def test_rules_are_equal_when_they_mean_the_same(one: FlowRule, other: FlowRule) -> None:
    equal = flow_rule(flow_spec(one)) == flow_rule(flow_spec(other))
    assert equal is (meaning(one) == meaning(other))


def test_rule_as_held_is_read_back_as_it_is() -> None:
    for rule in as_held(FlowRule(15, dst_port=5201, location=None)):
        assert flow_rule(flow_spec(rule)) == rule


def test_rule_needs_a_family_and_an_address_of_it() -> None:
    with pytest.raises(ValueError, match="give the rule a family"):
        flow_spec(FlowRule(1, dst_port=80))
    with pytest.raises(ValueError, match=r"10\.0\.0\.1 is not an address for a tcp6 rule"):
        flow_spec(FlowRule(1, Family.TCP6, dst_ip="10.0.0.1"))


def changed(
    rule: FlowRule, *, kind: int | None = None, m_u: bytes | None = None, m_ext: bytes = b"", cookie: int = 1
) -> bytes:
    flow_type, h_u, h_ext, mask, _, _, location = abi.FLOW_SPEC.unpack(flow_spec(rule))
    return abi.FLOW_SPEC.pack(
        flow_type if kind is None else kind, h_u, h_ext, mask if m_u is None else m_u, m_ext, cookie, location
    )


PLAIN = FlowRule(1, Family.TCP4, dst_port=80, location=9)


@pytest.mark.parametrize(
    "spec",
    [
        changed(PLAIN, kind=0x02),
        changed(PLAIN, kind=abi.TCP_V4_FLOW | abi.FLOW_RSS),
        changed(PLAIN, kind=abi.TCP_V4_FLOW | abi.FLOW_EXT, m_ext=b"\0" * 8 + b"\xff\xff"),
        changed(PLAIN, kind=abi.TCP_V4_FLOW | abi.FLOW_MAC_EXT, m_ext=b"\0\0\xff"),
        changed(PLAIN, m_u=abi.TCPIP4_SPEC.pack(b"", b"\xff\0\xff\0", 0, 0, 0)),
        changed(PLAIN, m_u=abi.TCPIP4_SPEC.pack(b"", b"", 0, 0, 0xFF)),
        changed(PLAIN, cookie=abi.RX_CLS_FLOW_DISC),
        changed(PLAIN, cookie=1 << 32 | 1),
    ],
    ids=["udp", "rss context", "vlan", "mac", "mask with holes", "traffic class", "drop", "virtual function"],
)
def test_what_a_flow_rule_cannot_say_is_none(spec: bytes) -> None:
    assert flow_rule(spec) is None


def test_an_extension_that_matches_anything_is_none_of_our_business() -> None:
    assert flow_rule(changed(PLAIN, kind=abi.TCP_V4_FLOW | abi.FLOW_EXT)) == PLAIN


def test_held_rules_tell_where_other_protocols_go() -> None:
    udp = HeldRule.parse(changed(PLAIN, kind=0x02, cookie=3))
    assert (udp.location, udp.queue, udp.kind, udp.rule) == (9, 3, "udp4", None)
    assert HeldRule.parse(changed(PLAIN, cookie=abi.RX_CLS_FLOW_DISC)).queue is None
    assert HeldRule.parse(changed(PLAIN, kind=0x02 | abi.FLOW_RSS)).queue is None
    assert HeldRule.parse(changed(PLAIN, kind=0x7F)).kind == "flow type 127"


# --- plan -----------------------------------------------------------------------------------------------------------


def test_plan_is_what_one_would_type() -> None:
    assert plan("eth1", header_split="on", hds_thresh=0, equal=15, rules=[FlowRule(15, dst_port=5201)]) == [
        "ethtool -G eth1 tcp-data-split on",
        "ethtool -G eth1 hds-thresh 0",
        "ethtool -X eth1 equal 15",
        "ethtool -K eth1 ntuple on",
        "ethtool -N eth1 flow-type tcp4 dst-port 5201 action 15",
        "ethtool -N eth1 flow-type tcp6 dst-port 5201 action 15",
    ]
    assert plan("eth1") == []
    assert plan("eth1", header_split="unknown", weights=[1, 0, 2]) == [
        "ethtool -G eth1 tcp-data-split auto",
        "ethtool -X eth1 weight 1 0 2",
    ]


def test_rss_takes_exactly_one_form() -> None:
    assert rss_words("eth1", table=[1, 0]) == (
        """ynl --family ethtool --do rss-set --json '{"header": {"dev-name": "eth1"}, "indir": [1, 0]}'"""
    )
    for equal, weights in ((None, None), (2, [1, 1])):
        with pytest.raises(ValueError, match="exactly one"):
            rss_words("eth1", equal=equal, weights=weights)


# --- isolation ------------------------------------------------------------------------------------------------------


def test_isolated_queues_get_no_warning() -> None:
    assert isolation_warnings([0, 1, 0, 1], [OtherRule(5, 1, "udp4"), OtherRule(6, None, "ether")], [2, 3]) == []


def test_rss_onto_a_bound_queue_is_told_with_the_fix() -> None:
    (warning,) = isolation_warnings([0, 1, 2, 3], [], [2, 3], nic="eth1")
    assert "2 of 4 hash buckets to bound RX queues 2, 3" in warning
    assert warning.endswith("fix: ethtool -X eth1 equal 2")


def test_rss_is_weighted_where_equal_would_hit() -> None:
    (warning,) = isolation_warnings([0, 1, 2, 3], [], [1], nic="eth1")
    assert warning.endswith("fix: ethtool -X eth1 weight 1 0 1 1")


def test_rss_with_no_queue_left_needs_more_queues() -> None:
    (warning,) = isolation_warnings([0, 0], [], [0], nic="eth1")
    assert "fix: ethtool -L eth1 rx 2" in warning


def test_other_rules_onto_a_bound_queue_are_told_each() -> None:
    rules = [OtherRule(5, 2, "udp4"), OtherRule(6, 0, "tcp4"), OtherRule(7, 2, "tcp6 dst-port 22")]
    first, second = isolation_warnings([0], rules, {2}, nic="eth1")
    assert "(udp4) sends other traffic to bound RX queue 2; fix: ethtool -N eth1 delete 5" in first
    assert second.endswith("ethtool -N eth1 delete 7")


@given(st.lists(st.integers(0, 7), min_size=1, max_size=16), st.sets(st.integers(1, 7)))
def test_fix_keeps_rss_off_bound_queues(table: list[int], bound: set[int]) -> None:
    warnings = isolation_warnings(table, [], bound, nic="eth1")
    assert bool(warnings) is bool(set(table) & bound)
    for warning in warnings:
        words = warning.rpartition("ethtool -X eth1 ")[2].split()
        if words[0] == "equal":
            used = set(range(int(words[1])))
        else:
            used = {queue for queue, weight in enumerate(words[1:]) if weight == "1"}
        assert used
        assert not used & bound
