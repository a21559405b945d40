"""Whoever connects and is no honest peer is dropped in time and counted, and keeps nobody out."""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from devmem_tcp.errors import AuthenticationFailed, DevmemError, RemoteProtocolError, Timeout
from devmem_tcp.sansio.frames import CONTROL_MAGIC, DATA_MAGIC, NONCE_BYTES, Limits, Proof, Role, encode
from devmem_tcp.sansio.handshake import PREAMBLE_BYTES, Agreed, Connector, Terms
from devmem_tcp.transport.reception import MAX_WAITING
from fault_ends import MIB, Nursery, Survivor, nursery, same, sending, surviving
from fault_peer import KEY, pattern
from fault_wire import middle

TLS_HELLO = bytes.fromhex("16030100a5010000a10303") + bytes(range(160))
HTTP = b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + b"X-Filler: 0123456789\r\n" * 4
PATIENCE_S = 0.3


@pytest.fixture(scope="module")
def peers() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


def data_port(end: Survivor) -> int:
    reception = end.receiver._engine.reception
    assert reception is not None
    return int(reception._data.address[1])


def call(end: Survivor, *, data: bool = False) -> socket.socket:
    """Connect to the control port, or the data port."""
    assert end.receiver.address is not None
    host, port = end.receiver.address
    return socket.create_connection((host, data_port(end) if data else port), 5.0)


def judge(end: Survivor, words: str, refused: int = 1) -> None:
    """See that so many were turned away, the last one for this reason."""
    end.drive(lambda: end.receiver.refused >= refused)
    assert end.receiver.refused == refused
    assert words in end.receiver.last_refusal
    assert not end.errors


def see_off(sock: socket.socket) -> bytes:
    """Return what a stranger hears until its connection is ended."""
    heard = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(4096):
            heard += data
    return bytes(heard)


def transfer(peers: Nursery, end: Survivor) -> None:
    """See that an honest peer gets in, and a message through."""
    with peers.peer("honest_sender", address=end.receiver.address, lanes=1, seeds=[7]) as honest:
        honest.go()
        end.drive(lambda: bool(end.messages) and not end.receiver.peers, honest)
    assert end.names == ["honest 7"]
    assert same(end.messages[0][1], pattern(7))


# --- what comes by the control port --------------------------------------------------------------------------------

OTHER_KEY = bytes(32)
FRAME = CONTROL_MAGIC + (100).to_bytes(4)


def hello(key: bytes | None = KEY, role: Role = Role.SENDER, version: int = 1) -> Connector:
    terms = Terms(
        role, "software", Limits(), key=key, peer_is_local=True, lowest_version=version, highest_version=version
    )
    return Connector(terms, nonce=secrets.token_bytes(NONCE_BYTES), now=time.monotonic())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"\x00" * 100, "this is no control connection"),
        (HTTP, "this is no control connection: it starts with b'GET / HT'"),
        (TLS_HELLO, "this is no control connection"),
        (DATA_MAGIC + bytes(60), "this is no control connection: it starts with b'dmtD"),
        (CONTROL_MAGIC + (4097).to_bytes(4), "a frame of 4097 bytes, where 1 to 4096 are allowed"),
        (CONTROL_MAGIC + (0xFFFFFFFF).to_bytes(4), "a frame of 4294967295 bytes"),
        (CONTROL_MAGIC + bytes(4), "a frame of 0 bytes"),
        (FRAME + b"\xc1" * 100, "this is no frame"),
        (FRAME + b"\x91" * 100, "this is no frame"),
        (CONTROL_MAGIC + encode(Proof(bytes(32))), "the peer sent Proof instead of its hello"),
        (b"", "took over 0.3 s to send its hello"),
        (FRAME + b"\x98", "took over 0.3 s to send its hello"),
    ],
)
def test_a_stranger_at_the_control_port(peers: Nursery, said: bytes, words: str) -> None:
    with surviving(handshake_timeout_s=PATIENCE_S) as end, call(end) as stranger:
        stranger.sendall(said)
        judge(end, words)
        see_off(stranger)
        transfer(peers, end)


