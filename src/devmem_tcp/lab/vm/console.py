"""What a guest's console says: when its init is there, how the job ended, and whether the kernel is in trouble."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import Final

TAIL_LINES: Final = 60

_TROUBLE: Final = re.compile(
    r"Kernel panic - not syncing"
    r"|\bBUG: "
    r"|\bkernel BUG at "
    r"|\bWARNING: (?:CPU: \d+ PID: \d+|.+:\d+ at )"  # since 6.19 the place comes first
    r"|\bWARNING: (?:possible |suspicious |bad |inconsistent |Nested lock)"  # lockdep's and RCU's
    r"|\bOops: |\bgeneral protection fault"
    r"|\bUBSAN: |\bKASAN: |\bKFENCE: "
    r"|rcu: INFO: \w+ (?:self-)?detected (?:expedited )?stalls?|\brcu_\w+ (?:self-)?detected stall"
    r"|INFO: task .+ blocked for more than"
    r"|watchdog: BUG|soft lockup|hard LOCKUP"
    r"|unregister_netdevice: waiting for"
    r"|NETDEV WATCHDOG"
    r"|\bleaked reference"
)
_END_OF_THE_LINE: Final = re.compile(r"Kernel panic - not syncing|end Kernel panic")


@dataclass
class Console:
    """Reads a console log as it grows.

    Args:
        nonce: what makes this boot's marker lines its own; ``guest_init`` writes ``devmem-lab NONCE WORD [DETAIL]``.
    """

    nonce: str
    ready: bool = False
    exit_code: int | None = None
    problem: str = ""
    """Why the guest's init could not run the job."""
    trouble: list[str] = field(default_factory=list)
    """Lines in which the kernel reports a fault of its own."""
    panicked: bool = False
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    _rest: str = ""

    def feed(self, data: bytes) -> None:
        """Take what the log grew by; whole lines are judged, the rest waits for more."""
        text = self._rest + data.decode("utf-8", "replace").replace("\r", "")
        *lines, self._rest = text.split("\n")
        for line in lines:
            self._judge(line)

    def finish(self) -> None:
        """Judge what is left without an end of line: the guest is gone."""
        if self._rest:
            self._judge(self._rest)
            self._rest = ""

    def _judge(self, line: str) -> None:
        marker = f"devmem-lab {self.nonce} "
        _, found, rest = line.partition(marker)
        if found:
            self._marked(rest.strip())
            return
        self.tail.append(line)
        if _TROUBLE.search(line):
            self.trouble.append(line.strip())
            self.panicked = self.panicked or _END_OF_THE_LINE.search(line) is not None

    def _marked(self, text: str) -> None:
        word, _, detail = text.partition(" ")
        if word == "ready":
            self.ready = True
        elif word == "exit" and detail.isdigit():
            self.exit_code = int(detail)
        elif word == "failed":
            self.problem = detail
