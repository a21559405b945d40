"""Why a flow reaches no bound queue: reason and fix name the right rule, queue and command."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.nicmodel.flow import Flow
from devmem_tcp.nicmodel.misdirection import explain_misdirection, matches
from devmem_tcp.nicmodel.ntuple import NtupleTable
from devmem_tcp.types import Family, FlowRule

FLOW = Flow.between(("10.0.0.2", 40000), ("10.0.0.1", 5201))


def test_without_a_rule_it_was_rss() -> None:
    reason, hint = explain_misdirection("eth1", FLOW, 0, [3, 4], [])
    assert reason == "no ntuple rule matches it, so RSS sent it to RX queue 0"
    assert hint.startswith("ethtool -N eth1 flow-type tcp4 dst-port 5201 action 3 ")
    assert "nic.add_ntuple(dst_port=5201, queue=3)" in hint


def test_rule_to_an_unbound_queue_is_named() -> None:
    rules = [FlowRule(1, Family.TCP4, dst_port=5201, location=7), FlowRule(3, Family.TCP4, dst_port=5201, location=9)]
    reason, hint = explain_misdirection("eth1", FLOW, 1, [3], rules)
    assert "location 7" in reason
    assert "RX queue 1" in reason
    assert hint.startswith("ethtool -N eth1 delete 7")


def test_right_rule_without_effect_means_the_feature_is_off() -> None:
    rules = [FlowRule(3, Family.TCP4, dst_port=5201, location=9)]
    reason, hint = explain_misdirection("eth1", FLOW, 1, [3], rules)
    assert "says RX queue 3, yet it came over 1" in reason
    assert "ethtool -K eth1 ntuple on" in hint


@pytest.mark.parametrize(
    "rule",
    [
        FlowRule(1, Family.TCP6, dst_port=5201),
        FlowRule(1, Family.TCP4, dst_port=5202),
        FlowRule(1, Family.TCP4, src_port=40001),
        FlowRule(1, Family.TCP4, src_ip="10.0.0.3"),
        FlowRule(1, Family.TCP4, dst_ip="10.1.0.0/16"),
    ],
)
def test_one_field_off_is_no_match(rule: FlowRule) -> None:
    assert not matches(rule, FLOW)


@given(st.data())
def test_agrees_with_the_table(data: st.DataObject) -> None:
    port = st.none() | st.integers(0, 3)
    mask = st.sampled_from([0xFFFF, 1, 2])
    address = st.none() | st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.0/30", "10.0.0.0/31"])
    rule = FlowRule(1, Family.TCP4, data.draw(address), data.draw(address), data.draw(port), data.draw(port))
    rule = FlowRule(1, Family.TCP4, rule.src_ip, rule.dst_ip, rule.src_port, rule.dst_port, data.draw(mask), 0xFFFF)
    table = NtupleTable(4)
    try:
        (held,) = table.insert(rule)
    except ValueError:  # nothing to match on
        return
    host = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"])
    ports = st.integers(0, 3)
    flow = Flow.between((data.draw(host), data.draw(ports)), (data.draw(host), data.draw(ports)))
    assert matches(held, flow) == (table.match(*flow) is not None)
