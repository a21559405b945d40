"""What needs CAP_NET_ADMIN of a NIC, behind one door: done here (``LocalControl``) or asked of a broker."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final, Protocol

from devmem_tcp import refusals
from devmem_tcp.closing import Closing
from devmem_tcp.contract import NtupleRule, Setting
from devmem_tcp.errors import BindError
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.settings import NicSettings
from devmem_tcp.nicmodel.indirection import IndirectionTable
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.types import PAGE_SIZE, FlowRule, HeaderSplitMode
from devmem_tcp.uapi.netdev import FAMILY


class AttachedQueues(Protocol):
    """RX queues with a dma-buf attached. ``close()`` detaches it; idempotent."""

    @property
    def dmabuf_id(self) -> int: ...

    def close(self) -> None: ...


class NicControl(Protocol):
    """Changes one NIC. Each method is one change with its way back, and raises what ``contract.Nic`` says.

    Lifetime: ``close()`` detaches and puts back all that is left, in reverse order; so does the end of the process that
    holds it, or ``devmem-tcp doctor --restore`` after that.
    """

    def set_header_split(self, mode: HeaderSplitMode) -> Setting: ...

    def set_hds_thresh(self, size_bytes: int) -> Setting: ...

    def set_rss(self, table: Sequence[int], words: str) -> Setting:
        """Set the whole RSS indirection table; ``words`` say it as ``ethtool -X`` does, for the description."""

    def add_ntuple(self, rule: FlowRule) -> NtupleRule: ...

    def attach(self, dmabuf_fd: int, queues: Sequence[int], rx_page_size: int) -> AttachedQueues:
        """Attach a dma-buf to RX queues. Kernel: netdev bind-rx."""

    def close(self) -> None: ...


class LocalControl(Closing):
    """A NicControl that does it all in this process, which needs CAP_NET_ADMIN at the first change.

    Raises:
        KernelError: ENODEV: no such interface.
    """

    def __init__(self, nic: str) -> None:
        self.settings: Final = NicSettings(nic)
        self._attached: dict[int, LocalAttachment] = {}

    def set_header_split(self, mode: HeaderSplitMode) -> Setting:
        return self.settings.set_header_split(mode)

    def set_hds_thresh(self, size_bytes: int) -> Setting:
        return self.settings.set_hds_thresh(size_bytes)

    def set_rss(self, table: Sequence[int], words: str) -> Setting:
        return self.settings.set_rss_table(IndirectionTable(tuple(table)), words)

    def add_ntuple(self, rule: FlowRule) -> NtupleRule:
        return self.settings.add_ntuple(rule, or_destination_only=True)

    def attach(self, dmabuf_fd: int, queues: Sequence[int], rx_page_size: int) -> AttachedQueues:
        if 0 in queues and self.settings.ethtool.driver().driver == "gve":  # which would also make the kernel WARN
            raise refusals.GVE_FIRST_QUEUE.error(BindError)
        netlink = GenericNetlink(FAMILY)
        try:
            page_size = rx_page_size if rx_page_size != PAGE_SIZE else None  # older kernels know no such attribute
            dmabuf_id = netdev.bind_rx(netlink, self.settings.ethtool.ifindex, dmabuf_fd, queues, page_size)
        except BaseException:
            netlink.close()
            raise
        attached = self._attached[dmabuf_id] = LocalAttachment(dmabuf_id, netlink, self._attached)
        return attached

    def close(self) -> None:
        with ExitStack() as undo:
            undo.callback(self.settings.close)
            for attached in list(self._attached.values()):
                undo.callback(attached.close)


class LocalAttachment(Closing):
    """The netlink socket of one bind-rx: to close it is to detach. See ``AttachedQueues``."""

    def __init__(self, dmabuf_id: int, netlink: GenericNetlink, known: dict[int, LocalAttachment]) -> None:
        self._id = dmabuf_id
        self._netlink = netlink
        self._known = known

    @property
    def dmabuf_id(self) -> int:
        return self._id

    def close(self) -> None:
        self._known.pop(self._id, None)
        self._netlink.close()
