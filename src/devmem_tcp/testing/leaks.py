"""The leak oracle: what a block of code left behind in this process.

``leak_check`` looks at fds, threads, child processes, mapped memory files, and this package's own objects that hold
something (sockets, bindings, Buffers …) and were never closed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from devmem_tcp.buffers import Buffer
from devmem_tcp.closing import Closing

# Opened by the interpreter or the C library at some first use and kept for the life of the process.
_KEPT_BY_INTERPRETER: Final = frozenset({"/dev/urandom", "/dev/random"})

# Memory files and dma-bufs as /proc/self/maps spells them: inode, then a path that starts with one of these names.
_MEMORY_FILE: Final = re.compile(r" (?P<inode>\d+) +(?P<path>/(?:memfd|dmabuf):.*)$")


@dataclass(frozen=True, slots=True)
class _Fd:
    """One open fd. The inode tells a reopened number from the old file; ``target`` is for people."""

    number: int
    device: int
    inode: int
    target: str

    def __str__(self) -> str:
        return f"fd {self.number} -> {self.target}"


@dataclass(frozen=True, slots=True)
class _Holdings:
    """What the process holds at one moment."""

    fds: frozenset[_Fd]
    threads: frozenset[threading.Thread]
    children: frozenset[int]
    mappings: Counter[str]
    objects: tuple[Closing, ...]


@contextlib.contextmanager
def leak_check() -> Iterator[None]:
    """Raise AssertionError, naming each thing, if the block leaves more behind than it found.

    Looks at fds, threads, child processes (also dead ones that nobody waited for), mappings of memory files and
    dma-bufs, and unclosed objects of this package. Garbage is collected first, at both ends: an object that only a
    cycle keeps alive is no leak. A block that raises is not judged: its own error goes on.

    Threads: judges the whole process, so nothing else may open or close things at the same time.
    """
    before = _look()
    yield
    leaks = _difference(before, _look())
    if leaks:
        raise AssertionError("left behind:\n  " + "\n  ".join(leaks))


def _look() -> _Holdings:
    gc.collect()
    return _Holdings(
        fds=frozenset(_open_fds()),
        threads=frozenset(threading.enumerate()),
        children=frozenset(_children()),
        mappings=Counter(_memory_files()),
        objects=tuple(_unclosed()),
    )


def _difference(before: _Holdings, after: _Holdings) -> list[str]:
    known = {id(thing) for thing in before.objects}
    return [
        *(str(fd) for fd in sorted(after.fds - before.fds, key=lambda fd: fd.number)),
        *(f"thread {thread.name!r}" for thread in after.threads - before.threads),
        *(f"child process {pid}" for pid in sorted(after.children - before.children)),
        *(f"mapping of {path} ({count} more)" for path, count in (after.mappings - before.mappings).items()),
        *(_describe(thing) for thing in after.objects if id(thing) not in known),
    ]


def _open_fds() -> Iterator[_Fd]:
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            status = os.fstat(int(name))
        except OSError:  # the fd that listdir itself had open
            continue
        if target not in _KEPT_BY_INTERPRETER:
            yield _Fd(int(name), status.st_dev, status.st_ino, target)


def _children() -> Iterator[int]:
    me = os.getpid()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(errors="replace")
        except OSError:  # the process ended meanwhile
            continue
        # proc(5): pid (name) state ppid …; the name may hold spaces and parentheses itself.
        if int(text.rpartition(")")[2].split()[1]) == me:
            yield int(path.parent.name)


def _memory_files() -> Iterator[str]:
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        if found := _MEMORY_FILE.search(line):
            yield f"{found['path']} inode {found['inode']}"


def _unclosed() -> Iterator[Closing]:
    classes = _subclasses(Closing)
    for thing in gc.get_objects():
        # isinstance() would ask proxies and half-made objects of strangers for their class; type() disturbs nobody.
        if type(thing) in classes and not getattr(thing, "closed", True):
            yield thing


def _subclasses(root: type) -> set[type]:
    found: set[type] = set()
    below: type
    for below in type.__subclasses__(root):
        found |= {below} | _subclasses(below)
    return found


def _describe(thing: Closing) -> str:
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if isinstance(thing, Buffer):
        held_by = ", ".join(thing.holders) or "nobody"
        return f"{name} of {thing.size_bytes} bytes, never closed, held by {held_by}"
    return f"{name}, never closed"
