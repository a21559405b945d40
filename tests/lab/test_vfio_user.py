"""The vfio-user server as a server: connections, streams, pieces, fds in flight, and what bad clients get."""

from __future__ import annotations

import errno
import json
import logging
import select
import socket
import struct
from pathlib import Path

import pytest

from devmem_tcp.errors import ClosedError
from devmem_tcp.lab import vfio_protocol as wire
from devmem_tcp.lab.dma import DmaError, DmaSpace
from devmem_tcp.lab.vfio_protocol import Command
from devmem_tcp.lab.vfio_user import VfioUserServer
from vfio_client import (
    ASSIGN,
    PAGE,
    REGISTERS,
    Client,
    DmaFunction,
    Reply,
    Served,
    dma_map,
    message,
    open_fds,
    pump,
    refused,
    region_read,
    region_write,
    set_irqs,
    version,
)

# --- session ---------------------------------------------------------------------------------------------------------


def test_version_names_what_the_server_can_do(served: Served) -> None:
    with served.connect(negotiate=False) as client:
        reply = client.call(version(minor=1))
    assert wire.VERSION.unpack_from(reply.payload) == (0, 0)
    assert reply.payload[-1:] == b"\0"
    assert json.loads(reply.payload[wire.VERSION.size : -1]) == {
        "capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576, "max_dma_maps": 512, "pgsizes": 4096}
    }


def test_version_may_come_without_capabilities(served: Served) -> None:
    with served.connect(negotiate=False) as client:
        assert client.call(version(b"")).errno == 0


@pytest.mark.parametrize(
    "first",
    [
        version(major=1),
        version(b"{}"),
        version(b"[]\0"),
        version(b"{\0"),
        version(b"\xff\0"),
        version(b"[" * 4000 + b"\0"),
        version(b"9" * 4090 + b"\0"),
        version(b"{" + b" " * 4096 + b"}\0"),
        message(Command.VERSION, b"\0\0\0"),
        message(Command.DEVICE_RESET),
        message(0),
    ],
    ids=lambda data: repr(data[wire.HEADER.size : wire.HEADER.size + 16]),
)
def test_a_client_that_does_not_begin_with_version_0_is_told_so_and_dropped(served: Served, first: bytes) -> None:
    with served.connect(negotiate=False) as client:
        assert client.call(first).errno == errno.EINVAL
        assert client.closed_by_server
    assert (served.server.counters.errors, served.server.counters.broken) == (1, 1)
    with served.connect():
        assert served.server.counters.connections == 2


def test_a_second_version_is_refused(served: Served, client: Client) -> None:
    refused(served, client, version(), errno.EINVAL)


@pytest.mark.parametrize("command", [0, 11, 12, 14, 15, 16, 0xFFFF])
def test_unknown_commands_are_refused(served: Served, client: Client, command: int) -> None:
    refused(served, client, message(command, b"some payload"), errno.EOPNOTSUPP)


@pytest.mark.parametrize("length", [0, 1, 15, 31, 33, 64])
@pytest.mark.parametrize("command", [2, 3, 4, 5, 6, 7, 8, 9, 10, 13])
def test_payloads_of_a_wrong_length_are_refused(served: Served, client: Client, command: int, length: int) -> None:
    if command == Command.DEVICE_RESET and length == 0:
        length = 1
    refused(served, client, message(command, b"\x40" + bytes(max(length - 1, 0)) if length else b""), errno.EINVAL)


def test_requests_without_reply_get_none_good_or_bad(served: Served, client: Client) -> None:
    client.send(region_write(REGISTERS, 0, b"posted", flags=wire.NO_REPLY))
    client.send(region_write(REGISTERS, PAGE, b"beyond", flags=wire.NO_REPLY))
    assert client.replies() == []
    assert client.call(region_read(REGISTERS, 0, 6)).payload[-6:] == b"posted"
    assert served.server.counters.errors == 1


def test_posted_writes_and_the_read_after_them_are_handled_in_order(client: Client) -> None:
    writes = b"".join(region_write(REGISTERS, 0, bytes([n]), flags=wire.NO_REPLY) for n in range(200))
    client.send(writes + region_read(REGISTERS, 0, 1))
    (reply,) = client.replies()
    assert reply.payload[-1] == 199


@pytest.mark.parametrize("step", [1, 7, 16, 17])
def test_messages_may_come_in_pieces(client: Client, step: int) -> None:
    stream = b"".join(region_write(REGISTERS, n, bytes([n])) for n in range(5)) + region_read(REGISTERS, 0, 5)
    for at in range(0, len(stream), step):
        client.send(stream[at : at + step])
    replies = client.replies()
    assert [reply.errno for reply in replies] == [0] * 6
    assert replies[-1].payload[-5:] == bytes(range(5))


def test_a_second_client_waits_for_the_first_to_leave(served: Served, client: Client) -> None:
    waiting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    waiting.connect(served.path)
    waiting.sendall(version())
    pump(served.server, rounds=2)  # it would spin if the waiting client kept it readable
    assert served.server.counters.connections == 1
    client.close()
    pump(served.server)
    assert served.server.counters.connections == 2
    assert struct.unpack_from("<HH", waiting.recv(4096)) == (7, Command.VERSION)
    waiting.close()
    pump(served.server)