@pytest.mark.parametrize(
    ("connector", "error", "words"),
    [
        (lambda: hello(key=OTHER_KEY), AuthenticationFailed, "does not know the key"),
        (lambda: hello(key=None), AuthenticationFailed, "one end has a key and the other has none"),
        (lambda: hello(version=2), RemoteProtocolError, "no common version: this side speaks 1 to 1, the peer 2 to 2"),
        (lambda: hello(role=Role.RECEIVER), RemoteProtocolError, "both ends are receivers"),
    ],
    ids=["wrong key", "no key", "wrong version", "same role"],
)
def test_a_peer_that_does_not_fit_is_told_so(
    peers: Nursery, connector: Callable[[], Connector], error: type[DevmemError], words: str
) -> None:
    with surviving() as end, call(end) as sock:
        with pytest.raises(error, match=words):
            shake(end, sock, connector())
        judge(end, words)
        transfer(peers, end)


def shake(end: Survivor, sock: socket.socket, connector: Connector) -> Agreed:
    """Shake hands with a receiver that this thread drives, as far as tickets."""
    while True:
        agreed = connector.next_event()
        sock.sendall(connector.data_to_send())
        if agreed is not None:
            return agreed
        end.drive(lambda: bool(select.select([sock], (), (), 0)[0]))
        data = sock.recv(4096)
        if not data:
            connector.control_ended()
        connector.receive_data(data)


def test_a_stranger_that_says_a_byte_at_a_time_has_no_more_time_than_others(peers: Nursery) -> None:
    with surviving(handshake_timeout_s=PATIENCE_S) as end, call(end) as slow, call(end, data=True) as slow_data:
        slow.sendall(CONTROL_MAGIC + (4096).to_bytes(4))
        slow_data.sendall(DATA_MAGIC)
        began = time.monotonic()
        while end.receiver.refused < 2:
            assert time.monotonic() < began + 5.0
            for sock in (slow, slow_data):
                with contextlib.suppress(ConnectionError):
                    sock.send(b"\x98")
            select.select([end.receiver._engine.fileno()], (), (), 0.02)
            end.take_all()
        transfer(peers, end)


# --- what comes by the data port -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (bytes(PREAMBLE_BYTES), "this is no data connection"),
        (HTTP, "this is no data connection: it starts with b'GET / HT'"),
        (TLS_HELLO, "this is no data connection"),
        (CONTROL_MAGIC + bytes(60), "this is no data connection: it starts with b'dmtC"),
        (DATA_MAGIC + bytes(60), "a data connection of no session that is being agreed on"),
        (DATA_MAGIC + secrets.token_bytes(500), "a data connection of no session that is being agreed on"),
        (b"", "did not say in time whose it is"),
        (DATA_MAGIC, "did not say in time whose it is"),
    ],
)
def test_a_stranger_at_the_data_port(peers: Nursery, said: bytes, words: str) -> None:
    with surviving(handshake_timeout_s=PATIENCE_S) as end, call(end, data=True) as stranger:
        stranger.sendall(said)
        judge(end, words)
        assert see_off(stranger) == b""
        transfer(peers, end)


def test_a_ticket_admits_once_and_its_second_use_harms_no_session(peers: Nursery) -> None:
    with surviving(lanes=2) as end, call(end) as control:
        terms = Terms(Role.SENDER, "software", Limits(2), key=KEY, peer_is_local=True)
        agreed = shake(end, control, Connector(terms, nonce=secrets.token_bytes(NONCE_BYTES), now=time.monotonic()))
        first, second = agreed.preambles
        with call(end, data=True) as lane, call(end, data=True) as again, call(end, data=True) as forged:
            lane.sendall(first)
            end.drive(lambda: data_connections(end) == 1)
            again.sendall(first)
            judge(end, "a data connection that is not, or no longer, expected: it says lane 0")
            assert see_off(again) == b""
            forged.sendall(second[:-1] + bytes([second[-1] ^ 1]))
            judge(end, "a data connection that is not, or no longer, expected: it says lane 1", refused=2)
            with call(end, data=True) as other:
                other.sendall(second)
                end.drive(lambda: len(end.receiver.peers) == 1)


