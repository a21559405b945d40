"""Carry bytes between a guest's channels and this process, none of them waiting for another."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Final, TypeAlias

Write: TypeAlias = Callable[[bytes], object]

_CHUNK: Final = 1 << 16
_LENGTH_BYTES: Final = 4
_RESIZE: Final = b"\xff" * _LENGTH_BYTES  # in place of a piece's length; the size follows
_SIZE: Final = Struct("<HH")  # rows, columns


@dataclass(frozen=True)
class Resizes:
    """What follows a terminal's size: ``fd`` is readable when it may be another, ``size`` returns rows and columns."""

    fd: int
    size: Callable[[], tuple[int, int]]


class Relay:
    """Any number of outputs, each handed to a function, and at most one input, taken no faster than it is read.

    Lifetime: owns none of the fds; they stay open until after ``close()``.
    """

    def __init__(self) -> None:
        self._selector = selectors.PollSelector()  # unlike epoll it takes regular files, as standard input may be
        self._pending = b""  # of the input, read and not yet sent
        self._at_end = False
        self._source: int | None = None
        self._resizes: Resizes | None = None
        self._sink: socket.socket | None = None

    def add_output(self, source: socket.socket, write: Write) -> None:
        """Hand what ``source`` receives to ``write``, until its peer closes."""
        self._selector.register(source, selectors.EVENT_READ, lambda: self._move_output(source, write))

    def set_input(self, source: int, sink: socket.socket, resizes: Resizes | None = None) -> None:
        """Send what ``source`` (any fd) has on ``sink``, in the pieces that ``guest_init.feed_input`` takes.

        Args:
            resizes: of the terminal; each goes between two pieces.
        """
        self._source, self._sink, self._resizes = source, sink, resizes
        sink.setblocking(False)
        self._selector.register(source, selectors.EVENT_READ, self._read_input)
        if resizes is not None:
            self._selector.register(resizes.fd, selectors.EVENT_READ, self._resize)

    def has_output(self, source: socket.socket) -> bool:
        """Say whether more may come from an output."""
        return source in self._selector.get_map()

    def turn(self, timeout_s: float) -> None:
        """Wait until something can be moved, at most ``timeout_s`` seconds, and move it."""
        for key, _ in self._selector.select(timeout_s):
            key.data()

    def close(self) -> None:
        """Forget all fds."""
        self._selector.close()

    def _move_output(self, source: socket.socket, write: Write) -> None:
        try:
            data = os.read(source.fileno(), _CHUNK)
        except ConnectionError:
            data = b""
        if data:
            write(data)
        else:
            self._selector.unregister(source)

    def _read_input(self) -> None:
        assert self._source is not None
        data = os.read(self._source, _CHUNK)
        self._at_end = not data
        self._queue(len(data).to_bytes(_LENGTH_BYTES, "little") + data)

    def _resize(self) -> None:
        assert self._resizes is not None
        os.read(self._resizes.fd, _CHUNK)
        if not self._at_end:  # after the empty piece nobody reads
            self._queue(_RESIZE + _SIZE.pack(*self._resizes.size()))

    def _queue(self, data: bytes) -> None:
        """Send ``data``, and read no more of the input until it has gone."""
        assert self._source is not None
        if not self._pending:
            self._selector.unregister(self._source)
            self._selector.register(self._sink_socket(), selectors.EVENT_WRITE, self._send)
        self._pending += data

    def _send(self) -> None:
        assert self._source is not None
        sink = self._sink_socket()
        try:
            self._pending = self._pending[sink.send(self._pending) :]
        except ConnectionError:  # the guest is gone
            self._pending, self._at_end = b"", True
        if not self._pending:
            self._selector.unregister(sink)
            if not self._at_end:
                self._selector.register(self._source, selectors.EVENT_READ, self._read_input)

    def _sink_socket(self) -> socket.socket:
        assert self._sink is not None
        return self._sink
