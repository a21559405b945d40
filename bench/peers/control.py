"""What a peer is given in each of its two processes: the work, a word with the other process, and the clock.

A peer connects as it likes, then goes through ``control.parts()`` on both sides, with the same loop for each part:

    # serve                                       # drive
    control.tell(str(port))                       port = int(control.hear())
    for part in control.parts():                  for part in control.parts():
        with part:                                    with part:
            for _ in range(part.messages):                for _ in range(part.messages):
                landed = receive(part.landing[0])             send(part.message)
            acknowledge()                                 wait_for_the_acknowledgement()
        part.check([landed])

The first part is the warm-up, the second is measured. Each carries other bytes, so that what lay there before is not
taken for what came. Entering a part waits for the other process; what is in the ``with`` block is timed.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Final, Self, TypedDict

import msgspec

from loopback import Span, prefaulted, set_congestion
from peers.works import Kind, Work

TILE_BYTES: Final = 1_048_573  # a prime: bytes that have moved by any power of two are seen
ACKNOWLEDGEMENT: Final = memoryview(b"\x06")


class Figures(msgspec.Struct, frozen=True):
    """What one process measured of one work."""

    wall_s: float
    cpu_s: float  # user and system time, all threads
    tcp_sockets: int  # connected ones that the process had at the end: proof of the path, for libraries that choose one
    congestion_controls: list[str]  # of those
    laps_us: list[float] = []  # a driver's round trips


class _Path(TypedDict):
    tcp_sockets: int
    congestion_controls: list[str]


class WrongBytes(Exception):
    """What lies in the receiver's memory is not what was sent."""


class OtherSideEnded(Exception):
    """The other process of the pair is gone."""


class Channel:
    """Lines of text between the two processes, by a socket pair that their parent made."""

    def __init__(self, sock: socket.socket) -> None:
        # Two files: a text file that is written to drops what it has read ahead.
        self._heard = sock.makefile("r", encoding="ascii", newline="\n")
        self._told = sock.makefile("w", encoding="ascii", newline="\n")

    def tell(self, text: str) -> None:
        """Send one line."""
        try:
            self._told.write(text + "\n")
            self._told.flush()
        except ConnectionError as error:
            raise OtherSideEnded("nobody hears it") from error

    def hear(self) -> str:
        """Wait for one line."""
        try:
            line = self._heard.readline()
        except ConnectionError as error:
            raise OtherSideEnded("nothing more is said") from error
        if not line:
            raise OtherSideEnded("nothing more is said")
        return line.removesuffix("\n")


class Part:
    """The warm-up or the measured part of a work, as one of the two processes sees it.

    Attributes:
        messages: how many go on each connection.
        message: what the driver sends each time; empty in the server.
        landing: memory for one message of each connection, to be used again for the next; for a peer whose library
            brings its own, there for nothing.
        laps: the driver's clock after each round trip, ``time.perf_counter`` in seconds, and before the first.
    """

    def __init__(self, control: Control, messages: int, seed: int) -> None:
        self.messages = messages
        self.message = control.message
        self.landing = control.landing
        self.laps: list[float] = []
        self.figures: Figures | None = None
        self._control = control
        self._tile = random.Random(seed).randbytes(TILE_BYTES)

    def __enter__(self) -> Self:
        for at in range(0, len(self.message), TILE_BYTES):
            piece = self.message[at : at + TILE_BYTES]
            piece[:] = self._tile[: len(piece)]
        self._control.set_congestion()
        self._control.meet()
        self._span = Span()
        self.laps.append(time.perf_counter())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        spent = self._span.figures()
        if error is not None:
            return
        trips = zip(self.laps, self.laps[1:], strict=False)
        self.figures = Figures(
            wall_s=spent["wall_s"],
            cpu_s=spent["cpu_s"],
            laps_us=[(later - earlier) * 1e6 for earlier, later in trips],
            **self._control.path(),
        )

    def lap(self) -> None:
        """Note that a round trip has ended."""
        self.laps.append(time.perf_counter())

    def check(self, landed: Iterable[memoryview]) -> None:
        """Compare each connection's last message with what was sent, byte for byte; outside of the time measured.

        Raises:
            WrongBytes: one differs in its length or in a byte, or there are fewer than connections.
        """
        memories = list(landed)
        if len(memories) != self._control.work.connections:
            raise WrongBytes(f"{len(memories)} of {self._control.work.connections} connections ended a message")
        for memory in memories:
            if memory.nbytes != self._control.work.size_bytes:
                raise WrongBytes(f"a message has {memory.nbytes} bytes, not {self._control.work.size_bytes}")
            self._check_one(memory)

    def _check_one(self, memory: memoryview) -> None:
        for at in range(0, len(memory), TILE_BYTES):
            found = bytes(memory[at : at + TILE_BYTES])
            if found == self._tile[: len(found)]:
                continue
            index = next(i for i, byte in enumerate(found) if byte != self._tile[i])
            raise WrongBytes(f"byte {at + index} is {found[index]:#04x}, not {self._tile[index]:#04x}")


class Control:
    """One work, in one of the two processes.

    Attributes:
        work: what to do.
        landing: see Part.
        message: see Part.
    """

    def __init__(self, work: Work, channel: Channel, congestion: str, serving: bool) -> None:
        self.work = work
        self._channel = channel
        self._congestion = congestion
        self.message = memoryview(bytearray()) if serving else prefaulted(work.size_bytes)
        lands_here = serving or work.kind is Kind.ROUND_TRIP
        self.landing = [prefaulted(work.size_bytes) for _ in range(work.connections)] if lands_here else []
        self._parts: list[Part] = []

    def tell(self, text: str) -> None:
        """Send the other process a line of ASCII: a port, an address, a key."""
        self._channel.tell(text)

    def hear(self) -> str:
        """Wait for the other process's next line."""
        return self._channel.hear()

    def meet(self) -> None:
        """Wait until the other process is here too."""
        self._channel.tell("here")
        word = self._channel.hear()
        if word != "here":
            raise RuntimeError(f"the other side says {word!r} where it should wait")

    def parts(self) -> Iterator[Part]:
        """Yield the warm-up, then the part that is measured; ends when the other process has ended it too."""
        for seed, messages in enumerate((self.work.warm_up_messages, self.work.messages)):
            self._parts.append(Part(self, messages, seed))
            yield self._parts[-1]
        self.meet()  # so that neither closes a connection that the other is still looking at

    def figures(self) -> Figures:
        """Return what was measured. Raises RuntimeError if the peer did not go through both parts."""
        if len(self._parts) != 2 or self._parts[-1].figures is None:
            raise RuntimeError("the peer left out a part of its work")
        return self._parts[-1].figures

    def set_congestion(self) -> None:
        """Set the congestion control on every TCP socket of this process, whichever library made it."""
        for sock in _tcp_sockets():
            set_congestion(sock, self._congestion)

    def path(self) -> _Path:
        """Say which connected TCP sockets this process has."""
        found = []
        for sock in _tcp_sockets():
            with contextlib.suppress(OSError):
                sock.getpeername()
                found.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode())
        return {"tcp_sockets": len(found), "congestion_controls": sorted(set(found))}


def _tcp_sockets() -> Iterator[socket.socket]:
    """Yield a duplicate of every TCP socket among the fds of this process, and close it after."""
    for name in os.listdir("/proc/self/fd"):
        try:
            fd = os.dup(int(name))
        except OSError:
            continue  # the fd of the listing itself, or one that a thread of the library has just closed
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            continue
        with sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                yield sock
