"""Which NIC goes where."""

from __future__ import annotations

import ipaddress

import pytest

from devmem_tcp.lab.vm.networks import job_environment, places


def test_two_nics_of_one_guest_are_in_two_namespaces() -> None:
    ((first, second),) = places(2, hosts=1, mtu=9000)
    assert (first.namespace, second.namespace) == ("", "peer")
    assert first.addresses == ("10.77.0.1/24", "fd77::1/64")
    assert second.mtu == 9000
    assert job_environment([(first, second)], 0) == {
        "LOCAL_V4": "10.77.0.1",
        "LOCAL_V6": "fd77::1",
        "REMOTE_V4": "10.77.0.2",
        "REMOTE_V6": "fd77::2",
        "REMOTE_TYPE": "netns",
        "REMOTE_ARGS": "peer",
    }


def test_two_guests_see_each_other() -> None:
    both = places(1, hosts=2, mtu=1500)
    assert [nic.namespace for host in both for nic in host] == ["", ""]
    told = [job_environment(both, host) for host in (0, 1)]
    assert told[0]["LOCAL_V4"] == told[1]["REMOTE_V4"]
    assert told[0]["REMOTE_V6"] == told[1]["LOCAL_V6"]
    assert "REMOTE_TYPE" not in told[0]


def test_sixteen_nics_differ_in_everything() -> None:
    nics = [nic for host in places(8, hosts=2, mtu=1500) for nic in host]
    assert len({nic.mac for nic in nics}) == len({nic.ipv4 for nic in nics}) == len({nic.ipv6 for nic in nics}) == 16
    for nic in nics:
        ipaddress.IPv4Interface(nic.addresses[0])
        ipaddress.IPv6Interface(nic.addresses[1])
        assert int(nic.mac[:2], 16) & 3 == 2, "locally administered, not a group"
    assert len({nic.namespace for nic in places(16, hosts=1, mtu=1500)[0]}) == 16


def test_a_lone_nic_has_no_peer() -> None:
    assert job_environment(places(1, hosts=1, mtu=1500), 0) == {}
    assert job_environment(places(0, hosts=1, mtu=1500), 0) == {}


@pytest.mark.parametrize(("nics", "hosts"), [(17, 1), (9, 2), (-1, 1)])
def test_too_many_nics_are_refused(nics: int, hosts: int) -> None:
    with pytest.raises(ValueError, match="NICs"):
        places(nics, hosts=hosts, mtu=1500)
