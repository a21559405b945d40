"""Several packets at a time: those of one doorbell, and the frames that a superframe is cut into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import pack, unpack_from

import pytest

from devmem_tcp.lab.checksum import verify_ip, verify_l4
from devmem_tcp.lab.crafting import Path, tcp_frame, udp_frame
from devmem_tcp.lab.frames import parse
from devmem_tcp.lab.wire import Direction, Packet, Port
from gvnic_driver import PASSED, PATH4, PATH6, QUEUES, Pair, Received, payload

CHECKED, IP_ERROR, L4_ERROR = 1 << 3, 1 << 4, 1 << 5


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    with pair.a, pair.b:
        yield pair
        for driver in (pair.a, pair.b):
            assert not driver.nic.mistakes.total, driver.nic.mistakes.counts


def introduce(pair: Pair) -> None:
    """Let the switch learn where ``b`` is, so that trains to it stay whole."""
    pair.b.put_packet(0, tcp_frame(PATH4.back(), 1, 1))
    assert sum(len(pair.a.receive(queue)) for queue in range(QUEUES)) == 1


def to_queue_0(pair: Pair) -> None:
    place = pair.b.memory.allocate(512)
    assert pair.b.command(0xA, pack(">HBBHHQQ", 0, 1, 0, 0, 128, 0, place)) == PASSED


def send_train(pair: Pair, frames: Sequence[bytes], *, checksum: Sequence[bool] = ()) -> None:
    """Send frames at one doorbell, the checksums of some of them as they are."""
    for number, frame in enumerate(frames):
        pair.a.tx_buffers = pair.a.memory.allocate(len(frame))
        fill = checksum[number] if checksum else True
        pair.a.put_packet(0, frame, checksum=fill, ring=number == len(frames) - 1)
    assert len(pair.a.completions(0)) == len(frames)


def segments(path: Path, count: int, size: int = 1448, **fields: int) -> list[bytes]:
    return [tcp_frame(path, 1, 2, payload(size), sequence=size * number, **fields) for number in range(count)]  # type: ignore[arg-type]


def judged(packet: Received) -> int:
    return packet.status & (CHECKED | IP_ERROR | L4_ERROR)


def test_a_train_of_one_flow_is_one_event(pair: Pair) -> None:
    pair.open(header_bytes=256)
    introduce(pair)
    to_queue_0(pair)
    frames = segments(PATH4, 30)
    send_train(pair, frames)
    got = pair.b.receive(0)
    assert [packet.data for packet in got] == frames
    assert {(packet.header_bytes, judged(packet), packet.rsc) for packet in got} == {(54, CHECKED, False)}
    assert pair.b.interrupts(QUEUES) == 1
    pair.b.enable(QUEUES)
    assert pair.b.interrupts(QUEUES) == 0, "nothing was left to tell"
    stats = pair.b.nic.statistics().rx[0]
    assert (stats.packets, stats.bytes) == (30, sum(map(len, frames)))


def test_a_train_of_all_kinds_stays_in_order_and_apart(pair: Pair) -> None:
    pair.open(header_bytes=256)
    introduce(pair)
    to_queue_0(pair)
    data = payload(700)
    wrong = bytearray(tcp_frame(PATH4, 1, 2, data))
    wrong[-1] ^= 1
    frames = [
        tcp_frame(PATH4, 1, 2, data),
        tcp_frame(PATH4, 1, 2, data[:5]),
        tcp_frame(PATH4, 1, 2),  # no payload
        tcp_frame(PATH4, 1, 2) + bytes(6),  # none, and Ethernet's padding
        tcp_frame(PATH4, 1, 2, data),
        bytes(wrong),
        tcp_frame(PATH4, 1, 3, data),  # another flow
        tcp_frame(PATH4, 1, 2, data, options=b"\x01" * 12),  # longer headers
        tcp_frame(PATH6, 1, 2, data),
        udp_frame(PATH4, 1, 2, data),
        udp_frame(PATH4, 1, 2, data),
    ]
    send_train(pair, frames, checksum=[frame != wrong for frame in frames])
    got = pair.b.receive(0)
    assert [packet.data for packet in got] == frames
    assert [packet.header_bytes for packet in got] == [54, 54, 54, 60, 54, 54, 54, 66, 74, 0, 0]
    assert [judged(packet) for packet in got] == [CHECKED | (L4_ERROR if frame == wrong else 0) for frame in frames]
    for packet, frame in zip(got, frames, strict=True):
        (alone,) = pair.carry(frame)
        assert (packet.hash, packet.packet_type) == (alone[1].hash, alone[1].packet_type)
    assert len({packet.hash for packet in got}) == 3


def test_trains_to_several_queues(pair: Pair) -> None:
    pair.open()
    introduce(pair)
    frames = [tcp_frame(PATH4, port, 80, payload(port)) for port in range(100, 140) for _ in range(2)]
    send_train(pair, frames)
    by_queue = {queue: [packet.data for packet in pair.b.receive(queue)] for queue in range(QUEUES)}
    assert sorted(frame for found in by_queue.values() for frame in found) == sorted(frames)
    for found in by_queue.values():
        assert found
        assert found == [frame for frame in frames if frame in found]


def test_more_than_a_train_is_sent_all_the_same(pair: Pair) -> None:
    pair.open(entries=512)
    introduce(pair)
    to_queue_0(pair)
    frames = segments(PATH6, 60)
    send_train(pair, frames)  # 90 KB
    assert [packet.data for packet in pair.b.receive(0)] == frames


def test_captures_show_every_packet_of_a_train(pair: Pair) -> None:
    pair.open()
    introduce(pair)
    seen: list[tuple[Direction, bytes]] = []

    def tap(port: Port, direction: Direction, packet: Packet) -> None:
        seen.append((direction, bytes(packet.data)))

    pair.a.nic._switch.add_tap(tap)
    frames = segments(PATH4, 3, 100)
    send_train(pair, frames)
    assert seen == [(direction, frame) for frame in frames for direction in (Direction.SENT, Direction.DELIVERED)]
    assert [packet.data for _, packet in pair.received()] == frames


def test_frames_beyond_the_mtu_are_dropped_out_of_a_train(pair: Pair) -> None:
    pair.open()
    introduce(pair)
    to_queue_0(pair)
    assert pair.b.command(0xB, pack(">I4xQ", 1, 1500)) == PASSED
    frames = [tcp_frame(PATH4, 1, 2, payload(size)) for size in (1460, 1461, 1460, 2000, 1)]
    send_train(pair, frames)
    assert [packet.data for packet in pair.b.receive(0)] == [frames[0], frames[2], frames[4]]
    assert pair.b.nic.statistics().rx[0].drops == 2


def test_a_train_while_the_link_is_down_is_counted_packet_by_packet(pair: Pair) -> None:
    pair.open()
    introduce(pair)
    pair.b.nic.set_link(False)
    send_train(pair, segments(PATH4, 3))
    pair.a.nic.set_link(False)
    send_train(pair, segments(PATH4, 2))
    assert pair.b.nic.statistics().drops == {"link_down": 3}
    assert pair.a.nic.statistics().drops == {"tx_link_down": 2}


def test_a_train_to_a_queue_that_is_gone(pair: Pair) -> None:
    pair.open()
    introduce(pair)
    to_queue_0(pair)
    assert pair.b.command(0x8, pack(">I", 0)) == PASSED
    send_train(pair, segments(PATH4, 4))
    assert pair.b.nic.statistics().drops == {"no_queue": 4}


# --- superframes that are cut ----------------------------------------------------------------------------------------


def cut_superframe(pair: Pair, size: int = 20_000) -> list[Received]:
    """Send a superframe by 1448 to queue 0; return what came."""
    pair.a.put_packet(0, tcp_frame(PATH4, 1, 2, payload(size)), mss=1448, header_bytes=54)
    return pair.b.receive(0)


def test_buffers_that_run_out_within_a_superframe_cost_its_rest(pair: Pair) -> None:
    pair.open(post=False)
    to_queue_0(pair)
    pair.b.post(0, 5)
    assert [packet.data[54:] for packet in cut_superframe(pair)] == [
        payload(20_000)[at : at + 1448] for at in range(0, 5 * 1448, 1448)
    ]
    stats = pair.b.nic.statistics().rx[0]
    assert (stats.packets, stats.drops, stats.drops_no_buffer, stats.posted) == (5, 9, 9, 0)


def test_a_buffer_out_of_reach_costs_one_frame_of_a_superframe(pair: Pair) -> None:
    pair.open(header_bytes=256, post=False)
    to_queue_0(pair)
    ring = pair.b.rx[0]
    good, ring.pages[3] = ring.pages[3], 1 << 40
    pair.b.post(0, 20)
    ring.pages[3] = good
    got = cut_superframe(pair)
    assert [number for number, packet in enumerate(got) if packet.errors & 1 << 2] == [3]
    assert len(got) == 14
    stats = pair.b.nic.statistics().rx[0]
    assert (stats.packets, stats.drops) == (13, 1)
    assert pair.b.nic.mistakes.counts == {"rx-buffer": 1}
    pair.b.nic.mistakes.counts.clear()


def test_faults_of_header_split_hit_each_frame_of_a_superframe(pair: Pair) -> None:
    pair.open(header_bytes=256)
    to_queue_0(pair)
    pair.b.nic.faults.set(unsplit_every=4, header_payload_bytes=10)
    sizes = [packet.header_bytes for packet in cut_superframe(pair)]
    assert sizes == [0 if number % 4 == 0 else 64 for number in range(1, 15)]
    assert pair.b.nic.statistics().faults == {"unsplit_every": 3, "header_payload_bytes": 11}


def test_a_superframe_whose_frames_exceed_the_mtu_is_dropped_but_for_the_last(pair: Pair) -> None:
    pair.open()
    to_queue_0(pair)
    assert pair.b.command(0xB, pack(">I4xQ", 1, 1400)) == PASSED
    assert [len(packet.data) for packet in cut_superframe(pair)] == [54 + 20_000 - 13 * 1448]
    assert pair.b.nic.statistics().rx[0].drops == 13


# --- superframes of more than 64 KiB ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [PATH4, PATH6])
@pytest.mark.parametrize("mss", [1448, 8948])
@pytest.mark.parametrize("size", [65_000, 70_000, 200_000])
def test_superframes_too_long_for_ip_are_received_in_several(pair: Pair, path: Path, mss: int, size: int) -> None:
    pair.open(rsc=True, header_bytes=256)
    data = payload(size)
    frame = tcp_frame(path, 1, 2, data, sequence=0xFFFFF000, flags=0x98, identification=9)  # CWR, ACK, PSH
    headers = len(frame) - size
    got = [packet for _, packet in pair.carry(frame, mss=mss, header_bytes=headers)]
    assert b"".join(packet.data[headers:] for packet in got) == data
    done = 0
    for packet in got:
        parsed = parse(packet.data)  # knows no length of 0
        assert parsed.payload_offset + parsed.payload_length == len(packet.data)
        assert verify_ip(packet.data)
        assert verify_l4(packet.data)
        sequence, flags = unpack_from("!I5xB", packet.data, parsed.l4_offset + 4)
        last = done + parsed.payload_length == size
        assert sequence == (0xFFFFF000 + done) % (1 << 32)
        assert flags == 0x10 | (0x80 if done == 0 else 0) | (0x08 if last else 0)
        if path is PATH4:
            assert unpack_from("!H", packet.data, 18)[0] == 9 + done // mss
        assert last or parsed.payload_length % mss == 0, "whole segments"
        assert last or headers + parsed.payload_length + mss > 0xFFFF, "as many as fit"
        assert (packet.rsc, packet.segment_bytes) == ((True, mss) if parsed.payload_length > mss else (False, 0))
        assert packet.header_bytes == headers
        done += parsed.payload_length


def test_a_superframe_that_fits_ip_to_the_byte_stays_whole(pair: Pair) -> None:
    pair.open(rsc=True)
    for size, packets in ((65535 - 40, 1), (65535 - 39, 2)):
        assert len(pair.carry(tcp_frame(PATH4, 1, 2, payload(size)), mss=1448, header_bytes=54)) == packets
    for size, packets in ((65535 - 20, 1), (65535 - 19, 2)):
        assert len(pair.carry(tcp_frame(PATH6, 1, 2, payload(size)), mss=1448, header_bytes=74)) == packets