@pytest.mark.parametrize(
    "header",
    [
        wire.HEADER.pack(1, Command.DEVICE_RESET, 15, 0, 0),
        wire.HEADER.pack(1, Command.DEVICE_RESET, 0, 0, 0),
        wire.HEADER.pack(1, Command.REGION_WRITE, wire.MAX_MESSAGE + 1, 0, 0),
        wire.HEADER.pack(1, Command.REGION_WRITE, 0xFFFFFFFF, 0, 0),
        wire.HEADER.pack(1, Command.DEVICE_RESET, 16, wire.REPLY, 0),
        wire.HEADER.pack(1, Command.DEVICE_RESET, 16, 0xF, 0),
    ],
)
def test_a_bad_header_closes_the_connection_and_the_server_listens_again(served: Served, header: bytes) -> None:
    with served.connect() as client:
        client.send(header)
        assert client.replies() == []
        assert client.closed_by_server
    assert served.server.counters.broken == 1
    with served.connect() as client:
        assert client.call(region_read(REGISTERS, 0, 1)).errno == 0


def test_a_message_cut_short_by_the_end_of_the_stream_is_counted(served: Served) -> None:
    with served.connect() as client:
        client.send(region_write(REGISTERS, 0, b"whole")[:-1])
    assert served.server.counters.broken == 1
    assert served.function.registers[:5] == bytes(5)


def send_until_full(served: Served, client: Client) -> int:
    """Ask for pages and read no replies until both directions are full; return how many were asked for."""
    for sent in range(2000):
        try:
            client.socket.send(region_read(REGISTERS, 0, PAGE))
        except BlockingIOError:
            return sent
        pump(served.server)
    raise AssertionError("the server reads on although its replies are not read")


def test_a_client_that_reads_no_replies_is_not_read_from_and_loses_none(served: Served, client: Client) -> None:
    sent = send_until_full(served, client)
    before = served.server.counters.messages
    assert before < sent
    pump(served.server, rounds=2)  # and it is not ready all the time
    assert served.server.counters.messages == before
    received: list[Reply] = []
    while len(received) < sent:
        received += client.replies()
        pump(served.server)
    assert {len(reply.payload) for reply in received} == {wire.REGION_ACCESS.size + PAGE}
    assert client.call(region_read(REGISTERS, 0, 1)).errno == 0


def test_a_client_that_reads_too_slowly_does_not_make_the_server_collect_requests(
    served: Served, client: Client
) -> None:
    reply_bytes = wire.HEADER.size + wire.REGION_ACCESS.size + PAGE
    sent, received = send_until_full(served, client), 0
    first = sent
    for _ in range(20):
        while not select.select([served.server], [], [], 0)[0]:
            received += len(client.socket.recv(reply_bytes))
        pump(served.server)
        sent += send_until_full(served, client)
    assert sent - received // reply_bytes < 3 * first


def test_what_one_client_did_not_read_is_not_for_the_next(served: Served) -> None:
    with served.connect() as client:
        send_until_full(served, client)
    with served.connect() as client:
        assert client.call(region_read(REGISTERS, 0, 1)).errno == 0


def test_a_client_that_goes_takes_its_memory_and_interrupts_along(
    served: Served, guest_memory: int, eventfds: list[int]
) -> None:
    before = open_fds()
    client = served.connect()
    client.call(dma_map(0, PAGE), [guest_memory])
    client.call(set_irqs(ASSIGN, 0, 4), eventfds)
    client.close()
    assert served.function.irqs == {}
    assert served.function.resets == 1
    with pytest.raises(DmaError):
        served.dma.read(0, 1)
    assert open_fds() == before


# --- the server itself -----------------------------------------------------------------------------------------------


def test_close_removes_the_socket_and_can_be_called_again(tmp_path: Path) -> None:
    dma = DmaSpace()
    path = tmp_path / "nic.sock"
    server = VfioUserServer(str(path), DmaFunction(dma), dma)
    assert path.is_socket()
    server.close()
    server.close()
    assert not path.exists()
    with pytest.raises(ClosedError):
        server.ready()


def test_close_with_a_client_drops_it(tmp_path: Path, guest_memory: int) -> None:
    before = open_fds()
    dma = DmaSpace()
    path = str(tmp_path / "nic.sock")
    server = VfioUserServer(path, DmaFunction(dma), dma)
    client = Client(server, path)
    client.call(dma_map(0, PAGE), [guest_memory])
    server.close()
    assert client.closed_by_server
    client.socket.close()
    assert open_fds() == before
    with pytest.raises(DmaError):
        dma.read(0, 1)


def test_a_path_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "nic.sock"
    path.write_text("mine")
    before = open_fds()
    dma = DmaSpace()
    with pytest.raises(OSError, match="in use"):
        VfioUserServer(str(path), DmaFunction(dma), dma)
    assert path.read_text() == "mine"
    assert open_fds() == before


def test_a_flood_of_bad_requests_does_not_flood_the_log(
    served: Served, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(500):
            client.send(region_write(9, 0, b"x", flags=wire.NO_REPLY))
    assert served.server.counters.errors == 500
    assert len(caplog.records) == 16 + 4  # 32, 64, 128 and 256
    assert "EINVAL" in caplog.records[0].getMessage()
