"""nixl with its UCX backend, TCP alone: each message is a WRITE into the other side's registered memory.

A notification with every WRITE tells the receiver that a message is whole. Left free, UCX takes shared memory between
two processes of one machine, which compares with nothing here.
"""

from __future__ import annotations

import base64
import ctypes
import os
import time
from typing import Any, Final

from peers import exchange
from peers.contract import missing
from peers.control import Control

NOTE: Final = b"message"
IN_PROGRESS: Final = "PROC"


class AgentWire:
    """One agent, and what it knows of the other: where its memory lies."""

    def __init__(self, agent: Any, control: Control) -> None:
        self._agent = agent
        self._memories = [memory for memory in (control.message, *control.landing) if len(memory)]
        self._registered = agent.register_memory([_region(memory) for memory in self._memories], "DRAM")
        where = control.landing or [control.message]  # nothing is ever written to a driver that only sends
        landing = agent.get_xfer_descs([_region(memory)[:3] for memory in where], "DRAM")
        control.tell(_text(agent.get_agent_metadata()))
        control.tell(_text(agent.get_serialized_descs(landing)))
        self._other = agent.add_remote_agent(_bytes(control.hear()))
        self._remote = agent.deserialize_descs(_bytes(control.hear()))
        self._writes: dict[int, Any] = {}
        self._notes = 0

    def send(self, message: memoryview) -> None:
        """Write into the other's memory and wait until that is done; an acknowledgement is a notification alone."""
        if len(message) == 1:
            self._agent.send_notif(self._other, NOTE)
            return
        write = self._write(message)
        state = self._agent.transfer(write)
        while state == IN_PROGRESS:
            time.sleep(0)
            state = self._agent.check_xfer_state(write)
        if state != "DONE":
            raise ConnectionError(f"a transfer ended as {state}")

    def receive(self, into: memoryview) -> memoryview:
        """Wait for the next notification; the message lies in ``into`` already."""
        while not self._notes:
            self._notes += sum(len(notes) for notes in self._agent.get_new_notifs().values())
            time.sleep(0)
        self._notes -= 1
        return into

    def close(self) -> None:
        """Let go of the memory and of the other agent."""
        for write in self._writes.values():
            self._agent.release_xfer_handle(write)
        self._agent.remove_remote_agent(self._other)
        self._agent.deregister_memory(self._registered)

    def _write(self, message: memoryview) -> Any:
        """Return the transfer of this memory; it is made once and posted again and again."""
        key = id(message)
        if key not in self._writes:
            local = self._agent.get_xfer_descs([_region(message)[:3]], "DRAM")
            self._writes[key] = self._agent.initialize_xfer("WRITE", local, self._remote, self._other, NOTE)
        return self._writes[key]


class NixlUcx:
    most_connections = 1

    def available(self) -> str:
        return missing("nixl", "nixl")

    def serve(self, control: Control) -> None:
        wire = AgentWire(_agent("server"), control)
        exchange.serve(control, wire)
        wire.close()

    def drive(self, control: Control) -> None:
        wire = AgentWire(_agent("driver"), control)
        exchange.drive(control, wire)
        wire.close()


def _agent(name: str) -> Any:
    os.environ |= {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
    from nixl import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def _region(memory: memoryview) -> tuple[int, int, int, str]:
    """Describe memory as nixl wants it: address, size, number of the device, and a word of no meaning."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory), 0, ""


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
