"""The send side of one kernel socket: pieces of a dma-buf by offset, and the numbers of their completions.

Waiting is the caller's: each attempt is one system call, with the flags it is given. One sending thread, which collects
the completions too.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from devmem_tcp.contract import TxBinding
from devmem_tcp.errors import KernelError
from devmem_tcp.sansio.completions import CompletionQueue, InFlight
from devmem_tcp.sys import calls
from devmem_tcp.sys.messages import OffsetsMessage, ReceivedMessage
from devmem_tcp.types import CompletionRange, U64Array
from devmem_tcp.uapi.errqueue import parse_errqueue
from devmem_tcp.uapi.socket import MAX_IOVECS, MSG_ZEROCOPY, SO_ZEROCOPY

_CALL: Final = "sendmsg(MSG_ZEROCOPY, SCM_DEVMEM_DMABUF)"
_ERRQUEUE_BYTES: Final = 256  # one completion needs 64 on IPv6
_NUMBERS: Final = 1 << 32
_FEW_PIECES: Final = 4  # that every NIC takes in one packet, even if each lies across two pages
_LARGEST_PACKET: Final = 9216  # bytes; no MTU is larger
_NOTHING: Final = np.zeros(1, np.uint64)
_HINTS: Final = {
    errno.EINVAL: "set_zerocopy() on the socket first, and give a TX binding that is open",
    errno.EFAULT: "a piece is not within the bound Buffer",
    errno.ENODEV: "the connection must leave by the NIC that the binding is of: connect from one of its addresses",
    errno.ENOBUFS: "the system has no memory for another completion: see sysctl net.core.optmem_max",
}


class Pieces(NamedTuple):
    """What is to be sent: columns of shape (n,), in bytes, and which binding's dma-buf they are of."""

    dmabuf_id: int
    offsets: U64Array
    sizes: U64Array

    @property
    def nbytes(self) -> int:
        return int(self.sizes.sum())

    def first(self, count: int) -> Pieces:
        return Pieces(self.dmabuf_id, self.offsets[:count], self.sizes[:count])

    def after(self, taken: int) -> Pieces:
        """Return what is left once the first ``taken`` bytes are sent."""
        if not taken:
            return self
        ends = np.cumsum(self.sizes)
        first = int(np.searchsorted(ends, taken, side="right"))
        offsets, sizes = self.offsets[first:].copy(), self.sizes[first:].copy()
        if len(sizes):
            left = ends[first] - np.uint64(taken)
            offsets[0] += sizes[0] - left
            sizes[0] = left
        return Pieces(self.dmabuf_id, offsets, sizes)


