"""Socket-level ABI of devmem TCP: include/uapi/asm-generic/socket.h and include/uapi/linux/uio.h, as data.

Control messages become columns of a structured array in one pass; no Python object is made per frag.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Buffer: TypeAlias = bytes | bytearray | memoryview

SOL_SOCKET: Final = 1
SO_ZEROCOPY: Final = 60
SO_INCOMING_NAPI_ID: Final = 56
SO_DEVMEM_LINEAR: Final = 78
SO_DEVMEM_DMABUF: Final = 79
SO_DEVMEM_DONTNEED: Final = 80
SCM_DEVMEM_LINEAR: Final = SO_DEVMEM_LINEAR
SCM_DEVMEM_DMABUF: Final = SO_DEVMEM_DMABUF
MSG_SOCK_DEVMEM: Final = 0x2000000
MSG_ZEROCOPY: Final = 0x4000000

MAX_DONTNEED_TOKENS: Final = 128  # ranges a call; net/core/sock.c, sock_devmem_dontneed
MAX_DONTNEED_FRAGS: Final = 1024  # tokens looked at in a call; the same
MAX_IOVECS: Final = 1024  # UIO_MAXIOV, include/uapi/linux/uio.h

CMSGHDR: Final = struct.Struct("<Qii")
"""struct cmsghdr of 64-bit Linux, 16 bytes: cmsg_len (header included), cmsg_level, cmsg_type."""

DMABUF_CMSG: Final = struct.Struct("<QIIII")
"""struct dmabuf_cmsg, 24 bytes: frag_offset, frag_size, frag_token, dmabuf_id, flags."""

DMABUF_TOKEN: Final = struct.Struct("<II")
"""struct dmabuf_token, 8 bytes: token_start, token_count."""

CMSGHDR_DTYPE: Final = np.dtype([("len", "<u8"), ("level", "<i4"), ("type", "<i4")])
"""struct cmsghdr as columns."""

DMABUF_CMSG_DTYPE: Final = np.dtype(
    [("frag_offset", "<u8"), ("frag_size", "<u4"), ("frag_token", "<u4"), ("dmabuf_id", "<u4"), ("flags", "<u4")]
)
"""struct dmabuf_cmsg, 24 bytes."""

TOKEN_DTYPE: Final = np.dtype([("start", "<u4"), ("count", "<u4")])
"""struct dmabuf_token, 8 bytes."""

FRAG_DTYPE: Final = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("token", "<u4"), ("dmabuf_id", "<u4"), ("kind", "<u4")]
)
"""What ``parse_control`` makes: equal to ``types.FRAG_DTYPE``, which lies above and cannot be imported from here.

