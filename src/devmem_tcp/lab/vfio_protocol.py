"""The vfio-user protocol as data: commands, flags, layouts, and what a header must look like. No I/O.

Facts from the specification (QEMU, docs/interop/vfio-user.rst), whose layouts are those of linux/vfio.h, and from its
client (QEMU, hw/vfio-user/). All fields are in the byte order of the host; the lab runs on little-endian machines.
"""

from __future__ import annotations

import errno as _errno
import json
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final, NamedTuple

from devmem_tcp.errors import RemoteProtocolError


class Command(IntEnum):
    """Commands a client sends that the server answers. The others of the specification are refused."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DEVICE_RESET = 13


class IrqSet(IntFlag):
    """Flags of DEVICE_SET_IRQS: one says what data there is, one what to do."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    MASK = 1 << 3
    UNMASK = 1 << 4
    TRIGGER = 1 << 5


HEADER: Final = Struct("<HHIII")  # id, command, size of the whole message, flags, errno
TYPE_MASK: Final = 0xF
TYPE_REQUEST: Final = 0
REPLY: Final = 1
NO_REPLY: Final = 0x10
ERROR: Final = 0x20

VERSION: Final = Struct("<HH")  # major, minor; then JSON and a NUL
DMA_MAP: Final = Struct("<IIQQQ")  # argsz, flags, file offset, address, size
DMA_UNMAP: Final = Struct("<IIQQ")  # argsz, flags, address, size
DEVICE_INFO: Final = Struct("<IIII")  # argsz, flags, regions, interrupt kinds
REGION_INFO: Final = Struct("<IIIIQQ")  # argsz, flags, index, capability offset, size, mmap offset
REGION_IO_FDS: Final = Struct("<IIII")  # argsz, flags, index, count
IRQ_INFO: Final = Struct("<IIII")  # argsz, flags, index, count
IRQ_SET: Final = Struct("<IIIII")  # argsz, flags, index, start, count; then a byte for each with DATA_BOOL
REGION_ACCESS: Final = Struct("<QII")  # offset, region, count; then the data

MAP_READABLE: Final = 1 << 0
MAP_WRITABLE: Final = 1 << 1
UNMAP_ALL: Final = 1 << 1
DEVICE_RESETS: Final = 1 << 0
DEVICE_IS_PCI: Final = 1 << 1
REGION_READ_WRITE: Final = 3
IRQ_EVENTFD: Final = 1 << 0

BARS: Final = 6  # regions 0 to 5
CONFIG_REGION: Final = 7  # 6 is the expansion ROM, 8 is VGA: both have size 0 here
REGIONS: Final = 9
CONFIG_BYTES: Final = 256
MSIX_IRQ: Final = 2  # 0 INTx, 1 MSI, 3 error, 4 request: none of them here
IRQ_KINDS: Final = 5

MAX_MESSAGE_FDS: Final = 16
MAX_TRANSFER: Final = 1 << 20  # bytes of data in one region access
MAX_MESSAGE: Final = HEADER.size + REGION_ACCESS.size + MAX_TRANSFER
MAX_VERSION: Final = 4096  # bytes of a VERSION request without its header; QEMU sends about 200


class Refused(RemoteProtocolError):
    """A request was refused, and had no effect; ``errno`` is what the client is answered."""

    def __init__(self, message: str, *, errno: int = _errno.EINVAL, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class Header(NamedTuple):
    """The header of a request. ``size`` counts the whole message in bytes, header included."""

    id: int
    command: int
    size: int
    no_reply: bool


def parse_header(data: bytes | bytearray, offset: int = 0) -> Header:
    """Read the header of a request: 16 bytes at ``offset``.

    Raises:
        RemoteProtocolError: the stream cannot be trusted from here on: a size that is too small or too large, or no
            request (the server sends none, so it awaits no reply).
    """
    message_id, command, size, flags, _ = HEADER.unpack_from(data, offset)
    if not HEADER.size <= size <= MAX_MESSAGE:
        raise RemoteProtocolError(f"message of {size} bytes; {HEADER.size} to {MAX_MESSAGE} are possible")
    if flags & TYPE_MASK != TYPE_REQUEST:
        raise RemoteProtocolError(f"message with flags {flags:#x} is not a request")
    return Header(message_id, command, size, bool(flags & NO_REPLY))


def build_reply(header: Header, payload: bytes) -> bytes:
    """Return the reply to a request, with its payload."""
    return HEADER.pack(header.id, header.command, HEADER.size + len(payload), REPLY, 0) + payload


def build_error(header: Header, errno: int) -> bytes:
    """Return the error reply to a request: a header alone."""
    return HEADER.pack(header.id, header.command, HEADER.size, REPLY | ERROR, errno)


def build_version(max_dma_maps: int) -> bytes:
    """Return the payload of the reply to VERSION: version 0.0 and what the server can do.

    ``write_multiple`` and twin sockets are not offered, so a client uses neither.
    """
    capabilities = {
        "max_msg_fds": MAX_MESSAGE_FDS,
        "max_data_xfer_size": MAX_TRANSFER,
        "max_dma_maps": max_dma_maps,
        "pgsizes": 4096,
    }
    return VERSION.pack(0, 0) + json.dumps({"capabilities": capabilities}, separators=(",", ":")).encode() + b"\0"


def check_version(payload: bytes) -> None:
    """Check a VERSION request: major version 0, and capabilities, if any, as a JSON object that ends in NUL.

    ``payload`` has 4 to ``MAX_VERSION`` bytes. What the client can do makes no difference here: the server sends no
    requests, and no fds.

    Raises:
        Refused: EINVAL.
    """
    major, minor = VERSION.unpack_from(payload)
    if major != 0:
        raise Refused(f"the client speaks version {major}.{minor}, the server 0.0")
    text = payload[VERSION.size :]
    if not text:
        return
    try:
        capabilities = json.loads(text[:-1].decode()) if text.endswith(b"\0") else None
    except (ValueError, RecursionError):
        capabilities = None
    if not isinstance(capabilities, dict):
        raise Refused("the capabilities are no JSON object that ends in NUL")
