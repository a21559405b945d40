"""The console script ``devmem-tcp``.

It stands outside of the package, whose import takes a quarter of a second in which nothing can be lost yet: whoever
presses Ctrl-C by then gets the prompt back, and no traceback.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line, whose verb takes over from here how Ctrl-C ends it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell had it ignored
        signal.signal(signal.SIGINT, _leave)
    from devmem_tcp.cli.main import main as run

    run()


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once. An exception would be told, or lost, wherever an import cannot let it through."""
    os._exit(128 + number)  # as a shell counts signals
