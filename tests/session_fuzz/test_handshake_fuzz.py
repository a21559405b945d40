"""Who lacks the key gets nowhere, whatever is said to whom; what must hold is said in ``handshake_fuzzer``."""

from __future__ import annotations

import hmac
import types
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given

import handshake_fuzzer
from devmem_tcp.sansio import frames, handshake
from devmem_tcp.sansio.frames import Hello
from devmem_tcp.sansio.handshake import Acceptor, Agreed, Handshake, HandshakeState, Preamble, Terms
from fuzz_engines import Session, cases, run_random

Patch = pytest.MonkeyPatch
Keys = handshake._Keys


@given(case=cases())
def test_no_network_lets_anybody_in(case: bytes) -> None:
    handshake_fuzzer.run(case, Counter())


def test_hostile_networks_are_hostile_and_get_far() -> None:
    session = Session(handshake_fuzzer.run, 5000)
    run_random(session, seed=0)
    tally = session.tally
    assert tally["trusting"] > 100
    assert tally["agreed"] > 50
    assert tally["preambles admitted"] > 50
    assert tally["preambles refused"] > 300
    assert tally["agreed undisturbed"] > 5
    for kind in ("RemoteProtocolError", "AuthenticationFailed", "Timeout", "ConnectionResetError", "ClosedError"):
        assert tally[f"failed by {kind}"] > 10


def take_any_proof(patch: Patch) -> None:
    patch.setattr(handshake, "hmac", types.SimpleNamespace(digest=hmac.digest, compare_digest=lambda right, said: True))


def let_a_ticket_admit_again(patch: Patch) -> None:
    honest = Acceptor.admit

    def careless(self: Acceptor, preamble: Preamble) -> int:
        lane = honest(self, preamble)
        if self.state is HandshakeState.AWAITS_LANES:
            self._joined.discard(lane)
        return lane

    patch.setattr(Acceptor, "admit", careless)


def take_any_length(patch: Patch) -> None:
    patch.setattr(
        handshake, "handshake_decoder", lambda: frames.FrameDecoder(frames._handshake_frames, 1 << 40, b"dmtC")
    )


def leave_the_hello_out_of_the_proof(patch: Patch) -> None:
    honest = Keys.__init__
    patch.setattr(Keys, "__init__", lambda self, key, hello, challenge: honest(self, key, b"", challenge))


def leave_the_challenge_out_of_the_proof(patch: Patch) -> None:
    honest = Keys.__init__
    patch.setattr(Keys, "__init__", lambda self, key, hello, challenge: honest(self, key, hello, b""))


def prove_the_same_at_both_ends(patch: Patch) -> None:
    patch.setattr(Keys, "acceptor_proof", lambda self, session_id, data_port: self.connector_proof())


def let_anybody_in_without_a_key(patch: Patch) -> None:
    patch.setattr(Terms, "may_go_without_key", True)


def go_without_the_key_if_the_peer_has_none(patch: Patch) -> None:
    honest = Acceptor._take_hello

    def careless(self: Acceptor, peer: Hello, body: bytes) -> None:
        if not peer.keyed:
            self._terms = Terms(self._terms.role, "software", self._terms.limits, peer_is_local=True)
        honest(self, peer, body)

    patch.setattr(Acceptor, "_take_hello", careless)


def wait_for_ever(patch: Patch) -> None:
    patch.setattr(Handshake, "tick", lambda self, now: None)


def keep_all_that_comes_early(patch: Patch) -> None:
    patch.setattr(handshake, "_MAX_EARLY", 1 << 40)


def choose_the_lowest_version(patch: Patch) -> None:
    def careless(self: Handshake, hello: Hello, other: Hello) -> int | None:
        version = max(hello.lowest_version, other.lowest_version)
        return version if version <= min(hello.highest_version, other.highest_version) else None

    patch.setattr(Handshake, "_common", careless)


def forget_an_error(patch: Patch) -> None:
    honest = Handshake.next_event

    def careless(self: Handshake) -> Agreed | None:
        try:
            return honest(self)
        except Exception:
            self.ending = None
            raise

    patch.setattr(Handshake, "next_event", careless)


def agree_at_the_first_data_connection(patch: Patch) -> None:
    honest = Acceptor.admit

    def careless(self: Acceptor, preamble: Preamble) -> int:
        lane = honest(self, preamble)
        if self.state is HandshakeState.AWAITS_LANES:
            self._agree(self._challenge.version, self._peer, self.session_id, self._data_port, ())
        return lane

    patch.setattr(Acceptor, "admit", careless)


@pytest.mark.parametrize(
    "plant",
    [
        take_any_proof,
        let_a_ticket_admit_again,
        take_any_length,
        leave_the_hello_out_of_the_proof,
        leave_the_challenge_out_of_the_proof,
        prove_the_same_at_both_ends,
        let_anybody_in_without_a_key,
        go_without_the_key_if_the_peer_has_none,
        wait_for_ever,
        keep_all_that_comes_early,
        choose_the_lowest_version,
        forget_an_error,
        agree_at_the_first_data_connection,
    ],
)
def test_planted_bugs_are_found(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run_random(Session(handshake_fuzzer.run, 30_000), seed=0)
