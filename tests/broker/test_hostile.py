"""Clients that break every rule, and a system that fails at every call: the broker serves the others, and cleans up."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from broker_rig import ME, NAMESPACE, Rig, public_directory
from devmem_tcp.broker import protocol, server
from devmem_tcp.broker.client import BrokerControl
from devmem_tcp.broker.server import Server, listening
from devmem_tcp.errors import BrokenError, BusyError, KernelError, RemoteProtocolError
from devmem_tcp.kernel.control import NicControl
from devmem_tcp.sys import calls
from devmem_tcp.testing.faults import sweep
from devmem_tcp.types import PAGE_SIZE, HeaderSplitMode
from fake_nic import PATIENCE_S

HELLO = protocol.Hello(version=protocol.VERSION)
OPEN = protocol.OpenNic(nic="fake0", network_namespace=NAMESPACE)
SPLIT = protocol.SetHeaderSplit(mode=HeaderSplitMode.ON)
STATUS = protocol.GetStatus()
MANY = 1_000_000
ATTACH = protocol.Attach(queues=[9], rx_page_size=PAGE_SIZE)


@pytest.fixture
def directory() -> Iterator[Path]:
    with public_directory() as made:
        yield made


@pytest.fixture
def rig(directory: Path) -> Iterator[Rig]:
    rig = Rig(str(directory / "broker.sock"))
    with rig.serving():
        yield rig


class Raw:
    """A client that sends what it likes."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(path)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], rights)

    def receive(self) -> protocol.Answer | None:
        """Return the next answer; None: the connection has ended."""
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, 1 << 17, 4)
        except ConnectionResetError:
            data, fds, _, _ = socket.recv_fds(self.sock, 1 << 17, 4)
        for fd in fds:
            os.close(fd)
        return protocol.decode_answer(data, fds) if data else None

    def ask(self, request: protocol.Request, fds: Sequence[int] = ()) -> protocol.Answer:
        self.send(protocol.encode(request), fds)
        answer = self.receive()
        assert answer is not None
        return answer

    def close(self) -> None:
        self.sock.close()


@contextlib.contextmanager
def raw(path: str, *requests: protocol.Request) -> Iterator[Raw]:
    with contextlib.closing(Raw(path)) as client:
        for request in requests:
            answer = client.ask(request)
            assert not isinstance(answer, protocol.Failed), answer
        yield client


def flood(client: Raw, honest: BrokerControl) -> int:
    """Ask until the broker reads no more, reading nothing; returns how often that was.

    It reads no more if it served somebody else many times over and there is no room for a request all the same.
    """
    sent = refused = 0
    while refused < 20 and sent < MANY:
        try:
            client.send(protocol.encode(STATUS))
        except BlockingIOError:
            refused += 1
            assert honest.status().user_id == ME
        else:
            sent += 1
            refused = 0
    return sent


@contextlib.contextmanager
def null_fds(count: int) -> Iterator[list[int]]:
    """Yield fds of /dev/null."""
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\0" * 100, "this is no request"),
        (b'{"do":"status"', "this is no request"),
        (b'{"do":"juggle"}', "this is no request"),
        (b'{"do":"status","more":1}', "unknown field"),
        (b'{"do":"undo","handle":0}', "handle"),
        (b"[" * 60_000, "this is no request"),
        (b" " * (protocol.MAX_MESSAGE_BYTES + 1), "65536 bytes at most"),
        (protocol.encode(OPEN), "one NIC"),
        (protocol.encode(protocol.Hello(version=2)), "version 1 of its protocol, and the client 2"),
    ],
)
def test_what_is_no_request_ends_its_connection_alone(rig: Rig, data: bytes, why: str) -> None:
    with raw(rig.path, HELLO, OPEN, SPLIT) as hostile, contextlib.closing(BrokerControl(rig.path, "fake0")) as honest:
        hostile.send(data)
        answer = hostile.receive()
        assert isinstance(answer, protocol.Failed)
        assert answer.error == "RemoteProtocolError"
        assert why in answer.message
        assert hostile.receive() is None
        rig.nics.wait_until(lambda held: held == ["fake0 open"])
        honest.set_header_split(HeaderSplitMode.ON).close()


def test_nothing_before_hello_and_before_a_nic(rig: Rig) -> None:
    for requests, why in (([], "say hello first"), ([HELLO], "open a NIC first")):
        with raw(rig.path, *requests) as client:
            answer = client.ask(SPLIT)
            assert isinstance(answer, protocol.Failed)
            assert answer.message == why
            assert client.receive() is None


