"""System calls on namespaces: the rules of ``calls``, and its seam."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from devmem_tcp.sys.calls import _enter

_CLONE_NEWNET: Final = 0x40000000  # uapi/linux/sched.h

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)


def namespace(kind: str) -> int:
    """Return the inode number of a namespace of the calling thread: ``net``, ``pid`` …"""
    _enter("stat")
    return os.stat(f"/proc/thread-self/ns/{kind}").st_ino


def open_namespace(path: str) -> int:
    """Open a namespace by a path that stands for it (``/proc/PID/ns/net``, ``/run/netns/NAME``), close-on-exec."""
    _enter("open")
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def enter_network_namespace(fd: int) -> None:
    """Move the calling thread, and no other, to a network namespace; what it opens from now on belongs there.

    Kernel: setns(2); needs CAP_SYS_ADMIN. EINVAL: the fd is not of a network namespace.
    """
    _enter("setns")
    if _libc.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
