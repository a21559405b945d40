"""Header split as the kernel guards it and as a NIC does it: settings, and where each received packet lands."""

from __future__ import annotations

import errno
from enum import Enum
from typing import Final

from devmem_tcp import refusals
from devmem_tcp.errors import BindError, NicSettingError
from devmem_tcp.types import HeaderSplitMode

_CALL: Final = "ethtool -G"


class Placement(Enum):
    """Where a received packet lands."""

    SPLIT = "split"  # headers in the header buffer, payload in a page of the queue
    LINEAR = "linear"  # headers and all payload in the header buffer
    HOST = "host"  # the queue is not bound: host memory, split or not
    DROP = "drop"  # not split, so its headers would land in device memory, where the stack cannot read them


class HeaderSplit:
    """The two settings of header split, and what follows from them.

    Args:
        mode: ``tcp-data-split`` to begin with; UNKNOWN is ethtool's ``auto``, where the driver may do as it likes.
        hds_thresh: packets of more bytes than this are split.
        hds_thresh_max: the largest ``hds_thresh`` of the device, in bytes.
    """

    def __init__(
        self, mode: HeaderSplitMode = HeaderSplitMode.UNKNOWN, hds_thresh: int = 0, *, hds_thresh_max: int = 1023
    ) -> None:
        self._mode = mode
        self._hds_thresh = hds_thresh
        self.hds_thresh_max: Final = hds_thresh_max

    @property
    def mode(self) -> HeaderSplitMode:
        return self._mode

    @property
    def hds_thresh(self) -> int:
        """Packets of more bytes than this are split."""
        return self._hds_thresh

    def set_mode(self, mode: HeaderSplitMode, *, bound: bool) -> None:
        """Set ``tcp-data-split``; ``bound`` says whether any RX queue of the NIC is bound.

        Kernel: ETHTOOL_MSG_RINGS_SET; net/ethtool/rings.c, ethnl_set_rings.

        Raises:
            NicSettingError: EINVAL: anything but ON while a queue is bound.
        """
        if bound and mode is not HeaderSplitMode.ON:
            raise refusals.HEADER_SPLIT_NEEDED.error(NicSettingError, call=_CALL)
        self._mode = mode

    def set_thresh(self, size_bytes: int, *, bound: bool) -> None:
        """Set ``hds-thresh``; ``bound`` says whether any RX queue of the NIC is bound.

        Kernel: ETHTOOL_MSG_RINGS_SET; net/ethtool/rings.c, ethnl_set_rings, which looks at bindings first.

        Raises:
            NicSettingError: EINVAL: not 0 while a queue is bound, or above ``hds_thresh_max``.
            ValueError: negative.
        """
        if bound and size_bytes != 0:
            raise refusals.HDS_THRESH_NEEDED.error(NicSettingError, call=_CALL)
        hint = f"hds-thresh is 0 to {self.hds_thresh_max} bytes, got {size_bytes}"
        if size_bytes > self.hds_thresh_max:
            raise NicSettingError(errno.EINVAL, _CALL, extack="requested ring size exceeds maximum", hint=hint)
        if size_bytes < 0:
            raise ValueError(hint)
        self._hds_thresh = size_bytes

    def check_bind(self) -> None:
        """Refuse bind-rx unless every packet is split.

        Kernel: netdev bind-rx; net/core/netdev_rx_queue.c, __net_mp_open_rxq.

        Raises:
            BindError: EINVAL: header split is off or unknown, or ``hds_thresh`` is not 0.
        """
        if self._mode is not HeaderSplitMode.ON:
            raise refusals.HEADER_SPLIT_OFF.error(BindError)
        if self._hds_thresh != 0:
            raise refusals.HDS_THRESH_SET.error(BindError)

    def place(
        self, *, tcp: bool, payload_bytes: int, header_bytes: int, header_buffer_bytes: int, bound: bool
    ) -> Placement:
        """Decide where one received packet lands.

        Only TCP packets are split, and only where all headers fit the header buffer. A packet left whole on a bound
        queue is dropped, since the stack could not read its headers (gve, for instance: gve_rx_dqo.c, gve_rx_dqo).
        ``hds_thresh`` counts the whole packet (Documentation/networking/ethtool-netlink.rst). On a bound queue it is
        0, so that even a few bytes of payload go to a page; a packet without payload needs none.

        Args:
            tcp: the packet is TCP.
            payload_bytes, header_bytes: its size, and that of all its headers together.
            header_buffer_bytes: how much a header buffer of the NIC holds.
            bound: the packet's queue is bound.
        """
        if not bound:
            return Placement.HOST
        if not tcp or self._mode is not HeaderSplitMode.ON or header_bytes > header_buffer_bytes:
            return Placement.DROP
        if payload_bytes == 0:
            return Placement.LINEAR
        packet_bytes = header_bytes + payload_bytes
        if packet_bytes > self._hds_thresh:
            return Placement.SPLIT
        return Placement.LINEAR if packet_bytes <= header_buffer_bytes else Placement.DROP
