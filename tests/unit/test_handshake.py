"""The handshake: two ends that know a key agree; anybody else is refused, in bounded time and with words."""

from __future__ import annotations

import contextlib
import dataclasses

import msgspec
import pytest

from devmem_tcp.errors import (
    AuthenticationFailed,
    ClosedError,
    DevmemError,
    LocalProtocolError,
    RemoteProtocolError,
    Timeout,
)
from devmem_tcp.sansio.endings import Party
from devmem_tcp.sansio.frames import (
    CONTROL_MAGIC,
    MAX_FRAME,
    VERSION,
    Challenge,
    ChecksumKind,
    DataTicket,
    Goodbye,
    HandshakeFrame,
    Hello,
    Limits,
    Proof,
    Refusal,
    Role,
    Welcome,
    encode,
    handshake_decoder,
)
from devmem_tcp.sansio.handshake import (
    PREAMBLE_BYTES,
    Acceptor,
    Agreed,
    Connector,
    Handshake,
    HandshakeState,
    Preamble,
    Terms,
    read_preamble,
)

KEY = b"k" * 16
SENDER = Terms(Role.SENDER, "kernel", Limits(3, 1000, 100), frozenset({"xxh3", "crc32c"}), key=KEY)
RECEIVER = Terms(Role.RECEIVER, "software", Limits(2, 2000, 50), frozenset({"xxh3", "zstd"}), key=KEY)


def connector(terms: Terms = SENDER, nonce: bytes = b"c" * 32, now: float = 0.0) -> Connector:
    return Connector(terms, nonce=nonce, now=now, timeout_s=5.0)


def acceptor(terms: Terms = RECEIVER, nonce: bytes = b"a" * 32, secret: bytes = b"s" * 32, port: int = 0) -> Acceptor:
    return Acceptor(terms, nonce=nonce, secret=secret, now=0.0, data_port=port, timeout_s=5.0)


def pump(near: Connector, far: Acceptor, step: int = 1 << 20) -> Agreed | None:
    """Let both talk until neither has more to say, in chunks of ``step`` bytes; returns what the connector agreed to.

    Errors are left for the test to ask for.
    """
    agreement = None
    while any(said := (near.data_to_send(), far.data_to_send())):
        for data, end in zip(said, (far, near), strict=True):
            for at in range(0, len(data), step):
                end.receive_data(data[at : at + step])
                with contextlib.suppress(DevmemError):
                    agreement = end.next_event() or agreement
    return agreement


def frames_in(data: bytes, magic: bool = True) -> list[HandshakeFrame]:
    decoder = handshake_decoder()
    decoder.feed(data if magic else CONTROL_MAGIC + data)
    frames = []
    while (frame := decoder.next_frame()) is not None:
        frames.append(frame)
    return frames


def ends_with(end: Handshake, kind: type[Exception], words: str) -> None:
    """Check the error, and that it is final."""
    for _ in range(2):
        with pytest.raises(kind, match=words) as caught:
            end.next_event()
        assert type(caught.value) is kind
    assert end.state is HandshakeState.FAILED
    assert end.deadline() is None
    end.receive_data(encode(Goodbye()))
    end.tick(1e9)
    with pytest.raises(kind, match=words):
        end.next_event()


def agreed(near: Connector, far: Acceptor, step: int = 1 << 20) -> tuple[Agreed, Agreed]:
    ours = pump(near, far, step)
    assert ours is not None
    for lane, preamble in enumerate(ours.preambles):
        assert far.next_event() is None
        assert far.admit(read_preamble(preamble)) == lane
    theirs = far.next_event()
    assert theirs is not None
    return ours, theirs


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_both_ends_agree_on_the_same(step: int) -> None:
    near, far = connector(), acceptor(port=5202)
    ours, theirs = agreed(near, far, step)
    assert len(ours.preambles) == 2
    assert ours.version == VERSION
    assert ours.role is Role.SENDER
    assert ours.peer_backend == "software"
    assert theirs.peer_backend == "kernel"
    assert ours.limits == Limits(2, 1000, 50)
    assert ours.features == {"xxh3"}
    assert ours.checksums == {ChecksumKind.XXH3}
    assert ours.keyed
    assert ours.data_port == 5202
    assert ours.session_id == far.session_id
    assert dataclasses.replace(ours, role=Role.RECEIVER, peer_backend="kernel", preambles=()) == theirs
    assert near.next_event() is None, "it is said once"
    assert far.next_event() is None
    assert near.deadline() is far.deadline() is None
    assert near.state is far.state is HandshakeState.AGREED
    for end in (near, far):
        end.control_ended()
        assert end.next_event() is None, "that is the session's to judge"


