"""Writing to a place in a file, all of it."""

from __future__ import annotations

from devmem_tcp.sys import disk


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes, in as many calls as the system makes of it. Kernel: pwrite(2)."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += disk.write_at(fd, view[done:], offset + done)
