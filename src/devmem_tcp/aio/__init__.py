"""Whole tensors over a session, by asyncio: the verbs of ``devmem_tcp.transport``, awaited. No thread is ever started.

    async with open_receiver(nic, listen=("::", 5201)) as receiver:
        async for message in receiver:
            with message:
                use(message.name, message.gather())

What waits for a peer is awaited; what only gives something back (a slot, a message, a series) is not. Each end belongs
to the event loop that it was opened in.
"""

from devmem_tcp.aio.receiver import Receiver, open_receiver
from devmem_tcp.aio.sender import Sender, Sent, Series, Slot, open_sender
from devmem_tcp.transport.message import Header, Message
from devmem_tcp.transport.terms import SessionOptions

__all__ = [
    "Header",
    "Message",
    "Receiver",
    "Sender",
    "Sent",
    "Series",
    "SessionOptions",
    "Slot",
    "open_receiver",
    "open_sender",
]
