"""Every exception this package raises on purpose, on one screen.

A class exists only where a caller would write another ``except`` for it. Bad arguments stay ``ValueError`` and
``TypeError``; ordinary TCP trouble (reset, refused, address in use) stays ``ConnectionError`` and ``OSError``.
"""

from __future__ import annotations

import errno as _errno
import os as _os  # strerror only: no I/O
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devmem_tcp.types import ProbeReport

ETOOSMALL = 525  # kernel-internal, include/linux/errno.h; has no name in the errno module
_KERNEL_NAMES = {ETOOSMALL: "ETOOSMALL", _errno.EOPNOTSUPP: "EOPNOTSUPP"}  # the latter is ENOTSUP, too, to Python


def errno_name(number: int) -> str:
    """Return the symbolic name of an errno, as the kernel calls it, for instance ``EINVAL``."""
    return _KERNEL_NAMES.get(number) or _errno.errorcode.get(number, f"errno {number}")


class DevmemError(Exception):
    """The root of all errors made here. ``hint`` is the next thing to type or do, or an empty string."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class BackendUnavailable(DevmemError):
    """The backend asked for cannot run here; ``report`` holds every check, with what was found and the fix."""

    def __init__(self, message: str, *, report: ProbeReport, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.report = report


class KernelError(DevmemError, OSError):
    """A kernel operation was refused: ``call`` says which, ``errno`` and ``extack`` what the kernel said.

    The software backend raises the same with the errno and extack that Linux gives in the same case. ``attr`` names
    the offending or missing netlink attribute, where the kernel names one.
    """

    def __init__(self, errno: int, call: str, *, extack: str = "", attr: str = "", hint: str = "") -> None:
        text = "error has no text" if errno == ETOOSMALL else _os.strerror(errno)
        detail = "".join((f": {extack}" if extack else "", f" [attribute {attr}]" if attr else ""))
        DevmemError.__init__(self, f"{call}: {errno_name(errno)} ({text}){detail}", hint=hint)
        self.errno = errno
        self.strerror = text
        self.call = call
        self.extack = extack
        self.attr = attr


class BindError(KernelError):
    """bind-rx or bind-tx was refused; nothing stays bound."""


class NicSettingError(KernelError):
    """A NIC setting (header split, RSS, ntuple) was refused; the setting is as it was."""


class RestoreError(DevmemError):
    """A NIC setting could not be put back; ``journal`` is the path of the record that still can."""

    def __init__(self, message: str, *, journal: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.journal = journal


class OutOfDeviceMemory(DevmemError):
    """An allocation asked for ``wanted`` bytes where ``free`` were to be had."""

    def __init__(self, message: str, *, wanted: int, free: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.wanted = wanted
        self.free = free


class ClosedError(DevmemError):
    """The object was closed by this program; nothing can be done with it any more."""


class StaleFragError(ClosedError):
    """The frag went back to the NIC (released, or its socket closed): its bytes may be another flow's by now."""


class BrokenError(DevmemError):
    """The object failed in a way it cannot recover from; close it."""


class BusyError(DevmemError):
    """The object is in use: a buffer that is bound or has frags out, a queue with another holder."""


class TokenError(DevmemError):
    """Tokens came back short: ``asked`` for, ``freed`` by the kernel. The difference was unknown or returned before."""

    def __init__(self, message: str, *, asked: int, freed: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.asked = asked
        self.freed = freed


class ControlTruncated(KernelError):
    """Control space was too small for even one frag (errno 525); nothing was consumed. ``needed`` is in bytes."""

    def __init__(self, *, needed: int, call: str = "recvmsg(MSG_SOCK_DEVMEM)") -> None:
        super().__init__(ETOOSMALL, call, hint=f"give at least {needed} bytes of control space (max_frags >= 1)")
        self.needed = needed


class NotZeroCopy(DevmemError):
    """A ``strict`` socket received ordinary bytes, in host memory. They are in ``data``: nothing is lost.

    ``linear_bytes`` and ``host_bytes`` count those of this one receive.
    """

    def __init__(self, message: str, *, linear_bytes: int, host_bytes: int, data: bytes, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.linear_bytes = linear_bytes
        self.host_bytes = host_bytes
        self.data = data


class ProtocolError(DevmemError):
    """A peer or this program broke the session protocol."""


class LocalProtocolError(ProtocolError):
    """This program asked for something the protocol does not allow in this state."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something the protocol does not allow."""


class AuthenticationFailed(RemoteProtocolError):
    """The peer could not prove that it knows the key."""


class Timeout(DevmemError, TimeoutError):
    """The time given ran out. The operation had no effect and may be called again."""


class BackendFallbackWarning(UserWarning):
    """``backend="auto"`` settled for less than the kernel backend; the text says why and how to fix it."""


class SteeringWarning(UserWarning):
    """A flow goes to no bound queue, so its payload lands in host memory; the text says why and how to mend it."""


class SettingWarning(UserWarning):
    """A NIC setting was made less exact than asked for, or was left as someone else has it; the text says which."""


class ShortageWarning(UserWarning):
    """New connections have to wait, since the system is out of file descriptors or memory; the text says the fix."""


class StarvationWarning(ResourceWarning):
    """No free page on a queue for over a second; the text says who holds how many tokens and for how long."""


class LeakWarning(ResourceWarning):
    """An object that holds device memory or fds was dropped without ``close()``."""
