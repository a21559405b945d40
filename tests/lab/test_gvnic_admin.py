"""Registers, PCI configuration space and admin commands of the gVNIC, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from struct import pack, unpack, unpack_from

import pytest

from devmem_tcp.lab.gvnic.device import Gvnic
from devmem_tcp.lab.gvnic.faults import Faults
from devmem_tcp.lab.wire import Switch
from gvnic_driver import BASE, PASSED, Driver, GuestMemory, flow_rule, set_flow_rule

MAC = bytes.fromhex("020000000001")
UNIMPLEMENTED = 0xFFFFFFFE
INVALID = 0xFFFFFFF7
OUT_OF_RANGE = 0xFFFFFFF9
NOT_FOUND = 0xFFFFFFF8
EXISTS = 0xFFFFFFF1
PRECONDITION = 0xFFFFFFF5
EXHAUSTED = 0xFFFFFFFC
TCP4, UDP4, SCTP4, TCP6 = 0, 1, 2, 5


@pytest.fixture
def driver() -> Iterator[Driver]:
    memory = GuestMemory()
    nic = Gvnic(mac=MAC, queues=4, mtu=9000, dma=memory.dma, switch=Switch(), faults=Faults())
    with Driver(nic, memory, 4) as driver:
        yield driver


def test_pci_identity(driver: Driver) -> None:
    config = driver.nic.config
    assert len(config) == 256
    assert unpack_from("<HH", config, 0) == (0x1AE0, 0x0042)
    assert unpack_from("<I", config, 8)[0] == 0x020000_01
    assert config[0x34] == 0x40
    assert config[0x06] & 0x10
    assert unpack_from("<BBHII", config, 0x40) == (0x11, 0, 8, 1, 0x801)
    assert driver.nic.msix_vectors == 9
    assert driver.nic.bars == {0: 4096, 1: 4096, 2: 4096}


def test_config_writes_touch_writable_bits_alone(driver: Driver) -> None:
    before = bytes(driver.nic.config)
    driver.nic.write_config(0x04, b"\xff\xff")
    assert unpack_from("<H", driver.nic.config, 4)[0] == 0x0546
    driver.nic.write_config(0x10, b"\xff\xff\xff\xff")
    assert unpack_from("<I", driver.nic.config, 0x10)[0] == 0xFFFFF000, "the size of a BAR is found like this"
    driver.nic.write_config(0x42, b"\xff\xff")
    assert unpack_from("<H", driver.nic.config, 0x42)[0] == 0xC008
    driver.nic.write_config(0, b"\xff" * 4)
    assert driver.nic.config[:4] == before[:4]
    driver.nic.write_config(0xFE, b"1234")
    assert driver.nic.mistakes.counts["config-write"] == 1
    driver.nic.reset()
    assert bytes(driver.nic.config) == before


def test_registers(driver: Driver) -> None:
    assert driver.read32(0x00) == 1 << 2, "link up"
    assert (driver.read32(0x08), driver.read32(0x0C)) == (4, 4)
    for letter in b"GVE-1.0\n":
        driver.nic.write_bar(0, 0x1F, bytes([letter]))
    assert driver.nic.driver_version == "GVE-1.0"
    driver.write32(0x08, 77)
    assert driver.read32(0x08) == 4
    assert driver.nic.mistakes.counts["register-write"] == 1
    assert driver.nic.read_bar(0, 4094, 4) == b"\xff" * 4
    assert driver.nic.read_bar(7, 0, 2) == b"\xff" * 2


def test_describe_device(driver: Driver) -> None:
    driver.start_adminq()
    place = driver.memory.allocate(4096)
    assert driver.command(0x1, pack(">QII", place, 1, 4096)) == PASSED
    head = driver.memory.read(place, 40)
    _, tx, rx, queues, mtu, counters, _, _, mac, options, total = unpack(">Q2xHHHHHHH6sHH6x", head)
    assert (tx, rx, queues, mtu, mac) == (1024, 1024, 4, 9000, MAC)
    assert counters > 0
    found = {}
    offset = 40
    for _ in range(options):
        number, size, required = unpack_from(">HHI", driver.memory.read(place + offset, 8))
        assert required == 0
        found[number] = driver.memory.read(place + offset + 8, size)
        offset += 8 + size
    assert offset == total
    assert unpack(">II", found[0x4])[0] == 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 7
    assert unpack(">IHHHH", found[0x6]) == (1, 4096, 4096, 256, 256)
    assert unpack(">IH2x", found[0x8]) == (1 << 2, 9000)
    assert unpack(">IHH", found[0xA]) == (1 << 4, 4096, 256)
    assert unpack(">III", found[0xB])[2] == 1024
    assert unpack(">IHH", found[0xE]) == (1 << 7, 40, 128)


def test_describe_device_refusals(driver: Driver) -> None:
    driver.start_adminq()
    place = driver.memory.allocate(4096)
    assert driver.command(0x1, pack(">QII", place, 2, 4096)) == UNIMPLEMENTED
    assert driver.command(0x1, pack(">QII", place, 1, 40)) == EXHAUSTED
    assert driver.command(0x1, pack(">QII", 1 << 60, 1, 4096)) == INVALID
    assert driver.memory.read(place, 64) == bytes(64)


def test_unknown_commands(driver: Driver) -> None:
    driver.start_adminq()
    for opcode in (0, 3, 4, 0x11, 0x13, 0x100, 0xFFFFFFFF):
        assert driver.command(opcode) == UNIMPLEMENTED
    assert driver.command(0xFF, pack(">IIQ", 0x102, 92, BASE)) == UNIMPLEMENTED
    assert driver.nic.mistakes.counts["adminq-opcode"] == 7


def test_several_commands_at_one_doorbell_around_the_end_of_the_ring(driver: Driver) -> None:
    driver.start_adminq()
    place = driver.memory.allocate(8, 64)
    for _ in range(60):
        assert driver.command(0xD, pack(">Q", place)) == PASSED
    for index in range(60, 70):
        driver.memory.write(driver.adminq + index % 64 * 64, pack(">IIQ", 0xD, 0, place).ljust(64, b"\0"))
    driver.write32(0x14, 70)
    assert driver.read32(0x18) == 70
    for index in range(60, 70):
        assert driver.memory.read(driver.adminq + index % 64 * 64 + 4, 4) == pack(">I", PASSED)
    assert driver.memory.read(place, 8) == pack(">Q", 100_000)


def test_a_doorbell_beyond_the_ring_does_nothing(driver: Driver) -> None:
    driver.start_adminq()
    driver.write32(0x14, 65)
    assert driver.read32(0x18) == 0
    driver.write32(0x14, 0xFFFFFFFF)
    assert driver.nic.mistakes.counts["adminq-doorbell"] == 2


def test_configure_resources(driver: Driver) -> None:
    driver.start()
    for block in range(8):
        assert unpack(">I", driver.memory.read(driver.blocks + 64 * block, 4))[0] == block
    body = pack(">QQIIIIB7x", driver.counters, driver.blocks, 8, 8, 64, 0, 3)
    assert driver.command(0x2, body) == EXISTS
    assert driver.command(0x9) == PASSED
    assert driver.command(0x2, pack(">QQIIIIB7x", driver.counters, driver.blocks, 8, 9, 64, 0, 3)) == INVALID
    assert driver.command(0x2, pack(">QQIIIIB7x", driver.counters, driver.blocks, 8, 8, 64, 0, 1)) == UNIMPLEMENTED
    assert driver.command(0x2, body) == PASSED


def test_queues_need_resources_rings_and_places(driver: Driver) -> None:
    driver.start_adminq()
    ring = driver.memory.allocate(1 << 16)
    tx = (0, 0, ring, ring, 0xFFFFFFFF, 0, ring, 256, 256)

    def create(**changes: int) -> int:
        names = ("queue", "reserved", "resources", "ring", "page_list", "block", "completions", "size", "done")
        values = dict(zip(names, tx, strict=True)) | changes
        return driver.command(0x5, pack(">IIQQIIQHH4x", *values.values()))

    assert create() == PRECONDITION
    driver.start()
    assert create(queue=4) == OUT_OF_RANGE
    assert create(block=8) == OUT_OF_RANGE
    assert create(page_list=0) == UNIMPLEMENTED
    assert create(size=255) == INVALID
    assert create(size=0) == INVALID
    assert create(done=65535) == INVALID
    assert create(ring=1 << 50) == INVALID
    assert create(completions=BASE + driver.memory.size - 8) == INVALID
    assert create(resources=0) == INVALID
    assert create() == PASSED
    assert create() == EXISTS
    assert driver.command(0x7, pack(">I", 1)) == NOT_FOUND
    assert driver.command(0x7, pack(">I", 0)) == PASSED
    assert driver.command(0x8, pack(">I", 0)) == NOT_FOUND


def test_rx_queue_refusals(driver: Driver) -> None:
    driver.start()
    ring = driver.memory.allocate(1 << 16)
    layout = ">IIIIQQQIHHHBBH2x"

    def create(buffers: int = 256, completions: int = 256, size: int = 4096, header: int = 256) -> int:
        return driver.command(
            0x6, pack(layout, 0, 0, 0, 4, ring, ring, ring, 0xFFFFFFFF, completions, size, buffers, 1, 0, header)
        )

    assert create(buffers=512) == INVALID, "more buffers than completions"
    assert create(size=0) == INVALID
    assert create(size=16384) == INVALID, "a length has 14 bits"
    assert create(header=1024) == INVALID, "a header length has 10 bits"
    assert create() == PASSED


def test_doorbells_that_no_driver_rings(driver: Driver) -> None:
    driver.start()
    driver.open()
    ring = driver.rx[0]
    posted = driver.nic.statistics().rx[0].posted
    driver.ring_doorbell(ring.doorbell, ring.entries)
    driver.ring_doorbell(ring.doorbell, ring.tail - 1)
    assert driver.nic.mistakes.counts["rx-doorbell"] == 2
    assert driver.nic.statistics().rx[0].posted == posted
    driver.ring_doorbell(driver.tx[0].doorbell, 256)
    assert driver.nic.mistakes.counts["tx-doorbell"] == 1
    driver.ring_doorbell(1023, 0)
    driver.nic.write_bar(2, 2, bytes(4))
    assert driver.nic.mistakes.counts["bar-write"] == 2


def test_doorbells_are_all_different(driver: Driver) -> None:
    driver.start()
    driver.open(post=False)
    queues = [ring.doorbell for ring in driver.tx.values()] + [ring.doorbell for ring in driver.rx.values()]
    blocks = [unpack(">I", driver.memory.read(driver.blocks + 64 * block, 4))[0] for block in range(8)]
    assert len(set(queues + blocks)) == 16


def test_link_speed_mtu_and_packet_types(driver: Driver) -> None:
    driver.start_adminq()
    place = driver.memory.allocate(4096)
    assert driver.command(0xB, pack(">I4xQ", 1, 1500)) == PASSED
    assert driver.command(0xB, pack(">I4xQ", 1, 9001)) == OUT_OF_RANGE
    assert driver.command(0xB, pack(">I4xQ", 2, 1500)) == UNIMPLEMENTED
    assert driver.command(0xE, pack(">QQ", 2047, place)) == EXHAUSTED
    assert driver.command(0xE, pack(">QQ", 2048, place)) == PASSED
    types = driver.memory.read(place, 2048)
    assert types[:2] == b"\0\0"
    assert bytes([2, 2]) in [types[at : at + 2] for at in range(0, 2048, 2)], "TCP over IPv4"


def test_driver_compatibility(driver: Driver) -> None:
    driver.start_adminq()
    info = driver.memory.allocate(512)
    driver.memory.write(info, pack(">BBBBIII4Q", 1, 1, 0, 0, 7, 3, 4, 0b1111011, 0, 0, 0))
    assert driver.command(0xF, pack(">QQ", 304, info)) == PASSED
    driver.memory.write(info + 16, pack(">Q", 0b0000011))
    assert driver.command(0xF, pack(">QQ", 304, info)) == PRECONDITION
    assert driver.command(0xF, pack(">QQ", 3, info)) == INVALID


def test_rss_configuration(driver: Driver) -> None:
    driver.start_adminq()
    place = driver.memory.allocate(4096)
    key, table = bytes(range(40)), [index % 3 for index in range(128)]
    key_place, table_place = driver.memory.allocate(40), driver.memory.allocate(512)
    driver.memory.write(key_place, key)
    driver.memory.write(table_place, pack(">128I", *table))
    assert driver.command(0xA, pack(">HBBHHQQ", 0x52, 1, 0, 40, 128, key_place, table_place)) == PASSED
    assert driver.command(0x12, pack(">QQ", 559, place)) == EXHAUSTED
    assert driver.command(0x12, pack(">QQ", 4096, place)) == PASSED
    size, types, algorithm = unpack_from(">IHB", driver.memory.read(place, 8))
    assert (size, types, algorithm) == (8 + 40 + 512, 0x52, 1)
    assert driver.memory.read(place + 8, 40) == key
    assert list(unpack(">128I", driver.memory.read(place + 48, 512))) == table

    assert driver.command(0xA, pack(">HBBHHQQ", 0, 1, 0, 0, 0, 0, 0)) == PASSED, "0 changes nothing"
    driver.memory.write(table_place, pack(">128I", *([4] * 128)))
    assert driver.command(0xA, pack(">HBBHHQQ", 0x52, 1, 0, 0, 128, 0, table_place)) == OUT_OF_RANGE
    assert driver.command(0xA, pack(">HBBHHQQ", 0x52, 2, 0, 0, 0, 0, 0)) == UNIMPLEMENTED
    assert driver.command(0xA, pack(">HBBHHQQ", 0x52, 1, 0, 52, 0, key_place, 0)) == INVALID
    driver.command(0x12, pack(">QQ", 4096, place))
    assert driver.memory.read(place + 8, 40) == key
    assert list(unpack(">128I", driver.memory.read(place + 48, 512))) == table


def test_default_table_spreads_over_the_queues_there_are(driver: Driver) -> None:
    driver.start()
    driver.open(post=False)
    place = driver.memory.allocate(4096)

    def table() -> list[int]:
        assert driver.command(0x12, pack(">QQ", 4096, place)) == PASSED
        return list(unpack(">128I", driver.memory.read(place + 48, 512)))

    assert table() == [index % 4 for index in range(128)]
    assert driver.command(0x8, pack(">I", 1)) == PASSED
    assert table() == [index % 4 for index in range(128)], "the restart of one queue moves no other flow"
    for queue in (2, 3):
        driver.command(0x8, pack(">I", queue))
    assert set(table()) == {0}


def test_flow_rules(driver: Driver) -> None:
    driver.start()
    first = flow_rule(TCP6, 1, dst=ip_address("fd00::2").packed, dport=5201)
    second = flow_rule(TCP4, 2, src=ip_address("10.0.0.1").packed, sport=7)
    assert set_flow_rule(driver, 0, first, 1023) == PASSED
    assert set_flow_rule(driver, 0, second, 5) == PASSED
    assert set_flow_rule(driver, 0, flow_rule(UDP4, 3, dport=53), 6) == PASSED
    place = driver.memory.allocate(4096)

    assert driver.command(0x10, pack(">H2xIQQ", 2, 0, 4096, place)) == PASSED
    assert unpack(">IIII", driver.memory.read(place, 16)) == (3, 1024, 0, 16)
    assert driver.command(0x10, pack(">H2xIQQ", 1, 0, 4096, place)) == PASSED
    assert unpack(">IIIIIII", driver.memory.read(place, 28)) == (3, 1024, 3, 28, 5, 6, 1023)
    assert driver.command(0x10, pack(">H2xIQQ", 1, 1024, 4096, place)) == PASSED
    assert unpack(">IIII", driver.memory.read(place, 16)) == (3, 1024, 0, 16)
    assert driver.command(0x10, pack(">H2xIQQ", 0, 7, 4096, place)) == PASSED
    assert unpack(">IIIII", driver.memory.read(place, 20)) == (3, 1024, 1, 16 + 88, 1023)
    assert driver.memory.read(place + 20, 84) == first
    assert driver.command(0x10, pack(">H2xIQQ", 0, 0, 16 + 2 * 88 + 87, place)) == PASSED
    assert unpack(">IIII", driver.memory.read(place, 16))[2] == 2, "as many as fit"

    assert set_flow_rule(driver, 1, location=5) == PASSED
    assert set_flow_rule(driver, 1, location=5) == NOT_FOUND
    assert set_flow_rule(driver, 2) == PASSED
    assert driver.command(0x10, pack(">H2xIQQ", 2, 0, 4096, place)) == PASSED
    assert unpack(">I", driver.memory.read(place, 4)) == (0,)


def test_flow_rules_that_cannot_be_had(driver: Driver) -> None:
    driver.start()
    address = ip_address("10.0.0.1").packed
    assert set_flow_rule(driver, 0, flow_rule(SCTP4, 1, dst=address), 0) == UNIMPLEMENTED
    assert set_flow_rule(driver, 0, flow_rule(10, 1, dst=address), 0) == INVALID
    assert set_flow_rule(driver, 0, flow_rule(TCP4, 4, dst=address), 0) == INVALID, "no such queue"
    assert set_flow_rule(driver, 0, flow_rule(TCP4, 1, dst=address), 1024) == INVALID, "no such location"
    assert set_flow_rule(driver, 0, flow_rule(TCP4, 1), 0) == INVALID, "matches everything"
    assert set_flow_rule(driver, 0, flow_rule(TCP4, 1, dst=address, dst_mask=b"\xff\0\xff\xff"), 0) == INVALID
    traffic_class = bytearray(flow_rule(TCP4, 1, dst=address))
    traffic_class[4 + 40 + 36] = 0xFF
    assert set_flow_rule(driver, 0, bytes(traffic_class), 0) == INVALID
    assert set_flow_rule(driver, 3) == UNIMPLEMENTED
    assert driver.command(0xFF, pack(">IIQ", 0x101, 91, BASE)) == INVALID
    assert driver.command(0xFF, pack(">IIQ", 0x101, 92, 0)) == INVALID


def test_a_rule_takes_the_place_of_another_protocols(driver: Driver) -> None:
    driver.start()
    assert set_flow_rule(driver, 0, flow_rule(TCP4, 1, dport=1), 9) == PASSED
    assert set_flow_rule(driver, 0, flow_rule(UDP4, 1, dport=1), 9) == PASSED
    place = driver.memory.allocate(4096)
    driver.command(0x10, pack(">H2xIQQ", 0, 0, 4096, place))
    assert unpack(">I4xI4xIH", driver.memory.read(place, 22)) == (1, 1, 9, UDP4)


def test_reset_clears_all_and_says_so(driver: Driver) -> None:
    driver.start()
    driver.open(post=False)
    set_flow_rule(driver, 0, flow_rule(TCP4, 1, dport=1), 9)
    driver.write32(0x04, 2)
    assert driver.read32(0x00) == 1 << 2 | 1 << 4
    assert driver.read32(0x18) == 0
    assert driver.nic.statistics().resets == 1
    assert not driver.nic.statistics().rx
    driver.start()
    assert driver.read32(0x00) == 1 << 2
    place = driver.memory.allocate(4096)
    driver.command(0x10, pack(">H2xIQQ", 2, 0, 4096, place))
    assert unpack(">I", driver.memory.read(place, 4)) == (0,)
    driver.open(post=False)


def test_bad_admin_queues(driver: Driver) -> None:
    for size in (0, 63, 192):
        driver.nic.write_bar(0, 0x28, size.to_bytes(2, "big"))
        driver.write32(0x04, 1)
        driver.write32(0x14, 1)
        assert driver.read32(0x18) == 0
    assert driver.nic.mistakes.counts["adminq-size"] == 3
    driver.nic.write_bar(0, 0x28, (4096).to_bytes(2, "big"))
    driver.write32(0x20, 0xFFFFFFFF)
    driver.write32(0x24, driver.adminq)
    driver.write32(0x04, 1)
    driver.write32(0x14, 3)
    assert driver.nic.mistakes.counts["adminq-ring"] == 3


@pytest.mark.parametrize(
    ("mac", "queues", "mtu"),
    [(b"\1" * 6, 1, 1500), (MAC[:5], 1, 1500), (MAC, 0, 1500), (MAC, 33, 1500), (MAC, 1, 67), (MAC, 1, 9217)],
)
def test_device_arguments(mac: bytes, queues: int, mtu: int) -> None:
    memory = GuestMemory(1 << 20)
    switch = Switch()
    with pytest.raises(ValueError, match=r"must be|6 bytes"):
        Gvnic(mac=mac, queues=queues, mtu=mtu, dma=memory.dma, switch=switch, faults=Faults())
    memory.close()
    assert not switch.counters
