"""A queue of a NIC leased to a container: run in a guest of the lab.

    devmem-tcp lab run -- .venv/bin/pytest tests/guest/test_leasing.py

The container is a network namespace with one end of a netkit pair in it. Packets for it come to the NIC, which splits
them and steers them to the leased queue; from there an eBPF program takes them to the container, or IP forwards them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

import pytest

import devmem_tcp as dmt
from container import ADDRESS, CONTAINER, LESSEE, LESSOR, container, netkit, redirected
from devmem_tcp.errors import BindError, KernelError, SettingWarning, SteeringWarning
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.leasing import QueueLease
from devmem_tcp.kernel.nic import KernelNic
from devmem_tcp.probe import probe_kernel, probe_machine
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.types import ProbeCheck, Severity
from devmem_tcp.uapi.netdev import FAMILY
from far_end import NETIF, FarEnd
from leased_end import ANSWER_BYTES
from plain_sockets import (
    PATIENCE_S,
    PORT,
    bytes_of,
    content,
    fd_of,
    give_back,
    ifindex,
    receive,
    run,
    unread,
    until,
)

QUEUE: Final = 2
NAMESPACE: Final = f"/run/netns/{CONTAINER}"
SIZE: Final = 8 << 20
TOOL: Final = (sys.executable, "-m", "devmem_tcp")
IN_CONTAINER: Final = ("nsenter", f"--net={NAMESPACE}")


@pytest.fixture
def inside(far: FarEnd) -> Iterator[FarEnd]:
    """The container, with the way of packets to it and back, but for the program that takes them off the NIC."""
    with container(far) as made:
        yield made


@pytest.fixture
def nic() -> Iterator[KernelNic]:
    """The NIC as the host sets it up for leasing QUEUE: split, and free of other traffic."""
    with dmt.open_nic(NETIF, backend="kernel") as opened:
        assert isinstance(opened, KernelNic)
        opened.set_header_split("on")
        opened.set_rss(equal=1)
        yield opened


def lease(nic: KernelNic) -> QueueLease:
    """Lease QUEUE to the container; no setting of the NIC is missing, so nothing is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return nic.lease_queue(QUEUE, LESSEE, CONTAINER)


def leases() -> dict[int, tuple[int, bool]]:
    """Return by queue of the NIC the number that it has elsewhere, and whether that is in another namespace."""
    found = netdev.queues(ifindex())
    return {one.queue: (one.lease.queue, one.lease.netns_id is not None) for one in found if one.lease is not None}


def refused(change: Callable[[], object], number: int, hint: str) -> None:
    with pytest.raises(KernelError) as caught:
        change()
    assert caught.value.errno == number
    assert hint in caught.value.hint


# --- the host's side ------------------------------------------------------------------------------------------------


def test_a_queue_is_leased_into_another_namespace(nic: KernelNic, inside: FarEnd) -> None:
    assert lease(nic) == QueueLease(NETIF, QUEUE, LESSEE, NAMESPACE, 1)
    assert leases() == {QUEUE: (1, True)}
    run("ip", "link", "del", LESSOR)
    assert leases() == {}


def test_a_namespace_is_named_by_path_or_by_a_process_in_it(nic: KernelNic, inside: FarEnd) -> None:
    assert nic.lease_queue(QUEUE, LESSEE, NAMESPACE).netns == NAMESPACE
    with program(*IN_CONTAINER, "sh", "-c", "echo entered && exec cat") as (said, process):
        assert said.readline() == "entered\n"
        assert nic.lease_queue(QUEUE + 1, LESSEE, process.pid) == QueueLease(
            NETIF, QUEUE + 1, LESSEE, f"/proc/{process.pid}/ns/net", 2
        )
    assert leases() == {QUEUE: (1, True), QUEUE + 1: (2, True)}


def test_an_interface_of_the_nics_own_namespace(nic: KernelNic) -> None:
    netkit(LESSOR, LESSEE, rx_queues=3)
    try:
        assert nic.lease_queue(QUEUE, LESSEE) == QueueLease(NETIF, QUEUE, LESSEE, None, 1)
        assert nic.lease_queue(QUEUE + 1, LESSEE, "/proc/self/ns/net").queue == 2
        assert leases() == {QUEUE: (1, False), QUEUE + 1: (2, False)}
    finally:
        run("ip", "link", "del", LESSOR)


