"""What the process of the NICs is told, and what it answers: JSON, one object a line, on a UNIX socket."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec


class NicPlug(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One NIC to make. ``path`` is the UNIX socket that QEMU finds it at; ``mtu`` the largest one it takes."""

    name: str
    path: str
    mac: str
    queues: int
    mtu: int
    seed: int = 0
    faults: dict[str, float] = {}


class Wiring(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All NICs of one wire, and the UNIX socket that their process listens on for commands.

    ``host_port`` is the path of another one, at which processes of the host are plugged into the wire; empty: none.
    """

    control: str
    nics: list[NicPlug]
    host_port: str = ""


class SetFaults(
    msgspec.Struct, frozen=True, kw_only=True, tag="set-faults", tag_field="do", forbid_unknown_fields=True
):
    """Change faults of a NIC, or of all; the answer is what they are then, by NIC. Names are FaultSettings'."""

    faults: dict[str, float]
    nic: str | None = None


class SetLink(msgspec.Struct, frozen=True, kw_only=True, tag="set-link", tag_field="do", forbid_unknown_fields=True):
    """Pull a NIC's cable out, or put it back."""

    nic: str
    up: bool


class RequestReset(msgspec.Struct, frozen=True, kw_only=True, tag="reset", tag_field="do", forbid_unknown_fields=True):
    """Make a NIC ask its driver for a reset."""

    nic: str


class StartCapture(
    msgspec.Struct, frozen=True, kw_only=True, tag="capture", tag_field="do", forbid_unknown_fields=True
):
    """Capture packets, whole or their first ``snap_length`` bytes, to a pcapng file; ``ports`` empty: of all NICs."""

    path: str
    ports: list[str] = []
    snap_length: int = 0


class StopCapture(msgspec.Struct, frozen=True, tag="stop-capture", tag_field="do", forbid_unknown_fields=True):
    """End the capture; the answer is a Captured."""


class GetStatistics(msgspec.Struct, frozen=True, tag="statistics", tag_field="do", forbid_unknown_fields=True):
    """Answer with the counters of every NIC, its socket and its port on the wire, of host ports, and the CPU time."""


Command: TypeAlias = SetFaults | SetLink | RequestReset | StartCapture | StopCapture | GetStatistics


class Captured(msgspec.Struct, frozen=True, kw_only=True):
    """What a capture came to: how many packets were written, and what ended it early; empty: nothing did."""

    packets: int
    failure: str = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of a command: ``error`` says what was wrong with it, ``result`` depends on the command."""

    result: Any = None
    error: str = ""
