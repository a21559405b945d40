"""Steering: ntuple before RSS, and a version that tells when a cached queue is stale."""

from __future__ import annotations

import pytest

from devmem_tcp.errors import NicSettingError
from devmem_tcp.nicmodel.flow import Flow
from devmem_tcp.nicmodel.indirection import IndirectionTable
from devmem_tcp.nicmodel.steering import Steering
from devmem_tcp.nicmodel.toeplitz import MICROSOFT_KEY, Toeplitz
from devmem_tcp.types import Family, FlowRule

# Of the published RSS verification suite: hashes 0x51ccc178 and 0x40207d3d.
FLOW4 = Flow.between(("66.9.149.187", 2794), ("161.142.100.80", 1766))
FLOW6 = Flow.between(("3ffe:2501:200:1fff::7", 2794), ("3ffe:2501:200:3::1", 1766))
OTHER_KEY = bytes(range(1, 41))


def test_rss_starts_over_all_queues() -> None:
    steering = Steering(16)
    assert steering.table == IndirectionTable.default(16, 128)
    assert steering.toeplitz.key == MICROSOFT_KEY
    assert steering.queue_for(*FLOW4) == (0x51CCC178 % 128) % 16
    assert steering.queue_for(*FLOW6) == (0x40207D3D % 128) % 16


def test_rss_uses_the_table() -> None:
    steering = Steering(8, table_size=4)
    steering.set_table(IndirectionTable.explicit([7, 6, 5, 4], 4))
    assert steering.queue_for(*FLOW4) == 7  # 0x78 & 3 = 0
    assert steering.queue_for(*FLOW6) == 6  # 0x3d & 3 = 1


def test_rss_uses_the_key() -> None:
    steering = Steering(128, key=OTHER_KEY)
    expected = Toeplitz(OTHER_KEY).hash_tcp4(*FLOW4[1:]) % 128
    assert steering.queue_for(*FLOW4) == expected
    steering.set_key(MICROSOFT_KEY)
    assert steering.queue_for(*FLOW4) == 0x78
    steering.set_key(OTHER_KEY)
    assert steering.queue_for(*FLOW4) == expected


def test_a_rule_goes_before_rss_and_only_for_what_it_matches() -> None:
    steering = Steering(16)
    steering.set_table(IndirectionTable.equal(1))
    (rule,) = steering.ntuple.insert(FlowRule(queue=15, family=Family.TCP6, dst_port=1766))
    assert steering.queue_for(*FLOW6) == 15
    assert steering.queue_for(*FLOW4) == 0
    assert rule.location is not None
    steering.ntuple.delete(rule.location)
    assert steering.queue_for(*FLOW6) == 0


def test_a_rule_may_steer_to_queue_zero() -> None:
    steering = Steering(2)
    steering.set_table(IndirectionTable.explicit([1]))
    steering.ntuple.insert(FlowRule(queue=0, dst_port=1766))
    assert steering.queue_for(*FLOW4) == 0


def test_version_grows_with_every_change() -> None:
    steering = Steering(4)
    versions = [steering.version]
    (rule,) = steering.ntuple.insert(FlowRule(queue=1, family=Family.TCP4, dst_port=1))
    versions.append(steering.version)
    steering.ntuple.insert(rule)
    versions.append(steering.version)
    steering.set_table(IndirectionTable.equal(2))
    versions.append(steering.version)
    steering.set_key(OTHER_KEY)
    versions.append(steering.version)
    assert rule.location is not None
    steering.ntuple.delete(rule.location)
    versions.append(steering.version)
    assert versions == sorted(set(versions))


def test_version_stays_when_nothing_changes() -> None:
    steering = Steering(4)
    before = steering.version
    steering.queue_for(*FLOW4)
    with pytest.raises(ValueError, match="names queue 4"):
        steering.set_table(IndirectionTable.equal(5))
    with pytest.raises(ValueError, match="at least 40 bytes, got 39"):
        steering.set_key(bytes(39))
    with pytest.raises(NicSettingError):
        steering.ntuple.insert(FlowRule(queue=4, dst_port=1))
    assert steering.version == before
    assert steering.table == IndirectionTable.default(4)


def test_a_table_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="has 128 entries, got 64"):
        Steering(4).set_table(IndirectionTable.equal(4, 64))


def test_impossible_nics_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a queue"):
        Steering(0)
    with pytest.raises(ValueError, match="power of two"):
        Steering(4, table_size=100)
    with pytest.raises(ValueError, match="at least 40 bytes, got 39"):
        Steering(4, key=bytes(39))


def test_the_ntuple_size_is_the_one_given_or_1024() -> None:
    assert Steering(4).ntuple.size == 1024
    steering = Steering(4, ntuple_size=8)
    assert steering.ntuple.insert(FlowRule(queue=1, family=Family.TCP4, dst_port=1))[0].location == 7


def test_addresses_must_fit_the_family() -> None:
    with pytest.raises(ValueError, match="have 16 bytes"):
        Steering(4).queue_for(Family.TCP6, bytes(4), bytes(4), 1, 2)
