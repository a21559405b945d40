"""The network between two ends is cut in the middle of a transfer: two namespaces, and a cable that can be pulled."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest

from devmem_tcp.errors import Timeout
from devmem_tcp.sansio.session import KeepAlive
from devmem_tcp.transport import Sender
from fault_ends import LIMIT_S, MIB, Sending, Survivor, same, sending, surviving
from fault_peer import pattern

CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
RECEIVER, SENDER = "10.213.7.1", "10.213.7.2"
LARGE: Final = 24 * MIB

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Cable:
    """Two network namespaces with a veth pair between them; ``receiver`` and ``sender`` are their names."""

    def __init__(self) -> None:
        self.receiver, self.sender = (f"dmt{os.getpid()}{end}" for end in "rs")

    def plug(self) -> None:
        for name in (self.receiver, self.sender):
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "cable",
            "netns",
            self.receiver,
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            self.sender,
        )
        for name, address in ((self.receiver, RECEIVER), (self.sender, SENDER)):
            ip("-netns", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-netns", name, "link", "set", "cable", "up")

    def set(self, state: str) -> None:
        """Cut it (``down``), or mend it (``up``)."""
        ip("-netns", self.receiver, "link", "set", "cable", state)

    def remove(self) -> None:
        for name in (self.receiver, self.sender):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@pytest.fixture
def cable() -> Iterator[Cable]:
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")
    made = Cable()
    try:
        made.plug()
        yield made
    finally:
        made.remove()


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Have this thread open its sockets in a network namespace. Kernel: setns(2)."""
    with open("/proc/thread-self/ns/net", "rb") as here, open(f"/run/netns/{namespace}", "rb") as there:
        enter(there.fileno())
        try:
            yield
        finally:
            enter(here.fileno())


def enter(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def from_afar(cable: Cable, end: Survivor, act: Callable[[Sender], object], **options: Any) -> Sending:
    """Send from the other end of the cable."""
    return Sending(end, act, place=inside(cable.sender), **options)


@contextlib.contextmanager
def receiving(cable: Cable, **options: Any) -> Iterator[Survivor]:
    with contextlib.ExitStack() as stack:
        with inside(cable.receiver):
            end = stack.enter_context(surviving(listen=(RECEIVER, 0), **options))
        yield end


def under_way(end: Survivor) -> bool:
    """Whether a message has come in part."""
    return any(stats.dmabuf_bytes > MIB for stats in end.receiver.stats())


def send_large(sender: Sender) -> None:
    sender.send(pattern(1, LARGE), name="large")


@pytest.mark.parametrize("lanes", [1, 3])
def test_both_ends_notice_a_cut_network_in_time(cable: Cable, lanes: int) -> None:
    patience = {"keep_alive": KeepAlive(0.3, 2), "lanes": lanes}
    with receiving(cable, **patience) as end:
        sender = from_afar(cable, end, send_large, **patience)
        end.drive(lambda: under_way(end), limit_s=LIMIT_S)
        cable.set("down")
        end.drive(lambda: bool(end.errors))
        with pytest.raises(
            Timeout, match=r"no sign of life from the peer in .*: 0 of 1 messages are known to have arr"
        ):
            sender.join()
        (error,) = end.errors
        assert isinstance(error, Timeout)
        assert "no sign of life from the peer in " in str(error)
        assert "1 messages were under way" in str(error)
        assert not end.receiver.peers
        cable.set("up")
        later = from_afar(cable, end, lambda sender: sender.send(pattern(2), name="later"))
        end.drive(lambda: end.names == ["later"] and not end.receiver.peers, limit_s=LIMIT_S)
        later.join()
        assert same(end.messages[0][1], pattern(2))


def test_a_transfer_outlives_a_short_cut(cable: Cable) -> None:
    patience = {"keep_alive": KeepAlive(2.0, 2), "lanes": 3}
    target = np.empty(LARGE, np.uint8)
    with receiving(cable, into=lambda header: target, **patience) as end:
        sender = from_afar(cable, end, send_large, **patience)
        end.drive(lambda: under_way(end), limit_s=LIMIT_S)
        cable.set("down")
        with pytest.raises(Timeout, match="no message came"):
            end.receiver.receive(0.3)
        cable.set("up")
        end.drive(lambda: end.names == ["large"] and not end.receiver.peers, limit_s=2 * LIMIT_S)
        sender.join()
        assert not end.errors
    np.testing.assert_array_equal(target, pattern(1, LARGE))


def test_nobody_waits_long_for_a_host_that_is_not_there(cable: Cable) -> None:
    cable.set("down")
    began = time.monotonic()
    with (
        pytest.raises((OSError, Timeout)) as caught,
        inside(cable.sender),
        sending(to=(RECEIVER, 5000), handshake_timeout_s=0.3),
    ):
        pass
    assert f"connect {RECEIVER}:5000" in str(caught.value)
    assert time.monotonic() - began < 5.0
