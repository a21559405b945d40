"""A message that has come whole: what it is, and its bytes where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from devmem_tcp.arrays import ArrayType, DeviceArray, Lease, array_type
from devmem_tcp.sansio.frames import Announce, decode_metadata
from devmem_tcp.transport.landing import Landing, PathBytes
from devmem_tcp.types import Address

if TYPE_CHECKING:
    from devmem_tcp.transport.receiving import ReceiverLink


class Header:
    """What the sender says of a message: known before its bytes come."""

    __slots__ = ("_announce", "message_id", "peer")

    def __init__(self, message_id: int, announce: Announce, peer: Address) -> None:
        self.message_id: Final = message_id  #: counts from 0 in its session
        self.peer: Final = peer  #: who sends it
        self._announce = announce

    @property
    def name(self) -> str:
        return self._announce.name

    @property
    def dtype(self) -> str:
        """The name of the element type, for instance ``bfloat16``."""
        return self._announce.dtype

    @property
    def type(self) -> ArrayType:
        return array_type(self._announce.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._announce.shape)

    @property
    def order(self) -> str:
        """C: the last index runs fastest; F: the first."""
        return self._announce.order

    @property
    def nbytes(self) -> int:
        return self._announce.nbytes

    @property
    def metadata(self) -> dict[str, Any]:
        """What the sender said besides: a JSON object."""
        return decode_metadata(self._announce.metadata)

    def __repr__(self) -> str:
        return f"<Header {self.name!r} {self.dtype} {self.shape}, {self.nbytes} bytes>"


class Message(Header):
    """One tensor received. ``with`` gives its memory back at the end, once nobody looks at it any more.

    Lifetime: arrays made of it keep its bytes as they are, also after ``release()``; frags go back with the last.
    """

    __slots__ = ("_landing", "_lease", "_link", "_releasing", "backend", "checksum", "path")

    def __init__(
        self, link: ReceiverLink, message_id: int, announce: Announce, landing: Landing, checksum: bytes = b""
    ) -> None:
        super().__init__(message_id, announce, link.peer)
        self.checksum: Final = checksum  #: that was verified; nothing: it came without
        self.path: Final[PathBytes] = landing.path  #: by which path its bytes came, the proof of it
        self.backend: Final = link.backend
        self._link = link
        self._landing = landing
        self._releasing = False
        self._lease = Lease(self._free)

    def gather(self, into: Any = None) -> DeviceArray:
        """Return the message as one contiguous array: where it lies if that is in one run, else a copy.

        Args:
            into: copy it there: a writable, contiguous array of as many bytes (NumPy, or what speaks DLPack on the
                CPU); None: a new one where a copy is needed.

        Raises:
            StaleFragError: the message was released.
            ValueError: ``into`` is read-only, not contiguous, or of another size.
        """
        self._lease.check()
        view = self._landing.contiguous() if into is None else None
        if view is not None:
            return DeviceArray(view, self.type, self.shape, self._announce.order, lease=self._lease)
        target = np.empty(self.nbytes, np.uint8).data if into is None else writable_bytes(into, self.nbytes)
        self._landing.copy_to(target)
        return DeviceArray(target, self.type, self.shape, self._announce.order)

    def fragments(self) -> Iterator[memoryview]:
        """Yield the bytes where they lie, run by run, in order: format B, not to be kept beyond ``release()``.

        Raises:
            StaleFragError: the message was released.
        """
        self._lease.check()
        return self._landing.pieces()

    def keep(self) -> None:
        """Let the sender send another in its place, though its memory is not given back yet.

        How many messages a receiver holds at a time is limited, besides their bytes: this is for a program that keeps
        many. From the thread that drives the receiver; idempotent.
        """
        self._link.count_off(self._landing)

    @property
    def released(self) -> bool:
        return self._lease.released

    def release(self) -> None:
        """Give the memory back, now or when the last array made of it goes. Idempotent."""
        self._releasing = True
        self._lease.release()
        self._releasing = False

    def _free(self) -> None:
        if self._releasing:
            self._link.engine.settle(self._link, self._landing)
        else:  # the last array was collected, in the middle of whatever the program does
            self._link.engine.give_back(self._link, self._landing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __repr__(self) -> str:
        state = ", released" if self.released else ""
        return f"<Message {self.name!r} {self.dtype} {self.shape}, {self.nbytes} bytes{state}>"


def writable_bytes(target: Any, nbytes: int) -> memoryview:
    """Return the bytes of an array that is to be written, format B, shape (nbytes,).

    Raises:
        ValueError: it is read-only, not contiguous, or of another size.
    """
    try:
        array = target if isinstance(target, np.ndarray) else np.asarray(target)
        if not (array.flags.c_contiguous or array.flags.f_contiguous):
            raise ValueError(f"the array to receive into, of strides {array.strides}, is not contiguous")
        if not array.flags.writeable:
            raise ValueError("the array to receive into is read-only")
    except TypeError as error:
        raise ValueError(f"cannot receive into a {type(target).__name__}: {error}") from None
    if array.nbytes != nbytes:
        raise ValueError(f"the array to receive into has {array.nbytes} bytes, the message {nbytes}")
    return array.reshape(-1, order="A").view(np.uint8).data
