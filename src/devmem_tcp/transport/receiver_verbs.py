"""What a receiver does, up to where it waits: the same for the blocking and the asyncio driver (``waiting``)."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Final

from devmem_tcp.errors import Timeout
from devmem_tcp.transport.message import Message
from devmem_tcp.transport.receiver_engine import ReceiverEngine
from devmem_tcp.transport.waiting import NEVER, Limit, Line, Verb, until
from devmem_tcp.types import Address

_PATIENCE_S: Final = 5.0  # with senders that do not answer a goodbye


class ReceiverVerbs:
    """The verbs of one receiver."""

    def __init__(self, engine: ReceiverEngine) -> None:
        self.engine: Final = engine
        self._for_messages: Line = deque()

    def receive(self, timeout_s: float | None) -> Verb[Message]:
        """See ``Receiver.receive``."""
        yield from until(self.engine.has_news, Limit.after(timeout_s), "no message came", self._for_messages)
        message = self.engine.take()
        assert message is not None
        return message

    def receive_next(self) -> Verb[Message | None]:
        """Return the next message; None: every sender that came has said goodbye."""
        yield from until(self._has_news_or_is_over, NEVER, "", self._for_messages)
        return self.engine.take()

    def _has_news_or_is_over(self) -> bool | None:
        return self.engine.has_news() or self.engine.over or None

    def request(self, body: bytes, timeout_s: float | None) -> Verb[bytes]:
        """See ``Receiver.request``."""
        limit = Limit.after(timeout_s)
        asked = self.engine.request(body)
        try:
            return (yield from until(lambda: self.engine.answer(asked), limit, "no answer came"))
        finally:
            self.engine.forget(asked)

    def wait_connected(self, timeout_s: float | None) -> Verb[Address]:
        """Wait for the session with a sender that was gone to."""
        link = yield from until(self.engine.connected, Limit.after(timeout_s), "no session with the sender came about")
        return link.peer

    def wait_peers(self, peers: int, timeout_s: float | None) -> Verb[None]:
        """See ``Receiver.wait_connected``."""
        engine = self.engine

        def here() -> bool | None:
            engine.connected()
            return len(engine.links) >= peers or None

        yield from until(here, Limit.after(timeout_s), f"sessions with {peers} senders did not come about")

    def part(self) -> Verb[None]:
        """Say goodbye, and wait for the senders' part of it, five seconds at most."""
        self.engine.leave()
        limit = Limit.after(_PATIENCE_S)
        with contextlib.suppress(Timeout):  # closing tells those who did not answer
            yield from until(lambda: not self.engine.links or None, limit, "no answer to the goodbye")