def test_the_receiver_may_connect_and_the_sender_accept() -> None:
    ours, theirs = agreed(connector(RECEIVER), acceptor(SENDER))
    assert (ours.role, theirs.role) == (Role.RECEIVER, Role.SENDER)


def test_session_ids_tickets_and_proofs_differ_by_session() -> None:
    first, _ = agreed(connector(), acceptor())
    second, _ = agreed(connector(), acceptor(secret=b"t" * 32))
    third, _ = agreed(connector(nonce=b"d" * 32), acceptor())
    assert first.session_id != second.session_id
    assert len({*first.preambles, *second.preambles, *third.preambles}) == 6


def test_wrong_key_is_refused_by_the_acceptor_and_both_say_so() -> None:
    near, far = connector(dataclasses.replace(SENDER, key=b"x" * 16)), acceptor()
    pump(near, far)
    ends_with(far, AuthenticationFailed, "the connecting side does not know the key")
    ends_with(near, AuthenticationFailed, "refused the session: the connecting side does not know the key")
    assert far.ending is not None
    assert far.ending.by is Party.PEER
    assert "same key=" in far.ending.hint


def test_an_acceptor_that_does_not_know_the_key_is_found_out() -> None:
    """It lets any proof pass; its own is what gives it away."""
    near = connector()
    near.receive_data(CONTROL_MAGIC + encode(Challenge(VERSION, RECEIVER.hello(b"a" * 32))))
    assert near.next_event() is None
    near.receive_data(encode(Welcome(b"w" * 32, b"i" * 8, 0)) + encode(DataTicket(0, b"t" * 16)))
    ends_with(near, AuthenticationFailed, "the peer does not know the key")


def test_a_welcome_cannot_be_altered_on_its_way() -> None:
    near, far = connector(), acceptor()
    far.receive_data(near.data_to_send())
    assert far.next_event() is None
    near.receive_data(far.data_to_send())
    assert near.next_event() is None
    far.receive_data(near.data_to_send())
    assert far.next_event() is None
    welcome = frames_in(far.data_to_send(), magic=False)[0]
    assert isinstance(welcome, Welcome)
    near.receive_data(encode(msgspec.structs.replace(welcome, data_port=666)))
    ends_with(near, AuthenticationFailed, "does not know the key")


def test_a_replayed_hello_and_proof_open_nothing() -> None:
    near, far = connector(), acceptor()
    hello = near.data_to_send()
    far.receive_data(hello)
    assert far.next_event() is None
    near.receive_data(far.data_to_send())
    assert near.next_event() is None
    proof = near.data_to_send()
    later = acceptor(nonce=b"b" * 32)
    later.receive_data(hello + proof)
    ends_with(later, AuthenticationFailed, "does not know the key")


def test_a_challenge_reflected_to_its_maker_is_refused() -> None:
    """Who does not know the key sends the acceptor's own nonce and, in a second session, its proof back."""
    far = acceptor()
    far.receive_data(CONTROL_MAGIC + encode(SENDER.hello(b"a" * 32)))
    ends_with(far, AuthenticationFailed, "own nonce back")
    near = connector()
    near.receive_data(CONTROL_MAGIC + encode(Challenge(VERSION, RECEIVER.hello(b"c" * 32))))
    ends_with(near, AuthenticationFailed, "own nonce back")


def test_a_connectors_proof_is_not_an_acceptors() -> None:
    near = connector()
    near.receive_data(CONTROL_MAGIC + encode(Challenge(VERSION, RECEIVER.hello(b"a" * 32))))
    assert near.next_event() is None
    proof = frames_in(near.data_to_send())[1]
    assert isinstance(proof, Proof)
    near.receive_data(encode(Welcome(proof.mac, b"i" * 8, 0)))
    ends_with(near, AuthenticationFailed, "does not know the key")


@pytest.mark.parametrize(
    "change",
    [
        {"limits": Limits(1, 1000, 100)},
        {"features": ["crc32c"]},
        {"highest_version": 7},
        {"backend": "other"},
        {"nonce": b"e" * 32},
    ],
)
def test_a_hello_altered_on_its_way_makes_the_proof_wrong(change: dict[str, object]) -> None:
    near, far = connector(), acceptor()
    hello = frames_in(near.data_to_send())[0]
    assert isinstance(hello, Hello)
    far.receive_data(CONTROL_MAGIC + encode(msgspec.structs.replace(hello, **change)))
    assert far.next_event() is None
    near.receive_data(far.data_to_send())
    assert near.next_event() is None
    far.receive_data(near.data_to_send())
    ends_with(far, AuthenticationFailed, "does not know the key")


