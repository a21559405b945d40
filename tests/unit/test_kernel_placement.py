"""The kernel backend has no places: a NIC chooses the pages that payload lands in."""

from __future__ import annotations

import pytest

import devmem_tcp as dmt
from devmem_tcp.errors import ClosedError, LocalProtocolError
from devmem_tcp.kernel.socket import KernelSocket
from devmem_tcp.memory import Host
from devmem_tcp.types import PAGE_SIZE
from scripted_kernel import PAGES, QUEUE, Dmabuf, ScriptedKernel, connection, install, make_binding, make_registry


def test_arguments_are_checked_and_nothing_is_reserved() -> None:
    with Host().allocate(PAGES * PAGE_SIZE) as buffer:
        with make_binding(make_registry(), buffer) as rx:
            assert rx.reserve(QUEUE, 1) is None
            for queue, size in ((QUEUE, 0), (QUEUE, -1), (QUEUE + 1, 1)):
                with pytest.raises(ValueError, match="got"):
                    rx.reserve(queue, size)
        with pytest.raises(ClosedError):
            rx.reserve(QUEUE, 1)


def test_nothing_can_be_placed_and_nothing_is_consumed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = ScriptedKernel()
    install(monkeypatch, kernel)
    with (
        dmt.open_nic("soft0", "software") as nic,
        Host().allocate(PAGE_SIZE) as memory,
        nic.set_header_split("on"),
        nic.bind_rx(memory, [3]) as elsewhere,
        connection() as (near, _),
        KernelSocket(near, make_registry()) as sock,
    ):
        kernel.queue.append(Dmabuf(0, 5))
        place = elsewhere.reserve(3, 10)
        assert place is not None
        assert sock.lands_in is None
        with place, pytest.raises(LocalProtocolError, match="a NIC chooses"):
            sock.recv_placed(place, 0, 5)
        assert kernel.flags == []
        assert sock.recv_frags().nbytes == 5
    with place, pytest.raises(ClosedError):
        sock.recv_placed(place, 0, 5)
