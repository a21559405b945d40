"""The start of a session: two ends agree on a version and limits, prove the key to each other, tie data connections.

Rules of the machine (C connects, A accepts; either may be the sender):

    C: Hello ──────────────►  A: AWAITS_HELLO     Refusal if version, role, key or place do not suit
    C: AWAITS_CHALLENGE ◄──── A: Challenge
    C: Proof ──────────────►  A: AWAITS_PROOF     Refusal if C does not know the key
    C: AWAITS_WELCOME ◄────── A: Welcome, DataTicket for each lane
    C: connects each lane, preamble first ──►  A: AWAITS_LANES
    C: AGREED                 A: AGREED once every lane is there

  - a proof is an HMAC-SHA256 over the prover's label and the transcript: both hellos as they went over the wire, with
    a fresh nonce from either end. So it cannot be replayed (nonces), reflected (labels, nonces that differ) or made
    for a weaker agreement (the hellos hold the versions, features and limits that were offered);
  - a session without a key is for peers on this machine, or for who writes ``insecure``;
  - a data connection starts with a preamble of PREAMBLE_BYTES: magic, version, lane, session id, ticket nonce, and a
    proof by a key of this session. Each ticket admits once. A wrong preamble costs its own connection, no session;
  - all of it has one deadline. An error is final. The nonces come from the driver, and must never be used twice.
"""

from __future__ import annotations

import hashlib
import hmac
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, NamedTuple, NoReturn

from devmem_tcp.errors import (
    AuthenticationFailed,
    ClosedError,
    DevmemError,
    LocalProtocolError,
    RemoteProtocolError,
    Timeout,
)
from devmem_tcp.sansio.endings import Ending, Party
from devmem_tcp.sansio.frames import (
    CONTROL_MAGIC,
    DATA_MAGIC,
    MAX_FRAME,
    NONCE_BYTES,
    PROOF_BYTES,
    SESSION_ID_BYTES,
    TICKET_BYTES,
    VERSION,
    Challenge,
    ChecksumKind,
    DataTicket,
    HandshakeFrame,
    Hello,
    Limits,
    Proof,
    Refusal,
    Role,
    Welcome,
    encode,
    handshake_decoder,
    printable,
)

MIN_KEY_BYTES: Final = 16
SECRET_BYTES: Final = 32
DEFAULT_TIMEOUT_S: Final = 10.0
PREAMBLE_BYTES: Final = 64

_MAX_EARLY: Final = 2 * MAX_FRAME  # bytes of session frames that may come before the last lane does
_LANE_AT: Final = len(DATA_MAGIC) + 2
_ID_AT: Final = _LANE_AT + 2
_NONCE_AT: Final = _ID_AT + SESSION_ID_BYTES
_PROOF_AT: Final = _NONCE_AT + TICKET_BYTES
assert _PROOF_AT + PROOF_BYTES == PREAMBLE_BYTES


class HandshakeState(Enum):
    """Where a handshake stands."""

    AWAITS_HELLO = auto()
    AWAITS_CHALLENGE = auto()
    AWAITS_PROOF = auto()
    AWAITS_WELCOME = auto()
    AWAITS_TICKETS = auto()
    AWAITS_LANES = auto()
    AGREED = auto()
    FAILED = auto()


_AWAITED: Final = {
    HandshakeState.AWAITS_HELLO: "its hello",
    HandshakeState.AWAITS_CHALLENGE: "its challenge",
    HandshakeState.AWAITS_PROOF: "its proof",
    HandshakeState.AWAITS_WELCOME: "its welcome",
    HandshakeState.AWAITS_TICKETS: "its data tickets",
    HandshakeState.AWAITS_LANES: "its data connections",
}
_READS: Final = _AWAITED.keys() - {HandshakeState.AWAITS_LANES}  # what comes after it is the session's to read


