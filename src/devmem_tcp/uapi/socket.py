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
_HEADER_WORDS: Final = CMSG_HEADER_SIZE // 8
_DMABUF_HEADER: Final = CMSGHDR.pack(CONTROL_SPACE_PER_FRAG, SOL_SOCKET, SCM_DEVMEM_DMABUF)
_DMABUF_WORD: Final = SOL_SOCKET | SCM_DEVMEM_DMABUF << 32  # cmsg_level and cmsg_type as one little-endian u64
_LINEAR_WORD: Final = SOL_SOCKET | SCM_DEVMEM_LINEAR << 32
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
    _check_length(control, length)
    count, rest = divmod(length, CONTROL_SPACE_PER_FRAG)
    if rest or count < _FEW_FRAGS:
        return _parse_one_by_one(control, length)
    words = np.frombuffer(control, "<u8", count * _WORDS_PER_RECORD).reshape(count, _WORDS_PER_RECORD)
    if _are_all_dmabuf(words):
        frags = _copy_frags(words)
        frags["kind"] = SCM_DEVMEM_DMABUF
        return frags
    linear = words[:, 1] == _LINEAR_WORD
    expected = (words[:, 0] == CONTROL_SPACE_PER_FRAG) & (linear | (words[:, 1] == _DMABUF_WORD))
    if not expected.all():
        return _parse_one_by_one(control, length)
    frags = _copy_frags(words)
    frags["kind"] = np.where(linear, SCM_DEVMEM_LINEAR, SCM_DEVMEM_DMABUF)
    at = linear.nonzero()[0]
    sizes = frags["size"][at]
    frags["offset"][at] = sizes.cumsum(dtype=np.uint64) - sizes
    frags["token"][at] = 0
    frags["dmabuf_id"][at] = 0
    return frags


# These two take one column after the other: NumPy is quick along a column, and slow over narrow rows.


def _are_all_dmabuf(words: npt.NDArray[np.uint64]) -> bool:
    """Whether all records, shape (n, 5) in words of 8 bytes, have the header of a DMABUF message."""
    first, second = _DMABUF_HEADER[:8] * len(words), _DMABUF_HEADER[8:] * len(words)
    return words[:, 0].tobytes() == first and words[:, 1].tobytes() == second


def _copy_frags(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.void]:
    """Copy the data of uniform records, shape (n, 5) in words of 8 bytes, to shape (n,), dtype FRAG_DTYPE."""
    data = np.empty((len(words), _WORDS_PER_RECORD - _HEADER_WORDS), np.uint64)
    for at in range(_WORDS_PER_RECORD - _HEADER_WORDS):
        data[:, at] = words[:, _HEADER_WORDS + at]
    return data.view(FRAG_DTYPE)[:, 0]


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
