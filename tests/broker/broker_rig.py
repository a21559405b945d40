"""A broker under test: the real server, on a real UNIX socket, over fake NICs and memory files."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from devmem_tcp.broker import configuration
from devmem_tcp.broker.inspection import DmabufFacts
from devmem_tcp.broker.leasing import Leasing
from devmem_tcp.broker.policy import Policy
from devmem_tcp.broker.server import Server, listening
from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.errors import BindError
from devmem_tcp.memory.dmabuf import DmabufBuffer
from devmem_tcp.sys import calls
from devmem_tcp.types import PAGE_SIZE
from fake_nic import PATIENCE_S, FakeNics

ROOT: Final = os.geteuid() == 0
ME: Final = os.geteuid()
ALICE, BOB, MALLORY = (61001, 61002, 61003) if ROOT else (ME, ME, ME)  # an ordinary user can be itself only
DEVMEM_GROUP: Final = 61900
CLIENT: Final = Path(__file__).with_name("client_process.py")
NAMESPACE: Final = os.stat("/proc/self/ns/net").st_ino

POLICY: Final = f"""
[nic.fake0]
rss_queues = "0-7"
[[nic.fake0.allow]]
users = [{ME}, {ALICE}]
groups = [{DEVMEM_GROUP}]
queues = "8-15"
ports = "5201-5299"
remote_ports = 6000
locations = "10-19"
settings = ["header-split", "hds-thresh", "rss"]
[[nic.fake1.allow]]
users = [{ME}]
queues = 1
[[nic.gone0.allow]]
users = [{ME}]
queues = 1
[memory]
kinds = ["udmabuf"]
[quota]
clients = 4
queues = 3
rules = 3
buffers = 3
bytes_bound = {8 * PAGE_SIZE}
bytes_allocated = {8 * PAGE_SIZE}
"""


class MemoryFiles(Allocator):
    """Buffers of memory files, in place of dma-bufs; ``references`` is what each is said to be held by."""

    def __init__(self) -> None:
        self.references = 1
        self.failure: OSError | None = None  # of the next looks at one

    def allocate(self, size_bytes: int) -> Buffer:
        fd = calls.memfd_create("fake dma-buf")
        try:
            calls.truncate(fd, size_bytes)
        except BaseException:
            calls.close_fd(fd)
            raise
        return DmabufBuffer(size_bytes, "udmabuf", fd)

    def inspect(self, fd: int) -> DmabufFacts:
        if self.failure is not None:
            raise self.failure
        calls.read_text(f"/proc/self/fdinfo/{fd}")  # a call that can fail, as the real one's
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
            raise BindError(22, "bind-rx")
        return DmabufFacts(os.fstat(fd).st_size, self.references)


def policy(text: str = POLICY) -> Policy:
    names = {"devmem": DEVMEM_GROUP}
    return configuration.parse(
        text, "test.toml", user_id_of=names.__getitem__, group_id_of=names.__getitem__, kinds={"udmabuf": None}
    )


@dataclass
class Rig:
    """A broker's socket, and what is behind it."""

    path: str
    nics: FakeNics = field(default_factory=FakeNics)
    memory: MemoryFiles = field(default_factory=MemoryFiles)
    lines: list[str] = field(default_factory=list)

    def leasing(self, text: str = POLICY) -> Leasing:
        return Leasing(
            policy(text),
            self.nics.control_for,
            {"udmabuf": self.memory},
            network_namespace=NAMESPACE,
            log=self.lines.append,
            inspect=self.memory.inspect,
        )

    @contextlib.contextmanager
    def serving(self, text: str = POLICY) -> Iterator[None]:
        """Serve in a thread until the block ends; then nothing is in force."""
        stop, wakeup = socket.socketpair()
        with stop, wakeup, listening(self.path) as listener:
            server = Server(listener, self.leasing(text), self.lines.append)
            thread = threading.Thread(target=server.serve, args=[stop.fileno()], name="broker")
            thread.start()
            try:
                yield
            finally:
                wakeup.send(b"x")
                thread.join(PATIENCE_S)
                server.close()
        assert self.nics.held == []
        assert not any("Traceback" in line for line in self.lines), self.lines


@contextlib.contextmanager
def public_directory() -> Iterator[Path]:
    """Yield a new directory that other users can look into, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="broker-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


class ClientProcess:
    """A program that takes all there is from the broker, step by step, as another user where this one is root."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def line(self) -> str:
        """Return the next line it says."""
        return _line(self.process.stdout)

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def say(self, text: str) -> None:
        """Give it a line: it goes on."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()


def _line(stream: IO[bytes] | None) -> str:
    assert stream is not None
    return stream.readline().decode().rstrip("\n")


@contextlib.contextmanager
def client_process(path: str, *words: str, user: int = ALICE, groups: tuple[int, ...] = ()) -> Iterator[ClientProcess]:
    """Run ``client_process.py PATH WORDS`` as a user, if root can; killed at the end of the block if it still runs."""
    identity = ",".join(map(str, (user, *groups))) if ROOT else "me"
    process = subprocess.Popen(
        [sys.executable, str(CLIENT), identity, path, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        try:
            yield ClientProcess(process)
        finally:
            if process.poll() is None:
                process.kill()
