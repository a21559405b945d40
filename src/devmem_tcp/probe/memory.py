"""Checks of what exports dma-bufs: the memory to bind. One exporter is enough."""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

from devmem_tcp.probe.finding import error, ok
from devmem_tcp.sys import calls, cuda
from devmem_tcp.types import ProbeCheck

_UDMABUF: Final = "/dev/udmabuf"
_PARAMETERS: Final = "/sys/module/udmabuf/parameters"
_HEAPS: Final = "/dev/dma_heap"
_NO_LIMIT: Final = 0x7FFFFFFF  # the largest that the parameter, an int, can be
_ROOMY_MB: Final = 1024  # Linux's own limit, 64, is a hundredth of a second at 50 Gb/s
_DENIED: Final = frozenset({errno.EACCES, errno.EPERM})


class Exporter(NamedTuple):
    """One exporter of dma-bufs, and whether this process can use it."""

    check: ProbeCheck
    usable: bool


def udmabuf() -> Exporter:
    """Whether ordinary memory can be made a dma-buf, and how much in one."""
    name, needed = "udmabuf", "memory.Udmabuf: dma-bufs of ordinary memory"
    refused = _refused(_UDMABUF)
    if refused is not None and refused.errno in _DENIED:
        found, fix = f"{_UDMABUF}: {refused.strerror}", _share(_UDMABUF)
        return Exporter(ok(name, found, needed, fix), usable=False)
    if refused is not None:
        fix = "sudo modprobe udmabuf   # or boot a kernel with CONFIG_UDMABUF"
        return Exporter(ok(name, f"no {_UDMABUF}", needed, fix), usable=False)
    limit_mb, pieces = _parameter("size_limit_mb"), _parameter("list_limit")
    if limit_mb is None:
        return Exporter(ok(name, "opens; its limits are hidden here", needed), usable=True)
    size = "any size" if limit_mb == _NO_LIMIT else f"{limit_mb:,} MiB"
    found = f"opens; {size} a buffer" + (f", of at most {pieces:,} pieces" if pieces is not None else "")
    advice = f"echo {_ROOMY_MB} | sudo tee {_PARAMETERS}/size_limit_mb   # for larger buffers"
    return Exporter(ok(name, found, needed, advice if limit_mb < _ROOMY_MB else ""), usable=True)


def dma_heaps() -> Exporter:
    """Which dma-heaps there are, and which this process may use."""
    name, needed = "dma-heaps", "memory.DmaHeap: dma-bufs in large pieces"
    try:
        heaps = sorted(calls.directory_entries(_HEAPS))
    except OSError:
        heaps = []
    if not heaps:
        fix = "# boot a kernel with CONFIG_DMABUF_HEAPS and CONFIG_DMABUF_HEAPS_SYSTEM, if udmabuf will not do"
        return Exporter(ok(name, f"none in {_HEAPS}", needed, fix), usable=False)
    denied = [heap for heap in heaps if _refused(f"{_HEAPS}/{heap}") is not None]
    open_ones = [heap for heap in heaps if heap not in denied]
    found = "; ".join(
        filter(None, (", ".join(open_ones), f"not for this process: {', '.join(denied)}" if denied else ""))
    )
    advice = "" if open_ones else _share(f"{_HEAPS}/{heaps[0]}")
    return Exporter(ok(name, found, needed, advice), usable=bool(open_ones))


def cuda_memory() -> Exporter:
    """Whether there is a GPU whose memory can be exported as dma-bufs. There need not be."""
    name, needed = "CUDA", "only to bind the memory of GPUs: those that export dma-bufs"
    try:
        driver = cuda.driver()
    except OSError:
        return Exporter(ok(name, f"{cuda.LIBRARY} not found", needed), usable=False)
    if driver.error:
        found = f"{cuda.LIBRARY} is here, and finds no GPU (CUDA error {driver.error})"
        return Exporter(ok(name, found, needed), usable=False)
    can, of = sum(driver.exports_dmabuf), len(driver.exports_dmabuf)
    version = f"driver for CUDA {driver.version // 1000}.{driver.version % 1000 // 10}"
    advice = "" if can == of else "# GPUs export dma-bufs with NVIDIA's open kernel modules, on Linux 5.12 or newer"
    return Exporter(ok(name, f"{version}; {can} of {of} GPUs export dma-bufs", needed, advice), usable=can > 0)


def memory_checks() -> list[ProbeCheck]:
    """Return what is to be said of each exporter, and whether there is one at all."""
    exporters = [udmabuf(), dma_heaps(), cuda_memory()]
    checks = [exporter.check for exporter in exporters]
    usable = [exporter.check.name for exporter in exporters if exporter.usable]
    name, needed = "device memory", "one exporter of dma-bufs that this process can use"
    if usable:
        return [*checks, ok(name, f"by {', '.join(usable)}", needed)]
    return [*checks, error(name, "nothing that this process can use exports dma-bufs", needed, checks[0].fix)]


def _refused(node: str) -> OSError | None:
    """Open a device node and close it; returns what speaks against it."""
    try:
        calls.close_fd(calls.open_device(node))
    except OSError as refused:
        return refused
    return None


def _share(node: str) -> str:
    """Return how to let this user's group use a device node until the next boot."""
    typed = f"sudo chgrp $(id -g) {node} && sudo chmod g+rw {node}"
    return f"{typed}   # for good, by a udev rule; or take the memory of the broker"


def _parameter(name: str) -> int | None:
    try:
        return int(calls.read_text(f"{_PARAMETERS}/{name}"))
    except (OSError, ValueError):
        return None
