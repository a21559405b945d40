"""Whole tensors over a session: senders, receivers and messages, blocking."""

from devmem_tcp.sansio.session import KeepAlive
from devmem_tcp.transport.landing import PathBytes
from devmem_tcp.transport.message import Header, Message
from devmem_tcp.transport.receiver import Receiver, open_receiver
from devmem_tcp.transport.sender import Sender, Sent, Series, Slot, open_sender
from devmem_tcp.transport.terms import SessionOptions

__all__ = [
    "Header",
    "KeepAlive",
    "Message",
    "PathBytes",
    "Receiver",
    "Sender",
    "Sent",
    "Series",
    "SessionOptions",
    "Slot",
    "open_receiver",
    "open_sender",
]
