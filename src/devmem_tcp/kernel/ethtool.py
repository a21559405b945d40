"""Everything that ethtool(8) does to a NIC and this package needs, on one interface, by ioctl and by netlink.

Each method is one operation of the kernel, and raises what the kernel said, in ethtool's words. Nothing here remembers
an old value: that is ``kernel.settings``.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from devmem_tcp import refusals
from devmem_tcp.closing import Closing
from devmem_tcp.errors import KernelError, NicSettingError
from devmem_tcp.kernel.ntuple import HeldRule
from devmem_tcp.sys import calls
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.types import HeaderSplitMode
from devmem_tcp.uapi import ethtool as abi
from devmem_tcp.uapi.netlink import AttributeNames, Attributes, attr_flag, attr_string, attr_u8, attr_u32, nest

NTUPLE: Final = "ntuple"

_SHORT_NAMES: Final = {NTUPLE: "rx-ntuple-filter", "lro": "rx-lro", "gro": "rx-gro", "rxhash": "rx-hashing"}
_SPLIT_MODES: Final = {
    abi.TCP_DATA_SPLIT_UNKNOWN: HeaderSplitMode.UNKNOWN,
    abi.TCP_DATA_SPLIT_DISABLED: HeaderSplitMode.OFF,
    abi.TCP_DATA_SPLIT_ENABLED: HeaderSplitMode.ON,
}
_SPLIT_NUMBERS: Final = {mode: number for number, mode in _SPLIT_MODES.items()}
_MAX_ADDRESS_BYTES: Final = 32  # MAX_ADDR_LEN, include/linux/netdevice.h
_MAX_ATTEMPTS: Final = 8  # to list rules while somebody adds more
_GONE: Final = frozenset({errno.ENOENT, errno.EINVAL})  # what drivers say about a location without a rule
_HINTS: Final = {
    errno.EPERM: "changing a NIC needs CAP_NET_ADMIN: run as root (sudo)",
    errno.EACCES: "changing a NIC needs CAP_NET_ADMIN: run as root (sudo)",
    errno.EOPNOTSUPP: "the driver of the NIC cannot do this; ethtool -i {nic} names it",
    errno.ENODEV: "the interface {nic} is not there (any more)",
    errno.EBUSY: "something else holds this part of the NIC: an AF_XDP socket, a binding, or a driver reset",
}


class DriverInfo(NamedTuple):
    """Who drives the NIC: ethtool -i."""

    driver: str
    version: str
    firmware: str
    bus: str


class Rings(NamedTuple):
    """ethtool -g. Sizes are in descriptors, ``hds_thresh`` in bytes; None: the driver has no such thing."""

    rx: int
    rx_max: int
    tx: int
    tx_max: int
    header_split: HeaderSplitMode
    hds_thresh: int | None
    hds_thresh_max: int | None


class Channels(NamedTuple):
    """ethtool -l: how many queues, and how many there could be; a combined one is an RX and a TX queue."""

    rx: int
    tx: int
    combined: int
    rx_max: int
    tx_max: int
    combined_max: int


class Rss(NamedTuple):
    """ethtool -x: the indirection table and the hash key."""

    table: tuple[int, ...]
    key: bytes
    input_xfrm: int  # RXH_XFRM_*: whether the hash is symmetric


class Feature(NamedTuple):
    """One line of ethtool -k."""

    on: bool
    fixed: bool


class RuleTable(NamedTuple):
    """The ntuple table: how many locations, which are taken, and whether the driver can choose one itself."""

    size: int
    locations: tuple[int, ...]
    driver_chooses: bool


class Ethtool(Closing):
    """One interface of this network namespace. Threads: may be shared.

    Raises:
        KernelError: ENODEV: no such interface.
    """

    def __init__(self, nic: str) -> None:
        self.nic: Final = nic
        self._lock = threading.Lock()
        self._netlink: GenericNetlink | None = None
        try:
            self.ifindex: Final = calls.interface_index(nic)
        except OSError as error:
            raise KernelError(errno.ENODEV, f"ethtool {nic}", hint="interfaces: ip -brief link") from error
        self._control = calls.open_control()

    def close(self) -> None:
        if self._netlink is not None:
            self._netlink.close()
        calls.close_socket(self._control)

    # --- what it is ---

    def driver(self) -> DriverInfo:
        """Return who drives the NIC. Kernel: ETHTOOL_GDRVINFO."""
        argument = bytearray(abi.DRVINFO.pack(abi.ETHTOOL_GDRVINFO, b"", b"", b"", b"", b"", 0, 0, 0, 0, 0))
        self._ioctl(argument, f"ethtool -i {self.nic}", KernelError)
        texts = abi.DRVINFO.unpack(argument)[1:5]
        return DriverInfo(*(text.partition(b"\0")[0].decode(errors="replace") for text in texts))

    def permanent_address(self) -> bytes:
        """Return the MAC address the NIC was made with; empty if it has none. Kernel: ETHTOOL_GPERMADDR."""
        argument = bytearray(abi.PERM_ADDR.pack(abi.ETHTOOL_GPERMADDR, _MAX_ADDRESS_BYTES) + bytes(_MAX_ADDRESS_BYTES))
        self._ioctl(argument, f"ethtool -P {self.nic}", KernelError)
        _, size = abi.PERM_ADDR.unpack_from(argument)
        address = bytes(argument[abi.PERM_ADDR.size :][:size])
        return address if any(address) else b""

    def hardware_address(self) -> bytes:
        """Return the MAC address in use. Kernel: SIOCGIFHWADDR."""
        with self._refusals(f"ip link show {self.nic}", KernelError):
            ifreq = abi.pack_ifreq(self._current_name())
            calls.ioctl(self._control.fileno(), abi.SIOCGIFHWADDR, ifreq)
        return abi.unpack_hardware_address(ifreq)

    def rx_queues(self) -> int:
        """Return how many RX queues RSS may use. Kernel: ETHTOOL_GRXRINGS."""
        return self._rxnfc(abi.ETHTOOL_GRXRINGS, f"ethtool -x {self.nic}", KernelError).data

    # --- header split and ring sizes ---

    def rings(self) -> Rings:
        """Return header split, its threshold and the ring sizes. Kernel: ETHTOOL_MSG_RINGS_GET."""
        found = self._request(abi.Command.RINGS_GET, f"ethtool -g {self.nic}", KernelError, names=abi.RINGS_NAMES)
        number = abi.Rings
        return Rings(
            rx=found.u32(number.RX, 0),
            rx_max=found.u32(number.RX_MAX, 0),
            tx=found.u32(number.TX, 0),
            tx_max=found.u32(number.TX_MAX, 0),
            header_split=_SPLIT_MODES.get(found.u8(number.TCP_DATA_SPLIT, 0), HeaderSplitMode.UNKNOWN),
            hds_thresh=found.u32(number.HDS_THRESH, None),
            hds_thresh_max=found.u32(number.HDS_THRESH_MAX, None),
        )

    def set_header_split(self, mode: HeaderSplitMode) -> None:
        """Turn header split on or off; UNKNOWN: as the driver likes. Kernel: ETHTOOL_MSG_RINGS_SET."""
        self._set_rings(header_split_words(self.nic, mode), attr_u8(abi.Rings.TCP_DATA_SPLIT, _SPLIT_NUMBERS[mode]))

    def set_hds_thresh(self, size_bytes: int) -> None:
        """Split only packets larger than ``size_bytes``. Kernel: ETHTOOL_MSG_RINGS_SET."""
        self._set_rings(f"ethtool -G {self.nic} hds-thresh {size_bytes}", attr_u32(abi.Rings.HDS_THRESH, size_bytes))

    def set_ring_sizes(self, *, rx: int, tx: int) -> None:
        """Give every RX and every TX queue so many descriptors. Kernel: ETHTOOL_MSG_RINGS_SET."""
        attributes = (attr_u32(abi.Rings.RX, rx), attr_u32(abi.Rings.TX, tx))
        self._set_rings(f"ethtool -G {self.nic} rx {rx} tx {tx}", *attributes)

    def _set_rings(self, call: str, *attributes: bytes) -> None:
        self._request(abi.Command.RINGS_SET, call, NicSettingError, *attributes, names=abi.RINGS_NAMES)

    # --- queues ---

    def channels(self) -> Channels:
        """Return how many queues there are. Kernel: ETHTOOL_MSG_CHANNELS_GET."""
        call = f"ethtool -l {self.nic}"
        found = self._request(abi.Command.CHANNELS_GET, call, KernelError, names=abi.CHANNELS_NAMES)
        number = abi.Channels
        counts = (number.RX_COUNT, number.TX_COUNT, number.COMBINED_COUNT)
        limits = (number.RX_MAX, number.TX_MAX, number.COMBINED_MAX)
        return Channels(*(found.u32(one, 0) for one in counts + limits))

    def set_channels(self, *, rx: int = 0, tx: int = 0, combined: int = 0) -> None:
        """Set how many queues there are; a kind that the NIC has none of is 0. Kernel: ETHTOOL_MSG_CHANNELS_SET."""
        number = abi.Channels
        limits = self.channels()
        wanted = [
            (number.RX_COUNT, rx, limits.rx_max),
            (number.TX_COUNT, tx, limits.tx_max),
            (number.COMBINED_COUNT, combined, limits.combined_max),
        ]
        attributes = [attr_u32(one, count) for one, count, limit in wanted if count or limit]
        call = channels_words(self.nic, rx=rx, tx=tx, combined=combined)
        self._request(abi.Command.CHANNELS_SET, call, NicSettingError, *attributes, names=abi.CHANNELS_NAMES)

    # --- features ---

    def features(self) -> dict[str, Feature]:
        """Return every feature by the kernel's name, such as ``rx-ntuple-filter``. Kernel: ETHTOOL_MSG_FEATURES_GET."""
        call = f"ethtool -k {self.nic}"
        found = self._request(abi.Command.FEATURES_GET, call, KernelError, names=abi.FEATURES_NAMES)
        kind = abi.Features
        active, mutable, fixed = (_bits(found.nested(one)) for one in (kind.ACTIVE, kind.HW, kind.NOCHANGE))
        return {name: Feature(name in active, name not in mutable) for name in sorted(active | mutable | fixed)}

    def feature(self, name: str) -> bool:
        """Whether a feature is on; ``name`` is the kernel's, or ``ntuple``, ``lro``, ``gro``, ``rxhash``."""
        found = self.features().get(_SHORT_NAMES.get(name, name))
        return found is not None and found.on

    def set_feature(self, name: str, on: bool) -> None:
        """Turn a feature on or off. Kernel: ETHTOOL_MSG_FEATURES_SET, which answers success where it does nothing.

        Raises:
            NicSettingError: EOPNOTSUPP: it stays as it is: fixed, or the driver needs another feature for it.
        """
        call = feature_words(self.nic, name, on)
        bit = [attr_string(abi.BitsetBit.NAME, _SHORT_NAMES.get(name, name))]
        if on:
            bit.append(attr_flag(abi.BitsetBit.VALUE))
        wanted = nest(abi.Features.WANTED, nest(abi.Bitset.BITS, nest(abi.BITSET_BITS_BIT, *bit)))
        self._request(abi.Command.FEATURES_SET, call, NicSettingError, wanted, names=abi.FEATURES_NAMES)
        if self.feature(name) is not on:
            hint = f"ethtool -k {self.nic} shows what the NIC can do; [fixed] cannot be changed"
            raise NicSettingError(errno.EOPNOTSUPP, call, hint=hint)

    # --- RSS ---

    def rss(self, *, context: int = 0) -> Rss:
        """Return the RSS indirection table and key of an RSS context, 0 being the NIC's own. Kernel: ETHTOOL_GRSSH."""
        call = f"ethtool -x {self.nic}" + (f" context {context}" if context else "")
        query = abi.pack_rxfh_query(context=context)
        self._ioctl(query, call, KernelError)
        sizes = abi.unpack_rxfh(query)
        answer = abi.pack_rxfh_query(sizes.indir_size, sizes.key_size, context=context)
        if len(answer) > len(query):
            self._ioctl(answer, call, KernelError)
        found = abi.unpack_rxfh(answer)
        return Rss(found.indir, found.key, found.input_xfrm)

    def set_rss_table(self, entries: Sequence[int], *, context: int = 0) -> None:
        """Set the RSS indirection table, whole. Kernel: ETHTOOL_SRSSH.

        Raises:
            NicSettingError: EINVAL: not of the NIC's size, or a queue that it has not.
        """
        xfrm = self.rss(context=context).input_xfrm
        request = abi.pack_rxfh(abi.ETHTOOL_SRSSH, indir=entries, input_xfrm=xfrm, context=context)
        queues = ", ".join(map(str, sorted(set(entries))))
        call = f"ethtool -X {self.nic}" + (f" context {context}" if context else "") + f" (onto queues {queues})"
        hint = f"the NIC spreads over {self.rx_queues()} queues: ethtool -x {self.nic}"
        self._ioctl(request, call, NicSettingError, hints={errno.EINVAL: hint})

    def set_rss_default(self) -> None:
        """Let the kernel spread flows over all queues as if nobody had asked. Kernel: ETHTOOL_SRSSH, no table."""
        request = abi.pack_rxfh(abi.ETHTOOL_SRSSH, indir_size=0, input_xfrm=self.rss().input_xfrm)
        self._ioctl(request, f"ethtool -X {self.nic} default", NicSettingError)

    def set_rss_key(self, key: bytes) -> None:
        """Set the RSS hash key; the table stays. Kernel: ETHTOOL_SRSSH, ETH_RXFH_INDIR_NO_CHANGE."""
        xfrm = self.rss().input_xfrm
        request = abi.pack_rxfh(abi.ETHTOOL_SRSSH, indir_size=abi.ETH_RXFH_INDIR_NO_CHANGE, key=key, input_xfrm=xfrm)
        self._ioctl(request, rss_key_words(self.nic, key), NicSettingError)

    # --- ntuple rules ---

    def rule_table(self) -> RuleTable:
        """Return the size of the rule table and the locations in use. Kernel: ETHTOOL_GRXCLSRLCNT, _GRXCLSRLALL."""
        call = f"ethtool -n {self.nic}"
        for _ in range(_MAX_ATTEMPTS):
            count = self._rxnfc(abi.ETHTOOL_GRXCLSRLCNT, call, KernelError)
            try:
                found = self._rxnfc(abi.ETHTOOL_GRXCLSRLALL, call, KernelError, rule_cnt=count.rule_cnt)
            except KernelError as error:
                if error.errno != errno.EMSGSIZE:  # a rule was added in between
                    raise
            else:
                chooses = bool(count.data & abi.RX_CLS_LOC_SPECIAL)
                size = (found.data or count.data) & ~abi.RX_CLS_LOC_SPECIAL
                return RuleTable(size, tuple(sorted(found.locations)), chooses)
        raise KernelError(errno.EMSGSIZE, call, hint="the rules change faster than they can be read")

    def rules(self) -> tuple[HeldRule, ...]:
        """Return the ntuple rules in order of location. Kernel: ETHTOOL_GRXCLSRULE each."""
        found = (self._rule(location) for location in self.rule_table().locations)
        return tuple(rule for rule in found if rule is not None)

    def rule_at(self, location: int) -> HeldRule | None:
        """Return the rule at a location, or None."""
        return self._rule(location) if location in self.rule_table().locations else None

    def _rule(self, location: int) -> HeldRule | None:
        """Read one rule; None if it went meanwhile."""
        try:
            call = f"ethtool -n {self.nic} rule {location}"
            return HeldRule.parse(self._rxnfc(abi.ETHTOOL_GRXCLSRULE, call, KernelError, location=location).spec)
        except KernelError as error:
            if error.errno not in _GONE:
                raise
            return None

    def insert_rule(self, spec: bytes, call: str) -> int:
        """Add an ntuple rule and return its location; a rule that is there is replaced. Kernel: ETHTOOL_SRXCLSRLINS.

        Args:
            spec: struct ethtool_rx_flow_spec.
            call: the same in ethtool's words, for errors.
        """
        found = self._rxnfc(abi.ETHTOOL_SRXCLSRLINS, call, NicSettingError, spec=spec)
        return HeldRule.parse(found.spec).location

    def delete_rule(self, location: int) -> None:
        """Delete an ntuple rule. Kernel: ETHTOOL_SRXCLSRLDEL."""
        call = f"ethtool -N {self.nic} delete {location}"
        self._rxnfc(abi.ETHTOOL_SRXCLSRLDEL, call, NicSettingError, location=location)

    # --- how it is asked ---

    def _rxnfc(
        self,
        command: int,
        call: str,
        error: type[KernelError],
        *,
        spec: bytes = b"",
        location: int | None = None,
        rule_cnt: int = 0,
    ) -> abi.Rxnfc:
        argument = abi.pack_rxnfc(command, spec=spec, location=location, rule_cnt=rule_cnt)
        self._ioctl(argument, call, error)
        return abi.unpack_rxnfc(argument)

    def _ioctl(
        self, argument: bytearray, call: str, error: type[KernelError], *, hints: dict[int, str] | None = None
    ) -> None:
        with self._refusals(call, error, hints or {}):
            name = self._current_name()
            calls.ioctl_by_pointer(
                self._control, abi.SIOCETHTOOL, lambda address: bytes(abi.pack_ifreq(name, address)), argument
            )

    def _current_name(self) -> str:
        """Return what the interface is called by now: ioctls go by names, and it may have been renamed."""
        try:
            return calls.interface_name(self.ifindex)
        except OSError as error:
            raise OSError(errno.ENODEV, "no interface of this index") from error

    def _request(
        self, command: IntEnum, call: str, error: type[KernelError], *attributes: bytes, names: AttributeNames
    ) -> Attributes:
        header = nest(1, attr_u32(abi.Header.DEV_INDEX, self.ifindex))  # attribute 1 of every command
        with self._lock, self._refusals(call, error):
            if self._netlink is None:
                self._netlink = GenericNetlink(abi.FAMILY_NAME)
            return self._netlink.request(command, header, *attributes, attributes=names)

    @contextlib.contextmanager
    def _refusals(self, call: str, kind: type[KernelError], hints: dict[int, str] | None = None) -> Iterator[None]:
        """Raise what the kernel refuses as ``kind``, in ethtool's words, with what to do about it."""
        try:
            yield
        except OSError as error:
            number = error.errno or 0
            hint = {**_HINTS, **(hints or {})}.get(number, "").format(nic=self.nic)
            if not isinstance(error, KernelError):
                raise kind(number, call, hint=hint) from error
            known = refusals.find(error)
            hint = error.hint or (known.fix if known else hint)
            raise kind(number, call, extack=error.extack, attr=error.attr, hint=hint) from error


