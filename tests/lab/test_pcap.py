"""The pcapng writer, read back by a small reader of the format's own words."""

from __future__ import annotations

import errno
import io
import os
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.lab.crafting import Path, tcp_frame
from devmem_tcp.lab.pcap import PcapWriter
from devmem_tcp.lab.wire import Direction, Packet, Switch

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

SECTION, INTERFACE, PACKET = 0x0A0D0D0A, 1, 6
PATH = Path.between("02:00:00:00:00:01", "10.0.0.1", "02:00:00:00:00:02", "10.0.0.2")


@dataclass
class Captured:
    interface: int
    time_ns: int
    wire_bytes: int
    data: bytes
    options: dict[int, bytes]


@dataclass
class Capture:
    """What a reader makes of a file: strict about every length, and about what must come before what."""

    interfaces: list[dict[int, bytes]] = field(default_factory=list)
    snap_lengths: list[int] = field(default_factory=list)
    packets: list[Captured] = field(default_factory=list)

    @classmethod
    def of(cls, data: bytes) -> Capture:
        capture = cls()
        offset = 0
        while offset < len(data):
            kind, total = struct.unpack_from("<II", data, offset)
            assert total % 4 == 0
            assert total >= 12
            assert struct.unpack_from("<I", data, offset + total - 4) == (total,)
            assert (kind == SECTION) == (offset == 0)
            capture._read_block(kind, data[offset + 8 : offset + total - 4])
            offset += total
        assert offset == len(data)
        return capture

    def _read_block(self, kind: int, body: bytes) -> None:
        if kind == SECTION:
            assert struct.unpack_from("<IHHq", body) == (0x1A2B3C4D, 1, 0, -1)
            read_options(body[16:])
        elif kind == INTERFACE:
            link_type, reserved, snap_length = struct.unpack_from("<HHI", body)
            assert (link_type, reserved) == (1, 0)
            self.snap_lengths.append(snap_length)
            self.interfaces.append(read_options(body[8:]))
        else:
            assert kind == PACKET
            interface, high, low, kept, wire_bytes = struct.unpack_from("<IIIII", body)
            assert interface < len(self.interfaces)
            end = 20 + kept
            padded = end + -kept % 4
            assert body[end:padded] == bytes(padded - end)
            options = read_options(body[padded:])
            self.packets.append(Captured(interface, high << 32 | low, wire_bytes, body[20:end], options))


def read_options(data: bytes) -> dict[int, bytes]:
    options: dict[int, bytes] = {}
    offset = 0
    while True:
        code, size = struct.unpack_from("<HH", data, offset)
        value = data[offset + 4 : offset + 4 + size]
        assert len(value) == size
        offset += 4 + size + -size % 4
        if code == 0:
            assert size == 0
            assert offset == len(data)
            return options
        options[code] = value


def test_a_file_without_packets_is_whole() -> None:
    file = io.BytesIO()
    PcapWriter(file)
    assert Capture.of(file.getvalue()) == Capture()


def test_packets_directions_times_and_interfaces() -> None:
    file = io.BytesIO()
    times = iter([1_700_000_000_123_456_789, 1_700_000_000_123_456_790])
    writer = PcapWriter(file, clock=lambda: next(times))
    frame = tcp_frame(PATH, 1, 2, b"payload")
    writer.write("nic0", Direction.SENT, Packet(frame))
    writer.write("nic1", Direction.DELIVERED, Packet(frame))
    writer.write("nic0", Direction.DELIVERED, Packet(memoryview(frame)), time_ns=(1 << 64) - 1)
    capture = Capture.of(file.getvalue())

    assert [interface[2] for interface in capture.interfaces] == [b"nic0", b"nic1"]
    assert [interface[9] for interface in capture.interfaces] == [b"\x09"] * 2  # 10^-9 s
    assert [one.interface for one in capture.packets] == [0, 1, 0]
    assert [one.options for one in capture.packets] == [{2: bytes([flags, 0, 0, 0])} for flags in (2, 1, 1)]
    assert [one.time_ns for one in capture.packets] == [
        1_700_000_000_123_456_789,
        1_700_000_000_123_456_790,
        (1 << 64) - 1,
    ]
    assert all((one.data, one.wire_bytes) == (frame, len(frame)) for one in capture.packets)
    assert writer.packets == 3