def test_without_a_common_version_both_say_which_each_speaks() -> None:
    old = dataclasses.replace(SENDER, lowest_version=3, highest_version=4)
    near, far = connector(old), acceptor()
    pump(near, far)
    ends_with(far, RemoteProtocolError, "this side speaks 1 to 1, the peer 3 to 4")
    ends_with(near, RemoteProtocolError, "refused the session: no common version")


def test_the_highest_common_version_is_taken_and_no_lower_one_accepted() -> None:
    wide = dataclasses.replace(SENDER, lowest_version=0, highest_version=9)
    ours, theirs = agreed(connector(wide), acceptor(dataclasses.replace(RECEIVER, highest_version=4)))
    assert ours.version == theirs.version == 4
    for version in (0, 3, 5):
        near = connector(wide)
        peer = dataclasses.replace(RECEIVER, highest_version=4).hello(b"a" * 32)
        near.receive_data(CONTROL_MAGIC + encode(Challenge(version, peer)))
        ends_with(near, RemoteProtocolError, f"chose version {version}, which is not the highest common one")


def test_two_senders_have_nothing_to_say_to_each_other() -> None:
    near, far = connector(), acceptor(SENDER)
    pump(near, far)
    ends_with(far, RemoteProtocolError, "both ends are senders")
    ends_with(near, RemoteProtocolError, "refused the session: both ends are senders")
    near = connector()
    near.receive_data(CONTROL_MAGIC + encode(Challenge(VERSION, SENDER.hello(b"a" * 32))))
    ends_with(near, RemoteProtocolError, "both ends are senders")


@pytest.mark.parametrize(("ours", "theirs"), [(KEY, None), (None, KEY)])
def test_one_key_is_none(ours: bytes | None, theirs: bytes | None) -> None:
    near = connector(dataclasses.replace(SENDER, key=ours, insecure=True))
    far = acceptor(dataclasses.replace(RECEIVER, key=theirs, insecure=True))
    pump(near, far)
    ends_with(far, AuthenticationFailed, "one end has a key and the other has none")
    ends_with(near, AuthenticationFailed, "refused the session: one end has a key")
    near = connector(dataclasses.replace(SENDER, key=ours, insecure=True))
    peer = dataclasses.replace(RECEIVER, key=theirs).hello(b"a" * 32)
    near.receive_data(CONTROL_MAGIC + encode(Challenge(VERSION, peer)))
    ends_with(near, AuthenticationFailed, "one end has a key and the other has none")


@pytest.mark.parametrize(("local", "insecure"), [(True, False), (False, True)])
def test_without_a_key_local_peers_pass_and_others_if_that_is_written(local: bool, insecure: bool) -> None:
    near = connector(dataclasses.replace(SENDER, key=None, peer_is_local=True))
    far = acceptor(dataclasses.replace(RECEIVER, key=None, peer_is_local=local, insecure=insecure))
    ours, _ = agreed(near, far)
    assert not ours.keyed


def test_without_a_key_others_are_refused_with_words() -> None:
    near = connector(dataclasses.replace(SENDER, key=None, insecure=True))
    far = acceptor(dataclasses.replace(RECEIVER, key=None))
    pump(near, far)
    ends_with(far, AuthenticationFailed, "without a key only peers on the same machine")
    ends_with(near, AuthenticationFailed, "unless insecure=True is written")
    with pytest.raises(LocalProtocolError, match="no key is given"):
        connector(dataclasses.replace(SENDER, key=None))


def test_keys_and_nonces_of_the_wrong_length_are_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="15 bytes is easily guessed"):
        dataclasses.replace(SENDER, key=b"k" * 15)
    with pytest.raises(ValueError, match="a nonce has 32 random bytes, not 31"):
        connector(nonce=b"c" * 31)
    with pytest.raises(ValueError, match="a secret has 32 random bytes, not 33"):
        acceptor(secret=b"s" * 33)


def test_keys_are_not_in_what_is_printed() -> None:
    ours, _ = agreed(connector(), acceptor())
    assert "kkk" not in repr(SENDER)
    assert "preambles" not in repr(ours)


