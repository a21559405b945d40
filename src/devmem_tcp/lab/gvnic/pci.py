"""PCI configuration space of the gVNIC: 256 bytes, three memory BARs, one capability, MSI-X."""

from __future__ import annotations

from struct import pack_into
from typing import Final

from devmem_tcp.lab.gvnic.registers import BAR_BYTES, BAR_DOORBELLS, BAR_MSIX, BAR_REGISTERS

CONFIG_BYTES: Final = 256
VENDOR_GOOGLE: Final = 0x1AE0
DEVICE_GVNIC: Final = 0x0042
REVISION: Final = 1  # 0 makes the driver pass the admin queue as a page number (gve_adminq.c, gve_adminq_alloc)
CLASS_ETHERNET: Final = 0x020000
MSIX_CAPABILITY: Final = 0x40
MSIX_CONTROL: Final = MSIX_CAPABILITY + 2
MSIX_PENDING_OFFSET: Final = 0x800
MSIX_ENTRY_BYTES: Final = 16
MAX_VECTORS: Final = MSIX_PENDING_OFFSET // MSIX_ENTRY_BYTES
BARS: Final = {BAR_REGISTERS: BAR_BYTES, BAR_MSIX: BAR_BYTES, BAR_DOORBELLS: BAR_BYTES}

_COMMAND: Final = 0x04
_STATUS_CAPABILITIES: Final = 0x10
_FIRST_BAR: Final = 0x10
_CAPABILITY_MSIX: Final = 0x11
_CAPABILITY_POINTER: Final = 0x34
_WRITABLE: Final = {
    _COMMAND: 0x0546,  # memory space, bus master, parity, SERR, interrupt disable
    0x0C: 0x00FF,  # cache line size
    0x3C: 0x00FF,  # interrupt line
    MSIX_CONTROL: 0xC000,  # enable, mask all
}
"""Writable bits of 16-bit words; those of the BARs follow from their sizes."""


def make_config(vectors: int) -> bytearray:
    """Return the configuration space of a device with ``vectors`` MSI-X vectors, after reset."""
    config = bytearray(CONFIG_BYTES)
    pack_into("<HHHH", config, 0, VENDOR_GOOGLE, DEVICE_GVNIC, 0, _STATUS_CAPABILITIES)
    pack_into("<I", config, 8, CLASS_ETHERNET << 8 | REVISION)
    pack_into("<HH", config, 0x2C, VENDOR_GOOGLE, DEVICE_GVNIC)  # subsystem
    config[_CAPABILITY_POINTER] = MSIX_CAPABILITY
    pack_into("<BBH", config, MSIX_CAPABILITY, _CAPABILITY_MSIX, 0, vectors - 1)
    pack_into("<II", config, MSIX_CAPABILITY + 4, BAR_MSIX, MSIX_PENDING_OFFSET | BAR_MSIX)
    return config


def _make_mask() -> bytes:
    mask = bytearray(CONFIG_BYTES)
    for offset, bits in _WRITABLE.items():
        pack_into("<H", mask, offset, bits)
    for bar, size in BARS.items():
        pack_into("<I", mask, _FIRST_BAR + 4 * bar, ~(size - 1) & 0xFFFFFFFF)
    return bytes(mask)


_MASK: Final = _make_mask()


def write_config(config: bytearray, offset: int, data: bytes) -> bool:
    """Write to configuration space, writable bits alone. Returns False, having done nothing, if out of range."""
    if offset < 0 or offset + len(data) > CONFIG_BYTES:
        return False
    for place, byte in enumerate(data, offset):
        config[place] = config[place] & ~_MASK[place] | byte & _MASK[place]
    return True
