"""The admin queue: a ring of 64-byte commands, big-endian, each answered in place by a status.

Layout and opcodes: drivers/net/ethernet/google/gve/gve_adminq.h; how the driver rings and waits: gve_adminq.c.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from devmem_tcp.lab.dma import DmaError
from devmem_tcp.lab.gvnic.commands import COMMANDS, CommandError, Status
from devmem_tcp.lab.gvnic.state import DeviceState

COMMAND_BYTES: Final = 64
_OPCODE: Final = Struct("!I4x")
_STATUS: Final = Struct("!I")
_COUNTER_MASK: Final = 0xFFFFFFFF


class AdminQueue:
    """The admin queue of one device.

    Args:
        state: what commands work on.
    """

    def __init__(self, state: DeviceState) -> None:
        self._state = state
        self._address = 0
        self._entries = 0
        self.counter = 0  #: commands done, modulo 2^32

    def start(self, address: int, size_bytes: int) -> None:
        """Take the ring that the driver made: whole commands, a power of two of them."""
        entries, rest = divmod(size_bytes, COMMAND_BYTES)
        self.counter = 0
        self._address, self._entries = address, entries
        if rest or entries & (entries - 1) or not entries:
            self._state.mistakes.note("adminq-size", f"an admin queue of {size_bytes} bytes")
            self._entries = 0

    def stop(self) -> None:
        """Forget the ring."""
        self._entries = 0
        self.counter = 0

    def doorbell(self, produced: int) -> None:
        """Do the commands up to number ``produced``, counted from the start of the ring, modulo 2^32."""
        count = (produced - self.counter) & _COUNTER_MASK
        if count > self._entries:
            self._state.mistakes.note("adminq-doorbell", f"{count} commands in a ring of {self._entries}")
            return
        for _ in range(count):
            self._execute(self._address + self.counter % self._entries * COMMAND_BYTES)
            self.counter = (self.counter + 1) & _COUNTER_MASK

    def _execute(self, address: int) -> None:
        """Do the command at ``address``, and write its status."""
        dma, mistakes = self._state.dma, self._state.mistakes
        try:
            command = bytes(dma.read(address, COMMAND_BYTES))
            status = self._run(command)
            dma.write(address + _OPCODE.size - _STATUS.size, _STATUS.pack(status))
        except DmaError as error:
            mistakes.note("adminq-ring", str(error))

    def _run(self, command: bytes) -> Status:
        (opcode,) = _OPCODE.unpack_from(command)
        known = COMMANDS.get(opcode)
        mistakes = self._state.mistakes
        if known is None:
            mistakes.note("adminq-opcode", f"admin command {opcode:#x}")
            return Status.UNIMPLEMENTED
        layout, execute = known
        try:
            execute(self._state, *layout.unpack_from(command, _OPCODE.size))
        except CommandError as error:
            mistakes.note("adminq-command", f"admin command {opcode:#x}: {error}")
            return error.status
        except DmaError as error:
            mistakes.note("adminq-address", f"admin command {opcode:#x}: {error}")
            return Status.INVALID_ARGUMENT
        return Status.PASSED
