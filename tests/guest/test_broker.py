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

from devmem_tcp.broker.client import BrokerControl, BrokerMemory
from devmem_tcp.errors import BindError, BrokenError, BusyError, KernelError
from devmem_tcp.kernel import netdev
from devmem_tcp.types import PAGE_SIZE, HeaderSplitMode
from far_end import FarEnd

NIC: Final = os.environ["NETIF"]
HOST: Final = os.environ["LOCAL_V4"]
FAR: Final = FarEnd("peer", os.environ["REMOTE_V4"], os.environ["REMOTE_V6"])
QUEUE: Final = 1  # gve cannot restart queue 0
PORT: Final = 5201
USER: Final = 61001
PATIENCE_S: Final = 60.0
MIB: Final = 1 << 20
CLIENT: Final = Path(__file__).with_name("broker_client.py")
CONFIG: Final = f"""
[nic.{NIC}]
rss_queues = 0
[[nic.{NIC}.allow]]
users = [0, {USER}]
queues = {QUEUE}
ports = {PORT}
settings = ["header-split", "rss"]
[memory]
kinds = ["udmabuf"]
"""


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
