"""The port for a host process, and the simple host that answers on it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.lab.checksum import verify_ip, verify_l4
from devmem_tcp.lab.crafting import BROADCAST, Path, answer, arp_request, echo_request, tcp_frame, udp_frame
from devmem_tcp.lab.frames import parse
from devmem_tcp.lab.hostport import MAX_FRAME_BYTES, HostPort
from devmem_tcp.lab.segments import segment
from devmem_tcp.lab.wire import Packet, Switch

PATH4 = Path.between("02:00:00:00:00:01", "10.0.0.1", "02:00:00:00:00:02", "10.0.0.2")
PATH6 = Path.between("02:00:00:00:00:01", "fd00::1", "02:00:00:00:00:02", "fd00::2")
BOTH_PATHS = pytest.mark.parametrize("path", [PATH4, PATH6], ids=["IPv4", "IPv6"])
OWN = frozenset({PATH4.dst, PATH6.dst})


class Jack:
    name = "nic"

    def __init__(self) -> None:
        self.got: list[bytes] = []

    def deliver(self, packet: Packet) -> None:
        self.got.append(bytes(packet.data))


class Bench:
    """A NIC's port, and a host port with its process's end."""

    def __init__(self) -> None:
        self.switch = Switch()
        self.nic = Jack()
        self.switch.attach(self.nic)
        self.port, self.process = HostPort.pair("host", self.switch)
        self.process.settimeout(5)

    def close(self) -> None:
        self.port.close()
        self.process.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_frames_pass_both_ways(bench: Bench) -> None:
    there, back = udp_frame(PATH4, 1, 2, b"there"), udp_frame(PATH4.back(), 2, 1, b"back")
    bench.process.send(there)
    bench.process.send(there)
    bench.port.ready()
    assert bench.nic.got == [there, there]
    bench.switch.send(bench.nic, Packet(back))
    assert bench.process.recv(MAX_FRAME_BYTES) == back


def test_ready_with_nothing_to_read_returns(bench: Bench) -> None:
    bench.port.ready()
    assert not bench.port.closed


def test_a_burst_is_taken_in_turns(bench: Bench) -> None:
    for _ in range(70):
        bench.process.send(udp_frame(PATH4, 1, 2))
    bench.port.ready()
    assert len(bench.nic.got) == 64
    bench.port.ready()
    assert len(bench.nic.got) == 70


def test_a_superframe_arrives_in_segments(bench: Bench) -> None:
    superframe = tcp_frame(PATH4, 1, 2, bytes(range(200)) * 20)
    bench.switch.send(bench.nic, Packet(superframe, gso_size=1448))
    assert [bench.process.recv(MAX_FRAME_BYTES) for _ in range(3)] == segment(superframe, 54, 1448)
    bench.switch.send(bench.nic, Packet(udp_frame(PATH4, 1, 2, bytes(3000)), gso_size=1448))
    assert bench.port.counters.not_segmented == 1


def test_a_process_that_does_not_read_loses_frames_and_holds_nobody_up(bench: Bench) -> None:
    frames = 2000
    for _ in range(frames):
        bench.switch.send(bench.nic, Packet(BROADCAST + bytes(1500)))
    lost = bench.port.counters.not_taken
    assert 0 < lost < frames
    for _ in range(frames - lost):
        bench.process.recv(MAX_FRAME_BYTES)
    bench.process.setblocking(False)
    with pytest.raises(BlockingIOError):
        bench.process.recv(1)


def test_frames_that_are_too_long_are_counted(bench: Bench) -> None:
    for size in (MAX_FRAME_BYTES + 1, MAX_FRAME_BYTES):
        bench.process.send(BROADCAST + bytes(size - len(BROADCAST)))
        bench.port.ready()
    assert [len(frame) for frame in bench.nic.got] == [MAX_FRAME_BYTES]
    assert bench.port.counters.too_long == 1
    bench.switch.send(bench.nic, Packet(BROADCAST + bytes(1 << 20)))
    assert bench.port.counters.too_long == 2


def test_frames_to_a_process_that_hung_up_are_counted(bench: Bench) -> None:
    bench.process.close()
    bench.switch.send(bench.nic, Packet(BROADCAST + bytes(60)))
    assert bench.port.counters.not_taken == 1


@pytest.mark.parametrize("unread", [False, True])
def test_a_process_that_hangs_up_is_unplugged(bench: Bench, unread: bool) -> None:
    if unread:
        bench.switch.send(bench.nic, Packet(BROADCAST + bytes(60)))
    bench.process.close()
    bench.port.ready()
    assert bench.port.closed
    assert bench.port.fileno() == -1
    assert set(bench.switch.counters) == {bench.nic}
    bench.port.ready()


def test_what_a_process_sent_before_it_hung_up_arrives(bench: Bench) -> None:
    bench.process.send(udp_frame(PATH4, 1, 2))
    bench.process.close()
    bench.port.ready()
    assert len(bench.nic.got) == 1
    assert bench.port.closed


def test_close_is_seen_by_the_process_and_may_be_repeated(bench: Bench) -> None:
    with bench.port:
        pass
    bench.port.close()
    assert bench.process.recv(MAX_FRAME_BYTES) == b""


def test_a_name_that_is_taken_leaves_nothing_open(bench: Bench) -> None:
    with pytest.raises(ValueError, match="'host' is attached already"):
        HostPort.pair("host", bench.switch)


def test_the_process_end_passes_messages_whole(bench: Bench) -> None:
    assert bench.process.type == socket.SOCK_SEQPACKET


# --- a simple host ---------------------------------------------------------------------------------------------------


def test_arp_is_answered() -> None:
    reply = answer(arp_request(PATH4.src_mac, PATH4.src, PATH4.dst), PATH4.dst_mac, OWN)
    assert reply is not None
    assert reply[:14] == PATH4.src_mac + PATH4.dst_mac + b"\x08\x06"
    assert reply[20:22] == b"\0\2"
    assert reply[22:] == PATH4.dst_mac + PATH4.dst + PATH4.src_mac + PATH4.src
    assert answer(reply, PATH4.src_mac, frozenset({PATH4.src})) is None  # a reply is not a question
    assert answer(arp_request(PATH4.src_mac, PATH4.src, b"\x0a\0\0\x09"), PATH4.dst_mac, OWN) is None


@BOTH_PATHS
def test_ping_is_answered(path: Path) -> None:
    reply = answer(echo_request(path, 0x1234, 7, b"payload"), path.dst_mac, OWN)
    assert reply is not None
    expected = bytearray(echo_request(path.back(), 0x1234, 7, b"payload"))
    at = parse(reply).l4_offset
    assert reply[:at] == expected[:at]
    assert reply[at] == (0 if path is PATH4 else 129)
    assert reply[at + 4 :] == expected[at + 4 :]
    assert verify_l4(reply)
    assert verify_ip(reply)
    assert answer(reply, path.src_mac, frozenset({path.src})) is None


@BOTH_PATHS
def test_ping_is_not_answered_when_damaged_tagged_or_for_another(path: Path) -> None:
    frame = echo_request(path, 1, 2, b"payload")
    assert answer(frame[:-1] + b"?", path.dst_mac, OWN) is None
    assert answer(frame[:12] + b"\x81\0\0\5" + frame[12:], path.dst_mac, OWN) is None
    assert answer(frame, path.dst_mac, frozenset()) is None


def neighbour_solicitation(target: bytes, path: Path = PATH6) -> bytes:
    """An echo request's frame, made a solicitation: same layout of type, checksum and 32 bits before the rest."""
    frame = bytearray(echo_request(path, 0, 0, target))
    sum_before = 128 << 8
    sum_after = 135 << 8
    frame[54] = 135
    value = int.from_bytes(frame[56:58], "big") - (sum_after - sum_before)
    frame[56:58] = (value % 65535).to_bytes(2, "big")
    assert verify_l4(frame)
    return bytes(frame)


