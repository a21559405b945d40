"""Frozen values that cross the contract: frags and their batch, NIC rules, statistics, reports. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from devmem_tcp.errors import StaleFragError
from devmem_tcp.uapi.socket import SCM_DEVMEM_DMABUF, SCM_DEVMEM_LINEAR

U8Array: TypeAlias = npt.NDArray[np.uint8]
U32Array: TypeAlias = npt.NDArray[np.uint32]
U64Array: TypeAlias = npt.NDArray[np.uint64]
FragArray: TypeAlias = npt.NDArray[np.void]
TokenRangeArray: TypeAlias = npt.NDArray[np.void]
Address: TypeAlias = tuple[str, int]

PAGE_SIZE: Final = 4096


class FragKind(IntEnum):
    """Where a piece of payload landed. The numbers are the control message types; 0 stands for no control message."""

    HOST = 0
    LINEAR = SCM_DEVMEM_LINEAR
    DMABUF = SCM_DEVMEM_DMABUF


FRAG_DTYPE: Final = np.dtype(
    [
        ("offset", "<u8"),  # DMABUF: into the dma-buf; LINEAR and HOST: into FragBatch.inline. Bytes.
        ("size", "<u4"),  # bytes
        ("token", "<u4"),  # DMABUF: from 1, per socket; else 0
        ("dmabuf_id", "<u4"),  # DMABUF: which binding; else 0
        ("kind", "<u4"),  # FragKind
    ]
)


class DmabufFrag(NamedTuple):
    """A piece of payload in device memory: ``size`` bytes at ``offset`` of the dma-buf bound as ``dmabuf_id``."""

    offset: int
    size: int
    token: int
    dmabuf_id: int


class LinearFrag(NamedTuple):
    """A piece of a devmem packet that landed in the NIC's header buffer, so in host memory (``data``)."""

    data: memoryview


class HostFrag(NamedTuple):
    """Ordinary payload in host memory (``data``): the flow was not steered to a bound queue, or not split."""

    data: memoryview


Frag: TypeAlias = DmabufFrag | LinearFrag | HostFrag


@dataclass(frozen=True, slots=True)
class TokenRange:
    """One struct dmabuf_token: ``count`` tokens from ``start`` on."""

    start: int
    count: int


class BatchOwner(Protocol):
    """What a FragBatch needs of the socket that made it."""

    @property
    def closed(self) -> bool: ...

    def release(self, batch: FragBatch) -> None: ...


class FragBatch:
    """One recvmsg(MSG_SOCK_DEVMEM): frags as columns, in TCP order. Falsy means end of stream.

    Columns are views of ``frags``, a structured array of shape (n,) and dtype FRAG_DTYPE. ``inline`` holds the bytes of
    LINEAR and HOST frags, packed in order; it and the frags' device memory may be read until ``release()``, which is
    also the exit of ``with``. After that every column raises StaleFragError.

    Lifetime: holds its socket; the socket's ``close()`` makes the batch stale.
    """

    __slots__ = ("__weakref__", "_ended", "_frags", "_inline", "_owner", "nbytes")

    def __init__(self, frags: FragArray, nbytes: int, inline: memoryview, owner: BatchOwner | None) -> None:
        self._frags = frags
        self._inline = inline
        self._owner = owner
        self._ended = False
        self.nbytes = nbytes  #: payload bytes in all frags

    @property
    def frags(self) -> FragArray:
        """All columns: shape (n,), dtype FRAG_DTYPE."""
        self._check_live()
        return self._frags

    def _check_live(self) -> None:
        if self._ended or (self._owner is not None and self._owner.closed):
            raise StaleFragError(
                "this batch was released, or its socket closed: its memory went back to the NIC",
                hint="copy or gather() before release() and before the socket's close()",
            )

    @property
    def inline(self) -> memoryview:
        """Bytes of LINEAR and HOST frags in order; their ``offsets`` count from its start."""
        self._check_live()
        return self._inline

    @property
    def offsets(self) -> U64Array:
        """Offsets in bytes, shape (n,), uint64: into the dma-buf for DMABUF frags, into ``inline`` for others."""
        return self.frags["offset"]

    @property
    def sizes(self) -> U32Array:
        """Sizes in bytes, shape (n,), uint32."""
        return self.frags["size"]

    @property
    def tokens(self) -> U32Array:
        """Tokens, shape (n,), uint32; 0 for frags that are not in device memory."""
        return self.frags["token"]

    @property
    def kinds(self) -> U32Array:
        """FragKind of each frag, shape (n,), uint32."""
        return self.frags["kind"]

    @property
    def dmabuf_ids(self) -> U32Array:
        """Binding of each frag, shape (n,), uint32; 0 for frags that are not in device memory."""
        return self.frags["dmabuf_id"]

    @property
    def released(self) -> bool:
        return self._ended

    def release(self) -> None:
        """Return every token of the batch (SO_DEVMEM_DONTNEED, in as few calls as its limits allow). Idempotent."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.release(self)
        self._ended = True

    def __len__(self) -> int:
        return len(self._frags)

    def __bool__(self) -> bool:
        return self.nbytes > 0

    def __iter__(self) -> Iterator[Frag]:
        """Iterate typed frags; for reading and tests: at speed, use the columns."""
        inline = self.inline
        for offset, size, token, dmabuf_id, kind in self.frags.tolist():
            if kind == FragKind.DMABUF:
                yield DmabufFrag(offset, size, token, dmabuf_id)
            elif kind == FragKind.LINEAR:
                yield LinearFrag(inline[offset : offset + size])
            else:
                yield HostFrag(inline[offset : offset + size])

    def __enter__(self) -> FragBatch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self._ended else f"{len(self)} frags"
        return f"<FragBatch {self.nbytes} bytes, {state}>"


class HeaderSplitMode(Enum):
    """ethtool's tcp-data-split."""

    UNKNOWN = "unknown"
    OFF = "off"
    ON = "on"


