"""What a peer is, and how one is added: a class in a file of its own here, and a line in registry.py.

A peer is made anew in each of two processes. For each work one of them calls ``serve``, the other ``drive``; each
makes its connections, goes through the parts of the work as control.py shows, and leaves nothing open. A peer whose
connections can send and receive whole messages gets the loops from exchange.py.
"""

from __future__ import annotations

import importlib.util
from typing import Protocol

from peers.control import Control


class Peer(Protocol):
    """One library, or one way to use it."""

    most_connections: int
    """How many connections between two processes make sense with it; works of more are left out."""

    def available(self) -> str:
        """Return why it cannot run here, with the command that mends that, or nothing.

        It is asked in the process of the comparison, and imports nothing heavy.
        """

    def serve(self, control: Control) -> None:
        """Receive: each message whole, in one contiguous memory; acknowledge the last. For a round trip, echo.

        Listens on loopback, on a port that the system chooses, and tells the other side.
        """

    def drive(self, control: Control) -> None:
        """Send, and wait for the acknowledgement. For a round trip, note each with ``part.lap()``."""


def missing(module: str, package: str) -> str:
    """Return how to get a module that is not installed, or nothing if it is."""
    if importlib.util.find_spec(module) is not None:
        return ""
    return f"module {module} is missing: pip install {package}"