def opened() -> tuple[Connector, Acceptor, Agreed]:
    near, far = connector(), acceptor()
    ours = pump(near, far)
    assert ours is not None
    return near, far, ours


def test_a_ticket_admits_once() -> None:
    _, far, ours = opened()
    assert far.admit(read_preamble(ours.preambles[0])) == 0
    with pytest.raises(AuthenticationFailed, match="no longer, expected: it says lane 0"):
        far.admit(read_preamble(ours.preambles[0]))
    assert far.next_event() is None, "that was the connection's failure alone"
    assert far.admit(read_preamble(ours.preambles[1])) == 1
    assert far.next_event() is not None
    for preamble in ours.preambles:
        with pytest.raises(AuthenticationFailed):
            far.admit(read_preamble(preamble))


def test_a_ticket_of_another_session_admits_nowhere_else() -> None:
    _, far, ours = opened()
    other = acceptor(nonce=b"b" * 32, secret=b"t" * 32)
    their_connector = connector(nonce=b"d" * 32)
    theirs = pump(their_connector, other)
    assert theirs is not None
    with pytest.raises(AuthenticationFailed):
        other.admit(read_preamble(ours.preambles[0]))
    with pytest.raises(AuthenticationFailed):
        other.admit(read_preamble(ours.preambles[0])._replace(session_id=theirs.session_id))
    assert far.admit(read_preamble(ours.preambles[0])) == 0
    assert other.admit(read_preamble(theirs.preambles[0])) == 0


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"lane": 1}, {"lane": 2}, {"lane": 65535}, {"session_id": b"x" * 8}, {"nonce": b"x" * 16},
     {"proof": b"x" * 32}],
)  # fmt: skip
def test_a_preamble_with_any_field_changed_admits_nobody(change: dict[str, object]) -> None:
    _, far, ours = opened()
    preamble = read_preamble(ours.preambles[0])
    with pytest.raises(AuthenticationFailed):
        far.admit(Preamble(**(preamble._asdict() | change)))
    assert far.admit(preamble) == 0


def test_nobody_is_admitted_before_the_proof() -> None:
    _, _, ours = opened()
    far = acceptor()
    with pytest.raises(AuthenticationFailed):
        far.admit(read_preamble(ours.preambles[0]))


def test_a_preamble_has_one_size_and_says_what_it_is() -> None:
    _, _, ours = opened()
    preamble = ours.preambles[1]
    assert len(preamble) == PREAMBLE_BYTES
    assert preamble.startswith(b"dmtD\x00\x01\x00\x01" + ours.session_id)
    for wrong in (preamble[:-1], preamble + b"x", b"dmtC" + preamble[4:], b""):
        with pytest.raises(RemoteProtocolError, match="no data connection"):
            read_preamble(wrong)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([DataTicket(0, b"t" * 16)], "sent DataTicket instead of its challenge"),
        ([Welcome(b"w" * 32, b"i" * 8, 0)], "sent Welcome instead of its challenge"),
        ([SENDER.hello(b"h" * 32)], "sent Hello instead of its challenge"),
        ([Challenge(VERSION, RECEIVER.hello(b"a" * 32))] * 2, "sent Challenge instead of its welcome"),
        ([Refusal("busy", "come back later")], "the peer refused the session: come back later"),
    ],
)
def test_a_connector_takes_each_frame_in_its_turn_only(frames: list[HandshakeFrame], words: str) -> None:
    near = connector()
    near.receive_data(CONTROL_MAGIC + b"".join(map(encode, frames)))
    ends_with(near, RemoteProtocolError, words)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([Proof(b"p" * 32)], "sent Proof instead of its hello"),
        ([Refusal("busy", "no")], "sent Refusal instead of its hello"),
        ([SENDER.hello(b"h" * 32)] * 2, "sent Hello instead of its proof"),
    ],
)
def test_an_acceptor_takes_each_frame_in_its_turn_only(frames: list[HandshakeFrame], words: str) -> None:
    far = acceptor()
    far.receive_data(CONTROL_MAGIC + b"".join(map(encode, frames)))
    ends_with(far, RemoteProtocolError, words)


@pytest.mark.parametrize("tickets", [[(1, b"t")], [(0, b"t"), (0, b"u")], [(0, b"t"), (1, b"t")]])
def test_tickets_come_in_order_and_never_twice(tickets: list[tuple[int, bytes]]) -> None:
    near, far = connector(), acceptor()
    pump_until_welcome(near, far)
    for lane, nonce in tickets:
        near.receive_data(encode(DataTicket(lane, nonce * 16)))
    ends_with(near, RemoteProtocolError, "a ticket for data connection")


