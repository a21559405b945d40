"""What holds for every test in a guest: the NIC is left as it was found, and the kernel has nothing to complain of."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.ethtool import Channels, Ethtool, Rings, Rss
from far_end import NEAR, NETIF, FarEnd

PATIENCE_S: Final = 5.0  # detached page pools are looked at once a second by the kernel

pytest.register_assert_rewrite("devmem_tcp.testing.contract")


@dataclass(frozen=True)
class NicState:
    """Everything of a NIC that a test might leave changed."""

    rings: Rings
    rss: Rss
    channels: Channels
    features: dict[str, object]
    rules: tuple[object, ...]
    bound: dict[int, int]
    addresses: frozenset[str]

    @classmethod
    def read(cls) -> NicState:
        with Ethtool(NETIF) as ethtool:
            return cls(
                rings=ethtool.rings(),
                rss=ethtool.rss(),
                channels=ethtool.channels(),
                features=dict(ethtool.features()),
                rules=ethtool.rules(),
                bound={queue.queue: queue.dmabuf_id for queue in netdev.queues(ethtool.ifindex) if queue.dmabuf_id},
                addresses=frozenset(
                    address["local"]
                    for one in json.loads(ip("-json", "address", "show", "dev", NETIF, "scope", "global"))
                    for address in one.get("addr_info", ())
                    if "local" in address  # older ip(8) lists empty ones
                ),
            )


@pytest.fixture(scope="session")
def far() -> FarEnd:
    """The peer's namespace."""
    return FarEnd(os.environ["REMOTE_ARGS"], os.environ["REMOTE_V4"], os.environ["REMOTE_V6"])


@pytest.fixture(scope="session", autouse=True)
def guest_settings(far: FarEnd) -> None:
    """Keep what the kernel does in its own time from blurring what a test sees; all of it is forgotten with the guest.

    Neighbours are fixed, as a NIC loses them whenever its queues restart, and an ARP packet that RSS sends to a bound
    queue is lost.
    """
    Path("/proc/sys/net/core/skb_defer_max").write_text("0", encoding="ascii")
    far.make(lambda: Path("/proc/sys/net/ipv4/tcp_rto_max_ms").write_text("1000", encoding="ascii"))
    namespace = far.namespace
    near_mac = Path("/sys/class/net", NETIF, "address").read_text(encoding="ascii").strip()
    (peer,) = (one for one in links("-netns", namespace) if one["link_type"] == "ether")
    for address in NEAR:
        ip(
            "-netns",
            namespace,
            "neigh",
            "replace",
            address,
            "lladdr",
            near_mac,
            "dev",
            peer["ifname"],
            "nud",
            "permanent",
        )
    for name in ("REMOTE_V4", "REMOTE_V6"):
        ip("neigh", "replace", os.environ[name], "lladdr", peer["address"], "dev", NETIF, "nud", "permanent")


@pytest.fixture
def configure() -> Iterator[Callable[[], None]]:
    """Gives what gives the NIC its addresses and neighbours again, which a link that goes down takes away."""
    neighbours = json.loads(ip("-json", "neigh", "show", "dev", NETIF, "nud", "permanent"))

    def again() -> None:
        ip("link", "set", NETIF, "up")
        for address, how in zip(NEAR, (["24"], ["64", "nodad"]), strict=True):
            length, *options = how
            ip("addr", "replace", f"{address}/{length}", "dev", NETIF, *options)
        for one in neighbours:
            ip("neigh", "replace", one["dst"], "lladdr", one["lladdr"], "dev", NETIF, "nud", "permanent")

    yield again
    again()


def links(*options: str) -> list[dict[str, str]]:
    """Return the interfaces as ``ip -json link`` tells them."""
    found: list[dict[str, str]] = json.loads(ip(*options, "-json", "link"))
    return found


def ip(*words: str) -> str:
    """Run ip(8); returns what it says."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def nic_left_as_found() -> Iterator[None]:
    """Fail the test that leaves a NIC setting, a rule, a binding or a page of a dma-buf behind."""
    before = NicState.read()
    yield
    assert NicState.read() == before
    deadline = time.monotonic() + PATIENCE_S
    while left := [pool for pool in netdev.page_pools() if pool.dmabuf_id]:
        assert time.monotonic() < deadline, f"page pools of dma-bufs are still there: {left}"
        time.sleep(0.05)