def _bits(bitset: Attributes) -> frozenset[str]:
    """Return the names of the bits that a bitset in its long form has on."""
    bits = bitset.nested(abi.Bitset.BITS).nests(abi.BITSET_BITS_BIT)
    listed = bitset.flag(abi.Bitset.NOMASK)  # then only bits that are on are there
    return frozenset(bit.string(abi.BitsetBit.NAME) for bit in bits if listed or bit.flag(abi.BitsetBit.VALUE))


# --- ethtool's words ---


def header_split_words(nic: str, mode: HeaderSplitMode) -> str:
    """Return the command that sets header split; what the kernel calls unknown, ethtool calls auto."""
    return f"ethtool -G {nic} tcp-data-split {'auto' if mode is HeaderSplitMode.UNKNOWN else mode.value}"


def channels_words(nic: str, *, rx: int, tx: int, combined: int) -> str:
    """Return the command that sets how many queues there are."""
    counts = {"rx": rx, "tx": tx, "combined": combined}
    return " ".join([f"ethtool -L {nic}", *(f"{kind} {count}" for kind, count in counts.items() if count)])


def feature_words(nic: str, name: str, on: bool) -> str:
    """Return the command that turns a feature on or off."""
    return f"ethtool -K {nic} {name} {'on' if on else 'off'}"


def rss_key_words(nic: str, key: bytes) -> str:
    """Return the command that sets the RSS hash key."""
    return f"ethtool -X {nic} hkey {key.hex(':')}"
