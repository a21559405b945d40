"""Servers and clients of safetensors files, in one process: a thread drives the server."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import devmem_tcp as dmt
from devmem_tcp.contract import Nic
from devmem_tcp.safetensors.asking import AskCatalog, AskTensors, decode_ask, granted
from devmem_tcp.safetensors.catalog import Catalog
from devmem_tcp.safetensors.serving import ServedSession, TensorServer, serve_tensors
from devmem_tcp.safetensors.source_file import SourceFile
from devmem_tcp.transport.sender_engine import SenderEngine
from devmem_tcp.transport.sending import SenderLink
from devmem_tcp.transport.terms import SessionOptions
from devmem_tcp.types import Address
from safetensors_files import Tensors

MIB: Final = 1 << 20
LOOPBACK: Final = ("127.0.0.1", 0)
METADATA: Final = {"format": "pt"}


def blocks(count: int, nbytes: int, prefix: str = "block") -> Tensors:
    """Return tensors of one size that differ in every byte's neighbourhood."""
    pattern = bytes(range(251)) * (nbytes // 251 + 2)
    return {f"{prefix}.{i}": ("U8", (nbytes,), pattern[i % 251 : i % 251 + nbytes]) for i in range(count)}


class Served:
    """A server and what it said of its sessions."""

    def __init__(self, server: TensorServer) -> None:
        self.server: Final = server
        self._sessions: queue.Queue[ServedSession] = queue.Queue()
        self.address: Final[Address] = server.address
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for session in self.server:
            self._sessions.put(session)

    def sessions(self, count: int) -> list[ServedSession]:
        """Wait until so many sessions are over; returns what was said of them."""
        return [self._sessions.get(timeout=30) for _ in range(count)]

    def stop(self) -> None:
        """End the thread, not the server's sessions."""
        self.server.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def serving(*files: Path, **options: Any) -> Iterator[Served]:
    """A server of files on a NIC of its own, driven by a thread."""
    given: dict[str, Any] = {"listen": LOOPBACK, "size": 32 * MIB, "max_peers": 4} | options
    with dmt.open_nic("soft0", backend="software") as nic, serve_tensors(nic, files, **given) as server:
        served = Served(server)
        try:
            yield served
        finally:
            served.stop()


@contextlib.contextmanager
def client_nic(hostile: int | None = None) -> Iterator[Nic]:
    options = dmt.SoftwareOptions(hostile_seed=hostile)
    with dmt.open_nic("soft1", backend="software", software=options) as nic:
        yield nic


def contents(*files: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return what is in files: of each tensor the format's word, shape and bytes."""
    found = {}
    for path in files:
        with SourceFile(path) as file:
            for name, each in file.tensors.items():
                found[name] = (each.dtype, each.shape, bytes(file.data(name)))
    return found


class Liar:
    """A server that offers one thing and sends another: ``tell`` is called with the link and the indexes asked for."""

    def __init__(self, nic: Nic, catalog: bytes, tell: Callable[[SenderLink, Sequence[int]], None]) -> None:
        self._catalog = catalog
        self._tell = tell
        self._stopping = False
        self.engine: Final = SenderEngine(
            nic,
            SessionOptions(),
            to=None,
            listen=LOOPBACK,
            data_port=None,
            memory=None,
            size_bytes=4 * MIB,
            buffer=None,
            on_request=self._answer,
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _answer(self, link: SenderLink, number: int, body: bytes) -> None:
        match decode_ask(body):
            case AskCatalog():
                link.answer(number, granted(self._catalog))
            case AskTensors() as ask:
                link.answer(number, granted())
                self._tell(link, ask.indexes)

    def _run(self) -> None:
        while not self._stopping:
            self.engine.step(None)

    def close(self) -> None:
        self._stopping = True
        self.engine.wake()
        self._thread.join(30)
        self.engine.close()


@contextlib.contextmanager
def lying(catalog: Catalog | bytes, tell: Callable[[SenderLink, Sequence[int]], None]) -> Iterator[Address]:
    encoded = catalog if isinstance(catalog, bytes) else catalog.encode()
    with dmt.open_nic("soft0", backend="software") as nic:
        liar = Liar(nic, encoded, tell)
        try:
            assert liar.engine.address is not None
            yield liar.engine.address
        finally:
            liar.close()
