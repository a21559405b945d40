"""A DQO transmit queue: descriptors to packets, completions back.

Format and rules: drivers/net/ethernet/google/gve/gve_desc_dqo.h and gve_tx_dqo.c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Final, TypeAlias

from devmem_tcp.lab.checksum import fill_l4_checksum, fill_l4_checksums
from devmem_tcp.lab.dma import DmaError, DmaSpace
from devmem_tcp.lab.frames import FlowParser, ParsedFrame, parse
from devmem_tcp.lab.gvnic import descriptors as dqo
from devmem_tcp.lab.gvnic.interrupts import NotifyBlock
from devmem_tcp.lab.gvnic.mistakes import Mistakes
from devmem_tcp.lab.gvnic.rings import CompletionFormat, CompletionRing, Ring
from devmem_tcp.lab.gvnic.uso import udp_segments
from devmem_tcp.lab.wire import Packet

_COMPLETIONS: Final = CompletionFormat(
    dqo.TX_COMPLETION, dqo.TX_GENERATION, dqo.TX_GENERATION_FIELD, dqo.TX_GENERATION_OFFSET
)
_END_OF_PACKET: Final = dqo.TX_END_OF_PACKET
_REPORT_EVENT: Final = dqo.TX_REPORT_EVENT
_PACKET: Final = int(dqo.TxType.PACKET)  # plain numbers: compared for every descriptor
_TSO_CONTEXT: Final = int(dqo.TxType.TSO_CONTEXT)
_GENERAL_CONTEXT: Final = int(dqo.TxType.GENERAL_CONTEXT)
_MAX_PIECES: Final = 1024  # far more than a packet of TX_MAX_PACKET_BYTES in 4 KiB pages needs
_TRAIN_BYTES: Final = 1 << 16  # one superframe, or the frames of one: more does not stay in a processor's cache

SendTrain: TypeAlias = Callable[[Sequence[Packet]], None]


@dataclass(slots=True)
class ParsedPacket(Packet):
    """A packet that its sender has parsed; another gVNIC that receives it need not do so again."""

    parsed: ParsedFrame = field(kw_only=True)


class TxQueue:
    """One transmit queue.

    Args:
        dma: the guest's memory.
        mistakes: where the driver's mistakes are counted.
        block: where the queue's events go.
        queue_id: as the driver knows it; goes into completions.
        ring: descriptors.
        completions: the ring of completions.
        send: takes the packets, in order: those of one doorbell together, as far as _TRAIN_BYTES go.
    """

    def __init__(
        self,
        dma: DmaSpace,
        mistakes: Mistakes,
        block: NotifyBlock,
        queue_id: int,
        ring: Ring,
        completions: Ring,
        send: SendTrain,
    ) -> None:
        self.packets = 0
        self.bytes = 0
        self._dma = dma
        self._mistakes = mistakes
        self._block = block
        self._id = queue_id
        self._ring = ring
        self._completions = CompletionRing(dma, completions, _COMPLETIONS)
        self._send = send
        self._head = 0
        self._pieces: list[memoryview | bytes] = []
        self._gathered = 0  # bytes in _pieces
        self._train: list[Packet] = []  # made, not sent yet
        self._train_bytes = 0
        self._unfilled: list[tuple[bytearray, ParsedFrame]] = []  # frames of the train that lack their checksum
        self._flow = FlowParser()
        self._broken = ""  # what is wrong with the packet that is being gathered
        self._tso: tuple[int, int, int] | None = None  # payload bytes, MSS, header length

    def doorbell(self, tail: int) -> None:
        """Send all packets up to ring index ``tail`` and report them done."""
        entries = self._ring.entries
        if tail >= entries:
            self._mistakes.note("tx-doorbell", f"TX queue {self._id}: tail {tail} of a ring of {entries}")
            return
        head, self._head = self._head, tail
        if tail == head:
            return
        completions: list[list[int]] = []
        try:
            for part in self._ring.read(self._dma, head, tail):
                self._run(part, head, completions)
                head = 0
            if completions:
                self._completions.write(completions)
                self._block.event()
        except DmaError as error:
            self._mistakes.note("tx-ring", f"TX queue {self._id}: {error}")
        if self._pieces:  # half a packet: let go of guest memory, which may be unmapped before the rest comes
            self._pieces[:] = [b"".join(self._pieces)]

    def _run(self, descriptors: memoryview, index: int, completions: list[list[int]]) -> None:
        """Work through neighbouring descriptors, of ring index ``index`` and up; append what the driver is told."""
        for address, flags, tag, size in dqo.TX_DESCRIPTOR.iter_unpack(descriptors):
            index += 1
            kind = flags & dqo.TX_TYPE_MASK
            if kind == _PACKET:
                self._gather(address, size & dqo.TX_SIZE_MASK)
                if not flags & _END_OF_PACKET:
                    continue
                self._finish(flags & dqo.TX_CHECKSUM != 0)
                completions.append([self._id | dqo.TX_COMPLETION_PACKET, tag])
                if flags & _REPORT_EVENT:
                    completions.append([self._id | dqo.TX_COMPLETION_DESCRIPTOR, index & self._ring.entries - 1])
            elif kind == _TSO_CONTEXT:
                self._tso = (
                    address & dqo.TSO_TOTAL_MASK,
                    address >> dqo.TSO_MSS_SHIFT & dqo.TSO_MSS_MASK,
                    address >> dqo.TSO_HEADER_SHIFT & dqo.TSO_HEADER_MASK,
                )
            elif kind != _GENERAL_CONTEXT:
                self._mistakes.note("tx-descriptor", f"TX queue {self._id}: type {kind:#x}")
        self._send_train()

    def _gather(self, address: int, size: int) -> None:
        """Add a buffer to the packet."""
        if self._broken:
            return
        self._gathered += size
        if self._gathered > dqo.TX_MAX_PACKET_BYTES or len(self._pieces) >= _MAX_PIECES:
            self._break(f"a packet of over {dqo.TX_MAX_PACKET_BYTES} bytes or {_MAX_PIECES} buffers")
            return
        try:
            self._pieces.append(self._dma.read(address, size))
        except DmaError as error:
            self._break(str(error))

    def _break(self, why: str) -> None:
        self._broken = self._broken or why
        self._pieces.clear()

    def _finish(self, fill_checksum: bool) -> None:
        """Make a packet of what was gathered and send it."""
        tso, self._tso = self._tso, None
        broken, self._broken = self._broken, ""
        frame = bytearray().join(self._pieces)
        self._pieces.clear()
        self._gathered = 0
        if not broken:
            broken = self._send_frame(frame, fill_checksum) if tso is None else self._send_superframe(frame, *tso)
        if broken:
            self._mistakes.note("tx-packet", f"TX queue {self._id}: {broken}")

    def _send_frame(self, frame: bytearray, fill_checksum: bool) -> str:
        """Send one frame; return what is wrong with it, or nothing."""
        size = len(frame)
        if not dqo.TX_MIN_PLAIN_BYTES <= size <= dqo.TX_MAX_PLAIN_BYTES:
            return f"a frame of {size} bytes"
        parsed = self._flow.parse(frame)
        fill = fill_checksum and parsed.l4_length > 0
        if fill:
            self._unfilled.append((frame, parsed))
        self.packets += 1
        self.bytes += size
        self._add(ParsedPacket(frame, 0, fill, parsed=parsed))
        return ""

    def _send_superframe(self, frame: bytearray, total: int, mss: int, header_bytes: int) -> str:
        """Send one TSO packet; return what is wrong with it, or nothing.

        TCP goes out whole: whether it is cut is up to whoever receives it. UDP, which nobody takes whole, is cut here.
        """
        if len(frame) != header_bytes + total or not dqo.TX_MIN_MSS <= mss <= dqo.TX_MAX_MSS:
            return f"TSO of {total} bytes by {mss} behind {header_bytes} in a packet of {len(frame)}"
        parsed = parse(frame, superframe=True)
        if parsed.payload_offset != header_bytes or not (parsed.is_tcp or parsed.is_udp):
            return f"TSO of a packet that is not TCP or UDP with headers of {header_bytes} bytes"
        if total <= mss:
            return self._send_frame(frame, True)
        self.packets += -(-total // mss)
        self.bytes += len(frame)
        if parsed.is_tcp:
            fill_l4_checksum(frame, parsed)
            self._add(ParsedPacket(frame, mss, True, parsed=parsed))
        else:
            for datagram in udp_segments(frame, parsed, mss):
                self._add(Packet(datagram, 0, True))
        return ""

    def _add(self, packet: Packet) -> None:
        """Add a packet to the train, which leaves when it is long, or when there is no more."""
        self._train.append(packet)
        self._train_bytes += len(packet.data)
        if self._train_bytes >= _TRAIN_BYTES:
            self._send_train()

    def _send_train(self) -> None:
        for parsed, alike in groupby(self._unfilled, key=itemgetter(1)):
            fill_l4_checksums([frame for frame, _ in alike], parsed)
        self._unfilled.clear()
        train, self._train = self._train, []
        self._train_bytes = 0
        if train:
            self._send(train)
