"""A DQO receive queue: buffers that the driver posted, packets written to them, completions.

Format and rules: drivers/net/ethernet/google/gve/gve_desc_dqo.h and gve_rx_dqo.c. The driver finds a header by the
index of the completion, not of the buffer (gve_rx_dqo); both agree because buffers are used in the order in which they
were posted, and every buffer gets one completion.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from devmem_tcp.lab.dma import DmaError, DmaSpace
from devmem_tcp.lab.frames import FrameBytes
from devmem_tcp.lab.gvnic import descriptors as dqo
from devmem_tcp.lab.gvnic.interrupts import NotifyBlock
from devmem_tcp.lab.gvnic.mistakes import Mistakes
from devmem_tcp.lab.gvnic.rings import CompletionFormat, CompletionRing, Ring

_COMPLETIONS: Final = CompletionFormat(
    dqo.RX_COMPLETION, dqo.RX_GENERATION, dqo.RX_GENERATION_FIELD, dqo.RX_GENERATION_OFFSET
)
_KIND: Final = dqo.RX_COMPLETION_KIND
_DONE: Final = int(dqo.RxStatus.DONE)
_LAST: Final = int(dqo.RxStatus.END_OF_PACKET)
_RX_ERROR: Final = int(dqo.RxError.RX_ERROR)
_ERROR_FIELD, _LENGTH_FIELD, _HEADER_FIELD, _STATUS_FIELD = 1, 3, 4, 5  # of dqo.RX_COMPLETION


class RxTag(NamedTuple):
    """What the driver is told about a packet besides its bytes."""

    packet_type: int
    status: int  # RxStatus, but for DONE and END_OF_PACKET
    errors: int  # RxError
    hash: int
    segment_bytes: int  # of a superframe; 0: a plain frame


class RxQueue:
    """One receive queue.

    Args:
        dma: the guest's memory.
        mistakes: where the driver's mistakes are counted.
        block: where the queue's events go.
        queue_id: as the driver knows it.
        buffers: the ring on which the driver posts buffers.
        completions: the ring of completions.
        buffer_bytes: what each buffer holds.
        header_bytes: what each header buffer holds; 0: there are none, nothing is split.
        rsc: superframes may be received whole.
    """

    def __init__(
        self,
        dma: DmaSpace,
        mistakes: Mistakes,
        block: NotifyBlock,
        queue_id: int,
        buffers: Ring,
        completions: Ring,
        *,
        buffer_bytes: int,
        header_bytes: int,
        rsc: bool,
    ) -> None:
        self.id: Final = queue_id
        self.header_bytes: Final = header_bytes
        self.rsc: Final = rsc
        self.packets = 0
        self.bytes = 0
        self.drops = 0  #: of packets, for any reason
        self.drops_no_buffer = 0
        self.drops_too_long = 0
        self.bad_checksums = 0  #: packets received, not dropped, with a wrong checksum
        self._dma = dma
        self._mistakes = mistakes
        self._block = block
        self._buffers = buffers
        self._completions = CompletionRing(dma, completions, _COMPLETIONS)
        self._buffer_bytes = buffer_bytes
        self._tail = 0
        self._posted: deque[tuple[int, int, int]] = deque()  # buffer id, buffer address, header buffer address

    @property
    def posted(self) -> int:
        """How many buffers wait for packets."""
        return len(self._posted)

    def doorbell(self, tail: int) -> None:
        """Take the buffers posted up to ring index ``tail``."""
        entries = self._buffers.entries
        fresh = (tail - self._tail) % entries
        if tail >= entries or len(self._posted) + fresh >= entries:
            text = f"RX queue {self.id}: tail {tail} of a ring of {entries} with {len(self._posted)} posted"
            self._mistakes.note("rx-doorbell", text)
            return
        head, self._tail = self._tail, tail
        if not fresh:
            return
        try:
            for part in self._buffers.read(self._dma, head, tail):
                self._posted.extend(dqo.RX_DESCRIPTOR.iter_unpack(part))
        except DmaError as error:
            self._mistakes.note("rx-ring", f"RX queue {self.id}: {error}")

    def receive(self, frames: Sequence[FrameBytes], header_bytes: int, tag: RxTag, withheld: int = 0) -> int:
        """Write frames to the next buffers and tell the driver, once; drop those for which there are too few.

        Args:
            frames: or one superframe.
            header_bytes: so many bytes of each go to the header buffer; 0: they are not split.
            tag: what the driver is told about each of them.
            withheld: so many of the buffers posted are not to be used.

        Returns:
            How many were written.
        """
        completions: list[list[int]] = []
        received = 0
        for frame in frames:
            received += self._write(memoryview(frame), header_bytes, tag, withheld, completions)
        if completions:
            try:
                self._completions.write(completions)
            except DmaError as error:
                self._mistakes.note("rx-ring", f"RX queue {self.id}: {error}")
            else:
                self._block.event()
        return received

    def _write(
        self, frame: memoryview, header_bytes: int, tag: RxTag, withheld: int, completions: list[list[int]]
    ) -> bool:
        """Write one frame and append its completions, one for each buffer used; False: it was dropped."""
        payload = frame[header_bytes:]
        size, step = len(payload), self._buffer_bytes
        posted, write = self._posted, self._dma.write
        # No payload takes a buffer all the same: there is one completion a buffer, and none without.
        if (-(-size // step) or 1) > len(posted) - withheld:
            self.drops += 1
            self.drops_no_buffer += 1
            return False
        kind, status, errors, hash_value, segment_bytes = tag
        first_word = rsc = dqo.RX_RSC if segment_bytes else 0
        status |= _DONE
        entries = []
        try:
            if header_bytes:
                first_word |= header_bytes | dqo.RX_SPLIT
                write(posted[0][2], frame[:header_bytes])
            for start in range(0, size or 1, step):
                buffer_id, address, _ = posted.popleft()
                entries.append([_KIND, errors, kind, step, rsc, status, buffer_id, segment_bytes, hash_value])
                write(address, payload[start : start + step])
        except DmaError as error:
            self._mistakes.note("rx-buffer", f"RX queue {self.id}: {error}")
            self._fail(entries)
            written = False
        else:
            self.packets += 1
            self.bytes += len(frame)
            entries[0][_HEADER_FIELD] = first_word
            entries[-1][_LENGTH_FIELD] = size - step * (len(entries) - 1)
            written = True
        entries[-1][_STATUS_FIELD] |= _LAST
        completions += entries
        return written

    def _fail(self, entries: list[list[int]]) -> None:
        """Turn a packet that could not be written into one that the driver is to drop, of the buffers used so far."""
        self.drops += 1
        if not entries:
            buffer_id, _, _ = self._posted.popleft()
            entries.append([_KIND, 0, 0, 0, 0, _DONE, buffer_id, 0, 0])
        for entry in entries:
            entry[_ERROR_FIELD] |= _RX_ERROR
