"""The admin commands, each a function of the device's state and the command's fields.

Layout and meaning: drivers/net/ethernet/google/gve/gve_adminq.h and gve_adminq.c. A command that fails changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from struct import Struct
from typing import Final

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab.gvnic import descriptors as dqo
from devmem_tcp.lab.gvnic.description import describe
from devmem_tcp.lab.gvnic.flow_rules import MAX_FLOW_RULES, RULE, RuleError
from devmem_tcp.lab.gvnic.rings import Ring
from devmem_tcp.lab.gvnic.rx import RxQueue
from devmem_tcp.lab.gvnic.state import DeviceState
from devmem_tcp.lab.gvnic.statistics import StatsReport
from devmem_tcp.lab.gvnic.steering import ALL_HASH_TYPES, RSS_KEY_BYTES, RSS_TABLE_SIZE
from devmem_tcp.lab.gvnic.tx import TxQueue

LINK_SPEED_MBPS: Final = 100_000
QUEUE_FORMAT_DQO_RDA: Final = 3
RAW_ADDRESSING: Final = 0xFFFFFFFF  # GVE_RAW_ADDRESSING_QPL_ID
MIN_MTU: Final = 68

_U32: Final = Struct("!I")
_U64: Final = Struct("!Q")
_MIN_RING: Final = 8
_MAX_RING: Final = 1 << 15
_DRIVER_INFO: Final = Struct("!B3x12xQ")  # operating system; the first of four words of capabilities
_CAPABILITY_DQO_RDA: Final = 1 << 3
_FLOW_RULE: Final = Struct("!H2x84sI")  # opcode, rule, location
_RULES_HEADER: Final = Struct("!IIII")  # rules, most rules, rules that follow, bytes in all
_RSS_HEADER: Final = Struct("!IHBx")  # bytes in all, hash types, algorithm
_TABLE: Final = Struct(f"!{RSS_TABLE_SIZE}I")
_ALGORITHM_TOEPLITZ: Final = 1  # ETH_RSS_HASH_TOP


class Status(IntEnum):
    """Status of an admin command; enum gve_adminq_statuses."""

    PASSED = 0x1
    ALREADY_EXISTS = 0xFFFFFFF1
    FAILED_PRECONDITION = 0xFFFFFFF5
    INVALID_ARGUMENT = 0xFFFFFFF7
    NOT_FOUND = 0xFFFFFFF8
    OUT_OF_RANGE = 0xFFFFFFF9
    RESOURCE_EXHAUSTED = 0xFFFFFFFC
    UNIMPLEMENTED = 0xFFFFFFFE


class CommandError(DevmemError):
    """An admin command is refused; ``status`` is its answer."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class FlowRuleChange(IntEnum):
    """What to do to flow rules; enum gve_adminq_flow_rule_cfg_opcode."""

    ADD = 0
    DELETE = 1
    RESET = 2


class FlowRuleQuery(IntEnum):
    """What to tell of flow rules; enum gve_adminq_flow_rule_query_opcode."""

    RULES = 0
    IDS = 1
    STATS = 2


def _check(condition: bool, message: str, status: Status = Status.INVALID_ARGUMENT) -> None:
    if not condition:
        raise CommandError(status, message)


def _describe_device(state: DeviceState, address: int, version: int, available: int) -> None:
    _check(version == 1, f"device descriptor version {version}", Status.UNIMPLEMENTED)
    description = describe(state.mac, state.queues, state.max_mtu)
    _check(available >= len(description), f"{available} bytes of room", Status.RESOURCE_EXHAUSTED)
    state.dma.write(address, description)


def _configure_resources(
    state: DeviceState, counters: int, doorbells: int, count: int, blocks: int, stride: int, base: int, format: int
) -> None:
    _check(not state.blocks, "resources are configured already", Status.ALREADY_EXISTS)
    _check(format == QUEUE_FORMAT_DQO_RDA, f"queue format {format}", Status.UNIMPLEMENTED)
    _check(0 < blocks < state.vectors.count and base <= 1, f"{blocks} notify blocks from vector {base} on")
    _check(stride >= _U32.size, f"doorbell indexes {stride} bytes apart")
    _check(count <= 2 * state.queues, f"{count} counters")
    state.dma.write(counters, bytes(count * _U32.size))
    for index in range(blocks):
        state.dma.write(doorbells + index * stride, _U32.pack(index))
    state.configure(blocks, base)


def _check_queue(state: DeviceState, queue: int, block: int, page_list: int, *ring_sizes: int) -> None:
    _check(bool(state.blocks), "no resources are configured", Status.FAILED_PRECONDITION)
    _check(queue < state.queues, f"queue {queue} of {state.queues}", Status.OUT_OF_RANGE)
    _check(block < len(state.blocks), f"notify block {block} of {len(state.blocks)}", Status.OUT_OF_RANGE)
    _check(page_list == RAW_ADDRESSING, f"page list {page_list}", Status.UNIMPLEMENTED)
    for size in ring_sizes:
        _check(_MIN_RING <= size <= _MAX_RING and size & (size - 1) == 0, f"a ring of {size} entries")


