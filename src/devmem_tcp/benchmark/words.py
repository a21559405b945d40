"""Figures of the report as words, the same in the table, in the page and in its plots."""

from __future__ import annotations

from devmem_tcp.benchmark.plan import Kind, Work, size_name
from devmem_tcp.benchmark.results import End, Path, Range, Row


def number(value: float) -> str:
    """Write three digits of a figure, thousands apart: 0.0123, 4.56, 1,230."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def span(found: Range) -> str:
    """Write the least and the most; nothing if there is one value."""
    if found.least == found.most:
        return ""
    return f"{number(found.least)}–{number(found.most)}"


def both(found: Range) -> str:
    """Write a median, and its range if it has one."""
    found_span = span(found)
    return f"{number(found.median)} ({found_span})" if found_span else number(found.median)


def what(work: Work) -> str:
    """Write what was sent: 4 KiB, 64 KiB × 8."""
    many = f" × {work.connections}" if work.kind is Kind.CONNECTIONS else ""
    return f"{size_name(work.size_bytes)}{many}"


def way(work: Work) -> str:
    """Write how it was sent: messages, blocking."""
    return f"{work.form.value}, {work.driver.value}"


def received(path: Path) -> str:
    """Write by which paths bytes came, with their backend."""
    return (
        f"{path.backend}: dmabuf {path.received_dmabuf:,}, linear {path.received_linear:,}, "
        f"host {path.received_host:,}, copied {path.copied:,}"
    )


def sent(path: Path) -> str:
    """Write from where bytes were sent, with their backend."""
    return f"{path.backend}: dmabuf {path.sent_dmabuf:,}, host {path.sent_host:,}"


def host_bytes(row: Row) -> int:
    """Return how many of the bytes received did not stay in the bound Buffer, at either end."""
    ends = (row.receiver, row.sender)
    return sum(end.received_linear + end.received_host for end in ends)


def where(end: End) -> str:
    """Write what an end is."""
    machine = end.machine
    return (
        f"{end.backend} backend, NIC {end.nic}, up to {end.buffer_bytes >> 20:,} MiB bound; {machine.cpu}, "
        f"{machine.cpus} CPUs, {machine.memory_bytes >> 30:,} GiB; {machine.kernel} {machine.architecture}; "
        f"devmem-tcp {machine.devmem_tcp}, Python {machine.python}, NumPy {machine.numpy}; "
        f"congestion control of the system: {machine.congestion_control}"
    )