Field for field struct dmabuf_cmsg, with ``kind`` (the control message's type) where the kernel has ``flags``, always 0.
So 24 bytes of a control message are a frag once ``kind`` is written over them.
"""

CMSG_HEADER_SIZE: Final = 16  # struct cmsghdr on 64-bit Linux: u64 cmsg_len, i32 cmsg_level, i32 cmsg_type
CONTROL_SPACE_PER_FRAG: Final = CMSG_HEADER_SIZE + DMABUF_CMSG_DTYPE.itemsize  # CMSG_SPACE(24)

_RECORD_DTYPE: Final = np.dtype([("header", CMSGHDR_DTYPE), ("frag", FRAG_DTYPE)])
_WORDS_PER_RECORD: Final = CONTROL_SPACE_PER_FRAG // 8
_DMABUF_WORD: Final = SOL_SOCKET | SCM_DEVMEM_DMABUF << 32  # cmsg_level and cmsg_type as one little-endian u64
_LINEAR_WORD: Final = SOL_SOCKET | SCM_DEVMEM_LINEAR << 32
_REPEATS: Final = 8192
_REPEATED: Final = {word: word.to_bytes(8, "little") * _REPEATS for word in (CONTROL_SPACE_PER_FRAG, _DMABUF_WORD)}
_CMSG_ALIGNMENT: Final = 8  # CMSG_ALIGN: sizeof(long)
_FEW_FRAGS: Final = 3  # below this many, a walk in Python is quicker than the fixed cost of NumPy calls
_MAX_U32: Final = 0xFFFFFFFF


def align_control(size: int) -> int:
    """Round a size in bytes up to the alignment of control messages; the kernel's CMSG_ALIGN."""
    return -(-size // _CMSG_ALIGNMENT) * _CMSG_ALIGNMENT


def walk_control(control: Buffer, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield every control message of an ancillary buffer as (level, type, start, end), the bytes of its data.

    Steps as CMSG_NXTHDR does: to the next multiple of 8, until there is no room for another header. The kernel leaves
    the padding after the last message out when it does not fit (net/core/scm.c, put_cmsg).

    Args:
        control: msg_control of a recvmsg, one contiguous range of bytes.
        length: msg_controllen as recvmsg left it, in bytes.

    Raises:
        ValueError: ``length`` is negative or more than ``control`` holds, a message is shorter than its header, or runs
            past ``length``. Messages before a bad one have been yielded by then.
    """
    _check_length(control, length)
    at = 0
    while length - at >= CMSG_HEADER_SIZE:
        size, level, kind = CMSGHDR.unpack_from(control, at)
        if size < CMSG_HEADER_SIZE:
            raise ValueError(
                f"control message at byte {at}: length {size} is less than its header's {CMSG_HEADER_SIZE}"
            )
        end = at + size
        if end > length:
            raise ValueError(f"control message at byte {at}: its {size} bytes run past the end at byte {length}")
        yield level, kind, at + CMSG_HEADER_SIZE, end
        at = align_control(end)


def parse_control(control: Buffer, length: int) -> npt.NDArray[np.void]:
    """Parse the control messages of one recvmsg(MSG_SOCK_DEVMEM) into frags, shape (n,), dtype FRAG_DTYPE.

    The columns are a copy: ``control`` may be used for the next recvmsg. ``offset`` of a LINEAR frag is where it starts
    in the iov, in bytes: LINEAR payload is packed there in order, and the kernel says nothing in frag_offset. Its
    token and dmabuf_id are 0. Control messages of other levels or types (timestamps, TCP_CM_INQ) are passed over.

    Kernel: net/ipv4/tcp.c, tcp_recvmsg_dmabuf.

    Args:
        control: msg_control, one contiguous range of bytes.
        length: msg_controllen as recvmsg left it, in bytes.

    Raises:
        ValueError: as ``walk_control``, or a devmem message shorter than struct dmabuf_cmsg.
    """
    return ControlColumns(control).parse(length)


class ControlColumns:
    """A control buffer that is used for one recvmsg after another: its columns are cut once, and read every time.

    What a call into NumPy costs after a wait, with the processor's caches cold, is many times what it does: so there
    are few, and the same ones for any number of frags. They go along columns, as NumPy is slow over narrow rows.

    Args:
        control: one contiguous range of bytes; kept.
    """

    __slots__ = ("_control", "_data", "_lengths", "_types")

    def __init__(self, control: Buffer) -> None:
        self._control = control
        count = memoryview(control).nbytes // CONTROL_SPACE_PER_FRAG
        words = np.frombuffer(control, "<u8", count * _WORDS_PER_RECORD).reshape(count, _WORDS_PER_RECORD)
        halves = words.view("<u4")
        self._lengths, self._types = words[:, 0], words[:, 1]
        # As a frag has them: frag_offset; frag_size and frag_token; dmabuf_id; cmsg_type.
        self._data = (words[:, 2], words[:, 3], halves[:, 8], halves[:, 3])

    def parse(self, length: int) -> npt.NDArray[np.void]:
        """Parse what one recvmsg left in the buffer; see ``parse_control``."""
        count, rest = divmod(length, CONTROL_SPACE_PER_FRAG)
        if rest or not _FEW_FRAGS <= count <= len(self._lengths):
            return _parse_one_by_one(self._control, length)
        lengths, types = self._lengths[:count], self._types[:count]
        if _are_all(lengths, CONTROL_SPACE_PER_FRAG) and _are_all(types, _DMABUF_WORD):
            return self._copy(count)
        linear = types == _LINEAR_WORD
        expected = (lengths == CONTROL_SPACE_PER_FRAG) & (linear | (types == _DMABUF_WORD))
        if not expected.all():
            return _parse_one_by_one(self._control, length)
        frags = self._copy(count)
        at = linear.nonzero()[0]
        sizes = frags["size"][at]
        frags["offset"][at] = sizes.cumsum(dtype=np.uint64) - sizes
        frags["token"][at] = 0
        frags["dmabuf_id"][at] = 0
        return frags

    def _copy(self, count: int) -> npt.NDArray[np.void]:
        frags = np.empty(count, FRAG_DTYPE)
        at = 0
        for column in self._data:
            frags.setfield(column[:count], column.dtype, at)
            at += column.itemsize
        return frags


def _are_all(column: npt.NDArray[np.uint64], word: int) -> bool:
    """Whether all of a column, shape (n,), are one of the two words of a DMABUF message's header."""
    repeated = _REPEATED[word] if len(column) <= _REPEATS else word.to_bytes(8, "little") * len(column)
    return repeated.startswith(column.tobytes())


def _parse_one_by_one(control: Buffer, length: int) -> npt.NDArray[np.void]:
    """Do the work of ``parse_control`` for a buffer that is not an array of equal records, or a very short one."""
    rows: list[tuple[int, int, int, int, int]] = []
    linear_end = 0
    for level, kind, start, end in walk_control(control, length):
        if level != SOL_SOCKET or kind not in (SCM_DEVMEM_DMABUF, SCM_DEVMEM_LINEAR):
            continue
        if end - start < DMABUF_CMSG.size:
            raise ValueError(
                f"control message at byte {start - CMSG_HEADER_SIZE}: {end - start} bytes of data are less than"
                f" struct dmabuf_cmsg's {DMABUF_CMSG.size}"
            )
        offset, size, token, dmabuf_id, _ = DMABUF_CMSG.unpack_from(control, start)
        if kind == SCM_DEVMEM_LINEAR:
            offset, token, dmabuf_id = linear_end, 0, 0
            linear_end += size
        rows.append((offset, size, token, dmabuf_id, kind))
    return np.array(rows, FRAG_DTYPE)


def build_control(frags: npt.NDArray[np.void]) -> bytes:
    """Build the control messages that the kernel would give for ``frags``: the inverse of ``parse_control``.

    Kernel: net/ipv4/tcp.c, tcp_recvmsg_dmabuf. A LINEAR message carries its size and zeros.

    Args:
        frags: shape (n,), dtype FRAG_DTYPE; DMABUF and LINEAR frags alone.

    Raises:
        ValueError: a frag of another kind: ordinary payload (HOST) has no control message.
    """
    linear = frags["kind"] == SCM_DEVMEM_LINEAR
    strange = ~(linear | (frags["kind"] == SCM_DEVMEM_DMABUF))
    if strange.any():
        at = int(strange.argmax())
        raise ValueError(f"frag {at} is of kind {frags['kind'][at]}, which no control message stands for")
    records = np.empty(len(frags), _RECORD_DTYPE)
    records["header"]["len"] = CONTROL_SPACE_PER_FRAG
    records["header"]["level"] = SOL_SOCKET
    records["header"]["type"] = frags["kind"]
    records["frag"] = frags
    records["frag"]["kind"] = 0  # here the kernel's flags
    for column in ("offset", "token", "dmabuf_id"):
        records["frag"][column][linear] = 0
    return records.tobytes()


def pack_tokens(starts: npt.ArrayLike, counts: npt.ArrayLike) -> npt.NDArray[np.void]:
    """Pack token ranges for SO_DEVMEM_DONTNEED, shape (n,), dtype TOKEN_DTYPE; its bytes are the option's value.

    Args:
        starts, counts: first token and number of tokens of each range, integers of 32 bits, shape (n,).

    Raises:
        ValueError: the shapes differ or are not (n,), or a number does not fit 32 bits unsigned.
        TypeError: something other than integers.
    """
    columns = [_as_u32(starts, "starts"), _as_u32(counts, "counts")]
    if columns[0].shape != columns[1].shape:
        raise ValueError(f"{len(columns[0])} starts, but {len(columns[1])} counts")
    tokens = np.empty(len(columns[0]), TOKEN_DTYPE)
    tokens["start"], tokens["count"] = columns
    return tokens


def _as_u32(numbers: npt.ArrayLike, name: str) -> npt.NDArray[np.integer[Any]]:
    column = np.asarray(numbers)
    if column.ndim != 1:
        raise ValueError(f"{name} must be of shape (n,), not {column.shape}")
    if column.size == 0:
        return np.empty(0, np.uint32)  # an empty list is an array of floats to NumPy
    if column.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers of 32 bits, not {column.dtype}")
    if column.dtype != np.uint32 and (column.min() < 0 or column.max() > _MAX_U32):
        raise ValueError(f"{name} must be from 0 to {_MAX_U32}")
    return column


def _check_length(control: Buffer, length: int) -> None:
    size = memoryview(control).nbytes
    if not 0 <= length <= size:
        raise ValueError(f"control length {length} is not within the {size} bytes of the buffer")
