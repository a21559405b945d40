"""What each vfio-user request does, over a real UNIX socket with real fds: what QEMU asks, and what nobody should."""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest

from devmem_tcp.lab import vfio_protocol as wire
from devmem_tcp.lab.vfio_protocol import Command, IrqSet
from vfio_client import (
    ASSIGN,
    DISABLE,
    ENGINE_READ,
    PAGE,
    REGISTERS,
    Client,
    Served,
    dma_map,
    dma_unmap,
    engine,
    message,
    open_fds,
    refused,
    region_read,
    region_write,
    set_irqs,
)

# --- what there is ---------------------------------------------------------------------------------------------------


def test_device_info(client: Client) -> None:
    reply = client.call(message(Command.DEVICE_GET_INFO, wire.DEVICE_INFO.pack(16, 0, 0, 0)))
    assert wire.DEVICE_INFO.unpack(reply.payload) == (16, 3, 9, 5)


@pytest.mark.parametrize(("region", "size"), [(0, PAGE), (1, 0), (2, 64), (3, 0), (5, 0), (6, 0), (7, 256), (8, 0)])
def test_region_info(client: Client, region: int, size: int) -> None:
    reply = client.call(message(Command.DEVICE_GET_REGION_INFO, wire.REGION_INFO.pack(32, 0, region, 0, 0, 0)))
    assert wire.REGION_INFO.unpack(reply.payload) == (32, 3 if size else 0, region, 0, size, 0)


def test_there_are_no_region_io_fds(client: Client) -> None:
    reply = client.call(message(Command.DEVICE_GET_REGION_IO_FDS, wire.REGION_IO_FDS.pack(16, 0, 2, 0)))
    assert wire.REGION_IO_FDS.unpack(reply.payload) == (16, 0, 2, 0)


@pytest.mark.parametrize(("kind", "flags", "count"), [(0, 0, 0), (1, 0, 0), (2, 1, 4), (3, 0, 0), (4, 0, 0)])
def test_irq_info(client: Client, kind: int, flags: int, count: int) -> None:
    reply = client.call(message(Command.DEVICE_GET_IRQ_INFO, wire.IRQ_INFO.pack(16, 0, kind, 0)))
    assert wire.IRQ_INFO.unpack(reply.payload) == (16, flags, kind, count)


@pytest.mark.parametrize(
    "request_bytes",
    [
        message(Command.DEVICE_GET_INFO, wire.DEVICE_INFO.pack(15, 0, 0, 0)),
        message(Command.DEVICE_GET_REGION_INFO, wire.REGION_INFO.pack(31, 0, 0, 0, 0, 0)),
        message(Command.DEVICE_GET_REGION_INFO, wire.REGION_INFO.pack(32, 0, 9, 0, 0, 0)),
        message(Command.DEVICE_GET_REGION_IO_FDS, wire.REGION_IO_FDS.pack(16, 0, 9, 0)),
        message(Command.DEVICE_GET_REGION_IO_FDS, wire.REGION_IO_FDS.pack(16, 1, 0, 0)),
        message(Command.DEVICE_GET_IRQ_INFO, wire.IRQ_INFO.pack(16, 0, 5, 0)),
        message(Command.DEVICE_GET_IRQ_INFO, wire.IRQ_INFO.pack(0, 0, 0, 0)),
    ],
)
def test_questions_about_what_is_not_there_are_refused(served: Served, client: Client, request_bytes: bytes) -> None:
    refused(served, client, request_bytes, errno.EINVAL)


def test_a_reset_reaches_the_function_and_keeps_memory_and_interrupts(
    served: Served, client: Client, guest_memory: int, eventfds: list[int]
) -> None:
    client.call(dma_map(0, PAGE), [guest_memory])
    client.call(set_irqs(ASSIGN, 0, 4), eventfds)
    assert client.call(message(Command.DEVICE_RESET)) == (7, Command.DEVICE_RESET, 0, b"")
    assert served.function.resets == 1
    assert len(served.function.irqs) == 4
    assert client.call(engine(0, 4, 1)).errno == 0


