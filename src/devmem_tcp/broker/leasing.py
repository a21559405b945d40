"""What the broker has given to whom, each thing with its way back. Knows no socket.

One NicControl a NIC serves all clients. A setting that two of them want alike is changed once and put back after the
last. An attached dma-buf holds the settings of its time too: the kernel would not have them put back under it
(net/ethtool/rings.c, ethnl_set_rings).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeAlias

from devmem_tcp.broker import protocol
from devmem_tcp.broker.inspection import DmabufFacts, inspect_dmabuf
from devmem_tcp.broker.policy import QUOTA_NAMES, Change, Peer, Permit, Policy
from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.contract import Setting
from devmem_tcp.errors import BusyError, DevmemError, KernelError, RemoteProtocolError
from devmem_tcp.kernel.control import NicControl
from devmem_tcp.types import FlowRule

MAX_HANDLES: Final = 256  # of one client

ControlFor: TypeAlias = Callable[[str], NicControl]
Inspect: TypeAlias = Callable[[int], DmabufFacts]
Log: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Holding:
    """One thing that a client has, what it counts for, and its way back."""

    what: str
    undo: Callable[[], None]
    queues: frozenset[int] = frozenset()  # leased as long as this is held
    counts: Mapping[str, int] = field(default_factory=dict)  # by the quota's name


class Client:
    """One connection: who it is, and what it was given."""

    def __init__(self, peer: Peer) -> None:
        self.peer: Final = peer
        self.greeted = False
        self.nic: OpenedNic | None = None
        self.permit: Permit | None = None
        self.holdings: dict[int, Holding] = {}  # by handle, the oldest first
        self._last_handle = 0

    def hold(self, holding: Holding) -> int:
        """Take a holding; returns its handle."""
        self._last_handle += 1
        self.holdings[self._last_handle] = holding
        return self._last_handle

    def queues(self) -> frozenset[int]:
        """Return the queues that are leased to it."""
        return frozenset(queue for holding in self.holdings.values() for queue in holding.queues)

    def chosen(self) -> tuple[OpenedNic, Permit]:
        """Return the NIC that it opened, and what it may do with it."""
        if self.nic is None or self.permit is None:
            raise RemoteProtocolError("open a NIC first")
        return self.nic, self.permit


@dataclass(slots=True)
class _SharedSetting:
    value: object
    setting: Setting
    first: Peer
    holders: int = 0


class OpenedNic:
    """A NIC that clients have open, and the settings that they share."""

    def __init__(self, name: str, control: NicControl) -> None:
        self.name: Final = name
        self.control: Final = control
        self.clients = 0
        self._settings: dict[Change, _SharedSetting] = {}

    def share(self, change: Change, value: object, peer: Peer, make: Callable[[], Setting]) -> Setting:
        """Change a setting, unless somebody holds it with that very value; until as many ``let_go``.

        Raises:
            BusyError: it is held with another value.
        """
        shared = self._settings.get(change)
        if shared is None:
            shared = self._settings[change] = _SharedSetting(value, make(), peer)
        elif shared.value != value:
            raise BusyError(
                f"{change.value} of {self.name} is set otherwise, first by {shared.first}",
                hint=f"agree on one {change.value} for all programs on {self.name}, or wait until that one ends",
            )
        shared.holders += 1
        return shared.setting

    def share_all(self) -> Callable[[], None]:
        """Hold every setting there is; returns what lets go of them, the last first."""
        held = list(self._settings)
        for change in held:
            self._settings[change].holders += 1
        return partial(_all_of, [partial(self.let_go, change) for change in reversed(held)])

    def let_go(self, change: Change) -> None:
        """Hold a setting no more; the last to do so puts it back."""
        shared = self._settings[change]
        shared.holders -= 1
        if not shared.holders:
            del self._settings[change]
            shared.setting.close()


class Leasing:
    """All clients, and all that they were given.

    Args:
        control_for: makes what changes a NIC, by its name.
        allocators: by the kinds that clients ask for.
        network_namespace: the broker's own (inode).
        log: takes a line for each thing given, undone or refused.
    """

    def __init__(
        self,
        policy: Policy,
        control_for: ControlFor,
        allocators: Mapping[str, Allocator],
        *,
        network_namespace: int,
        log: Log,
        inspect: Inspect = inspect_dmabuf,
    ) -> None:
        self._policy = policy
        self._control_for = control_for
        self._allocators = allocators
        self._network_namespace = network_namespace
        self._log = log
        self._inspect = inspect
        self._clients: list[Client] = []
        self._nics: dict[str, OpenedNic] = {}
        self._lingering: list[tuple[int, Buffer]] = []  # memory that was given back, and is in use all the same; by uid

    def admit(self, peer: Peer) -> Client:
        """Take a client in.

        Raises:
            KernelError: EACCES: nothing is allowed to it; EDQUOT: it is one too many of its user.
        """
        self._policy.check_listed(peer)
        self._policy.check_quota(peer, "connect", "clients", self._used(peer.user_id)["clients"], 1)
        client = Client(peer)
        self._clients.append(client)
        return client

    def leave(self, client: Client) -> None:
        """Let a client go, and undo all that it was given, the last first."""
        self._clients.remove(client)
        with contextlib.suppress(Exception):  # it is in the log, and there is nobody to tell
            self._undo_all(client)
        nic, client.nic = client.nic, None
        if nic is not None:
            nic.clients -= 1
            if not nic.clients:
                del self._nics[nic.name]
                self._close_control(nic)

    def close(self) -> None:
        """Let all clients go, the last first."""
        for client in reversed(self._clients):
            self.leave(client)
        for _, buffer in self._lingering:
            buffer.close()
        self._lingering.clear()

    def look_for_freed(self) -> bool:
        """Let go of memory that nobody uses any more; returns whether there is more to look after."""
        lingering, self._lingering = self._lingering, []
        for user_id, buffer in lingering:
            self._let_memory_go(user_id, buffer)
        return bool(self._lingering)

    def obey(self, client: Client, request: protocol.Request, fds: Sequence[int]) -> tuple[protocol.Answer, int | None]:
        """Do what a client asks, if it may; returns the answer, and the fd to send with it, which stays the client's.

        Raises:
            RemoteProtocolError: the request has no place here.
            DevmemError, OSError, ValueError: it was refused, or failed; nothing changed.
        """
        if isinstance(request, protocol.Hello):
            client.greeted = True
            return protocol.Welcome(version=protocol.VERSION, kinds=list(self._policy.memory)), None
        if not client.greeted:
            raise RemoteProtocolError("say hello first")
        match request:
            case protocol.OpenNic():
                return self._open(client, request), None
            case protocol.SetHeaderSplit() | protocol.SetHdsThresh() | protocol.SetRss():
                return self._change(client, request), None
            case protocol.AddNtuple():
                return self._add_ntuple(client, request.rule.flow_rule()), None
            case protocol.Attach():
                return self._attach(client, request, fds[0]), None
            case protocol.Allocate():
                return self._allocate(client, request)
            case protocol.Undo():
                return self._undo(client, request.handle), None
            case protocol.UndoAll():
                self._undo_all(client)
                return protocol.Done(), None
            case protocol.GetStatus():
                return self._status(client.peer), None

    # --- what clients are given ---

    def _open(self, client: Client, request: protocol.OpenNic) -> protocol.Done:
        if client.nic is not None:
            raise RemoteProtocolError("a connection is about one NIC: make another one for another")
        name = request.nic
        permit = self._policy.permit(client.peer, name)
        if request.network_namespace != self._network_namespace:
            raise KernelError(
                errno.EXDEV,
                f"open {name} by the broker",
                extack="this program is in another network namespace than the broker",
                hint="run both in one, or start a broker in this one: devmem-tcp broker --socket PATH",
            )
        nic = self._nics.get(name)
        if nic is None:
            nic = self._nics[name] = OpenedNic(name, self._control_for(name))
        nic.clients += 1
        client.nic, client.permit = nic, permit
        self._log(f"{client.peer}: opened {name}")
        return protocol.Done()

    def _change(
        self, client: Client, request: protocol.SetHeaderSplit | protocol.SetHdsThresh | protocol.SetRss
    ) -> protocol.Changed:
        nic, permit = client.chosen()
        peer, control = client.peer, nic.control
        self._check_handles(client)
        match request:
            case protocol.SetHeaderSplit(mode=mode):
                permit.check_header_split(peer, mode)
                change = Change.HEADER_SPLIT
                setting = nic.share(change, mode, peer, lambda: control.set_header_split(mode))
            case protocol.SetHdsThresh(size_bytes=size_bytes):
                permit.check_hds_thresh(peer, size_bytes)
                change = Change.HDS_THRESH
                setting = nic.share(change, size_bytes, peer, lambda: control.set_hds_thresh(size_bytes))
            case protocol.SetRss(table=table, words=words):
                permit.check_rss(peer, table)
                change = Change.RSS
                setting = nic.share(change, table, peer, lambda: control.set_rss(table, words))
        description = setting.description[: protocol.MAX_WORDS]
        handle = self._give(client, Holding(description, lambda: nic.let_go(change)))
        return protocol.Changed(handle=handle, description=description)

    def _add_ntuple(self, client: Client, rule: FlowRule) -> protocol.RuleAdded:
        nic, permit = client.chosen()
        self._check_handles(client)
        permit.check_rule(client.peer, rule)
        self._check_lease(client, nic, {rule.queue})
        both_versions = rule.family is None and rule.src_ip is None and rule.dst_ip is None
        rules = 2 if both_versions else 1
        self._check_quota(client, "ntuple rule", "rules", rules)
        added = nic.control.add_ntuple(rule)
        description = added.description[: protocol.MAX_WORDS]
        holding = Holding(description, added.close, frozenset({rule.queue}), {"rules": rules})
        handle = self._give(client, holding)
        return protocol.RuleAdded(handle=handle, description=description, rule=protocol.Rule.of(added.rule))

    def _attach(self, client: Client, request: protocol.Attach, fd: int) -> protocol.Attached:
        nic, permit = client.chosen()
        self._check_handles(client)
        queues = frozenset(request.queues)
        permit.check_queues(client.peer, request.queues)
        self._check_lease(client, nic, queues)
        size_bytes = self._inspect(fd).size_bytes
        self._check_quota(client, "bind-rx", "bytes_bound", size_bytes)
        attached = nic.control.attach(fd, request.queues, request.rx_page_size)
        let_go = nic.share_all()
        what = f"dma-buf of {size_bytes} bytes bound to {nic.name} queues {sorted(queues)}, id {attached.dmabuf_id}"
        undo = Holding(what, lambda: _all_of([attached.close, let_go]), queues, {"bytes_bound": size_bytes})
        return protocol.Attached(handle=self._give(client, undo), dmabuf_id=attached.dmabuf_id)

    def _allocate(self, client: Client, request: protocol.Allocate) -> tuple[protocol.Allocated, int | None]:
        self._check_handles(client)
        self._policy.check_memory(request.kind)
        self.look_for_freed()
        self._check_quota(client, f"allocate {request.kind}", "buffers", 1)
        self._check_quota(client, f"allocate {request.kind}", "bytes_allocated", request.size_bytes)
        buffer = self._allocators[request.kind].allocate(request.size_bytes)
        user_id = client.peer.user_id
        holding = Holding(
            f"{request.kind} of {buffer.size_bytes} bytes",
            lambda: self._let_memory_go(user_id, buffer),
            counts={"buffers": 1, "bytes_allocated": buffer.size_bytes},
        )
        return protocol.Allocated(handle=self._give(client, holding)), buffer.dmabuf_fd

    def _give(self, client: Client, holding: Holding) -> int:
        self._log(f"{client.peer}: {holding.what}")
        return client.hold(holding)

    def _status(self, peer: Peer) -> protocol.Status:
        used, allowed = self._used(peer.user_id), self._policy.quota(peer).limits()
        leased: dict[str, set[int]] = {}
        for client in self._clients:
            if client.nic is not None and client.peer.user_id == peer.user_id:
                leased.setdefault(client.nic.name, set()).update(client.queues())
        return protocol.Status(
            user_id=peer.user_id,
            quotas={name: protocol.Amount(used=used[name], allowed=allowed[name]) for name in QUOTA_NAMES},
            leased={name: sorted(queues) for name, queues in leased.items()},
        )

    # --- what they may not have ---

    def _check_handles(self, client: Client) -> None:
        if len(client.holdings) >= MAX_HANDLES:
            raise BusyError(f"a connection to the broker holds {MAX_HANDLES} things at most", hint="close some first")

    def _check_lease(self, client: Client, nic: OpenedNic, queues: set[int] | frozenset[int]) -> None:
        """Raise unless the queues are the client's, or free and within its user's quota."""
        for other in self._clients:
            if other is not client and other.nic is nic and (taken := sorted(other.queues() & queues)):
                raise BusyError(
                    f"queue {taken[0]} of {nic.name} is leased to {other.peer}",
                    hint=f"take another queue, or wait until that program ends: ps -p {other.peer.pid}",
                )
        self._check_quota(client, "lease of queues", "queues", len(queues - client.queues()))

    def _check_quota(self, client: Client, call: str, name: str, asked: int) -> None:
        if asked:
            self._policy.check_quota(client.peer, call, name, self._used(client.peer.user_id)[name], asked)

    def _used(self, user_id: int) -> dict[str, int]:
        """Return what all programs of a user have together, by the quotas' names."""
        used = dict.fromkeys(QUOTA_NAMES, 0)
        for client in self._clients:
            if client.peer.user_id == user_id:
                used["clients"] += 1
                used["queues"] += len(client.queues())
                for holding in client.holdings.values():
                    for name, count in holding.counts.items():
                        used[name] += count
        for owner, buffer in self._lingering:
            if owner == user_id:
                used["buffers"] += 1
                used["bytes_allocated"] += buffer.size_bytes
        return used

    # --- ways back ---

    def _undo(self, client: Client, handle: int) -> protocol.Done:
        holding = client.holdings.pop(handle, None)
        if holding is not None:
            try:
                holding.undo()
            except Exception as error:
                self._log(f"{client.peer}: undo failed: {holding.what}: {error}")
                raise
            self._log(f"{client.peer}: undone: {holding.what}")
        return protocol.Done()

    def _undo_all(self, client: Client) -> None:
        _all_of([partial(self._undo, client, handle) for handle in reversed(client.holdings)])

    def _let_memory_go(self, user_id: int, buffer: Buffer) -> None:
        """Let go of memory, or look after it and count it on while others hold it: an fd cannot be taken back."""
        assert buffer.dmabuf_fd is not None  # it was sent
        try:
            in_use = self._inspect(buffer.dmabuf_fd).references > 1
        except (OSError, DevmemError):
            in_use = True  # as far as anybody can tell: look again later
        if in_use:
            self._lingering.append((user_id, buffer))
        else:
            buffer.close()

    def _close_control(self, nic: OpenedNic) -> None:
        try:
            nic.control.close()
        except Exception as error:
            self._log(f"{nic.name}: not everything could be put back: {error}")


def _all_of(steps: Sequence[Callable[[], object]]) -> None:
    """Take every step, whatever an earlier one raised; then raise the first error there was."""
    first: Exception | None = None
    for step in steps:
        try:
            step()
        except Exception as error:
            first = first or error
    if first is not None:
        raise first
