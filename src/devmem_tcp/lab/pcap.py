"""Capture packets to a pcapng file, which tshark, Wireshark and tcpdump read.

One interface for each port, added when its first packet passes. Times are nanoseconds. A superframe is written whole,
with a comment that says so. Format: draft-ietf-opsawg-pcapng.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from struct import Struct
from typing import BinaryIO, Final

from devmem_tcp.lab.wire import Direction, Packet, Port

_LOG: Final = logging.getLogger(__name__)

_SECTION_HEADER: Final = 0x0A0D0D0A
_INTERFACE: Final = 1
_ENHANCED_PACKET: Final = 6

_BYTE_ORDER_MAGIC: Final = 0x1A2B3C4D
_VERSION: Final = (1, 0)
_LENGTH_UNKNOWN: Final = -1
_LINKTYPE_ETHERNET: Final = 1

_OPTION_END: Final = 0
_OPTION_COMMENT: Final = 1
_OPTION_APPLICATION: Final = 4  # of a section
_OPTION_NAME: Final = 2  # of an interface
_OPTION_TIME_RESOLUTION: Final = 9
_OPTION_FLAGS: Final = 2  # of a packet
_NANOSECONDS: Final = bytes([9])
_FLAGS: Final = {Direction.DELIVERED: 1, Direction.SENT: 2}  # inbound, outbound

_BLOCK: Final = Struct("<II")  # type; total length, which comes once more at the end
_TOTAL_LENGTH: Final = Struct("<I")
_SECTION: Final = Struct("<IHHq")
_INTERFACE_BODY: Final = Struct("<HxxI")  # link type; snap length
_PACKET: Final = Struct("<IIIII")  # interface; time, high and low; captured length; length on the wire
_OPTION: Final = Struct("<HH")
_U32: Final = Struct("<I")

_OVERHEAD: Final = _BLOCK.size + _TOTAL_LENGTH.size


class PcapWriter:
    """Writes packets to a pcapng file: ``switch.add_tap(writer)`` captures a switch's ports.

    A packet that crosses the switch is captured at each port it passes, each time with that port's direction. Should
    the file fail (a full disk), the capture ends there and ``failure`` says why; the traffic goes on.

    Args:
        file: an open binary file, which stays its opener's to close, after the writer was taken off the switch.
        ports: names of the ports to capture; None: all.
        snap_length: how many bytes of each packet to keep; 0: all.
        clock: returns the time in nanoseconds since the epoch, for packets written without one.

    Raises:
        ValueError: ``snap_length`` is negative.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        ports: Collection[str] | None = None,
        snap_length: int = 0,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        if snap_length < 0:
            raise ValueError(f"a snap length is 0 (everything) or positive, got {snap_length}")
        self._file = file
        self._ports = None if ports is None else frozenset(ports)
        self._snap_length: Final = snap_length
        self._clock: Final = clock
        self._interfaces: dict[str, int] = {}
        self.packets = 0  #: written so far
        self.failure: OSError | None = None  #: what ended the capture early
        options = _option(_OPTION_APPLICATION, b"devmem-tcp lab") + _option(_OPTION_END)
        self._write_block(_SECTION_HEADER, _SECTION.pack(_BYTE_ORDER_MAGIC, *_VERSION, _LENGTH_UNKNOWN) + options)

    def __call__(self, port: Port, direction: Direction, packet: Packet) -> None:
        """Write a packet if its port is one to capture; this makes the writer a tap. Never raises OSError."""
        if self.failure is not None or (self._ports is not None and port.name not in self._ports):
            return
        try:
            self.write(port.name, direction, packet)
        except OSError as error:
            self.failure = error
            _LOG.warning("capture ends after %d packets: %s", self.packets, error)

    def write(self, port: str, direction: Direction, packet: Packet, *, time_ns: int | None = None) -> None:
        """Write one packet.

        Args:
            port: the name of the port that it passed.
            direction: as that port's side sees it: what it SENT is outbound, what is DELIVERED to it inbound.
            packet: headers and payload are written, up to the snap length.
            time_ns: nanoseconds since the epoch; None: now, by the clock.

        Raises:
            OSError: the file cannot be written.
        """
        interface = self._interfaces.get(port)
        if interface is None:
            interface = self._add_interface(port)
        time_ns = self._clock() if time_ns is None else time_ns
        size = len(packet.data)
        kept = packet.data[: self._snap_length] if self._snap_length else packet.data
        body = _PACKET.pack(interface, time_ns >> 32, time_ns & 0xFFFFFFFF, len(kept), size)
        options = _option(_OPTION_FLAGS, _U32.pack(_FLAGS[direction]))
        if packet.gso_size:
            options += _option(_OPTION_COMMENT, f"superframe, MSS {packet.gso_size}".encode())
        self._write_block(_ENHANCED_PACKET, b"".join((body, kept, _padding(len(kept)), options, _option(_OPTION_END))))
        self.packets += 1

    def flush(self) -> None:
        """Hand what is buffered to the operating system, so that a reader sees every packet written."""
        self._file.flush()

    def _add_interface(self, port: str) -> int:
        number = self._interfaces[port] = len(self._interfaces)
        options = (
            _option(_OPTION_NAME, port.encode()),
            _option(_OPTION_TIME_RESOLUTION, _NANOSECONDS),
            _option(_OPTION_END),
        )
        self._write_block(_INTERFACE, _INTERFACE_BODY.pack(_LINKTYPE_ETHERNET, self._snap_length) + b"".join(options))
        return number

    def _write_block(self, kind: int, body: bytes) -> None:
        """Write one block in one call; ``body`` is a multiple of 4 bytes."""
        total = _OVERHEAD + len(body)
        self._file.write(b"".join((_BLOCK.pack(kind, total), body, _TOTAL_LENGTH.pack(total))))


def _option(code: int, value: bytes = b"") -> bytes:
    return _OPTION.pack(code, len(value)) + value + _padding(len(value))


def _padding(size: int) -> bytes:
    return bytes(-size % 4)
