"""A client's session with a server of tensors: its catalog, and the tensors asked for, one after the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.contract import Nic
from devmem_tcp.errors import BrokenError, DevmemError, RemoteProtocolError, Timeout
from devmem_tcp.safetensors.asking import AskCatalog, AskTensors, encode_ask, take_answer
from devmem_tcp.safetensors.catalog import Catalog, CatalogEntry
from devmem_tcp.safetensors.naming import shown
from devmem_tcp.sansio.session import KeepAlive
from devmem_tcp.transport.end import End
from devmem_tcp.transport.message import Header, Message
from devmem_tcp.transport.receiver_engine import Asked, ReceiverEngine
from devmem_tcp.transport.receiver_verbs import ReceiverVerbs
from devmem_tcp.transport.terms import SessionOptions
from devmem_tcp.transport.waiting import Limit, Verb, until
from devmem_tcp.types import Address

DEFAULT_SIZE: Final = 64 << 20
DEFAULT_LANES: Final = 4
PATIENCE: Final = KeepAlive()  #: with a server

_BATCH: Final = 1024  # tensors of a request
_REQUESTS: Final = 2  # not answered: one is served, and another waits for its turn
_TELL_S: Final = 0.1  # how often progress is told while nothing else happens


class FetchProgress(NamedTuple):
    """How far a fetch is: tensors that are whole, of how many; bytes that have come, of how many; and the tensor that
    is coming: its name (nothing: none is), bytes of it, of how many. With several lanes the next one may have begun,
    too: its bytes count with those of this one, as far as they fit there.
    """

    tensors: int
    all_tensors: int
    bytes: int
    all_bytes: int
    name: str
    name_bytes: int
    name_all_bytes: int


Progress: TypeAlias = Callable[[FetchProgress], None]
Where: TypeAlias = Callable[[CatalogEntry], Any]
"""Asked of each tensor before its bytes come: a writable array to copy them to, or None: leave them where they land."""


class RemoteTensors(End):
    """The tensors that a server offers. Made by ``open_remote``; ``with`` ends the session. Threads: one at a time.

    Messages stay readable after ``close()``.
    """

    _engine: ReceiverEngine

    def __init__(self, nic: Nic, to: Address, options: SessionOptions, timeout_s: float | None, **engine: Any) -> None:
        self._timeout_s = timeout_s
        self._wanted: deque[CatalogEntry] = deque()  # asked for and not here, in the order in which they come
        self._begun: set[str] = set()  # those that ``where`` was asked about
        self._where: Where = lambda entry: None
        self._offence: RemoteProtocolError | None = None
        self._asked: deque[tuple[Asked, CatalogEntry]] = deque()  # requests, and the first tensor of each
        self._refusal: tuple[DevmemError, CatalogEntry] | None = None  # of the request with this first tensor
        self._unasked: deque[CatalogEntry] = deque()
        super().__init__(
            ReceiverEngine(nic, options, listen=None, to=to, data_port=None, max_peers=1, into=self._place, **engine)
        )
        self._verbs = ReceiverVerbs(self._engine)
        try:
            self._engine.run(self._verbs.wait_connected(timeout_s))
            self._link: Final = self._engine.links[0]
            answer = self._engine.run(self._verbs.request(encode_ask(AskCatalog()), timeout_s))
            self.catalog: Final = Catalog.decode(take_answer(answer))
        except BaseException:
            self._engine.close()
            raise
        self._indexes: Final = {entry.name: index for index, entry in enumerate(self.catalog.entries)}
        self.room_bytes: Final = self._link.room_bytes  #: how many bytes of messages may be held at a time
        self.backend: Final = self._link.backend
        self.peer_backend: Final = self._link.agreed.peer_backend

    def receive(
        self,
        entries: Sequence[CatalogEntry],
        *,
        where: Where = lambda entry: None,
        progress: Progress = lambda progress: None,
    ) -> Iterator[Message]:
        """Ask for tensors, and yield each when it is whole, in this order. Each is to be released, or kept.

        Args:
            entries: of the catalog.
            where: where to put each.
            progress: told how far it is, ten times a second and when the next tensor is asked for.

        Raises:
            BrokenError: the server refused, left, or ended the session; says why.
            RemoteProtocolError: it sends what was not asked for, or damaged bytes.
            Timeout: nothing came in ``timeout_s`` seconds.
            NotZeroCopy, OutOfDeviceMemory, ConnectionError: why the session ended.
        """
        self._where = where
        self._unasked.extend(entries)
        watch = _Watch(self._received, sum(entry.nbytes for entry in entries), len(entries), progress)
        watch.tell(self._wanted)
        for entry in entries:
            yield self._engine.run(self._next(watch))
            watch.whole(entry.nbytes, self._wanted)

    # --- one after the other ---

    def _next(self, watch: _Watch) -> Verb[Message]:
        moved = time.monotonic()
        while True:
            self._ask()
            try:
                yield from until(self._news, Limit.after(_TELL_S), "")
            except Timeout:
                if watch.tell(self._wanted):
                    moved = time.monotonic()
                elif self._timeout_s is not None and time.monotonic() - moved > self._timeout_s:
                    raise Timeout(
                        f"nothing came from the server in {self._timeout_s:g} s",
                        hint="see whether it still runs, or give a longer time",
                    ) from None
                continue
            if self._offence is not None:
                raise self._offence
            self._take_answers()
            message = self._engine.take()
            if message is not None:
                self._check(message)
                return message
            if self._refusal is not None and self._wanted[0] is self._refusal[1]:
                raise self._refusal[0]

    def _news(self) -> bool | None:
        """Whether there is anything to act on."""
        if self._offence is not None or self._engine.has_news():
            return True
        if self._engine.over:
            raise BrokenError(f"the server left, with {len(self._wanted) + len(self._unasked)} tensors to send")
        if self._refusal is not None and self._wanted[0] is self._refusal[1]:
            return True
        return self._answered or None

    @property
    def _answered(self) -> bool:
        return not self._link.ended and bool(self._asked) and self._engine.answer(self._asked[0][0]) is not None

    def _ask(self) -> None:
        while self._unasked and len(self._asked) < _REQUESTS and self._refusal is None:
            batch = [self._unasked.popleft() for _ in range(min(_BATCH, len(self._unasked)))]
            ask = AskTensors(tuple(self._indexes[entry.name] for entry in batch))
            self._asked.append((self._engine.request(encode_ask(ask)), batch[0]))
            self._wanted.extend(batch)

    def _take_answers(self) -> None:
        while self._answered:
            asked, first = self._asked.popleft()
            answer = self._engine.answer(asked)
            assert answer is not None
            self._engine.forget(asked)
            try:
                take_answer(answer)
            except DevmemError as error:
                self._refusal = self._refusal or (error, first)

    # --- what the server says of a tensor is not believed ---

    def _place(self, header: Header) -> Any:
        entry = next((each for each in self._wanted if each.name == header.name), None)
        if entry is None or header.name in self._begun or not _is(header, entry):
            self._offence = RemoteProtocolError(f"the server sends {shown(header.name)}, which was not asked for so")
            raise self._offence
        self._begun.add(header.name)
        return self._where(entry)

    def _check(self, message: Message) -> None:
        entry = self._wanted.popleft()
        if not _is(message, entry):
            message.release()
            raise RemoteProtocolError(f"the server sent {shown(message.name)} in place of {shown(entry.name)}")
        self._begun.discard(entry.name)

    # --- how far it is, and the end ---

    def _received(self) -> int:
        """Return how many bytes have come by the data connections, of messages not whole as well."""
        return sum(
            stats.dmabuf_bytes + stats.linear_bytes + stats.host_bytes
            for stats in (sock.stats for sock in self._link.lanes)
        )

    def _part(self) -> Verb[None]:
        if not self._wanted:  # else the goodbye would wait for what is on its way
            yield from self._verbs.part()


class _Watch:
    """Tells how far it is. Messages come in order: what came beyond the whole ones is of those that are next."""

    def __init__(self, received: Callable[[], int], nbytes: int, tensors: int, progress: Progress) -> None:
        self._received = received
        self._before = received()
        self._nbytes = nbytes
        self._tensors = tensors
        self._progress = progress
        self._whole_bytes = self._whole_tensors = 0
        self._told = 0

    def whole(self, nbytes: int, wanted: Sequence[CatalogEntry]) -> None:
        """Note that a tensor is whole."""
        self._whole_bytes += nbytes
        self._whole_tensors += 1
        self.tell(wanted)

    def tell(self, wanted: Sequence[CatalogEntry]) -> bool:
        """Tell how far it is; answers whether more has come since the last time."""
        came = max(self._whole_bytes, self._received() - self._before)
        moved, self._told = came > self._told, came
        name, part, whole = "", 0, 0
        if wanted:
            name, whole = wanted[0].name, wanted[0].nbytes
            part = min(whole, came - self._whole_bytes)
        self._progress(FetchProgress(self._whole_tensors, self._tensors, came, self._nbytes, name, part, whole))
        return moved


def open_remote(
    nic: Nic,
    to: Address,
    *,
    queues: Sequence[int] | None = None,
    memory: Allocator | None = None,
    size: int = DEFAULT_SIZE,
    buffer: Buffer | None = None,
    strict: bool = False,
    steer: bool = True,
    timeout_s: float | None = None,
    lanes: int = DEFAULT_LANES,
    keep_alive: KeepAlive | None = PATIENCE,
    **session: Any,
) -> RemoteTensors:
    """Go to a server of tensors, and fetch its catalog: see ``serve_tensors``.

    Args:
        to: (host, port) of the server.
        queues, memory, size, buffer, strict, steer: as ``open_receiver``.
        timeout_s: the longest wait for the server, or for anything more of it; None: for ever.
        lanes: data connections, at most.
        keep_alive: how long the server may be silent.
        session: key, insecure, tls … : see ``SessionOptions``.

    Raises:
        OSError, BindError, NicSettingError, OutOfDeviceMemory: what the NIC or the machine refused; nobody listens.
        AuthenticationFailed, RemoteProtocolError, Timeout: what the server did.
    """
    return RemoteTensors(
        nic,
        to,
        SessionOptions(lanes=lanes, keep_alive=keep_alive, **session),
        timeout_s,
        queues=queues,
        memory=memory,
        size_bytes=size,
        buffer=buffer,
        strict=strict,
        steer=steer,
    )


def _is(header: Header, entry: CatalogEntry) -> bool:
    """Whether a message says of itself what the catalog says of a tensor."""
    told = (header.name, header.dtype, header.shape, header.order, header.nbytes)
    return told == (entry.name, entry.dtype, entry.shape, "C", entry.nbytes)
