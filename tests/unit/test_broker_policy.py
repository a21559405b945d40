"""Who may do what by the broker, and the administrator's file that says so."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.broker.configuration import EXAMPLE, parse
from devmem_tcp.broker.inspection import inspect_dmabuf
from devmem_tcp.broker.policy import Peer, Policy, Quota
from devmem_tcp.errors import BindError, KernelError, NicSettingError, OutOfDeviceMemory
from devmem_tcp.sys import calls
from devmem_tcp.types import FlowRule, HeaderSplitMode

USERS = {"alice": 1000, "bob": 1001}
GROUPS = {"devmem": 2000}
KINDS = {"udmabuf": None, "dma-heap system": None}
ALICE = Peer(77, 1000, 1000)
MEMBER = Peer(78, 1500, 1500, frozenset({2000}))
STRANGER = Peer(79, 1600, 1600, frozenset({1600, 27}))
MIB = 1 << 20


def read(text: str) -> Policy:
    return parse(text, "b.toml", user_id_of=USERS.__getitem__, group_id_of=GROUPS.__getitem__, kinds=KINDS)


EXAMPLE_POLICY = read(EXAMPLE)


def allow(lines: str = "", nic: str = "") -> str:
    return f"[nic.eth1]\n{nic}\n[[nic.eth1.allow]]\nusers = [1]\nqueues = 3\n{lines}"


# --- the file ---


def test_the_example_is_right_and_names_every_key() -> None:
    (permit,) = EXAMPLE_POLICY.permits
    assert permit.nic == "eth1"
    assert str(permit.queues) == "12-15"
    assert str(permit.rss_queues) == "0-11"
    assert EXAMPLE_POLICY.memory == ("udmabuf", "dma-heap system")
    assert EXAMPLE_POLICY.default_quota == Quota()
    keys = set(re.findall(r"^#? ?(\w+) =", EXAMPLE, re.MULTILINE))
    assert keys >= {"rss_queues", "users", "groups", "queues", "ports", "remote_ports", "locations", "settings"}
    assert keys >= set(Quota().limits())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a = \n", "at line 1, column 5"),
        ("nic = 3", "nic: Expected `object`"),
        ("nics = {}", "unknown field `nics`"),
        ("[nic.eth1]\nqueue = 1", "nic.eth1: this table contains unknown field `queue`"),
        ("[[nic.eth1.allow]]\nusers = [1]", "nic.eth1.allow[1]: this table missing required field `queues`"),
        ("[[nic.eth1.allow]]\nqueues = 1", "nic.eth1.allow[1]: names nobody"),
        (allow('groups = ["wheel"]'), "nic.eth1.allow[1].groups: this machine has no group 'wheel'"),
        (allow("groups = [-1]"), "nic.eth1.allow[1].groups: -1 is no group id"),
        (allow("groups = [1.5]"), "nic.eth1.allow[1].groups[1]: Expected"),
        (allow('ports = "http"'), "nic.eth1.allow[1].ports: 'http' is neither a number nor a range"),
        (allow('ports = "9-1"'), "'9-1' is out of order or above 65535"),
        (allow("ports = 65536"), "'65536' is out of order or above 65535"),
        (allow('locations = "0-4294967295"'), "nic.eth1.allow[1].locations: more than 65536 numbers"),
        (allow('settings = ["mtu"]'), "nic.eth1.allow[1].settings[1]: Invalid enum value 'mtu'"),
        (allow('settings = ["rss"]'), '"rss" needs nic.eth1.rss_queues'),
        (allow(nic='rss_queues = "0-3"'), "queue 3 is in nic.eth1.rss_queues too"),
        ('[memory]\nkinds = ["gpu"]', "memory.kinds: 'gpu' is none of: udmabuf, dma-heap system"),
        ("[quota]\nclients = -1", "quota.clients: Expected `int` >= 0"),
        ('[quota]\nbytes_bound = "1 GB"', "quota.bytes_bound: '1 GB' is no size"),
        ("[quota]\nbytes_bound = -1", "quota.bytes_bound: -1 is no size"),
        ("[quota.user.carol]\nrules = 1", "quota.user.carol: this machine has no user 'carol'"),
        ("[quota.group.devmem]\nuser = 1", "quota.group.devmem: this table contains unknown field `user`"),
    ],
)
def test_a_wrong_file_says_where_and_what(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as wrong:
        read(text)
    assert str(wrong.value).startswith("b.toml: ")
    assert "--example-config" in wrong.value.__notes__[0]


@given(st.text())
def test_any_text_is_a_policy_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):  # and nothing else
        read(text)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 50)), min_size=1, max_size=6))
def test_ranges_are_the_numbers_they_name(parts: list[tuple[int, int]]) -> None:
    spelt = ", ".join(f"{first}-{first + more}" for first, more in parts)
    (permit,) = read(allow(f'ports = "{spelt}"')).permits
    assert permit.ports.numbers() == {n for first, more in parts for n in range(first, first + more + 1)}
    assert all((n in permit.ports) == (n in permit.ports.numbers()) for n in range(1100))


# --- who ---


def test_a_client_is_named_by_user_group_or_supplementary_group() -> None:
    EXAMPLE_POLICY.check_listed(ALICE)
    EXAMPLE_POLICY.check_listed(MEMBER)
    EXAMPLE_POLICY.check_listed(Peer(1, 5, 2000))
    checks: list[Callable[[], object]] = [
        lambda: EXAMPLE_POLICY.check_listed(STRANGER),
        lambda: EXAMPLE_POLICY.permit(STRANGER, "eth1"),
    ]
    for check in checks:
        with pytest.raises(KernelError) as refused:
            check()
        assert refused.value.errno == errno.EACCES
        assert refused.value.extack == (
            "b.toml does not name uid 1600, nor its groups; it names users alice, groups devmem"
        )


def test_root_is_not_named_by_being_root() -> None:
    with pytest.raises(KernelError, match="does not name uid 0"):
        EXAMPLE_POLICY.check_listed(Peer(1, 0, 0))


def test_the_first_that_names_a_client_counts() -> None:
    policy = read(
        "[[nic.eth1.allow]]\nusers=['alice']\nqueues=1\n[[nic.eth1.allow]]\nusers=['alice','bob']\nqueues=2\n"
    )
    assert 1 in policy.permit(ALICE, "eth1").queues
    assert 2 in policy.permit(Peer(1, 1001, 1), "eth1").queues
    assert policy.permit(Peer(1, 1001, 1), "eth1").key == "nic.eth1.allow[2] of b.toml"


def test_an_nic_without_permits() -> None:
    with pytest.raises(KernelError, match=r"has no \[\[nic.eth2.allow\]\]; NICs it has: eth1"):
        EXAMPLE_POLICY.permit(ALICE, "eth2")
    with pytest.raises(KernelError, match="NICs it has: none"):
        read("").permit(ALICE, "eth2")


# --- what ---


def test_settings() -> None:
    permit = EXAMPLE_POLICY.permit(ALICE, "eth1")
    permit.check_header_split(ALICE, HeaderSplitMode.ON)
    permit.check_hds_thresh(ALICE, 0)
    permit.check_rss(ALICE, [*range(12), *range(12)])
    refused: list[Callable[[], object]] = [
        lambda: permit.check_header_split(ALICE, HeaderSplitMode.OFF),
        lambda: permit.check_header_split(ALICE, HeaderSplitMode.UNKNOWN),
        lambda: permit.check_hds_thresh(ALICE, 1),
        lambda: permit.check_rss(ALICE, list(range(11))),
        lambda: permit.check_rss(ALICE, list(range(13))),
        lambda: permit.check_rss(ALICE, []),
    ]
    for check in refused:
        with pytest.raises(NicSettingError, match=r"nic.eth1.allow\[1\] of b.toml \(users alice, groups devmem\)"):
            check()


def test_settings_that_are_not_listed() -> None:
    permit = read(allow('settings = ["header-split"]')).permits[0]
    permit.check_header_split(ALICE, HeaderSplitMode.ON)
    with pytest.raises(NicSettingError, match="settings are header-split, and hds-thresh is not among them"):
        permit.check_hds_thresh(ALICE, 0)
    with pytest.raises(NicSettingError, match="and rss is not among them"):
        permit.check_rss(ALICE, [0])


@given(
    st.builds(
        FlowRule,
        queue=st.integers(10, 17),
        dst_port=st.none() | st.sampled_from([22, 5201, 5299, 5300]),
        src_port=st.none() | st.sampled_from([443, 6000]),
        dst_ip=st.none() | st.just("10.0.0.1"),
        src_ip=st.none() | st.just("10.0.0.2"),
        dst_port_mask=st.sampled_from([0xFFFF, 0xFFFE, 0]),
        src_port_mask=st.sampled_from([0xFFFF, 0]),
        location=st.none() | st.sampled_from([0, 100]),
    )
)
def test_a_rule_takes_flows_of_allowed_ports_alone_even_without_its_source(rule: FlowRule) -> None:
    text = allow('ports = "5201-5299"\nremote_ports = 6000\nlocations = "100-199"').replace(
        "queues = 3", "queues='12-15'"
    )
    permit = read(text).permits[0]
    own = rule.dst_port in (5201, 5299) and rule.dst_port_mask == 0xFFFF
    no_destination = rule.dst_port is None and rule.dst_ip is None
    remote = rule.src_port == 6000 and rule.src_port_mask == 0xFFFF and no_destination
    good = (own or remote) and 12 <= rule.queue <= 15 and rule.location in (None, 100)
    with contextlib.nullcontext() if good else pytest.raises(NicSettingError):
        permit.check_rule(ALICE, rule)


def test_queues() -> None:
    permit = EXAMPLE_POLICY.permit(ALICE, "eth1")
    permit.check_queues(ALICE, [15, 12])
    with pytest.raises(BindError, match="queue 0, 16 is not among queues 12-15"):
        permit.check_queues(ALICE, [0, 12, 16])


def test_quotas_of_a_user_before_a_groups_before_the_default() -> None:
    assert EXAMPLE_POLICY.quota(ALICE).bytes_bound == 4 << 30
    assert EXAMPLE_POLICY.quota(ALICE).queues == 2
    assert EXAMPLE_POLICY.quota(MEMBER).queues == 4
    assert EXAMPLE_POLICY.quota(Peer(1, 1000, 2000)).queues == 2
    assert EXAMPLE_POLICY.quota(STRANGER) == Quota()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("clients", KernelError),
        ("buffers", KernelError),
        ("queues", BindError),
        ("bytes_bound", BindError),
        ("rules", NicSettingError),
    ],
)
def test_over_quota(name: str, kind: type[KernelError]) -> None:
    most = EXAMPLE_POLICY.quota(STRANGER).limits()[name]
    EXAMPLE_POLICY.check_quota(STRANGER, "do", name, most - 1, 1)
    with pytest.raises(kind) as refused:
        EXAMPLE_POLICY.check_quota(STRANGER, "do", name, most - 1, 2)
    assert type(refused.value) is kind
    assert refused.value.errno == errno.EDQUOT
    assert refused.value.extack == f"quota {name} of uid 1600 is {most}, used {most - 1}, asked 2"
    assert f"{name} in [quota] of b.toml" in refused.value.hint


def test_over_the_quota_of_memory() -> None:
    with pytest.raises(OutOfDeviceMemory) as refused:
        EXAMPLE_POLICY.check_quota(STRANGER, "allocate udmabuf", "bytes_allocated", 200 * MIB, 100 * MIB)
    assert (refused.value.wanted, refused.value.free) == (100 * MIB, 56 * MIB)
    with pytest.raises(KernelError, match=r"kinds in \[memory\] of b.toml: none"):
        read("").check_memory("udmabuf")


# --- what an fd is ---

FDINFO = "pos:\t0\nflags:\t02000002\nmnt_id:\t12\nino:\t77\nsize:\t8192\ncount:\t2\nexp_name:\tudmabuf\n"


@pytest.mark.parametrize("name", ["", "name:\tmine\n", "name:\tx\nsize:\t4096\ncount:\t1\n"])
def test_a_dma_bufs_facts_whatever_its_owner_called_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "read_text", lambda path: FDINFO + name if path == "/proc/self/fdinfo/9" else "")
    assert inspect_dmabuf(9) == (8192, 2)


def test_what_is_no_dma_buf() -> None:
    fd = calls.memfd_create("no dma-buf")
    try:
        with pytest.raises(BindError) as refused:
            inspect_dmabuf(fd)
        assert refused.value.errno == errno.EINVAL
    finally:
        calls.close_fd(fd)
