"""Carry bytes between a guest's channels and this process, none of them waiting for another."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable
from typing import Final, TypeAlias

Write: TypeAlias = Callable[[bytes], object]

_CHUNK: Final = 1 << 16
_LENGTH_BYTES: Final = 4


class Relay:
    """Any number of outputs, each handed to a function, and at most one input, taken no faster than it is read.

    Lifetime: owns none of the fds; they stay open until after ``close()``.
    """

    def __init__(self) -> None:
        self._selector = selectors.PollSelector()  # unlike epoll it takes regular files, as standard input may be
        self._pending = b""  # of the input, read and not yet sent
        self._at_end = False
        self._source: int | None = None
        self._sink: socket.socket | None = None

    def add_output(self, source: socket.socket, write: Write) -> None:
        """Hand what ``source`` receives to ``write``, until its peer closes."""
        self._selector.register(source, selectors.EVENT_READ, write)

    def set_input(self, source: int, sink: socket.socket) -> None:
        """Send what ``source`` (any fd) has on ``sink``, in the pieces that ``guest_init.feed_input`` takes."""
        self._source, self._sink = source, sink
        sink.setblocking(False)
        self._selector.register(source, selectors.EVENT_READ)

    def has_output(self, source: socket.socket) -> bool:
        """Say whether more may come from an output."""
        return source in self._selector.get_map()

    def turn(self, timeout_s: float) -> None:
        """Wait until something can be moved, at most ``timeout_s`` seconds, and move it."""
        for key, _ in self._selector.select(timeout_s):
            if key.data is not None:
                self._move_output(key)
            elif key.fileobj is self._sink:
                self._send()
            else:
                self._read_input()

    def close(self) -> None:
        """Forget all fds."""
        self._selector.close()

    def _move_output(self, key: selectors.SelectorKey) -> None:
        try:
            data = os.read(key.fd, _CHUNK)
        except ConnectionError:
            data = b""
        if data:
            key.data(data)
        else:
            self._selector.unregister(key.fileobj)

    def _read_input(self) -> None:
        assert self._source is not None
        assert self._sink is not None
        data = os.read(self._source, _CHUNK)
        self._at_end = not data
        self._pending = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        self._selector.unregister(self._source)
        self._selector.register(self._sink, selectors.EVENT_WRITE)

    def _send(self) -> None:
        assert self._source is not None
        assert self._sink is not None
        try:
            self._pending = self._pending[self._sink.send(self._pending) :]
        except ConnectionError:  # the guest is gone
            self._pending, self._at_end = b"", True
        if not self._pending:
            self._selector.unregister(self._sink)
            if not self._at_end:
                self._selector.register(self._source, selectors.EVENT_READ)
