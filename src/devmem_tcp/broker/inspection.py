"""What an fd that a client sent is, found out without asking the file itself.

Even fstat(2) or lseek(2) of a file on a FUSE file system wait for the program behind it, which may be the client. The
kernel's own account of an fd, /proc/self/fdinfo, waits for nobody.
"""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

from devmem_tcp.errors import BindError
from devmem_tcp.sys import calls

_EXPORTER: Final = "exp_name"  # in the fdinfo of dma-bufs alone


class DmabufFacts(NamedTuple):
    """A dma-buf: its size, and how many hold it: fds anywhere, memory maps, bindings."""

    size_bytes: int
    references: int


def inspect_dmabuf(fd: int) -> DmabufFacts:
    """Return the facts of a dma-buf.

    Kernel: drivers/dma-buf/dma-buf.c, dma_buf_show_fdinfo.

    Raises:
        BindError: EINVAL: the fd is something else.
    """
    fields: dict[str, str] = {}
    for line in calls.read_text(f"/proc/self/fdinfo/{fd}").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name, value.strip())  # the first: the client chose the name that comes last, newlines and all
    size, count = fields.get("size", ""), fields.get("count", "")
    if _EXPORTER not in fields or not (size.isdecimal() and count.isdecimal()):
        raise BindError(
            errno.EINVAL, "bind-rx", hint="give the fd of a dma-buf: memory.Udmabuf, DmaHeap or Cuda make some"
        )
    return DmabufFacts(int(size), int(count))