def test_a_neighbour_solicitation_is_answered() -> None:
    reply = answer(neighbour_solicitation(PATH6.dst), PATH6.dst_mac, OWN)
    assert reply is not None
    parsed = parse(reply)
    assert (parsed.src, parsed.dst, reply[21]) == (PATH6.dst, PATH6.src, 255)
    assert reply[54] == 136
    assert reply[58:] == b"\x60\0\0\0" + PATH6.dst + b"\2\1" + PATH6.dst_mac
    assert verify_l4(reply)
    assert answer(neighbour_solicitation(PATH6.src), PATH6.dst_mac, OWN) is None


def test_a_solicitation_cut_short_is_not_answered() -> None:
    for target in (PATH6.dst[:15], PATH4.dst):
        assert answer(neighbour_solicitation(target) + PATH6.dst[len(target) :], PATH6.dst_mac, OWN) is None


def test_who_has_no_address_yet_is_not_answered() -> None:
    nobody4, nobody6 = bytes(4), PATH6._replace(src=bytes(16))
    assert answer(arp_request(PATH4.src_mac, nobody4, PATH4.dst), PATH4.dst_mac, OWN) is None
    assert answer(neighbour_solicitation(PATH6.dst, nobody6), PATH6.dst_mac, OWN) is None


@given(st.binary(max_size=100), st.sampled_from([b"\x08\x00", b"\x08\x06", b"\x86\xdd"]))
def test_any_bytes_may_be_answered_or_not(data: bytes, ether_type: bytes) -> None:
    reply = answer(bytes(12) + ether_type + data, PATH4.dst_mac, OWN)
    assert reply is None or parse(reply).l3_length > 0
