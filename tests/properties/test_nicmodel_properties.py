"""What must hold of the NIC model for any input."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from itertools import groupby

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.nicmodel.flow import Flow, parse_network
from devmem_tcp.nicmodel.header_split import HeaderSplit, Placement
from devmem_tcp.nicmodel.indirection import IndirectionTable
from devmem_tcp.nicmodel.ntuple import NtupleTable, as_held
from devmem_tcp.nicmodel.steering import Steering
from devmem_tcp.nicmodel.toeplitz import Toeplitz
from devmem_tcp.types import Family, FlowRule, HeaderSplitMode

RX_QUEUES = 8

keys = st.binary(min_size=40, max_size=40)
sizes = st.integers(0, 8).map(lambda power: 1 << power)
packed6 = st.binary(min_size=36, max_size=36)
u32 = st.integers(0, 0xFFFFFFFF)

# Few distinct values, so that rules and flows often meet.
texts4 = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.1.1", "11.0.0.1", "192.168.0.1"])
texts6 = st.sampled_from(["fd00::1", "fd00::2", "fd00:0:0:1::1", "fe80::1", "::1"])
ports = st.sampled_from([0, 1, 80, 81, 5201, 0x8000, 0xFFFF])
port_masks = st.sampled_from([0xFFFF, 0xFFFF, 0xFF00, 0x0001, 0x8000])


@st.composite
def flow_rules(draw: st.DrawFn) -> FlowRule:
    family = draw(st.sampled_from(Family))
    texts, bits = (texts4, 32) if family is Family.TCP4 else (texts6, 128)
    addresses = st.none() | texts | st.builds("{}/{}".format, texts, st.integers(1, bits))
    src_ip, dst_ip, src_port = draw(addresses), draw(addresses), draw(st.none() | ports)
    nothing_yet = src_ip is None and dst_ip is None and src_port is None
    return FlowRule(
        queue=draw(st.integers(0, RX_QUEUES - 1)),
        family=draw(st.sampled_from([family, None])),
        src_ip=src_ip,
        dst_ip=dst_ip,
        src_port=src_port,
        dst_port=draw(ports if nothing_yet else st.none() | ports),
        src_port_mask=draw(port_masks),
        dst_port_mask=draw(port_masks),
    )


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    texts = draw(st.sampled_from([texts4, texts6]))
    return Flow.between((draw(texts), draw(ports)), (draw(texts), draw(ports)))


def rule_matches(rule: FlowRule, flow: Flow) -> bool:
    """The meaning of a rule, field by field, by nothing but ipaddress."""

    def address_matches(text: str | None, packed: bytes) -> bool:
        return text is None or ipaddress.ip_address(packed) in ipaddress.ip_network(text, strict=False)

    def port_matches(wanted: int | None, mask: int, port: int) -> bool:
        return wanted is None or wanted & mask == port & mask

    return (
        rule.family in (None, flow.family)
        and address_matches(rule.src_ip, flow.src)
        and address_matches(rule.dst_ip, flow.dst)
        and port_matches(rule.src_port, rule.src_port_mask, flow.sport)
        and port_matches(rule.dst_port, rule.dst_port_mask, flow.dport)
    )


# --- Toeplitz --------------------------------------------------------------------------------------------------------


@given(keys, packed6, packed6)
def test_toeplitz_is_linear(key: bytes, a: bytes, b: bytes) -> None:
    toeplitz = Toeplitz(key)
    both = bytes(x ^ y for x, y in zip(a, b, strict=True))
    assert toeplitz.hash_bytes(both) == toeplitz.hash_bytes(a) ^ toeplitz.hash_bytes(b)


@given(keys, st.integers(0, 36 * 8 - 1))
def test_one_input_bit_gives_the_32_key_bits_from_its_position_on(key: bytes, position: int) -> None:
    data = (1 << (36 * 8 - 1 - position)).to_bytes(36, "big")
    expected = int.from_bytes(key, "big") >> (40 * 8 - 32 - position) & 0xFFFFFFFF
    assert Toeplitz(key).hash_bytes(data) == expected


@given(keys, st.lists(st.binary(min_size=12, max_size=12), min_size=1, max_size=20))
def test_hash_rows_agrees_with_hash_bytes(key: bytes, inputs: list[bytes]) -> None:
    rows = np.frombuffer(b"".join(inputs), np.uint8).reshape(-1, 12)
    toeplitz = Toeplitz(key)
    assert toeplitz.hash_rows(rows).tolist() == [toeplitz.hash_bytes(data) for data in inputs]


# --- the indirection table -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any), sizes)
def test_weights_fill_the_table_in_proportion(weights: list[int], size: int) -> None:
    total = sum(weights)
    if total > size:
        size = 1 << (total - 1).bit_length()
    table = IndirectionTable.weights(weights, size)
    assert table.size == size
    assert [queue for queue, _ in groupby(table.entries)] == [queue for queue, weight in enumerate(weights) if weight]
    for queue, weight in enumerate(weights):
        assert abs(table.entries.count(queue) - size * weight / total) < 1


@given(st.integers(1, 256), sizes)
def test_equal_differs_by_one_entry_at_most(queues: int, size: int) -> None:
    table = IndirectionTable.equal(min(queues, size), size)
    counts = [table.entries.count(queue) for queue in range(min(queues, size))]
    assert sum(counts) == size
    assert max(counts) - min(counts) <= 1


@given(sizes, u32)
def test_a_hash_goes_to_the_entry_of_its_remainder(size: int, hash_value: int) -> None:
    table = IndirectionTable.explicit(range(size), size)
    assert table.queue_for(hash_value) == hash_value % size


# --- ntuple rules ----------------------------------------------------------------------------------------------------


@given(st.lists(flow_rules(), max_size=12), st.lists(flows(), min_size=1, max_size=12), st.data())
def test_match_is_the_first_rule_that_matches_field_by_field(
    rules: list[FlowRule], packets: list[Flow], data: st.DataObject
) -> None:
    table = NtupleTable(RX_QUEUES, size=64)
    for rule in rules:
        table.insert(rule)
    if table.rules:
        for rule in data.draw(st.lists(st.sampled_from(table.rules), unique=True, max_size=4)):
            assert rule.location is not None
            table.delete(rule.location)
    for flow in packets:
        expected = next((rule.queue for rule in table.rules if rule_matches(rule, flow)), None)
        assert table.match(*flow) == expected


@given(flow_rules(), st.lists(flows(), min_size=1, max_size=12))
def test_what_the_nic_holds_means_what_was_asked(rule: FlowRule, packets: list[Flow]) -> None:
    held = as_held(rule)
    assert all(as_held(one) == (one,) for one in held)
    for flow in packets:
        assert any(rule_matches(one, flow) for one in held) == rule_matches(rule, flow)


@given(st.lists(st.integers(0, 15) | st.none(), max_size=24))
def test_locations_are_unique_and_in_order(locations: list[int | None]) -> None:
    table = NtupleTable(RX_QUEUES, size=48)
    rule = FlowRule(queue=1, family=Family.TCP4, dst_port=1)
    for location in locations:
        table.insert(replace(rule, location=location))
    held = [one.location for one in table.rules]
    given_ones = {location for location in locations if location is not None}
    assert held == sorted(given_ones) + list(range(48 - locations.count(None), 48))


@given(flows(), st.lists(flow_rules(), max_size=6))
def test_steering_asks_rules_then_rss(flow: Flow, rules: list[FlowRule]) -> None:
    steering = Steering(RX_QUEUES)
    for rule in rules:
        steering.ntuple.insert(rule)
    steered = steering.ntuple.match(*flow)
    ports_packed = flow.sport.to_bytes(2, "big") + flow.dport.to_bytes(2, "big")
    by_rss = Toeplitz().hash_bytes(flow.src + flow.dst + ports_packed) % 128 % RX_QUEUES
    assert steering.queue_for(*flow) == (by_rss if steered is None else steered)


@given(st.integers(0, 2**32 - 1), st.integers(0, 32))
def test_mapped_networks_hold_the_same_ipv4_addresses(address: int, prefix_bits: int) -> None:
    plain = ipaddress.IPv4Address(address)
    assert parse_network(f"::ffff:{plain}/{96 + prefix_bits}") == parse_network(f"{plain}/{prefix_bits}")


# --- header split ----------------------------------------------------------------------------------------------------


@given(
    mode=st.sampled_from(HeaderSplitMode),
    tcp=st.booleans(),
    payload_bytes=st.integers(0, 9000),
    header_bytes=st.integers(14, 400),
    header_buffer_bytes=st.integers(64, 512),
    bound=st.booleans(),
)
def test_device_memory_never_gets_headers_nor_host_memory_payload(
    mode: HeaderSplitMode, tcp: bool, payload_bytes: int, header_bytes: int, header_buffer_bytes: int, bound: bool
) -> None:
    placement = HeaderSplit(mode).place(
        tcp=tcp,
        payload_bytes=payload_bytes,
        header_bytes=header_bytes,
        header_buffer_bytes=header_buffer_bytes,
        bound=bound,
    )
    assert (placement is Placement.HOST) == (not bound)
    if bound and placement is not Placement.DROP:
        assert tcp
        assert mode is HeaderSplitMode.ON
        assert header_bytes <= header_buffer_bytes
        assert (placement is Placement.SPLIT) == (payload_bytes > 0)