def test_a_superframe_is_written_whole_and_says_so() -> None:
    file = io.BytesIO()
    frame = tcp_frame(PATH, 1, 2, bytes(range(256)) * 800)
    PcapWriter(file).write("nic0", Direction.SENT, Packet(frame, gso_size=1448))
    (captured,) = Capture.of(file.getvalue()).packets
    assert captured.data == frame
    assert captured.options[1] == b"superframe, MSS 1448"


@given(st.lists(st.binary(max_size=70), max_size=10), st.integers(0, 40), st.text(max_size=20))
def test_any_packets_come_back_up_to_the_snap_length(frames: list[bytes], snap_length: int, name: str) -> None:
    file = io.BytesIO()
    writer = PcapWriter(file, snap_length=snap_length)
    for index, frame in enumerate(frames):
        writer.write(name, Direction.SENT, Packet(frame), time_ns=index)
    capture = Capture.of(file.getvalue())
    assert [one.data for one in capture.packets] == [frame[: snap_length or None] for frame in frames]
    assert [one.wire_bytes for one in capture.packets] == [len(frame) for frame in frames]
    assert [one.time_ns for one in capture.packets] == list(range(len(frames)))
    assert capture.snap_lengths == ([snap_length] if frames else [])
    assert [interface[2] for interface in capture.interfaces] == ([name.encode()] if frames else [])


def test_a_negative_snap_length_is_refused() -> None:
    with pytest.raises(ValueError, match="snap length"):
        PcapWriter(io.BytesIO(), snap_length=-1)


class Sink:
    def __init__(self, name: str) -> None:
        self.name = name

    def deliver(self, packet: Packet) -> None:
        pass


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        (None, [(b"a", 2), (b"b", 1), (b"c", 1)]),
        (["b"], [(b"b", 1)]),
        ([], []),
    ],
)
def test_as_a_tap_it_captures_the_ports_asked_for(ports: list[str] | None, expected: list[tuple[bytes, int]]) -> None:
    file = io.BytesIO()
    switch = Switch()
    sinks = [Sink(name) for name in "abc"]
    for sink in sinks:
        switch.attach(sink)
    switch.add_tap(PcapWriter(file, ports=ports))
    switch.send(sinks[0], Packet(tcp_frame(PATH, 1, 2)))
    capture = Capture.of(file.getvalue())
    assert [(capture.interfaces[one.interface][2], one.options[2][0]) for one in capture.packets] == expected


class FullDisk(io.BytesIO):
    """Takes ``room`` bytes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def write(self, data: Buffer) -> int:
        if self.tell() + len(memoryview(data)) > self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_ends_the_capture_and_not_the_traffic(caplog: pytest.LogCaptureFixture) -> None:
    file = FullDisk(1000)
    switch = Switch()
    sinks = [Sink("a"), Sink("b")]
    for sink in sinks:
        switch.attach(sink)
    writer = PcapWriter(file)
    switch.add_tap(writer)
    for _ in range(10):
        switch.send(sinks[0], Packet(tcp_frame(PATH, 1, 2)))
    assert switch.counters[sinks[1]].delivered_packets == 10
    assert isinstance(writer.failure, OSError)
    assert writer.failure.errno == errno.ENOSPC
    assert 0 < writer.packets < 20
    assert len(Capture.of(file.getvalue()).packets) == writer.packets
    assert [record.getMessage() for record in caplog.records] == [
        f"capture ends after {writer.packets} packets: {writer.failure}"
    ]
    with pytest.raises(OSError, match="No space left"):
        writer.write("a", Direction.SENT, Packet(bytes(1000)))


def test_flush_reaches_the_file() -> None:
    raw = io.BytesIO()
    buffered = io.BufferedWriter(raw)
    writer = PcapWriter(buffered)
    writer.write("a", Direction.SENT, Packet(b"x" * 60), time_ns=0)
    writer.flush()
    assert len(Capture.of(raw.getvalue()).packets) == 1
