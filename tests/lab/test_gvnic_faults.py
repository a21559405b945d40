"""Faults of the gVNIC on request: each does what it says, seeded, while traffic runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from devmem_tcp.lab.checksum import verify_l4
from devmem_tcp.lab.crafting import tcp_frame
from devmem_tcp.lab.gvnic.faults import Faults, FaultSettings
from devmem_tcp.lab.gvnic.late import MAX_LATE_PACKETS, LatePackets
from devmem_tcp.lab.wire import Packet
from gvnic_driver import PATH4, PATH6, QUEUES, Pair, Received, payload

CHECKED, L4_ERROR = 1 << 3, 1 << 5


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    with pair.a, pair.b:
        yield pair


def numbered(count: int, size: int = 100) -> list[bytes]:
    return [tcp_frame(PATH4, 1, 2, number.to_bytes(4, "big") + payload(size)) for number in range(count)]


def carry_all(pair: Pair, frames: list[bytes]) -> list[bytes]:
    """Send frames; return what arrived, in order."""
    arrived = []
    for frame in frames:
        arrived += [packet.data for _, packet in pair.carry(frame)]
    return arrived


def finish(pair: Pair) -> list[bytes]:
    """Let time pass until nothing is on its way; return what arrived, in order."""
    arrived = []
    while (deadline := pair.b.nic.deadline_s()) is not None:
        pair.now_s = max(pair.now_s, deadline)
        pair.b.nic.tick()
        arrived += [packet.data for _, packet in pair.received()]
    return arrived


def test_no_faults_by_default(pair: Pair) -> None:
    pair.open()
    frames = numbered(20)
    assert carry_all(pair, frames) == frames
    assert pair.b.nic.statistics().faults == {}


def test_settings_are_checked() -> None:
    faults = Faults(drop=0.5)
    assert faults.settings == FaultSettings(drop=0.5)
    for bad in ({"drop": 1.1}, {"corrupt": -0.1}, {"delay_s": -1.0}, {"reorder": float("nan")}, {"rate_bps": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            faults.set(**bad)
    for bad in ({"unsplit_every": 2.5}, {"rate_bps": float("inf")}, {"delay_s": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            faults.set(**bad)
    assert isinstance(Faults(header_payload_bytes=10.0).settings.header_payload_bytes, int)
    with pytest.raises(ValueError, match="no such fault: dropp"):
        faults.set(dropp=0.1)
    assert faults.settings == FaultSettings(drop=0.5)
    assert faults.set(drop=0) == FaultSettings()


def test_drop_is_seeded_and_set_while_running(pair: Pair) -> None:
    pair.open()
    frames = numbered(400)
    pair.b.nic.faults.set(drop=0.25)
    arrived = carry_all(pair, frames)
    lost = pair.b.nic.statistics().faults["drop"]
    assert len(arrived) == 400 - lost
    assert 60 < lost < 140
    assert arrived == [frame for frame in frames if frame in set(arrived)]
    judge = Faults(seed=0, drop=0.25)
    assert arrived == [frame for frame in frames if judge.arrivals(Packet(frame), 0.0)]
    pair.b.nic.faults.set(drop=0)
    assert carry_all(pair, frames) == frames


def test_chance_picks_segments_of_a_superframe(pair: Pair) -> None:
    pair.open(rsc=True)
    pair.b.nic.faults.set(drop=0.5)
    frame = tcp_frame(PATH4, 1, 2, payload(14480))
    packets = [packet for _, packet in pair.carry(frame, mss=1448, header_bytes=54)]
    assert 0 < len(packets) < 10
    assert all(not packet.rsc and len(packet.data) == 1502 for packet in packets)


def test_corruption_is_seen(pair: Pair) -> None:
    pair.open()
    pair.b.nic.faults.set(corrupt=1.0)
    for frame in (tcp_frame(PATH4, 1, 2, payload(500)), tcp_frame(PATH6, 1, 2), tcp_frame(PATH4, 1, 2)):
        packet = pair.carry_one(frame)
        assert packet.status & (CHECKED | L4_ERROR) == CHECKED | L4_ERROR
        assert not verify_l4(packet.data)
        changed = [at for at in range(len(frame)) if frame[at] != packet.data[at]]
        assert len(changed) == 1
    report = pair.b.nic.statistics()
    assert report.faults == {"corrupt": 3}
    assert sum(queue.drops for queue in report.rx.values()) == 0


def test_duplicates(pair: Pair) -> None:
    pair.open()
    pair.b.nic.faults.set(duplicate=1.0)
    frames = numbered(5)
    assert carry_all(pair, frames) == [frame for frame in frames for _ in range(2)]


def test_reorder_delays_some(pair: Pair) -> None:
    pair.open()
    pair.b.nic.faults.set(reorder=0.3)
    frames = numbered(50)
    arrived = carry_all(pair, frames)
    late = finish(pair)
    assert 0 < len(late) < 50
    assert sorted(arrived + late) == sorted(frames)
    assert arrived == [frame for frame in frames if frame not in late]
    assert pair.now_s == 0.001


def test_delay_keeps_the_order(pair: Pair) -> None:
    pair.open()
    pair.b.nic.faults.set(delay_s=0.02)
    frames = numbered(30)
    assert carry_all(pair, frames) == []
    assert pair.b.nic.deadline_s() == 0.02
    pair.now_s = 0.0199
    pair.b.nic.tick()
    assert pair.received() == []
    assert finish(pair) == frames
    assert pair.b.nic.deadline_s() is None


def test_rate_limit(pair: Pair) -> None:
    pair.open()
    frames = numbered(100, 942)  # 1000 bytes each
    pair.b.nic.faults.set(rate_bps=1 << 23, rate_queue_bytes=50_000)
    assert carry_all(pair, frames) == []
    arrived = finish(pair)
    assert arrived == frames[: len(arrived)]
    assert len(arrived) == 51
    assert pair.now_s == 51 * 8000 / (1 << 23)
    assert pair.b.nic.statistics().faults == {"rate_bps": 49}


def test_payload_in_the_header_buffer(pair: Pair) -> None:
    pair.open(header_bytes=256, rsc=True)
    pair.b.nic.faults.set(header_payload_bytes=100)
    frame = tcp_frame(PATH4, 1, 2, payload(5000))
    packet = pair.carry_one(frame)
    assert (packet.data, packet.header_bytes, packet.sizes) == (frame, 154, [4096, 804])
    pair.b.nic.faults.set(header_payload_bytes=9999)
    packet = pair.carry_one(frame)
    assert (packet.data, packet.header_bytes) == (frame, 256)
    frame = tcp_frame(PATH4, 1, 2, payload(50))
    packet = pair.carry_one(frame)
    assert (packet.data, packet.header_bytes, packet.sizes) == (frame, 104, [0])
    frame = tcp_frame(PATH4, 1, 2, payload(20_000))
    packet = pair.carry_one(frame, mss=1448, header_bytes=54)
    assert (packet.data, packet.header_bytes, packet.rsc) == (frame, 256, True)


def test_every_third_packet_is_not_split(pair: Pair) -> None:
    pair.open(header_bytes=256)
    pair.b.nic.faults.set(unsplit_every=3)
    frames = numbered(9)
    packets: list[Received] = [pair.carry_one(frame) for frame in frames]
    assert [packet.data for packet in packets] == frames
    assert [packet.header_bytes for packet in packets] == [54, 54, 0] * 3


def test_fewer_buffers(pair: Pair) -> None:
    pair.open(post=False)
    for queue in range(QUEUES):
        pair.b.post(queue, 100)
    pair.b.nic.faults.set(withheld_buffers=95)
    for frame in numbered(8):
        pair.a.put_packet(0, frame)
    stats = pair.b.nic.statistics().rx
    assert sum(queue.packets for queue in stats.values()) == 5
    assert sum(queue.drops_no_buffer for queue in stats.values()) == 3
    pair.b.nic.faults.set(withheld_buffers=0)
    pair.a.put_packet(0, numbered(1)[0])
    assert sum(queue.packets for queue in pair.b.nic.statistics().rx.values()) == 6


def test_link_flaps(pair: Pair) -> None:
    pair.open()
    nic = pair.b.nic
    nic.faults.set(link_flap_s=0.5)
    seen = []
    for _ in range(4):
        deadline = nic.deadline_s()
        assert deadline is not None
        pair.now_s = deadline
        nic.tick()
        seen.append((pair.now_s, nic.link_up, pair.b.interrupts(2 * QUEUES)))
    assert seen == [(0.5, False, 1), (1.0, True, 1), (1.5, False, 1), (2.0, True, 1)]
    nic.faults.set(link_flap_s=0)
    assert nic.deadline_s() is None


def test_late_packets_are_bounded() -> None:
    late = LatePackets()
    packet = Packet(bytes(14))
    assert all(late.add(1.0, packet) for _ in range(MAX_LATE_PACKETS))
    assert not late.add(0.5, packet)
    assert len(list(late.pop_due(1.0))) == MAX_LATE_PACKETS
    assert late.due_s is None
    assert late.add(2.0, packet)


def test_the_same_seed_does_the_same() -> None:
    frames = [Packet(tcp_frame(PATH4, 1, 2, payload(number))) for number in range(1, 200)]
    settings = {"drop": 0.1, "corrupt": 0.1, "duplicate": 0.1, "reorder": 0.1, "delay_s": 0.5}

    def run(seed: int) -> list[tuple[float, bytes]]:
        faults = Faults(seed, **settings)
        return [(due, bytes(one.data)) for packet in frames for due, one in faults.arrivals(packet, 7.0)]

    assert run(5) == run(5)
    assert run(5) != run(6)
