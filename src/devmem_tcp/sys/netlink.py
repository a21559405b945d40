"""A client of generic netlink: one socket, one family, one request at a time.

The kernel handles a request within the call that sends it, and makes the next part of a dump within the call that reads
one (net/netlink/af_netlink.c, netlink_unicast_kernel and netlink_recvmsg). So nothing here waits: where an answer ought
to be and is not, something went wrong. A call that a signal interrupts is made again by Python itself (PEP 475).
"""

from __future__ import annotations

import contextlib
import errno
import threading
import warnings
from collections.abc import Iterator
from enum import IntEnum
from typing import Final

from devmem_tcp.closing import Closing
from devmem_tcp.errors import BrokenError, BusyError, ClosedError, KernelError, LeakWarning
from devmem_tcp.sys import calls
from devmem_tcp.uapi import netlink
from devmem_tcp.uapi.netlink import NO_NAMES, AttributeNames, Attributes, ExtAck, Message

RECEIVE_BYTES: Final = 1 << 16  # the kernel makes parts of a dump no longer than what was last asked for, or 32 KiB
MAX_ATTEMPTS: Final = 8  # of a dump that changes or overflows while it is read
_MAX_SEQUENCE: Final = 0xFFFFFFFF
_CONTROLLER_NAMES: Final = AttributeNames({netlink.CTRL_ATTR_FAMILY_NAME: "family-name"})


class _Interrupted(Exception):
    """A dump has to be read again, from its start."""