@dataclass(frozen=True)
class Terms:
    """What one end brings to a handshake.

    Args:
        role: which way messages go.
        backend: of this end's NIC, for the peer to report: ``kernel`` or ``software``.
        limits: what this end takes.
        features: what it can do, in the words of the session protocol; the common ones hold.
        key: shared with the peer, at least MIN_KEY_BYTES bytes that nobody can guess; None: no key.
        peer_is_local: whether the connection's other end is on this machine.
        insecure: whether to go without a key even if it is not.
    """

    role: Role
    backend: str
    limits: Limits = field(default_factory=Limits)
    features: frozenset[str] = frozenset()
    key: bytes | None = field(default=None, repr=False)
    peer_is_local: bool = False
    insecure: bool = False
    lowest_version: int = VERSION
    highest_version: int = VERSION

    def __post_init__(self) -> None:
        if self.key is not None and len(self.key) < MIN_KEY_BYTES:
            raise ValueError(f"a key of {len(self.key)} bytes is easily guessed: give at least {MIN_KEY_BYTES}, random")

    @property
    def may_go_without_key(self) -> bool:
        return self.peer_is_local or self.insecure

    def hello(self, nonce: bytes) -> Hello:
        return Hello(
            self.lowest_version,
            self.highest_version,
            self.role,
            self.backend,
            self.key is not None,
            nonce,
            self.limits,
            sorted(self.features),
        )


@dataclass(frozen=True)
class Agreed:
    """What both ends hold to for the rest of the session."""

    version: int
    role: Role
    peer_backend: str
    limits: Limits
    features: frozenset[str]
    keyed: bool
    session_id: bytes
    data_port: int  # 0: the TCP port of the control connection
    preambles: tuple[bytes, ...] = field(default=(), repr=False)  # the connector's, for lane 0, 1, …

    @property
    def checksums(self) -> frozenset[ChecksumKind]:
        """The kinds of checksum that both ends have."""
        return frozenset(kind for kind in ChecksumKind if kind.value in self.features)


class Preamble(NamedTuple):
    """What a data connection says of itself; nothing of it is proved until ``Acceptor.admit``."""

    version: int
    lane: int
    session_id: bytes
    nonce: bytes
    proof: bytes


def read_preamble(data: bytes | bytearray | memoryview) -> Preamble:
    """Read the PREAMBLE_BYTES that a data connection starts with; ``session_id`` says whose it claims to be.

    Raises:
        RemoteProtocolError: it is no preamble.
    """
    data = bytes(data)
    if len(data) != PREAMBLE_BYTES or not data.startswith(DATA_MAGIC):
        raise RemoteProtocolError(f"this is no data connection: it starts with {data[:8]!r}")
    return Preamble(
        int.from_bytes(data[len(DATA_MAGIC) : _LANE_AT]),
        int.from_bytes(data[_LANE_AT:_ID_AT]),
        data[_ID_AT:_NONCE_AT],
        data[_NONCE_AT:_PROOF_AT],
        data[_PROOF_AT:],
    )


class _Keys:
    """The keys of one session, drawn from the shared key and the transcript: one key, one use."""

    def __init__(self, key: bytes | None, hello_body: bytes, challenge_body: bytes) -> None:
        transcript = hashlib.sha256()
        for body in (hello_body, challenge_body):
            transcript.update(len(body).to_bytes(4) + body)
        self._session_key = _mac(key or bytes(MIN_KEY_BYTES), b"devmem-tcp session key", transcript.digest())

    def connector_proof(self) -> bytes:
        return _mac(self._session_key, b"connector knows the key")

    def acceptor_proof(self, session_id: bytes, data_port: int) -> bytes:
        return _mac(self._session_key, b"acceptor knows the key", session_id + data_port.to_bytes(2))

    def preamble(self, version: int, lane: int, session_id: bytes, nonce: bytes) -> bytes:
        said = DATA_MAGIC + version.to_bytes(2) + lane.to_bytes(2) + session_id + nonce
        return said + _mac(self._session_key, b"data connection", said)


def _mac(key: bytes, label: bytes, data: bytes = b"") -> bytes:
    return hmac.digest(key, len(label).to_bytes(1) + label + data, "sha256")


