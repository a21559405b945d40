"""From the wire to an RX queue: steering, checksums, header split, superframes whole or cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from devmem_tcp.lab.checksum import verify_ip, verify_l4
from devmem_tcp.lab.frames import (
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    FrameBytes,
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
_MAX_IP_LENGTH: Final = 0xFFFF
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

    def receive(self, packets: Sequence[Packet]) -> None:
        """Steer packets to their queues and write them there; or drop them, and count that."""
        for packet, parsed, frames in _alike(packets):
            self._receive(packet, parsed, frames)

    def _receive(self, packet: Packet, parsed: ParsedFrame, frames: Sequence[FrameBytes]) -> None:
        """Receive one packet, or as many as there are ``frames``, which are like it."""
        if packet.gso_size and not (parsed.is_tcp and packet.gso_size <= _MAX_MSS):
            self._drops["malformed"] += 1
            return
        number, hash_value = self._state.choice.choose(parsed)
        queue = self._state.rx.get(number)
        if queue is None:
            self._drops["no_queue"] += len(frames)
        elif not packet.gso_size:
            status = _CHECKED if packet.checksum_ok else _judge_checksums(packet.data, parsed)
            self._put_frames(queue, frames, parsed, hash_value, status)
        elif not queue.rsc:
            self._put_frames(queue, self._segments(packet, parsed, packet.gso_size), parsed, hash_value, _CHECKED)
        elif _ip_length(parsed) <= _MAX_IP_LENGTH:
            self._put(queue, frames, parsed, hash_value, _CHECKED, packet.gso_size)
        else:
            self._put_large(queue, packet, parsed, hash_value)

    def cut(self, packet: Packet, parsed: ParsedFrame) -> list[Packet]:
        """Return the frames of a superframe; none, which is counted, if it is malformed."""
        return [Packet(frame) for frame in self._segments(packet, parsed, packet.gso_size)]

    def _segments(self, packet: Packet, parsed: ParsedFrame, size: int) -> list[bytes]:
        """Cut a superframe by ``size`` bytes of payload, whole segments; none, which is counted, if it is malformed."""
        try:
            return segment(packet.data, parsed.payload_offset, size, ids=size // packet.gso_size)
        except SegmentError:
            self._drops["malformed"] += 1
            return []

    def _put_large(self, queue: RxQueue, packet: Packet, parsed: ParsedFrame, hash_value: int) -> None:
        """Write a superframe that is too long for an IP header as several of the most segments that fit one."""
        headers, mss = parsed.payload_offset, packet.gso_size
        room = _MAX_IP_LENGTH - (_ip_length(parsed) - parsed.payload_length)
        for piece in self._segments(packet, parsed, max(room // mss, 1) * mss):
            payload_bytes = len(piece) - headers
            piece_parsed = parsed._replace(payload_length=payload_bytes)
            self._put(queue, [piece], piece_parsed, hash_value, _CHECKED, mss if payload_bytes > mss else 0)

    def _put_frames(
        self, queue: RxQueue, frames: Sequence[FrameBytes], parsed: ParsedFrame, hash_value: int, status: int
    ) -> None:
        """Write frames to their queue, but for those that are longer than the MTU lets through."""
        longest = self._state.mtu + parsed.l2_length
        fitting = [frame for frame in frames if len(frame) <= longest]
        too_long = len(frames) - len(fitting)
        queue.drops += too_long
        queue.drops_too_long += too_long
        if fitting:
            self._put(queue, fitting, parsed, hash_value, status)

    def _put(
        self,
        queue: RxQueue,
        frames: Sequence[FrameBytes],
        parsed: ParsedFrame,
        hash_value: int,
        status: int,
        gso_size: int = 0,
    ) -> None:
        """Write frames, alike but for their payload, to their queue, with all that the driver is told about them.

        Args:
            parsed: the first frame, or the superframe that it was cut of.
            status: _CHECKED, and what is wrong with the checksums; counts only where the transport is understood.
        """
        errors = header_bytes = 0
        if parsed.l4_length:
            kind = _PACKET_TYPES[parsed.version, parsed.protocol]
            if parsed.version == 6 and parsed.l3_length > _IPV6_BYTES:
                errors = _EXTENSION
            if queue.header_bytes and parsed.is_tcp:
                header_bytes = _split(queue, parsed, len(frames[0]))
                if parsed.payload_offset > queue.header_bytes:
                    status |= _HEADER_OVERFLOW
        else:
            kind = packet_type(_L3[parsed.version], L4.UNKNOWN)
            status = 0
        tag = RxTag(kind, status, errors, hash_value, gso_size)
        withheld = self._faults.settings.withheld_buffers
        if header_bytes and self._faults.settings.touches_splits:
            received = 0
            for frame in frames:
                faulty_bytes = self._faults.header_bytes(header_bytes, len(frame), queue.header_bytes)
                received += queue.receive([frame], faulty_bytes, tag, withheld)
        else:
            received = queue.receive(frames, header_bytes, tag, withheld)
        if status & _BAD_CHECKSUM:
            queue.bad_checksums += received


def _alike(packets: Sequence[Packet]) -> Iterator[tuple[Packet, ParsedFrame, list[FrameBytes]]]:
    """Group the frames of one flow that follow one another and differ in their payload alone: they land alike.

    Yields the first packet of each group, what was parsed of it, and the bytes of all.
    """
    first: tuple[Packet, ParsedFrame, list[FrameBytes]] | None = None
    shape: tuple[object, ...] | None = None  # of the group's headers; None: nothing is to be added to it
    for packet in packets:
        if isinstance(packet, ParsedPacket):
            parsed = packet.parsed
        else:
            parsed = parse(packet.data, superframe=packet.gso_size > 0)
        plain = packet.checksum_ok and not packet.gso_size and parsed.payload_length > 0
        own_shape = parsed[:-1] if plain else None  # but for the payload's length
        if first is not None:
            if shape is not None and own_shape == shape:
                first[2].append(packet.data)
                continue
            yield first
        first, shape = (packet, parsed, [packet.data]), own_shape
    if first is not None:
        yield first


def _ip_length(parsed: ParsedFrame) -> int:
    """Return what the IP header of a packet has to state as its length."""
    return parsed.l3_length + parsed.l4_bytes - (_IPV6_BYTES if parsed.version == 6 else 0)


def _split(queue: RxQueue, parsed: ParsedFrame, size: int) -> int:
    """Return how many bytes of a TCP packet should go to the header buffer; 0: it is not split.

    The device knows of no binding: a packet that a bound queue would have to drop is left whole, and dropped by the
    driver if it lands in memory that the stack cannot read (gve_rx_dqo).
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
        return size  # with Ethernet's padding, if any
    return headers


def _judge_checksums(frame: FrameBytes, parsed: ParsedFrame) -> int:
    status = _CHECKED
    if not verify_ip(frame, parsed):
        status |= RxStatus.IP_CHECKSUM_ERROR
    if not verify_l4(frame, parsed):
        status |= RxStatus.L4_CHECKSUM_ERROR
    return int(status)
