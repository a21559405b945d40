"""Every operation of ``kernel.ethtool`` and every setting, for real, judged by ethtool(8): run in a guest of the lab.

devmem-tcp lab run -- .venv/bin/pytest tests/guest/test_ethtool.py
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from devmem_tcp.errors import BusyError, KernelError, NicSettingError, RestoreError, SettingWarning
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.ethtool import Ethtool, Feature
from devmem_tcp.kernel.journal import Journal, Result
from devmem_tcp.kernel.settings import NicSettings
from devmem_tcp.kernel.state import find_nic, restore
from devmem_tcp.memory import Udmabuf
from devmem_tcp.nicmodel.isolation import OtherRule, isolation_warnings
from devmem_tcp.sys import calls
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.types import PAGE_SIZE, Family, FlowRule, HeaderSplitMode
from devmem_tcp.uapi.netdev import FAMILY

NIC: Final = os.environ["NETIF"]
QUEUES: Final = 4
SEED: Final = 5201
DEATHS: Final = 12
MAX_LIVES: Final = 60
MAX_LIFE_S: Final = 1.5
PATIENCE_S: Final = 60.0


def said(*words: str) -> str:
    """Return what ethtool(8) says."""
    return subprocess.run(["ethtool", *words], capture_output=True, text=True, timeout=30, check=True).stdout


def everything() -> dict[str, str]:
    """Return all that ethtool(8) knows of the settings that are changed here."""
    return {word: said(word, NIC) for word in ("-g", "-l", "-k", "-x", "-n")}


def field(text: str, name: str, *, nth: int = -1) -> str:
    """Return the ``nth`` field of a name in what ethtool(8) said; the last is the current value."""
    found: list[str] = re.findall(rf"^\s*{re.escape(name)}:\s*(.*)$", text, re.MULTILINE)
    return found[nth].strip()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(str(tmp_path / "journal"))


@pytest.fixture
def settings(journal: Journal) -> NicSettings:
    return NicSettings(NIC, journal)


# --- what the NIC says ----------------------------------------------------------------------------------------------


def test_everything_read_is_what_ethtool_reads() -> None:
    with Ethtool(NIC) as nic:
        driver, rings, channels, rss = nic.driver(), nic.rings(), nic.channels(), nic.rss()
        features = nic.features()
        assert nic.rx_queues() == QUEUES
        assert nic.permanent_address().hex(":") in said("-P", NIC)
        assert nic.hardware_address() == nic.permanent_address()
    text = said("-i", NIC)
    assert (driver.driver, driver.bus) == (field(text, "driver"), field(text, "bus-info"))
    assert driver.version == field(text, "version", nth=0)
    text = said("-g", NIC)
    assert (str(rings.rx_max), str(rings.rx)) == (field(text, "RX", nth=0), field(text, "RX"))
    assert (str(rings.tx_max), str(rings.tx)) == (field(text, "TX", nth=0), field(text, "TX"))
    assert rings.header_split.value == field(text, "TCP data split")
    text = said("-l", NIC)
    assert (str(channels.rx_max), str(channels.rx)) == (field(text, "RX", nth=0), field(text, "RX"))
    assert (str(channels.tx_max), str(channels.tx)) == (field(text, "TX", nth=0), field(text, "TX"))
    text = said("-x", NIC)
    lines = re.findall(r"^\s+\d+:((?:\s+\d+)+)$", text, re.MULTILINE)
    assert [int(queue) for line in lines for queue in line.split()] == list(rss.table)
    assert rss.key.hex(":") in text
    shown = dict(re.findall(r"^\s*([a-z0-9-]+): (on|off)", said("-k", NIC), re.MULTILINE))
    theirs = {name: features[name] for name in ("rx-gro-hw", "tx-tcp6-segmentation", "highdma", "vlan-challenged")}
    assert {name: "on" if feature.on else "off" for name, feature in theirs.items()} == {n: shown[n] for n in theirs}
    assert features["rx-ntuple-filter"].on is (shown["ntuple-filters"] == "on")
    assert features["vlan-challenged"] == Feature(on=False, fixed=True)


def test_no_such_interface_is_enodev() -> None:
    with pytest.raises(KernelError) as refused:
        Ethtool("nothere0")
    assert refused.value.errno == errno.ENODEV


def test_what_a_driver_has_not_is_told() -> None:
    with Ethtool("lo") as lo:
        for read in (lo.driver, lo.rings, lo.channels, lo.rss, lo.rule_table, lo.rx_queues):
            with pytest.raises(KernelError) as refused:
                read()
            assert refused.value.errno == errno.EOPNOTSUPP
            assert refused.value.hint


# --- settings, one by one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word", "shows"),
    [
        (lambda it: it.set_header_split("on"), "-g", r"TCP data split:\s+on"),
        (lambda it: it.set_ring_sizes(rx=512, tx=256), "-g", r"(?s)Current.*RX:\s+512.*TX:\s+256"),
        (lambda it: it.set_channels(rx=2, tx=3), "-l", r"(?s)Current.*RX:\s+2.*TX:\s+3"),
        (lambda it: it.set_feature("ntuple", True), "-k", r"ntuple-filters: on"),
        (lambda it: it.set_feature("rx-gro", False), "-k", r"generic-receive-offload: off"),
        (lambda it: it.set_rss(equal=1), "-x", r"  120:      0     0     0     0     0     0     0     0"),
        (lambda it: it.set_rss(weights=[1, 0, 3]), "-x", r"    0:      0     0     0     0     0     0     0     0"),
        (lambda it: it.set_rss(table=[3, 1]), "-x", r"    0:      3     1     3     1     3     1     3     1"),
        (lambda it: it.set_rss_key(bytes(range(40))), "-x", r"00:01:02:03:.*:27"),
    ],
    ids=["header split", "ring sizes", "channels", "ntuple", "gro", "rss equal", "rss weights", "rss table", "rss key"],
)
def test_setting_is_made_and_put_back(
    settings: NicSettings, journal: Journal, change: Callable[[NicSettings], object], word: str, shows: str
) -> None:
    before = everything()
    with settings:
        change(settings)
        assert re.search(shows, said(word, NIC)), said(word, NIC)
        assert len(journal.entries()) == 1
    assert everything() == before
    assert journal.entries() == []


def test_words_of_a_setting_do_the_same(settings: NicSettings) -> None:
    """What a description says is typed, and changes nothing any more."""
    with settings:
        made = [
            settings.set_header_split("on"),
            settings.set_rss(equal=1),
            settings.set_rss(weights=[1, 0, 3]),
            settings.set_feature("ntuple", True),
        ]
        for setting in made[:1] + made[2:]:
            now = everything()
            subprocess.run(setting.description.split(), check=True, capture_output=True, timeout=30)
            assert everything() == now


def test_default_rss_is_put_back_as_default(settings: NicSettings) -> None:
    """The kernel guards a table that was asked for against fewer queues, and one that nobody asked for not."""
    with settings:
        with settings.set_rss(table=[3, 2, 1, 0]), pytest.raises(NicSettingError, match="existing indirection table"):
            settings.set_channels(rx=2, tx=4)
        settings.set_channels(rx=2, tx=4)


def test_refusals_change_nothing(settings: NicSettings, journal: Journal) -> None:
    before = everything()
    cases: list[tuple[Callable[[], object], int]] = [
        (lambda: settings.set_hds_thresh(64), errno.EOPNOTSUPP),
        (lambda: settings.set_channels(rx=64, tx=4), errno.EINVAL),
        (lambda: settings.set_ring_sizes(rx=1 << 20, tx=1024), errno.EINVAL),
        (lambda: settings.set_feature("vlan-challenged", True), errno.EINVAL),
        (lambda: settings.set_feature("no-such-feature", True), errno.EOPNOTSUPP),
        (lambda: settings.set_rss_key(b"short"), errno.EINVAL),
        (lambda: settings.add_ntuple(FlowRule(QUEUES, dst_port=1)), errno.EINVAL),
        (lambda: settings.add_ntuple(FlowRule(1, Family.TCP4, dst_port=1, location=5000)), errno.EINVAL),
    ]
    with settings:
        for change, number in cases:
            with pytest.raises(NicSettingError, match=f"ethtool -[A-Z] {NIC}") as refused:
                change()
            assert refused.value.errno == number
        with pytest.raises(ValueError, match="names queue 9"):
            settings.set_rss(table=[9])
        assert everything() == before
        assert journal.entries() == []


def test_kernels_words_are_passed_on(settings: NicSettings) -> None:
    with settings, pytest.raises(NicSettingError) as refused:
        settings.set_ring_sizes(rx=1 << 20, tx=1024)
    assert refused.value.extack == "requested ring size exceeds maximum"
    assert refused.value.attr == "rx"


def test_without_privilege_it_is_eperm_and_reading_goes_on(journal: Journal) -> None:
    def unprivileged() -> None:
        os.setuid(65534)
        with Ethtool(NIC) as nic:
            nic.rings()
            nic.rules()
            changes: list[Callable[[], None]] = [
                lambda: nic.set_header_split(HeaderSplitMode.ON),
                lambda: nic.set_rss_table([0] * 128),
            ]
            for change in changes:
                with pytest.raises(NicSettingError, match="CAP_NET_ADMIN") as refused:
                    change()
                assert refused.value.errno == errno.EPERM

    assert in_child(unprivileged) == 0


# --- ntuple rules ---------------------------------------------------------------------------------------------------


RULES: Final = [
    FlowRule(1, Family.TCP4, dst_port=5201),
    FlowRule(2, Family.TCP4, "10.77.0.2", "10.77.0.1", 40000, 5201),
    FlowRule(3, Family.TCP6, "fd77::2", "fd77::1", 40000, 5201),
    FlowRule(3, Family.TCP6, dst_ip="fd77::/64", dst_port=443),
    FlowRule(1, Family.TCP4, src_ip="10.0.0.0/8", dst_port=0x1200, dst_port_mask=0xFF00),
    FlowRule(0, Family.TCP4, src_port=22, location=7),
]


@pytest.mark.parametrize("rule", RULES)
def test_rule_reads_as_it_was_written_and_as_ethtool_writes_it(settings: NicSettings, rule: FlowRule) -> None:
    with settings:
        made = settings.add_ntuple(rule)
        (held,) = settings.ntuple_rules
        assert held == made.rule
        assert held.location == (1023 if rule.location is None else rule.location)
        ours = said("-n", NIC)
        made.close()
        settings.set_feature("ntuple", True)
        words = made.description.rpartition(" && ")[2].split()
        if rule.location is None:
            words += ["loc", "1023"]
        subprocess.run(words, check=True, capture_output=True, timeout=30)
        assert said("-n", NIC) == ours
        assert settings.ntuple_rules == (held,)
        subprocess.run(["ethtool", "-N", NIC, "delete", str(held.location)], check=True, timeout=30)


def test_rule_for_both_families_is_two_all_or_none(settings: NicSettings) -> None:
    before = everything()
    with settings:
        made = settings.add_ntuple(FlowRule(1, dst_port=5201))
        assert [rule.family for rule in made.rules] == [Family.TCP4, Family.TCP6]
        assert [rule.location for rule in settings.ntuple_rules] == [1022, 1023]
        made.close()
        assert everything() == before
        with pytest.raises(ValueError, match="needs a family"):
            settings.add_ntuple(FlowRule(1, dst_port=5201, location=3))
    assert everything() == before


def test_rule_in_place_of_anothers_gives_it_back(settings: NicSettings) -> None:
    ethtool_words = f"ethtool -N {NIC} flow-type udp4 dst-port 53 action 2 loc 9"
    with settings:
        settings.set_feature("ntuple", True)
        subprocess.run(ethtool_words.split(), check=True, capture_output=True, timeout=30)
        before = said("-n", NIC)
        with settings.add_ntuple(FlowRule(1, Family.TCP4, dst_port=5201, location=9)) as made:
            assert settings.ntuple_rules == (made.rule,)
        assert said("-n", NIC) == before
        (other,) = settings.ethtool.rules()
        assert (other.kind, other.queue, other.rule) == ("udp4", 2, None)
        told = isolation_warnings(settings.rss_table, [OtherRule(9, other.queue, other.kind)], [2], nic=NIC)
        assert len(told) == 2
        for warning in told:
            fix = warning.rpartition("fix: ")[2]
            subprocess.run(fix.split(), check=True, capture_output=True, timeout=30)
        assert isolation_warnings(settings.rss_table, [], [2]) == []
        assert settings.ethtool.rules() == ()
        settings.ethtool.set_rss_default()


def test_rules_of_others_keep_ntuple_on(settings: NicSettings) -> None:
    words = f"ethtool -N {NIC} flow-type tcp4 dst-port 80 action 2 loc 9"
    with settings:
        made = settings.add_ntuple(FlowRule(1, Family.TCP4, dst_port=5201))
        subprocess.run(words.split(), check=True, capture_output=True, timeout=30)
        with pytest.raises(BusyError, match="2 ntuple rules"):
            settings.set_feature("ntuple", False)
        with pytest.warns(SettingWarning, match="1 ntuple rules of others"):
            made.close()
        assert [rule.dst_port for rule in settings.ntuple_rules] == [80]
        settings.ethtool.delete_rule(9)
        settings.ethtool.set_feature("ntuple", False)


def test_rule_that_someone_else_deleted_is_no_error(settings: NicSettings) -> None:
    with settings:
        made = settings.add_ntuple(FlowRule(1, Family.TCP4, dst_port=5201))
        settings.ethtool.delete_rule(1023)
        made.close()


def test_rule_that_someone_else_replaced_stays(settings: NicSettings) -> None:
    words = f"ethtool -N {NIC} flow-type tcp4 dst-port 80 action 2 loc 1023"
    with settings:
        made = settings.add_ntuple(FlowRule(1, Family.TCP4, dst_port=5201))
        subprocess.run(words.split(), check=True, capture_output=True, timeout=30)
        with pytest.warns(SettingWarning) as told:
            made.close()
        assert len(told) == 2  # of the rule, and of ntuple, which it needs
        assert [rule.dst_port for rule in settings.ntuple_rules] == [80]
        settings.ethtool.delete_rule(1023)
        settings.ethtool.set_feature("ntuple", False)


# --- bound queues ---------------------------------------------------------------------------------------------------


def test_restore_that_the_kernel_refuses_can_be_made_up_for(settings: NicSettings, journal: Journal) -> None:
    before = everything()
    with settings, Udmabuf().allocate(64 * PAGE_SIZE) as buffer:
        split = settings.set_header_split("on")
        assert buffer.dmabuf_fd is not None
        with GenericNetlink(FAMILY) as netlink:
            netdev.bind_rx(netlink, settings.ethtool.ifindex, buffer.dmabuf_fd, [1], None)
            with pytest.raises(RestoreError, match="can't disable tcp-data-split") as refused:
                split.close()
            assert os.path.exists(refused.value.journal)
            assert settings.header_split is HeaderSplitMode.ON
        split.close()
        assert not os.path.exists(refused.value.journal)
    assert everything() == before


# --- several programs -----------------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked child; return its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_two_programs_may_end_in_any_order(journal: Journal) -> None:
    before = everything()
    first = NicSettings(NIC, journal)
    first.set_rss(equal=2)
    mine = first.add_ntuple(FlowRule(1, Family.TCP4, dst_port=5201))
    with NicSettings(NIC, journal) as second:
        second.set_rss(equal=1)
        second.add_ntuple(FlowRule(1, Family.TCP4, dst_port=5202))
        first.close()
        assert set(second.rss_table) == {0}
        assert [rule.dst_port for rule in second.ntuple_rules] == [5202]
        assert second.ethtool.feature("ntuple")
    assert everything() == before
    mine.close()


def use(journal: Journal) -> None:
    """Do what a program does with a NIC, first to last."""
    with NicSettings(NIC, journal) as settings:
        settings.set_header_split("on")
        settings.set_rss(equal=1)
        with settings.add_ntuple(FlowRule(1, dst_port=5201)):
            settings.set_rss(table=[0, 2])


def test_killed_at_any_call_the_nic_is_restored(journal: Journal) -> None:
    before = everything()
    made: list[str] = []
    with calls.intercept(made.append):
        use(journal)
    total = len(made)
    assert total > 200
    for n in random.Random(SEED).sample(range(total), DEATHS):

        def die_at_nth(n: int = n) -> None:
            count = itertools.count()

            def step(_: str) -> None:
                if next(count) == n:
                    os.kill(os.getpid(), signal.SIGKILL)

            with calls.intercept(step):
                use(journal)

        assert in_child(die_at_nth) == -signal.SIGKILL
        outcomes = restore(journal)
        assert everything() == before, f"killed at call {n} of {total}: {outcomes}"
        assert journal.entries() == []


def test_killed_at_any_time_the_nic_is_restored(journal: Journal) -> None:
    before = everything()
    chance = random.Random(SEED)

    def use_forever() -> None:
        while True:
            use(journal)

    restored = 0
    for _ in range(MAX_LIVES):  # some end before they have changed anything
        if restored >= DEATHS:
            break
        life_s = chance.uniform(0.0, MAX_LIFE_S)
        pid = os.fork()
        if pid == 0:
            try:
                use_forever()
            finally:
                os._exit(1)
        ended = os.pidfd_open(pid)
        try:
            assert not select.select([ended], [], [], life_s)[0], "the child failed"
            os.kill(pid, signal.SIGKILL)
            assert select.select([ended], [], [], PATIENCE_S)[0]
        finally:
            os.close(ended)
        outcomes = restore(journal)  # before anybody has waited for it: it is dead all the same
        os.waitpid(pid, 0)
        restored += sum(outcome.result is Result.RESTORED for outcome in outcomes)
        assert everything() == before, f"killed after {life_s:.3f} s: {outcomes}"
        assert journal.entries() == []
    assert restored >= DEATHS, "hardly any child was killed while it had something changed"


@contextmanager
def renamed() -> Iterator[None]:
    """Let the NIC have another name while the block runs."""
    subprocess.run(["ip", "link", "set", NIC, "name", "renamed0"], check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "set", "renamed0", "name", NIC], check=True, timeout=30)


def test_renamed_nic_is_put_back(settings: NicSettings) -> None:
    before = everything()
    with settings:
        settings.set_header_split("on")
        settings.add_ntuple(FlowRule(1, dst_port=5201))
        with renamed():
            settings.close()
    assert everything() == before


def test_replay_finds_a_nic_under_another_name(journal: Journal) -> None:
    def leave() -> None:
        NicSettings(NIC, journal).set_rss(equal=1)
        os._exit(0)

    assert in_child(leave) == 0
    with renamed():
        (outcome,) = restore(journal)
    assert outcome.result is Result.RESTORED
    with Ethtool(NIC) as nic:
        assert set(nic.rss().table) == set(range(QUEUES))


def test_nic_of_the_journal_is_found_or_not() -> None:
    with NicSettings(NIC) as settings:
        identity = settings._state.identity
        found = find_nic(identity)
        assert found is not None
        with found as state:
            assert state.identity == identity
        other = type(identity)("eth9", 99, "02:00:00:00:00:99", True, identity.network_namespace)
        assert find_nic(other) is None
