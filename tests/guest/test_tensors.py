"""Tensors over sessions: kernel to kernel, kernel to software and software to kernel; each verified, its path proven.

DEVMEM_TEST_BYTES says how much each session moves (default 32 MiB). Loss and MTU are the guest's, as in test_transfers.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from far_end import NEAR, NETIF, FarEnd
from tensor_end import sizes

SIZE: Final = int(os.environ.get("DEVMEM_TEST_BYTES", 32 << 20))
PROGRAM: Final = (sys.executable, str(Path(__file__).with_name("tensor_end.py")))
PATIENCE_S: Final = 120.0 + SIZE / 1e6

pytestmark = pytest.mark.timeout(2 * PATIENCE_S)


class End:
    """One end, a process; it does not outlive the block."""

    def __init__(self, arguments: tuple[str, ...], prefix: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen([*prefix, *PROGRAM, *arguments], stdout=subprocess.PIPE)

    def says(self) -> dict[str, Any]:
        """Return the next thing that it says."""
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline() or "{}")
        return told


@contextlib.contextmanager
def end(arguments: tuple[str, ...], prefix: tuple[str, ...] = ()) -> Iterator[End]:
    made = End(arguments, prefix)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        assert made.process.stdout is not None
        made.process.stdout.close()


@pytest.mark.parametrize("host", NEAR, ids=["ipv4", "ipv6"])
@pytest.mark.parametrize(("receiver", "sender"), [("kernel", "kernel"), ("kernel", "software"), ("software", "kernel")])
def test_tensors_between_backends(far: FarEnd, host: str, receiver: str, sender: str) -> None:
    nics = {"kernel": (NETIF, far.nic()), "software": ("soft0", "soft0")}
    with end(("receive", receiver, nics[receiver][0], host, "0", "0")) as near:
        address = near.says().get("listening")
        assert address, near.process.wait()
        arguments = ("send", sender, nics[sender][1], host, str(address[1]), str(SIZE))
        with end(arguments, ("ip", "netns", "exec", far.namespace)) as source:
            sent = source.says()
            assert source.process.wait(PATIENCE_S) == 0
        found = near.says()
        assert near.process.wait(PATIENCE_S) == 0
    assert (found["wrong"], found["messages"]) == (0, len(sizes(SIZE)))
    assert found["dmabuf"] + found["linear"] + found["host"] == SIZE
    assert found["host"] == 0
    assert found["dmabuf"] >= 0.99 * SIZE  # a header split leaves a little in front of a session's first bytes
    assert sent["sent_dmabuf"] == SIZE
