"""What the tests of the lab's vfio-user server share: a server with a client, guest memory, and eventfds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from devmem_tcp.lab.dma import DmaSpace
from devmem_tcp.lab.vfio_user import VfioUserServer
from vfio_client import PAGE, Client, DmaFunction, Served


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A vfio-user server without a client."""
    dma = DmaSpace()
    function = DmaFunction(dma)
    path = str(tmp_path / "nic.sock")
    with VfioUserServer(path, function, dma) as server:
        yield Served(path, dma, function, server)
    dma.close()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    """A client of ``served`` that has sent VERSION."""
    with served.connect() as client:
        yield client


@pytest.fixture
def guest_memory() -> Iterator[int]:
    """A memfd of 8 pages."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8 * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    """Four eventfds that do not block."""
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(4)]
    yield fds
    for fd in fds:
        os.close(fd)
