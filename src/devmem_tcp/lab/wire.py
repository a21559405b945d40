"""The wire of the lab: a learning switch that NICs, host processes and captures are plugged into.

All of it is synchronous and single-threaded. ``Switch.send`` returns when every port that the packet goes to has taken
it; a port may itself send while it takes one, and that packet waits its turn instead of recursing. What is sent
belongs to the wire: neither its sender nor a receiver changes the bytes any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final, Protocol, TypeAlias, runtime_checkable

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


@runtime_checkable
class TrainPort(Port, Protocol):
    """A port that takes packets that come one behind the other in one call, which is less work than one by one."""

    def deliver_train(self, packets: Sequence[Packet]) -> None:
        """Take packets, in order; otherwise as ``deliver``."""


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
        max_waiting: how many packets, or trains, may wait while another is delivered; more are dropped and counted.
    """

    def __init__(self, *, max_addresses: int = 1024, max_waiting: int = 1024) -> None:
        self._max_addresses: Final = max_addresses
        self._max_waiting: Final = max_waiting
        self._counters: dict[Port, PortCounters] = {}
        self._addresses: dict[bytes, Port] = {}
        self._taps: list[Tap] = []
        self._train_ports: dict[Port, TrainPort] = {}
        self._waiting: deque[tuple[Port, Sequence[Packet]]] = deque()
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
        if isinstance(port, TrainPort):
            self._train_ports[port] = port

    def detach(self, port: Port) -> None:
        """Pull a port out, and forget its counters and the addresses behind it. What it has sent still arrives.

        Raises:
            ValueError: it is not plugged in.
        """
        self._check_attached(port)
        del self._counters[port]
        self._train_ports.pop(port, None)
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
        self.send_train(source, (packet,))

    def send_train(self, source: Port, packets: Sequence[Packet]) -> None:
        """Forward packets that ``source`` sends one behind the other: as ``send`` of each, at less cost.

        Raises:
            ValueError: ``source`` is not plugged in.
        """
        self._check_attached(source)
        whole = [packet for packet in packets if len(packet.data) >= ETHERNET_BYTES]
        if len(self._waiting) >= self._max_waiting:
            whole.clear()
        self._counters[source].dropped += len(packets) - len(whole)
        if self._taps:  # one by one, so that a tap sees all of a packet's way before the next one's
            self._waiting.extend((source, (packet,)) for packet in whole)
        else:
            self._waiting.append((source, whole))
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

    def _forward(self, source: Port, packets: Sequence[Packet]) -> None:
        """Bring packets where they go; neighbours that go to the same port are delivered together."""
        together: list[Packet] = []
        target: Port | None = None
        for packet in packets:
            last, target = target, self._route(source, packet)
            if together and last is not None and target is not last:
                self._deliver(last, together)
                together = []
            if target is None:
                for port in list(self._counters):
                    if port is not source:
                        self._deliver(port, (packet,))
            elif target is not source:
                together.append(packet)
        if together and target is not None:
            self._deliver(target, together)

    def _route(self, source: Port, packet: Packet) -> Port | None:
        """Count and learn of a packet sent; return where it goes: one port, which may be its own, or None for all."""
        addresses = bytes(packet.data[: 2 * _MAC_BYTES])
        counters = self._counters.get(source)
        if counters is None:  # detached while this packet waited
            counters = PortCounters()
        elif self._addresses.get(addresses[_MAC_BYTES:]) is not source:
            self._learn(addresses[_MAC_BYTES:], source)
        counters.sent_packets += 1
        counters.sent_bytes += len(packet.data)
        for tap in self._taps:
            tap(source, Direction.SENT, packet)
        target = self._addresses.get(addresses[:_MAC_BYTES])  # a group address is never learnt
        if target is None:
            counters.flooded += 1
        elif target is source:
            counters.filtered += 1
        return target

    def _learn(self, mac: bytes, port: Port) -> None:
        if mac[0] & _GROUP_BIT:
            return
        if mac not in self._addresses and len(self._addresses) >= self._max_addresses:
            del self._addresses[next(iter(self._addresses))]
        self._addresses[mac] = port

    def _deliver(self, port: Port, packets: Sequence[Packet]) -> None:
        """Hand packets to a port: together, if it takes trains."""
        train_port = self._train_ports.get(port)
        for packet in packets:
            counters = self._counters.get(port)
            if counters is None:  # detached by a port that was served before it, or by itself
                return
            counters.delivered_packets += 1
            counters.delivered_bytes += len(packet.data)
            for tap in self._taps:
                tap(port, Direction.DELIVERED, packet)
            if train_port is None:
                port.deliver(packet)
        if train_port is not None:
            train_port.deliver_train(packets)
