"""What Linux refuses in devmem TCP, why, and what to type next: one table for both backends and the doctor.

A refusal is recognised by its call, errno, extack and attribute. The words of ``extack`` are the kernel's. In them and
in attributes ``…`` stands for what varies. In ``fix``, NIC stands for the interface's name.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Final, TypeVar

from devmem_tcp.errors import KernelError

Raised = TypeVar("Raised", bound=KernelError)

VARIES: Final = "…"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One way in which the kernel says no."""

    call: str  # the operation: the last word of KernelError.call
    errno: int
    cause: str  # for people
    fix: str  # the next thing to type or do
    source: str  # where the kernel decides so: file, function
    extack: str = ""  # the kernel's words; "": it says nothing
    attr: str = ""  # the bad or missing attribute; "": none is named

    def explains(self, error: KernelError) -> bool:
        """Whether ``error`` is this refusal."""
        return (
            self.errno == error.errno
            and self.call == error.call.rpartition(" ")[2]
            and _matches(error.extack, self.extack)
            and _matches(error.attr, self.attr)
        )

    def error(self, kind: type[Raised], *, call: str = "", hint: str = "") -> Raised:
        """Make the error for this refusal, as a model of the kernel raises it.

        Args:
            call, hint: instead of the table's, where the caller can say more.
        """
        return kind(self.errno, call or self.call, extack=self.extack, attr=self.attr, hint=hint or self.fix)


def find(error: KernelError) -> Refusal | None:
    """Return what explains an error, by the exact words where there are such; None if the table has nothing to say."""
    found = [refusal for refusal in REFUSALS if refusal.explains(error)]
    return min(found, key=lambda refusal: VARIES in refusal.extack + refusal.attr, default=None)


def _matches(text: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(VARIES, ".*"), text) is not None


_GENL: Final = "net/core/netdev-genl.c"
_QUEUE: Final = "net/core/netdev_rx_queue.c, __netif_mp_open_rxq"
_BIND: Final = "net/core/devmem.c, net_devmem_bind_dmabuf"
_BIND_RX: Final = "net/core/netdev-genl.c, netdev_nl_bind_rx_doit"
_BIND_TX: Final = "net/core/netdev-genl.c, netdev_nl_bind_tx_doit"
_QUEUES: Final = "net/core/netdev-genl.c, netdev_nl_read_rxq_bitmap"
_RESTART: Final = "net/core/netdev_rx_queue.c, netdev_rx_queue_restart"
_RINGS: Final = "net/ethtool/rings.c, ethnl_set_rings"
_CREATE: Final = "net/core/netdev-genl.c, netdev_nl_queue_create_doit"
_CAN_CREATE: Final = "net/core/netdev_queues.c, netdev_can_create_queue"
_CAN_LEASE: Final = "net/core/netdev_queues.c, netdev_can_lease_queue"
_QUEUE_BUSY: Final = "net/core/netdev_queues.c, netdev_queue_busy"
_GENERIC: Final = "net/netlink/genetlink.c, genl_family_rcv_msg"

_NAME_THE_NIC: Final = "ip -brief link   # the interfaces of this network namespace"
_UNBIND: Final = "close the RX bindings of this NIC first"
_OTHER_NIC: Final = "use a NIC whose driver has queue management: gve, bnxt, mlx5 (ConnectX-7 and later), fbnic"

