"""Both ends of a session in one process: a receiver that a thread drives, and a sender that the test does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import devmem_tcp as dmt
from devmem_tcp.transport import Message, Receiver, Sender, open_receiver, open_sender

LOOPBACK = ("127.0.0.1", 0)
MIB = 1 << 20


@contextlib.contextmanager
def receiving(**options: Any) -> Iterator[Receiver]:
    """A receiver on a NIC of its own, not driven by anybody yet."""
    software = options.pop("software", None)
    options.setdefault("listen", LOOPBACK)
    options.setdefault("size", 4 * MIB)
    with dmt.open_nic("soft0", backend="software", software=software) as nic, open_receiver(nic, **options) as receiver:
        yield receiver


@contextlib.contextmanager
def sending(to: Receiver, **options: Any) -> Iterator[Sender]:
    """A sender to a receiver that is driven."""
    options.setdefault("to", to.address)
    options.setdefault("size", 4 * MIB)
    with dmt.open_nic("soft1", backend="software") as nic, open_sender(nic, **options) as sender:
        yield sender


@contextlib.contextmanager
def senders(receiver: Receiver, count: int) -> Iterator[list[Sender]]:
    """So many senders, connected. They end without a goodbye, which nobody would answer."""
    with contextlib.ExitStack() as stack:
        nic = stack.enter_context(dmt.open_nic("soft1", backend="software"))
        thread = threading.Thread(target=receiver.wait_connected, args=(count, 20))
        thread.start()
        try:
            made = [open_sender(nic, to=receiver.address, size=MIB) for _ in range(count)]
        finally:
            thread.join()
        for sender in made:
            stack.callback(sender._engine.close)
        yield made


class Driven:
    """A receiver in a thread of its own: ``act`` is done with each message, until all senders have said goodbye."""

    def __init__(self, receiver: Receiver, act: Callable[[Message], Any]) -> None:
        self.results: list[Any] = []
        self.errors: list[Exception] = []
        self._receiver = receiver
        self._act = act
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for message in self._receiver:
                with message:
                    self.results.append(self._act(message))
        except Exception as error:
            self.errors.append(error)

    def join(self) -> list[Any]:
        """Wait until it is over; returns what ``act`` answered."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "the receiver still waits"
        for error in self.errors:
            raise error
        return self.results


@contextlib.contextmanager
def session(
    act: Callable[[Message], Any], *, receiver: dict[str, Any] | None = None, sender: dict[str, Any] | None = None
) -> Iterator[tuple[Sender, Driven]]:
    """A sender, and a receiver that does ``act`` with each message; joined at the end."""
    with receiving(**(receiver or {})) as end:
        driven = Driven(end, act)
        try:
            with sending(end, **(sender or {})) as source:
                yield source, driven
        finally:
            driven._thread.join(30)
        driven.join()