def data_connections(end: Survivor) -> int:
    """Return how many data connections were admitted to sessions that are being agreed on."""
    reception = end.receiver._engine.reception
    assert reception is not None
    return sum(len(caller.lanes) for caller in reception._callers.values())


# --- replay --------------------------------------------------------------------------------------------------------


def test_what_an_honest_peer_said_is_worth_nothing_said_again(peers: Nursery) -> None:
    with surviving() as end:
        assert end.receiver.address is not None
        with middle(end.receiver.address, data_port(end)) as between:
            with peers.peer("honest_sender", address=between.address, lanes=1, seeds=[3]) as honest:
                honest.go()
                end.drive(lambda: end.names == ["honest 3"] and not end.receiver.peers, honest)
            end.messages.clear()
            ((control,), (data,)) = between.passages
        with call(end) as again:
            again.sendall(control.said)
            judge(end, "the connecting side does not know the key")
            assert b"does not know the key" in see_off(again)
        with call(end, data=True) as again:
            again.sendall(data.said)
            judge(end, "a data connection of no session that is being agreed on", refused=2)
        transfer(peers, end)


# --- crowds --------------------------------------------------------------------------------------------------------


def test_a_crowd_of_strangers_costs_little_and_keeps_nobody_out(peers: Nursery) -> None:
    with surviving(handshake_timeout_s=1.0) as end, contextlib.ExitStack() as crowd:
        for number in range(500):
            crowd.enter_context(call(end, data=number % 2 == 1))
            end.take_all()
        reception = end.receiver._engine.reception
        assert reception is not None
        assert len(reception._callers) <= MAX_WAITING
        assert len(reception._strangers) <= MAX_WAITING
        transfer(peers, end)
        end.drive(lambda: end.receiver.refused == 500)
        assert not reception.waiting
        assert not reception._strangers


def test_strangers_take_none_of_the_places_of_peers(peers: Nursery) -> None:
    with surviving(max_peers=1) as end, call(end), call(end):
        transfer(peers, end)


def test_of_honest_peers_one_too_many_is_told_so(peers: Nursery) -> None:
    with surviving(max_peers=1, size=MIB) as end:
        address = end.receiver.address
        with peers.peer("honest_sender", address=address, lanes=1, seeds=[7]) as first:
            end.drive(lambda: len(end.receiver.peers) == 1, first)
            with call(end) as second, pytest.raises(RemoteProtocolError, match="takes 1 senders at a time"):
                shake(end, second, hello())
            judge(end, "takes 1 senders at a time (max_peers)")
            first.go()
            end.drive(lambda: end.names == ["honest 7"] and not end.receiver.peers, first)


# --- the other way round: who listens is no receiver ---------------------------------------------------------------


@contextlib.contextmanager
def listening(answer: bytes) -> Iterator[int]:
    """Listen; whoever connects is told this. Yields the TCP port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(ConnectionError):
                sock, _ = server.accept()
                with sock:
                    sock.sendall(answer)
                    see_off(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join(10.0)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", RemoteProtocolError, "this is no control connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", RemoteProtocolError, "this is no control connection"),
        (CONTROL_MAGIC + (1 << 20).to_bytes(4), RemoteProtocolError, "a frame of 1048576 bytes"),
        (FRAME + bytes(100), RemoteProtocolError, "this is no frame"),
        (CONTROL_MAGIC, Timeout, "took over 0.3 s to send its challenge"),
        (b"", Timeout, "took over 0.3 s to send its challenge"),
    ],
)
def test_a_sender_that_goes_to_something_else_says_so(answer: bytes, error: type[Exception], words: str) -> None:
    with (
        listening(answer) as port,
        pytest.raises(error, match=words),
        sending(to=("127.0.0.1", port), handshake_timeout_s=PATIENCE_S),
    ):
        pass
