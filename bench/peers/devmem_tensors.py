"""devmem-tcp itself: tensors over sessions, software backend, blocking; as series, or each announced by itself.

A message is sent from a slot of the bound TX Buffer, and lands in one place of the bound RX Buffer. Round trips are two
sessions, one each way. Each connection is a session of its own, with a control connection besides.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from typing import Any

import devmem_tcp as dmt
from devmem_tcp.transport.arrangement import DEFAULT_SIZE
from loopback import HOST, MIB
from peers.control import Control, Part
from peers.works import Kind

PATIENCE_S = 60.0
_HELD = 4  # messages that a connection's share of the receiver's Buffer has room for
_LEAST_BYTES = 4 << 20  # of that share


class DevmemSeries:
    most_connections = 512
    series = True

    def available(self) -> str:
        return ""

    def serve(self, control: Control) -> None:
        allow_many_files()
        if control.work.kind is Kind.ROUND_TRIP:
            self._echo(control)
            return
        with receiving(control) as receiver:
            control.tell(port_of(receiver))
            receiver.wait_connected(control.work.connections, PATIENCE_S)
            for part in control.parts():
                part.check(self._receive(part, receiver, control.work.connections))
            drain(receiver)

    def drive(self, control: Control) -> None:
        allow_many_files()
        if control.work.kind is Kind.ROUND_TRIP:
            self._round_trips(control)
            return
        port = int(control.hear())
        with contextlib.ExitStack() as stack:
            memory = stack.enter_context(sending_memory(control))
            lines = [stack.enter_context(line(control, port, memory)) for _ in range(control.work.connections)]
            for part in control.parts():
                self._send(part, lines)

    def _receive(self, part: Part, receiver: dmt.Receiver, connections: int) -> list[memoryview]:
        """Receive every message, and return where the last one of each connection lies."""
        last: list[dmt.Message] = []
        left = part.messages * connections
        counts: dict[object, int] = {}
        with part:
            while left:
                message = receiver.receive(PATIENCE_S)
                left -= 1
                count = counts[message.peer] = counts.get(message.peer, 0) + 1
                if count < part.messages:
                    message.release()
                else:
                    last.append(message)
        landed = [bytes(message.gather().bytes_view()) for message in last]
        for message in last:
            message.release()
        return [memoryview(copied) for copied in landed]

    def _send(self, part: Part, lines: list[tuple[dmt.Sender, dmt.Slot]]) -> None:
        """Send every message, and wait until the last one of each connection is reported."""
        part.message = lines[0][1].data
        with part, contextlib.ExitStack() as stack:
            sends = [self._sending(stack, sender, slot) for sender, slot in lines]
            for _ in range(part.messages - 1):
                for send in sends:
                    send()
            stack.close()
            confirmed = [slot.send(confirm=True) for _, slot in lines]
            for sent in confirmed:
                sent.wait_delivered(PATIENCE_S)

    def _sending(self, stack: contextlib.ExitStack, sender: dmt.Sender, slot: dmt.Slot) -> Callable[[], Any]:
        if not self.series:
            return slot.send
        series = stack.enter_context(sender.series(slot.shape, slot.dtype))
        return lambda: series.send(slot)

    # --- round trips ---

    def _echo(self, control: Control) -> None:
        with receiving(control) as receiver:
            control.tell(port_of(receiver))
            receiver.wait_connected(1, PATIENCE_S)
            with (
                sending_memory(control) as memory,
                line(control, int(control.hear()), memory) as (sender, slot),
            ):
                for part in control.parts():
                    with part, contextlib.ExitStack() as stack:
                        send = self._sending(stack, sender, slot)
                        for number in range(part.messages):
                            with receiver.receive(PATIENCE_S) as message:
                                if number == 0:
                                    slot.numpy()[:] = message.gather().numpy()
                                send()
                    part.check([slot.data])
                drain(receiver)

    def _round_trips(self, control: Control) -> None:
        port = int(control.hear())
        with contextlib.ExitStack() as ends:
            memory = ends.enter_context(sending_memory(control))
            sender, slot = ends.enter_context(line(control, port, memory))
            receiver = ends.enter_context(receiving(control))
            control.tell(port_of(receiver))
            receiver.wait_connected(1, PATIENCE_S)
            for part in control.parts():
                part.message = slot.data
                landed = memoryview(b"")
                with part, contextlib.ExitStack() as stack:
                    send = self._sending(stack, sender, slot)
                    for number in range(part.messages):
                        send()
                        with receiver.receive(PATIENCE_S) as message:
                            part.lap()
                            if number == part.messages - 1:
                                landed = memoryview(message.gather().tobytes())
                part.check([landed])
            sender.close()  # while the other side receives, and before it is its turn
            drain(receiver)


class DevmemMessages(DevmemSeries):
    series = False


@contextlib.contextmanager
def receiving(control: Control) -> Iterator[dmt.Receiver]:
    """A receiver on a NIC of its own."""
    work = control.work
    share = max(_LEAST_BYTES, (_HELD * work.size_bytes * 8 // 7 + MIB) // 4096 * 4096)
    with (
        dmt.open_nic("soft0", backend="software") as nic,
        dmt.open_receiver(
            nic,
            listen=(HOST, 0),
            size=max(DEFAULT_SIZE, share * work.connections),
            max_peers=work.connections,
            handshake_timeout_s=PATIENCE_S,
        ) as receiver,
    ):
        yield receiver


@contextlib.contextmanager
def sending_memory(control: Control) -> Iterator[dmt.Buffer]:
    """Memory for one message, that what a part is checked by may look at to the end."""
    memory = dmt.memory.Host().allocate(-(-control.work.size_bytes // 4096) * 4096)
    try:
        yield memory
    finally:
        memory.retire()


@contextlib.contextmanager
def line(control: Control, port: int, memory: dmt.Buffer) -> Iterator[tuple[dmt.Sender, dmt.Slot]]:
    """A sender with a slot for one message, which is all of ``memory``: as other peers, all lines send the same."""
    with (
        dmt.open_nic("soft1", backend="software") as nic,
        dmt.open_sender(nic, to=(HOST, port), buffer=memory, handshake_timeout_s=PATIENCE_S) as sender,
        sender.reserve(control.work.size_bytes, "uint8") as slot,
    ):
        yield sender, slot


def port_of(receiver: dmt.Receiver) -> str:
    assert receiver.address is not None
    return str(receiver.address[1])


def drain(receiver: dmt.Receiver) -> None:
    """Let senders say goodbye."""
    for message in receiver:
        message.release()


def allow_many_files() -> None:
    """Raise the limit of open files as far as it goes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