def test_what_cannot_be_leased(nic: KernelNic, inside: FarEnd) -> None:
    refused(lambda: nic.lease_queue(0, LESSEE, CONTAINER), errno.ERANGE, "lease queue 1 or higher")
    refused(lambda: nic.lease_queue(99, LESSEE, CONTAINER), errno.ERANGE, "ethtool -l NIC")
    refused(lambda: nic.lease_queue(QUEUE, "nothere", CONTAINER), errno.ENODEV, f"nsenter --net={NAMESPACE} ip")
    refused(lambda: nic.lease_queue(QUEUE, LESSEE), errno.ENODEV, "interfaces: ip -brief link")
    refused(lambda: nic.lease_queue(QUEUE, LESSEE, "nothere"), errno.ENOENT, "ip netns list")
    refused(lambda: nic.lease_queue(QUEUE, LESSEE, "/proc/self/ns/uts"), errno.EINVAL, "no network namespace")
    refused(lambda: nic.lease_queue(QUEUE, NETIF), errno.EINVAL, "netkit")
    with dmt.memory.Udmabuf().allocate(1 << 20) as buffer, nic.bind_rx(buffer, [QUEUE]):
        refused(lambda: nic.lease_queue(QUEUE, LESSEE, CONTAINER), errno.EBUSY, "end that use of it")
    assert leases() == {}
    lease(nic)
    refused(lambda: nic.lease_queue(QUEUE, LESSEE, CONTAINER), errno.EBUSY, "end that use of it")


def test_what_the_host_has_not_set_is_said(inside: FarEnd) -> None:
    with dmt.open_nic(NETIF, backend="kernel") as nic:
        assert isinstance(nic, KernelNic)
        with (
            pytest.warns(SettingWarning, match=f"ethtool -G {NETIF} tcp-data-split on"),
            pytest.warns(SteeringWarning, match=f"RX queue {QUEUE}.*ethtool -X {NETIF}"),
        ):
            nic.lease_queue(QUEUE, LESSEE, CONTAINER)
    assert leases() == {QUEUE: (1, True)}


def test_a_nic_whose_last_queue_is_leased_can_still_be_opened(nic: KernelNic, inside: FarEnd) -> None:
    last = nic.capabilities.rx_queues - 1
    nic.lease_queue(last, LESSEE, CONTAINER)
    assert probe_kernel(NETIF).ok
    with pytest.raises(BindError, match="support DMA"), dmt.memory.Udmabuf().allocate(1 << 20) as buffer:
        nic.bind_rx(buffer, [last])


# --- the container's side -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def program(*words: str) -> Iterator[tuple[IO[str], subprocess.Popen[str]]]:
    """Run a program while the block runs; gives what it prints. It is to end well once its stdin is closed."""
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdout, process.stdin:
            yield process.stdout, process
            process.stdin.close()
            assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def way_in(nic: KernelNic) -> Iterator[None]:
    """Lease QUEUE to the container, steer its connections there, and take its packets to it."""
    lease(nic)
    with nic.add_ntuple(dst_ip=ADDRESS, dst_port=PORT, queue=QUEUE), redirected(NETIF, ADDRESS, LESSOR):
        yield


