"""The wire of the lab: a learning switch that NICs, host processes and captures are plugged into.

All of it is synchronous and single-threaded. ``Switch.send`` returns when every port that the packet goes to has taken
it; a port may itself send while it takes one, and that packet waits its turn instead of recursing. What is sent
belongs to the wire: neither its sender nor a receiver changes the bytes any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final, Protocol, TypeAlias

from devmem_tcp.lab.frames import ETHERNET_BYTES, FrameBytes

_MAC_BYTES: Final = 6
_GROUP_BIT: Final = 0x01  # of a MAC address's first byte: multicast or broadcast


@dataclass(slots=True)
class Packet:
    """One Ethernet frame on the wire, or a TCP superframe that stands for several.

    ``data`` has no frame check sequence. In a superframe the headers are those of the first segment but for lengths
    and flags; its checksums cover it whole. It is as good as the segments: who takes it may cut it (``segment``) or
    hand it on as one (RSC).
    """

    data: FrameBytes
    gso_size: int = 0  #: 0: a plain frame; otherwise payload bytes of each segment of this superframe
    checksum_ok: bool = True  #: the sender vouches for the transport checksum, which is filled in


class Port(Protocol):
    """What can be plugged into a switch. ``name`` tells it from the others, in counters and captures."""

    @property
    def name(self) -> str: ...

    def deliver(self, packet: Packet) -> None:
        """Take a packet that the switch has for this port, or drop it and count that; never block.

        May call ``Switch.send``. An exception is a fault of the port: it leaves the ``send`` that led here.
        """


class Direction(Enum):
    """Which way a packet passed a port, as who is plugged in there sees it."""

    SENT = "sent"
    DELIVERED = "delivered"


Tap: TypeAlias = Callable[[Port, Direction, Packet], None]
"""Sees every packet at every port: when the switch takes it, and just before it is delivered. Must not send."""


@dataclass(slots=True)
class PortCounters:
    """What passed one port since it was attached. A superframe is one packet; bytes count Ethernet headers."""

    sent_packets: int = 0
    sent_bytes: int = 0
    delivered_packets: int = 0
    delivered_bytes: int = 0
    flooded: int = 0  #: of those sent, how many went to all other ports
    filtered: int = 0  #: of those sent, how many were for this very port, and went nowhere
    dropped: int = 0  #: sent, but too short for Ethernet, or while too many packets were waiting


class Switch:
    """An Ethernet switch: learns which port a MAC address is behind, floods what it does not know.

    Broadcast, multicast and unknown addresses go to all ports but the sender's. There is no loop protection: plug no
    two ports of one switch together.

    Args:
        max_addresses: how many MAC addresses are remembered; the one learnt first makes room for a new one.
        max_waiting: how many packets may wait while another is delivered; more are dropped and counted.
    """

    def __init__(self, *, max_addresses: int = 1024, max_waiting: int = 1024) -> None:
        self._max_addresses: Final = max_addresses
        self._max_waiting: Final = max_waiting
        self._counters: dict[Port, PortCounters] = {}
        self._addresses: dict[bytes, Port] = {}
        self._taps: list[Tap] = []
        self._waiting: deque[tuple[Port, Packet]] = deque()
        self._forwarding = False

    @property
    def counters(self) -> Mapping[Port, PortCounters]:
        """The live counters of every attached port."""
        return MappingProxyType(self._counters)

    @property
    def addresses(self) -> Mapping[bytes, Port]:
        """The MAC addresses learnt, 6 bytes each, and the port that each is behind."""
        return MappingProxyType(self._addresses)

    def attach(self, port: Port) -> None:
        """Plug a port in.

        Raises:
            ValueError: it is plugged in already, or another of its name is.
        """
        if any(port.name == other.name for other in self._counters):
            raise ValueError(f"a port named {port.name!r} is attached already")
        self._counters[port] = PortCounters()

    def detach(self, port: Port) -> None:
        """Pull a port out, and forget its counters and the addresses behind it. What it has sent still arrives.

        Raises:
            ValueError: it is not plugged in.
        """
        self._check_attached(port)
        del self._counters[port]
        self._addresses = {mac: owner for mac, owner in self._addresses.items() if owner is not port}

    def add_tap(self, tap: Tap) -> None:
        """Let ``tap`` see every packet from now on."""
        self._taps.append(tap)

    def remove_tap(self, tap: Tap) -> None:
        """Show ``tap`` no more packets.

        Raises:
            ValueError: it was not added.
        """
        self._taps.remove(tap)

    def send(self, source: Port, packet: Packet) -> None:
        """Forward a packet that ``source`` sends; from within a ``deliver``, after what is already on its way.

        Raises:
            ValueError: ``source`` is not plugged in.
        """
        self._check_attached(source)
        counters = self._counters[source]
        if len(packet.data) < ETHERNET_BYTES or len(self._waiting) >= self._max_waiting:
            counters.dropped += 1
            return
        self._waiting.append((source, packet))
        if self._forwarding:
            return
        self._forwarding = True
        try:
            while self._waiting:
                self._forward(*self._waiting.popleft())
        finally:
            self._forwarding = False

    def _check_attached(self, port: Port) -> None:
        if port not in self._counters:
            raise ValueError(f"no port {port.name!r} is attached")

    def _forward(self, source: Port, packet: Packet) -> None:
        size = len(packet.data)
        destination = bytes(packet.data[:_MAC_BYTES])
        counters = self._counters.get(source)
        if counters is None:  # detached while this packet waited
            counters = PortCounters()
        else:
            self._learn(bytes(packet.data[_MAC_BYTES : 2 * _MAC_BYTES]), source)
        counters.sent_packets += 1
        counters.sent_bytes += size
        for tap in self._taps:
            tap(source, Direction.SENT, packet)

        target = self._addresses.get(destination)  # a group address is never learnt
        if target is None:
            counters.flooded += 1
            for port in list(self._counters):
                if port is not source:
                    self._deliver(port, packet, size)
        elif target is source:
            counters.filtered += 1
        else:
            self._deliver(target, packet, size)

    def _learn(self, mac: bytes, port: Port) -> None:
        if self._addresses.get(mac) is port or mac[0] & _GROUP_BIT:
            return
        if mac not in self._addresses and len(self._addresses) >= self._max_addresses:
            del self._addresses[next(iter(self._addresses))]
        self._addresses[mac] = port

    def _deliver(self, port: Port, packet: Packet, size: int) -> None:
        counters = self._counters.get(port)
        if counters is None:  # detached by a port that was served before it
            return
        counters.delivered_packets += 1
        counters.delivered_bytes += size
        for tap in self._taps:
            tap(port, Direction.DELIVERED, packet)
        port.deliver(packet)
