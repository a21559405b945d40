"""The register window of the gVNIC, BAR0, as data: big-endian fields, who may write them, what their bits mean.

Layout: drivers/net/ethernet/google/gve/gve_register.h, struct gve_registers.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final, NamedTuple

BAR_REGISTERS: Final = 0
BAR_MSIX: Final = 1
BAR_DOORBELLS: Final = 2
BAR_BYTES: Final = 4096
DOORBELL_BYTES: Final = 4
DOORBELLS: Final = BAR_BYTES // DOORBELL_BYTES


class DeviceStatus(IntFlag):
    """What the device tells the driver."""

    RESET = 1 << 1  # the device asks to be reset
    LINK = 1 << 2
    REPORT_STATS = 1 << 3
    IS_RESET = 1 << 4  # a reset that the driver asked for is done


class DriverStatus(IntFlag):
    """What the driver tells the device."""

    RUN = 1 << 0
    RESET = 1 << 1


class Register(NamedTuple):
    """One register: where it is, how many bytes it has, whether the driver may write it."""

    offset: int
    size: int
    writable: bool


DEVICE_STATUS: Final = Register(0x00, 4, False)
DRIVER_STATUS: Final = Register(0x04, 4, True)
MAX_TX_QUEUES: Final = Register(0x08, 4, False)
MAX_RX_QUEUES: Final = Register(0x0C, 4, False)
ADMINQ_PFN: Final = Register(0x10, 4, True)  # of PCI revision 0 only; this device is revision 1
ADMINQ_DOORBELL: Final = Register(0x14, 4, True)
ADMINQ_COUNTER: Final = Register(0x18, 4, False)
DRIVER_VERSION: Final = Register(0x1F, 1, True)  # the driver spells its version here, a byte at a time
ADMINQ_BASE_HIGH: Final = Register(0x20, 4, True)
ADMINQ_BASE_LOW: Final = Register(0x24, 4, True)
ADMINQ_LENGTH: Final = Register(0x28, 2, True)

REGISTERS: Final = {
    register.offset: register
    for register in (
        DEVICE_STATUS,
        DRIVER_STATUS,
        MAX_TX_QUEUES,
        MAX_RX_QUEUES,
        ADMINQ_PFN,
        ADMINQ_DOORBELL,
        ADMINQ_COUNTER,
        DRIVER_VERSION,
        ADMINQ_BASE_HIGH,
        ADMINQ_BASE_LOW,
        ADMINQ_LENGTH,
    )
}


class RegisterFile:
    """The bytes of BAR0. Says nothing about what a write leads to: that is the device's business."""

    def __init__(self) -> None:
        self._bytes = bytearray(BAR_BYTES)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes as the driver sees them, big-endian fields and all."""
        return bytes(self._bytes[offset : offset + size])

    def __getitem__(self, register: Register) -> int:
        return int.from_bytes(self._bytes[register.offset : register.offset + register.size], "big")

    def __setitem__(self, register: Register, value: int) -> None:
        self._bytes[register.offset : register.offset + register.size] = value.to_bytes(register.size, "big")

    def written(self, offset: int, data: bytes) -> Register | None:
        """Take the driver's write; return the register, or None if no writable one has this place and size."""
        register = REGISTERS.get(offset)
        if register is None or not register.writable or register.size != len(data):
            return None
        self._bytes[offset : offset + len(data)] = data
        return register
