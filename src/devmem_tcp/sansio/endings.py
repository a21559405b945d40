"""How a handshake or a session ended, if not well: by whom, why, and as which error. Told again whenever asked."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from devmem_tcp.errors import DevmemError


class Party(Enum):
    """Who ended it."""

    PEER = "the peer"
    HERE = "this side"
    NETWORK = "the network, or a peer that is gone"


class Ending(NamedTuple):
    """``error()`` is to be raised: a DevmemError, or a ConnectionError where the connection broke."""

    by: Party
    kind: type[Exception]
    words: str
    hint: str = ""

    def error(self) -> Exception:
        """Return the error, new each time: one that was raised before carries old tracebacks."""
        if issubclass(self.kind, DevmemError):
            return self.kind(self.words, hint=self.hint)
        return self.kind(self.words)
