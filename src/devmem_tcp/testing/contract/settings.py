"""NIC settings and steering: a transaction each, and what they do to flows."""

from __future__ import annotations

import errno
import warnings

from devmem_tcp.errors import NicSettingError, NotZeroCopy, SteeringWarning
from devmem_tcp.testing.contract.expect import needs, raises
from devmem_tcp.testing.contract.rig import Rig
from devmem_tcp.testing.contract.rig import __file__ as rig_file
from devmem_tcp.types import Family, FlowRule, FragKind, HeaderSplitMode


def mode(rig: Rig) -> HeaderSplitMode:
    return rig.nic.header_split


def test_header_split_is_put_back(rig: Rig) -> None:
    setting = rig.nic.set_header_split("off")
    assert mode(rig) is HeaderSplitMode.OFF
    assert "ethtool -G" in setting.description
    assert "tcp-data-split off" in setting.description
    setting.close()
    assert mode(rig) is HeaderSplitMode.ON
    setting.close()


def test_header_split_takes_modes_and_their_names(rig: Rig) -> None:
    with rig.nic.set_header_split(HeaderSplitMode.OFF):
        assert mode(rig) is HeaderSplitMode.OFF
        with rig.nic.set_header_split("on"):
            assert mode(rig) is HeaderSplitMode.ON
        assert mode(rig) is HeaderSplitMode.OFF
    with raises(ValueError):
        rig.nic.set_header_split("sideways")


@needs("hds_thresh")
def test_hds_thresh_is_put_back(rig: Rig) -> None:
    with rig.nic.set_hds_thresh(64) as setting:
        assert "hds-thresh 64" in setting.description
    rig.bind()  # refused, were it not 0 again


@needs("hds_thresh")
def test_hds_thresh_over_the_limit_is_refused(rig: Rig) -> None:
    with raises(NicSettingError, errno.EINVAL):
        rig.nic.set_hds_thresh(1 << 30)
    rig.bind()


@needs(lacking=("hds_thresh",))
def test_hds_thresh_is_refused_where_there_is_none(rig: Rig) -> None:
    with raises(NicSettingError, errno.EOPNOTSUPP) as refused:
        rig.nic.set_hds_thresh(64)
    assert refused.error.hint
    rig.bind()


def test_rss_equal_spreads_evenly(rig: Rig) -> None:
    before = rig.nic.rss_table
    assert len(before) == rig.capabilities.rss_table_size
    with rig.nic.set_rss(equal=2) as setting:
        table = rig.nic.rss_table
        assert set(table) == {0, 1}
        assert abs(table.count(0) - table.count(1)) <= 1
        assert "ethtool -X" in setting.description
    assert rig.nic.rss_table == before


def test_rss_weights_give_shares(rig: Rig) -> None:
    with rig.nic.set_rss(weights=[1, 0, 3]):
        table = rig.nic.rss_table
        assert set(table) == {0, 2}
        assert abs(table.count(2) - 3 * table.count(0)) <= 3