HEADER_SPLIT_OFF: Final = Refusal(
    "bind-rx",
    errno.EINVAL,
    "header split is off, or left to the driver",
    'nic.set_header_split("on")   # ethtool -G NIC tcp-data-split on',
    _QUEUE,
    extack="tcp-data-split is disabled",
)
HDS_THRESH_SET: Final = Refusal(
    "bind-rx",
    errno.EINVAL,
    "packets up to hds-thresh bytes are not split",
    "nic.set_hds_thresh(0)   # ethtool -G NIC hds-thresh 0",
    _QUEUE,
    extack="hds-thresh is not zero",
)
QUEUE_BOUND: Final = Refusal(
    "bind-rx",
    errno.EEXIST,
    "the RX queue has a binding: of devmem TCP, or of io_uring's zero copy",
    "close that binding, or take another queue",
    _QUEUE,
    extack="designated queue already memory provider bound",
)
GVE_FIRST_QUEUE: Final = Refusal(  # asking makes Linux 7.3 warn in its log: do not ask where the driver is gve
    "bind-rx",
    errno.ERANGE,
    "the driver does not let this RX queue be restarted: gve not its queue 0",
    "bind another queue: for gve, 1 or higher, of at least two (ethtool -l NIC)",
    "drivers/net/ethernet/google/gve/gve_main.c, gve_rx_queue_stop",
)
NO_QUEUES: Final = Refusal(
    "bind-rx", errno.EINVAL, "no RX queue was named", "name at least one RX queue", _BIND_RX, attr="queues"
)
PAGE_SIZE_NO_POWER: Final = Refusal(
    "bind-rx",
    errno.EINVAL,
    "rx_page_size is no power of two",
    "take 4096, 8192, 16384, …, as far as the NIC's driver goes",
    _BIND_RX,
    extack="rx-page-size must be a power of 2",
    attr="rx-page-size",
)
HEADER_SPLIT_NEEDED: Final = Refusal(
    "rings-set",
    errno.EINVAL,
    "a queue of this NIC is bound, and bound queues need header split",
    _UNBIND,
    _RINGS,
    extack="can't disable tcp-data-split while device has memory provider enabled",
)
QUEUES_NEEDED: Final = Refusal(
    "channels-set",
    errno.EINVAL,
    "a queue that would go is bound",
    _UNBIND,
    "net/ethtool/common.c, ethtool_check_max_channel",
    extack="requested channel counts are too low for existing memory provider setting (…)",
)
HEADER_SPLIT_XDP: Final = Refusal(
    "rings-set",
    errno.EINVAL,
    "an XDP program is attached that wants packets in one piece",
    "ip link set dev NIC xdp off   # xdpgeneric off, if it is a generic one",
    _RINGS,
    extack="tcp-data-split can not be enabled with single buffer XDP",
    attr="tcp-data-split",
)
HDS_THRESH_NEEDED: Final = Refusal(
    "rings-set",
    errno.EINVAL,
    "a queue of this NIC is bound, and bound queues need hds-thresh 0",
    _UNBIND,
    _RINGS,
    extack="can't set non-zero hds_thresh while device is memory provider enabled",
)

