"""A reader that waits for pages is told who holds them: by a warning, and by the Timeout when it gives up."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

import devmem_tcp as dmt
from devmem_tcp.errors import StarvationWarning, Timeout
from devmem_tcp.software import readiness

PAGES = 4
QUEUE = 3


@pytest.fixture
def sockets() -> Iterator[tuple[dmt.DevmemSocket, dmt.DevmemSocket]]:
    """Two connections on one queue of four pages: a hog that holds them all, and a victim with a byte waiting."""
    with ExitStack() as held:
        nic = held.enter_context(dmt.open_nic("soft0", "software"))
        buffer = held.enter_context(dmt.memory.Host().allocate(PAGES * 4096))
        nic.set_header_split("on")
        held.enter_context(nic.bind_rx(buffer, [QUEUE]))
        listener = nic.listen(("127.0.0.1", 0))
        nic.add_ntuple(dst_port=listener.address[1], queue=QUEUE)
        ends = []
        for sent in (PAGES * 4096, 1):
            peer = held.enter_context(socket.create_connection(listener.address))
            ends.append(held.enter_context(listener.accept()))
            peer.sendall(bytes(sent))
        hog, victim = ends
        while hog.stats.dmabuf_bytes < PAGES * 4096:
            hog.recv_frags()
        yield hog, victim


def test_a_long_wait_warns_and_the_timeout_says_who_holds_what(
    sockets: tuple[dmt.DevmemSocket, dmt.DevmemSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    hog, victim = sockets
    monkeypatch.setattr(readiness, "REPORT_AFTER_S", 0.0)
    victim.settimeout(0.05)
    with (
        pytest.warns(StarvationWarning, match=f"no free page on RX queue {QUEUE}: all {PAGES}") as warned,
        pytest.raises(Timeout) as caught,
    ):
        victim.recv_frags()
    assert len(warned) == 1
    host, port = hog.remote_address
    for text in (str(warned[0].message), str(caught.value)):
        assert f"{hog.stats.tokens_out} tokens ({PAGES * 4096} bytes)" in text
        assert f"connection from {host}:{port}" in text
    assert "release() batches sooner" in caught.value.hint


def test_a_short_wait_does_not_warn(sockets: tuple[dmt.DevmemSocket, dmt.DevmemSocket]) -> None:
    _, victim = sockets
    victim.settimeout(0.05)
    with pytest.raises(Timeout, match="no free page"):  # a warning would be an error
        victim.recv_frags()
