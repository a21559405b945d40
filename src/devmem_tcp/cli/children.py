"""Child processes of a command: this program again, with other arguments, ended with their parent."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO, Any, Final

import msgspec

from devmem_tcp.cli.report import Event, read_json
from devmem_tcp.errors import DevmemError
from devmem_tcp.lab.vm.processes import end

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Child:
    """One running child; its JSON lines arrive in the queue it was given, then None."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self.name: Final = name
        self._process = process
        self._errors = errors

    def check(self) -> None:
        """Wait until it has ended.

        Raises:
            DevmemError: it failed; shows what it said on stderr.
        """
        status = self._process.wait()
        if status == 0:
            return
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().replace("\n", "\n  ")
        raise DevmemError(f"the {self.name} failed (exit status {status}); it said:\n  {said}")


Inbox = queue.SimpleQueue[tuple[Child, Event | None]]


@contextlib.contextmanager
def running(name: str, arguments: Sequence[str], inbox: Inbox) -> Iterator[Child]:
    """Run ``devmem-tcp ARGUMENTS`` while the block runs; at its end the child has ended too, asked or killed."""
    process: subprocess.Popen[bytes] | None = None
    reader: threading.Thread | None = None
    with tempfile.TemporaryFile() as errors:
        try:
            with signals_held():
                process = subprocess.Popen(
                    [sys.executable, "-m", "devmem_tcp", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    process_group=0,  # Ctrl-C on the terminal is for the parent, which ends its children itself
                )
                child = Child(name, process, errors)
                reader = threading.Thread(target=_read, args=(child, process.stdout, inbox), daemon=True)
                reader.start()
            yield child
        finally:
            with signals_held():
                if process is not None:
                    end(process)
                if reader is not None:
                    reader.join()


def _read(child: Child, lines: IO[bytes], inbox: Inbox) -> None:
    with lines:
        for line in lines:
            with contextlib.suppress(msgspec.DecodeError):  # not for us; a failing child says why on stderr
                inbox.put((child, read_json(line)))
    inbox.put((child, None))


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Keep Ctrl-C and SIGTERM for the end of the block: between starting a child and knowing it, while ending it."""
    waiting: list[tuple[Any, int, FrameType | None]] = []
    before = {number: signal.getsignal(number) for number in _ENDING}

    def hold(number: int, frame: FrameType | None) -> None:
        waiting.append((before[signal.Signals(number)], number, frame))

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for handler, signal_number, frame in waiting[:1]:
            handler(signal_number, frame)
