"""Mooncake's transfer engine over TCP: each message is a synchronous write into the other side's registered memory.

Its Python interface tells a receiver nothing; as its users do, the sender says so by another way, here a line on the
socket pair between the two processes, which costs some 10 µs a message.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from collections.abc import Iterator
from typing import Any, Final

from loopback import HOST
from peers import exchange
from peers.control import Control

PACKAGE: Final = "mooncake-transfer-engine-non-cuda"
WRITTEN: Final = "written"


class EngineWire:
    """One engine, and where the other one's memory lies."""

    def __init__(self, engine: Any, control: Control) -> None:
        self._engine = engine
        self._control = control
        landing = _address(control.landing[0]) if control.landing else 0
        control.tell(f"{HOST}:{engine.get_rpc_port()} {landing}")
        self._other, _, address = control.hear().partition(" ")
        self._remote = int(address)
        self._addresses: dict[int, int] = {}

    def send(self, message: memoryview) -> None:
        """Write into the other's memory, and tell it; an acknowledgement is the latter alone."""
        if len(message) > 1:
            key = id(message)
            if key not in self._addresses:
                self._addresses[key] = _address(message)
            status = self._engine.transfer_sync_write(self._other, self._addresses[key], self._remote, len(message))
            if status:
                raise ConnectionError(f"transfer_sync_write returned {status}")
        self._control.tell(WRITTEN)

    def receive(self, into: memoryview) -> memoryview:
        """Wait to be told; the message lies in ``into`` already."""
        self._control.hear()
        return into


class MooncakeTcp:
    most_connections = 1

    def available(self) -> str:
        try:
            importlib.import_module("mooncake.engine")  # its wheel may be there, and a library of the system's not
        except ImportError as error:
            hint = "; it needs Debian's libibverbs1, too" if "libibverbs" in str(error) else ""
            return f"{error}: pip install {PACKAGE}{hint}"
        return ""

    def serve(self, control: Control) -> None:
        with _engine(control) as engine:
            exchange.serve(control, EngineWire(engine, control))

    def drive(self, control: Control) -> None:
        with _engine(control) as engine:
            exchange.drive(control, EngineWire(engine, control))


@contextlib.contextmanager
def _engine(control: Control) -> Iterator[Any]:
    """Make an engine with the memory of this side registered."""
    os.environ["MC_FORCE_TCP"] = "1"
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""):
        raise ConnectionError("the engine could not be initialized")
    memories = [memory for memory in (control.message, *control.landing) if len(memory)]
    for memory in memories:
        if engine.register_memory(_address(memory), len(memory)):
            raise MemoryError("the engine refused to register memory")
    yield engine
    for memory in memories:
        engine.unregister_memory(_address(memory))


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
