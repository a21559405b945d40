"""Who may do what by the broker: decisions alone, no I/O.

Of a NIC's permits the first that names a client counts. A refusal says which line of the administrator's file it comes
from, and whom that line is for.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NoReturn

from devmem_tcp.errors import BindError, KernelError, NicSettingError, OutOfDeviceMemory
from devmem_tcp.types import FlowRule, HeaderSplitMode

_WHOLE_PORT: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class Peer:
    """A client as the kernel names it: its credentials when it connected."""

    pid: int
    user_id: int
    group_id: int
    groups: frozenset[int] = frozenset()  # supplementary

    def __str__(self) -> str:
        return f"uid {self.user_id}, pid {self.pid}"


@dataclass(frozen=True, slots=True)
class NumberSet:
    """Numbers in ranges, spelt ``1-3,7``."""

    ranges: tuple[range, ...] = ()

    def __contains__(self, number: int) -> bool:
        return any(number in part for part in self.ranges)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __str__(self) -> str:
        parts = (str(part.start) if len(part) == 1 else f"{part.start}-{part.stop - 1}" for part in self.ranges)
        return ",".join(parts) or "none"

    def numbers(self) -> frozenset[int]:
        return frozenset(number for part in self.ranges for number in part)


class Change(Enum):
    """A setting that a client may be allowed to change; the values are the file's words."""

    HEADER_SPLIT = "header-split"
    HDS_THRESH = "hds-thresh"
    RSS = "rss"


@dataclass(frozen=True, slots=True)
class Who:
    """Users and groups that a part of the file is for; ``words`` are the file's."""

    user_ids: frozenset[int]
    group_ids: frozenset[int]
    words: str

    def names(self, peer: Peer) -> bool:
        """Whether the client is one of them, by its user, its group or a supplementary group."""
        return peer.user_id in self.user_ids or bool(self.group_ids & (peer.groups | {peer.group_id}))


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of one user, over all its programs and all NICs. ``key`` is where the file says so."""

    key: str = "[quota]"
    clients: int = 16  # connections to the broker: a NIC or a buffer each
    queues: int = 2
    rules: int = 16
    buffers: int = 16  # that the broker allocated
    bytes_bound: int = 1 << 30
    bytes_allocated: int = 256 << 20

    def limits(self) -> dict[str, int]:
        """Return the limits by name."""
        return {name: getattr(self, name) for name in QUOTA_NAMES}


QUOTA_NAMES: Final = ("clients", "queues", "rules", "buffers", "bytes_bound", "bytes_allocated")


@dataclass(frozen=True, slots=True)
class Permit:
    """What some users may do with one NIC. ``key`` is where the file says so."""

    key: str
    nic: str
    who: Who
    queues: NumberSet
    ports: NumberSet = NumberSet()  # of this machine: a rule's dst_port
    remote_ports: NumberSet = NumberSet()  # of peers: a rule's src_port
    locations: NumberSet = NumberSet()  # that a rule may ask for
    settings: frozenset[Change] = frozenset()
    rss_queues: NumberSet = NumberSet()  # of the NIC: what ordinary flows are spread over

    def check_header_split(self, peer: Peer, mode: HeaderSplitMode) -> None:
        """Raise NicSettingError unless header split may be changed, and is to be on."""
        call = f"set header split of {self.nic} by the broker"
        self._check_may_change(peer, Change.HEADER_SPLIT, call)
        if mode is not HeaderSplitMode.ON:
            self._refuse(peer, call, f"clients turn it on, never {mode.value}", "closing what turned it on is the way")

    def check_hds_thresh(self, peer: Peer, size_bytes: int) -> None:
        """Raise NicSettingError unless hds-thresh may be changed, and is to be 0."""
        call = f"set hds-thresh of {self.nic} by the broker"
        self._check_may_change(peer, Change.HDS_THRESH, call)
        if size_bytes:
            self._refuse(peer, call, f"clients set it to 0, never to {size_bytes}", "devmem TCP needs 0")

    def check_rss(self, peer: Peer, table: Sequence[int]) -> None:
        """Raise NicSettingError unless RSS may be changed, and goes on to use just the queues it is to use."""
        call = f"set RSS of {self.nic} by the broker"
        self._check_may_change(peer, Change.RSS, call)
        if set(table) != self.rss_queues.numbers():
            self._refuse(
                peer,
                call,
                f"ordinary flows use queues {self.rss_queues} (rss_queues of nic.{self.nic}), no fewer and no others",
                f"set_rss over exactly those; or leave RSS alone, if `ethtool -x {self.nic}` shows it so already",
            )

    def check_rule(self, peer: Peer, rule: FlowRule) -> None:
        """Raise NicSettingError unless a rule steers nothing but flows of the client's own ports to its queues.

        A rule for a port takes the payload of whoever uses that port, so it is as good as reading it.
        """
        call = f"add an ntuple rule to {self.nic} by the broker"
        if rule.queue not in self.queues:
            self._refuse(peer, call, f"queue {rule.queue} is not among queues {self.queues}", "steer to one of those")
        own = rule.dst_port is not None and rule.dst_port_mask == _WHOLE_PORT and rule.dst_port in self.ports
        remote = rule.src_port is not None and rule.src_port_mask == _WHOLE_PORT and rule.src_port in self.remote_ports
        # Where a NIC cannot match the source, a rule is made with its destination alone (NicControl.add_ntuple).
        narrow = rule.dst_ip is None and rule.dst_port is None
        if not (own or (remote and narrow)):
            self._refuse(
                peer,
                call,
                f"it must match one whole dst_port of ports {self.ports}, or one whole src_port of remote_ports "
                f"{self.remote_ports} and no destination",
                "listen on, or connect from (source=), one of those ports, and steer by dst_port",
            )
        if rule.location is not None and rule.location not in self.locations:
            self._refuse(
                peer,
                call,
                f"location {rule.location} is not among locations {self.locations}",
                "leave location out: the NIC chooses a free one",
            )

    def check_queues(self, peer: Peer, queues: Sequence[int]) -> None:
        """Raise BindError unless all queues are the client's to lease."""
        wrong = sorted(set(queues) - self.queues.numbers())
        if wrong:
            what = f"queue {', '.join(map(str, wrong))} is not among queues {self.queues}"
            raise BindError(errno.EPERM, "bind-rx by the broker", extack=self._because(peer, what), hint=self._ask())

    def _check_may_change(self, peer: Peer, change: Change, call: str) -> None:
        if change not in self.settings:
            may = ", ".join(sorted(setting.value for setting in self.settings)) or "nothing"
            self._refuse(peer, call, f"settings are {may}, and {change.value} is not among them", self._ask())

    def _refuse(self, peer: Peer, call: str, what: str, hint: str) -> NoReturn:
        raise NicSettingError(errno.EPERM, call, extack=self._because(peer, what), hint=hint)

    def _because(self, peer: Peer, what: str) -> str:
        return f"{self.key} ({self.who.words}), which is for uid {peer.user_id}, says: {what}"

    def _ask(self) -> str:
        return f"ask the administrator to change {self.key}, and to restart the broker"


