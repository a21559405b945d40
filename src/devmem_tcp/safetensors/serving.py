"""A server of safetensors files: what clients ask for goes out as messages, from the files' memory maps.

One thread does it all, and no client is waited for: each is a state machine that does a little whenever the engine has
made a step. Its messages go through a part of the TX Buffer that is its own, as far as it grants credit; so one that
does not read holds up nobody but itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, Final

import msgspec

from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.closing import Closing
from devmem_tcp.contract import Nic
from devmem_tcp.errors import DevmemError, RemoteProtocolError
from devmem_tcp.safetensors import dtypes
from devmem_tcp.safetensors.asking import AskCatalog, decode_ask, granted, refused
from devmem_tcp.safetensors.catalog import Catalog
from devmem_tcp.safetensors.naming import shown
from devmem_tcp.safetensors.offering import Offering
from devmem_tcp.sansio.frames import MAX_BODY, ChecksumKind
from devmem_tcp.sansio.session import KeepAlive
from devmem_tcp.sansio.stripes import DEFAULT_PIECE_BYTES
from devmem_tcp.transport.checksums import running_checksum
from devmem_tcp.transport.delivery import Delivery, StagedSource
from devmem_tcp.transport.outbox import Outbox
from devmem_tcp.transport.sender_engine import SenderEngine
from devmem_tcp.transport.sending import MessageHeader, SenderLink
from devmem_tcp.transport.terms import SessionOptions
from devmem_tcp.types import PAGE_SIZE, Address

DEFAULT_SIZE: Final = 64 << 20
DEFAULT_LANES: Final = 4
DEFAULT_PEERS: Final = 8
PATIENCE: Final = KeepAlive(idle_s=120.0, pings=5)  #: with clients, which may be hashing a large file that they resume

_MOST_AHEAD: Final = 64  # tensors of one client under way at a time
_BYTES_AHEAD: Final = 16 << 20  # of them, before the next one is announced
_HASHED_A_TURN: Final = 4 << 20  # bytes
_UNSENT_ANSWERS: Final = 256 << 10  # bytes: wait before saying more
_SLICE_S: Final = 0.02  # of acting on what came, before each client has its turn

Asked = deque[tuple[int, bytes]]


class ServedSession(msgspec.Struct, frozen=True, kw_only=True):
    """What one client got, when its session is over. ``error``: why it ended, unless both said goodbye.

    ``tensors`` and ``bytes`` were given to TCP; ``dmabuf_bytes`` of it from the bound Buffer, as the proof of path.
    """

    peer: Address
    tensors: int
    bytes: int
    seconds: float
    backend: str
    peer_backend: str
    dmabuf_bytes: int
    host_bytes: int
    error: str


class _Tensor:
    """A tensor on its way: sent by the link, summed here, some megabytes a turn."""

    def __init__(self, delivery: Delivery, data: memoryview, kind: ChecksumKind) -> None:
        self.delivery: Final = delivery
        self.sum: Final = running_checksum(kind) if kind is not ChecksumKind.NONE else None
        self._data: Final = data
        self._summed = 0

    @property
    def over(self) -> bool:
        return self.delivery.gone and self.summed()

    def summed(self) -> bool:
        return self.sum is None or self._summed == len(self._data)

    def add(self, most: int) -> int:
        """Sum up so many bytes more, which were read for the wire just now; answers how many."""
        end = min(len(self._data), self._summed + most)
        count = end - self._summed
        if self.sum is not None:
            self.sum.update(self._data[self._summed : end])
        self._summed = end
        return count


class _FileSource(StagedSource):
    """A tensor in a file, which is read no further once that has changed."""

    __slots__ = ("_client", "_index")

    def __init__(self, client: _Client, index: int, data: memoryview) -> None:
        super().__init__(client.outbox, data, client.link.piece_bytes)
        self._client = client
        self._index = index

    def locate(self, offset: int, size: int) -> Any:
        if self._client.has_changed(self._index):
            return None
        return super().locate(offset, size)


class _Client:
    """One session: what it asked for, and what of that is on its way."""

    def __init__(self, link: SenderLink, asked: Asked, offering: Offering, whole: Outbox, size_bytes: int) -> None:
        self.link: Final = link
        self._asked = asked
        self._offering = offering
        window = whole.take(size_bytes)
        assert window is not None  # parts are of one size, and there is one for each of max_peers
        self._window = window
        self.outbox: Final = Outbox(whole.buffer, whole.binding, lambda: None, window)
        self._began = time.monotonic()
        self._rest: tuple[int, memoryview] | None = None  # of an answer: its request, and what was not said yet
        self._due: deque[int] = deque()  # tensors of the request under way that are not announced
        self._under_way: deque[_Tensor] = deque()
        self._change = ""
        self._tensors = self._bytes = 0
        has_xxh3 = ChecksumKind.XXH3 in link.agreed.checksums
        self._kind: Final = ChecksumKind.XXH3 if has_xxh3 else ChecksumKind.NONE

    def has_changed(self, index: int) -> bool:
        """Whether the file of a tensor has changed; then nothing more goes to this client."""
        self._change = self._change or self._offering.change(index)
        return bool(self._change)

    def turn(self) -> bool:
        """Do a little of everything; answers whether there is more that need not be waited for."""
        link = self.link
        if link.ended:
            return False
        try:
            if self._change:
                link.abort(f"{self._change}: start it again")
                return False
            if link.open:
                self._answer()
                if self._announce():
                    link.push()
            busy = self._sum_up()
            while self._under_way and self._under_way[0].over:
                self._count(self._under_way.popleft())
        except (DevmemError, ConnectionError) as error:
            link.fail(error)
            return False
        return busy or bool(self._change) or self._may_answer or self._may_announce

    # --- requests ---

    @property
    def _may_answer(self) -> bool:
        """Whether there is a request to answer, in its turn, and room on the control connection."""
        if self._due or not self.link.open or self.link.unsent_control_bytes >= _UNSENT_ANSWERS:
            return False
        return self._rest is not None or bool(self._asked)

    def _answer(self) -> None:
        while self._may_answer:
            if self._rest is not None:
                number, rest = self._rest
                self._rest = (number, rest[MAX_BODY:]) if len(rest) > MAX_BODY else None
                self.link.answer(number, bytes(rest[:MAX_BODY]), last=self._rest is None)
            else:
                self._take(*self._asked.popleft())

    def _take(self, number: int, body: bytes) -> None:
        try:
            ask = decode_ask(body)
        except RemoteProtocolError as error:
            self.link.answer(number, refused(error.message))
            return
        if isinstance(ask, AskCatalog):
            self._rest = (number, memoryview(granted(self._offering.encoded)))
            return
        words = self._objection(ask.indexes)
        self.link.answer(number, refused(words) if words else granted())
        if not words:
            self._due.extend(ask.indexes)

    def _objection(self, indexes: Sequence[int]) -> str:
        """Say why tensors cannot be sent; nothing: they can."""
        entries = self._offering.catalog.entries
        most = self.link.agreed.limits.message_bytes
        files: set[int] = set()
        for index in indexes:
            if index >= len(entries):
                return f"there is no tensor {index}: the catalog has {len(entries)}"
            entry = entries[index]
            if entry.nbytes > most:
                return f"tensor {shown(entry.name)} has {entry.nbytes} bytes, and the receiver takes {most} at most"
            if entry.file not in files:
                files.add(entry.file)
                if words := self._offering.change(index):
                    return words
        return ""

    # --- tensors ---

    @property
    def _may_announce(self) -> bool:
        if not self._due or not self.link.may_begin or len(self._under_way) >= _MOST_AHEAD:
            return False
        return sum(tensor.delivery.left for tensor in self._under_way) < _BYTES_AHEAD

    def _announce(self) -> bool:
        """Announce what may go now; answers whether there was anything."""
        begun = False
        while self._may_announce:
            index = self._due.popleft()
            entry = self._offering.catalog.entries[index]
            if self.has_changed(index):
                return begun
            data = self._offering.data(index)
            header = MessageHeader(
                entry.name, dtypes.by_wire(entry.dtype), entry.shape, entry.nbytes, checksum_kind=self._kind
            )
            delivery = self.link.begin(header, _FileSource(self, index, data))
            tensor = _Tensor(delivery, data, self._kind)
            if not entry.nbytes:
                self._finish(tensor)
            self._under_way.append(tensor)
            begun = True
        return begun

    def _sum_up(self) -> bool:
        """Sum up what is on its way, a few megabytes; answers whether more is to be summed up."""
        left = _HASHED_A_TURN
        for tensor in self._under_way:
            if not tensor.summed() and left:
                left -= tensor.add(left)
                if tensor.summed():
                    self._finish(tensor)
        return not left

    def _finish(self, tensor: _Tensor) -> None:
        if tensor.sum is not None:
            self.link.finish(tensor.delivery, tensor.sum.digest())

    def _count(self, tensor: _Tensor) -> None:
        if not tensor.delivery.left:
            self._tensors += 1
            self._bytes += tensor.delivery.nbytes

    # --- the end ---

    def close(self) -> ServedSession:
        """Let go of the part of the TX Buffer, of a session that is over."""
        for tensor in self._under_way:
            self._count(tensor)
        self._under_way.clear()
        self.outbox.view.release()
        self._window.drop()
        stats = [sock.stats for sock in self.link.lanes]
        return ServedSession(
            peer=self.link.peer,
            tensors=self._tensors,
            bytes=self._bytes,
            seconds=time.monotonic() - self._began,
            backend=stats[0].backend,
            peer_backend=self.link.agreed.peer_backend,
            dmabuf_bytes=sum(each.sent_dmabuf_bytes for each in stats),
            host_bytes=sum(each.sent_host_bytes for each in stats),
            error=self.link.error.message if isinstance(self.link.error, DevmemError) else str(self.link.error or ""),
        )


class TensorServer(Closing):
    """Offers tensors to clients. Made by ``serve_tensors``. Nothing runs behind the program's back: clients are served
    while one of its methods waits. Threads: one at a time, but for ``stop``.
    """

    def __init__(self, engine: SenderEngine, offering: Offering, asked: dict[SenderLink, Asked], part: int) -> None:
        self._engine = engine
        self._offering = offering
        self._asked = asked
        self._part_bytes = part
        self._clients: dict[SenderLink, _Client] = {}
        self._busy = False
        self._stopping = False

    @property
    def address(self) -> Address:
        """Where clients come: host and TCP port of control connections."""
        assert self._engine.address is not None
        return self._engine.address

    @property
    def catalog(self) -> Catalog:
        """What is offered."""
        return self._offering.catalog

    @property
    def peers(self) -> tuple[Address, ...]:
        """The clients of sessions under way."""
        return tuple(link.peer for link in self._engine.links)

    @property
    def refused(self) -> int:
        """How many connections were turned away: strangers, wrong keys, too many clients."""
        return self._engine.reception.refused if self._engine.reception is not None else 0

    @property
    def last_refusal(self) -> str:
        """Why the last one was."""
        return self._engine.reception.last_refusal if self._engine.reception is not None else ""

    def fileno(self) -> int:
        """An fd that is readable when ``step`` has something to do; ``step`` says how long it may be left alone."""
        return self._engine.fileno()

    def step(self, timeout_s: float | None) -> list[ServedSession]:
        """Wait for something to do, at most so many seconds (None: without limit), and do it.

        Returns:
            The sessions that are over since the last call.
        """
        self._engine.step(0.0 if self._busy else timeout_s, _SLICE_S)
        ended = self._part()
        for link in self._engine.links:
            if link not in self._clients:
                asked = self._asked.setdefault(link, deque())
                self._clients[link] = _Client(link, asked, self._offering, self._engine.outbox, self._part_bytes)
        self._busy = False
        for client in self._clients.values():
            self._busy |= client.turn()
        return ended + self._part()  # a turn may have ended a session, which nothing else will tell of

    def _part(self) -> list[ServedSession]:
        """Let go of the sessions that are over."""
        for link in [link for link in self._asked if link.ended]:
            del self._asked[link]
        over = [link for link in self._clients if link.ended]
        return [self._clients.pop(link).close() for link in over]

    def __iter__(self) -> Iterator[ServedSession]:
        """Serve, and yield each session when it is over; until ``stop`` or ``close``."""
        while not (self._stopping or self._engine.closed):
            yield from self.step(None)

    def stop(self) -> None:
        """Have iteration end soon. From any thread."""
        self._stopping = True
        self._engine.wake()

    @property
    def closed(self) -> bool:
        return self._engine.closed

    def close(self) -> None:
        """End all sessions, which their clients are told, and let go of NIC and files. Idempotent."""
        for link in self._engine.links:
            link.abort("the server was stopped")
        while self._clients:
            self._clients.popitem()[1].close()
        self._engine.close()
        self._offering.close()


def serve_tensors(
    nic: Nic,
    files: Sequence[str | PurePath],
    *,
    listen: Address,
    data_port: int | None = None,
    memory: Allocator | None = None,
    size: int = DEFAULT_SIZE,
    buffer: Buffer | None = None,
    max_peers: int = DEFAULT_PEERS,
    lanes: int = DEFAULT_LANES,
    keep_alive: KeepAlive | None = PATIENCE,
    **session: Any,
) -> TensorServer:
    """Offer the tensors of safetensors files to clients: see ``fetch_tensors``.

    Args:
        files: their paths; no two tensors of them may have one name.
        listen: (host, port) for control connections; port 0 takes any free one.
        data_port: TCP port of data connections; None: ``port + 1``, or any.
        memory: Allocator of the TX Buffer; None: Udmabuf where the NIC needs a dma-buf, else Host.
        size: of the Buffer, in bytes; each client has an even part of it.
        buffer: bind this one instead; it stays the caller's.
        max_peers: clients at a time; more are refused.
        lanes: data connections of a client, at most.
        keep_alive: how long a client may be silent.
        session: key, insecure, tls … : see ``SessionOptions``.

    Raises:
        ValueError: the Buffer is too small for so many clients and lanes; a file is unsound, or two do not go together.
        KernelError, BindError, OutOfDeviceMemory: what the machine or the NIC refused.
    """
    if max_peers < 1:
        raise ValueError(f"max_peers must be at least 1, got {max_peers}")
    options = SessionOptions(lanes=lanes, keep_alive=keep_alive, **session)
    bound = size if buffer is None else buffer.size_bytes
    part = bound // max_peers // PAGE_SIZE * PAGE_SIZE
    least = 2 * lanes * DEFAULT_PIECE_BYTES  # each lane may have a piece half sent, and there is a run for another one
    if part < least:
        needs = f"{max_peers} clients of {lanes} lanes need {max_peers * least}"
        raise ValueError(f"a buffer of {bound} bytes is too small: {needs}; take a larger one, fewer peers or lanes")
    offering = Offering(files)
    asked: dict[SenderLink, Asked] = {}
    try:
        engine = SenderEngine(
            nic,
            options,
            to=None,
            listen=listen,
            data_port=data_port,
            memory=memory,
            size_bytes=size,
            buffer=buffer,
            max_peers=max_peers,
            on_request=lambda link, number, body: asked.setdefault(link, deque()).append((number, body)),
        )
    except BaseException:
        offering.close()
        raise
    return TensorServer(engine, offering, asked, part)
