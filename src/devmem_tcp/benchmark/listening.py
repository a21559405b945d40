"""The end that listens: does its side of the works that the other end asks for, until that says goodbye."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from devmem_tcp.benchmark import asynchronous, blocking
from devmem_tcp.benchmark.drill import ListeningTurn
from devmem_tcp.benchmark.figures import EndFigures, available_memory, boot_id, this_machine
from devmem_tcp.benchmark.plan import Driver, Kind
from devmem_tcp.benchmark.site import Site
from devmem_tcp.benchmark.talk import (
    TALK_BYTES,
    VERSION,
    Failed,
    Finished,
    Greet,
    Greeting,
    Start,
    Started,
    encode,
    read_question,
    talking_nic,
)
from devmem_tcp.errors import ClosedError, DevmemError
from devmem_tcp.transport.sender_engine import SenderEngine
from devmem_tcp.transport.sending import SenderLink
from devmem_tcp.transport.terms import SessionOptions
from devmem_tcp.transport.waiting import NEVER, Limit, until
from devmem_tcp.types import Address


def listen(site: Site, address: Address, *, buffer_bytes: int, fds: int, listening: Callable[[Address], None]) -> None:
    """Wait for the measuring end at an address, do works with it, and return once it has said goodbye.

    Args:
        address: port 0 takes any free ports; another one is the first of ``talk.PORTS``.
        buffer_bytes: the largest Buffer to allocate.
        fds: how many fds this process may have.
        listening: told where the other end can come, once it can.

    Raises:
        DevmemError, OSError: what the machine refused; the other end went away.
    """
    with talking_nic() as nic:
        end = _ListeningEnd(site, address, buffer_bytes, fds)
        engine = SenderEngine(
            nic,
            SessionOptions(**site.session),
            to=None,
            listen=address,
            data_port=None,
            memory=None,
            size_bytes=TALK_BYTES,
            buffer=None,
            on_request=end.asked,
        )
        try:
            assert engine.address is not None
            listening(engine.address)
            end.serve(engine)
        finally:
            engine.close()


class _ListeningEnd:
    """Answers one question after the other."""

    def __init__(self, site: Site, address: Address, buffer_bytes: int, fds: int) -> None:
        self._site = site
        self._address = address
        self._buffer_bytes = buffer_bytes
        self._fds = fds
        self._questions: deque[tuple[SenderLink, int, bytes]] = deque()
        self._failure = Failed("no work was begun")

    def asked(self, link: SenderLink, number: int, body: bytes) -> None:
        """Note a question."""
        self._questions.append((link, number, body))

    def serve(self, engine: SenderEngine) -> None:
        """Answer until the other end has left."""
        link = engine.run(until(engine.connected, NEVER, ""))
        while self._hear(engine, link, NEVER):
            self._answer(engine, *self._questions.popleft())
        if link.error is not None:
            raise link.error

    def _hear(self, engine: SenderEngine, link: SenderLink, limit: Limit) -> bool:
        """Wait until there is a question, or the other end has left; returns whether there is one."""
        engine.run(until(lambda: bool(self._questions) or link.ended or None, limit, "the other end asked nothing"))
        return bool(self._questions)

    def _answer(self, engine: SenderEngine, link: SenderLink, number: int, body: bytes) -> None:
        question = read_question(body)
        if isinstance(question, Start):
            self._work(engine, link, number, question)
        else:
            link.answer(number, encode(self._greeting() if isinstance(question, Greet) else self._failure))

    def _greeting(self) -> Greeting:
        return Greeting(
            version=VERSION,
            nic=self._site.nic.name,
            backend=self._site.backend,
            machine=this_machine(),
            buffer_bytes=self._buffer_bytes,
            memory_bytes=available_memory(),
            fds=self._fds,
            boot_id=boot_id(),
        )

    def _work(self, engine: SenderEngine, link: SenderLink, number: int, start: Start) -> None:
        """Do a work. Start is answered as soon as the other end can come, Finish at its end; or with what failed."""
        started = False

        def ready(address: Address, address_back: Address) -> None:
            nonlocal started
            started = True
            link.answer(number, encode(Started(address[1], address_back[1])))

        def over(figures: EndFigures) -> None:
            if self._hear(engine, link, Limit.after(self._site.timeout_s)):
                _, finish, _ = self._questions.popleft()
                link.answer(finish, encode(Finished(figures)))

        def look() -> None:
            engine.step(0)
            if link.ended or self._questions:  # it asks for figures that there are not: its own side has failed
                raise link.error or ClosedError("the other end gave up")

        ports = self._port(2), self._port(4)
        turn = ListeningTurn(start.work, start.verify, *ports, ready, over, look, self._site.timeout_s)
        module = blocking if start.work.driver is Driver.BLOCKING else asynchronous
        self._site.pools = start.pools
        try:
            (module.echo if start.work.kind is Kind.ROUND_TRIP else module.receive)(self._site, turn)
        except (DevmemError, OSError, ValueError) as error:
            self._failure = Failed(str(error) or type(error).__name__)
            if not started:
                link.answer(number, encode(self._failure))

    def _port(self, offset: int) -> Address:
        """Return an address to listen at: the TCP port that many after the first one, or any."""
        host, port = self._address
        return host, port + offset if port else 0
