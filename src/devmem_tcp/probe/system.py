"""Checks of the kernel and of this process: what does not depend on a NIC."""

from __future__ import annotations

import gzip
from typing import Final

from devmem_tcp.broker.client import BrokerControl
from devmem_tcp.errors import DevmemError
from devmem_tcp.probe.binding import may_bind, netdev_commands
from devmem_tcp.probe.finding import error, looked_at, ok, warning
from devmem_tcp.sys import calls
from devmem_tcp.types import ProbeCheck
from devmem_tcp.uapi.netdev import Command

_NEWER: Final = "devmem-tcp lab shell   # a kernel that has it; the first with bind-rx is 6.12, with bind-tx 6.16"
_NEEDED_OPTIONS: Final = ("NET_DEVMEM", "PAGE_POOL")
_USEFUL_OPTIONS: Final = ("UDMABUF", "DMABUF_HEAPS_SYSTEM", "PAGE_POOL_STATS")
_OPTMEM_BYTES: Final = 1 << 17  # the default since Linux 6.7; net/core/sock.c, sysctl_optmem_max
_LOCKED: Final = "Max locked memory"


def kernel() -> ProbeCheck:
    """Say which kernel runs; nothing is decided by it: features are asked for."""
    release = calls.read_text("/proc/sys/kernel/osrelease").strip()
    return ok("kernel", f"Linux {release}")


def netdev_family() -> ProbeCheck:
    """Look for bind-rx and bind-tx among the commands of the netdev family."""
    name, needed = "netdev family", "bind-rx, and bind-tx to send from device memory"
    known = netdev_commands()
    if Command.BIND_RX not in known:
        found = "no bind-rx" if known else "this kernel has none"
        return error(name, found, needed, _NEWER)
    if Command.BIND_TX not in known:
        return warning(name, "bind-rx, no bind-tx: this kernel sends from host memory only", needed, _NEWER)
    return ok(name, "bind-rx and bind-tx", needed)


def config() -> ProbeCheck:
    """Look for the options that the kernel was built with, where it or its package tells."""
    name = "kernel options"
    needed = ", ".join(f"CONFIG_{option}" for option in _NEEDED_OPTIONS)
    text = _config_text()
    if text is None:
        return ok(name, "neither /proc/config.gz nor a file beside the kernel tells", needed)
    options = dict(
        line.removeprefix("CONFIG_").split("=", 1) for line in text.splitlines() if line.startswith("CONFIG_")
    )
    missing = [option for option in _NEEDED_OPTIONS if options.get(option) != "y"]
    if missing:
        fix = "devmem-tcp lab shell   # a kernel with them, to try; to use devmem TCP here, boot one that has them"
        return error(name, f"without {', '.join(f'CONFIG_{option}' for option in missing)}", needed, fix)
    lacking = [f"CONFIG_{option}" for option in _USEFUL_OPTIONS if options.get(option) not in ("y", "m")]
    return ok(name, needed + (f"; without {', '.join(lacking)}" if lacking else ""), needed)


def _config_text() -> str | None:
    release = calls.read_text("/proc/sys/kernel/osrelease").strip()
    for path in ("/proc/config.gz", f"/boot/config-{release}", f"/lib/modules/{release}/config"):
        try:
            data = calls.read_bytes(path)
            return (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8", "replace")
        except (OSError, EOFError):
            continue
    return None


def privilege() -> ProbeCheck:
    """Ask the kernel whether this process may bind."""
    name, needed = "CAP_NET_ADMIN", "to bind and to change the NIC; receiving and sending do without"
    if Command.BIND_RX not in netdev_commands():
        return ok(name, "not asked: this kernel has no bind-rx")
    if may_bind():
        return ok(name, "yes", needed)
    fix = "sudo devmem-tcp broker   # then open_nic(NIC, via=SOCKET) binds without it; or run this as root"
    return error(name, "no: this process may not bind", needed, fix)


def broker(path: str, nic: str) -> ProbeCheck:
    """Ask the broker at ``path`` whether this program may have ``nic``; what it may do with it shows later."""
    name, needed = "broker", f"one that lets this program have {nic}: it binds in place of CAP_NET_ADMIN"
    try:
        BrokerControl(path, nic).close()
    except DevmemError as refused:
        return error(name, refused.message, needed, refused.hint)
    return ok(name, f"{path} answers", needed)


def locked_memory() -> ProbeCheck:
    """Read RLIMIT_MEMLOCK. Kernel: net/core/skbuff.c, mm_account_pinned_pages."""
    name, needed = "locked memory", "counts for MSG_ZEROCOPY from host memory; memory of a dma-buf does not"
    for line in calls.read_text("/proc/self/limits").splitlines():
        if line.startswith(_LOCKED):
            soft, hard, *unit = line.removeprefix(_LOCKED).split()
            said = soft if soft == "unlimited" else f"{int(soft) >> 10:,} KiB"
            return ok(name, f"{said} (at most {hard} {' '.join(unit)})" if soft != hard else said, needed)
    return warning(name, "/proc/self/limits does not tell", needed, "ulimit -l   # what it is")


def option_memory() -> ProbeCheck:
    """Read net.core.optmem_max, of which each send takes some until its completion. Kernel: net/core/sock.c."""
    name, needed = "optmem_max", f"{_OPTMEM_BYTES:,}: each send holds some until it is complete, else ENOBUFS"
    found = int(calls.read_text("/proc/sys/net/core/optmem_max"))
    if found < _OPTMEM_BYTES:
        return warning(name, f"{found:,}", needed, f"sudo sysctl -w net.core.optmem_max={_OPTMEM_BYTES}")
    return ok(name, f"{found:,}", needed)


def kernel_checks() -> list[ProbeCheck]:
    """Return what is to be said of the kernel itself."""
    return [looked_at("kernel", kernel), looked_at("netdev family", netdev_family), looked_at("kernel options", config)]


def process_checks() -> list[ProbeCheck]:
    """Return what is to be said of this process's rights and limits."""
    return [
        looked_at("CAP_NET_ADMIN", privilege),
        looked_at("locked memory", locked_memory),
        looked_at("optmem_max", option_memory),
    ]
