"""Hostile networks and peers for the handshake: who lacks the key gets nowhere, whatever is said to whom.

Two honest ends talk over a network that belongs to somebody else. An input moves bytes, changes, cuts, repeats, swaps
or replays them, lets other ends with other keys in, throws frames that are right in form alone, forges or reuses
preambles, or lets time pass. What must hold:
  - no exception but the documented ones, and these are final; no deadline passes without an end;
  - an acceptor lets in, and a connector trusts, only who has the key, heard all that it said and said all that it
    heard; each data connection is one that such a connector made, and comes once;
  - two ends that nobody disturbed agree on the same thing, or are refused for a reason that is there;
  - what an end keeps of what it was sent is bounded, and so is what it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import msgspec

from choices import Choices
from devmem_tcp.errors import AuthenticationFailed, ClosedError, RemoteProtocolError, Timeout
from devmem_tcp.sansio.frames import (
    CONTROL_MAGIC,
    MAX_FRAME,
    MAX_HANDSHAKE_FRAME,
    Challenge,
    Limits,
    Proof,
    Role,
    Welcome,
    encode,
)
from devmem_tcp.sansio.handshake import (
    PREAMBLE_BYTES,
    Acceptor,
    Agreed,
    Connector,
    HandshakeState,
    Terms,
    read_preamble,
)
from frame_maker import HANDSHAKE_FRAMES, SESSION_FRAMES, Cutter, FrameMaker, damage
from fuzz_judge import run_case

TIMEOUT_S: Final = 5.0
KEY: Final = b"known to both ends"
KEYS: Final = (KEY, KEY, KEY, None, b"of somebody else", bytes(16))  # zeros stand in for no key, in what is computed
MAX_EARLY: Final = 2 * MAX_FRAME  # bytes of session frames that may wait for the data connections
MAX_SAID: Final = 1 << 14  # bytes of all that one end says: two hellos, two proofs, 64 tickets
_LIVE_LINKS: Final = 3
_TRUSTING: Final = frozenset({HandshakeState.AWAITS_TICKETS, HandshakeState.AWAITS_LANES, HandshakeState.AGREED})
_DOCUMENTED: Final = (RemoteProtocolError, Timeout, ConnectionResetError, ClosedError)


class End:
    """One end, used as a driver uses it, with all that it heard and said."""

    def __init__(self, machine: Connector | Acceptor, terms: Terms) -> None:
        self.machine = machine
        self.terms = terms
        self.queue = bytearray()  #: on its way to this end
        self.heard: list[bytes] = []  #: bodies, the first ones
        self.said: list[bytes] = []
        self.agreed: Agreed | None = None
        self.failure: tuple[type[Exception], str] | None = None
        self.peer: End | None = None  #: whom it trusts
        self.admitted: set[bytes] = set()
        self.began = False  #: heard anything
        self._heard, self._said = Stream(), Stream()
        self._said_bytes = 0

    @property
    def key(self) -> bytes:
        return self.terms.key or bytes(16)

    def pull(self) -> tuple[bytes, list[bytes]]:
        """Return what this end says now, and the bodies of that."""
        data = self.machine.data_to_send()
        self._said_bytes += len(data)
        assert self._said_bytes <= MAX_SAID, "an end says more than belongs to a handshake"
        bodies = self._said.bodies(data)
        self.said += bodies
        return data, bodies

    def hear(self, data: bytes) -> None:
        """Let this end hear bytes, and judge what it makes of them."""
        if len(self.heard) < 2:  # no more count in the judgement, and so many bytes hold two
            self.heard += self._heard.bodies(data[: 3 * MAX_HANDSHAKE_FRAME])
        self.machine.receive_data(data)
        self.began |= bool(data)
        self.ask()

    def ask(self) -> None:
        """Ask for an event, and judge the answer."""
        for _ in range(2):  # what was said is not said again, but for an error
            try:
                agreed = self.machine.next_event()
            except _DOCUMENTED as error:
                self._judge_failure(error)
            else:
                assert self.failure is None, f"an error was not final: {self.failure}"
                assert agreed is None or self.agreed is None, "an agreement was told twice"
                self.agreed = agreed or self.agreed
        pending = self.machine._decoder.pending_bytes
        if self.agreed is not None:
            self.machine.take_rest()
        elif self.machine.state is HandshakeState.AWAITS_LANES:
            assert pending <= MAX_EARLY, f"{pending} bytes are kept that no session may ever read"
        else:
            assert self.failure is not None or pending < 4 + MAX_HANDSHAKE_FRAME, f"{pending} bytes are kept"

    def _judge_failure(self, error: Exception) -> None:
        machine = self.machine
        assert machine.ending is not None
        assert type(error) is machine.ending.kind
        assert machine.state is HandshakeState.FAILED
        assert machine.deadline() is None
        assert self.agreed is None, "an agreement was taken back"
        assert self.failure in (None, (type(error), str(error))), "an error changed"
        self.failure = type(error), str(error)


class Stream:
    """The bodies in one direction of a control connection; of other connections nothing."""

    def __init__(self) -> None:
        self._magic = b""
        self._cutter = Cutter(MAX_HANDSHAKE_FRAME)

    def bodies(self, data: bytes) -> list[bytes]:
        """Take bytes; return the bodies that end in them."""
        missing = 4 - len(self._magic)
        self._magic += data[:missing]
        return [part.body for part in self._cutter.cut(data[missing:]) if part.body is not None]


class Link:
    """A connector and an acceptor that were to talk to each other."""

    def __init__(self, connector: End, acceptor: End) -> None:
        self.connector = connector
        self.acceptor = acceptor
        self.ends = (connector, acceptor)
        self.clean = True  #: nobody interfered

    def other(self, end: End) -> End:
        return self.acceptor if end is self.connector else self.connector


class HostileNetwork:
    """A network that does what its choices say."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.now = 0.0
        self.links: list[Link] = []
        self.connectors: list[End] = []
        self.acceptors: list[End] = []
        self.seen: list[bytes] = []  # bodies
        self.blobs: list[bytes] = []  # nonces, proofs, tickets
        self.preambles: list[bytes] = []
        self.tally: Counter[str] = Counter()
        self.open()

    def step(self) -> None:
        """Throw one input."""
        self.choices.one_of(_INPUTS)(self)

    def finish(self) -> None:
        """Let those agree whom nobody disturbed, and two fresh ends."""
        self.open()
        for link in self.links:
            if link.clean:
                self.complete(link)

    def count(self, tally: Counter[str]) -> None:
        ends = [*self.connectors, *self.acceptors]
        tally.update(self.tally)
        tally["ends"] += len(ends)
        tally["trusting"] += sum(end.peer is not None for end in ends)
        tally["agreed"] += sum(end.agreed is not None for end in ends)
        for end in ends:
            if end.failure is not None:
                tally[f"failed by {end.failure[0].__name__}"] += 1

    def close(self) -> None:
        """Nothing is held that must be let go."""

    # --- what a driver and a network do ---

    def open(self) -> None:
        """Let a connector and an acceptor begin, mostly such that suit each other."""
        choices = self.choices
        role = choices.one_of((Role.SENDER, Role.RECEIVER))
        key = choices.one_of(KEYS)
        suits = not choices.once_in(4)
        near = self.terms(role, key)
        if key is None and not near.peer_is_local:
            near = replace(near, insecure=True)  # a connector says so before anything else
        far = self.terms(role.other if suits else choices.one_of(tuple(Role)), key if suits else choices.one_of(KEYS))
        number = len(self.connectors).to_bytes(4)
        nonces = number + b"c" * 28, number + b"a" * 28
        connector = Connector(near, nonce=nonces[0], now=self.now, timeout_s=TIMEOUT_S)
        port = choices.one_of((0, 5201, 0xFFFF))
        acceptor = Acceptor(
            far, nonce=nonces[1], secret=number + b"s" * 28, now=self.now, data_port=port, timeout_s=TIMEOUT_S
        )
        link = Link(End(connector, near), End(acceptor, far))
        self.connectors.append(link.connector)
        self.acceptors.append(link.acceptor)
        self.links = [*self.links[1 - _LIVE_LINKS :], link]
        for end in link.ends:
            self.carry(link, end)

    def terms(self, role: Role, key: bytes | None) -> Terms:
        choices = self.choices
        lowest = choices.one_of((1, 1, 1, 0, 2))
        local = choices.once_in(2)
        return Terms(
            role,
            choices.one_of(("software", "kernel")),
            Limits(choices.one_of((2, 1, 3, 64)), choices.one_of((1 << 20, 0)), choices.one_of((100, 0))),
            frozenset(("xxh3", "crc32c", "zstd")[: choices.integer(0, 3)]),
            key,
            peer_is_local=local,
            insecure=choices.once_in(2),
            lowest_version=lowest,
            highest_version=lowest + choices.one_of((0, 1, 2)),
        )

    def carry(self, link: Link, end: End) -> None:
        """Put what an end says on its way to the other, and judge whom it trusts by now."""
        data, bodies = end.pull()
        link.other(end).queue += data
        for body in bodies:
            self.seen.append(body)
            self.blobs.extend(list(byte_strings(msgspec.msgpack.decode(body)))[:3])  # of 64 tickets not all
        del self.seen[:-32], self.blobs[:-32]
        if end.peer is None and end.machine.state in _TRUSTING:
            self.judge_trust(end)
        if end.agreed is not None:
            self.judge_agreement(end)

    def deliver(self, link: Link, end: End, nbytes: int) -> None:
        """Let an end hear the next bytes that are on their way to it."""
        data = bytes(end.queue[:nbytes])
        del end.queue[:nbytes]
        end.hear(data)
        self.carry(link, end)

    def play(self, link: Link, nbytes: int = 1 << 20) -> None:
        """Deliver all that is on its way between two ends, and what they say to that."""
        while link.acceptor.queue or link.connector.queue:
            for end in link.ends:
                self.deliver(link, end, nbytes)

    def admit(self, link: Link, preamble: bytes) -> bool:
        """Let a data connection come to an acceptor, and judge whether it was let in."""
        end, machine = link.acceptor, link.acceptor.machine
        assert isinstance(machine, Acceptor)
        try:
            read = read_preamble(preamble)
        except RemoteProtocolError:
            assert len(preamble) != PREAMBLE_BYTES or not preamble.startswith(b"dmtD")
            return False
        before = machine.state
        try:
            lane = machine.admit(read)
        except AuthenticationFailed:
            assert machine.state is before, "a wrong preamble cost more than its own connection"
            self.tally["preambles refused"] += 1
            return False
        self.tally["preambles admitted"] += 1
        assert preamble not in end.admitted, "a ticket admitted twice"
        end.admitted.add(preamble)
        assert before is HandshakeState.AWAITS_LANES
        assert end.peer is not None
        assert end.peer.agreed is not None, "a data connection came of a connector that had made none"
        assert end.peer.agreed.preambles[lane] == preamble, "a data connection came of somebody else"
        end.ask()
        self.carry(link, end)
        return True

    # --- judgement ---

    def judge_trust(self, end: End) -> None:
        """Check that an end that goes on has a peer that has its key, and heard all it said, word by word."""
        accepts = isinstance(end.machine, Acceptor)
        others = self.connectors if accepts else self.acceptors
        peers = [
            other
            for other in others
            if other.key == end.key and other.said[:1] == end.heard[:1] and other.heard[:1] == end.said[:1]
        ]
        assert len(peers) == 1, "somebody was let in who has not the key, or did not say or hear what counts"
        (peer,) = peers
        proofs = [msgspec.msgpack.decode(body) for body in (*peer.said[1:2], end.heard[1])]
        assert len(proofs) == 2, "nobody made the proof that was taken"
        assert proofs[0] == proofs[1], "a proof is not the one that was made"
        assert peer.terms.role is end.terms.role.other
        assert (peer.terms.key is None) == (end.terms.key is None)
        if end.terms.key is None:
            assert end.terms.peer_is_local or end.terms.insecure, "no key, and a peer that is anywhere"
        end.peer = peer

    def judge_agreement(self, end: End) -> None:
        """Check what an end agreed to: the most that both can do."""
        agreed, peer = end.agreed, end.peer
        assert agreed is not None
        assert peer is not None, "an agreement with nobody"
        ours, theirs = end.terms, peer.terms
        version = min(ours.highest_version, theirs.highest_version)
        assert (agreed.version, agreed.role, agreed.peer_backend) == (version, ours.role, theirs.backend)
        assert agreed.limits == Limits(*map(min, zip(items(ours.limits), items(theirs.limits), strict=True)))
        assert (agreed.features, agreed.keyed) == (ours.features & theirs.features, ours.key is not None)
        if isinstance(end.machine, Acceptor):
            assert len(end.admitted) == agreed.limits.lanes, "an agreement before all data connections were there"
        if peer.agreed is not None:
            assert agreed.session_id == peer.agreed.session_id
            assert agreed.data_port == peer.agreed.data_port

    def complete(self, link: Link) -> None:
        """Let two ends that nobody disturbed come to their end: an agreement if they suit each other."""
        self.play(link, self.choices.one_of((1 << 20, 1, 7)))
        near, far = link.connector, link.acceptor
        ours, theirs = near.terms, far.terms
        lowest = max(ours.lowest_version, theirs.lowest_version)
        suits = lowest <= min(ours.highest_version, theirs.highest_version)
        suits &= (ours.role is theirs.role.other) and ours.key == theirs.key
        suits &= theirs.key is not None or theirs.peer_is_local or theirs.insecure
        assert suits == (near.agreed is not None), f"{ours} and {theirs}: {near.failure}, {far.failure}"
        if near.agreed is None:
            assert near.failure is not None
            assert far.failure is not None, "one side alone knows that there is no session"
            return
        preambles = [one for one in near.agreed.preambles if one not in far.admitted]
        for preamble in reversed(preambles) if self.choices.once_in(2) else preambles:
            assert self.admit(link, preamble), "an honest data connection was refused"
        assert far.agreed is not None
        self.tally["agreed undisturbed"] += 1

    # --- inputs ---

    def link(self, *, disturb: bool = True) -> Link:
        link = self.links[-1 - self.choices.integer(0, len(self.links) - 1)]
        link.clean &= not disturb
        return link

    def end(self, *, disturb: bool = True) -> tuple[Link, End]:
        link = self.link(disturb=disturb)
        return link, self.choices.one_of(link.ends)

    def move(self) -> None:
        self.deliver(*self.end(disturb=False), self.choices.one_of((1 << 20, 1, 7, self.choices.integer(0, 300))))

    def play_on(self) -> None:
        self.play(self.link(disturb=False))

    def corrupt(self) -> None:
        damage(self.choices, self.end()[1].queue)

    def throw_frame(self) -> None:
        """Put a frame on its way, before or behind what is: one that was seen, or is made for the occasion."""
        choices = self.choices
        end = self.end()[1]
        kinds = SESSION_FRAMES if choices.once_in(8) else HANDSHAKE_FRAMES
        maker = FrameMaker(choices, (1, 2, 0, 64), self.blobs)
        if choices.once_in(2):
            body = choices.one_of(self.seen)
            data = len(body).to_bytes(4) + body
        else:
            data = maker.wire(kinds)
        if choices.once_in(2):
            end.queue += data
        else:
            at = 4 if end.queue.startswith(b"dmtC") else 0
            end.queue[at:at] = data

    def rewrite(self) -> None:
        """Change one item of a frame that is on its way, and nothing else."""
        choices = self.choices
        end = self.end()[1]
        at = 4 if end.queue.startswith(b"dmtC") else 0
        length = int.from_bytes(end.queue[at : at + 4])
        body = bytes(end.queue[at + 4 : at + 4 + length])
        try:
            items = msgspec.msgpack.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return
        places = lists_in(items)
        if not places:
            return
        where, index = choices.one_of(places)
        value = where[index]
        maker = FrameMaker(choices, (1, 2, 0, 64), self.blobs)
        if isinstance(value, bool):
            where[index] = not value
        elif isinstance(value, int):
            where[index] = choices.one_of((min(value + 1, (1 << 64) - 1), max(value - 1, 0), 0, 3))
        elif isinstance(value, bytes):
            where[index] = choices.one_of(self.seen_of(len(value)) or [value])
        elif value in ("sender", "receiver"):
            where[index] = "receiver" if value == "sender" else "sender"
        else:
            where[index] = maker.value()
        body = msgspec.msgpack.encode(items)
        end.queue[at : at + 4 + length] = len(body).to_bytes(4) + body

    def pretend(self) -> None:
        """Talk to an end as one would who has all but the key, and proofs that were seen, its own among them."""
        link, end = self.end()
        end.queue.clear()
        self.tell(link, end, b"" if end.began else CONTROL_MAGIC)
        ours, nonce = end.terms, self.choices.one_of((b"n" * 32, *self.seen_of(32)))
        hello = replace(ours, role=ours.role.other).hello(nonce)
        if isinstance(end.machine, Acceptor):
            self.tell(link, end, encode(hello))
            self.tell(link, end, encode(Proof(self.choices.one_of((*self.seen_of(32)[::-1], nonce)))))
        else:
            self.tell(link, end, encode(Challenge(ours.highest_version, hello)))
            proof = self.choices.one_of((*self.seen_of(32)[::-1], nonce))
            self.tell(link, end, encode(Welcome(proof, self.choices.one_of((bytes(8), *self.seen_of(8))), 0)))

    def tell(self, link: Link, end: End, data: bytes) -> None:
        end.hear(data)
        self.carry(link, end)

    def seen_of(self, size: int) -> list[bytes]:
        """Return what was seen of a size, the last of it last."""
        return [blob for blob in self.blobs if len(blob) == size]

    def divert(self) -> None:
        """Let an end hear what is on its way to another, or to its own peer: replayed, reflected, or swapped."""
        _, source = self.end()
        _, target = self.end()
        data = bytes(source.queue)
        if self.choices.once_in(2):
            target.queue[:] = data
        else:
            target.queue += data.removeprefix(b"dmtC")

    def join(self) -> None:
        """Let a data connection come: the next honest one, one that was used, of elsewhere, or a forged one."""
        choices = self.choices
        link = self.link(disturb=False)
        made = link.connector.agreed.preambles if link.connector.agreed is not None else ()
        self.preambles.extend(made)
        del self.preambles[:-200]
        kind = choices.integer(0, 7)
        known = [*made, *self.preambles] if kind > 4 else [one for one in made if one not in link.acceptor.admitted]
        preamble = bytearray(choices.one_of(known) if known else b"dmtD" + choices.data(60))
        if kind == 7:
            damage(choices, preamble)
        if self.admit(link, bytes(preamble)):
            self.preambles.append(bytes(preamble))
        if known and kind == 6 and choices.once_in(2):
            self.admit(link, bytes(preamble))

    def flood(self) -> None:
        """Send much that is well-formed, or begins to be."""
        link, end = self.end()
        frame = FrameMaker(self.choices, (1, 2), self.blobs).wire(SESSION_FRAMES)
        end.queue += self.choices.one_of((b"\0\0\x0f\xff" + bytes(4094), frame * (1 + 200_000 // len(frame))))
        self.deliver(link, end, 1 << 20)

    def pass_time(self) -> None:
        """Let time pass, for all."""
        self.now += self.choices.one_of((0.1, 0.0, TIMEOUT_S - 0.2, 2 * TIMEOUT_S))
        for link in self.links:
            for end in link.ends:
                due = end.machine.deadline()
                end.machine.tick(self.now)
                end.ask()
                if due is not None and self.now >= due:
                    assert end.failure is not None, "a deadline passed, and nothing came of it"
                    assert end.failure[0] is Timeout
                    link.clean = False
                self.carry(link, end)

    def cut_off(self) -> None:
        """End a control connection."""
        link, end = self.end()
        end.machine.control_ended()
        end.ask()
        assert end.failure is not None or end.agreed is not None, "an end waits for a peer that is gone"
        self.carry(link, end)

    def refuse(self) -> None:
        link = self.link()
        machine = link.acceptor.machine
        assert isinstance(machine, Acceptor)
        if machine.deadline() is not None:
            machine.refuse("busy", "no room\n")
            link.acceptor.ask()
            assert link.acceptor.failure is not None
            self.carry(link, link.acceptor)


def items(limits: Limits) -> tuple[int, int, int]:
    return limits.lanes, limits.message_bytes, limits.metadata_bytes


def byte_strings(value: object) -> Iterator[bytes]:
    """Return the byte strings in a decoded body."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from byte_strings(item)


def lists_in(value: object) -> list[tuple[list[object], int]]:
    """Return each place in a decoded body, but for its tag, as a list and an index."""
    if not isinstance(value, list):
        return []
    places: list[tuple[list[object], int]] = []
    for index, item in enumerate(value):
        places += lists_in(item) if isinstance(item, list) else [(value, index)]
    return places


_INPUTS: Final[tuple[Callable[[HostileNetwork], None], ...]] = (
    *(HostileNetwork.move,) * 10,
    *(HostileNetwork.play_on,) * 6,
    *(HostileNetwork.join,) * 10,
    *(HostileNetwork.throw_frame,) * 6,
    *(HostileNetwork.open, HostileNetwork.rewrite) * 4,
    *(HostileNetwork.corrupt, HostileNetwork.divert, HostileNetwork.pretend, HostileNetwork.pass_time) * 2,
    *(HostileNetwork.flood, HostileNetwork.cut_off, HostileNetwork.refuse),
)


def run(case: bytes, tally: Counter[str]) -> None:
    """Run one case; see ``run_case``."""
    run_case(HostileNetwork, case, tally)