# --- registers -------------------------------------------------------------------------------------------------------


def test_registers_are_written_and_read(client: Client) -> None:
    written = client.call(region_write(REGISTERS, 0xFFC, b"abcd"))
    assert written.payload == wire.REGION_ACCESS.pack(0xFFC, REGISTERS, 4)
    assert client.call(region_read(REGISTERS, 0xFFC, 4)).payload == wire.REGION_ACCESS.pack(0xFFC, 0, 4) + b"abcd"


def test_config_space_is_read_and_a_bar_gives_its_size(client: Client) -> None:
    assert client.call(region_read(wire.CONFIG_REGION, 0, 256)).payload[-240:] == bytes(range(16, 256)).replace(
        b"\x10\x11\x12\x13", bytes(4)
    )
    client.call(region_write(wire.CONFIG_REGION, 0x10, b"\xff\xff\xff\xff"))
    assert client.call(region_read(wire.CONFIG_REGION, 0x10, 4)).payload[-4:] == struct.pack("<I", 0xFFFFF000)
    client.call(region_write(wire.CONFIG_REGION, 0x10, struct.pack("<I", 0xFEBF0123)))
    assert client.call(region_read(wire.CONFIG_REGION, 0x12, 2)).payload[-2:] == b"\xbf\xfe"


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [
        (REGISTERS, PAGE, 1),
        (REGISTERS, PAGE - 1, 2),
        (REGISTERS, (1 << 64) - 1, 2),
        (REGISTERS, 0, 0),
        (REGISTERS, 0, PAGE + 1),
        (2, 64, 1),
        (1, 0, 1),
        (6, 0, 4),
        (wire.CONFIG_REGION, 256, 1),
        (wire.CONFIG_REGION, 253, 4),
        (8, 0, 1),
        (9, 0, 1),
        (0xFFFFFFFF, 0, 1),
    ],
)
def test_accesses_outside_a_region_are_refused(
    served: Served, client: Client, region: int, offset: int, count: int
) -> None:
    refused(served, client, region_read(region, offset, count), errno.EINVAL)
    refused(served, client, region_write(region, offset, bytes(count)), errno.EINVAL)


def test_a_read_of_more_than_can_be_transferred_is_refused(served: Served, client: Client) -> None:
    served.function.bars = {REGISTERS: 1 << 32}
    refused(served, client, region_read(REGISTERS, 0, wire.MAX_TRANSFER + 1), errno.EINVAL)
    refused(served, client, region_read(REGISTERS, 0, 0xFFFFFFFF), errno.EINVAL)


@pytest.mark.parametrize("count", [0, 3, 5, 0xFFFFFFFF])
def test_a_write_brings_as_many_bytes_as_it_says(served: Served, client: Client, count: int) -> None:
    payload = wire.REGION_ACCESS.pack(0, REGISTERS, count) + b"abcd"
    refused(served, client, message(Command.REGION_WRITE, payload), errno.EINVAL)
    assert served.function.registers[:4] == bytes(4)


def test_the_largest_write_arrives(served: Served, client: Client) -> None:
    served.function.bars = {REGISTERS: wire.MAX_TRANSFER}
    data = os.urandom(wire.MAX_TRANSFER)
    assert client.call(region_write(REGISTERS, 0, data)).errno == 0
    assert served.function.registers == data
    assert client.call(region_read(REGISTERS, 0, len(data))).payload[wire.REGION_ACCESS.size :] == data


