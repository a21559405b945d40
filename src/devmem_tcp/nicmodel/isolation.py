"""Whether anything but the flows meant for it reaches a bound queue. Pure.

The kernel checks none of this (net/core/devmem.c, net_devmem_bind_dmabuf_to_queue), and what reaches a bound queue
and is not split, such as ARP and UDP, is dropped by the NIC or lands where only a device can read it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple


class OtherRule(NamedTuple):
    """An ntuple rule that is not ours: ``match`` says what it matches, for people."""

    location: int
    queue: int | None
    match: str


def weights_without(bound_queues: Collection[int], table: Sequence[int], queues: int) -> list[int]:
    """Return RSS weights, one for each queue, that keep unsteered flows off the bound queues; all 0: none is left.

    What is out of RSS stays out, if that leaves any: it may be bound by another program.

    Args:
        bound_queues: those to keep off.
        table: the RSS indirection table as it is.
        queues: how many RX queues there are.
    """
    others = set(table).difference(bound_queues) or set(range(queues)).difference(bound_queues)
    return [int(queue in others) for queue in range(queues)]


def isolation_warnings(
    table: Sequence[int], rules: Iterable[OtherRule], bound_queues: Collection[int], *, nic: str = "NIC"
) -> list[str]:
    """Return what sends other traffic to a bound queue, each with the command that mends it; none is right.

    Args:
        table: the RSS indirection table: a queue for each hash bucket.
        rules: ntuple rules that were not made for the bound queues.
        bound_queues: RX queues with a binding.
        nic: the interface's name, for the commands.
    """
    found = []
    hit = sorted(set(table) & set(bound_queues))
    if hit:
        share = sum(queue in bound_queues for queue in table)
        found.append(
            f"RSS sends {share} of {len(table)} hash buckets to bound {_queues(hit)}: flows that no rule steers land "
            f"in device memory, and what is not TCP is lost; fix: {_isolate(table, bound_queues, nic)}"
        )
    for rule in rules:
        if rule.queue in bound_queues:
            found.append(
                f"the ntuple rule at location {rule.location} ({rule.match}) sends other traffic to bound "
                f"{_queues([rule.queue])}; fix: ethtool -N {nic} delete {rule.location}"
            )
    return found


def _isolate(table: Sequence[int], bound: Collection[int], nic: str) -> str:
    """Return the command that keeps RSS off the bound queues, with as many others as it uses now or could."""
    last = max(max(table), max(bound))
    free = [queue for queue in range(last + 1) if queue not in bound]
    if not free:
        return f"ethtool -L {nic} rx {last + 2}   # RSS needs a queue that is not bound, then: ethtool -X {nic} …"
    if free == list(range(len(free))):
        return f"ethtool -X {nic} equal {len(free)}"
    weights = " ".join("0" if queue in bound else "1" for queue in range(max(free) + 1))
    return f"ethtool -X {nic} weight {weights}"


def _queues(queues: Sequence[int | None]) -> str:
    return f"RX queue{'s' if len(queues) > 1 else ''} {', '.join(map(str, queues))}"
