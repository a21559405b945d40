"""Device memory: one Allocator for each kind. Nothing here knows a NIC or a socket."""

from devmem_tcp.memory.dmaheap import DmaHeap
from devmem_tcp.memory.host import Host, HostKind, Hugepages
from devmem_tcp.memory.udmabuf import Udmabuf

__all__ = ["DmaHeap", "Host", "HostKind", "Hugepages", "Udmabuf"]