class GenericNetlink(Closing):
    """A socket to one family of generic netlink, such as ``netdev`` or ``ethtool``.

    What the kernel ties to a netlink socket (a binding made by bind-rx or bind-tx) ends with ``close()``; but a child
    forked meanwhile holds the socket too, until it ends or execs.

    Limits: one request at a time: a thread that asks while another one's request is under way gets BusyError.
    """

    def __init__(self, family: str) -> None:
        """Open the socket and look the family up.

        Kernel: socket(AF_NETLINK, NETLINK_GENERIC); nlctrl getfamily.

        Raises:
            KernelError: ENOENT: this kernel has no such family; or the socket was refused.
        """
        self.family: Final = family
        self._closed = True
        self._in_use = threading.Lock()
        self._sequence = 0
        self._unfinished = False
        with _refused("open a netlink socket"):
            self._sock = calls.open_netlink(netlink.NETLINK_GENERIC)
        self._closed = False
        try:
            with _refused("open a netlink socket"):
                for option in (netlink.NETLINK_EXT_ACK, netlink.NETLINK_CAP_ACK):
                    calls.setsockopt(self._sock, netlink.SOL_NETLINK, option, 1)
                calls.bind(self._sock, (0, 0))
                self._port: int = calls.local_address(self._sock)[0]
            self._kind, self._version = self._look_up()
        except BaseException:
            self.close()
            raise

    def _look_up(self) -> tuple[int, int]:
        """Return the family's id, which differs from boot to boot, and its version."""
        call = f"nlctrl getfamily {self.family}"
        wanted = netlink.attr_string(netlink.CTRL_ATTR_FAMILY_NAME, self.family)
        payload = netlink.generic(netlink.CTRL_CMD_GETFAMILY, 1, wanted)
        try:
            found = self._ask(netlink.GENL_ID_CTRL, 0, payload, call, _CONTROLLER_NAMES)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                error.hint = f"this kernel has no netlink family {self.family!r}: it is too old, or built without it"
            raise
        if not found:
            raise BrokenError(f"{call}: the kernel acknowledged, and told nothing")
        with _understood(call):
            return found[-1].u16(netlink.CTRL_ATTR_FAMILY_ID), found[-1].u32(netlink.CTRL_ATTR_VERSION)

    def request(self, command: int, *attrs: bytes, attributes: AttributeNames = NO_NAMES) -> Attributes:
        """Make one request (a "do") and return the attributes of its answer, none where it has no answer.

        Args:
            command: of the family; an IntEnum's member lends its name to errors: BIND_RX is ``bind-rx``.
            attrs: made by ``uapi.netlink``.
            attributes: their names, for errors.

        Raises:
            KernelError: refused: errno, extack, and in ``attr`` the attribute that is bad or missing.
            BusyError: another thread's request is under way.
            ClosedError: after ``close()``.
            BrokenError: the kernel's answer makes no sense.
        """
        payload = netlink.generic(command, self._version, *attrs)
        found = self._ask(self._kind, 0, payload, self._call(command), attributes)
        return found[-1] if found else Attributes()

    def dump(self, command: int, *attrs: bytes, attributes: AttributeNames = NO_NAMES) -> list[Attributes]:
        """Make one request for a list and return the attributes of each of its entries.

        A dump that changed while the kernel made it (NLM_F_DUMP_INTR), or that overflowed the socket (ENOBUFS), is read
        again, up to 8 times in all.

        Args, Raises: as ``request``; KernelError EAGAIN: it changed every time, ENOBUFS: it overflowed every time.
        """
        payload = netlink.generic(command, self._version, *attrs)
        call = self._call(command)
        for attempt in range(MAX_ATTEMPTS):
            try:
                return self._ask(self._kind, netlink.NLM_F_DUMP, payload, call, attributes)
            except _Interrupted:
                continue
            except KernelError as error:
                if error.errno != errno.ENOBUFS or attempt == MAX_ATTEMPTS - 1:
                    raise
        hint = f"what it lists changed {MAX_ATTEMPTS} times while it was read: try again later"
        raise KernelError(errno.EAGAIN, call, hint=hint)

    def fileno(self) -> int:
        """Return the socket's fd; -1 after ``close()``."""
        return self._sock.fileno()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            calls.close_socket(self._sock)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was dropped without close()", LeakWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<GenericNetlink {self.family}{', closed' if self._closed else ''}>"

    # --- one exchange ---

    def _call(self, command: int) -> str:
        name = netlink.spell(command) if isinstance(command, IntEnum) else f"command {command}"
        return f"{self.family} {name}"

    def _ask(self, kind: int, flags: int, payload: bytes, call: str, names: AttributeNames) -> list[Attributes]:
        """Send a request and collect its answers, to the ack or the end of the dump."""
        if not self._in_use.acquire(blocking=False):
            raise BusyError(
                f"{call}: a request of another thread is under way on this netlink socket",
                hint="open a GenericNetlink for each thread",
            )
        try:
            if self._closed:
                raise ClosedError(f"{call}: this netlink socket is closed")
            if self._unfinished:
                self._drain()
            self._unfinished = True
            self._sequence = self._sequence % _MAX_SEQUENCE + 1  # 0 is that of notifications
            flags |= netlink.NLM_F_REQUEST | (0 if flags & netlink.NLM_F_DUMP else netlink.NLM_F_ACK)
            request = netlink.message(kind, flags, self._sequence, payload)
            with _refused(call):
                calls.send(self._sock, request)
            return self._collect(request, call, names)
        finally:
            self._in_use.release()

    def _collect(self, request: bytes, call: str, names: AttributeNames) -> list[Attributes]:
        """Read answers until the one that is the last; raise what it says."""
        found: list[Attributes] = []
        interrupted = False
        while True:
            for answer in self._receive(call):
                interrupted |= bool(answer.flags & netlink.NLM_F_DUMP_INTR)
                if answer.kind in (netlink.NLMSG_ERROR, netlink.NLMSG_DONE):
                    self._unfinished = False
                    with _understood(call):
                        number, said = netlink.parse_ack(answer)
                    if number:
                        raise _refusal(number, call, said, request, names)
                    if interrupted:
                        raise _Interrupted
                    return found
                if answer.kind >= netlink.NLMSG_MIN_TYPE:
                    with _understood(call):
                        found.append(netlink.parse_generic(answer.payload)[1])

    def _receive(self, call: str) -> list[Message]:
        """Read one datagram; returns those of its messages that answer the request under way."""
        with _refused(call):
            datagram, flags, sender = calls.recv_datagram(self._sock, RECEIVE_BYTES, calls.MSG_DONTWAIT)
        if sender[0]:
            return []  # not from the kernel: any process may send to our port
        if flags & calls.MSG_TRUNC:
            raise BrokenError(f"{call}: the kernel's answer is over {RECEIVE_BYTES} bytes long")
        with _understood(call):
            answers = netlink.parse_messages(datagram)
        return [answer for answer in answers if (answer.sequence, answer.port) == (self._sequence, self._port)]

    def _drain(self) -> None:
        """Read what an exchange that was broken off left: a dump under way would make the kernel refuse the next."""
        while True:
            try:
                calls.recv_datagram(self._sock, RECEIVE_BYTES, calls.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(error.errno or 0, f"read from {self!r}") from error


@contextlib.contextmanager
def _refused(call: str) -> Iterator[None]:
    """Raise an OSError of the block as KernelError, and an answer that is not there as BrokenError."""
    try:
        yield
    except BlockingIOError as error:
        raise BrokenError(f"{call}: the kernel gave no answer") from error
    except OSError as error:
        raise KernelError(error.errno or 0, call) from error


@contextlib.contextmanager
def _understood(call: str) -> Iterator[None]:
    """Raise a ValueError of the block, about what the kernel sent, as BrokenError."""
    try:
        yield
    except ValueError as error:
        raise BrokenError(f"{call}: the kernel's answer makes no sense: {error}") from error


def _refusal(number: int, call: str, said: ExtAck, request: bytes, names: AttributeNames) -> KernelError:
    """Return the error that tells all the kernel told."""
    culprit = netlink.name_culprit(request, said, names)
    hint = f"{culprit or 'the value'} must be {said.policy}" if said.policy and str(said.policy) else ""
    return KernelError(number, call, extack=said.message, attr=culprit, hint=hint)
