"""Peers for tests of the comparison: plain sockets that cheat, hang, die or fail; run in processes of their own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from peers import contract, exchange
from peers.control import Control
from peers.plain import Plain, SocketWire, accepted, connected
from peers.works import Kind, Work

MESSAGES: Final = Work(Kind.THROUGHPUT, 64 << 10, 8)
BYTE: Final = 40_000
"""The one that is corrupted."""


class Wire(SocketWire):
    """A wire of plain sockets, with what a test does to what it received."""

    def __init__(self, sock: Any) -> None:
        super().__init__(sock)
        self.received = 0


class CorruptsOneBit(Wire):
    def receive(self, into: memoryview) -> memoryview:
        landed = super().receive(into)
        landed[BYTE] ^= 4
        return landed


class LeavesWhatWasThere(Wire):
    """Brings the warm-up's message where it should, and the ones after it nowhere."""

    def receive(self, into: memoryview) -> memoryview:
        self.received += 1
        if self.received <= MESSAGES.warm_up_messages:
            return super().receive(into)
        super().receive(memoryview(bytearray(len(into))))
        return into


class ReturnsHalf(Wire):
    def receive(self, into: memoryview) -> memoryview:
        return super().receive(into)[: len(into) // 2]


class Cheating(Plain):
    """Plain sockets whose server does something to what it received."""

    wire: type[Wire]

    def serve(self, control: Control) -> None:
        with accepted(control) as socks:
            exchange.serve(control, self.wire(socks[0]))


class Corrupting(Cheating):
    wire = CorruptsOneBit


class Leaving(Cheating):
    wire = LeavesWhatWasThere


class Halving(Cheating):
    wire = ReturnsHalf


class Hanging(Plain):
    """Does as it should, but hangs in round trips."""

    def serve(self, control: Control) -> None:
        if control.work.kind is Kind.ROUND_TRIP:
            print("waiting for Godot", flush=True)
            signal.pause()
        super().serve(control)


class Dying(Plain):
    """Is killed in the middle of a part."""

    def drive(self, control: Control) -> None:
        with connected(control):
            for part in control.parts():
                with part:
                    print("out of memory", flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)


class Raising(Plain):
    """Cannot do messages of 64 KiB."""

    def drive(self, control: Control) -> None:
        if control.work == MESSAGES:
            raise ValueError("64 KiB is too much")
        super().drive(control)


class LeavingOut(Plain):
    """Comes back without having done anything."""

    def serve(self, control: Control) -> None:
        control.hear()

    def drive(self, control: Control) -> None:
        control.tell("done already")


class Missing(Plain):
    def available(self) -> str:
        return contract.missing("no_such_module", "no-such-package")


class Waiting(Plain):
    """Says its process's id through a pipe, then waits for ever."""

    def serve(self, control: Control) -> None:
        Path(os.environ["PIDS"]).write_text(f"{os.getpid()}\n", encoding="ascii")
        signal.pause()

    drive = serve