def test_payload_lands_in_the_containers_memory_and_is_sent_from_it(
    nic: KernelNic, inside: FarEnd, far: FarEnd
) -> None:
    data = content(SIZE)
    script = str(Path(__file__).with_name("leased_end.py"))
    with way_in(nic), program(*IN_CONTAINER, sys.executable, script, LESSEE, ADDRESS, str(PORT)) as (said, _):
        assert said.readline() == "listening\n"
        (bound,) = (one for one in netdev.queues(ifindex()) if one.dmabuf_id)
        assert bound.queue == QUEUE
        with far.connect((ADDRESS, PORT), PATIENCE_S) as sock:
            sock.sendall(data)
            sock.shutdown(1)
            with sock.makefile("rb") as stream:
                answer = stream.read()
        report = json.loads(said.readline())
    digest = hashlib.sha256(data)
    assert report["sha256"] == digest.hexdigest()
    assert answer == digest.digest() * (ANSWER_BYTES // digest.digest_size)
    stats = report["stats"]
    assert (stats["dmabuf_bytes"], stats["linear_bytes"], stats["host_bytes"]) == (SIZE, 0, 0)
    assert (stats["tokens_out"], stats["sent_dmabuf_bytes"], report["completed"]) == (0, ANSWER_BYTES, [[0, 0]])
    assert report["drained"]
    assert report["rx_queue"] == -1
    assert report["dmabuf_id"] == bound.dmabuf_id
    assert report["queue_stats"] == {
        "queue": 1,
        "dmabuf_id": bound.dmabuf_id,
        "rx_bytes": 0,
        "rx_alloc_fail": 0,
        "pages_total": report["buffer_pages"],
        "pages_inflight": 0,
    }
    assert report["told"] == ["unknown", [], [], False]
    assert all("the host's to set" in hint for hint in report["hints"])
    for words, hint in zip(("split on", "hds-thresh 0", "equal 1", f"dst-port {PORT}"), report["hints"], strict=True):
        assert words in hint


def test_payload_is_forwarded_by_ip_too(nic: KernelNic, inside: FarEnd, far: FarEnd) -> None:
    lease(nic)
    data = content(20_000)
    with contextlib.ExitStack() as held:
        held.enter_context(nic.add_ntuple(dst_ip=ADDRESS, dst_port=PORT, queue=QUEUE))
        buffer = held.enter_context(dmt.memory.Udmabuf().allocate(8 << 20))
        binder = held.enter_context(inside.make(lambda: GenericNetlink(FAMILY)))
        netdev.bind_rx(binder, inside.make(lambda: socket.if_nametoindex(LESSEE)), fd_of(buffer), [1])
        listener = held.enter_context(inside.make(lambda: socket.create_server((ADDRESS, PORT))))
        theirs = held.enter_context(far.connect((ADDRESS, PORT), PATIENCE_S))
        ours = held.enter_context(listener.accept()[0])
        theirs.sendall(data)
        until(lambda: unread(ours) == len(data))
        got = receive(ours, len(data))
        assert bytes_of(buffer, got.frags) == data
        assert give_back(ours, got.frags) == len(got.frags)


def test_what_a_container_cannot_bind(inside: FarEnd) -> None:
    with dmt.open_nic(NETIF, backend="kernel") as nic:
        assert isinstance(nic, KernelNic)
        with pytest.warns(SettingWarning), pytest.warns(SteeringWarning):
            nic.lease_queue(QUEUE, LESSEE, CONTAINER)
    inside.make(bind_what_cannot_be)


def bind_what_cannot_be() -> None:
    with dmt.open_nic(LESSEE, backend="kernel") as nic, dmt.memory.Udmabuf().allocate(1 << 20) as buffer:
        assert nic.capabilities.rx_queues == 2
        refused(lambda: nic.bind_rx(buffer, [1]), errno.EINVAL, "on the host")
        refused(lambda: nic.bind_rx(buffer, [0]), errno.EOPNOTSUPP, "are RX queues: 1; the host leases more")
        refused(lambda: nic.bind_rx(buffer, [2]), errno.EINVAL, "")


def test_doctor_in_the_container(nic: KernelNic, inside: FarEnd) -> None:
    def checks(name: str = LESSEE) -> dict[str, ProbeCheck]:
        return {one.name: one for one in probe_machine(name).checks}

    without = inside.make(checks)
    assert without["leased queues"].severity is Severity.ERROR
    assert f"lease NIC QUEUE --to {LESSEE}" in without["leased queues"].fix
    lease(nic)
    with_one = inside.make(checks)
    assert with_one["leased queues"].found.startswith("1; ")
    assert {"header split", "ntuple rules", "RX queues", "RSS"}.isdisjoint(with_one)
    assert f"leased to virtual interfaces: {QUEUE}" in checks(NETIF)["bound queues"].found
    report = json.loads(run(*IN_CONTAINER, *TOOL, "doctor", LESSEE, "--json"))
    assert {one["name"] for one in report["checks"]} == set(with_one)
    assert report["severity"] == "ok"
    run(*IN_CONTAINER, "ip", "link", "set", LESSEE, "down")
    assert inside.make(checks)["leased queues"].fix == f"sudo ip link set dev {LESSEE} up"


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_from_lease_to_payload(nic: KernelNic, inside: FarEnd, far: FarEnd) -> None:
    words = (*TOOL, "lease", NETIF, str(QUEUE), "--to", LESSEE, "--netns", CONTAINER)
    planned = run(*words, "--dry-run")
    assert planned.startswith(f"nsenter --net={NAMESPACE} ynl --family netdev --do queue-create --json")
    assert f'"ifindex": {ifindex()}' in planned
    assert leases() == {}
    expected = f"RX queue {QUEUE} of {NETIF} is RX queue 1 of {LESSEE} in {NAMESPACE}, until {LESSEE} is deleted\n"
    assert run(*words) == expected
    again = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
    assert again.returncode == 1
    assert "due to queue leasing" in again.stderr
    assert "Traceback" not in again.stderr
    data = content(1 << 20)
    recv = (*TOOL, "recv", f"{ADDRESS}:{PORT}", "--backend", "kernel", "--nic", LESSEE, "--strict", "--hash", "--json")
    steered = nic.add_ntuple(dst_ip=ADDRESS, dst_port=PORT, queue=QUEUE)
    with steered, redirected(NETIF, ADDRESS, LESSOR), program(*IN_CONTAINER, *recv, "-o", "/dev/null") as (said, _):
        assert json.loads(said.readline())["event"] == "listening"
        with far.connect((ADDRESS, PORT), PATIENCE_S) as sock:
            sock.sendall(data)
        report = json.loads(said.readline())
    assert report["sha256"] == hashlib.sha256(data).hexdigest()
    assert (report["path"]["dmabuf_bytes"], report["path"]["host_bytes"]) == (len(data), 0)
