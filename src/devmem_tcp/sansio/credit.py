"""Credit: how much a sender may have sent, as the receiver grants it, in bytes and in messages.

Rules of the machine:
  - all numbers are totals from the session's start, so that a grant says the same however often it is said;
  - the bytes of a session have one order: message 0 from its first byte to its last, then message 1, and so on. The
    byte at place n of it may be sent once more than n bytes are granted. So what is granted always serves the oldest
    message first, whatever lane its bytes go by, and no later message can starve it;
  - granted less released never exceeds the receiver's pool;
  - what can be granted is withheld, to save frames, only while the sender has a batch left to use.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from devmem_tcp.errors import LocalProtocolError, RemoteProtocolError
from devmem_tcp.sansio.frames import MAX_TOTAL

_BATCHES_IN_POOL: Final = 4


class Grant(NamedTuple):
    """What may have been sent from the session's start."""

    total_bytes: int
    total_messages: int


class Quiet(NamedTuple):
    """How much may come, and how much be given back, without a frame."""

    arrivals: int
    releases: int


class SendCredit:
    """The sender's account."""

    __slots__ = ("granted_bytes", "granted_messages", "taken_messages")

    def __init__(self) -> None:
        self.granted_bytes = 0
        self.granted_messages = 0
        self.taken_messages = 0

    def grant(self, total_bytes: int, total_messages: int) -> None:
        """Take note of a grant.

        Raises:
            RemoteProtocolError: it takes back what was granted before.
        """
        if total_bytes < self.granted_bytes or total_messages < self.granted_messages:
            raise RemoteProtocolError(
                f"credit of {total_bytes} bytes and {total_messages} messages takes back what was granted: "
                f"{self.granted_bytes} and {self.granted_messages}"
            )
        self.granted_bytes = total_bytes
        self.granted_messages = total_messages

    @property
    def messages_left(self) -> int:
        return self.granted_messages - self.taken_messages

    def take_message(self) -> None:
        """Use the credit for one message.

        Raises:
            LocalProtocolError: there is none.
        """
        if not self.messages_left:
            raise LocalProtocolError(
                f"no credit for another message: {self.taken_messages} are announced",
                hint="wait for CreditGranted; the receiver grants more as it releases messages",
            )
        self.taken_messages += 1

    def room(self, place: int) -> int:
        """Return how many bytes may be sent from ``place``, in the order of all bytes of the session, on."""
        return max(0, self.granted_bytes - place)


class ReceiveCredit:
    """The receiver's policy: grants as much as its pool holds, in batches.

    Args:
        pool_bytes: payload bytes that the receiver is ready to hold at a time.
        pool_messages: messages that it is ready to hold at a time, announced or delivered.
    """

    __slots__ = (
        "_batch_bytes",
        "_batch_messages",
        "arrived_bytes",
        "arrived_messages",
        "granted_bytes",
        "granted_messages",
        "pool_bytes",
        "pool_messages",
        "released_bytes",
        "released_messages",
    )

    def __init__(self, pool_bytes: int, pool_messages: int) -> None:
        if pool_bytes < 1 or pool_messages < 1:
            raise ValueError(f"a pool of {pool_bytes} bytes and {pool_messages} messages never receives anything")
        self.pool_bytes = pool_bytes
        self.pool_messages = pool_messages
        self._batch_bytes = -(-pool_bytes // _BATCHES_IN_POOL)
        self._batch_messages = -(-pool_messages // _BATCHES_IN_POOL)
        self.granted_bytes = self.granted_messages = 0
        self.arrived_bytes = self.arrived_messages = 0  # of bytes: or known never to come
        self.released_bytes = self.released_messages = 0

    def message_arrived(self, count: int = 1) -> None:
        """Count an announced message, or several of a series.

        Raises:
            RemoteProtocolError: it was sent without credit.
        """
        if self.arrived_messages + count > self.granted_messages:
            raise RemoteProtocolError(f"message {self.granted_messages} was announced without credit for it")
        self.arrived_messages += count

    def bytes_arrived(self, place: int, nbytes: int) -> None:
        """Count bytes that lie at ``place`` in the order of all bytes of the session.

        Raises:
            RemoteProtocolError: they were sent without credit.
        """
        if place + nbytes > self.granted_bytes:
            raise RemoteProtocolError(f"bytes up to {place + nbytes} were sent, and {self.granted_bytes} granted")
        self.arrived_bytes += nbytes

    def bytes_skipped(self, nbytes: int) -> None:
        """Count bytes of a cancelled message that never come, so that later ones are granted in their place.

        To be called once no byte of this or an earlier message is missing: counted sooner, the grant would move past
        places that are still to be filled, and the pool would be promised twice.
        """
        self.arrived_bytes += nbytes
        self.released_bytes += nbytes

    def release(self, nbytes: int, messages: int = 0) -> None:
        """Give the pool back what was received.

        Raises:
            LocalProtocolError: it is more than came and was not released before.
        """
        if not 0 <= nbytes <= self.arrived_bytes - self.released_bytes:
            raise LocalProtocolError(
                f"released {nbytes} bytes, with {self.arrived_bytes - self.released_bytes} received and not released"
            )
        if not 0 <= messages <= self.arrived_messages - self.released_messages:
            raise LocalProtocolError(
                f"released {messages} messages, with {self.arrived_messages - self.released_messages} announced and "
                "not released"
            )
        self.released_bytes += nbytes
        self.released_messages += messages

    @property
    def grant_is_due(self) -> bool:
        """Whether granting is worth a frame: a batch can be granted, or the sender has less than a batch left."""
        return _due(*self._of_bytes) or _due(*self._of_messages)

    def quiet(self, nbytes: int) -> Quiet:
        """Return how many messages of ``nbytes`` may arrive, and how many be released, before a grant is due.

        In any order. No grant may be due yet.
        """
        of_bytes, of_messages = _quiet(*self._of_bytes), _quiet(*self._of_messages)
        return Quiet(
            min(of_bytes.arrivals // nbytes, of_messages.arrivals),
            min(of_bytes.releases // nbytes, of_messages.releases),
        )

    @property
    def _of_bytes(self) -> tuple[int, int, int]:
        """What could be granted, what the sender has left to use, and a batch, in bytes."""
        grantable = self.released_bytes + self.pool_bytes - self.granted_bytes
        return grantable, self.granted_bytes - self.arrived_bytes, self._batch_bytes

    @property
    def _of_messages(self) -> tuple[int, int, int]:
        """The same in messages."""
        grantable = self.released_messages + self.pool_messages - self.granted_messages
        return grantable, self.granted_messages - self.arrived_messages, self._batch_messages

    def take_grant(self) -> Grant:
        """Grant the most there is, and return it."""
        total_bytes = max(self.granted_bytes, self.released_bytes + self.pool_bytes)
        total_messages = max(self.granted_messages, self.released_messages + self.pool_messages)
        self.granted_bytes = min(total_bytes, MAX_TOTAL)
        self.granted_messages = min(total_messages, MAX_TOTAL)
        return Grant(self.granted_bytes, self.granted_messages)


def _due(grantable: int, left: int, batch: int) -> bool:
    """Whether ``grantable`` is worth a frame to a sender that has about ``left`` to use."""
    return grantable > 0 and (grantable >= batch or left < batch)


def _quiet(grantable: int, left: int, batch: int) -> Quiet:
    """Return how much may arrive, and how much be released, before ``_due``."""
    return Quiet(left - batch, max(0, batch - 1 - grantable)) if left >= batch else Quiet(0, 0)
