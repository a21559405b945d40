"""A peer is killed at any step of the protocol: the survivor says so in time, and others do not notice."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from devmem_tcp import SoftwareOptions
from devmem_tcp.errors import Timeout
from devmem_tcp.transport import Sender
from fault_ends import LOOPBACK, MIB, Nursery, Survivor, bytes_of, notes_of, nursery, same, sending, surviving
from fault_peer import OPTIONS, PIECE, pattern

HOSTILE = SoftwareOptions(rx_queues=4, hostile_seed=3)


@pytest.fixture(scope="module")
def peers() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


def connector_steps(role: str) -> list[tuple[str, int]]:
    shake = ["connected", "hello said", "challenge read", "proof said", "welcome read", "preamble half said"]
    sender = ["session open", "message announced", "half a piece sent", "message sent"]
    sender += ["message confirmed", "in a series", "goodbye said"]
    return [(step, lanes) for lanes in (1, 3) for step in shake + sender] + [("some lanes connected", 3)]


IN_HANDSHAKE = {
    "connected": "instead of sending its hello",
    "hello said": "instead of sending its (proof|data connections)|control connection",
    "challenge read": "instead of sending its proof",
    "proof said": "instead of sending its data connections",
    "welcome read": "instead of sending its data connections",
    "some lanes connected": "instead of sending its data connections|of no session that is being agreed on",
    "preamble half said": "instead of sending its data connections|ended before it said whose it is"
    "|of no session that is being agreed on",
}


@pytest.mark.parametrize(("step", "lanes"), connector_steps("sender"))
def test_a_sender_killed_at_any_step_harms_nobody_else(peers: Nursery, step: str, lanes: int) -> None:
    with surviving(max_peers=3, lanes=lanes) as end:
        address = end.receiver.address
        with peers.peer("honest_sender", address=address, lanes=lanes, seeds=[10, 11, 12]) as other:
            other.go()
            end.drive(lambda: end.names == ["honest 10"], other)
            other.go()  # on its way while the victim dies
            with peers.peer("dying_connector", role="sender", address=address, lanes=lanes, step=step) as victim:
                assert end.drive_until_said(victim) == step
                assert victim.hear() is None
                judge_death(end, step)
            other.go()
            end.drive(lambda: not end.receiver.peers, other)
            assert other.hear() == "done"
        with peers.peer("honest_sender", address=address, lanes=lanes, seeds=[30]) as later:
            later.go()
            end.drive(lambda: "honest 30" in end.names and not end.receiver.peers, later)
        assert sorted(name for name in end.names if name.startswith("honest")) == [
            "honest 10",
            "honest 11",
            "honest 12",
            "honest 30",
        ]
        judge_messages(end)


def judge_death(end: Survivor, step: str) -> None:
    """See that the receiver says who ended what, and drops it."""
    if step in IN_HANDSHAKE:
        end.drive(lambda: end.receiver.refused > 0)
        assert re.search(IN_HANDSHAKE[step], end.receiver.last_refusal)
        return
    after_goodbye = step == "goodbye said"
    end.drive(lambda: bool(end.errors) or (after_goodbye and end.names.count("of a series") == 2))
    for error in end.errors:
        assert isinstance(error, ConnectionResetError)
        said = "after its goodbye, before all was settled" if after_goodbye else "without a goodbye"
        assert f"the peer ended the control connection {said}" in str(error)
        assert "messages were under way" in str(error)
        assert "the session with the sender at 127.0.0.1:" in notes_of(error)


def judge_messages(end: Survivor) -> None:
    """See that whatever was received is what was sent."""
    series = [pattern(1, PIECE), pattern(2, PIECE)]
    for name, data in end.messages:
        if name.startswith("honest"):
            assert same(data, pattern(int(name.split()[1])))
        elif name == "whole":
            assert same(data, pattern(0))
        else:
            assert same(data, series.pop(0))


# --- the receiver is killed ----------------------------------------------------------------------------------------


def acceptor_steps() -> list[tuple[str, int]]:
    shake = ["connected", "hello read", "challenge said", "proof read", "welcome said", "session open"]
    receiver = ["credit said", "announcement read", "half a piece read", "message read", "in a series", "goodbye read"]
    return [(step, lanes) for lanes in (1, 3) for step in shake + receiver] + [("some lanes connected", 3)]


GONE_IN_HANDSHAKE = {
    "connected": "the peer ended the control connection instead of sending its challenge",
    "hello read": "the peer ended the control connection instead of sending its challenge",
    "challenge said": "the peer ended the control connection instead of sending its welcome",
    "proof read": "the peer ended the control connection instead of sending its welcome",
}


def see_through(sender: Sender, *, closing: bool = True) -> None:
    """Do what goes through with a receiver that lives."""
    sender.send(pattern(0), name="whole", confirm=True).wait_delivered(10.0)
    with sender.series((PIECE,), "uint8", "of a series") as series, sender.reserve((PIECE,), "uint8") as slot:
        for seed in (1, 2):
            slot.numpy()[:] = pattern(seed, PIECE)
            series.send(slot, 10.0).wait(10.0)
    if closing:
        sender.close()
    else:
        sender.send(b"", confirm=True).wait_delivered(10.0)


@pytest.mark.parametrize(("step", "lanes"), acceptor_steps())
def test_a_sender_outlives_a_receiver_killed_at_any_step(peers: Nursery, step: str, lanes: int) -> None:
    with peers.peer("dying_acceptor", role="receiver", lanes=lanes, step=step) as victim:
        port = victim.hear()
        with pytest.raises(ConnectionError) as caught, sending(to=("127.0.0.1", port), lanes=lanes) as sender:
            see_through(sender)
        assert victim.hear() == step
        assert victim.hear() is None
    said = str(caught.value)
    if step in GONE_IN_HANDSHAKE:
        assert said == GONE_IN_HANDSHAKE[step]
    elif step in ("welcome said", "some lanes connected"):  # it may be gone before all lanes are tried, or after
        assert re.search(rf"{LANE_REFUSED}|{LOST}", said)
    else:
        assert re.search(LOST, said)
        assert f"the session with the receiver at 127.0.0.1:{port}" in notes_of(caught.value)


LANE_REFUSED = r"(connect|send to) 127\.0\.0\.1:\d+: (Connection refused|Connection reset by peer|Broken pipe)"
LOST = r"the peer ended the control connection without a goodbye: \d of \d messages are known to have arrived"


# --- the end that listens is a sender ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["announcement read", "half a piece read", "in a series"])
def test_a_listening_sender_outlives_its_receiver_and_takes_the_next(peers: Nursery, step: str) -> None:
    with sending(to=None, listen=LOOPBACK, lanes=3) as sender:
        for _ in range(2):
            with peers.peer("dying_connector", role="receiver", address=sender.address, lanes=3, step=step) as victim:
                sender.wait_connected(5.0)
                with pytest.raises(ConnectionResetError, match=LOST):
                    see_through(sender, closing=False)
                assert victim.hear() == step
                assert victim.hear() is None


@pytest.mark.parametrize("step", ["hello said", "proof said", "preamble half said"])
def test_a_listening_sender_takes_a_receiver_after_one_that_died_on_the_way(peers: Nursery, step: str) -> None:
    with sending(to=None, listen=LOOPBACK) as sender:
        arguments = {"role": "receiver", "address": sender.address, "lanes": 1}
        with peers.peer("dying_connector", step=step, **arguments) as victim:
            with pytest.raises(Timeout, match="no session"):
                sender.wait_connected(0.5)
            assert victim.hear() == step
        with peers.peer("dying_connector", step="announcement read", **arguments) as later:
            sender.wait_connected(5.0)
            sender.send(pattern(0), timeout_s=5.0)
            assert later.hear() == "announcement read"


def meet_error(end: Survivor) -> None:
    """Raise the first thing that a receiver says went wrong."""
    end.drive(lambda: bool(end.errors))
    raise end.errors[0]


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("hello read", "instead of sending its challenge"),
        ("proof read", "instead of sending its welcome"),
        ("session open", "the peer ended the control connection without a goodbye: 0 messages were under way"),
        ("half a piece sent", "the peer ended the control connection without a goodbye: 1 messages were under way"),
        ("in a series", "the peer ended the control connection without a goodbye: [12] messages were under way"),
    ],
)
def test_a_receiver_that_goes_to_a_sender_outlives_it(peers: Nursery, step: str, error: str) -> None:
    with peers.peer("dying_acceptor", role="sender", lanes=3, step=step) as victim:
        address = ("127.0.0.1", victim.hear())
        with pytest.raises(ConnectionResetError, match=error), surviving(listen=None, to=address, lanes=3) as end:
            meet_error(end)
        assert victim.hear() == step
        assert victim.hear() is None


@pytest.mark.parametrize("placed", [True, False], ids=["in a place", "in frags"])
@pytest.mark.parametrize("software", [OPTIONS, HOSTILE], ids=["friendly", "hostile"])
def test_a_message_that_was_received_outlives_its_killed_sender(
    peers: Nursery, software: SoftwareOptions, placed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not placed:
        monkeypatch.setattr("devmem_tcp.transport.inbox.Share.take", lambda share, nbytes: None)
    with surviving(software, size=2 * MIB) as end:
        address = end.receiver.address
        with peers.peer("dying_connector", role="sender", address=address, lanes=1, step="message confirmed") as victim:
            held = end.receiver.receive(5.0)
            assert end.drive_until_said(victim) == "message confirmed"
            assert victim.hear() is None
        end.drive(lambda: bool(end.errors))
        with peers.peer("honest_sender", address=address, lanes=1, seeds=list(range(10, 18))) as later:
            for _ in range(8):
                later.go()
            end.drive(lambda: not end.receiver.peers and len(end.names) >= 8, later)
        with held:
            assert held.name == "whole"
            assert same(bytes_of(held), pattern(0))