@pytest.mark.parametrize(("request_", "count"), [(STATUS, 1), (ATTACH, 0), (ATTACH, 2), (STATUS, 100)])
def test_fds_where_none_belong_or_too_many(rig: Rig, request_: protocol.Request, count: int) -> None:
    with raw(rig.path, HELLO, OPEN) as client, null_fds(count) as fds:
        before = len(os.listdir("/proc/self/fd"))
        client.send(protocol.encode(request_), fds)
        answer = client.receive()
        assert isinstance(answer, protocol.Failed)
        assert answer.error == "RemoteProtocolError"
        assert client.receive() is None
        rig.nics.wait_until(lambda held: not held)
        assert len(os.listdir("/proc/self/fd")) <= before


def test_fds_with_nothing_are_closed(rig: Rig) -> None:
    with raw(rig.path, HELLO, OPEN) as client, null_fds(1) as fds:
        client.send(b"", fds)
        assert isinstance(client.receive(), protocol.Failed)
        assert client.receive() is None


def test_who_does_not_read_answers_is_not_read_from(rig: Rig) -> None:
    with raw(rig.path, HELLO, OPEN, SPLIT) as hostile, contextlib.closing(BrokerControl(rig.path, "fake0")) as honest:
        hostile.sock.settimeout(0)
        sent = flood(hostile, honest)
        assert sent < MANY  # the broker stopped reading: the client's own socket filled, and nothing else
        hostile.sock.settimeout(PATIENCE_S)
        for _ in range(sent):  # and once it reads, it gets every answer
            assert isinstance(hostile.receive(), protocol.Status)
        assert isinstance(hostile.ask(STATUS), protocol.Status)


def test_who_does_not_read_and_goes_is_cleaned_up(rig: Rig) -> None:
    with contextlib.closing(BrokerControl(rig.path, "fake0")) as honest:
        with raw(rig.path, HELLO, OPEN, SPLIT) as hostile:
            hostile.sock.settimeout(0)
            assert flood(hostile, honest) < MANY
        rig.nics.wait_until(lambda held: held == ["fake0 open"])


def test_a_silent_client_and_an_empty_message(rig: Rig) -> None:
    with raw(rig.path), contextlib.closing(BrokerControl(rig.path, "fake0")):
        pass  # the first never says hello, and nobody waits for it
    with raw(rig.path, HELLO) as client:
        client.send(b"")
        assert client.receive() is None


def test_more_things_than_one_connection_may_hold(rig: Rig) -> None:
    with raw(rig.path, HELLO, OPEN) as client:
        for _ in range(256):
            assert isinstance(client.ask(SPLIT), protocol.Changed)
        rule = protocol.AddNtuple(rule=protocol.Rule(queue=9, dst_port=5201))
        memory = protocol.Allocate(kind="udmabuf", size_bytes=PAGE_SIZE)
        with null_fds(1) as fds:
            for request, given in ((SPLIT, []), (rule, []), (memory, []), (ATTACH, fds)):
                answer = client.ask(request, given)
                assert isinstance(answer, protocol.Failed)
                assert answer.error == "BusyError"
        assert isinstance(client.ask(protocol.Undo(handle=1)), protocol.Done)
        assert isinstance(client.ask(protocol.Undo(handle=1)), protocol.Done)
        assert isinstance(client.ask(SPLIT), protocol.Changed)


def test_a_handle_of_another_connection_is_unknown(rig: Rig) -> None:
    with raw(rig.path, HELLO, OPEN, SPLIT), raw(rig.path, HELLO, OPEN) as other:
        assert isinstance(other.ask(protocol.Undo(handle=1)), protocol.Done)
        assert "fake0 header-split on" in rig.nics.held


def test_a_mistake_in_the_broker_costs_one_client(directory: Path) -> None:
    rig = Rig(str(directory / "broker.sock"))

    def control_for(name: str) -> NicControl:
        raise AssertionError("a mistake")

    rig.nics.control_for = control_for  # type: ignore[method-assign, assignment]
    with served_by_turns(rig) as turn:
        client = Raw(rig.path)
        turn()
        for request, kind in ((HELLO, protocol.Welcome), (OPEN, protocol.Failed)):
            client.send(protocol.encode(request))
            turn()
            answer = client.receive()
            assert isinstance(answer, kind)
        assert isinstance(answer, protocol.Failed)
        assert answer.error == "BrokenError"
        assert client.receive() is None
        client.close()
        assert any("AssertionError: a mistake" in line for line in rig.lines)


def test_a_peer_without_a_name_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    overflow = tmp_path / "overflowuid"
    overflow.write_text(f"{ME}\n")  # as if this user were one that the broker's user namespace does not have
    monkeypatch.setattr(server, "_OVERFLOW_USER", str(overflow))
    with pytest.raises(KernelError, match="cannot tell who this is") as refused:
        BrokerControl(rig.path, "fake0")
    assert refused.value.errno == errno.EACCES


def test_all_connections_taken(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 1)
    with raw(rig.path, HELLO), pytest.raises(BusyError, match="the broker has 1 connections"):
        BrokerControl(rig.path, "fake0")


