"""Packets from one gVNIC through a switch into another's memory: sizes, splits, superframes, checksums, queues."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from struct import pack, unpack, unpack_from

import pytest

from devmem_tcp.lab.checksum import verify_ip, verify_l4
from devmem_tcp.lab.crafting import Path, arp_request, echo_request, tcp_frame, udp_frame
from devmem_tcp.lab.frames import parse
from devmem_tcp.lab.wire import Packet
from devmem_tcp.nicmodel.flow import Flow
from devmem_tcp.nicmodel.toeplitz import Toeplitz
from gvnic_driver import (
    PASSED,
    PATH4,
    PATH6,
    QUEUES,
    Driver,
    Pair,
    Received,
    RxRing,
    flow_rule,
    payload,
    set_flow_rule,
)

TCP4, UDP4, TCP6 = 0, 1, 5
CHECKED, IP_ERROR, L4_ERROR = 1 << 3, 1 << 4, 1 << 5


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    with pair.a, pair.b:
        yield pair
        for driver in (pair.a, pair.b):
            assert not driver.nic.mistakes.total, driver.nic.mistakes.counts


def packet_type(packet: Received, driver: Driver) -> tuple[int, int]:
    """Return L3 and L4 type, as the packet type map has them."""
    place = driver.memory.allocate(2048)
    assert driver.command(0xE, pack(">QQ", 2048, place)) == PASSED
    l3, l4 = driver.memory.read(place + 2 * packet.packet_type, 2)
    return l3, l4


SIZES = (0, 1, 2, 18, 19, 100, 202, 203, 1000, 1447, 1448, 4041, 4042, 4043, 4096, 8137, 8138, 8139, 8946)


@pytest.mark.parametrize("path", [PATH4, PATH6])
@pytest.mark.parametrize("header_bytes", [0, 256])
@pytest.mark.parametrize("buffer_bytes", [2048, 4096])
def test_frames_of_all_sizes(pair: Pair, path: Path, header_bytes: int, buffer_bytes: int) -> None:
    pair.open(header_bytes=header_bytes, buffer_bytes=buffer_bytes)
    headers = len(tcp_frame(path, 1, 2))
    for size in SIZES:
        size = min(size, 9000 + 14 - headers)
        frame = tcp_frame(path, 1, 2, payload(size))
        packet = pair.carry_one(frame, pieces=(14, 20, size // 3, size // 3))  # type: ignore[arg-type]
        assert packet.data == frame
        assert packet.status & (CHECKED | IP_ERROR | L4_ERROR) == CHECKED
        assert packet.header_bytes == (headers if header_bytes else 0)
        rest = len(frame) - packet.header_bytes
        assert packet.sizes == [
            min(buffer_bytes, rest - at) for at in range(0, rest, buffer_bytes)
        ] or packet.sizes == [0]
        assert not packet.rsc
        assert packet_type(packet, pair.b) == (2 if path is PATH4 else 3, 2)


@pytest.mark.parametrize("path", [PATH4, PATH6])
def test_checksums_are_filled_in(pair: Pair, path: Path) -> None:
    pair.open()
    for frame in (tcp_frame(path, 1, 2, payload(777)), udp_frame(path, 1, 2, payload(778))):
        parsed = parse(frame)
        at = parsed.l4_offset + (16 if parsed.is_tcp else 6)
        partial = bytearray(frame)
        partial[at : at + 2] = b"\xab\xcd"
        packet = pair.carry_one(bytes(partial))
        assert packet.data == frame


def test_checksums_are_judged_where_the_sender_made_them(pair: Pair) -> None:
    pair.open()
    frame = bytearray(tcp_frame(PATH4, 1, 2, payload(100)))
    assert pair.carry_one(bytes(frame), checksum=False).status & (CHECKED | IP_ERROR | L4_ERROR) == CHECKED
    frame[-1] ^= 1
    assert pair.carry_one(bytes(frame), checksum=False).status & (IP_ERROR | L4_ERROR) == L4_ERROR
    frame[-1] ^= 1
    frame[24] ^= 1
    assert pair.carry_one(bytes(frame), checksum=False).status & (IP_ERROR | L4_ERROR) == IP_ERROR


def test_other_protocols_are_left_whole(pair: Pair) -> None:
    pair.open(header_bytes=256)
    arp = pair.carry_one(arp_request(PATH4.src_mac, PATH4.src, PATH4.dst), checksum=False)
    assert (arp.header_bytes, arp.hash, arp.status & CHECKED) == (0, 0, 0)
    assert packet_type(arp, pair.b) == (0, 0)
    udp = pair.carry_one(udp_frame(PATH4, 1, 2, payload(500)))
    assert (udp.header_bytes, packet_type(udp, pair.b)) == (0, (2, 3))
    ping = pair.carry_one(echo_request(PATH6, 1, 1, payload(56)), checksum=False)
    assert (ping.header_bytes, packet_type(ping, pair.b)) == (0, (3, 4))
    assert ping.status & (CHECKED | L4_ERROR) == CHECKED


def test_headers_that_do_not_fit_the_header_buffer(pair: Pair) -> None:
    pair.open(header_bytes=64)
    frame = tcp_frame(PATH6, 1, 2, payload(100))
    packet = pair.carry_one(frame)
    assert packet.data == frame
    assert packet.header_bytes == 0
    assert packet.status & 1 << 2, "header buffer overflow"


def test_ipv6_extension_headers(pair: Pair) -> None:
    pair.open(header_bytes=256)
    plain = tcp_frame(PATH6, 1, 2, payload(100))
    length = int.from_bytes(plain[18:20], "big") + 8
    options = b"\x06\0\x01\x04\0\0\0\0"  # TCP follows; 6 bytes of padding
    frame = plain[:18] + length.to_bytes(2, "big") + b"\x3c" + plain[21:54] + options + plain[54:]
    packet = pair.carry_one(frame)
    assert (packet.data, packet.header_bytes) == (frame, 82)
    assert packet.errors == 1 << 1, "the driver then trusts no checksum"
    assert packet_type(packet, pair.b) == (3, 2)
    assert pair.carry_one(plain).errors == 0


def test_padding_stays_with_the_headers(pair: Pair) -> None:
    pair.open(header_bytes=256)
    frame = tcp_frame(PATH4, 1, 2).ljust(60, b"\0")
    packet = pair.carry_one(frame, checksum=False)
    assert (packet.data, packet.header_bytes, packet.sizes) == (frame, 60, [0])


@pytest.mark.parametrize("path", [PATH4, PATH6])
@pytest.mark.parametrize("header_bytes", [0, 256])
def test_a_superframe_whole(pair: Pair, path: Path, header_bytes: int) -> None:
    pair.open(rsc=True, header_bytes=header_bytes)
    frame = tcp_frame(path, 1, 2, payload(60_000))
    headers = parse(frame).payload_offset
    at = parse(frame).l4_offset + 16
    partial = frame[:at] + b"\xab\xcd" + frame[at + 2 :]
    packet = pair.carry_one(partial, mss=1448, header_bytes=headers, pieces=(headers, 16000, 5000))  # type: ignore[arg-type]
    assert packet.data == frame
    assert (packet.rsc, packet.segment_bytes) == (True, 1448)
    assert packet.status & (CHECKED | L4_ERROR) == CHECKED
    assert len(packet.sizes) == 15
    assert pair.b.nic.statistics().rx[0].drops == 0


@pytest.mark.parametrize("path", [PATH4, PATH6])
def test_a_superframe_cut(pair: Pair, path: Path) -> None:
    pair.open(header_bytes=256)
    data = payload(20_000)
    frame = tcp_frame(path, 1, 2, data, sequence=0xFFFFFFF0, flags=0x18, identification=0xFFFF)
    headers = parse(frame).payload_offset
    queues, packets = zip(*pair.carry(frame, mss=1448, header_bytes=headers), strict=True)
    assert len(set(queues)) == 1
    assert len(packets) == 14
    for number, packet in enumerate(packets):
        parsed = parse(packet.data)
        assert verify_l4(packet.data)
        assert verify_ip(packet.data)
        assert packet.status & (CHECKED | L4_ERROR) == CHECKED
        assert packet.header_bytes == headers
        sequence, flags = unpack_from("!I5xB", packet.data, parsed.l4_offset + 4)
        assert sequence == (0xFFFFFFF0 + 1448 * number) % (1 << 32)
        assert flags == (0x18 if number == 13 else 0x10)
        assert not packet.rsc
    assert b"".join(packet.data[headers:] for packet in packets) == data


def test_a_superframe_of_one_segment_is_a_frame(pair: Pair) -> None:
    pair.open(rsc=True)
    frame = tcp_frame(PATH4, 1, 2, payload(1000))
    packet = pair.carry_one(frame, mss=1448, header_bytes=54)
    assert (packet.data, packet.rsc) == (frame, False)


@pytest.mark.parametrize("path", [PATH4, PATH6])
def test_udp_segmentation(pair: Pair, path: Path) -> None:
    pair.open(rsc=True)
    data = payload(5000)
    frame = udp_frame(path, 5, 6, data)
    headers = parse(frame).payload_offset
    packets = [packet for _, packet in pair.carry(frame, mss=1200, header_bytes=headers)]
    assert [len(packet.data) - headers for packet in packets] == [1200] * 4 + [200]
    for packet in packets:
        parsed = parse(packet.data)
        assert parsed.is_udp
        assert parsed.payload_length == len(packet.data) - headers
        assert verify_l4(packet.data)
        assert verify_ip(packet.data)
    if path is PATH4:
        assert [unpack_from("!H", packet.data, 18)[0] for packet in packets] == list(range(5))
    assert b"".join(packet.data[headers:] for packet in packets) == data


def test_the_hash_is_the_real_one_and_chooses_the_queue(pair: Pair) -> None:
    pair.open()
    toeplitz = Toeplitz()
    used = set()
    for port in range(40):
        for path, src, dst in ((PATH4, "10.0.0.1", "10.0.0.2"), (PATH6, "fd00::1", "fd00::2")):
            ((queue, packet),) = pair.carry(tcp_frame(path, 1000 + port, 80))
            assert packet.hash == toeplitz.hash_text((src, 1000 + port), (dst, 80))
            assert queue == packet.hash % 128 % QUEUES
            used.add(queue)
    assert used == {0, 1, 2, 3}
    (_, ping), (_, again) = *pair.carry(echo_request(PATH4, 1, 1)), *pair.carry(udp_frame(PATH4, 7, 9))
    flow = Flow.between(("10.0.0.1", 7), ("10.0.0.2", 9))
    assert ping.hash == toeplitz.hash_ip4(flow.src, flow.dst)
    assert again.hash == toeplitz.hash_tcp4(flow.src, flow.dst, 7, 9)


def test_key_table_and_hash_types_set_by_the_driver(pair: Pair) -> None:
    pair.open()
    key = bytes(range(1, 41))
    place = pair.b.memory.allocate(4096)
    pair.b.memory.write(place, key + bytes(24) + pack(">128I", *([3] * 128)))
    assert pair.b.command(0xA, pack(">HBBHHQQ", 1 << 1, 1, 0, 40, 128, place, place + 64)) == PASSED
    ((queue, packet),) = pair.carry(tcp_frame(PATH4, 5, 80))
    assert queue == 3
    assert packet.hash == Toeplitz(key).hash_text(("10.0.0.1", 5), ("10.0.0.2", 80))
    ((queue, packet),) = pair.carry(tcp_frame(PATH6, 5, 80))
    assert (queue, packet.hash) == (3, 0), "TCP over IPv6 is not hashed now"
    assert pair.b.command(0xA, pack(">HBBHHQQ", 1 << 4, 1, 0, 0, 0, 0, 0)) == PASSED
    assert pair.carry(tcp_frame(PATH6, 5, 80))[0][1].hash == Toeplitz(key).hash_text(("fd00::1", 5), ("fd00::2", 80))
    assert pair.carry(tcp_frame(PATH4, 5, 80))[0][1].hash == 0
    assert pair.b.command(0x8, pack(">I", 2)) == PASSED
    del pair.b.rx[2]
    assert pair.b.command(0x12, pack(">QQ", 4096, place)) == PASSED
    assert set(unpack(">128I", pair.b.memory.read(place + 48, 512))) == {3}, "the driver's table stays"


def test_a_table_that_names_queues_which_are_gone_loses_no_packet(pair: Pair) -> None:
    pair.open()
    place = pair.b.memory.allocate(512)
    pair.b.memory.write(place, pack(">128I", *(index % QUEUES for index in range(128))))
    assert pair.b.command(0xA, pack(">HBBHHQQ", 0, 0, 0, 0, 128, 0, place)) == PASSED
    before = {port: pair.carry(tcp_frame(PATH4, port, 80))[0][0] for port in range(32)}
    assert set(before.values()) == set(range(QUEUES))
    for queue in (3, 2):
        assert pair.b.command(0x8, pack(">I", queue)) == PASSED
        del pair.b.rx[queue]
    for port, queue in before.items():
        pair.a.put_packet(0, tcp_frame(PATH4, port, 80))
        pair.a.completions(0)
        assert [found for found in pair.b.rx for _ in pair.b.receive(found)] == [queue % 2]


def test_flow_rules_steer(pair: Pair) -> None:
    pair.open()
    unsteered = {path: pair.carry(tcp_frame(path, 9, 5201))[0][0] for path in (PATH4, PATH6)}
    target = next(queue for queue in range(QUEUES) if queue not in unsteered.values())
    rule4 = flow_rule(TCP4, target, src=ip_address("10.0.0.1").packed, dst=ip_address("10.0.0.2").packed, dport=5201)
    rule6 = flow_rule(TCP6, target, dst=ip_address("fd00::").packed, dst_mask=b"\xff" * 8 + bytes(8), sport=9)
    assert set_flow_rule(pair.b, 0, rule4, 1) == PASSED
    assert set_flow_rule(pair.b, 0, rule6, 2) == PASSED
    for path in (PATH4, PATH6):
        assert [queue for queue, _ in pair.carry(tcp_frame(path, 9, 5201))] == [target]
    ((udp_queue, packet),) = pair.carry(udp_frame(PATH4, 9, 5201))
    assert udp_queue == packet.hash % 128 % QUEUES, "a TCP rule is none for UDP"
    assert set_flow_rule(pair.b, 0, flow_rule(UDP4, (udp_queue + 1) % 4, dport=5201), 3) == PASSED
    assert pair.carry(udp_frame(PATH4, 9, 5201))[0][0] == (udp_queue + 1) % 4
    assert set_flow_rule(pair.b, 0, flow_rule(TCP4, target, dport=9), 3) == PASSED
    assert pair.carry(udp_frame(PATH4, 9, 5201))[0][0] == udp_queue, "another rule has taken its place"
    assert set_flow_rule(pair.b, 1, location=1) == PASSED
    assert [queue for queue, _ in pair.carry(tcp_frame(PATH4, 9, 5201))] == [unsteered[PATH4]]


def test_generation_bits_over_several_laps(pair: Pair) -> None:
    pair.open(rsc=True, header_bytes=256)
    for number in range(150):
        frame = tcp_frame(PATH4, 1, 2, payload(20_000 + number))
        packet = pair.carry_one(frame, mss=1448, header_bytes=54, pieces=(54, 10_000), report=number % 3 == 0)  # type: ignore[arg-type]
        assert packet.data == frame
    assert sum(stats.packets for stats in pair.b.nic.statistics().rx.values()) == 150


def test_a_polling_driver_never_sees_half_a_packet(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.open(rsc=True, header_bytes=256, entries=64)
    place = pair.b.memory.allocate(512)
    pair.b.command(0xA, pack(">HBBHHQQ", 0, 1, 0, 0, 128, 0, place))  # all to queue 0
    dma, write = pair.b.memory.dma, pair.b.memory.dma.write
    seen: list[bytes] = []

    def write_and_poll(address: int, data: bytes) -> None:
        write(address, data)
        fresh = [packet.data for packet in pair.b.receive(0)]
        assert len(data) == 2 or not fresh, "a generation bit is flipped last, by itself"
        seen.extend(fresh)

    monkeypatch.setattr(dma, "write", write_and_poll)
    frames = [tcp_frame(PATH4, 1, 2, payload(30_000 + number)) for number in range(20)]
    for number, frame in enumerate(frames, 1):
        pair.a.put_packet(0, frame, mss=1448, header_bytes=54)
        assert len(seen) == number
        pair.b.post(0, len(pair.b.rx[0].free) - 32)
    assert seen == frames


def test_superframes_that_make_no_sense_are_dropped(pair: Pair) -> None:
    pair.open(rsc=True)
    nic = pair.b.nic
    nic.deliver(Packet(udp_frame(PATH4, 1, 2, payload(5000)), 1448))
    nic.deliver(Packet(tcp_frame(PATH4, 1, 2, payload(5000)), 1 << 16))
    nic.deliver(Packet(bytes(13)))
    nic.faults.set(corrupt=1.0)
    nic.deliver(Packet(b""))
    assert nic.statistics().drops == {"malformed": 4}


def test_a_buffer_out_of_reach_costs_its_packet_alone(pair: Pair) -> None:
    pair.open(header_bytes=256, post=False)
    b = pair.b
    place = b.memory.allocate(512)
    b.command(0xA, pack(">HBBHHQQ", 0, 1, 0, 0, 128, 0, place))
    ring = b.rx[0]
    good = ring.pages[1]
    ring.pages[1] = 1 << 40
    b.post(0, 4)
    ring.pages[1] = good
    frame = tcp_frame(PATH4, 1, 2, payload(5000))
    pair.a.put_packet(0, frame)
    (broken,) = b.receive(0)
    assert broken.errors & 1 << 2, "rx_error"
    pair.a.put_packet(0, frame)
    assert [packet.data for packet in b.receive(0)] == [frame]
    assert b.nic.mistakes.counts == {"rx-buffer": 1}
    stats = b.nic.statistics().rx[0]
    assert (stats.packets, stats.drops) == (1, 1)
    b.nic.mistakes.counts.clear()


def test_event_reports_name_the_next_descriptor(pair: Pair) -> None:
    pair.open()
    for _ in range(300):
        tag = pair.a.put_packet(0, tcp_frame(PATH4, 1, 2), pieces=(20,), report=True)
        assert pair.a.completions(0) == [(2, tag), (4, pair.a.tx[0].tail)]
        pair.received()


def test_many_packets_at_one_doorbell(pair: Pair) -> None:
    pair.open()
    frames = [tcp_frame(PATH4, 1, 2, payload(number)) for number in range(1, 60)]
    for number, frame in enumerate(frames):
        place = pair.a.memory.allocate(4096)
        pair.a.tx_buffers = place
        pair.a.put_packet(0, frame, ring=number == len(frames) - 1)
    assert len(pair.a.completions(0)) == len(frames)
    assert [packet.data for _, packet in pair.received()] == frames


def test_a_packet_over_two_doorbells(pair: Pair) -> None:
    pair.open()
    frame = tcp_frame(PATH4, 1, 2, payload(3000))
    pair.a.put_packet(0, frame, pieces=(54, 1000), ring=False)
    ring = pair.a.tx[0]
    pair.a.ring_doorbell(ring.doorbell, ring.tail - 1)
    assert pair.a.completions(0) == []
    pair.a.memory.write(pair.a.tx_buffers, bytes(100))  # what the device has fetched does not change any more
    pair.a.ring_doorbell(ring.doorbell, ring.tail)
    assert [packet.data for _, packet in pair.received()] == [frame]


def test_out_of_buffers_drops_and_recovers(pair: Pair) -> None:
    pair.open(post=False)
    queue = pair.b.rx[0]
    place = pair.b.memory.allocate(512)
    pair.b.command(0xA, pack(">HBBHHQQ", 0, 1, 0, 0, 128, 0, place))  # all to queue 0
    pair.b.post(0, 2)
    frame = tcp_frame(PATH4, 1, 2, payload(5000))
    for _ in range(3):
        pair.a.put_packet(0, frame)
    assert [packet.data for packet in pair.b.receive(0)] == [frame]
    stats = pair.b.nic.statistics().rx[0]
    assert (stats.packets, stats.drops, stats.drops_no_buffer, stats.posted) == (1, 2, 2, 0)
    pair.b.post(0, 2)
    pair.a.put_packet(0, frame)
    assert [packet.data for packet in pair.b.receive(0)] == [frame]
    assert queue.completion_head == 4


def test_frames_beyond_the_mtu_are_dropped(pair: Pair) -> None:
    pair.open()
    assert pair.b.command(0xB, pack(">I4xQ", 1, 1500)) == PASSED
    assert pair.carry(tcp_frame(PATH4, 1, 2, payload(1461))) == []
    assert len(pair.carry(tcp_frame(PATH4, 1, 2, payload(1460)))) == 1
    assert sum(stats.drops for stats in pair.b.nic.statistics().rx.values()) == 1


def test_interrupts(pair: Pair) -> None:
    pair.open()
    a, b = pair.a, pair.b
    frame = tcp_frame(PATH4, 1, 2)
    ((queue, _),) = pair.carry(frame)
    receive_vector = QUEUES + queue
    assert a.interrupts(0) == 1
    assert b.interrupts(receive_vector) == 1
    assert [b.interrupts(vector) for vector in range(b.nic.msix_vectors)] == [0] * 9, "no other vector"
    pair.carry(frame)
    assert b.interrupts(receive_vector) == 0, "an event disables the block until its doorbell"
    b.enable(receive_vector)
    assert b.interrupts(receive_vector) == 1, "the event was remembered"
    b.enable(receive_vector)
    assert b.interrupts(receive_vector) == 0
    pair.carry(frame)
    assert b.interrupts(receive_vector) == 1
    pair.carry(frame)
    index = unpack(">I", b.memory.read(b.blocks + 64 * receive_vector, 4))[0]
    b.ring_doorbell(index, 0)
    assert b.interrupts(receive_vector) == 0, "not enabled"
    b.ring_doorbell(index, 3)
    assert b.interrupts(receive_vector) == 0, "cleared, then enabled"


def test_an_interrupt_waits_for_its_eventfd(pair: Pair) -> None:
    pair.open()
    ((queue, _),) = pair.carry(tcp_frame(PATH4, 1, 2))
    vector = QUEUES + queue
    pair.b.interrupts(vector)
    pair.b.enable(vector)
    pair.b.nic.set_irq(vector, None)
    pair.carry(tcp_frame(PATH4, 1, 2))
    assert pair.b.interrupts(vector) == 0
    pair.b.nic.set_irq(vector, pair.b.eventfds[vector])
    assert pair.b.interrupts(vector) == 1


def test_a_reset_forgets_interrupts(pair: Pair) -> None:
    pair.open()
    nic = pair.b.nic
    nic.set_irq(2 * QUEUES, None)
    nic.set_link(False)
    nic.reset()
    nic.set_irq(2 * QUEUES, pair.b.eventfds[2 * QUEUES])
    assert pair.b.interrupts(2 * QUEUES) == 0
    assert not nic.link_up, "a reset plugs no cable in"


def test_link_change(pair: Pair) -> None:
    pair.open()
    pair.b.nic.set_link(False)
    assert pair.b.interrupts(2 * QUEUES) == 1
    assert pair.b.read32(0) & 1 << 2 == 0
    assert pair.carry(tcp_frame(PATH4, 1, 2)) == []
    assert pair.b.nic.statistics().drops == {"link_down": 1}
    pair.b.nic.set_link(False)
    assert pair.b.interrupts(2 * QUEUES) == 0
    pair.b.nic.set_link(True)
    assert pair.b.interrupts(2 * QUEUES) == 1
    assert pair.b.read32(0) & 1 << 2
    assert len(pair.carry(tcp_frame(PATH4, 1, 2))) == 1
    pair.a.nic.set_link(False)
    assert pair.carry(tcp_frame(PATH4, 1, 2)) == [], "sent, says its completion, but the cable is out"


def test_reset_while_packets_arrive(pair: Pair) -> None:
    pair.open()
    pair.b.write32(0x04, 2)
    assert pair.a.put_packet(0, tcp_frame(PATH4, 1, 2))
    assert pair.b.nic.statistics().drops == {"no_queue": 1}
    pair.b.tx.clear()
    pair.b.rx.clear()
    pair.b.start()
    pair.b.open()
    pair.a.completions(0)
    assert len(pair.carry(tcp_frame(PATH4, 1, 2))) == 1


def test_the_device_asks_for_a_reset(pair: Pair) -> None:
    pair.open()
    pair.b.nic.request_reset()
    assert pair.b.interrupts(2 * QUEUES) == 1
    assert pair.b.read32(0) & 1 << 1
    pair.b.write32(0x04, 2)
    assert pair.b.read32(0) & 1 << 1 == 0


def test_one_queue_is_restarted(pair: Pair) -> None:
    pair.open()
    frames = {}
    for port in range(64):
        frame = tcp_frame(PATH4, port, 80)
        frames[pair.carry(frame)[0][0]] = frame
    assert pair.b.command(0x8, pack(">I", 1)) == PASSED
    dead = pair.b.rx.pop(1)
    pair.a.put_packet(0, frames[1])
    pair.a.put_packet(0, frames[2])
    assert len(pair.b.receive(2)) == 1
    assert dead.parts == []
    assert pair.b.nic.statistics().drops == {"no_queue": 1}


def test_statistics_report(pair: Pair) -> None:
    pair.open(post=False)
    b = pair.b
    size = 8 + 16 * (6 * QUEUES + 2 * QUEUES + 4 * QUEUES)
    place = b.memory.allocate(4096)
    assert b.command(0xC, pack(">QQQ", size, place, 20_000)) == PASSED
    deadline = b.nic.deadline_s()
    assert deadline is not None
    for port in range(20):
        pair.a.put_packet(0, tcp_frame(PATH4, port, 2))
    pair.now_s = deadline
    b.nic.tick()
    assert b.nic.deadline_s() == deadline + 20
    stats = b.nic.statistics().rx
    start = 8 + 16 * (6 * QUEUES + 2 * QUEUES)
    assert b.memory.read(place, start) == bytes(start), "the driver's part"
    for queue in range(QUEUES):
        found = [unpack(">IIQ", b.memory.read(place + start + 16 * (4 * queue + at), 16)) for at in range(4)]
        drops = stats[queue].drops
        assert found == [(65, queue, drops), (66, queue, drops), (67, queue, 0), (68, queue, 0)]
    assert sum(queue.drops for queue in stats.values()) == 20
    assert b.memory.read(place + size, 64) == bytes(64)
    b.memory.write(place, bytes(size))
    assert b.command(0x8, pack(">I", 1)) == PASSED
    pair.now_s += 20
    b.nic.tick()
    assert b.memory.read(place, size) == bytes(size), "while a queue is missing, nobody knows what goes where"
    b.rx[1] = RxRing(b, 1, 256, rsc=False, header_bytes=0, buffer_bytes=4096)
    pair.now_s += 1
    b.nic.tick()
    assert b.memory.read(place, size).count(0) < size
    assert b.command(0xC, pack(">QQQ", 0, 0, 20_000)) == PASSED
    assert b.nic.deadline_s() is None
