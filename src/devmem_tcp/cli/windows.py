"""Windows of the bound TX buffer: filled, sent by offset, and filled again only after their completion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from devmem_tcp.sansio.completions import InFlight
from devmem_tcp.types import CompletionRange


class Completing(Protocol):
    """What windows need of a socket."""

    def read_completions(self) -> list[CompletionRange]: ...

    def wait_completions(self, timeout_s: float | None) -> list[CompletionRange]: ...


class Windows:
    """Equal windows of one buffer. The one completed last is taken first: it is still in the processor's cache."""

    def __init__(self, buffer_bytes: int, window_bytes: int) -> None:
        if window_bytes > buffer_bytes:
            raise ValueError(f"a window of {window_bytes} bytes does not fit a buffer of {buffer_bytes} bytes")
        self.window_bytes: Final = window_bytes
        self.completions = 0  # ranges
        self._free = list(range(buffer_bytes // window_bytes))[::-1]
        self._sends = [0] * len(self._free)  # of each window: sends that are not complete
        self._in_flight: InFlight[int] = InFlight()

    def take(self, sock: Completing, timeout_s: float | None) -> int:
        """Return the offset of a free window, waiting for a completion if there is none.

        Raises:
            Timeout: nothing completed in ``timeout_s`` seconds.
        """
        self._complete(sock.read_completions())
        while not self._free:
            self._complete(sock.wait_completions(timeout_s))
        return self._free.pop() * self.window_bytes

    def sent(self, offset: int) -> None:
        """Note one successful send from the window at ``offset``."""
        window = offset // self.window_bytes
        self._sends[window] += 1
        self._in_flight.add(window)

    def wait_all(self, sock: Completing, timeout_s: float | None) -> None:
        """Wait until every send is complete.

        Raises:
            Timeout: nothing completed in ``timeout_s`` seconds.
        """
        self._complete(sock.read_completions())
        while len(self._in_flight):
            self._complete(sock.wait_completions(timeout_s))

    def _complete(self, ranges: Iterable[CompletionRange]) -> None:
        ranges = list(ranges)
        self.completions += len(ranges)
        for window in self._in_flight.complete(ranges):
            self._sends[window] -= 1
            if not self._sends[window]:
                self._free.append(window)
