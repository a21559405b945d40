"""Faults to inject into what a NIC receives: seeded, and settable while it runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from math import inf
from random import Random
from typing import Final

from devmem_tcp.lab.frames import parse
from devmem_tcp.lab.wire import Packet

_BITS_PER_BYTE: Final = 8


@dataclass(frozen=True, slots=True)
class FaultSettings:
    """What goes wrong, and how often. All zero: nothing.

    Limits: ``corrupt`` on a bound queue makes Linux 7.3 warn (net/core/skbuff.c, skb_checksum): the driver leaves a bad
    checksum to the stack, which cannot sum up what it cannot read.

    Raises:
        ValueError: a probability outside 0 to 1, another below 0, infinite, or not whole where it must be.
    """

    drop: float = 0.0  #: probability that a packet is lost
    corrupt: float = 0.0  #: probability that a bit of its payload flips, so that its checksum is wrong
    duplicate: float = 0.0  #: probability that it arrives twice
    reorder: float = 0.0  #: probability that it is overtaken by those of the next ``reorder_s``
    reorder_s: float = 0.001  #: seconds
    delay_s: float = 0.0  #: seconds that every packet takes
    rate_bps: int = 0  #: bits a second that get through; 0: any number
    rate_queue_bytes: int = 1 << 20  #: bytes that wait their turn at ``rate_bps``; what comes then is lost
    header_payload_bytes: int = 0  #: payload bytes that land in the header buffer with the headers
    unsplit_every: int = 0  #: every n-th packet that should be split is not; 0: none
    withheld_buffers: int = 0  #: so many of the buffers that each queue has been given are not used
    link_flap_s: float = 0.0  #: seconds after which the link goes down, then up, and so on; 0: it stays

    def __post_init__(self) -> None:
        for name in ("drop", "corrupt", "duplicate", "reorder"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, 0 to 1, got {getattr(self, name)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < inf:
                raise ValueError(f"{field.name} must be finite and not negative, got {value}")
            if isinstance(field.default, int) and not isinstance(value, int):
                raise ValueError(f"{field.name} is a whole number, got {value}")

    @property
    def touches_packets(self) -> bool:
        """Whether a packet may be lost, changed, multiplied or late."""
        return bool(self.hits_single_packets or self.delay_s or self.rate_bps)

    @property
    def hits_single_packets(self) -> bool:
        """Whether chance picks packets, so that a superframe must be cut before: on a wire there are none."""
        return bool(self.drop or self.corrupt or self.duplicate or self.reorder)

    @property
    def touches_splits(self) -> bool:
        """Whether packets may be split elsewhere than behind their headers."""
        return bool(self.unsplit_every or self.header_payload_bytes)


class Faults:
    """The faults of one NIC: settings that may change at any time, and what has happened because of them.

    With the same seed and packets, and the same settings at the same packets, the same things happen.

    Args:
        seed: of everything random here.
        settings: by keyword, as FaultSettings.
    """

    def __init__(self, seed: int = 0, **settings: float) -> None:
        self.seed: Final = seed
        self.settings = FaultSettings()
        self.counts: Counter[str] = Counter()  #: how often each fault happened
        self._random = Random(seed)
        self._line_free_s = 0.0  # when the rate-limited line has sent what was given to it
        self._splits = 0
        self.set(**settings)

    def set(self, **changes: float) -> FaultSettings:
        """Change settings, by keyword, and return all of them. Whole numbers may come as floats, as from JSON.

        Raises:
            ValueError: no such setting, or a value out of range. Nothing has changed.
        """
        known = {field.name: field.default for field in fields(FaultSettings)}
        unknown = changes.keys() - known
        if unknown:
            raise ValueError(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
        values = {
            name: int(value) if isinstance(known[name], int) and float(value).is_integer() else value
            for name, value in changes.items()
        }
        self.settings = replace(self.settings, **values)  # type: ignore[arg-type]  # the class checks them
        return self.settings

    def arrivals(self, packet: Packet, now_s: float) -> list[tuple[float, Packet]]:
        """Say what becomes of a packet: (time, packet) for each that arrives; none if it is lost.

        Args:
            packet: no superframe if ``settings.hits_single_packets``.
            now_s: the time, in seconds of any clock that does not go back.
        """
        settings = self.settings
        if self._happens("drop", settings.drop):
            return []
        if self._happens("corrupt", settings.corrupt):
            packet = self._corrupted(packet)
        copies = 2 if self._happens("duplicate", settings.duplicate) else 1
        arrivals = []
        for _ in range(copies):
            due_s = now_s + settings.delay_s
            if settings.rate_bps:
                size = len(packet.data)
                wait_s = max(self._line_free_s - now_s, 0.0)
                if wait_s * settings.rate_bps > settings.rate_queue_bytes * _BITS_PER_BYTE:
                    self.counts["rate_bps"] += 1
                    continue
                self._line_free_s = now_s + wait_s + size * _BITS_PER_BYTE / settings.rate_bps
                due_s = self._line_free_s + settings.delay_s
            if self._happens("reorder", settings.reorder):
                due_s += settings.reorder_s
            arrivals.append((due_s, packet))
        return arrivals

    def header_bytes(self, header_bytes: int, packet_bytes: int, capacity: int) -> int:
        """Say how many bytes of a packet go to the header buffer, where ``header_bytes`` should; 0: it is not split.

        Args:
            header_bytes: of its headers.
            packet_bytes: of all of it.
            capacity: what a header buffer holds.
        """
        settings = self.settings
        if settings.unsplit_every:
            self._splits += 1
            if self._splits % settings.unsplit_every == 0:
                self.counts["unsplit_every"] += 1
                return 0
        extra = min(settings.header_payload_bytes, packet_bytes - header_bytes, capacity - header_bytes)
        if extra > 0:
            self.counts["header_payload_bytes"] += 1
            return header_bytes + extra
        return header_bytes

    def _happens(self, fault: str, probability: float) -> bool:
        happens = probability > 0 and self._random.random() < probability
        if happens:
            self.counts[fault] += 1
        return happens

    def _corrupted(self, packet: Packet) -> Packet:
        """Flip a bit of the payload, or of the last byte where there is none."""
        data = bytearray(packet.data)
        parsed = parse(data)
        if parsed.payload_length:
            place = parsed.payload_offset + self._random.randrange(parsed.payload_length)
        else:
            place = max(parsed.payload_offset - 1, 0)
        data[place] ^= 1 << self._random.randrange(8)
        return Packet(data, 0, False)
