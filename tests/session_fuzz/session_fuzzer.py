"""A sender and a receiver with wires between them, and what programs, networks and enemies do to them.

A case is honest or hostile. In both an input is something that a program does (announce, cancel, decline, release,
close, …), or bytes that move, as many as the choices say, or time that passes. In a hostile case frames and bytes are
thrown between, changed, repeated and lost as well, and connections end. What must hold besides what ``judged_ends``
says of every end:
  - honest: nothing fails; every message that nobody took back or declined arrives, once, whole and in order; what is
    on the wires and held never exceeds the pool; when everything has moved nothing is left to move, and a message that
    is larger than the pool still passes; closing, by either side or both, closes both, and then nothing is an error;
  - hostile: what an end was told last ends it, or time does; then it says so to the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from choices import Choices
from devmem_tcp.errors import LocalProtocolError
from devmem_tcp.sansio.frames import (
    MAX_BODY,
    MAX_FRAME,
    MAX_MESSAGE,
    MAX_TOTAL,
    MIN_PIECE,
    Announce,
    ChecksumKind,
    Limits,
    Stripes,
    encode,
)
from devmem_tcp.sansio.receiving import ReceiverSession
from devmem_tcp.sansio.sending import SenderSession
from devmem_tcp.sansio.session import MAX_REQUESTS, KeepAlive, SessionState
from frame_maker import SESSION_FRAMES, FrameMaker, damage
from fuzz_judge import run_case
from judged_ends import ENDED, MAX_SIZE, JudgedEnd, JudgedReceiver, JudgedSender, Sent

PIECE: Final = MIN_PIECE
ALL: Final = 1 << 30
ROUNDS: Final = 20_000  # of moving everything, far more than any case needs
_POOLS: Final = (3 * PIECE, PIECE, 15 * PIECE, 3 * PIECE, 5000, 15 * PIECE, 100, 1)
_SETTLE_SIZE: Final = 16  # pools that a message is as large as, at most: it goes over in as many rounds


class Arena:
    """Two ends, and what is between them."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.tally: Counter[str] = Counter()
        self.honest = choices.once_in(2)
        self.now = 0.0
        self.start()

    def start(self) -> None:
        """Begin a session, of any settings."""
        choices = self.choices
        self.tally["sessions"] += 1
        lanes = choices.one_of((2, 1, 3, 5, 17))
        self.pool_bytes, pool_messages = choices.one_of(_POOLS), choices.one_of((4, 1, 2, 30))
        limits = Limits(lanes, MAX_SIZE if self.honest else choices.one_of((MAX_SIZE, MAX_MESSAGE, 100_000)), 100)
        keep_alive = KeepAlive(choices.one_of((15.0, 0.5)), choices.integer(1, 3)) if choices.once_in(2) else None
        kinds = frozenset({ChecksumKind.XXH3})
        sender = SenderSession(limits=limits, now=self.now, keep_alive=keep_alive, checksums=kinds, piece_bytes=PIECE)
        receiver = ReceiverSession(
            limits=limits,
            now=self.now,
            pool_bytes=self.pool_bytes,
            pool_messages=pool_messages,
            keep_alive=keep_alive,
            checksums=kinds,
        )
        self.keep_alive = keep_alive
        self.sender = JudgedSender(sender, self.honest, self.tally)
        self.receiver = JudgedReceiver(receiver, self.pool_bytes, pool_messages, self.honest, self.tally)
        self.ends: tuple[JudgedEnd, JudgedEnd] = (self.sender, self.receiver)
        self.wires = [bytearray() for _ in range(lanes)]
        self.closing = False
        self.reported = 0  # messages that the sender was told are finished
        self.carry()
        if self.honest:
            self.receiver.sent = self.sent
            self.sender.was_declined = lambda message_id: message_id in self.receiver.declined
            self.hear(self.sender, ALL)

    def sent(self, message_id: int) -> Sent:
        return self.sender.messages[message_id]

    # --- the run of a case ---

    def step(self) -> None:
        """Throw one input, and judge where that leaves both."""
        choices = self.choices
        if not (self.sender.lives or self.receiver.lives) and choices.once_in(4):
            self.finish()
            self.start()
        choices.one_of(_HONEST if self.honest else _HOSTILE)(self)
        self.carry()
        if self.honest:
            self.judge_progress()

    def finish(self) -> None:
        """Bring the session to its end, the way that it can take."""
        if self.honest:
            self.finish_honest()
        self.bury()

    def count(self, tally: Counter[str]) -> None:
        tally.update(self.tally)

    def close(self) -> None:
        """Nothing is held that must be let go."""

    def carry(self) -> None:
        """Put what the ends say on its way."""
        self.receiver.queue += self.sender.pull()
        self.sender.queue += self.receiver.pull()

    def hear(self, end: JudgedEnd, nbytes: int) -> bool:
        """Let an end hear what is on its way to it; returns whether anything was."""
        data = bytes(end.queue[:nbytes])
        del end.queue[:nbytes]
        if data:
            end.hear(data, self.now, by_frame=self.choices.once_in(2))
            self.carry()
        return bool(data)

    def talk(self) -> None:
        """Let both hear all that there is to hear."""
        while self.talk_once():
            pass

    def talk_once(self) -> bool:
        heard = [self.hear(end, ALL) for end in self.ends]
        return any(heard)

    def settle(self) -> None:
        """Move everything, verify and release, until nothing moves any more."""
        sender, receiver = self.sender, self.receiver
        whole = self.choices.once_in(2)
        for _ in range(ROUNDS):
            moved = self.talk_once()
            for lane, wire in enumerate(self.wires):
                if sender.failure is None:
                    data = sender.send(lane, ALL, self.now)
                    wire += data
                    moved |= bool(data)
                if receiver.failure is None:
                    moved |= whole and receiver.receive_series(self.wires, ALL, self.now)
                    moved |= receiver.receive(lane, wire, ALL, self.now)
            if receiver.unverified is not None and receiver.failure is None:
                receiver.verify()
                moved = True
            if receiver.held_bytes or receiver.held_messages:
                receiver.release(receiver.held_bytes, receiver.held_messages)
                moved = True
            self.carry()
            if not moved:
                return
        raise AssertionError("bytes move for ever")

    # --- judgement ---

    def judge_progress(self) -> None:
        """Check, where nobody interferes, that all under way has its place, and what is reported is there."""
        under_way = self.receiver.held_bytes + sum(map(len, self.wires))
        assert under_way <= self.pool_bytes, "more is on its way than the receiver has room for"
        receiver, finished = self.receiver, self.sender.finished
        done = (receiver.received, receiver.cancelled, receiver.declined)
        for message_id in range(self.reported, finished):
            there = any(message_id in ids for ids in done) or self.sent(message_id).cancelled
            assert there, "a message was reported that is not there"
            assert message_id != receiver.unverified, "a message was reported that is not verified"
        self.reported = finished

    def judge_arrived(self) -> None:
        """Check that all is there, once all has moved."""
        receiver, messages = self.receiver, self.sender.messages
        for message_id, message in enumerate(messages):
            there = message_id in receiver.received
            assert there or message.cancelled or message_id in receiver.declined, f"message {message_id} never came"
            assert not (there and message.cancelled)
        assert len(receiver.received) + len(receiver.cancelled | receiver.declined) >= len(messages)
        assert not any(self.wires), "bytes are left on a wire"

    def finish_honest(self) -> None:
        sender, receiver = self.sender, self.receiver
        for message_id in list(sender.due):
            sender.finish(message_id)
        self.carry()
        self.settle()
        self.judge_arrived()
        if not self.closing:
            self.probe()
        for end in self.choices.one_of((self.ends, (sender,), (receiver,), self.ends[::-1])):
            end.end.close()
            end.ask()
        self.carry()
        self.settle()
        assert (sender.end.state, receiver.end.state) == (SessionState.CLOSED,) * 2, "closing does not end"
        assert sender.finished == len(sender.messages), "the sender was not told that all has arrived"
        self.tally["closed in order"] += 1

    def probe(self) -> None:
        """Send a message larger than the pool: nothing that happened may stand in its way."""
        sender = self.sender
        sender.end.end_series()
        self.carry()
        self.settle()
        assert sender.end.may_announce, "there is no credit, and nothing is held"
        before = len(self.receiver.received)
        sender.announce(min(self.pool_bytes + PIECE, _SETTLE_SIZE * self.pool_bytes), ChecksumKind.NONE, False, 1)
        self.carry()
        self.settle()
        assert len(self.receiver.received) == before + 1, "a session is stuck"

    def bury(self) -> None:
        """Take the connections from both ends; check that each is at its end then, and stays there."""
        for end in self.ends:
            if end.lives and self.keep_alive is not None and self.choices.once_in(2):
                self.wait_for_end(end)
            end.end.lane_ended(0, self.now)
            end.end.control_ended(self.now)
            end.ask()
            assert not end.lives, "an end waits for a peer that is gone"
            if end.failure is not None:
                end.judge_dead(self.now)

    def wait_for_end(self, end: JudgedEnd) -> None:
        """Let time pass until an end that hears nothing gives up."""
        assert self.keep_alive is not None
        for _ in range(self.keep_alive.pings + 3):
            due = end.end.deadline()
            if due is None:
                return
            self.now = max(self.now, due)
            end.end.tick(self.now)
            end.ask()
        raise AssertionError("silence has no end")

    # --- inputs: what programs do ---

    def announce(self) -> None:
        choices, sender = self.choices, self.sender
        if sender.failure is not None or not sender.end.may_announce:
            return
        if sender.end.series_left:
            choices.one_of((sender.announce_next, self.send_series, self.send_series, sender.end.end_series))()
            return
        size = choices.one_of((choices.integer(0, 40), PIECE, choices.integer(0, 5 * PIECE), PIECE + 1, 1, 0))
        size = min(size, _SETTLE_SIZE * self.pool_bytes)
        count = choices.one_of((2, 3, 8, MAX_TOTAL)) if size and choices.once_in(3) else 1
        size = min(size, PIECE) if count > 1 and choices.once_in(2) else size
        kind = ChecksumKind.XXH3 if count == 1 and choices.once_in(3) else ChecksumKind.NONE
        sender.announce(size, kind, choices.once_in(2), count)

    def finish_checksum(self) -> None:
        if self.sender.due and self.sender.failure is None:
            self.sender.finish(self.choices.one_of(sorted(self.sender.due)))

    def cancel(self) -> None:
        sender = self.sender
        if sender.messages and sender.failure is None:
            last = len(sender.messages) - 1
            sender.cancel(max(0, last - self.choices.integer(0, 5)))

    def decline(self) -> None:
        may = self.receiver.may_decline()
        if may and self.receiver.failure is None:
            self.receiver.decline(self.choices.one_of(may[-6:]))

    def verify(self) -> None:
        if self.receiver.unverified is not None and self.receiver.failure is None:
            self.receiver.verify()

    def release(self) -> None:
        receiver = self.receiver
        nbytes = self.choices.one_of((receiver.held_bytes, self.choices.integer(0, receiver.held_bytes)))
        receiver.release(nbytes, self.choices.integer(0, receiver.held_messages))

    def request(self) -> None:
        receiver = self.receiver
        if receiver.end.state is SessionState.OPEN and len(receiver.end._unanswered) < MAX_REQUESTS:
            receiver.request(self.choices.data(2))

    def answer(self) -> None:
        sender = self.sender
        if sender.requests and sender.end.state in (SessionState.OPEN, SessionState.LEFT):
            number = self.choices.one_of(sorted(sender.requests))
            last = not self.choices.once_in(3)
            sender.end.answer(number, (sender.requests[number] + b"!")[:MAX_BODY], last=last)
            if last:
                del sender.requests[number]

    def close_one(self) -> None:
        """Close one end, seldom."""
        if self.choices.once_in(8):
            self.closing = True
            end = self.choices.one_of(self.ends)
            end.end.close()
            end.ask()

    def err(self) -> None:
        """Make a mistake, as programs do: it is refused, and changes nothing."""
        sender, receiver = self.sender, self.receiver
        lane = self.choices.integer(0, len(self.wires) - 1)
        if not (sender.lives and receiver.lives):
            return
        todo, expected = sender.end.next_piece(lane), receiver.end.expected(lane)
        mistakes: tuple[Callable[[], object], ...] = (
            lambda: sender.end.sent(lane, todo.size + 1 if todo else 1, self.now),
            lambda: receiver.end.received(lane, expected.size + 1 if expected else 1, self.now),
            lambda: receiver.end.release(-1),
            lambda: receiver.end.verified(receiver.seen),
            lambda: receiver.end.decline(receiver.seen, ""),
            lambda: sender.end.cancel(len(sender.messages), ""),
            lambda: sender.end.finish(len(sender.messages), b"1"),
            lambda: sender.end.announce(name="\n", dtype="uint8", shape=(1,), nbytes=1),
            lambda: sender.end.announce(name="w", dtype="uint8", shape=(9,), nbytes=1),
            lambda: sender.end.announce(name="w", dtype="uint8", shape=(), nbytes=1, checksum_kind=ChecksumKind.CRC32C),
            lambda: sender.end.answer(1 << 30, b""),
        )
        said = [bytes(end.end._outgoing_bytes) for end in self.ends]
        try:
            self.choices.one_of(mistakes)()
        except (LocalProtocolError, ValueError):
            assert said == [bytes(end.end._outgoing_bytes) for end in self.ends], "the peer hears of a mistake"
        else:
            raise AssertionError("a mistake was let pass")

    # --- inputs: what networks do ---

    def amount(self) -> int:
        return self.choices.one_of((ALL, self.choices.integer(1, 60), self.choices.integer(1, 2 * PIECE), 1))

    def lane(self) -> int:
        return self.choices.integer(0, len(self.wires) - 1)

    def lanes_from_any(self) -> list[int]:
        start = self.lane()
        return [*range(start, len(self.wires)), *range(start)]

    def send(self) -> None:
        """Move bytes onto the first of all lanes, from any on, that something is to go by."""
        amount = self.amount()
        for lane in self.lanes_from_any() if self.sender.failure is None else ():
            data = self.sender.send(lane, amount, self.now)
            self.wires[lane] += data
            if data:
                return

    def receive(self) -> None:
        """Move bytes from the first of all lanes, from any on, that something has come by."""
        amount = self.amount()
        for lane in self.lanes_from_any() if self.receiver.failure is None else ():
            if self.receiver.receive(lane, self.wires[lane], amount, self.now):
                return

    def send_series(self) -> None:
        """Move messages of a series onto their lane, each whole."""
        for _ in range(self.choices.integer(1, 4) if self.sender.failure is None else 0):
            lane, data = self.sender.send_series(self.now)
            self.wires[lane] += data

    def receive_series(self) -> None:
        """Move messages of a series from their lane, each whole, several at once."""
        if self.receiver.failure is None:
            self.receiver.receive_series(self.wires, self.choices.integer(1, 4), self.now)

    def move_control(self) -> None:
        self.hear(self.choices.one_of(self.ends), self.amount())

    def move_all(self) -> None:
        self.settle()

    def pass_time(self) -> None:
        """Let time pass, after everything was heard: nobody is silent who is there."""
        self.talk()
        self.now += self.choices.one_of((0.1, 1.0, 20.0, 1000.0))
        for end in self.ends:
            end.end.tick(self.now)
            end.ask()
        self.carry()
        self.talk()

    # --- inputs: what enemies do ---

    def throw_frame(self) -> None:
        """Put a frame on its way to an end: one made for the occasion, or one that was said before, by anybody."""
        choices = self.choices
        end = choices.one_of(self.ends)
        seen = self.sender.said + self.receiver.said
        if seen and choices.once_in(4):
            body = choices.one_of(seen)
            end.queue += len(body).to_bytes(4) + body
        else:
            end.queue += self.maker().wire(SESSION_FRAMES)
        if choices.once_in(2):
            self.hear(end, ALL)

    def throw_announce(self) -> None:
        """Announce to the receiver what it may take, but for credit; and let bytes come, whatever the credit."""
        choices, lanes = self.choices, len(self.wires)
        size = choices.one_of((PIECE, 1, 0, 9 * PIECE, MAX_SIZE + 1))
        first_lane, width = choices.integer(0, lanes - 1), choices.integer(1, lanes)
        count = choices.one_of((1, 1, 1, 2, MAX_TOTAL))
        kind = choices.one_of((ChecksumKind.NONE, ChecksumKind.NONE, ChecksumKind.XXH3))
        stripes = Stripes(choices.one_of((PIECE, MAX_MESSAGE)), first_lane, width)
        frame = Announce(
            self.receiver.seen, "w", "uint8", [size], "C", size, stripes, kind, choices.once_in(2), b"", count
        )
        self.receiver.queue += encode(frame) * choices.one_of((1, 1, 1, 2))
        self.hear(self.receiver, ALL)
        for lane in self.lanes_from_any() if choices.once_in(2) else ():
            self.wires[lane] += bytes(PIECE)
            if self.receiver.failure is None:
                self.receiver.receive(lane, self.wires[lane], ALL, self.now)

    def maker(self) -> FrameMaker:
        sender, receiver = self.sender, self.receiver
        announced, seen = len(sender.messages), receiver.seen
        numbers = (announced, seen, max(0, announced - 1), max(0, seen - 1), sender.granted_bytes + self.pool_bytes)
        return FrameMaker(
            self.choices, (*numbers, sender.granted_messages + 1, PIECE, receiver.taken_bytes), (b"sum", b"{}")
        )

    def corrupt(self) -> None:
        damage(self.choices, self.choices.one_of((self.sender.queue, self.receiver.queue)))

    def corrupt_lane(self) -> None:
        expecting = self.receiver.failure is None and [
            wire for lane, wire in enumerate(self.wires) if self.receiver.end.expected(lane)
        ]
        wire = self.choices.one_of(expecting or self.wires)
        if self.choices.once_in(2):
            wire += bytes(self.choices.one_of((1, PIECE, 50_000)))
        else:
            damage(self.choices, wire)

    def flood(self) -> None:
        """Say one thing very often, in one piece: time and memory must not grow faster than that."""
        end = self.choices.one_of(self.ends)
        frame = encode(self.maker().frame(SESSION_FRAMES))  # type: ignore[arg-type]
        size = 2 * MAX_FRAME if self.choices.once_in(32) else MAX_FRAME // 4
        end.queue += frame * max(1, size // len(frame))
        self.hear(end, ALL)

    def lose_time(self) -> None:
        """Let time pass for one end that hears nothing."""
        end = self.choices.one_of(self.ends)
        self.now += self.choices.one_of((0.5, 15.0, 1000.0))
        due = end.end.deadline()
        end.end.tick(self.now)
        end.ask()
        after = end.end.deadline()
        assert due is None or due > self.now or after is None or after > due, (
            "a deadline passed, and nothing came of it"
        )

    def break_connection(self) -> None:
        end = self.choices.one_of(self.ends)
        if self.choices.once_in(2):
            end.end.control_ended(self.now)
            end.ask()
            assert not end.lives
        else:
            end.end.lane_ended(self.lane(), self.now)

    def abort(self) -> None:
        end = self.choices.one_of(self.ends)
        end.end.abort("enough\n" * 100)
        end.ask()
        assert end.end.state in ENDED


_MOVES: Final[tuple[Callable[[Arena], None], ...]] = (
    *(Arena.send, Arena.receive) * 6,
    *(Arena.send_series, Arena.receive_series) * 3,
    *(Arena.announce,) * 6,
    *(Arena.move_control,) * 8,
    *(Arena.release, Arena.finish_checksum, Arena.verify) * 3,
    *(Arena.decline, Arena.cancel, Arena.request, Arena.answer, Arena.err),
    *(Arena.move_all,) * 2,
)
_HONEST: Final = (*_MOVES * 2, Arena.close_one, Arena.pass_time)
_HOSTILE: Final = (
    *_MOVES * 2,
    *(Arena.throw_frame,) * 14,
    *(Arena.throw_announce, Arena.corrupt_lane) * 5,
    *(Arena.corrupt, Arena.lose_time, Arena.flood) * 2,
    *(Arena.abort, Arena.break_connection, Arena.close_one, Arena.pass_time),
)


def run(case: bytes, tally: Counter[str]) -> None:
    """Run one case; see ``run_case``."""
    run_case(Arena, case, tally)
