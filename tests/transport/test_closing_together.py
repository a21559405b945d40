"""Programs of one thread each that send to each other and close what they have in whatever order."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

import devmem_tcp as dmt
from devmem_tcp.errors import BrokenError
from devmem_tcp.transport import Receiver, Sender, open_receiver, open_sender
from fault_ends import LIMIT_S
from tensor_ends import LOOPBACK, MIB, receiving

MESSAGES = 5
NBYTES = 300_000


class Program(threading.Thread):
    """Sends to the other one and receives from it, and closes both ends in the order of ``closing``."""

    def __init__(self, name: str, meeting: threading.Barrier, closing: str, addresses: dict[str, object]) -> None:
        super().__init__(name=name)
        self._meeting = meeting
        self._closing = closing
        self._addresses = addresses
        self.received: list[bytes] = []
        self.error: BaseException | None = None

    @contextlib.contextmanager
    def _ends(self) -> Iterator[dict[str, Sender | Receiver]]:
        with (
            dmt.open_nic("soft0", backend="software") as nic,
            open_receiver(nic, listen=LOOPBACK, size=8 * MIB) as receiver,
        ):
            self._addresses[self.name] = receiver.address
            self._meeting.wait(LIMIT_S)
            other = next(address for name, address in self._addresses.items() if name != self.name)
            if self.name == "first":  # they come about one after the other: one opens, and one lets it in
                sender = open_sender(nic, to=other, size=MIB, timeout_s=LIMIT_S)  # type: ignore[arg-type]
                receiver.wait_connected(1, LIMIT_S)
            else:
                receiver.wait_connected(1, LIMIT_S)
                sender = open_sender(nic, to=other, size=MIB, timeout_s=LIMIT_S)  # type: ignore[arg-type]
            with sender:
                yield {"sender": sender, "receiver": receiver}

    def run(self) -> None:
        try:
            with self._ends() as ends:
                sender, receiver = ends["sender"], ends["receiver"]
                assert isinstance(sender, Sender)
                assert isinstance(receiver, Receiver)
                for number in range(MESSAGES):
                    sender.send(bytes([number]) * NBYTES)
                self._meeting.wait(LIMIT_S)
                for name in self._closing.split():
                    if name == "receive":
                        for message in receiver:
                            with message:
                                self.received.append(message.gather().tobytes()[:1])
                    else:
                        ends[name].close()
        except BaseException as error:
            self.error = error
            self._meeting.abort()


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ("sender receive receiver", "sender receive receiver"),
        ("sender receive receiver", "receive sender receiver"),
        ("sender receiver", "sender receive receiver"),
        ("sender receiver", "sender receiver"),
        ("receiver sender", "receiver sender"),
        ("receiver sender", "sender receiver"),
    ],
)
def test_two_programs_that_close_their_senders_get_everything_across(one: str, another: str) -> None:
    meeting, addresses = threading.Barrier(2), dict[str, object]()
    programs = [Program(name, meeting, order, addresses) for name, order in (("first", one), ("second", another))]
    for program in programs:
        program.start()
    for program in programs:
        program.join(LIMIT_S)
        assert not program.is_alive()
    for program, order in zip(programs, (one, another), strict=True):
        if program.error is not None:
            raise program.error
        if "receive " in order:
            assert program.received == [bytes([number]) for number in range(MESSAGES)]


def test_others_of_another_thread_are_left_alone() -> None:
    """A receiver that another thread drives is not stepped by the sender that this one closes."""
    stepped: list[str] = []
    with receiving() as receiver:
        honest = receiver._engine.step

        def step(timeout_s: float | None, slice_s: float | None = None) -> None:
            stepped.append(threading.current_thread().name)
            honest(timeout_s, slice_s)

        receiver._engine.step = step  # type: ignore[method-assign]

        def drive() -> None:
            with contextlib.suppress(BrokenError):
                for message in receiver:
                    message.release()

        thread = threading.Thread(target=drive, name="its driver")
        with dmt.open_nic("soft1", backend="software") as nic:
            thread.start()
            with open_sender(nic, to=receiver.address, size=MIB, timeout_s=LIMIT_S) as sender:
                sender.send(bytes(100))
        thread.join(LIMIT_S)
        assert set(stepped) == {"its driver"}