def pump_until_welcome(near: Connector, far: Acceptor) -> None:
    far.receive_data(near.data_to_send())
    assert far.next_event() is None
    near.receive_data(far.data_to_send())
    assert near.next_event() is None
    far.receive_data(near.data_to_send())
    assert far.next_event() is None
    near.receive_data(encode(frames_in(far.data_to_send(), magic=False)[0]))
    assert near.next_event() is None


AWAITED = ["its hello", "its proof", "its data connections"]


def acceptor_awaiting(what: str) -> Acceptor:
    near, far = connector(), acceptor()
    if what != "its hello":
        far.receive_data(near.data_to_send())
        assert far.next_event() is None
    if what == "its data connections":
        pump(near, far)
    return far


def connector_awaiting(what: str) -> Connector:
    near, far = connector(), acceptor()
    if what == "its welcome":
        far.receive_data(near.data_to_send())
        assert far.next_event() is None
        near.receive_data(far.data_to_send())
        assert near.next_event() is None
    elif what == "its data tickets":
        pump_until_welcome(near, far)
    return near


@pytest.mark.parametrize("what", AWAITED)
def test_an_acceptor_waits_for_each_step_no_longer_than_its_deadline(what: str) -> None:
    far = acceptor_awaiting(what)
    assert far.deadline() == 5.0
    far.tick(4.9)
    assert far.next_event() is None
    far.tick(5.0)
    ends_with(far, Timeout, f"the peer took over 5 s to send {what}")


@pytest.mark.parametrize("what", ["its challenge", "its welcome", "its data tickets"])
def test_a_connector_waits_for_each_step_no_longer_than_its_deadline(what: str) -> None:
    near = connector_awaiting(what)
    assert near.deadline() == 5.0
    near.tick(5.0)
    ends_with(near, Timeout, f"the peer took over 5 s to send {what}")


@pytest.mark.parametrize("what", AWAITED)
def test_a_connector_that_is_gone_is_told_by_what_it_did_not_send(what: str) -> None:
    far = acceptor_awaiting(what)
    far.control_ended()
    ends_with(far, ConnectionResetError, f"instead of sending {what}")


@pytest.mark.parametrize("what", ["its challenge", "its welcome", "its data tickets"])
def test_an_acceptor_that_is_gone_is_told_by_what_it_did_not_send(what: str) -> None:
    near = connector_awaiting(what)
    near.control_ended()
    ends_with(near, ConnectionResetError, f"instead of sending {what}")


def test_a_refusal_before_the_end_is_what_is_told() -> None:
    near = connector()
    near.receive_data(CONTROL_MAGIC + encode(Refusal("busy", "no room")))
    near.control_ended()
    ends_with(near, RemoteProtocolError, "no room")


def test_an_acceptor_may_refuse_for_reasons_of_its_own() -> None:
    near, far = connector(), acceptor()
    far.refuse("busy", "64 sessions are enough\x1b")
    near.receive_data(far.data_to_send())
    ends_with(far, ClosedError, "this side refused the session")
    ends_with(near, RemoteProtocolError, r"the peer refused the session: 64 sessions are enough\?")


def test_what_follows_the_handshake_is_kept_for_the_session_up_to_a_limit() -> None:
    _, far, ours = opened()
    far.receive_data(encode(Goodbye()))
    assert far.next_event() is None
    for preamble in ours.preambles:
        far.admit(read_preamble(preamble))
    assert far.next_event() is not None
    assert far.take_rest() == encode(Goodbye())
    assert far.take_rest() == b""


def test_a_peer_that_talks_and_does_not_connect_is_cut_off() -> None:
    _, far, _ = opened()
    far.receive_data(bytes(2 * MAX_FRAME))
    assert far.next_event() is None
    far.receive_data(b"x")
    ends_with(far, RemoteProtocolError, "sends frames, and not its data connections")


@pytest.mark.parametrize("stray", [b"GET / HTTP/1.1\r\n\r\n", b"\x00", CONTROL_MAGIC + b"\xff\xff\xff\xff"])
def test_a_stray_connection_is_dropped_at_its_first_bytes(stray: bytes) -> None:
    far = acceptor()
    far.receive_data(stray)
    with pytest.raises(RemoteProtocolError):
        far.next_event()
    assert far.state is HandshakeState.FAILED
