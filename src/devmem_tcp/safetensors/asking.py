"""What a client asks a server of tensors, by the requests of a session, and what it is answered.

Rules of the wire:
  - a request is a JSON object: ``{"ask":"catalog"}``, or ``{"ask":"tensors","indexes":[…]}``, places in the catalog;
  - an answer is ``+`` and what was asked for (a catalog as JSON; of tensors nothing more, they come as messages), or
    ``-`` and why not, in words;
  - requests are answered one after the other: tensors when the first of them is about to be sent, in the order asked;
  - a message is called like its tensor, is of the catalog's dtype and shape, in C order, and has an xxh3 checksum where
    both ends can make one.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

from devmem_tcp.errors import BrokenError, RemoteProtocolError
from devmem_tcp.safetensors.catalog import MAX_ENTRIES
from devmem_tcp.sansio.frames import printable

MAX_INDEXES: Final = 4096  # of one request: fits the 64 KiB that a session allows

_GRANTED: Final = b"+"
_REFUSED: Final = b"-"
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)


class AskCatalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="ask", tag="catalog"):
    """For the catalog."""


class AskTensors(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="ask", tag="tensors"):
    """For tensors, by their places in the catalog."""

    indexes: Annotated[
        tuple[Annotated[int, Meta(ge=0, lt=MAX_ENTRIES)], ...], Meta(min_length=1, max_length=MAX_INDEXES)
    ]


Ask: TypeAlias = AskCatalog | AskTensors

_asks: Final[msgspec.json.Decoder[Ask]] = msgspec.json.Decoder(Ask)


def encode_ask(ask: Ask) -> bytes:
    """Encode a request."""
    return msgspec.json.encode(ask)


def decode_ask(body: bytes) -> Ask:
    """Decode a request.

    Raises:
        RemoteProtocolError: it is none, or over a limit of this file.
    """
    try:
        return _asks.decode(body)
    except _UNREADABLE as error:
        raise RemoteProtocolError(printable(f"this is no request for tensors: {error}")) from None


def granted(body: bytes = b"") -> bytes:
    """Return an answer that gives what was asked for."""
    return _GRANTED + body


def refused(words: str) -> bytes:
    """Return an answer that says why not."""
    return _REFUSED + printable(words).encode()


def take_answer(answer: bytes) -> bytes:
    """Return what was asked for.

    Raises:
        BrokenError: the server refused; says why.
        RemoteProtocolError: the peer sends, but does not serve files.
    """
    if answer.startswith(_GRANTED):
        return answer[len(_GRANTED) :]
    if answer.startswith(_REFUSED):
        words = printable(answer[len(_REFUSED) :].decode(errors="replace"))
        raise BrokenError(f"the server refused: {words}")
    raise RemoteProtocolError("the peer is no server of tensors", hint="devmem-tcp serve FILE starts one")
