"""What the operating system refuses, as this package's errors; and how much memory there is left."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from devmem_tcp.errors import KernelError, OutOfDeviceMemory
from devmem_tcp.sys import calls

_NO_HINTS: Final[Mapping[int, str]] = MappingProxyType({})


@contextlib.contextmanager
def refusals(
    call: str, *, wanted: int, free: int | None = None, hints: Mapping[int, str] = _NO_HINTS
) -> Iterator[None]:
    """Raise an OSError of the block as OutOfDeviceMemory (ENOMEM) or as KernelError (anything else).

    Args:
        call: the operation, for people.
        wanted: bytes asked for.
        free: bytes to be had; None: the memory available on this machine.
        hints: what to do next, by errno.
    """
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        hint = hints.get(number, "")
        if number != errno.ENOMEM:
            raise KernelError(number, call, hint=hint) from error
        if free is None:
            free = meminfo().get("MemAvailable", 0)
        message = f"{call}: no memory for {wanted} bytes ({free} available)"
        raise OutOfDeviceMemory(message, wanted=wanted, free=free, hint=hint) from error


def meminfo() -> dict[str, int]:
    """Return the fields of /proc/meminfo in bytes (its ``HugePages_`` ones are numbers of pages); empty if unreadable.

    Source: Documentation/filesystems/proc.rst, meminfo.
    """
    try:
        text = calls.read_text("/proc/meminfo")
    except OSError:
        return {}
    fields = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        value, _, unit = rest.strip().partition(" ")
        if value.isdigit():
            fields[name] = int(value) * (1024 if unit == "kB" else 1)
    return fields


def check_available(size_bytes: int) -> None:
    """Raise OutOfDeviceMemory if every byte is to be touched and this machine cannot have that many.

    Linux promises memory files without counting and finds out at the first touch, by SIGBUS or the OOM killer.
    """
    free = meminfo().get("MemAvailable", size_bytes)
    if size_bytes > free:
        raise OutOfDeviceMemory(
            f"{size_bytes} bytes wanted, {free} available on this machine (MemAvailable of /proc/meminfo)",
            wanted=size_bytes,
            free=free,
            hint="allocate less, or free memory first",
        )