class Outbound:
    """What one socket has sent, and what of it is complete.

    The kernel counts successful sendmsg calls; this counts ``send_frags`` calls, of which one takes several sendmsg
    where a signal breaks one off, or there are many small pieces. A call is complete when it is over and all its parts
    are complete.
    """

    def __init__(self, sock: calls.Socket, bindings: Mapping[int, TxBinding]) -> None:
        self._sock = sock
        self._bindings = bindings
        self._message: OffsetsMessage | None = None  # made for the first send: most sockets only receive
        self._errors: ReceivedMessage | None = None
        self._in_flight: InFlight[int] = InFlight()  # in the kernel's numbers: of which call each sendmsg is a part
        self._parts: dict[int, int] = {}  # of each call: parts that are not complete, and 1 while it is being made
        self._parts_sent = 0  # of the call that is being made
        self._completions = CompletionQueue()
        self._reported = 0
        self.dmabuf_bytes = self.host_bytes = self.send_calls = 0

    def allow_zerocopy(self) -> None:
        calls.setsockopt(self._sock, calls.SOL_SOCKET, SO_ZEROCOPY, 1)

    # --- sending ---

    def pieces(self, tx: TxBinding | int, offsets: Sequence[int], sizes: Sequence[int]) -> Pieces:
        """Check what is to be sent, as far as the kernel would find out only after sending a part, or not at all.

        Kernel: net/core/datagram.c, zerocopy_fill_skb_from_devmem looks at a piece when it is its turn; with the id 0,
        net/ipv4/tcp.c, tcp_sendmsg_locked takes offsets for addresses in this process.

        Raises:
            ValueError: offsets and sizes differ in length, or one is negative.
            KernelError: EFAULT, EMSGSIZE or EINVAL, as ``DevmemSocket.send_frags`` says.
        """
        if len(offsets) != len(sizes):
            raise ValueError(f"{len(offsets)} offsets but {len(sizes)} sizes")
        if len(offsets) > MAX_IOVECS:
            raise KernelError(errno.EMSGSIZE, _CALL, hint=f"at most {MAX_IOVECS} pieces a call, not {len(offsets)}")
        if len(offsets) and (min(offsets) < 0 or min(sizes) < 0):
            raise ValueError("offsets and sizes must not be negative")
        dmabuf_id = tx if isinstance(tx, int) else tx.dmabuf_id
        if dmabuf_id == 0:
            raise KernelError(errno.EFAULT, _CALL, hint="0 is no binding's id")
        columns = np.array([offsets, sizes], np.uint64)
        columns = columns[:, columns[1] > 0]  # of an empty piece the kernel would make an empty frag
        if not columns.size:
            raise KernelError(errno.EINVAL, _CALL, hint="nothing to send: the sizes add up to 0")
        binding = self._bindings.get(dmabuf_id) if isinstance(tx, int) else tx
        if binding is not None:
            _check_within(columns[0], columns[1], binding.buffer.size_bytes)
        return Pieces(dmabuf_id, columns[0], columns[1])

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """Make all ``send``s of the block one call; it gets a number if one of them succeeds."""
        call = self.send_calls
        self._parts[call] = 1
        self._parts_sent = 0
        try:
            yield
        finally:
            if self._parts_sent:
                self.send_calls += 1
                self._part_over(call)
            else:
                del self._parts[call]

    def next_part(self, pieces: Pieces) -> tuple[Pieces, int]:
        """Return what can go in one sendmsg, and its flags: MSG_EOR keeps the next one's pieces out of its last packet.

        Mostly that is all, and no flag. But a NIC takes only so many pieces in one packet, and what it would do then,
        copy them together, cannot be done in device memory: gve drops the packet, each time it is sent, until the
        connection dies (drivers/net/ethernet/google/gve/gve_tx_dqo.c, gve_try_tx_skb: 10, of which the header is one).
        """
        sizes = pieces.sizes
        if len(sizes) <= _FEW_PIECES and sizes[-1] >= _LARGEST_PACKET:
            return pieces, 0
        segment = int.from_bytes(calls.getsockopt_bytes(self._sock, calls.IPPROTO_TCP, calls.TCP_MAXSEG, 4), "little")
        if len(sizes) > _FEW_PIECES:
            ends = np.concatenate((_NOTHING, np.cumsum(sizes)))
            if (ends[_FEW_PIECES:] - ends[:-_FEW_PIECES]).min() < segment:
                return pieces.first(_FEW_PIECES), calls.MSG_EOR
        return pieces, calls.MSG_EOR if sizes[-1] < segment else 0

    def send(self, pieces: Pieces, flags: int) -> int:
        """Send what fits, in one sendmsg, as a part of ``one_call``.

        Raises:
            BlockingIOError: nothing fits.
            KernelError: ENOBUFS: completions have to be collected first; else as ``DevmemSocket.send_frags`` says.
            ConnectionError.
        """
        if self._message is None:
            self._message = OffsetsMessage()
        self._message.prepare(pieces.dmabuf_id, pieces.offsets, pieces.sizes)
        try:
            taken = calls.send_offsets(self._sock, self._message, flags | MSG_ZEROCOPY | calls.MSG_NOSIGNAL)
        except OSError as error:
            raise _explain(error) from None
        self._in_flight.add(self.send_calls)
        self._parts[self.send_calls] += 1
        self._parts_sent += 1
        self.dmabuf_bytes += taken
        return taken

    def send_ordinary(self, data: bytes | bytearray | memoryview, flags: int) -> int:
        """Send bytes of host memory; raises BlockingIOError when the socket is full."""
        taken = calls.send(self._sock, data, flags | calls.MSG_NOSIGNAL)
        self.host_bytes += taken
        return taken

    # --- completions ---

    def collect(self) -> bool:
        """Take what the kernel has reported off the error queue, for ``take``; answers whether there was anything.

        Reports of other kinds, and completions that say the bytes were copied after all, are read like the rest.

        Kernel: recvmsg(MSG_ERRQUEUE) gives one report a call; net/core/skbuff.c, __msg_zerocopy_callback.
        """
        if self._errors is None:
            self._errors = ReceivedMessage()
        found = False
        while True:
            self._errors.prepare(0, _ERRQUEUE_BYTES)
            try:
                calls.receive_message(self._sock, self._errors, calls.MSG_ERRQUEUE | calls.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            found = True
            reported = parse_errqueue(self._errors.control, self._errors.control_length)
            for call in self._in_flight.complete(CompletionRange(low, high) for low, high in reported):
                self._part_over(call)

    def _part_over(self, call: int) -> None:
        self._parts[call] -= 1
        if not self._parts[call]:
            del self._parts[call]
            self._completions.complete(call % _NUMBERS)

    def take(self) -> list[CompletionRange]:
        """Return the calls that are complete and were not returned before."""
        self._reported += self._completions.count
        return self._completions.take()

    @property
    def under_way(self) -> bool:
        """Whether the kernel still owes a completion."""
        return len(self._in_flight) > 0

    @property
    def incomplete(self) -> int:
        """Calls that ``take`` has not returned."""
        return self.send_calls - self._reported


def _check_within(offsets: U64Array, sizes: U64Array, limit: int) -> None:
    outside = (offsets >= limit) | (sizes > limit - np.minimum(offsets, np.uint64(limit)))
    if outside.any():
        at = int(outside.argmax())
        start, end = int(offsets[at]), int(offsets[at]) + int(sizes[at])
        raise KernelError(errno.EFAULT, _CALL, hint=f"bytes {start} to {end} are not in a Buffer of {limit} bytes")


def _explain(error: OSError) -> OSError:
    """Return what to raise for what sendmsg said; trouble with the connection stays what it is."""
    if isinstance(error, (BlockingIOError, InterruptedError, ConnectionError, TimeoutError)):
        return error
    number = error.errno or 0
    return KernelError(number, _CALL, hint=_HINTS.get(number, ""))