REFUSALS: Final = (
    HEADER_SPLIT_OFF,
    HDS_THRESH_SET,
    QUEUE_BOUND,
    NO_QUEUES,
    PAGE_SIZE_NO_POWER,
    HEADER_SPLIT_NEEDED,
    HEADER_SPLIT_XDP,
    QUEUES_NEEDED,
    HDS_THRESH_NEEDED,
    # bind-rx: the request
    Refusal(
        "bind-rx",
        errno.EPERM,
        "binding needs CAP_NET_ADMIN over the NIC's network namespace; receiving does not",
        "run as root, or: setcap cap_net_admin+ep PROGRAM",
        _GENERIC,
    ),
    *(
        Refusal(call, errno.ENODEV, "no such NIC in this network namespace", _NAME_THE_NIC, _GENL, attr=VARIES)
        for call in ("bind-rx", "bind-tx", "dev-get", "queue-get", "napi-get", "qstats-get", "queue-create")
    ),
    Refusal(
        "bind-rx",
        errno.EOPNOTSUPP,
        "the NIC's driver cannot restart single queues (queue management), so none can be bound",
        _OTHER_NIC,
        _BIND_RX,
        attr="ifindex",
    ),
    Refusal(
        "bind-rx",
        errno.EINVAL,
        "the NIC has no RX queue of that number",
        "ethtool -l NIC   # how many there are; the first is 0",
        _QUEUES,
        attr="queues.id",
    ),
    Refusal(
        "bind-rx", errno.EINVAL, "only RX queues can be bound", "name RX queues alone", _QUEUES, attr="queues.type"
    ),
    Refusal(
        "bind-rx",
        errno.ERANGE,
        "rx_page_size is below the machine's page size",
        "take 4096 or more, a power of two",
        "net/core/netdev-genl-gen.c, netdev_bind_rx_nl_policy",
        extack="integer out of range",
        attr="rx-page-size",
    ),
    Refusal(
        "bind-rx",
        errno.EOPNOTSUPP,
        "the NIC's driver knows no other page size than 4096",
        "leave rx_page_size at 4096",
        _QUEUE,
        extack="device does not support: rx_page_size",
    ),
    Refusal(
        "bind-rx",
        errno.EINVAL,
        "this kernel is too old for rx_page_size",
        "leave rx_page_size at 4096, or boot a newer kernel",
        "lib/nlattr.c, __nla_validate_parse",
        extack="Unknown attribute type",
        attr="rx-page-size",
    ),
    # bind-rx: the queue
    GVE_FIRST_QUEUE,
    Refusal(
        "bind-rx",
        errno.ERANGE,
        "the NIC has no RX queue of that number",
        "ethtool -l NIC   # how many there are; the first is 0",
        _QUEUE,
        extack="rx queue index out of range",
    ),
    Refusal(
        "bind-rx",
        errno.EEXIST,
        "an XDP program is attached to the NIC, which would read what the CPU cannot",
        "ip link set dev NIC xdp off   # xdpgeneric off, if it is a generic one",
        _QUEUE,
        extack="unable to custom memory provider to device with XDP program attached",
    ),
    Refusal(
        "bind-rx",
        errno.EBUSY,
        "an AF_XDP socket uses the RX queue",
        "end the program that has the AF_XDP socket, or take another queue",
        _QUEUE,
        extack="designated queue already in use by AF_XDP",
    ),
    Refusal(
        "bind-rx",
        errno.EBUSY,
        "the RX queue is leased to a virtual interface",
        "bind by that interface, or take another queue",
        _QUEUE,
        extack="rx queue peered to a virtual netdev",
    ),
    Refusal(
        "bind-rx",
        errno.EBUSY,
        "the lease of the RX queue ends at a virtual interface",
        "lease a queue of a physical NIC",
        _QUEUE,
        extack="rx queue is mapped to a virtual netdev",
    ),
    Refusal(
        "bind-rx",
        errno.EOPNOTSUPP,
        "the RX queues reach memory by different devices (multi-PF)",
        "bind the queues of one device, and those of the other by a binding of their own",
        "net/core/netdev-genl.c, netdev_nl_get_dma_dev",
        extack="DMA device mismatch between queue …",
    ),
    Refusal(
        "bind-rx",
        errno.EAGAIN,
        "the NIC is down or being reset, and its driver binds only while it is up",
        "ip link set dev NIC up",
        "drivers/net/ethernet/google/gve/gve_main.c, gve_rx_queue_mem_alloc",
    ),
    Refusal(
        "bind-rx",
        errno.ENODATA,
        "the driver made no page pool on the dma-buf: it does not support memory that the CPU cannot read",
        "check that header split is on (ethtool -g NIC); else use another NIC or a newer driver",
        "net/core/page_pool_user.c, page_pool_check_memory_provider",
    ),
    Refusal(
        "bind-rx",
        errno.E2BIG,
        "the driver's page pool wants pages larger than those of the dma-buf's binding",
        "lower the NIC's MTU to 4096 or less, or leave rx_page_size at 4096",
        "net/core/devmem.c, mp_dmabuf_devmem_init",
    ),
    # bind-rx and bind-tx: the memory
    *(
        refusal
        for call in ("bind-rx", "bind-tx")
        for refusal in (
            Refusal(call, errno.EBADF, "the fd is not open", "give the fd of a dma-buf that is open", _BIND),
            Refusal(
                call,
                errno.EINVAL,
                "the fd is open, and is no dma-buf",
                "give the fd of a dma-buf: memory.Udmabuf, DmaHeap or Cuda make some",
                _BIND,
            ),
            Refusal(
                call,
                errno.EOPNOTSUPP,
                "the NIC cannot reach memory by itself (DMA), or the RX queue is leased to a virtual interface",
                "bind by the interface that has the queue (netdev.queues says which), or take another queue or NIC",
                _BIND,
                extack="Device doesn't support DMA",
            ),
            *(
                Refusal(
                    call,
                    number,
                    "the maker of the dma-buf will not let this NIC reach it",
                    "take memory that this NIC can reach: of a GPU under the same PCIe root, or memory.Udmabuf",
                    _BIND,
                    extack=extack,
                )
                for extack in ("Failed to bind dmabuf to device", "Failed to map dmabuf attachment")
                for number in (errno.EINVAL, errno.EOPNOTSUPP, errno.EIO, errno.EREMOTEIO)
            ),
            *(
                Refusal(
                    call,
                    errno.EINVAL,
                    "the memory, or a piece of it, is no whole number of RX pages",
                    "allocate a multiple of rx_page_size, in huge pages if that is above 4096",
                    _BIND,
                    extack=extack,
                )
                for extack in (
                    "dmabuf sg entry …",  # Linux ends formatted words after 80 characters
                    "dmabuf size …",
                    "dma-buf SG length must be PAGE_SIZE aligned",
                )
            ),
            Refusal(
                call, errno.ENOMEM, "no memory for the kernel's own records", "free memory, or bind less of it", _BIND
            ),
        )
    ),
    # bind-tx
    Refusal(
        "bind-tx",
        errno.EOPNOTSUPP,
        "the NIC's driver cannot send from device memory",
        "send from host memory (sock.send), or use a NIC whose driver can: gve in DQO mode, mlx5, fbnic",
        _BIND_TX,
        extack="Driver does not support netmem TX",
    ),
    Refusal(
        "bind-tx",
        errno.EOPNOTSUPP,
        "the virtual interface has no leased queue of a NIC that can send from device memory",
        "lease a queue of such a NIC to it first",
        _BIND_TX,
        extack="No DMA-capable device found for netmem TX",
    ),
    Refusal(
        "bind-tx",
        errno.EOPNOTSUPP,
        "this kernel cannot send from device memory",
        "boot Linux 6.16 or newer, or send from host memory (sock.send)",
        _GENERIC,
    ),
    # leasing queues
    Refusal(
        "queue-create",
        errno.EPERM,
        "leasing queues needs CAP_NET_ADMIN, in the first user namespace",
        "run as root on the host, not in a container",
        _GENERIC,
    ),
    Refusal(
        "queue-create",
        errno.EOPNOTSUPP,
        "this kernel has no leasing of queues",
        "boot a newer kernel, or bind in the network namespace that the NIC is in",
        _GENERIC,
    ),
    Refusal(
        "queue-create",
        errno.EOPNOTSUPP,
        "of a netkit pair, only the second interface takes queues",
        "name the second interface, or make a single one (mode single)",
        "drivers/net/netkit.c, netkit_queue_create",
        extack="netkit can only lease against the peer device",
    ),
    Refusal(
        "queue-create",
        errno.EINVAL,
        "the virtual interface was made with room for no further RX queue",
        "make it anew, with a larger numrxqueues",
        "drivers/net/netkit.c, netkit_queue_create",
        extack="netkit maximum queue limit reached",
    ),
    Refusal(
        "queue-create",
        errno.EINVAL,
        "queues are leased to a virtual interface, not to a NIC",
        "name a netkit interface",
        _CAN_CREATE,
        extack="Device is not a virtual device",
    ),
    Refusal(
        "queue-create",
        errno.EINVAL,
        "this kind of virtual interface takes no leased queues",
        "name the second interface of a netkit pair",
        _CAN_CREATE,
        extack="Device does not support queue creation",
    ),
    Refusal(
        "queue-create",
        errno.EINVAL,
        "only queues of a physical NIC can be leased",
        _NAME_THE_NIC,
        _CAN_LEASE,
        extack="Lease device is a virtual device",
    ),
    Refusal(
        "queue-create",
        errno.EINVAL,
        "the NIC's driver cannot restart single queues (queue management), so none can be leased",
        _OTHER_NIC,
        _CAN_LEASE,
        extack="Lease device does not support queue management operations",
    ),
    Refusal(
        "queue-create",
        errno.ERANGE,
        "the NIC has no RX queue of that number",
        "ethtool -l NIC   # how many there are; the first is 0",
        _CREATE,
        attr="lease.queue.id",
    ),
    *(
        Refusal("queue-create", errno.EBUSY, cause, "take another queue, or end that use of it", _QUEUE_BUSY, extack)
        for cause, extack in (
            ("the queue is leased already", "… due to queue leasing"),
            ("the queue is leased already", "Lease device queue is already leased"),
            ("an AF_XDP socket uses the queue", "… queue in use by AF_XDP"),
            ("the queue has a binding", "… queue in use by memory provider"),
        )
    ),
    Refusal(
        "queue-create",
        errno.EOPNOTSUPP,
        "an interface takes queues of one NIC only",
        "lease to another interface",
        _CREATE,
        extack="Leasing queues from different devices not supported",
    ),
    # statistics
    Refusal(
        "qstats-get",
        errno.EOPNOTSUPP,
        "the driver keeps no statistics of queues",
        "ethtool -S NIC   # what it keeps",
        "net/core/netdev-genl.c, netdev_nl_qstats_get_dumpit",
        attr="ifindex",
    ),
)
