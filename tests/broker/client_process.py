"""A client of the broker in a process of its own: takes one thing after the other, and waits for a line before each.

``client_process.py WHO PATH`` takes all; ``client_process.py WHO PATH open NIC`` opens a NIC and says what came of it.
WHO is ``me``, or ids of a user and supplementary groups: the process becomes that once Python has what it needs, for
which another user may lack the permission.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from devmem_tcp.broker.client import BrokerControl, BrokerMemory
from devmem_tcp.errors import DevmemError
from devmem_tcp.types import FlowRule, HeaderSplitMode

PAGE = 4096


def steps(path: str) -> list[Callable[[], object]]:
    """Return what to do, in order; what each returns is kept."""
    made: list[BrokerControl] = []
    fd = os.memfd_create("client's")
    os.ftruncate(fd, PAGE)
    return [
        lambda: made.append(BrokerControl(path, "fake0")),
        lambda: made[0].set_header_split(HeaderSplitMode.ON),
        lambda: made[0].set_hds_thresh(0),
        lambda: made[0].set_rss(list(range(8)), "equal 8"),
        lambda: made[0].add_ntuple(FlowRule(9, dst_port=5201)),
        lambda: made[0].attach(fd, [9, 8], PAGE),
        lambda: BrokerMemory(path).allocate(PAGE),
    ]


def become(who: str) -> None:
    """Become another user, for good."""
    if who != "me":
        user, *groups = map(int, who.split(","))
        os.setgroups(groups)
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def main() -> None:
    who, path, *words = sys.argv[1:]
    become(who)
    if words:
        try:
            BrokerControl(path, words[1]).close()
            print("opened", flush=True)
        except DevmemError as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
        return
    kept = []
    for step in steps(path):
        print("ready", flush=True)
        sys.stdin.readline()
        kept.append(step())
    print("all", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
