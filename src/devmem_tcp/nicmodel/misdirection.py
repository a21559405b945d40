"""Why a flow reaches no bound queue: the reason, and what to type, in words."""

from __future__ import annotations

import ipaddress
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from devmem_tcp.contract import DevmemSocket, Nic
from devmem_tcp.errors import NotZeroCopy, SteeringWarning
from devmem_tcp.nicmodel.flow import Flow, parse_network
from devmem_tcp.nicmodel.ntuple import ethtool_command
from devmem_tcp.types import FlowRule


class Misdirection(NamedTuple):
    """What is wrong with a flow's way, and what mends it: a command line and the same in Python."""

    reason: str
    hint: str


def check_steering(nic: Nic, sock: DevmemSocket, bound: Sequence[int], *, strict: bool, stacklevel: int) -> None:
    """Prove that an accepted socket's flow comes over a bound queue, or say why it does not.

    Args:
        bound: queues with an RX binding; none: nothing is expected of the flow.
        strict: raise, where else a SteeringWarning is enough.
        stacklevel: of the warning, counted from here.

    Raises:
        NotZeroCopy: ``strict``, and the flow comes over another queue.
    """
    queue = sock.rx_queue
    if not bound or queue in bound:
        return
    flow = Flow.between(sock.remote_address, sock.local_address)
    reason, hint = explain_misdirection(nic.name, flow, queue, bound, nic.ntuple_rules)
    host, port = sock.remote_address
    text = f"payload from {host} port {port} will land in host memory: {reason}"
    if strict:
        raise NotZeroCopy(text, linear_bytes=0, host_bytes=0, data=b"", hint=hint)
    warnings.warn(f"{text}\n  hint: {hint}", SteeringWarning, stacklevel=stacklevel + 1)


def explain_misdirection(
    nic: str, flow: Flow, queue: int, bound: Sequence[int], rules: Sequence[FlowRule]
) -> Misdirection:
    """Say why packets of ``flow`` come over ``queue`` and not over one of the ``bound`` queues.

    Args:
        nic: the interface's name.
        flow: of received packets: ``src`` is the remote end.
        queue: where they come.
        bound: queues with a binding, at least one, without ``queue``.
        rules: the NIC's ntuple rules, in order of location.
    """
    target = bound[0]
    wanted = FlowRule(target, flow.family, dst_port=flow.dport)
    add = f"{ethtool_command(nic, wanted)}   # nic.add_ntuple(dst_port={flow.dport}, queue={target})"
    matching = [rule for rule in rules if matches(rule, flow)]
    if not matching:
        return Misdirection(f"no ntuple rule matches it, so RSS sent it to RX queue {queue}", add)
    first = matching[0]
    if first.queue not in bound:
        reason = f"the ntuple rule at location {first.location} sends it to RX queue {first.queue}, which is not bound"
        return Misdirection(reason, f"ethtool -N {nic} delete {first.location}, then: {add}")
    reason = f"the ntuple rule at location {first.location} says RX queue {first.queue}, yet it came over {queue}"
    return Misdirection(reason, f"rules work only while the feature is on: ethtool -K {nic} ntuple on")


def matches(rule: FlowRule, flow: Flow) -> bool:
    """Whether a rule as the NIC holds it matches a flow."""
    return (
        rule.family is flow.family
        and _address_matches(rule.src_ip, flow.src)
        and _address_matches(rule.dst_ip, flow.dst)
        and (rule.src_port is None or (rule.src_port ^ flow.sport) & rule.src_port_mask == 0)
        and (rule.dst_port is None or (rule.dst_port ^ flow.dport) & rule.dst_port_mask == 0)
    )


def _address_matches(wanted: str | None, packed: bytes) -> bool:
    return wanted is None or ipaddress.ip_address(packed) in parse_network(wanted)
