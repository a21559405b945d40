"""What the two ends say to each other, by requests of a session that carries nothing else.

The measuring end asks, the listening end answers: Greet and Greeting, then for each work Start and Started, both ends'
work, Finish and Finished. Failed stands for any answer. The session uses the software backend, whatever is measured,
so that it takes no queue of a NIC; its key, and nothing less, protects what is said.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias, TypeVar

import msgspec

from devmem_tcp.benchmark.figures import EndFigures, Machine
from devmem_tcp.benchmark.plan import Pools, Work
from devmem_tcp.contract import Nic
from devmem_tcp.doors import open_nic
from devmem_tcp.errors import DevmemError, RemoteProtocolError
from devmem_tcp.transport import Receiver

VERSION: Final = 1  # of these structs
PORTS: Final = 6  # of the listening end: control and data of this session, of receiving, of sending back
TALK_BYTES: Final = 1 << 20  # a Buffer that nothing lands in


class Greet(msgspec.Struct, frozen=True, tag=True):
    """Who are you?"""

    version: int = VERSION


class Start(msgspec.Struct, frozen=True, tag=True):
    """Get ready for a work, with Buffers of these sizes: all works of a run have the same."""

    work: Work
    verify: bool
    pools: Pools


class Finish(msgspec.Struct, frozen=True, tag=True):
    """What did you measure?"""


class Greeting(msgspec.Struct, frozen=True, tag=True):
    """The listening end, and what limits it. ``boot_id`` is that of a running system; empty: unknown."""

    version: int
    nic: str
    backend: str
    machine: Machine
    buffer_bytes: int
    memory_bytes: int  # available
    fds: int
    boot_id: str


class Started(msgspec.Struct, frozen=True, tag=True):
    """Come to these TCP ports, with what is to be received, and for what is sent back."""

    port: int
    port_back: int


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The work is done."""

    figures: EndFigures


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It was not, and why."""

    words: str


Question: TypeAlias = Greet | Start | Finish
Answer: TypeAlias = Greeting | Started | Finished | Failed

encode: Final = msgspec.msgpack.encode
_questions: Final[msgspec.msgpack.Decoder[Question]] = msgspec.msgpack.Decoder(Greet | Start | Finish)
_answers: Final[msgspec.msgpack.Decoder[Answer]] = msgspec.msgpack.Decoder(Greeting | Started | Finished | Failed)

Wanted = TypeVar("Wanted", Greeting, Started, Finished)


class OtherEndFailed(DevmemError):
    """The other end could not do its part; the words are its own."""


def read_question(body: bytes) -> Question:
    """Read a question.

    Raises:
        RemoteProtocolError: it is none.
    """
    try:
        return _questions.decode(body)
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"the other end is no devmem-tcp bench of this version: {error}") from error


def ask(receiver: Receiver, question: Question, wanted: type[Wanted], timeout_s: float) -> Wanted:
    """Ask the listening end.

    Raises:
        OtherEndFailed: it says why it could not.
        RemoteProtocolError: it answers something else.
        DevmemError, ConnectionError: the session ended.
    """
    body = receiver.request(encode(question), timeout_s)
    try:
        answer: Any = _answers.decode(body)
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"the other end is no devmem-tcp bench of this version: {error}") from error
    if isinstance(answer, Failed):
        raise OtherEndFailed(answer.words)
    if not isinstance(answer, wanted):
        raise RemoteProtocolError(f"asked for {wanted.__name__}, the other end answered {type(answer).__name__}")
    return answer


def talking_nic() -> Nic:
    """Open a NIC for the session that the ends talk by."""
    return open_nic("soft0", backend="software")