def test_rss_table_is_taken_as_it_is(rig: Rig) -> None:
    size = rig.capabilities.rss_table_size
    whole = [index % 3 for index in range(size)]
    with rig.nic.set_rss(table=whole):
        assert rig.nic.rss_table == tuple(whole)
    with rig.nic.set_rss(table=[1, 0]):
        assert rig.nic.rss_table == (1, 0) * (size // 2)


def test_rss_takes_exactly_one_form(rig: Rig) -> None:
    before = rig.nic.rss_table
    with raises(ValueError):
        rig.nic.set_rss()
    with raises(ValueError):
        rig.nic.set_rss(equal=2, weights=[1, 1])
    assert rig.nic.rss_table == before


def test_rss_settings_nest(rig: Rig) -> None:
    before = rig.nic.rss_table
    outer = rig.nic.set_rss(equal=2)
    inner = rig.nic.set_rss(equal=1)
    inner.close()
    assert set(rig.nic.rss_table) == {0, 1}
    outer.close()
    assert rig.nic.rss_table == before


def test_setting_changed_by_another_is_left_alone(rig: Rig) -> None:
    outer = rig.nic.set_rss(equal=2)
    rig.nic.set_rss(equal=1)
    outer.close()
    assert set(rig.nic.rss_table) == {0}


def test_rss_steers_what_no_rule_matches(rig: Rig) -> None:
    for queue in (0, 1):
        with rig.nic.set_rss(table=[queue]):
            sock, peer, _ = rig.pair(steer=False)
            peer.sendall(b"hashed")
            assert rig.collect(sock).recv_exactly(6) == b"hashed"
            assert sock.rx_queue == queue


def test_ntuple_rule_beats_rss(rig: Rig) -> None:
    for host in rig.hosts:
        sock, peer, rule = rig.pair(host=host)
        assert rule is not None
        assert rule.rule.queue == rig.queue
        peer.sendall(b"steered")
        assert rig.collect(sock).recv_exactly(7) == b"steered"
        assert sock.rx_queue == rig.queue


def test_ntuple_rule_is_in_the_table_until_closed(rig: Rig) -> None:
    before = rig.nic.ntuple_rules
    rule = rig.nic.add_ntuple(dst_port=5201, queue=rig.queue)
    assert (rule.rule.dst_port, rule.rule.queue) == (5201, rig.queue)
    assert rule.rule.location is not None
    assert "ethtool -N" in rule.description
    assert any(found.dst_port == 5201 for found in rig.nic.ntuple_rules)
    rule.close()
    assert rig.nic.ntuple_rules == before
    rule.close()


def test_ntuple_takes_a_flow_rule(rig: Rig) -> None:
    family = Family.TCP6 if ":" in rig.host else Family.TCP4
    wanted = FlowRule(queue=rig.queue, family=family, dst_ip=rig.host, dst_port=5201)
    with rig.nic.add_ntuple(wanted) as rule:
        assert (rule.rule.family, rule.rule.dst_ip, rule.rule.dst_port) == (family, rig.host, 5201)


def test_lowest_location_wins(rig: Rig) -> None:
    with rig.listen() as listener:
        port = listener.address[1]
        family = Family.TCP6 if ":" in rig.host else Family.TCP4
        for queue, location in ((0, 5), (rig.queue, 2), (1, 9)):
            rig.nic.add_ntuple(FlowRule(queue, family, dst_port=port, location=location))
        peer = rig.peer_to((rig.host, port))
        sock = rig.accept(listener)
    peer.sendall(b"x")
    rig.collect(sock).recv_exactly(1)
    assert sock.rx_queue == rig.queue
    locations = [rule.location or 0 for rule in rig.nic.ntuple_rules]
    assert locations == sorted(locations)
    assert {2, 5, 9} <= set(locations)


def test_rule_for_another_flow_does_not_steer(rig: Rig) -> None:
    with rig.listen() as listener:
        port = listener.address[1]
        rig.nic.add_ntuple(dst_port=port ^ 1, queue=rig.queue)
        rig.nic.add_ntuple(src_port=port, queue=rig.queue)
        peer = rig.peer_to((rig.host, port))
        sock = rig.accept(listener)
    peer.sendall(b"x")
    rig.collect(sock).recv_exactly(1)
    assert sock.rx_queue < rig.rss_queues


def test_flow_to_no_bound_queue_is_told(rig: Rig) -> None:
    rig.bind()
    with rig.listen() as listener:
        port = listener.address[1]
        rig.nic.add_ntuple(dst_port=port, queue=0)
        rig.peer_to((rig.host, port))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            rig.accept(listener)
    (warning,) = told
    assert warning.category is SteeringWarning
    assert "RX queue 0, which is not bound" in str(warning.message)
    assert "ethtool -N" in str(warning.message)
    assert warning.filename == rig_file, "the warning does not point at who accepted"


def test_strict_listener_refuses_a_flow_to_no_bound_queue(rig: Rig) -> None:
    rig.bind()
    with rig.listen(strict=True) as listener:
        port = listener.address[1]
        peer = rig.peer_to((rig.host, port))
        with raises(NotZeroCopy) as refused:
            rig.accept(listener)
        assert f"add_ntuple(dst_port={port}, queue={rig.queue})" in refused.error.hint
        assert peer.recv(1) == b"", "the connection stays open"
        rig.nic.add_ntuple(dst_port=port, queue=rig.queue)
        rig.peer_to((rig.host, port))
        assert rig.accept(listener).rx_queue == rig.queue


def test_rule_for_no_such_queue_is_einval(rig: Rig) -> None:
    before = rig.nic.ntuple_rules
    with raises(NicSettingError, errno.EINVAL):
        rig.nic.add_ntuple(dst_port=5201, queue=rig.capabilities.rx_queues)
    assert rig.nic.ntuple_rules == before


def test_malformed_rules_are_value_errors(rig: Rig) -> None:
    before = rig.nic.ntuple_rules
    with raises(ValueError):
        rig.nic.add_ntuple(dst_port=5201)
    with raises(ValueError):
        rig.nic.add_ntuple(queue=rig.queue)
    with raises(ValueError):
        rig.nic.add_ntuple(dst_ip="300.1.1.1", queue=rig.queue)
    assert rig.nic.ntuple_rules == before


def test_steering_changes_in_the_middle(rig: Rig) -> None:
    """The flow leaves the bound queue and comes back; the stream goes on, and the stats tell where it landed."""
    rx = rig.bind()
    sock, peer, rule = rig.pair()
    collector = rig.collect(sock)
    assert rule is not None
    rig.transfer(collector, peer, 20_000)
    rule.close()
    before = sock.stats.host_bytes
    rig.transfer(collector, peer, 20_000)
    assert sock.stats.host_bytes == before + 20_000
    assert sock.rx_queue < rig.rss_queues
    rig.nic.add_ntuple(dst_port=sock.local_address[1], queue=rig.queue)
    rig.transfer(collector, peer, 20_000)
    assert sock.rx_queue == rig.queue
    assert sum(collector.seen.values()) == 60_000
    assert collector.seen[FragKind.HOST] == sock.stats.host_bytes
    assert rx.drained


def test_stats_name_the_nic_and_all_its_queues(rig: Rig) -> None:
    rx = rig.bind()
    stats = rig.nic.stats()
    assert (stats.nic, stats.backend) == (rig.nic.name, rig.capabilities.backend)
    assert [queue.queue for queue in stats.queues] == list(range(rig.capabilities.rx_queues))
    assert [queue.queue for queue in stats.queues if queue.dmabuf_id] == [rig.queue]
    assert stats.queues[rig.queue].dmabuf_id == rx.dmabuf_id
    assert stats.holders == ()
