"""One of a peer's two processes; started by turn.py, in the folder bench.

    python -m peers.ends serve|drive MODULE:CLASS CHANNEL_FD RESULTS_FD ORDER

Each work ends with one line of JSON on the results fd; what stdout and stderr say is for who looks into a failure.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
import traceback
from typing import Final

import msgspec

from peers import registry
from peers.control import Channel, Control, Figures, OtherSideEnded
from peers.works import Work

SERVE: Final = "serve"
DRIVE: Final = "drive"

_PR_SET_PDEATHSIG: Final = 1


class Order(msgspec.Struct, frozen=True):
    """What the two processes are to do."""

    works: list[Work]
    congestion: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The peer raised an error; ``alone`` if it was not just that the other process had ended."""

    words: str
    alone: bool


class Done(msgspec.Struct, frozen=True, tag=True):
    """One work is done."""

    figures: Figures


def main(role: str, reference: str, channel_fd: str, results_fd: str, order_json: str) -> None:
    """Do all works of the order; ends the process."""
    _die_with_the_parent()
    _raise_file_limit()
    order = msgspec.json.decode(order_json, type=Order)
    status = 0
    with socket.socket(fileno=int(channel_fd)) as sock, os.fdopen(int(results_fd), "wb", buffering=0) as results:
        try:
            peer = registry.load(reference)
            channel = Channel(sock)
            for work in order.works:
                control = Control(work, channel, order.congestion, serving=role == SERVE)
                (peer.serve if role == SERVE else peer.drive)(control)
                results.write(msgspec.json.encode(Done(control.figures())) + b"\n")
        except BaseException as error:
            traceback.print_exc()
            words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            results.write(msgspec.json.encode(Failed(words, not isinstance(error, OtherSideEnded))) + b"\n")
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # a library's threads may never end


def _die_with_the_parent() -> None:
    """Ask the kernel to end this process when the one that started it is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _raise_file_limit() -> None:
    """Allow as many fds as the hard limit does: 512 connections are as many fds, with some libraries twice that."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main(*sys.argv[1:])
