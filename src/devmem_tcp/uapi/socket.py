"""Socket-level ABI of devmem TCP: include/uapi/asm-generic/socket.h and include/uapi/linux/uio.h, as data.

Control messages become columns of a structured array in one pass; no Python object is made per frag.
"""

from __future__ import annotations

from typing import Final

import numpy as np

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

DMABUF_CMSG_DTYPE: Final = np.dtype(
    [("frag_offset", "<u8"), ("frag_size", "<u4"), ("frag_token", "<u4"), ("dmabuf_id", "<u4"), ("flags", "<u4")]
)
"""struct dmabuf_cmsg, 24 bytes."""

TOKEN_DTYPE: Final = np.dtype([("start", "<u4"), ("count", "<u4")])
"""struct dmabuf_token, 8 bytes."""

CMSG_HEADER_SIZE: Final = 16  # struct cmsghdr on 64-bit Linux: u64 cmsg_len, i32 cmsg_level, i32 cmsg_type
CONTROL_SPACE_PER_FRAG: Final = CMSG_HEADER_SIZE + DMABUF_CMSG_DTYPE.itemsize  # CMSG_SPACE(24)
