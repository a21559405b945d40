"""The receive side of one kernel socket: one recvmsg into memory that is kept, frags as columns, tokens noted.

Waiting is the caller's: each attempt is one system call, with the flags it is given.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from typing import Final

import numpy as np

from devmem_tcp.errors import ETOOSMALL, ControlTruncated, KernelError, NotZeroCopy
from devmem_tcp.sansio.held import HeldTokens
from devmem_tcp.sansio.tokens import dontneed_calls, run_of, token_array
from devmem_tcp.sys import calls
from devmem_tcp.sys.messages import ReceivedMessage
from devmem_tcp.types import FRAG_DTYPE, BatchOwner, FragArray, FragBatch, FragKind, TokenRangeArray
from devmem_tcp.uapi.socket import CONTROL_SPACE_PER_FRAG, DMABUF_TOKEN, MAX_DONTNEED_FRAGS, MSG_SOCK_DEVMEM

_RECEIVE: Final = "recvmsg(MSG_SOCK_DEVMEM)"
_MAX_READ_BYTES: Final = 1 << 30  # of one call, which would come back short all the same
_MAX_READ_FRAGS: Final = 1 << 20
_NO_INLINE: Final = memoryview(b"")
_DONTNEED_HINTS: Final = {
    errno.EINVAL: "give 1 to 128 ranges a call, each of two 32-bit numbers",
    errno.EBADF: "this is no TCP socket",
}


class Inbound:
    """What one socket has received and not given back. One reading thread; tokens come back from any."""

    def __init__(self, sock: calls.Socket, *, strict: bool) -> None:
        self._sock = sock
        self._strict = strict
        self._message = ReceivedMessage()
        # Held while tokens go back, and while some are noted. The kernel hands a token out again as soon as it is
        # back, so a reader may have it while the thread that returned it has yet to strike it out.
        self._lock = threading.Lock()
        self.tokens = HeldTokens()
        self.dmabuf_bytes = self.linear_bytes = self.host_bytes = self.frags = self.dontneed_calls = 0

    def receive(self, flags: int, max_bytes: int, max_frags: int, owner: BatchOwner) -> FragBatch:
        """Receive what is there, at most ``max_bytes``; an empty batch is the end of stream.

        Kernel: net/ipv4/tcp.c, tcp_recvmsg_locked and tcp_recvmsg_dmabuf. Ordinary and devmem data never come in one
        call. Devmem data comes with a control message for each piece; pieces in the header buffer (LINEAR) are copied
        to the iovec one after the other. A copy is made before its control message is found not to fit, so the iovec
        may hold more than was received.

        Raises:
            BlockingIOError: nothing is there.
            NotZeroCopy: ordinary data on a strict socket.
            ControlTruncated, KernelError, ConnectionError.
        """
        message = self._message
        size = min(max_bytes, _MAX_READ_BYTES)
        message.prepare(size, CONTROL_SPACE_PER_FRAG * min(max_frags, size, _MAX_READ_FRAGS))
        try:
            taken = calls.receive_message(self._sock, message, flags | MSG_SOCK_DEVMEM)
        except OSError as error:
            raise _explain(error) from None
        frags = message.frags()
        if len(frags):
            return self._landed(frags, taken, owner)
        return self._host(taken, owner) if taken else FragBatch(frags, 0, _NO_INLINE, None)

    def _landed(self, frags: FragArray, taken: int, owner: BatchOwner) -> FragBatch:
        """Make a batch of devmem data, and note its tokens."""
        linear, inline, held = 0, _NO_INLINE, frags
        run = run_of(frags["token"])
        if run is None:  # else no token is 0, so every frag has one
            in_device = frags["kind"] == FragKind.DMABUF
            held = frags[in_device]
            linear = int(frags["size"][~in_device].sum())
            inline = memoryview(bytes(self._message.data[:linear])) if linear else _NO_INLINE
        if len(held):
            with self._lock:
                self.tokens.record(held, time.monotonic(), run)
        self.linear_bytes += linear
        self.dmabuf_bytes += taken - linear
        self.frags += len(frags)
        return FragBatch(frags, taken, inline, owner)

    def _host(self, taken: int, owner: BatchOwner) -> FragBatch:
        """Make a batch of ordinary data."""
        data = bytes(self._message.data[:taken])
        self.host_bytes += taken
        if self._strict:
            raise NotZeroCopy(
                f"{taken} bytes arrived in host memory on a strict socket",
                linear_bytes=0,
                host_bytes=taken,
                data=data,
                hint="steer the flow to a bound queue before it connects: nic.add_ntuple(dst_port=…, queue=…)",
            )
        self.frags += 1
        frags: FragArray = np.zeros(1, FRAG_DTYPE)
        frags["size"] = taken
        return FragBatch(frags, taken, memoryview(data), owner)

    def receive_ordinary(self, flags: int, target: memoryview) -> int:
        """Receive without the devmem flag.

        Raises:
            KernelError: EFAULT: the next data is in device memory; nothing is consumed.
            BlockingIOError: nothing is there.
        """
        try:
            taken = calls.recv_into(self._sock, target, flags)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            hint = "the next data is in device memory: take it with recv_frags()"
            raise KernelError(errno.EFAULT, "recvmsg", hint=hint) from None
        self.host_bytes += taken
        return taken

    def discard(self, flags: int, max_bytes: int) -> int:
        """Drop what is there, at most ``max_bytes``; hands out no token."""
        self._message.prepare(min(max_bytes, _MAX_READ_BYTES), 0)
        return calls.receive_message(self._sock, self._message, flags | MSG_SOCK_DEVMEM | calls.MSG_TRUNC)

    def dontneed(self, tokens: TokenRangeArray | bytes) -> int:
        """Return tokens in one call; answers how many the kernel freed.

        Raises:
            ValueError: an array that is not of TOKEN_DTYPE.
            KernelError: EINVAL, as the kernel says; nothing is freed.
        """
        raw = tokens if isinstance(tokens, bytes) else token_array(tokens).tobytes()
        with self._lock:
            freed = self._give_back(raw)
            self.tokens.strike(token_array(tokens))
        return freed

    def release(self, frags: FragArray) -> tuple[int, int]:
        """Return the tokens of a batch, in as few calls as their limits allow.

        Returns:
            How many there are, and how many of them the kernel freed.

        Raises:
            KernelError: as ``dontneed``; what was returned before is struck out.
        """
        run = self.tokens.run_of(frags)
        if run is None:
            tokens = frags["token"]
            return int(np.count_nonzero(tokens)), sum([self.dontneed(ranges) for ranges in dontneed_calls(tokens)])
        first, count = run
        freed = 0
        for at in range(0, count, MAX_DONTNEED_FRAGS):
            part = first + at, min(count - at, MAX_DONTNEED_FRAGS)
            raw = DMABUF_TOKEN.pack(*part)
            with self._lock:
                freed += self._give_back(raw)
                if not self.tokens.strike_run(*part):  # another thread returned some of them by dontneed()
                    self.tokens.strike(token_array(raw))
        return count, freed

    def _give_back(self, ranges: bytes) -> int:
        try:
            freed = calls.return_tokens(self._sock, ranges)
        except OSError as error:
            number = error.errno or 0
            hint = _DONTNEED_HINTS.get(number, "")
            raise KernelError(number, "setsockopt(SO_DEVMEM_DONTNEED)", hint=hint) from None
        self.dontneed_calls += 1
        return freed

    def return_all(self) -> None:
        """Return every token, for a socket that closes.

        The kernel frees them with the socket as well (net/ipv4/tcp_ipv4.c, tcp_release_user_frags), but that may live
        on after close(2), until the peer has acknowledged its end.
        """
        with self._lock:
            for ranges in dontneed_calls(self.tokens.out()):
                with contextlib.suppress(OSError):
                    calls.return_tokens(self._sock, ranges.tobytes())
                self.tokens.strike(ranges)


def _explain(error: OSError) -> OSError:
    """Return what to raise for what recvmsg said."""
    if error.errno == ETOOSMALL:
        return ControlTruncated(needed=CONTROL_SPACE_PER_FRAG)
    if error.errno == errno.ENODEV:
        hint = (
            "a packet in host memory was merged with one in device memory (GRO), which nobody can read any more: close "
            "the connection, and see that every packet of the flow is split: no IP options, no UDP on its queue"
        )
        return KernelError(errno.ENODEV, _RECEIVE, hint=hint)
    if error.errno == errno.EFAULT:
        return KernelError(errno.EFAULT, _RECEIVE, hint="the packet's memory is of no dma-buf binding that is known")
    return error
