"""Payload between memory and files: every byte, in order, whatever the shape of its pieces; windows reused in time."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from devmem_tcp.cli.failure import VerificationFailed
from devmem_tcp.cli.recv import payload
from devmem_tcp.cli.sinks import FileSink, HashSink, PatternSink
from devmem_tcp.cli.sources import PatternSource
from devmem_tcp.cli.windows import Windows
from devmem_tcp.errors import Timeout
from devmem_tcp.testing.patterns import pattern
from devmem_tcp.types import FRAG_DTYPE, CompletionRange, FragBatch, FragKind


def batch_of(*frags: tuple[int, int, FragKind], inline: bytes = b"") -> FragBatch:
    rows = [(offset, size, 1, 1, kind) for offset, size, kind in frags]
    return FragBatch(np.array(rows, FRAG_DTYPE), sum(size for _, size, _ in frags), memoryview(inline), None)


def test_payload_is_in_order_and_neighbours_are_one_piece() -> None:
    memory = memoryview(bytes(range(100)))
    batch = batch_of(
        (20, 5, FragKind.DMABUF),
        (25, 5, FragKind.DMABUF),
        (0, 2, FragKind.LINEAR),
        (2, 1, FragKind.LINEAR),
        (10, 4, FragKind.DMABUF),
        (5, 5, FragKind.DMABUF),
        (3, 2, FragKind.HOST),
        (5, 1, FragKind.DMABUF),
        inline=b"abcde",
    )
    pieces = payload(batch, memory)
    assert [bytes(piece) for piece in pieces] == [
        bytes(range(20, 30)),
        b"abc",
        bytes(range(10, 14)),
        bytes(range(5, 10)),
        b"de",
        bytes([5]),
    ]


def test_a_file_takes_more_pieces_than_one_writev_may_have(tmp_path: Path) -> None:
    data = pattern(251, 3000).tobytes()
    path = tmp_path / "out"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        sink = FileSink(fd, str(path))
        sink.take([memoryview(data)[at : at + 1] for at in range(len(data))])
    finally:
        os.close(fd)
    assert path.read_bytes() == data
    assert sink.written == 3000


def test_short_writes_go_on_where_they_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pattern(251, 5000).tobytes()
    written = bytearray()

    def writev(fd: int, pieces: list[memoryview]) -> int:
        some = b"".join(pieces)[:7]
        written.extend(some)
        return len(some)

    with open(os.devnull, "wb") as nowhere:
        sink = FileSink(nowhere.fileno(), os.devnull)
        monkeypatch.setattr(os, "writev", writev)
        sink.take([memoryview(data)[:3], memoryview(data)[3:13], memoryview(data)[13:]])
    assert written == data
    assert sink.written == 5000


def test_a_stdout_that_does_not_block_is_waited_for() -> None:
    data = pattern(251, 1 << 20).tobytes()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    got = bytearray()

    def read() -> None:
        while piece := os.read(reading, 50_000):
            got.extend(piece)

    reader = threading.Thread(target=read)
    try:
        reader.start()
        FileSink(writing, "-").take([memoryview(data)])
    finally:
        os.close(writing)
        reader.join()
        os.close(reading)
    assert got == data


def test_the_pattern_is_checked_across_pieces() -> None:
    sink = PatternSink(7)
    good = pattern(7, 100)
    sink.take([good[:10].data, good[10:11].data])
    sink.take([good[11:50].data])
    wrong = good[50:].copy()
    wrong[20] = 99
    with pytest.raises(VerificationFailed, match=r"at offset 70: expected 1, found 99"):
        sink.take([wrong[:15].data, wrong[15:].data])


def test_the_hash_is_that_of_all_pieces() -> None:
    sink = HashSink()
    sink.take([memoryview(b"a"), memoryview(b"")])
    sink.take([memoryview(b"bc")])
    assert sink.hexdigest() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_pattern_source_goes_on_from_window_to_window() -> None:
    source = PatternSource(7, 100, window_bytes=30)
    window = bytearray(30)
    made = b"".join(bytes(window[: source.fill(memoryview(window))]) for _ in range(5))
    assert made == pattern(7, 100).tobytes()
    assert source.fill(memoryview(window)) == 0


class Completer:
    """Stands for a socket: its completions are given by the test."""

    def __init__(self) -> None:
        self.ready: list[CompletionRange] = []
        self.later: list[list[CompletionRange]] = []

    def read_completions(self) -> list[CompletionRange]:
        ready, self.ready = self.ready, []
        return ready

    def wait_completions(self, timeout_s: float | None) -> list[CompletionRange]:
        if not self.later:
            raise Timeout("nothing completed")
        return self.later.pop(0)


def test_a_window_is_free_again_only_when_all_its_sends_are_complete() -> None:
    sock = Completer()
    windows = Windows(buffer_bytes=10_000, window_bytes=4096)  # two, and a rest too small for a third
    first, second = windows.take(sock, None), windows.take(sock, None)
    assert (first, second) == (0, 4096)
    for offset in (first, first, second):  # numbers 0, 1 and 2
        windows.sent(offset)
    sock.ready = [CompletionRange(0, 0)]
    with pytest.raises(Timeout):
        windows.take(sock, 1.0)
    sock.later = [[CompletionRange(1, 2)]]
    assert windows.take(sock, None) == second  # completed last, taken first
    assert windows.take(sock, None) == first
    assert windows.completions == 2


def test_waiting_for_all_ends_with_the_last_completion() -> None:
    sock = Completer()
    windows = Windows(buffer_bytes=8192, window_bytes=4096)
    for _ in range(2):
        windows.sent(windows.take(sock, None))
    sock.later = [[CompletionRange(1, 1)], [CompletionRange(0, 0)]]
    windows.wait_all(sock, None)
    assert not sock.later
    with pytest.raises(ValueError, match="does not fit"):
        Windows(buffer_bytes=4096, window_bytes=4097)