def test_a_fault_of_the_function_is_an_error_reply(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> bytes:
        raise KeyError("a bug")

    monkeypatch.setattr(served.function, "write_bar", fail)
    monkeypatch.setattr(served.function, "read_bar", lambda *_: b"too long")
    assert client.call(region_write(REGISTERS, 0, b"x")).errno == errno.EIO
    assert client.call(region_read(REGISTERS, 0, 1)).errno == errno.EIO
    assert served.server.counters.function_faults == 2
    assert "KeyError: 'a bug'" in caplog.text


def test_a_reset_that_fails_at_the_end_does_not_keep_fds(
    served: Served, guest_memory: int, eventfds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyError("a bug")

    before = open_fds()
    client = served.connect()
    client.call(dma_map(0, PAGE), [guest_memory])
    client.call(set_irqs(ASSIGN, 0, 4), eventfds)
    monkeypatch.setattr(served.function, "reset", fail)
    client.close()
    assert open_fds() == before
    assert served.function.irqs == {}
    assert served.server.counters.function_faults == 1
    with served.connect():
        pass


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_function_reaches_the_memory_that_the_client_mapped(
    served: Served, client: Client, guest_memory: int
) -> None:
    assert client.call(dma_map(0x100000, 4 * PAGE, offset=2 * PAGE), [guest_memory]).payload == b""
    assert client.call(engine(0x100000, PAGE, 0xAB)).errno == 0
    assert os.pread(guest_memory, 4 * PAGE, PAGE) == bytes(PAGE) + b"\xab" * PAGE + bytes(2 * PAGE)
    os.pwrite(guest_memory, b"hello", 3 * PAGE)
    assert client.call(engine(0x100000 + PAGE, 5, ENGINE_READ)).errno == 0
    assert client.call(region_read(REGISTERS, 0, 5)).payload[-5:] == b"hello"


def test_a_dma_address_that_is_not_mapped_is_the_guests_mistake(
    served: Served, client: Client, guest_memory: int
) -> None:
    client.call(dma_map(0, PAGE, flags=1), [guest_memory])
    refused(served, client, engine(PAGE, 1, ENGINE_READ), errno.EFAULT)
    refused(served, client, engine(0, 1, 0xAB), errno.EFAULT)
    assert client.call(engine(0, 1, ENGINE_READ)).errno == 0
    assert served.server.counters.function_faults == 0


def test_unmap_echoes_the_request_and_takes_the_memory_away(served: Served, client: Client, guest_memory: int) -> None:
    before = open_fds()
    client.call(dma_map(0, PAGE), [guest_memory])
    client.call(dma_map(PAGE, PAGE), [guest_memory])
    client.call(dma_map(8 * PAGE, PAGE))
    reply = client.call(dma_unmap(PAGE, PAGE))
    assert reply.payload == wire.DMA_UNMAP.pack(24, 0, PAGE, PAGE)
    refused(served, client, engine(PAGE, 1, 1), errno.EFAULT)
    assert client.call(engine(0, 1, 1)).errno == 0
    assert client.call(dma_unmap(0, 0, flags=wire.UNMAP_ALL)).payload == wire.DMA_UNMAP.pack(24, 2, 0, 0)
    refused(served, client, engine(0, 1, 1), errno.EFAULT)
    refused(served, client, dma_unmap(8 * PAGE, PAGE), errno.ENOENT)
    assert open_fds() == before


def test_maps_that_make_no_sense_are_refused(
    served: Served, client: Client, guest_memory: int, eventfds: list[int]
) -> None:
    refused(served, client, dma_map(0, 9 * PAGE), errno.EINVAL, (guest_memory,))
    refused(served, client, dma_map(1, PAGE), errno.EINVAL, (guest_memory,))
    refused(served, client, dma_map(0, PAGE), errno.EINVAL, (guest_memory, guest_memory))
    refused(served, client, dma_map(0, PAGE), errno.EINVAL, (eventfds[0],))
    for flags in (0, 2, 4, 7):
        refused(served, client, dma_map(0, PAGE, flags=flags), errno.EINVAL, (guest_memory,))
    refused(
        served, client, message(Command.DMA_MAP, wire.DMA_MAP.pack(31, 3, 0, 0, PAGE)), errno.EINVAL, (guest_memory,)
    )
    client.call(dma_map(PAGE, 2 * PAGE), [guest_memory])
    refused(served, client, dma_map(0, 2 * PAGE), errno.EEXIST, (guest_memory,))
    refused(served, client, dma_unmap(PAGE, PAGE), errno.EINVAL)
    refused(served, client, dma_unmap(PAGE, 2 * PAGE, flags=1), errno.EINVAL)
    refused(served, client, message(Command.DMA_UNMAP, wire.DMA_UNMAP.pack(23, 0, PAGE, 2 * PAGE)), errno.EINVAL)
    assert client.call(dma_unmap(PAGE, 2 * PAGE)).errno == 0


def test_fds_belong_to_the_message_they_came_with(served: Served, client: Client, guest_memory: int) -> None:
    """The kernel hands over earlier bytes and the message with the fd at once; both must get what is theirs."""
    other = os.memfd_create("other", os.MFD_CLOEXEC)
    os.ftruncate(other, PAGE)
    os.pwrite(other, b"other", 0)
    socket.send_fds(client.socket, [region_write(REGISTERS, 0, b"x")], [])
    socket.send_fds(client.socket, [dma_map(0, PAGE)], [guest_memory])
    socket.send_fds(client.socket, [dma_map(PAGE, PAGE)], [])
    socket.send_fds(client.socket, [dma_map(2 * PAGE, PAGE)[:20]], [other])
    socket.send_fds(client.socket, [dma_map(2 * PAGE, PAGE)[20:] + region_write(REGISTERS, 1, b"y")], [])
    os.close(other)
    served.server.ready()
    assert served.server.counters.messages == 1 + 5  # all of it at once
    assert [reply.errno for reply in client.replies()] == [0] * 5
    assert client.call(engine(0, 1, 1)).errno == 0
    refused(served, client, engine(PAGE, 1, 1), errno.EFAULT)
    assert bytes(served.dma.read(2 * PAGE, 5)) == b"other"
    assert served.function.registers[:2] == b"xy"


@pytest.mark.parametrize("count", [17, 100])
def test_more_fds_than_a_message_may_have_close_the_connection(served: Served, guest_memory: int, count: int) -> None:
    before = open_fds()
    with served.connect() as client:
        client.send(dma_map(0, PAGE), [guest_memory] * count)
        assert client.closed_by_server
    assert open_fds() == before
    assert served.server.counters.broken == 1


def test_fds_that_pile_up_in_one_message_close_the_connection(served: Served, guest_memory: int) -> None:
    before = open_fds()
    with served.connect() as client:
        for byte in dma_map(0, PAGE)[:17]:
            client.send(bytes([byte]), [guest_memory])
        assert client.closed_by_server
    assert open_fds() == before


def test_fds_of_a_message_that_never_ends_are_closed(served: Served, guest_memory: int) -> None:
    before = open_fds()
    with served.connect() as client:
        client.send(dma_map(0, PAGE)[:40], [guest_memory, guest_memory])
    assert open_fds() == before


@pytest.mark.parametrize(
    "request_bytes", [region_read(REGISTERS, 0, 1), message(Command.DEVICE_RESET), dma_unmap(0, PAGE)]
)
def test_fds_with_a_request_that_takes_none_are_refused(
    served: Served, client: Client, guest_memory: int, request_bytes: bytes
) -> None:
    refused(served, client, request_bytes, errno.EINVAL, (guest_memory,))


# --- interrupts ------------------------------------------------------------------------------------------------------


def test_interrupts_are_assigned_replaced_and_taken_away(served: Served, client: Client, eventfds: list[int]) -> None:
    before = open_fds()
    assert client.call(set_irqs(ASSIGN, 0, 1)).errno == 0  # what QEMU does first: enable MSI-X with no vector
    assert client.call(set_irqs(ASSIGN, 1, 2), eventfds[:2]).errno == 0
    assert sorted(served.function.irqs) == [1, 2]
    assert open_fds() == before + 2
    for vector, eventfd in ((1, eventfds[0]), (2, eventfds[1])):
        os.eventfd_write(served.function.irqs[vector], 1)
        assert os.eventfd_read(eventfd) == 1
    assert client.call(set_irqs(ASSIGN, 2, 1), [eventfds[3]]).errno == 0
    os.eventfd_write(served.function.irqs[2], 5)
    assert os.eventfd_read(eventfds[3]) == 5
    assert client.call(set_irqs(ASSIGN, 1, 1)).errno == 0
    assert sorted(served.function.irqs) == [2]
    assert client.call(set_irqs(DISABLE, 0, 0)).errno == 0
    assert served.function.irqs == {}
    assert open_fds() == before


def test_a_client_can_fire_its_own_interrupts(client: Client, eventfds: list[int]) -> None:
    client.call(set_irqs(ASSIGN, 0, 3), eventfds[:3])
    assert client.call(set_irqs(DISABLE, 0, 2)).errno == 0
    assert client.call(set_irqs(IrqSet.DATA_BOOL | IrqSet.TRIGGER, 1, 3, b"\0\1\1")).errno == 0
    assert [os.eventfd_read(fd) for fd in (eventfds[0], eventfds[1], eventfds[2])] == [1, 1, 1]


def test_a_full_eventfd_does_not_block_the_server(client: Client) -> None:
    eventfd = os.eventfd(0, os.EFD_CLOEXEC)  # one that would block
    os.eventfd_write(eventfd, (1 << 64) - 2)
    client.call(set_irqs(ASSIGN, 0, 1), [eventfd])
    assert client.call(set_irqs(DISABLE, 0, 1)).errno == 0
    os.close(eventfd)


@pytest.mark.parametrize(
    ("flags", "start", "count", "kind", "code"),
    [
        (ASSIGN, 0, 5, 2, errno.EINVAL),
        (ASSIGN, 4, 1, 2, errno.EINVAL),
        (ASSIGN, 0xFFFFFFFF, 0xFFFFFFFF, 2, errno.EINVAL),
        (ASSIGN, 0, 1, 0, errno.EINVAL),
        (ASSIGN, 0, 1, 5, errno.EINVAL),
        (ASSIGN, 0, 0, 2, errno.EOPNOTSUPP),
        (DISABLE, 1, 0, 2, errno.EOPNOTSUPP),
        (IrqSet.DATA_BOOL | IrqSet.TRIGGER, 0, 2, 2, errno.EINVAL),
        (IrqSet.DATA_NONE | IrqSet.MASK, 0, 1, 2, errno.EOPNOTSUPP),
        (IrqSet.DATA_EVENTFD | IrqSet.UNMASK, 0, 1, 2, errno.EOPNOTSUPP),
        (IrqSet.DATA_NONE | IrqSet.DATA_EVENTFD | IrqSet.TRIGGER, 0, 1, 2, errno.EOPNOTSUPP),
        (IrqSet.TRIGGER, 0, 1, 2, errno.EOPNOTSUPP),
        (0, 0, 0, 2, errno.EOPNOTSUPP),
    ],
)
def test_interrupts_that_are_not_there_are_refused(
    served: Served, client: Client, flags: int, start: int, count: int, kind: int, code: int
) -> None:
    refused(served, client, set_irqs(flags, start, count, kind=kind), code)


def test_fds_that_cannot_be_interrupts_are_refused(
    served: Served, client: Client, guest_memory: int, eventfds: list[int]
) -> None:
    refused(served, client, set_irqs(ASSIGN, 0, 2), errno.EINVAL, (eventfds[0],))
    refused(served, client, set_irqs(ASSIGN, 0, 1), errno.EINVAL, tuple(eventfds[:2]))
    refused(served, client, set_irqs(ASSIGN, 0, 2), errno.EINVAL, (eventfds[0], guest_memory))
    refused(served, client, set_irqs(DISABLE, 0, 1), errno.EINVAL, (eventfds[0],))
    assert served.function.irqs == {}
