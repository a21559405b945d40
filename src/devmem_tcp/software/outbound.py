"""The send side of one socket: the checks Linux makes of a devmem send, its numbers and completions. Never waits."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Final

from devmem_tcp import contract
from devmem_tcp.errors import KernelError
from devmem_tcp.sansio.completions import CompletionQueue
from devmem_tcp.software.binding import SoftwareTxBinding
from devmem_tcp.software.landing import Planner
from devmem_tcp.sys import calls
from devmem_tcp.types import CompletionRange
from devmem_tcp.uapi.socket import MAX_IOVECS

_CALL: Final = "sendmsg(MSG_ZEROCOPY, SCM_DEVMEM_DMABUF)"
_NUMBERS: Final = 1 << 32


class Outbound:
    """What one socket has sent. One sending thread at a time."""

    def __init__(
        self, sock: calls.Socket, find_tx: Callable[[int], SoftwareTxBinding | None], planner: Planner
    ) -> None:
        self._sock = sock
        self._find_tx = find_tx
        self._planner = planner
        self._next_number = 0
        self._unreported: list[int] = []  # complete, and kept for later by a hostile NIC
        self._completions = CompletionQueue()
        self.zerocopy = False
        self.dmabuf_bytes = self.host_bytes = self.send_calls = 0

    def windows(self, tx: contract.TxBinding | int, offsets: Sequence[int], sizes: Sequence[int]) -> list[memoryview]:
        """Check a devmem send and return the bytes it names.

        Kernel: net/ipv4/tcp.c tcp_sendmsg_locked, net/core/devmem.c net_devmem_get_binding and
        net_devmem_get_niov_at.

        Raises:
            ValueError: offsets and sizes differ in length, or one is negative.
            KernelError: as ``DevmemSocket.send_frags`` says.
        """
        if len(offsets) == len(sizes) == 1 and self.zerocopy:  # the usual case, with nothing to say against it
            offset, size, binding = offsets[0], sizes[0], self._binding(tx)
            if offset >= 0 < size and offset + size <= binding.buffer.size_bytes:
                return [binding.window(offset, size)]
        if len(offsets) != len(sizes):
            raise ValueError(f"{len(offsets)} offsets but {len(sizes)} sizes")
        if len(offsets) and (min(offsets) < 0 or min(sizes) < 0):
            raise ValueError("offsets and sizes must not be negative")
        if len(offsets) > MAX_IOVECS:
            raise KernelError(errno.EMSGSIZE, _CALL, hint=f"at most {MAX_IOVECS} pieces a call, not {len(offsets)}")
        if not self.zerocopy:
            raise KernelError(errno.EINVAL, _CALL, hint="call set_zerocopy() on the socket first")
        binding = self._binding(tx)
        if sum(sizes) == 0:
            raise KernelError(errno.EINVAL, _CALL, hint="nothing to send: the sizes add up to 0")
        limit = binding.buffer.size_bytes
        for offset, size in zip(offsets, sizes, strict=True):
            if size and (offset >= limit or offset + size > limit):
                raise KernelError(
                    errno.EFAULT, _CALL, hint=f"bytes {offset} to {offset + size} are not in a buffer of {limit} bytes"
                )
        return [binding.window(int(offset), int(size)) for offset, size in zip(offsets, sizes, strict=True)]

    def _binding(self, tx: contract.TxBinding | int) -> SoftwareTxBinding:
        dmabuf_id = tx if isinstance(tx, int) else tx.dmabuf_id
        if dmabuf_id == 0:
            raise KernelError(errno.EFAULT, _CALL, hint="0 is no binding's id")
        binding = self._find_tx(dmabuf_id)
        if binding is not None:
            return binding
        if not isinstance(tx, int) and not tx.closed:
            raise KernelError(errno.ENODEV, _CALL, hint="this TX binding is another NIC's: bind_tx on the socket's own")
        raise KernelError(errno.EINVAL, _CALL, hint=f"no TX binding has the id {dmabuf_id}: bind_tx() first")

    def send_windows(self, windows: Sequence[memoryview], flags: int) -> int:
        """Send checked bytes; raises BlockingIOError when the socket is full."""
        taken = calls.sendmsg(self._sock, windows, flags)
        self._complete(self._next_number)
        self._next_number = (self._next_number + 1) % _NUMBERS
        self.dmabuf_bytes += taken
        self.send_calls += 1
        return taken

    def send_ordinary(self, data: bytes | bytearray | memoryview, flags: int) -> int:
        """Send bytes of host memory; raises BlockingIOError when the socket is full."""
        taken = calls.send(self._sock, data, flags)
        self.host_bytes += taken
        return taken

    def _complete(self, number: int) -> None:
        """The bytes are copied: report the number, unless the NIC is a hostile one."""
        self._unreported.append(number)
        if not self._planner.completions_late():
            self.report_all()

    def report_all(self) -> None:
        """Report what is complete, however late the NIC would like to."""
        for number in self._unreported:
            self._completions.complete(number)
        self._unreported.clear()

    def read_completions(self) -> list[CompletionRange]:
        ranges = self._completions.take()
        if self._unreported and not self._planner.completions_late():
            self.report_all()
        return ranges

    @property
    def has_completions(self) -> bool:
        """Whether it is worth to call ``read_completions``: a hostile NIC may have none to show even so."""
        return bool(self._unreported) or self._completions.waiting

    @property
    def incomplete(self) -> int:
        """Sends whose completion was not collected."""
        return len(self._unreported) + self._completions.count
