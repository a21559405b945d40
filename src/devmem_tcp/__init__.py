"""Device Memory TCP for Python: TCP payload received straight into device memory, and sent from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devmem_tcp import errors, memory
from devmem_tcp.buffers import Allocator, Buffer, CpuAccess
from devmem_tcp.contract import DevmemSocket, Listener, Nic, NtupleRule, Place, RxBinding, Setting, TxBinding
from devmem_tcp.doors import Backend, open_nic
from devmem_tcp.errors import DevmemError
from devmem_tcp.gather import gather
from devmem_tcp.software.options import SoftwareOptions
from devmem_tcp.types import (
    Capabilities,
    CompletionRange,
    DmabufFrag,
    Family,
    FlowRule,
    FragBatch,
    FragKind,
    HeaderSplitMode,
    HostFrag,
    LinearFrag,
    NicStats,
    QueueStats,
    SocketStats,
    TokenHolder,
)

if TYPE_CHECKING:
    from devmem_tcp.transport import (
        Header,
        KeepAlive,
        Message,
        Receiver,
        Sender,
        Sent,
        Series,
        Slot,
        open_receiver,
        open_sender,
    )

__version__ = "0.1.0"
__all__ = [
    "Allocator",
    "Backend",
    "Buffer",
    "Capabilities",
    "CompletionRange",
    "CpuAccess",
    "DevmemError",
    "DevmemSocket",
    "DmabufFrag",
    "Family",
    "FlowRule",
    "FragBatch",
    "FragKind",
    "Header",
    "HeaderSplitMode",
    "HostFrag",
    "KeepAlive",
    "LinearFrag",
    "Listener",
    "Message",
    "Nic",
    "NicStats",
    "NtupleRule",
    "Place",
    "QueueStats",
    "Receiver",
    "RxBinding",
    "Sender",
    "Sent",
    "Series",
    "Setting",
    "Slot",
    "SocketStats",
    "SoftwareOptions",
    "TokenHolder",
    "TxBinding",
    "errors",
    "gather",
    "memory",
    "open_nic",
    "open_receiver",
    "open_sender",
]

_TENSORS = frozenset(
    ("Header", "KeepAlive", "Message", "Receiver", "Sender", "Sent", "Series", "Slot", "open_receiver", "open_sender")
)
"""What is imported when it is first asked for: programs of frags, and the commands, start a fifth sooner without."""


def __getattr__(name: str) -> Any:
    if name not in _TENSORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from devmem_tcp import transport

    globals()[name] = found = getattr(transport, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_TENSORS})
