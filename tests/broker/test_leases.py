"""The broker and its clients over real UNIX sockets: the same API, nothing that is not allowed, nothing left behind."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_rig import ALICE, DEVMEM_GROUP, MALLORY, ME, POLICY, ROOT, Rig, client_process, public_directory
from devmem_tcp.broker.client import BrokerControl, BrokerMemory
from devmem_tcp.errors import (
    BindError,
    BrokenError,
    BusyError,
    ClosedError,
    KernelError,
    NicSettingError,
    OutOfDeviceMemory,
    RestoreError,
    SettingWarning,
)
from devmem_tcp.sys import calls
from devmem_tcp.types import PAGE_SIZE, Family, FlowRule, HeaderSplitMode
from fake_nic import BUSY_EXTACK, BUSY_QUEUE, COARSE_PORT, STUBBORN_PORT


@pytest.fixture
def directory() -> Iterator[Path]:
    with public_directory() as made:
        yield made


@pytest.fixture
def rig(directory: Path) -> Iterator[Rig]:
    rig = Rig(str(directory / "broker.sock"))
    with rig.serving():
        yield rig


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("client's")
    os.ftruncate(fd, PAGE_SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def control(rig: Rig) -> Iterator[BrokerControl]:
    control = BrokerControl(rig.path, "fake0")
    yield control
    control.close()


# --- the same API ---


def test_what_is_asked_for_is_done_and_undone_by_close(rig: Rig, control: BrokerControl, memfd: int) -> None:
    split = control.set_header_split(HeaderSplitMode.ON)
    thresh = control.set_hds_thresh(0)
    rss = control.set_rss(list(range(8)), "equal 8")
    wanted = FlowRule(9, Family.TCP6, dst_ip="fd00::1", dst_port=5201, location=12)
    rule = control.add_ntuple(wanted)
    queues = control.attach(memfd, [9, 8], PAGE_SIZE)
    assert split.description == "fake0 header-split on"
    assert rss.description == "fake0 rss equal 8"
    assert rule.rule == wanted
    assert queues.dmabuf_id == 1
    assert rig.nics.held[1:] == [
        "fake0 header-split on",
        "fake0 hds-thresh 0",
        "fake0 rss equal 8",
        "fake0 rule 5201 to 9",
        "fake0 bound [9, 8]",
    ]
    for thing in (queues, rule, rss, thresh, split):
        thing.close()
        thing.close()
    assert rig.nics.held == ["fake0 open"]


def test_close_undoes_what_is_left_the_last_first(rig: Rig, memfd: int) -> None:
    control = BrokerControl(rig.path, "fake0")
    control.set_header_split(HeaderSplitMode.ON)
    control.add_ntuple(FlowRule(9, dst_port=5201))
    control.attach(memfd, [9], PAGE_SIZE)
    control.close()
    undone = [event for event in rig.nics.events if event.startswith("-") and event != "-fake0 open"]  # may come later
    assert undone == ["-fake0 bound [9]", "-fake0 rule 5201 to 9", "-fake0 header-split on"]
    with pytest.raises(ClosedError):
        control.set_hds_thresh(0)


def test_the_kernels_refusal_comes_whole(control: BrokerControl, memfd: int) -> None:
    with pytest.raises(BindError) as refused:
        control.attach(memfd, [BUSY_QUEUE], PAGE_SIZE)
    error = refused.value
    assert (error.errno, error.call, error.extack) == (errno.EEXIST, "bind-rx", BUSY_EXTACK)
    assert (error.attr, error.hint) == ("queues", "take another")


def test_a_warning_and_a_failed_restore_come_too(rig: Rig, control: BrokerControl) -> None:
    with pytest.warns(SettingWarning, match="refused a rule on the source"):
        control.add_ntuple(FlowRule(9, dst_port=COARSE_PORT))
    stubborn = control.add_ntuple(FlowRule(9, dst_port=STUBBORN_PORT, family=Family.TCP4))
    with pytest.raises(RestoreError) as failed:
        stubborn.close()
    assert failed.value.journal == "/run/journal/7.json"
    assert any("undo failed" in line for line in rig.lines)


def test_an_nic_that_is_not_there(rig: Rig) -> None:
    with pytest.raises(KernelError) as refused:
        BrokerControl(rig.path, "gone0")
    assert refused.value.errno == errno.ENODEV
    assert refused.value.hint == "there are fake0, fake1"


@pytest.mark.parametrize("fd", ["closed", "no dma-buf"])
def test_an_fd_that_is_no_dma_buf(control: BrokerControl, memfd: int, fd: str) -> None:
    given = os.open(os.devnull, os.O_RDONLY)
    if fd == "closed":
        os.close(given)
    with pytest.raises(BindError) as refused:
        control.attach(given, [9], PAGE_SIZE)
    assert refused.value.errno == (errno.EBADF if fd == "closed" else errno.EINVAL)
    if fd != "closed":
        os.close(given)
    control.attach(memfd, [9], PAGE_SIZE)  # the connection is as good as before


def test_what_a_message_cannot_hold_is_a_value_error(control: BrokerControl) -> None:
    with pytest.raises(ValueError, match="SetRss"):
        control.set_rss([0] * 10_000, "table")
    with pytest.raises(ValueError, match="AddNtuple"):
        control.add_ntuple(FlowRule(-1, dst_port=5201))
    assert control.status().user_id == ME


# --- memory ---


def test_memory_is_the_brokers_dma_buf_and_goes_back_by_close(rig: Rig, control: BrokerControl) -> None:
    with BrokerMemory(rig.path).allocate(2 * PAGE_SIZE) as buffer:
        buffer.array()[:] = 7
        assert buffer.kind == "udmabuf by the broker"
        assert buffer.dmabuf_fd is not None
        control.attach(buffer.dmabuf_fd, [8], PAGE_SIZE).close()
        assert control.status().quotas["bytes_allocated"].used == 2 * PAGE_SIZE
    assert control.status().quotas["bytes_allocated"].used == 0


def test_memory_counts_until_nobody_has_it(rig: Rig, control: BrokerControl) -> None:
    rig.memory.references = 2  # as if a copy of the fd were kept
    BrokerMemory(rig.path).allocate(8 * PAGE_SIZE).close()
    with pytest.raises(OutOfDeviceMemory) as refused:
        BrokerMemory(rig.path).allocate(PAGE_SIZE)
    assert (refused.value.wanted, refused.value.free) == (PAGE_SIZE, 0)
    rig.memory.references = 1
    BrokerMemory(rig.path).allocate(PAGE_SIZE).close()
    assert control.status().quotas["buffers"].used == 0


def test_memory_that_cannot_be_looked_at_counts_until_it_can(
    rig: Rig, control: BrokerControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = BrokerMemory(rig.path).allocate(PAGE_SIZE)
    with monkeypatch.context() as patched:
        patched.setattr(rig.memory, "failure", OSError(errno.EMFILE, "no fd for that"))
        buffer.close()
        assert control.status().quotas["bytes_allocated"].used == PAGE_SIZE
    BrokerMemory(rig.path).allocate(PAGE_SIZE).close()
    assert control.status().quotas["bytes_allocated"].used == 0


def test_kinds_of_memory_are_the_files(rig: Rig) -> None:
    with pytest.raises(KernelError, match=r"kinds in \[memory\] of test.toml: udmabuf"):
        BrokerMemory(rig.path, "dma-heap system").allocate(PAGE_SIZE)


# --- who may ---


def test_listed_by_user_by_group_or_not_at_all(rig: Rig) -> None:
    def said(user: int, *groups: int, nic: str = "fake0") -> str:
        with client_process(rig.path, "open", nic, user=user, groups=groups) as process:
            return process.line()

    assert said(ALICE) == "opened"
    assert said(MALLORY, DEVMEM_GROUP) == "opened"
    if not ROOT:
        return  # all of them are one user, who is listed; tests/unit/test_broker_policy.py has the rest
    refusal = said(MALLORY)
    assert refusal.startswith("KernelError: use the broker: EACCES")
    assert f"test.toml does not name uid {MALLORY}" in refusal
    assert f"it names users {ME}, {ALICE}, groups {DEVMEM_GROUP}" in refusal
    assert f"it names users {ME}" in said(ALICE, nic="fake1")


def test_a_nic_that_the_file_does_not_have(rig: Rig) -> None:
    with pytest.raises(KernelError, match=r"no \[\[nic.eth9.allow\]\]; NICs it has: fake0, fake1"):
        BrokerControl(rig.path, "eth9")
    assert rig.nics.events == []


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (FlowRule(7, dst_port=5201), "queue 7 is not among queues 8-15"),
        (FlowRule(9, dst_port=22), "dst_port of ports 5201-5299"),
        (FlowRule(9, dst_port=5201, dst_port_mask=0xFF00), "one whole dst_port"),
        (FlowRule(9, src_port=443), "src_port of remote_ports 6000"),
        (FlowRule(9, src_port=6000, dst_ip="10.0.0.1"), "no destination"),
        (FlowRule(9, dst_ip="10.0.0.1"), "one whole dst_port"),
        (FlowRule(9, dst_port=5201, location=9), "location 9 is not among locations 10-19"),
    ],
)
def test_rules_that_would_take_what_is_others(rig: Rig, control: BrokerControl, rule: FlowRule, why: str) -> None:
    with pytest.raises(NicSettingError, match=why) as refused:
        control.add_ntuple(rule)
    assert refused.value.errno == errno.EPERM
    assert rig.nics.held == ["fake0 open"]
    control.add_ntuple(FlowRule(9, src_port=6000)).close()


def test_settings_other_than_the_files(rig: Rig, control: BrokerControl, memfd: int) -> None:
    with pytest.raises(NicSettingError, match="never off"):
        control.set_header_split(HeaderSplitMode.OFF)
    with pytest.raises(NicSettingError, match="never to 100"):
        control.set_hds_thresh(100)
    for table in ([0], list(range(9))):
        with pytest.raises(NicSettingError, match="ordinary flows use queues 0-7"):
            control.set_rss(table, "words")
    with pytest.raises(BindError, match="queue 3 is not among queues 8-15"):
        control.attach(memfd, [3, 9], PAGE_SIZE)
    other = BrokerControl(rig.path, "fake1")
    with pytest.raises(NicSettingError, match="settings are nothing"):
        other.set_header_split(HeaderSplitMode.ON)
    other.close()


def test_another_network_namespace_is_told(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devmem_tcp.sys.namespaces.namespace", lambda kind: 1)
    with pytest.raises(KernelError, match="another network namespace"):
        BrokerControl(rig.path, "fake0")


# --- two at once ---


def test_a_leased_queue_is_nobody_elses(rig: Rig, control: BrokerControl, memfd: int) -> None:
    rule = control.add_ntuple(FlowRule(9, dst_port=5201, family=Family.TCP4))
    other = BrokerControl(rig.path, "fake0")
    for attempt in (
        lambda: other.attach(memfd, [8, 9], PAGE_SIZE),
        lambda: other.add_ntuple(FlowRule(9, dst_port=5202)),
    ):
        with pytest.raises(BusyError, match=f"queue 9 of fake0 is leased to uid {ME}, pid {os.getpid()}"):
            attempt()
    other.attach(memfd, [8], PAGE_SIZE)
    rule.close()
    other.attach(memfd, [9], PAGE_SIZE)
    other.close()


def test_a_shared_setting_is_put_back_after_the_last(rig: Rig, control: BrokerControl, memfd: int) -> None:
    other = BrokerControl(rig.path, "fake0")
    mine, its = control.set_header_split(HeaderSplitMode.ON), other.set_header_split(HeaderSplitMode.ON)
    queues = other.attach(memfd, [9], PAGE_SIZE)
    mine.close()
    its.close()
    assert rig.nics.held == ["fake0 open", "fake0 header-split on", "fake0 bound [9]"]  # bound queues need it
    queues.close()
    assert rig.nics.held == ["fake0 open"]
    control.set_rss(list(range(8)), "equal 8")
    with pytest.raises(BusyError, match="rss of fake0 is set otherwise"):
        other.set_rss([0, *range(8)], "weight 2 1 1 1 1 1 1 1")
    other.close()


# --- quotas ---


def test_quotas_say_what_is_allowed_used_and_asked(rig: Rig, control: BrokerControl) -> None:
    with BrokerMemory(rig.path).allocate(8 * PAGE_SIZE) as buffer:
        fd = buffer.dmabuf_fd
        assert fd is not None
        control.attach(fd, [8], PAGE_SIZE)
        with pytest.raises(BindError, match=f"quota bytes_bound of uid {ME} is 32768, used 32768, asked 32768") as full:
            control.attach(fd, [9], PAGE_SIZE)
        assert full.value.errno == errno.EDQUOT
        assert "bytes_bound in [quota] of test.toml" in full.value.hint
        with pytest.raises(BindError, match=f"quota queues of uid {ME} is 3, used 1, asked 3"):
            control.attach(fd, [9, 10, 11], PAGE_SIZE)
        control.add_ntuple(FlowRule(9, dst_port=5201))  # one for each IP version
        with pytest.raises(NicSettingError, match=f"quota rules of uid {ME} is 3, used 2, asked 2"):
            control.add_ntuple(FlowRule(9, dst_port=5202))
        with pytest.raises(
            OutOfDeviceMemory, match=f"quota bytes_allocated of uid {ME} is 32768, used 32768, asked 4096"
        ):
            BrokerMemory(rig.path).allocate(PAGE_SIZE)


def test_quotas_are_of_a_user_not_of_a_connection(rig: Rig, control: BrokerControl) -> None:
    others = [BrokerControl(rig.path, "fake0") for _ in range(3)]
    with pytest.raises(KernelError, match=f"quota clients of uid {ME} is 4, used 4, asked 1") as refused:
        BrokerControl(rig.path, "fake0")
    assert refused.value.errno == errno.EDQUOT
    control.add_ntuple(FlowRule(9, dst_port=5201))
    with pytest.raises(NicSettingError, match="used 2, asked 2"):
        others[0].add_ntuple(FlowRule(10, dst_port=5201))
    for other in others:
        other.close()


def test_buffers_are_counted_too(rig: Rig) -> None:
    buffers = [BrokerMemory(rig.path).allocate(PAGE_SIZE) for _ in range(3)]
    with pytest.raises(KernelError, match=f"quota buffers of uid {ME} is 3, used 3, asked 1"):
        BrokerMemory(rig.path).allocate(PAGE_SIZE)
    for buffer in buffers:
        buffer.close()


# --- ends ---


@pytest.mark.parametrize("taken", range(8))
def test_killed_after_each_step_everything_is_undone(rig: Rig, taken: int) -> None:
    with client_process(rig.path) as process:
        for _ in range(taken):
            assert process.line() == "ready"
            process.say("go on")
        assert process.line() in ("ready", "all")
        assert len(rig.nics.held) == min(taken, 6)  # the seventh is memory
        process.kill()
        rig.nics.wait_until(lambda held: not held)
    control = BrokerControl(rig.path, "fake0")
    used = {name: amount.used for name, amount in control.status().quotas.items()}
    assert used == {name: int(name == "clients") for name in used}
    control.close()


def test_a_broker_that_ends_undoes_everything_and_its_clients_are_told(directory: Path, memfd: int) -> None:
    rig = Rig(str(directory / "broker.sock"))
    with rig.serving():
        control = BrokerControl(rig.path, "fake0")
        setting = control.set_header_split(HeaderSplitMode.ON)
        queues = control.attach(memfd, [9], PAGE_SIZE)
        buffer = BrokerMemory(rig.path).allocate(PAGE_SIZE)
    assert rig.nics.events[-3:] == ["-fake0 bound [9]", "-fake0 header-split on", "-fake0 open"]
    with pytest.raises(BrokenError, match="is gone") as told:
        control.add_ntuple(FlowRule(9, dst_port=5201))
    assert "doctor --restore" in told.value.hint
    with pytest.raises(BrokenError):
        control.status()
    buffer.array()[:] = 1  # memory is the program's as long as it holds it
    buffer.close()
    queues.close()
    setting.close()
    control.close()


def test_an_interrupted_request_ends_the_lease(
    rig: Rig, control: BrokerControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    recv = calls.recv_with_fds

    def interrupted(sock: calls.Socket, *args: int, **options: int) -> tuple[bytes, list[int], int]:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return recv(sock, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(calls, "recv_with_fds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            control.set_header_split(HeaderSplitMode.ON)
    with pytest.raises(BrokenError, match="an earlier request was interrupted"):
        control.status()  # which would be given the other's answer
    control.close()
    rig.nics.wait_until(lambda held: not held)


@pytest.mark.parametrize("state", ["missing", "stale", "other", "long"])
def test_nobody_there(directory: Path, state: str) -> None:
    path = str(directory / ("x" * 200 if state == "long" else "broker.sock"))
    if state == "stale":
        os.mknod(path, 0o140666)
    elif state == "other":
        Path(path).write_text("no socket")
    with pytest.raises(KernelError) as refused:
        BrokerControl(path, "eth0")
    expected = {"missing": errno.ENOENT, "long": errno.EINVAL}.get(state, errno.ECONNREFUSED)
    assert refused.value.errno == expected
    assert path in refused.value.call
    if state in ("missing", "stale"):
        assert "systemctl start devmem-tcp-broker.socket" in refused.value.hint
    with pytest.raises(KernelError):
        BrokerMemory(path).allocate(PAGE_SIZE)


def test_a_file_for_nobody(directory: Path) -> None:
    rig = Rig(str(directory / "broker.sock"))
    with rig.serving(POLICY.partition("[nic")[0]), pytest.raises(KernelError, match="it names nobody"):
        BrokerControl(rig.path, "fake0")
