"""From the wire to an RX queue: steering, checksums, header split, superframes whole or cut."""

from __future__ import annotations

from collections import Counter
from typing import Final

from devmem_tcp.lab.checksum import verify_ip, verify_l4
from devmem_tcp.lab.frames import (
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    ParsedFrame,
    parse,
)
from devmem_tcp.lab.gvnic.descriptors import L3, L4, RxError, RxStatus, packet_type
from devmem_tcp.lab.gvnic.faults import Faults
from devmem_tcp.lab.gvnic.rx import RxQueue, RxTag
from devmem_tcp.lab.gvnic.state import DeviceState
from devmem_tcp.lab.gvnic.tx import ParsedPacket
from devmem_tcp.lab.segments import SegmentError, segment
from devmem_tcp.lab.wire import Packet
from devmem_tcp.nicmodel.header_split import HeaderSplit, Placement
from devmem_tcp.types import HeaderSplitMode

_IPV6_BYTES: Final = 40
_MAX_MSS: Final = 0xFFFF  # that a completion can state
_SPLIT: Final = HeaderSplit(HeaderSplitMode.ON)
_L3: Final = {0: L3.UNKNOWN, 4: L3.IPV4, 6: L3.IPV6}
_L4: Final = {PROTOCOL_TCP: L4.TCP, PROTOCOL_UDP: L4.UDP, PROTOCOL_ICMP: L4.ICMP, PROTOCOL_ICMPV6: L4.ICMP}
_PACKET_TYPES: Final = {
    (version, protocol): packet_type(l3, l4) for version, l3 in _L3.items() for protocol, l4 in _L4.items() if version
}
"""Of packets whose transport header was understood."""

_CHECKED: Final = int(RxStatus.L3_L4_PROCESSED)
_BAD_CHECKSUM: Final = int(RxStatus.IP_CHECKSUM_ERROR | RxStatus.L4_CHECKSUM_ERROR)
_HEADER_OVERFLOW: Final = int(RxStatus.HEADER_OVERFLOW)
_EXTENSION: Final = int(RxError.IPV6_EXTENSION)


class Receiver:
    """What a device does with each packet that arrives.

    Args:
        state: the device's queues and steering.
        faults: what goes wrong.
        drops: counts packets that no queue ever saw, by reason.
    """

    def __init__(self, state: DeviceState, faults: Faults, drops: Counter[str]) -> None:
        self._state = state
        self._faults = faults
        self._drops = drops

    def receive(self, packet: Packet) -> None:
        """Steer a packet to its queue and write it there; or drop it, and count that."""
        if isinstance(packet, ParsedPacket):
            parsed = packet.parsed
        else:
            parsed = parse(packet.data, superframe=packet.gso_size > 0)
        if packet.gso_size and not (parsed.is_tcp and packet.gso_size <= _MAX_MSS):
            self._drops["malformed"] += 1
            return
        number, hash_value = self._state.choice.choose(parsed)
        queue = self._state.rx.get(number)
        if queue is None:
            self._drops["no_queue"] += 1
        elif not packet.gso_size:
            self._receive_frame(queue, packet, parsed, hash_value)
        elif queue.rsc:
            self._put(queue, packet, parsed, hash_value)
        else:
            for frame in self.cut(packet, parsed):
                self._receive_frame(queue, frame, parse(frame.data), hash_value)

    def cut(self, packet: Packet, parsed: ParsedFrame) -> list[Packet]:
        """Return the frames of a superframe; none, which is counted, if it is malformed."""
        try:
            return [Packet(frame) for frame in segment(packet.data, parsed.payload_offset, packet.gso_size)]
        except SegmentError:
            self._drops["malformed"] += 1
            return []

    def _receive_frame(self, queue: RxQueue, packet: Packet, parsed: ParsedFrame, hash_value: int) -> None:
        if len(packet.data) - parsed.l2_length > self._state.mtu:
            queue.drops += 1
            queue.drops_too_long += 1
            return
        self._put(queue, packet, parsed, hash_value)

    def _put(self, queue: RxQueue, packet: Packet, parsed: ParsedFrame, hash_value: int) -> None:
        """Write a packet to its queue, with all that the driver is told about it."""
        data = packet.data
        status = errors = header_bytes = 0
        if parsed.l4_length:
            kind = _PACKET_TYPES[parsed.version, parsed.protocol]
            status = _CHECKED if packet.checksum_ok else _judge_checksums(packet, parsed)
            if parsed.version == 6 and parsed.l3_length > _IPV6_BYTES:
                errors = _EXTENSION
            if queue.header_bytes and parsed.is_tcp:
                header_bytes = self._split(queue, parsed, len(data))
                if parsed.payload_offset > queue.header_bytes:
                    status |= _HEADER_OVERFLOW
        else:
            kind = packet_type(_L3[parsed.version], L4.UNKNOWN)
        tag = RxTag(kind, status, errors, hash_value, packet.gso_size)
        if queue.receive(data, header_bytes, tag, self._faults.settings.withheld_buffers) and status & _BAD_CHECKSUM:
            queue.bad_checksums += 1

    def _split(self, queue: RxQueue, parsed: ParsedFrame, size: int) -> int:
        """Return how many bytes of a TCP packet go to the header buffer; 0: it is not split.

        The device knows of no binding: a packet that a bound queue would have to drop is left whole, and dropped by
        the driver if it lands in memory that the stack cannot read (gve_rx_dqo).
        """
        headers = parsed.payload_offset
        placement = _SPLIT.place(
            tcp=True,
            payload_bytes=parsed.payload_length,
            header_bytes=headers,
            header_buffer_bytes=queue.header_bytes,
            bound=True,
        )
        if placement is Placement.DROP:
            return 0
        if placement is Placement.LINEAR and size <= queue.header_bytes:
            headers = size  # with Ethernet's padding, if any
        return self._faults.header_bytes(headers, size, queue.header_bytes)


def _judge_checksums(packet: Packet, parsed: ParsedFrame) -> int:
    status = _CHECKED
    if not verify_ip(packet.data, parsed):
        status |= RxStatus.IP_CHECKSUM_ERROR
    if not verify_l4(packet.data, parsed):
        status |= RxStatus.L4_CHECKSUM_ERROR
    return int(status)
