"""The NIC that a container has: a virtual interface with RX queues that the host leased to it.

It has no header split, RSS indirection or ntuple rules: those are the NIC's, on the host. It binds, receives and sends
like the NIC itself.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, NoReturn

from devmem_tcp import contract, refusals
from devmem_tcp.buffers import Buffer
from devmem_tcp.errors import BindError, NicSettingError
from devmem_tcp.kernel.binding import KernelRxBinding
from devmem_tcp.kernel.control import NicControl
from devmem_tcp.kernel.ethtool import Ethtool, header_split_words
from devmem_tcp.kernel.leasing import is_lessee, leased_queues
from devmem_tcp.kernel.nic import KernelNic, Limits
from devmem_tcp.kernel.settings import rss_words
from devmem_tcp.kernel.socket import KernelSocket
from devmem_tcp.nicmodel.ntuple import ethtool_command
from devmem_tcp.types import PAGE_SIZE, Capabilities, FlowRule, HeaderSplitMode

_NIC: Final = "NIC"  # stands for the host's, which a container is not told
_NO_DMA: Final = "Device doesn't support DMA"  # of a queue that is the interface's own


def open_kernel_nic(name: str, control: NicControl) -> KernelNic:
    """Open an interface of this network namespace as what it is: a NIC, or one that queues are leased to.

    Raises:
        KernelError: as ``KernelNic``.
    """
    with Ethtool(name) as ethtool:
        kind = LesseeNic if is_lessee(ethtool) else KernelNic
    return kind(name, control)


class LesseeNic(KernelNic):
    """See ``contract.Nic``. ``capabilities.settings`` is false: settings raise NicSettingError.

    Limits: queue 0 is the interface's own, and cannot be bound. Linux does not tell here which queue a flow comes over
    (``rx_queue`` is -1), what a queue counted, or how many pages are out: those are 0 in ``queue_stats``, and
    starvation goes unnoticed. Whether payload comes by the leased queue shows in ``stats.dmabuf_bytes`` of the socket.
    """

    def _limits(self) -> Limits:
        leased = leased_queues(self._ethtool.ifindex)
        return Limits(rx_queues=max(leased, default=0) + 1, rss_table_size=0, hds_thresh=False)

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, settings=False)

    # --- settings: the host's ---

    @property
    def header_split(self) -> HeaderSplitMode:
        """UNKNOWN: it is not told here."""
        self._check_open()
        return HeaderSplitMode.UNKNOWN

    @property
    def rss_table(self) -> tuple[int, ...]:
        """Empty: it is not told here."""
        self._check_open()
        return ()

    @property
    def ntuple_rules(self) -> tuple[FlowRule, ...]:
        """Empty: they are not told here."""
        self._check_open()
        return ()

    def set_header_split(self, mode: HeaderSplitMode | str) -> contract.Setting:
        wanted = HeaderSplitMode(mode)
        self._refuse(lambda nic: header_split_words(nic, wanted))

    def set_hds_thresh(self, size_bytes: int) -> contract.Setting:
        self._refuse(lambda nic: f"ethtool -G {nic} hds-thresh {size_bytes}")

    def set_rss(
        self, *, equal: int | None = None, weights: Sequence[int] | None = None, table: Sequence[int] | None = None
    ) -> contract.Setting:
        self._refuse(lambda nic: rss_words(nic, equal=equal, weights=weights, table=table))

    def insert_rule(self, rule: FlowRule) -> contract.NtupleRule:
        self._refuse(lambda nic: ethtool_command(nic, rule))

    def _refuse(self, words: Callable[[str], str]) -> NoReturn:
        """Say that a change is the host's to make; ``words`` gives the command that makes it, for an interface."""
        self._check_open()
        hint = f"this is the host's to set, on the NIC that leases queues to {self.name}: {words(_NIC)}"
        raise NicSettingError(errno.EOPNOTSUPP, words(self.name), hint=hint)

    # --- bindings and sockets ---

    def bind_rx(self, buffer: Buffer, queues: Sequence[int], *, rx_page_size: int = PAGE_SIZE) -> KernelRxBinding:
        """See ``contract.Nic.bind_rx``. Needs CAP_NET_ADMIN over the interface's network namespace alone."""
        try:
            return super().bind_rx(buffer, queues, rx_page_size=rx_page_size)
        except BindError as error:
            error.hint = self._hint(error)
            raise

    def _hint(self, refused: BindError) -> str:
        """Return what to do about a refused binding, here or on the host."""
        if refusals.HEADER_SPLIT_OFF.explains(refused):
            return f"on the host, of the NIC that leases queues: {header_split_words(_NIC, HeaderSplitMode.ON)}"
        if refusals.HDS_THRESH_SET.explains(refused):
            return f"on the host, of the NIC that leases queues: ethtool -G {_NIC} hds-thresh 0"
        if refused.extack == _NO_DMA:
            leased = ", ".join(map(str, leased_queues(self._ethtool.ifindex))) or "none"
            return f"leased to {self.name} are RX queues: {leased}; the host leases more: devmem-tcp lease --help"
        return refused.hint

    def _warn_of_other_traffic(self, queues: Sequence[int]) -> None:
        """Say nothing: the host's lease has said it."""

    def _prove_steering(self, made: KernelSocket, *, strict: bool) -> None:
        """Prove nothing: the NAPI instance of a flow is the NIC's, whose queues are not told here."""
