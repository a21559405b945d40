"""The administrator's file, /etc/devmem-tcp/broker.toml: read, checked whole, and made a Policy."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from devmem_tcp.broker.policy import QUOTA_NAMES, Change, NumberSet, Permit, Policy, Quota, Who

DEFAULT_PATH: Final = "/etc/devmem-tcp/broker.toml"
EXAMPLE: Final = """\
# /etc/devmem-tcp/broker.toml: who may do what by `devmem-tcp broker`.
# Check it: devmem-tcp broker --check     Put it in force: systemctl restart devmem-tcp-broker

[nic.eth1]
rss_queues = "0-11"             # what ordinary flows are spread over; devmem queues are others
                                # set it once: ethtool -X eth1 equal 12

[[nic.eth1.allow]]              # the first that names a client counts for it; users and groups by name or number
users = ["alice"]
groups = ["devmem"]
queues = "12-15"                # may be leased; a queue of one client is no other's
ports = "5201-5299"             # TCP ports of this machine whose flows may be steered to those queues
# remote_ports = "5201"         # and of peers: a rule by it takes such flows from every program here
# locations = "100-199"         # places in the NIC's rule table that may be asked for; none: the NIC chooses
settings = ["header-split", "hds-thresh", "rss"]    # header split on, hds-thresh 0, RSS over rss_queues: no others

[memory]
kinds = ["udmabuf", "dma-heap system"]      # what the broker allocates for clients that cannot open its device

[quota]                         # of each user, over all its programs
clients = 16                    # connections: a NIC or a buffer each
queues = 2
rules = 16
buffers = 16
bytes_bound = "1G"
bytes_allocated = "256M"

[quota.user.alice]              # what differs for one
bytes_bound = "4G"

