"""``devmem-tcp recv`` and ``send`` on the kernel backend, with ``nc`` at the other end: every byte, both ways.

DEVMEM_TEST_BYTES says how much each transfer moves (default 32 MiB). MTU and loss are the guest's: ``devmem-tcp lab run
--mtu 9000 --drop 0.01``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final

import pytest

from devmem_tcp.testing.patterns import pattern
from far_end import NEAR, NETIF, FarEnd

SIZE: Final = int(os.environ.get("DEVMEM_TEST_BYTES", 32 << 20))
BLOCK_BYTES: Final = 1 << 20
PATTERN: Final = 251  # prime, so that no two pages of a block are alike
PATIENCE_S: Final = 60.0  # of any one wait, and of what cannot be waited for otherwise; 1 GiB with loss takes longer
TRANSFER_S: Final = 120.0 + SIZE / 2e6
NETCAT: Final = ("nc", "-N") if shutil.which("nc") else (sys.executable, str(Path(__file__).with_name("netcat.py")))
PEER: Final = ("ip", "netns", "exec", os.environ["REMOTE_ARGS"], *NETCAT)

pytestmark = pytest.mark.timeout(2 * TRANSFER_S)


@pytest.fixture(params=NEAR, ids=["ipv4", "ipv6"])
def host(request: pytest.FixtureRequest) -> str:
    """An address of the NIC under test."""
    address: str = request.param
    return address


@pytest.fixture
def workers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


class Command:
    """``devmem-tcp VERB`` on the kernel backend of the NIC under test; it does not outlive the block."""

    def __init__(self, verb: str, *arguments: str) -> None:
        base = [sys.executable, "-m", "devmem_tcp", verb, "--backend", "kernel", "--nic", NETIF]
        said = ["--json", "--quiet", "--timeout", str(PATIENCE_S)]
        self.process = subprocess.Popen([*base, *said, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def report(self) -> dict[str, Any]:
        """Wait for the end; returns what the command says of it."""
        report = self.event()
        assert self.process.wait(PATIENCE_S) == 0
        return report

    def event(self) -> dict[str, Any]:
        """Return the next thing that the command says."""
        assert self.process.stdout is not None
        event: dict[str, Any] = json.loads(self.process.stdout.readline() or "{}")
        return event

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(PATIENCE_S)


def any_port(host: str) -> str:
    return f"[{host}]:0" if ":" in host else f"{host}:0"


def receiver(host: str, *options: str) -> Command:
    return Command("recv", any_port(host), "--strict", "-o", os.devnull, *options)


def sender(host: str, *options: str) -> Command:
    return Command("send", "--listen", any_port(host), *options)


@contextlib.contextmanager
def peer(command: Command, stdin: int = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    """Connect ``nc``, in the other namespace, to a command that listens; what it gets goes to its stdout."""
    event = command.event()
    assert event.get("event") == "listening", command.process.wait()
    where = (event["host"], str(event["port"]))
    with subprocess.Popen([*PEER, *where], stdin=stdin, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def feed(pipe: IO[bytes] | None) -> str:
    """Write SIZE bytes, no block like another, and close; returns their SHA-256."""
    assert pipe is not None
    digest = hashlib.sha256()
    block = bytearray(os.urandom(BLOCK_BYTES))
    with pipe:
        for at in range(0, SIZE, BLOCK_BYTES):
            block[:8] = at.to_bytes(8, "little")
            piece = memoryview(block)[: SIZE - at]
            digest.update(piece)
            pipe.write(piece)
    return digest.hexdigest()


def pattern_pieces() -> Iterator[memoryview]:
    """Yield SIZE bytes of the repeating pattern."""
    block = pattern(PATTERN, BLOCK_BYTES // PATTERN * PATTERN).data
    for at in range(0, SIZE, len(block)):
        yield block[: SIZE - at]


def feed_pattern(pipe: IO[bytes] | None) -> None:
    """Write SIZE bytes of the repeating pattern, and close."""
    assert pipe is not None
    with pipe:
        for piece in pattern_pieces():
            pipe.write(piece)


def drain(pipe: IO[bytes] | None) -> tuple[int, str]:
    """Read to the end; returns how many bytes there were, and their SHA-256."""
    assert pipe is not None
    digest, size = hashlib.sha256(), 0
    while block := pipe.read(BLOCK_BYTES):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def check_received(report: dict[str, Any]) -> None:
    """See that all payload landed in the dma-buf, but for what a NIC may leave in the header buffer."""
    path = report["path"]
    print(json.dumps(report), file=sys.stderr)
    assert report["bytes"] == SIZE
    assert (report["memory"], path["backend"], report["rx_queue"]) == ("udmabuf", "kernel", report["queue"])
    assert path["dmabuf_bytes"] + path["linear_bytes"] == SIZE
    assert path["dmabuf_bytes"] > 0
    assert (path["host_bytes"], path["tokens_out"]) == (0, 0)


def check_sent(report: dict[str, Any]) -> None:
    """See that all payload was sent out of the dma-buf, and every send completed."""
    path = report["path"]
    print(json.dumps(report), file=sys.stderr)
    assert report["bytes"] == SIZE
    assert (report["memory"], path["backend"]) == ("udmabuf", "kernel")
    assert (path["sent_dmabuf_bytes"], path["sent_host_bytes"], path["sends_incomplete"]) == (SIZE, 0, 0)


def test_recv_takes_what_nc_sends(host: str, workers: ThreadPoolExecutor) -> None:
    with receiver(host, "--hash") as command, peer(command) as process:
        fed = workers.submit(feed, process.stdin)
        report = command.report()
        assert report["sha256"] == fed.result()
    check_received(report)


def test_recv_verifies_the_pattern_that_nc_sends(host: str, workers: ThreadPoolExecutor) -> None:
    with receiver(host, "--verify", str(PATTERN)) as command, peer(command) as process:
        fed = workers.submit(feed_pattern, process.stdin)
        report = command.report()
        fed.result()
    assert report["verified_pattern"] == PATTERN
    check_received(report)


def test_nc_takes_what_send_sends(host: str, workers: ThreadPoolExecutor) -> None:
    with sender(host, "--hash") as command, peer(command, subprocess.DEVNULL) as process:
        fed = workers.submit(feed, command.process.stdin)
        drained = workers.submit(drain, process.stdout)
        report = command.report()
        assert drained.result() == (SIZE, fed.result())
    assert report["sha256"] == fed.result()
    check_sent(report)


def test_both_directions_at_once(host: str, workers: ThreadPoolExecutor) -> None:
    with (
        receiver(host, "--hash") as receiving,
        sender(host) as sending,
        peer(receiving) as source,
        peer(sending, subprocess.DEVNULL) as target,
    ):
        sent = workers.submit(feed, sending.process.stdin)
        drained = workers.submit(drain, target.stdout)
        fed = workers.submit(feed, source.stdin)
        received_report = workers.submit(receiving.report)
        sent_report = sending.report()
        assert received_report.result()["sha256"] == fed.result()
        assert drained.result() == (SIZE, sent.result())
    check_received(received_report.result())
    check_sent(sent_report)


def test_send_connects_to_who_listens(host: str, far: FarEnd, workers: ThreadPoolExecutor) -> None:
    expected = hashlib.sha256()
    for piece in pattern_pieces():
        expected.update(piece)
    with far.listen(host) as listener:
        listener.settimeout(PATIENCE_S)
        where, port = listener.getsockname()[:2]
        to = f"[{where}]:{port}" if ":" in where else f"{where}:{port}"
        with Command("send", to, "--pattern", str(PATTERN), "--size", str(SIZE)) as command:
            sock, _ = listener.accept()
            with sock.makefile("rb") as stream, sock:
                drained = workers.submit(drain, stream)
                assert drained.result() == (SIZE, expected.hexdigest())
            report = command.report()
    check_sent(report)