@dataclass(frozen=True, slots=True)
class Policy:
    """The administrator's file, understood. ``source`` is its path, for people."""

    source: str
    permits: tuple[Permit, ...]
    quotas: tuple[tuple[Who, Quota], ...] = ()  # users' before groups'
    default_quota: Quota = Quota()
    memory: tuple[str, ...] = ()  # kinds that may be allocated

    def check_listed(self, peer: Peer) -> None:
        """Raise KernelError if the file names the client for no NIC at all."""
        if not any(permit.who.names(peer) for permit in self.permits):
            raise self._not_named(peer, self.permits, "use the broker")

    def permit(self, peer: Peer, nic: str) -> Permit:
        """Return what the client may do with a NIC.

        Raises:
            KernelError: EACCES: nothing.
        """
        of_nic = [permit for permit in self.permits if permit.nic == nic]
        if not of_nic:
            nics = ", ".join(dict.fromkeys(permit.nic for permit in self.permits)) or "none"
            raise KernelError(
                errno.EACCES,
                f"open {nic} by the broker",
                extack=f"{self.source} has no [[nic.{nic}.allow]]; NICs it has: {nics}",
                hint="open one of those, or ask the administrator to add yours, and to restart the broker",
            )
        for permit in of_nic:
            if permit.who.names(peer):
                return permit
        raise self._not_named(peer, of_nic, f"open {nic} by the broker")

    def quota(self, peer: Peer) -> Quota:
        """Return the client's limits: the first that name it, else the default."""
        return next((quota for who, quota in self.quotas if who.names(peer)), self.default_quota)

    def check_quota(self, peer: Peer, call: str, name: str, used: int, asked: int) -> None:
        """Raise if ``asked`` more of quota ``name`` would be too much.

        Raises:
            OutOfDeviceMemory: of bytes or buffers to allocate.
            BindError, NicSettingError, KernelError: EDQUOT, of anything else.
        """
        quota = self.quota(peer)
        allowed = quota.limits()[name]
        if used + asked <= allowed:
            return
        what = f"quota {name} of uid {peer.user_id} is {allowed}, used {used}, asked {asked}"
        hint = f"give back what you have, or ask the administrator for more: {name} in {quota.key} of {self.source}"
        if name == "bytes_allocated":
            free = max(allowed - used, 0)
            raise OutOfDeviceMemory(f"{call} by the broker: {what}", wanted=asked, free=free, hint=hint)
        kind = _QUOTA_ERRORS.get(name, KernelError)
        raise kind(errno.EDQUOT, f"{call} by the broker", extack=what, hint=hint)

    def check_memory(self, kind: str) -> None:
        """Raise KernelError unless a kind of memory may be allocated."""
        if kind not in self.memory:
            raise KernelError(
                errno.EACCES,
                f"allocate {kind} by the broker",
                extack=f"kinds in [memory] of {self.source}: {', '.join(self.memory) or 'none'}",
                hint="take one of those, or ask the administrator to add it, and to restart the broker",
            )

    def _not_named(self, peer: Peer, permits: Sequence[Permit], call: str) -> KernelError:
        may = "; ".join(dict.fromkeys(permit.who.words for permit in permits)) or "nobody"
        return KernelError(
            errno.EACCES,
            call,
            extack=f"{self.source} does not name uid {peer.user_id}, nor its groups; it names {may}",
            hint="join such a group and log in again, or ask the administrator to add you, and to restart the broker",
        )


_QUOTA_ERRORS: Final[dict[str, type[KernelError]]] = {
    "queues": BindError,
    "bytes_bound": BindError,
    "rules": NicSettingError,
}