class Handshake(ABC):
    """What both ends share. Feed ``receive_data``, send ``data_to_send``, then ask ``next_event``."""

    def __init__(self, terms: Terms, nonce: bytes, now: float, timeout_s: float) -> None:
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} random bytes, not {len(nonce)}")
        self._terms = terms
        self._nonce = nonce
        self._timeout_s = timeout_s
        self._deadline = now + timeout_s
        self._decoder = handshake_decoder()
        self._outgoing = bytearray(CONTROL_MAGIC)
        self._ended = False
        self._told = False
        self._agreed: Agreed | None = None
        self.ending: Ending | None = None  #: how it failed, once it has
        self.state = HandshakeState.FAILED

    def deadline(self) -> float | None:
        """Return when to call ``tick``; None: never."""
        return self._deadline if self.state in _AWAITED else None

    def tick(self, now: float) -> None:
        """Let time pass; at the deadline the handshake fails with Timeout, as ``next_event`` then says."""
        if self.deadline() is not None and now >= self._deadline:
            words = f"the peer took over {round(self._timeout_s, 1):g} s to send {_AWAITED[self.state]}"
            self._fail(Ending(Party.NETWORK, Timeout, words))

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the control connection."""
        if self.ending is None:
            self._decoder.feed(data)

    def control_ended(self) -> None:
        """Note that the peer ended the control connection, or that it broke."""
        self._ended = True

    def data_to_send(self) -> bytes:
        """Return, and forget, what is to be sent by the control connection: also after an error, then close."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def next_event(self) -> Agreed | None:
        """Return the agreement, once; None: the peer is to say, or do, more.

        Raises:
            AuthenticationFailed: the peer does not know the key, or one side has none.
            RemoteProtocolError: the peer broke the protocol, or refused; the text has its words.
            ConnectionResetError: the peer ended the connection before the agreement.
            Timeout: the deadline passed.
        """
        while self.state in _READS:
            try:
                body = self._decoder.next_body()
                if body is None:
                    break
                self._take(self._decoder.decode(body), body)
            except DevmemError as error:
                self._fail(Ending(Party.PEER, type(error), error.message, error.hint))
        self._check_patience()
        if self.ending is not None:
            raise self.ending.error()
        if self._agreed is None or self._told:
            return None
        self._told = True
        return self._agreed

    def take_rest(self) -> bytes:
        """Return what the control connection brought after the handshake: the session's first bytes."""
        return self._decoder.take_rest()

    @abstractmethod
    def _take(self, frame: HandshakeFrame, body: bytes) -> None:
        """Act on a frame."""

    def _check_patience(self) -> None:
        """Fail if the peer ended the connection, or sends much before its data connections are there."""
        if self._ended and self.state in _AWAITED:
            words = f"the peer ended the control connection instead of sending {_AWAITED[self.state]}"
            self._fail(Ending(Party.PEER, ConnectionResetError, words))
        elif self.state is HandshakeState.AWAITS_LANES and self._decoder.pending_bytes > _MAX_EARLY:
            words = "the peer sends frames, and not its data connections"
            self._fail(Ending(Party.PEER, RemoteProtocolError, words))

    def _unexpected(self, frame: HandshakeFrame) -> NoReturn:
        raise RemoteProtocolError(f"the peer sent {type(frame).__name__} instead of {_AWAITED[self.state]}")

    def _send(self, frame: HandshakeFrame) -> bytes:
        """Send a frame; returns its body, for the transcript."""
        data = encode(frame)
        self._outgoing += data
        return data[4:]

    def _fail(self, ending: Ending) -> None:
        if self.ending is None:
            self.ending = ending
            self.state = HandshakeState.FAILED

    def _common(self, hello: Hello, other: Hello) -> int | None:
        """Return the highest version that both speak."""
        version = min(hello.highest_version, other.highest_version)
        return version if version >= max(hello.lowest_version, other.lowest_version) else None

    def _agree(self, version: int, peer: Hello, session_id: bytes, data_port: int, preambles: Sequence[bytes]) -> None:
        self._agreed = Agreed(
            version=version,
            role=self._terms.role,
            peer_backend=peer.backend,
            limits=self._terms.limits.shared_with(peer.limits),
            features=self._terms.features & frozenset(peer.features),
            keyed=self._terms.key is not None,
            session_id=session_id,
            data_port=data_port,
            preambles=tuple(preambles),
        )
        self.state = HandshakeState.AGREED


