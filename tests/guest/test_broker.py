"""The broker with a real kernel: programs without privileges receive into device memory. Run in a guest of the lab.

    devmem-tcp lab run --memory 2G -- .venv/bin/pytest tests/guest/test_broker.py

The NIC is NETIF, driven by gve; the far end is in the network namespace ``peer``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

import devmem_tcp as dmt
from devmem_tcp.broker.client import BrokerControl, BrokerMemory
from devmem_tcp.errors import BindError, BrokenError, BusyError, KernelError
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.settings import NicSettings
from devmem_tcp.safetensors.fetching import FetchSummary, fetch_tensors
from devmem_tcp.types import PAGE_SIZE, HeaderSplitMode
from far_end import FarEnd
from serving_pair import KEY, Command, Side, hashes, write_key, write_model
from tensor_end import sizes

NIC: Final = os.environ["NETIF"]
HOST: Final = os.environ["LOCAL_V4"]
FAR: Final = FarEnd("peer", os.environ["REMOTE_V4"], os.environ["REMOTE_V6"])
QUEUE: Final = 1  # gve cannot restart queue 0
LAST_QUEUE: Final = len(list(Path("/sys/class/net", NIC, "queues").glob("rx-*"))) - 1
PORT: Final = 5201
DATA_PORT: Final = 5202
SERVERS_DATA_PORT: Final = 5302
USER: Final = 61001
PATIENCE_S: Final = 60.0
MIB: Final = 1 << 20
CLIENT: Final = Path(__file__).with_name("broker_client.py")
UNPRIVILEGED: Final = (sys.executable, str(Path(__file__).with_name("unprivileged.py")), str(USER))
TENSOR_END: Final = (sys.executable, str(Path(__file__).with_name("tensor_end.py")))
COMMAND: Final = (*UNPRIVILEGED, "devmem-tcp")
SOCKET: Final = "/run/broker-test/broker.sock"
VIA: Final = ("--via", SOCKET)
CONFIG: Final = f"""
[nic.{NIC}]
rss_queues = 0
[[nic.{NIC}.allow]]
users = [0, {USER}]
queues = "{QUEUE},{LAST_QUEUE}"
ports = "{PORT}-{DATA_PORT}"
remote_ports = {SERVERS_DATA_PORT}
settings = ["header-split", "rss"]
[memory]
kinds = ["udmabuf"]
"""

pytestmark = pytest.mark.timeout(3 * PATIENCE_S)


@pytest.fixture
def directory() -> Path:
    made = Path("/run/broker-test")
    made.mkdir(mode=0o755, exist_ok=True)
    (made / "broker.toml").write_text(CONFIG)
    return made


@pytest.fixture
def broker(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    path, config = directory / "broker.sock", directory / "broker.toml"
    command = [sys.executable, "-m", "devmem_tcp", "broker", "--socket", str(path), "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            assert b"serving at" in said, said + process.stderr.read()
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_S)


@contextlib.contextmanager
def receiver(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(CLIENT), NIC, str(directory / "broker.sock"), str(USER), HOST, str(PORT), str(QUEUE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            yield process
        finally:
            process.kill()


def bound_queues() -> set[int]:
    return {queue.queue for queue in netdev.queues(socket.if_nametoindex(NIC)) if queue.dmabuf_id}


def eventually(what: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_program_without_privileges_receives(directory: Path, broker: object) -> None:
    payload = os.urandom(4 * MIB)
    with receiver(directory) as process:
        with FAR.connect((HOST, PORT), PATIENCE_S) as peer:
            peer.sendall(payload)
        stdout, _ = process.communicate(timeout=PATIENCE_S)
    report = json.loads(stdout)
    assert process.returncode == 0
    assert report["user"] == USER
    assert report["sha256"] == hashlib.sha256(payload).hexdigest()
    assert (report["dmabuf_bytes"], report["host_bytes"]) == (len(payload), 0)


def test_killed_in_the_middle_of_a_transfer_everything_is_undone(directory: Path, broker: object) -> None:
    with receiver(directory) as process, FAR.connect((HOST, PORT), PATIENCE_S) as peer:
        peer.sendall(os.urandom(MIB))
        assert bound_queues() == {QUEUE}
        process.kill()
        process.wait(PATIENCE_S)
        eventually(lambda: not bound_queues())
    control = BrokerControl(str(directory / "broker.sock"), NIC)  # the queue is free again
    with BrokerMemory(str(directory / "broker.sock")).allocate(MIB) as buffer:
        assert buffer.dmabuf_fd is not None
        control.set_header_split(HeaderSplitMode.ON)
        assert control.attach(buffer.dmabuf_fd, [QUEUE], PAGE_SIZE).dmabuf_id > 0
        control.close()


def test_the_kernels_refusals_come_whole(directory: Path, broker: object) -> None:
    path = str(directory / "broker.sock")
    control, other = BrokerControl(path, NIC), BrokerControl(path, NIC)
    with BrokerMemory(path).allocate(MIB) as buffer:
        assert buffer.dmabuf_fd is not None
        buffer.array()[:] = 1
        with pytest.raises(BindError, match="tcp-data-split is disabled"):
            control.attach(buffer.dmabuf_fd, [QUEUE], PAGE_SIZE)
        with open(os.devnull, "rb") as file, pytest.raises(BindError, match="EINVAL"):
            control.attach(file.fileno(), [QUEUE], PAGE_SIZE)
        control.set_header_split(HeaderSplitMode.ON)
        control.attach(buffer.dmabuf_fd, [QUEUE], PAGE_SIZE)
        with pytest.raises(BusyError, match="is leased to uid 0"):
            other.attach(buffer.dmabuf_fd, [QUEUE], PAGE_SIZE)
        with pytest.raises(BindError, match="designated queue already memory provider bound"):
            control.attach(buffer.dmabuf_fd, [QUEUE], PAGE_SIZE)
        other.close()
        control.close()


def test_memory_counts_until_its_last_holder_lets_go(directory: Path, broker: object) -> None:
    path = str(directory / "broker.sock")
    control = BrokerControl(path, NIC)
    buffer = BrokerMemory(path).allocate(MIB)
    assert buffer.dmabuf_fd is not None
    copy = os.dup(buffer.dmabuf_fd)
    buffer.close()
    assert control.status().quotas["bytes_allocated"].used == MIB
    os.close(copy)
    eventually(lambda: control.status().quotas["bytes_allocated"].used == 0)
    control.close()


def test_a_broker_that_ends_puts_everything_back(directory: Path, broker: subprocess.Popen[bytes]) -> None:
    path = str(directory / "broker.sock")
    control = BrokerControl(path, NIC)
    with BrokerMemory(path).allocate(MIB) as buffer:
        assert buffer.dmabuf_fd is not None
        control.set_header_split(HeaderSplitMode.ON)
        control.attach(buffer.dmabuf_fd, [QUEUE], PAGE_SIZE)
        broker.terminate()
        broker.wait(PATIENCE_S)
        assert not bound_queues()
        with pytest.raises(BrokenError, match="is gone"):
            control.set_header_split(HeaderSplitMode.ON)
    control.close()
    with pytest.raises(KernelError, match="ENOENT"):
        BrokerControl(path, NIC)


# --- the command line, and sessions ---


@pytest.fixture
def isolated() -> Iterator[None]:
    """Ordinary flows off the queues to lease, as the administrator is told to have them."""
    with NicSettings(NIC) as settings:
        settings.set_rss(equal=1)
        yield


def command(verb: str, *arguments: str) -> Command:
    """``devmem-tcp recv`` or ``send`` of a user without privileges."""
    options = ("--nic", NIC, "--backend", "kernel", *VIA, "--buffer", "16M", "--hash", "--json", "--quiet")
    return Command(verb, *arguments, *options, "--timeout", str(PATIENCE_S), program=COMMAND)


def test_recv_and_send_without_privileges(directory: Path, isolated: None, broker: object) -> None:
    payload = os.urandom(4 * MIB)
    with command("recv", f"{HOST}:{PORT}", "--queue", str(QUEUE), "--strict", "-o", os.devnull) as receiving:
        assert receiving.event()["event"] == "listening"
        with FAR.connect((HOST, PORT), PATIENCE_S) as peer:
            peer.sendall(payload)
        report = receiving.report()
    assert report["sha256"] == hashlib.sha256(payload).hexdigest()
    assert (report["path"]["dmabuf_bytes"], report["path"]["host_bytes"]) == (len(payload), 0)
    assert not bound_queues()
    file = directory / "payload"
    file.write_bytes(payload)
    with FAR.listen(HOST) as listener:
        listener.settimeout(PATIENCE_S)
        with command("send", f"{FAR.ipv4}:{listener.getsockname()[1]}", str(file)) as sending:
            peer, _ = listener.accept()
            with peer, peer.makefile("rb") as stream:
                assert stream.read() == payload
            report = sending.report()
    assert (report["path"]["sent_dmabuf_bytes"], report["path"]["sent_host_bytes"]) == (len(payload), 0)


def test_fetch_and_serve_without_privileges(directory: Path, isolated: None, broker: object) -> None:
    key = write_key(directory / "key")
    os.chown(directory / "key", USER, USER)
    home = directory / "home"
    home.mkdir(exist_ok=True)
    os.chown(home, USER, USER)
    model = write_model(directory / "model.safetensors", {f"block.{number}": MIB for number in range(8)})
    out = home / "out.safetensors"
    brokered, far = Side("kernel", None, (*key, *VIA), COMMAND), Side("software", FAR, key)
    with (
        far.serving(FAR.ipv4, model, options=("--data-port", str(SERVERS_DATA_PORT))) as (_, where),
        brokered.fetching(where, "--queue", str(QUEUE), "--strict", "--out", str(out)) as fetching,
    ):
        summary = fetching.report()["summary"]
    assert hashes(out) == hashes(model)
    assert (summary["backend"], summary["host_bytes"]) == ("kernel", 0)
    assert summary["dmabuf_bytes"] > 0
    with brokered.serving(HOST, model) as (serving, where):
        assert FAR.make(lambda: fetched_in_software(where)).tensors == 8
        served = serving.event()["session"]
    assert (served["backend"], served["dmabuf_bytes"], served["host_bytes"]) == ("kernel", 8 * MIB, 0)


def fetched_in_software(where: str) -> FetchSummary:
    """Fetch all tensors; each is verified by its checksum."""
    host, _, port = where.rpartition(":")
    with (
        dmt.open_nic("soft0", backend="software") as nic,
        fetch_tensors(nic, (host, int(port)), key=KEY, lanes=2, size=32 * MIB) as tensors,
    ):
        return tensors.summary


def brokered_end(role: str, host: str, nbytes: int) -> Command:
    """``open_receiver`` or ``open_sender`` of a user without privileges."""
    arguments = (role, "kernel", NIC, host, str(PORT), str(nbytes), SOCKET)
    return Command(*arguments, program=(*UNPRIVILEGED, "tensor_end"))


def far_end(role: str, host: str, nbytes: int) -> Command:
    """The same at the other end, in software."""
    arguments = (role, "software", "soft0", host, str(PORT), str(nbytes))
    return Command(*arguments, program=("ip", "netns", "exec", FAR.namespace, *TENSOR_END))


def test_sessions_without_privileges(isolated: None, broker: object) -> None:
    total = 8 * MIB
    for receiver, host, sender in ((brokered_end, HOST, far_end), (far_end, FAR.ipv4, brokered_end)):
        with receiver("receive", host, 0) as receiving:
            assert receiving.event()["listening"] == [host, PORT]
            with sender("send", host, total) as sending:
                sent = sending.report()
            found = receiving.report()
        assert (found["wrong"], found["messages"], found["host"]) == (0, len(sizes(total)), 0)
        assert found["dmabuf"] + found["linear"] == total
        assert found["dmabuf"] > 0
        assert sent["sent_dmabuf"] == total