class Family(Enum):
    """Which IP version a flow rule is for; the values are ethtool's flow types for TCP."""

    TCP4 = "tcp4"
    TCP6 = "tcp6"


@dataclass(frozen=True, slots=True)
class FlowRule:
    """One ntuple rule: TCP packets that match every given field go to RX ``queue``.

    ``None`` matches anything. An address may carry a mask in CIDR form (``10.0.0.0/8``); a port may carry one in
    ``port_mask``s, where 1 bits must match. ``location`` is the rule's place in the table: lowest wins; None: the last
    free one, as ethtool does. ``family`` None: both IP versions (two rules on a real NIC).
    """

    queue: int
    family: Family | None = None
    src_ip: str | None = None
    dst_ip: str | None = None
    src_port: int | None = None
    dst_port: int | None = None
    src_port_mask: int = 0xFFFF
    dst_port_mask: int = 0xFFFF
    location: int | None = None


class CompletionRange(NamedTuple):
    """Sends ``low`` to ``high`` inclusive (32-bit numbers, may wrap) are complete: ee_info and ee_data."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do. Tests and callers declare needs by these, never by a backend's name."""

    backend: str
    zero_copy: bool  # payload really by-passes host memory
    unprivileged_bind: bool  # bind_rx without CAP_NET_ADMIN
    rx_page_size: bool  # bind_rx(rx_page_size=) other than 4096
    hds_thresh: bool  # set_hds_thresh
    loopback: bool  # devmem over 127.0.0.1 and ::1
    merged_frags: bool  # adjacent pages arrive as one frag
    queue_shares: bool  # each queue of a binding has a share of its pages that no other queue can use up
    placement: bool  # payload can be received into one contiguous run of the Buffer: RxBinding.reserve
    rx_queues: int
    rss_table_size: int
    settings: bool = True  # header split, RSS and ntuple rules can be set; of leased queues they are the host's to set


@dataclass(frozen=True, slots=True)
class SocketStats:
    """The proof of path of one socket: bytes by where they landed or came from, since it was made."""

    backend: str
    dmabuf_bytes: int
    linear_bytes: int
    host_bytes: int
    frags: int
    recv_calls: int
    dontneed_calls: int
    tokens_out: int
    sent_dmabuf_bytes: int
    sent_host_bytes: int
    send_calls: int  # of send_frags
    sends_incomplete: int
    congestion_control: str


@dataclass(frozen=True, slots=True)
class QueueStats:
    """One RX queue: netdev qstats-get and page-pool-get, as far as they concern devmem."""

    queue: int
    dmabuf_id: int  # 0: not bound
    rx_bytes: int
    rx_alloc_fail: int
    pages_total: int
    pages_inflight: int


@dataclass(frozen=True, slots=True)
class TokenHolder:
    """A socket that holds tokens: who holds how many, and since when the oldest is out."""

    queue: int
    local: Address
    remote: Address
    tokens: int
    bytes_held: int
    oldest_age_s: float


@dataclass(frozen=True, slots=True)
class NicStats:
    """One NIC: its queues, and who holds tokens on them."""

    nic: str
    backend: str
    queues: tuple[QueueStats, ...]
    holders: tuple[TokenHolder, ...]


class Severity(Enum):
    """How bad a probe's finding is."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ProbeCheck:
    """One check of probe: what was looked at, found, needed, and the command that mends it."""

    name: str
    severity: Severity
    found: str
    needed: str
    fix: str


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Every check of one probe, in order."""

    checks: tuple[ProbeCheck, ...]

    @property
    def ok(self) -> bool:
        return all(check.severity is not Severity.ERROR for check in self.checks)