# --- a broker that is none ---


@pytest.mark.parametrize(
    ("answer", "error", "why"),
    [
        (b'{"is":"welcome","version":2,"kinds":[]}', RemoteProtocolError, "speaks version 2"),
        (b'{"is":"done","news":3}', RemoteProtocolError, "answered Done, and not Welcome"),
        (b"what?", RemoteProtocolError, "makes no sense"),
        (b"", BrokenError, "it ended the connection"),
    ],
)
def test_a_broker_of_another_version_or_none_at_all(
    directory: Path, answer: bytes, error: type[Exception], why: str
) -> None:
    path = str(directory / "broker.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1000)
                peer.send(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(error, match=why):
            BrokerControl(path, "fake0")
        thread.join(PATIENCE_S)


def test_a_broker_that_does_not_answer(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devmem_tcp.broker.client.ANSWER_TIMEOUT_S", 0.02)
    path = str(directory / "broker.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(BrokenError, match=r"no answer in 0.02 s"):
            BrokerControl(path, "fake0")


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(directory: Path) -> None:
    path = directory / "broker.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as killed:
        killed.bind(str(path))
    with listening(str(path)):
        assert path.stat().st_mode & 0o777 == 0o666
        with pytest.raises(BusyError, match="a broker listens at"), listening(str(path)):
            pass
    assert not path.exists()
    with listening(str(path), os.getegid()):
        assert path.stat().st_mode & 0o777 == 0o660
    path.write_text("somebody's file")
    with pytest.raises(KernelError, match="EADDRINUSE"), listening(str(path)):
        pass
    assert path.read_text() == "somebody's file"


# --- a system that fails ---


@contextlib.contextmanager
def served_by_turns(rig: Rig) -> Iterator[Callable[[], object]]:
    """Yield what makes a server take one turn, in this thread: what fails when is the same each time."""
    with (
        listening(rig.path) as listener,
        contextlib.closing(Server(listener, rig.leasing(), rig.lines.append)) as made,
    ):
        yield made.turn


def everything(directory: Path) -> None:
    """Serve a client that takes all there is; the client itself makes no call that is made to fail."""
    rig = Rig(str(directory / "broker.sock"))
    fd = os.memfd_create("client's")
    os.ftruncate(fd, PAGE_SIZE)
    requests: list[tuple[protocol.Request, list[int]]] = [
        (HELLO, []),
        (OPEN, []),
        (SPLIT, []),
        (protocol.AddNtuple(rule=protocol.Rule(queue=9, dst_port=5201)), []),
        (ATTACH, [fd]),
        (protocol.Allocate(kind="udmabuf", size_bytes=PAGE_SIZE), []),
        (protocol.Undo(handle=3), []),
        (protocol.Undo(handle=4), []),
        (STATUS, []),
    ]
    try:
        with served_by_turns(rig) as turn, contextlib.closing(Raw(rig.path)) as client:
            client.sock.settimeout(0)
            turn()
            for request, fds in requests:
                client.send(protocol.encode(request), fds)
                turn()
                if isinstance(answer := client.receive(), protocol.Failed):
                    raise protocol.unpack_error(answer)
                if answer is None:
                    assert rig.nics.held == []  # at once, not only when the server ends
                    raise ConnectionResetError("the broker ended the connection")
        assert not any("Traceback" in line for line in rig.lines), rig.lines
    finally:
        os.close(fd)
        assert rig.nics.held == []


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EMFILE, errno.EPERM], ids=errno.errorcode.get)
def test_every_call_of_the_server_fails_once(directory: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(server, "_LOOK_EVERY_S", 0.0)
    runs = sweep(lambda: everything(directory), errnos=[code])
    assert {"epoll_create1", "epoll_ctl", "epoll_wait", "accept4", "getsockopt", "recvmsg", "sendmsg", "bind"} <= {
        run.call for run in runs
    }


def test_a_client_that_cannot_be_taken_now_is_taken_later(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LOOK_EVERY_S", 0.01)
    rig = Rig(str(directory / "broker.sock"))
    with served_by_turns(rig) as turn, contextlib.closing(Raw(rig.path)) as client:
        accept, until_s = calls.accept, time.monotonic() + 0.05

        def scarce(sock: calls.Socket) -> calls.Socket:
            if time.monotonic() < until_s:
                raise OSError(errno.EMFILE, "too many open files")
            return accept(sock)

        monkeypatch.setattr(calls, "accept", scarce)
        turn()
        assert rig.lines == ["cannot take the next client: [Errno 24] too many open files"]
        client.send(protocol.encode(HELLO))
        turns = 0
        while not select.select([client.sock], [], [], 0)[0]:
            turn()
            turns += 1
        assert turns <= 25  # it waits until it may try again, and does not spin: two turns each time, and some more
        assert isinstance(client.receive(), protocol.Welcome)
