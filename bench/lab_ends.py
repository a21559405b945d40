"""What lab.py runs in the guest: one TCP connection from a namespace to the other, again and again, for a while each.

Standard library alone. Says on stdout, in lines of JSON, when each run starts and what came of it; the NIC's counters
are read outside, at just those moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Final

from loopback import say

PORT: Final = 5201
PEER: Final = ("ip", "netns", "exec", "peer")
CHUNK_BYTES: Final = 1 << 20
LIMIT_S: Final = 60.0  # of any one wait


def receive(address: str) -> None:
    """Take one connection to its end; say what came, and in what time."""
    with socket.create_server((address, PORT)) as listener:
        listener.settimeout(LIMIT_S)
        say(listening=PORT)
        sock, _ = listener.accept()
    chunk = bytearray(CHUNK_BYTES)
    count = 0
    with sock:
        sock.settimeout(LIMIT_S)
        start = time.monotonic()
        while size := sock.recv_into(chunk):
            count += size
        say(bytes=count, wall_s=time.monotonic() - start)


def send(address: str, seconds: float) -> None:
    """Send for so long on one connection."""
    chunk = bytes(CHUNK_BYTES)
    with socket.create_connection((address, PORT), timeout=LIMIT_S) as sock:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sock.sendall(chunk)


@contextlib.contextmanager
def receiver(address: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``receive`` in the other namespace; it listens when the block begins."""
    command = [*PEER, sys.executable, __file__, "receive", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def set_up(mtu: int, features: dict[str, str]) -> None:
    """Give both ends an MTU and the offloads wanted, and wait until they reach each other again."""
    mine = os.environ["NETIF"]
    (theirs,) = (name for name in _in_peer("ls", "/sys/class/net").split() if name != "lo")
    for prefix, name in (((), mine), (PEER, theirs)):
        subprocess.run([*prefix, "ip", "link", "set", name, "mtu", str(mtu)], check=True, timeout=LIMIT_S)
        for feature, value in features.items():
            command = [*prefix, "ethtool", "-K", name, feature, value]
            subprocess.run(command, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)
    subprocess.run(
        ["ping", "-q", "-c", "1", "-w", str(int(LIMIT_S)), os.environ["REMOTE_V4"]],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def _in_peer(*command: str) -> str:
    return subprocess.run([*PEER, *command], check=True, text=True, stdout=subprocess.PIPE, timeout=LIMIT_S).stdout


def run_all(plan: list[dict[str, object]], seconds: float) -> None:
    """Go through the plan: a name, an MTU and features for each run."""
    address = os.environ["REMOTE_V4"]
    for case in plan:
        set_up(case["mtu"], case["features"])  # type: ignore[arg-type]  # as lab.py wrote them
        with receiver(address) as receiving:
            say(start=case["name"])
            send(address, seconds)
            output, _ = receiving.communicate(timeout=LIMIT_S)
        say(end=case["name"], **json.loads(output))


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2])
    else:
        run_all(json.loads(sys.argv[2]), float(sys.argv[3]))