def _create_tx_queue(
    state: DeviceState,
    queue: int,
    resources: int,
    ring: int,
    page_list: int,
    block: int,
    completion_ring: int,
    size: int,
    completions: int,
) -> None:
    _check_queue(state, queue, block, page_list, size, completions)
    _check(queue not in state.tx, f"TX queue {queue} exists", Status.ALREADY_EXISTS)
    descriptors = Ring(ring, size, dqo.TX_DESCRIPTOR.size)
    done = Ring(completion_ring, completions, dqo.TX_COMPLETION.size)
    for one in (descriptors, done):
        state.dma.view(one.address, one.size_bytes)  # refused if not all of it is there
    state.dma.write(resources, _U32.pack(state.tx_doorbell(queue)) + _U32.pack(queue))
    state.add_tx(TxQueue(state.dma, state.mistakes, state.blocks[block], queue, descriptors, done, state.send), queue)


def _create_rx_queue(
    state: DeviceState,
    queue: int,
    block: int,
    resources: int,
    completion_ring: int,
    buffer_ring: int,
    page_list: int,
    completions: int,
    buffer_bytes: int,
    buffers: int,
    rsc: int,
    header_bytes: int,
) -> None:
    _check_queue(state, queue, block, page_list, completions, buffers)
    _check(queue not in state.rx, f"RX queue {queue} exists", Status.ALREADY_EXISTS)
    _check(buffers <= completions, f"{buffers} buffers, but {completions} completions")
    _check(0 < buffer_bytes <= dqo.RX_MAX_LENGTH, f"buffers of {buffer_bytes} bytes")
    _check(header_bytes <= dqo.RX_MAX_HEADER, f"header buffers of {header_bytes} bytes")
    posted = Ring(buffer_ring, buffers, dqo.RX_DESCRIPTOR.size)
    done = Ring(completion_ring, completions, dqo.RX_COMPLETION.size)
    for one in (posted, done):
        state.dma.view(one.address, one.size_bytes)
    state.dma.write(resources, _U32.pack(state.rx_doorbell(queue)) + _U32.pack(state.queues + queue))
    state.add_rx(
        RxQueue(
            state.dma,
            state.mistakes,
            state.blocks[block],
            queue,
            posted,
            done,
            buffer_bytes=buffer_bytes,
            header_bytes=header_bytes,
            rsc=rsc != 0,
        )
    )


def _destroy_tx_queue(state: DeviceState, queue: int) -> None:
    _check(queue in state.tx, f"no TX queue {queue}", Status.NOT_FOUND)
    state.remove_tx(queue)


def _destroy_rx_queue(state: DeviceState, queue: int) -> None:
    _check(queue in state.rx, f"no RX queue {queue}", Status.NOT_FOUND)
    state.remove_rx(queue)


def _deconfigure_resources(state: DeviceState) -> None:
    state.deconfigure()


def _configure_rss(
    state: DeviceState, types: int, algorithm: int, key_bytes: int, entries: int, key_address: int, table_address: int
) -> None:
    """Change what is given; 0 means "as it was" (gve_adminq_configure_rss)."""
    _check(algorithm in (0, _ALGORITHM_TOEPLITZ), f"hash algorithm {algorithm}", Status.UNIMPLEMENTED)
    _check(types <= ALL_HASH_TYPES, f"hash types {types:#x}")
    _check(key_bytes in (0, RSS_KEY_BYTES), f"a hash key of {key_bytes} bytes")
    _check(entries in (0, RSS_TABLE_SIZE), f"an indirection table of {entries} entries")
    key = bytes(state.dma.read(key_address, key_bytes))
    if entries:
        table = _TABLE.unpack(state.dma.read(table_address, _TABLE.size))
        _check(max(table) < state.queues, f"an indirection table with queue {max(table)}", Status.OUT_OF_RANGE)
        state.choice.set_table(table)
    if key:
        state.choice.set_key(key)
    if types:
        state.choice.set_hash_types(types)


def _query_rss(state: DeviceState, available: int, address: int) -> None:
    choice = state.choice
    size = _RSS_HEADER.size + RSS_KEY_BYTES + _TABLE.size
    _check(available >= size, f"{available} bytes of room", Status.RESOURCE_EXHAUSTED)
    header = _RSS_HEADER.pack(size, choice.hash_types, _ALGORITHM_TOEPLITZ)
    state.dma.write(address, header + choice.model.toeplitz.key + _TABLE.pack(*choice.model.table.entries))


