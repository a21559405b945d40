"""Two sessions with wires between them that a test moves bytes over, as much or as little as it likes."""

from __future__ import annotations

from devmem_tcp.sansio.frames import (
    Announce,
    ChecksumKind,
    Limits,
    SessionFrame,
    Stripes,
    encode,
    session_decoder,
)
from devmem_tcp.sansio.receiving import ReceiverSession
from devmem_tcp.sansio.sending import SenderSession
from devmem_tcp.sansio.session import (
    Event,
    KeepAlive,
    Session,
    SessionState,
)

CHECKSUMS = frozenset({ChecksumKind.XXH3})
PIECE = 4096


class Pair:
    """A sender and a receiver. ``payloads`` are the bytes of each announced message, ``taken`` what arrived of it."""

    def __init__(
        self,
        lanes: int = 2,
        pool_bytes: int = 1 << 20,
        pool_messages: int = 16,
        keep_alive: KeepAlive | None = None,
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits(lanes)
        self.lanes = lanes
        self.now = 0.0
        self.sender = SenderSession(
            limits=limits, now=0.0, keep_alive=keep_alive, checksums=CHECKSUMS, piece_bytes=PIECE
        )
        self.receiver = ReceiverSession(
            limits=limits,
            now=0.0,
            pool_bytes=pool_bytes,
            pool_messages=pool_messages,
            keep_alive=keep_alive,
            checksums=CHECKSUMS,
        )
        self.wires = [bytearray() for _ in range(lanes)]
        self.to_sender, self.to_receiver = bytearray(), bytearray()
        self.payloads: list[bytes] = []
        self.taken: list[bytearray] = []
        self.held = 0  # bytes that were wanted and not released
        self.sender_events: list[Event] = []
        self.receiver_events: list[Event] = []

    def announce(
        self, payload: bytes, checksum_kind: ChecksumKind = ChecksumKind.NONE, confirm: bool = False, name: str = "w"
    ) -> int:
        return self._note(
            payload,
            self.sender.announce(
                name=name,
                dtype="uint8",
                shape=(len(payload),),
                nbytes=len(payload),
                checksum_kind=checksum_kind,
                confirm=confirm,
            ),
        )

    def announce_series(self, payload: bytes, count: int) -> int:
        """Announce a series, ``payload`` being its first message."""
        nbytes = len(payload)
        return self._note(
            payload, self.sender.announce(name="w", dtype="uint8", shape=(nbytes,), nbytes=nbytes, count=count)
        )

    def announce_next(self, payload: bytes) -> int:
        return self._note(payload, self.sender.announce_next())

    def _note(self, payload: bytes, message_id: int) -> int:
        self.payloads.append(payload)
        self.taken.append(bytearray(len(payload)))
        return message_id

    def control(self, nbytes: int = 1 << 30) -> bool:
        """Move up to ``nbytes`` of control each way; returns whether any moved."""
        self.to_receiver += self.sender.data_to_send()
        self.to_sender += self.receiver.data_to_send()
        moved = bool(self.to_receiver or self.to_sender)
        self.receiver.receive_control(bytes(self.to_receiver[:nbytes]), self.now)
        self.sender.receive_control(bytes(self.to_sender[:nbytes]), self.now)
        del self.to_receiver[:nbytes], self.to_sender[:nbytes]
        self.collect()
        return moved

    def collect(self) -> None:
        while (event := self.sender.next_event()) is not None:
            self.sender_events.append(event)
        while (event := self.receiver.next_event()) is not None:
            self.receiver_events.append(event)

    def send(self, lane: int, nbytes: int = 1 << 30) -> int:
        """Put up to ``nbytes`` of what is next on a lane on its wire; returns how many."""
        piece = self.sender.next_piece(lane)
        if piece is None:
            return 0
        size = min(piece.size, nbytes)
        self.wires[lane] += self.payloads[piece.message_id][piece.offset : piece.offset + size]
        self.sender.sent(lane, size, self.now)
        return size

    def receive(self, lane: int, nbytes: int = 1 << 30) -> int:
        """Take up to ``nbytes`` of what is expected from a lane's wire; returns how many."""
        piece = self.receiver.expected(lane)
        size = min(piece.size if piece else 0, nbytes, len(self.wires[lane]))
        if piece is None or not size:
            return 0
        if self.receiver.received(lane, size, self.now):
            self.taken[piece.message_id][piece.offset : piece.offset + size] = self.wires[lane][:size]
            self.held += size
        del self.wires[lane][:size]
        self.collect()
        return size

    def settle(self, release: bool = True) -> None:
        """Move everything until nothing moves any more."""
        moved = True
        while moved:
            moved = self.control()
            for lane in range(self.lanes):
                moved |= bool(self.send(lane)) | bool(self.receive(lane))
            if release and self.held:
                self.release()
                moved = True

    def release(self, nbytes: int | None = None, messages: int = 0) -> None:
        nbytes = self.held if nbytes is None else nbytes
        self.receiver.release(nbytes, messages)
        self.held -= nbytes


XXH3 = ChecksumKind.XXH3
NONE = ChecksumKind.NONE
LIMITS = Limits(2, 1 << 20, 100)


def new_sender(keep_alive: KeepAlive | None = None) -> SenderSession:
    return SenderSession(limits=LIMITS, now=0.0, keep_alive=keep_alive, checksums=frozenset({XXH3}), piece_bytes=PIECE)


def new_receiver(keep_alive: KeepAlive | None = None) -> ReceiverSession:
    return ReceiverSession(
        limits=LIMITS, now=0.0, keep_alive=keep_alive, checksums=frozenset({XXH3}), pool_bytes=100_000, pool_messages=4
    )


def announcement(
    message_id: int = 0, nbytes: int = 10, kind: ChecksumKind = NONE, width: int = 1, count: int = 1
) -> Announce:
    return Announce(message_id, "w", "uint8", [nbytes], "C", nbytes, Stripes(PIECE, 0, width), kind, False, b"", count)


def feed(end: Session, *frames: SessionFrame) -> list[Event]:
    end.receive_control(b"".join(map(encode, frames)), 0.0)
    return events_of(end)


def events_of(end: Session) -> list[Event]:
    events = []
    while (event := end.next_event()) is not None:
        events.append(event)
    return events


def said(end: Session) -> list[SessionFrame]:
    decoder = session_decoder()
    decoder.feed(end.data_to_send())
    frames = []
    while (frame := decoder.next_frame()) is not None:
        frames.append(frame)
    return frames


def announce(end: SenderSession, nbytes: int, kind: ChecksumKind = NONE) -> int:
    return end.announce(name="w", dtype="uint8", shape=(nbytes,), nbytes=nbytes, checksum_kind=kind)


def send_all(end: SenderSession) -> None:
    for lane in range(end.lanes):
        while (piece := end.next_piece(lane)) is not None:
            end.sent(lane, piece.size, 0.0)


def state_of(end: Session) -> SessionState:
    return end.state


def may_announce(pair: Pair) -> bool:
    return pair.sender.may_announce