class Connector(Handshake):
    """The end that connects.

    Args:
        nonce: NONCE_BYTES random bytes, never used before.
        now: the driver's clock, in seconds.

    Raises:
        LocalProtocolError: no key, and the peer is not on this machine.
    """

    def __init__(self, terms: Terms, *, nonce: bytes, now: float, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(terms, nonce, now, timeout_s)
        if terms.key is None and not terms.may_go_without_key:
            raise LocalProtocolError(
                "the peer is on another machine, and no key is given: anybody could pretend to be it",
                hint="give both ends the same key=, or write insecure=True",
            )
        self._hello = terms.hello(nonce)
        self._hello_body = self._send(self._hello)
        self._tickets: list[DataTicket] = []
        self.state = HandshakeState.AWAITS_CHALLENGE

    def _take(self, frame: HandshakeFrame, body: bytes) -> None:
        match self.state, frame:
            case _, Refusal():
                kind = AuthenticationFailed if frame.cause == "key" else RemoteProtocolError
                raise kind(f"the peer refused the session: {frame.words}")
            case HandshakeState.AWAITS_CHALLENGE, Challenge():
                self._take_challenge(frame, body)
            case HandshakeState.AWAITS_WELCOME, Welcome():
                if not hmac.compare_digest(frame.mac, self._keys.acceptor_proof(frame.session_id, frame.data_port)):
                    raise AuthenticationFailed("the peer does not know the key", hint="give both ends the same key=")
                self._welcome = frame
                self.state = HandshakeState.AWAITS_TICKETS
            case HandshakeState.AWAITS_TICKETS, DataTicket():
                self._take_ticket(frame)
            case _:
                self._unexpected(frame)

    def _take_challenge(self, frame: Challenge, body: bytes) -> None:
        peer = frame.hello
        if frame.version != self._common(self._hello, peer):
            raise RemoteProtocolError(f"the peer chose version {frame.version}, which is not the highest common one")
        if peer.nonce == self._nonce:
            raise AuthenticationFailed("the peer sent this side's own nonce back")
        if peer.role is not self._terms.role.other:
            raise RemoteProtocolError(f"both ends are {peer.role.value}s")
        if peer.keyed is not self._hello.keyed:
            raise AuthenticationFailed(_one_key(peer.keyed), hint="give both ends the same key=")
        self._challenge = frame
        self._keys = _Keys(self._terms.key, self._hello_body, body)
        self._send(Proof(self._keys.connector_proof()))
        self.state = HandshakeState.AWAITS_WELCOME

    def _take_ticket(self, ticket: DataTicket) -> None:
        if ticket.lane != len(self._tickets) or any(ticket.nonce == other.nonce for other in self._tickets):
            raise RemoteProtocolError(f"a ticket for data connection {ticket.lane} in place of {len(self._tickets)}")
        self._tickets.append(ticket)
        version, peer, welcome = self._challenge.version, self._challenge.hello, self._welcome
        if len(self._tickets) == self._terms.limits.shared_with(peer.limits).lanes:
            preambles = [self._keys.preamble(version, t.lane, welcome.session_id, t.nonce) for t in self._tickets]
            self._agree(version, peer, welcome.session_id, welcome.data_port, preambles)


class Acceptor(Handshake):
    """The end that listens, for one control connection that came.

    Args:
        nonce: NONCE_BYTES random bytes, never used before; they are sent.
        secret: SECRET_BYTES more, never sent: session id and tickets are drawn from them.
        data_port: where data connections are to go; 0: where this one came.
        now: the driver's clock, in seconds.
    """

    def __init__(
        self,
        terms: Terms,
        *,
        nonce: bytes,
        secret: bytes,
        now: float,
        data_port: int = 0,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        super().__init__(terms, nonce, now, timeout_s)
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret has {SECRET_BYTES} random bytes, not {len(secret)}")
        self._secret = secret
        self._data_port = data_port
        self._joined: set[int] = set()
        self._lanes = 0
        self.session_id: Final = _mac(secret, b"session id")[:SESSION_ID_BYTES]
        self.state = HandshakeState.AWAITS_HELLO

    def refuse(self, cause: str, words: str) -> None:
        """Refuse the session, for instance because there is no room for another; send ``data_to_send`` and close."""
        self._send(Refusal(cause, printable(words)))
        self._fail(Ending(Party.HERE, ClosedError, f"this side refused the session: {words}"))

    def admit(self, preamble: Preamble) -> int:
        """Admit a data connection; returns its lane. An error is of that connection alone: this session goes on.

        Raises:
            AuthenticationFailed: it is not of this session, or its ticket was used.
        """
        lane = preamble.lane
        if self.state is HandshakeState.AWAITS_LANES and lane < self._lanes and lane not in self._joined:
            right = self._keys.preamble(self._challenge.version, lane, self.session_id, self._ticket(lane))
            if hmac.compare_digest(right, _written(preamble)):
                self._joined.add(lane)
                if len(self._joined) == self._lanes:
                    self._agree(self._challenge.version, self._peer, self.session_id, self._data_port, ())
                return lane
        raise AuthenticationFailed(f"a data connection that is not, or no longer, expected: it says lane {lane}")

    def _ticket(self, lane: int) -> bytes:
        return _mac(self._secret, b"ticket", lane.to_bytes(2))[:TICKET_BYTES]

    def _take(self, frame: HandshakeFrame, body: bytes) -> None:
        match self.state, frame:
            case HandshakeState.AWAITS_HELLO, Hello():
                self._take_hello(frame, body)
            case HandshakeState.AWAITS_PROOF, Proof():
                self._take_proof(frame)
            case _:
                self._unexpected(frame)

    def _take_hello(self, peer: Hello, body: bytes) -> None:
        terms = self._terms
        hello = terms.hello(self._nonce)
        version = self._common(hello, peer)
        if version is None:
            words = (
                f"no common version: this side speaks {hello.lowest_version} to {hello.highest_version}, the peer "
                f"{peer.lowest_version} to {peer.highest_version}"
            )
            self._reject(RemoteProtocolError, "version", words)
        if peer.role is not terms.role.other:
            self._reject(RemoteProtocolError, "role", f"both ends are {peer.role.value}s")
        if peer.nonce == self._nonce:
            self._reject(AuthenticationFailed, "key", "the peer sent this side's own nonce back")
        if peer.keyed is not hello.keyed:
            self._reject(AuthenticationFailed, "key", _one_key(peer.keyed))
        if not (hello.keyed or terms.may_go_without_key):
            words = "without a key only peers on the same machine are accepted, unless insecure=True is written"
            self._reject(AuthenticationFailed, "key", words)
        self._peer = peer
        self._challenge = Challenge(version, hello)
        self._keys = _Keys(terms.key, body, self._send(self._challenge))
        self.state = HandshakeState.AWAITS_PROOF

    def _take_proof(self, frame: Proof) -> None:
        if not hmac.compare_digest(frame.mac, self._keys.connector_proof()):
            self._reject(AuthenticationFailed, "key", "the connecting side does not know the key")
        mac = self._keys.acceptor_proof(self.session_id, self._data_port)
        self._send(Welcome(mac, self.session_id, self._data_port))
        self._lanes = self._terms.limits.shared_with(self._peer.limits).lanes
        for lane in range(self._lanes):
            self._send(DataTicket(lane, self._ticket(lane)))
        self.state = HandshakeState.AWAITS_LANES

    def _reject(self, kind: type[DevmemError], cause: str, words: str) -> NoReturn:
        self._send(Refusal(cause, printable(words)))
        raise kind(words, hint="give both ends the same key=" if cause == "key" else "")


def _one_key(peer_has_one: bool) -> str:
    return f"one end has a key and the other has none: the {'peer' if peer_has_one else 'other'} has one"


def _written(preamble: Preamble) -> bytes:
    version, lane, session_id, nonce, proof = preamble
    return DATA_MAGIC + version.to_bytes(2) + lane.to_bytes(2) + session_id + nonce + proof