def _set_driver_parameter(state: DeviceState, kind: int, value: int) -> None:
    _check(kind == 1, f"driver parameter {kind}", Status.UNIMPLEMENTED)  # GVE_SET_PARAM_MTU
    _check(MIN_MTU <= value <= state.max_mtu, f"an MTU of {value}", Status.OUT_OF_RANGE)
    state.mtu = value


def _report_stats(state: DeviceState, size: int, address: int, interval_ms: int) -> None:
    """Take the place of the statistics report; a size of 0 takes it away (gve_teardown_device_resources)."""
    if not size:
        state.report = None
        return
    state.dma.view(address, size)  # refused if not all of it is there
    state.report = StatsReport(address, size, max(interval_ms, 1) / 1000)


def _report_link_speed(state: DeviceState, address: int) -> None:
    state.dma.write(address, _U64.pack(LINK_SPEED_MBPS))


def _get_packet_type_map(state: DeviceState, available: int, address: int) -> None:
    table = dqo.packet_type_map()
    _check(available >= len(table), f"{available} bytes of room", Status.RESOURCE_EXHAUSTED)
    state.dma.write(address, table)


def _verify_driver_compatibility(state: DeviceState, size: int, address: int) -> None:
    _check(size >= _DRIVER_INFO.size, f"driver information of {size} bytes")
    _, capabilities = _DRIVER_INFO.unpack(state.dma.read(address, _DRIVER_INFO.size))
    _check(bool(capabilities & _CAPABILITY_DQO_RDA), "a driver without DQO-RDA", Status.FAILED_PRECONDITION)


def _query_flow_rules(state: DeviceState, query: int, start: int, available: int, address: int) -> None:
    """Tell of the rules from location ``start`` on, as many as fit."""
    rules = state.choice.rules
    _check(query in list(FlowRuleQuery), f"flow rule query {query}", Status.UNIMPLEMENTED)
    _check(available >= _RULES_HEADER.size, f"{available} bytes of room", Status.RESOURCE_EXHAUSTED)
    entry_bytes = _U32.size + (RULE.size if query == FlowRuleQuery.RULES else 0)
    room = 0 if query == FlowRuleQuery.STATS else (available - _RULES_HEADER.size) // entry_bytes
    told = [
        _U32.pack(location) + (raw if query == FlowRuleQuery.RULES else b"")
        for location, raw in rules.since(start)[:room]
    ]
    size = _RULES_HEADER.size + len(told) * entry_bytes
    header = _RULES_HEADER.pack(len(rules), MAX_FLOW_RULES, len(told), size)
    state.dma.write(address, header + b"".join(told))


def _extended(state: DeviceState, opcode: int, size: int, address: int) -> None:
    """Do a command that is too long for the admin queue; there is one."""
    _check(opcode == 0x101, f"extended command {opcode:#x}", Status.UNIMPLEMENTED)
    _check(size == _FLOW_RULE.size, f"a flow rule command of {size} bytes")
    change, raw, location = _FLOW_RULE.unpack(state.dma.read(address, size))
    rules = state.choice.rules
    if change == FlowRuleChange.ADD:
        try:
            rules.add(location, raw)
        except RuleError as error:
            status = Status.UNIMPLEMENTED if error.unsupported else Status.INVALID_ARGUMENT
            raise CommandError(status, str(error)) from None
    elif change == FlowRuleChange.DELETE:
        _check(rules.delete(location), f"no flow rule {location}", Status.NOT_FOUND)
    elif change == FlowRuleChange.RESET:
        rules.clear()
    else:
        raise CommandError(Status.UNIMPLEMENTED, f"flow rule change {change}")


COMMANDS: Final[dict[int, tuple[Struct, Callable[..., None]]]] = {
    0x1: (Struct("!QII"), _describe_device),
    0x2: (Struct("!QQIIIIB7x"), _configure_resources),
    0x5: (Struct("!I4xQQIIQHH4x"), _create_tx_queue),
    0x6: (Struct("!I8xIQQQIHHHBxH2x"), _create_rx_queue),
    0x7: (Struct("!I"), _destroy_tx_queue),
    0x8: (Struct("!I"), _destroy_rx_queue),
    0x9: (Struct(""), _deconfigure_resources),
    0xA: (Struct("!HBxHHQQ"), _configure_rss),
    0xB: (Struct("!I4xQ"), _set_driver_parameter),
    0xC: (Struct("!QQQ"), _report_stats),
    0xD: (Struct("!Q"), _report_link_speed),
    0xE: (Struct("!QQ"), _get_packet_type_map),
    0xF: (Struct("!QQ"), _verify_driver_compatibility),
    0x10: (Struct("!H2xIQQ"), _query_flow_rules),
    0x12: (Struct("!QQ"), _query_rss),
    0xFF: (Struct("!IIQ"), _extended),
}
"""Opcode to the layout of the command's fields, which follow opcode and status, and the function that does it."""