[quota.group.devmem]            # a user's own counts before a group's
queues = 4
"""

_MAX_QUEUE: Final = 0xFFFF
_MAX_PORT: Final = 0xFFFF
_MAX_LOCATION: Final = 0xFFFF_FFFF
_MOST_NUMBERS: Final = 1 << 16  # of one set, so that it can be looked at whole
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE: Final = re.compile(r"(\d{1,15})([KMGT]?)")
_RANGE: Final = re.compile(r"(\d{1,10})(?:-(\d{1,10}))?")

Lookup: TypeAlias = Callable[[str], int]  # raises KeyError for a name that is not known
Count: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 20)]
Table = TypeVar("Table", bound=msgspec.Struct)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    nic: dict[str, dict[str, Any]] = {}
    memory: dict[str, Any] = {}
    quota: dict[str, Any] = {}


class _Nic(msgspec.Struct, forbid_unknown_fields=True):
    rss_queues: str | int = ""
    allow: list[dict[str, Any]] = []


class _Allow(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    users: list[str | int] = []
    groups: list[str | int] = []
    queues: str | int
    ports: str | int = ""
    remote_ports: str | int = ""
    locations: str | int = ""
    settings: list[Change] = []


class _Memory(msgspec.Struct, forbid_unknown_fields=True):
    kinds: list[str] = []


class _Quota(msgspec.Struct, forbid_unknown_fields=True):
    clients: Count | None = None
    queues: Count | None = None
    rules: Count | None = None
    buffers: Count | None = None
    bytes_bound: str | int | None = None
    bytes_allocated: str | int | None = None


class _Quotas(_Quota, forbid_unknown_fields=True):
    user: dict[str, dict[str, Any]] = {}
    group: dict[str, dict[str, Any]] = {}


def parse(text: str, source: str, *, user_id_of: Lookup, group_id_of: Lookup, kinds: Mapping[str, object]) -> Policy:
    """Return the policy that a file's text states.

    Args:
        source: the file's path, for people.
        user_id_of, group_id_of: look a name up on this machine.
        kinds: of memory, that the broker can allocate.

    Raises:
        ValueError: the file is not right; says where, by key (or by line, if it is no TOML), and what belongs there.
    """
    return _Reader(source, user_id_of, group_id_of).policy(text, kinds)


class _Reader:
    """One file on its way to a Policy."""

    def __init__(self, source: str, user_id_of: Lookup, group_id_of: Lookup) -> None:
        self._source = source
        self._lookups = {"user": user_id_of, "group": group_id_of}

    def policy(self, text: str, kinds: Mapping[str, object]) -> Policy:
        try:
            read = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise self._wrong("", str(error)) from None
        file = self._table(read, _File, "")
        memory = self._table(file.memory, _Memory, "memory")
        for kind in memory.kinds:
            if kind not in kinds:
                raise self._wrong("memory.kinds", f"{kind!r} is none of: {', '.join(kinds)}")
        default, others = self._quotas(file.quota)
        return Policy(
            source=self._source,
            permits=tuple(permit for name, nic in file.nic.items() for permit in self._permits(name, nic)),
            quotas=others,
            default_quota=default,
            memory=tuple(memory.kinds),
        )

    def _permits(self, name: str, values: Mapping[str, Any]) -> list[Permit]:
        key = f"nic.{name}"
        nic = self._table(values, _Nic, key)
        rss_queues = self._numbers(nic.rss_queues, f"{key}.rss_queues", _MAX_QUEUE)
        permits = []
        for index, entry in enumerate(nic.allow, 1):
            where = f"{key}.allow[{index}]"
            allow = self._table(entry, _Allow, where)
            queues = self._numbers(allow.queues, f"{where}.queues", _MAX_QUEUE)
            if both := sorted(queues.numbers() & rss_queues.numbers()):
                raise self._wrong(
                    f"{where}.queues",
                    f"queue {both[0]} is in {key}.rss_queues too: strangers' packets would land there",
                )
            if Change.RSS in allow.settings and not rss_queues:
                raise self._wrong(f"{where}.settings", f'"rss" needs {key}.rss_queues, the only ones RSS may be set to')
            permits.append(
                Permit(
                    key=f"{where} of {self._source}",
                    nic=name,
                    who=self._who(allow, where),
                    queues=queues,
                    ports=self._numbers(allow.ports, f"{where}.ports", _MAX_PORT),
                    remote_ports=self._numbers(allow.remote_ports, f"{where}.remote_ports", _MAX_PORT),
                    locations=self._numbers(allow.locations, f"{where}.locations", _MAX_LOCATION),
                    settings=frozenset(allow.settings),
                    rss_queues=rss_queues,
                )
            )
        return permits

    def _who(self, allow: _Allow, where: str) -> Who:
        if not (allow.users or allow.groups):
            raise self._wrong(where, "names nobody: give users = [...] or groups = [...]")
        named = (("users", allow.users), ("groups", allow.groups))
        words = ", ".join(f"{what} {', '.join(map(str, names))}" for what, names in named if names)
        return Who(
            frozenset(self._id("user", name, f"{where}.users") for name in allow.users),
            frozenset(self._id("group", name, f"{where}.groups") for name in allow.groups),
            words,
        )

    def _quotas(self, values: Mapping[str, Any]) -> tuple[Quota, tuple[tuple[Who, Quota], ...]]:
        table = self._table(values, _Quotas, "quota")
        default = self._quota(table, Quota(), "quota")
        others = []
        for what, tables in (("user", table.user), ("group", table.group)):
            for name, limits in tables.items():
                key = f"quota.{what}.{name}"
                ids = frozenset({self._id(what, int(name) if name.isdecimal() else name, key)})
                nobody: frozenset[int] = frozenset()
                who = Who(*((ids, nobody) if what == "user" else (nobody, ids)), f"{what} {name}")
                others.append((who, self._quota(self._table(limits, _Quota, key), default, key)))
        return default, tuple(others)

    def _quota(self, table: _Quota, default: Quota, key: str) -> Quota:
        limits = default.limits()
        for name in QUOTA_NAMES:
            if (value := getattr(table, name)) is not None:
                limits[name] = self._size(value, f"{key}.{name}") if name.startswith("bytes_") else value
        return Quota(key=f"[{key}]", **limits)

    def _table(self, values: Mapping[str, Any], kind: type[Table], key: str) -> Table:
        try:
            return msgspec.convert(values, kind)
        except msgspec.ValidationError as error:
            what, _, path = str(error).partition(" - at `$")
            index = re.sub(
                r"\[(\d+)\]", lambda found: f"[{int(found[1]) + 1}]", path.rstrip("`")
            )  # people count from 1
            raise self._wrong(f"{key}{index}".lstrip("."), what.replace("Object", "this table")) from None

    def _id(self, what: str, name: str | int, key: str) -> int:
        if isinstance(name, int):
            if not 0 <= name < 0xFFFF_FFFF:
                raise self._wrong(key, f"{name} is no {what} id")
            return name
        try:
            return self._lookups[what](name)
        except KeyError:
            raise self._wrong(key, f"this machine has no {what} {name!r}") from None

    def _numbers(self, value: str | int, key: str, most: int) -> NumberSet:
        ranges = []
        for part in filter(None, (piece.strip() for piece in str(value).split(","))):
            found = _RANGE.fullmatch(part)
            if found is None:
                raise self._wrong(key, f'{part!r} is neither a number nor a range: write "5", "0-11" or "1,4-7"')
            first, last = int(found[1]), int(found[2] or found[1])
            if not first <= last <= most:
                raise self._wrong(key, f"{part!r} is out of order or above {most}")
            ranges.append(range(first, last + 1))
        if sum(map(len, ranges)) > _MOST_NUMBERS:
            raise self._wrong(key, f"more than {_MOST_NUMBERS} numbers")
        return NumberSet(tuple(ranges))

    def _size(self, value: str | int, key: str) -> int:
        found = _SIZE.fullmatch(str(value))
        if found is None:
            raise self._wrong(key, f'{value!r} is no size: write bytes, or K, M, G, T of 1024, as in "64M"')
        return int(found[1]) * _UNITS[found[2]]

    def _wrong(self, key: str, what: str) -> ValueError:
        error = ValueError(f"{self._source}: {key + ': ' if key else ''}{what}")
        error.add_note("hint: devmem-tcp broker --example-config   # prints a file that is right")
        return error
