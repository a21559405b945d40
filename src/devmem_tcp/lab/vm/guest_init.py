"""PID 1 of a guest: mount, load modules, set up networks, run the job, say how it ended, power off.

Runs as ``python -I -S guest_init.py PLAN.json`` in a guest whose root is the host's, read-only: standard library only,
and nothing of this package. ``Machine`` writes the plan. Console lines ``devmem-lab NONCE WORD [DETAIL]`` are for
``Console``; the job's own input and output travel by virtio-serial ports.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_SYS_FINIT_MODULE: Final = 313  # x86-64
_MODULE_INIT_COMPRESSED_FILE: Final = 4  # include/uapi/linux/module.h
_POWER_OFF: Final = 0x4321FEDC  # LINUX_REBOOT_CMD_POWER_OFF, include/uapi/linux/reboot.h
_MS_BIND: Final = 4096
_SO_TIMESTAMP: Final = 29  # SO_TIMESTAMP_OLD, include/uapi/asm-generic/socket.h
_OVERLAY: Final = "/run/overlay"
_CHUNK: Final = 1 << 16
_LENGTH_BYTES: Final = 4
_RESIZE: Final = 0xFFFFFFFF  # in place of a length: rows and columns of the terminal follow, 2 bytes each
_SIZE_BYTES: Final = 4
INPUT_THREAD: Final = "input"
_END_OF_INPUT: Final = b"\x04"  # Ctrl-D
_NOT_FOUND: Final = 127  # a shell's codes for a command that does not start
_NOT_EXECUTABLE: Final = 126


class _Marks:
    """Writes marker lines to the kernel's log, a whole record each, so that nothing else gets in between."""

    def __init__(self, nonce: str) -> None:
        self._nonce = nonce
        self._fd = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC)

    def __call__(self, text: str) -> None:
        os.write(self._fd, f"<3>devmem-lab {self._nonce} {text}\n".encode()[:900])


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """Mount a file system; raises OSError. Kernel: mount(2)."""
    if _LIBC.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, f"mount {target}: {os.strerror(number)}")


def load_module(path: str) -> None:
    """Load a kernel module from its file, compressed or not; raises OSError. Kernel: finit_module(2)."""
    flags = 0 if path.endswith(".ko") else _MODULE_INIT_COMPRESSED_FILE
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _LIBC.syscall(_SYS_FINIT_MODULE, fd, b"", flags) and (number := ctypes.get_errno()) != errno.EEXIST:
            raise OSError(number, f"loading {path}: {os.strerror(number)}")
    finally:
        os.close(fd)


def mount_file_systems(plan: dict[str, Any]) -> None:
    """Mount what a running system has, over a root that takes writes into the guest's memory and forgets them."""
    mount("tmpfs", "/run", "tmpfs")
    for path in plan["overlay_modules"]:
        load_module(path)
    for name in ("upper", "work", "root"):
        os.makedirs(f"{_OVERLAY}/{name}")
    layers = f"lowerdir=/,upperdir={_OVERLAY}/upper,workdir={_OVERLAY}/work"
    mount("overlay", f"{_OVERLAY}/root", "overlay", 0, layers)
    os.chroot(f"{_OVERLAY}/root")
    os.chdir("/")
    mount("proc", "/proc", "proc")
    mount("sysfs", "/sys", "sysfs")
    mount("devtmpfs", "/dev", "devtmpfs")
    for name, kind in (("pts", "devpts"), ("shm", "tmpfs")):
        os.makedirs(f"/dev/{name}", exist_ok=True)
        mount(kind, f"/dev/{name}", kind)
    with contextlib.suppress(FileExistsError):
        os.symlink("/proc/self/fd", "/dev/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        with contextlib.suppress(FileExistsError):
            os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")
    Path("/proc/sys/kernel/hostname").write_text(plan["hostname"], encoding="ascii")
    mount("tmpfs", "/run", "tmpfs")
    os.makedirs("/run/netns")
    for place, kind in (("/sys/kernel/debug", "debugfs"), ("/sys/kernel/tracing", "tracefs"), ("/sys/fs/bpf", "bpf")):
        with contextlib.suppress(OSError):  # a kernel without it is good enough
            mount(kind, place, kind)


def offer_modules(plan: dict[str, Any]) -> None:
    """Put the booted kernel's modules where modprobe looks for them, and load those the job needs."""
    if plan["modules"]:
        place = f"/lib/modules/{os.uname().release}"
        os.makedirs(place, exist_ok=True)
        mount(plan["modules"], place, "none", _MS_BIND)
    for path in plan["driver_modules"]:
        load_module(path)
    with contextlib.suppress(OSError):
        Path("/proc/sys/kernel/modprobe").write_text(plan["modprobe"], encoding="utf-8")


def interface_of(mac: str) -> str:
    """Return the name of the interface with a MAC address; raises LookupError."""
    for folder in Path("/sys/class/net").iterdir():
        if (folder / "address").read_text(encoding="ascii").strip() == mac:
            return folder.name
    raise LookupError(f"no interface has the address {mac}: the driver did not take the NIC")


def set_up_networks(plan: dict[str, Any]) -> None:
    """Bring loopback and every NIC up, each in the namespace that the plan says, with its addresses.

    The job is told the name of the first one as NETIF.
    """
    batches: dict[str, list[str]] = {"": ["link set lo up"]}
    for namespace in dict.fromkeys(nic["namespace"] for nic in plan["nics"]):
        if namespace:
            ip(plan, f"netns add {namespace}")
            batches[namespace] = ["link set lo up"]
    for nic in plan["nics"]:
        name, namespace = interface_of(nic["mac"]), nic["namespace"]
        plan["environment"].setdefault("NETIF", name)
        if namespace:
            ip(plan, f"link set {name} netns {namespace}")
        batches[namespace] += [f"link set {name} mtu {nic['mtu']}", f"link set {name} up"]
        batches[namespace] += [
            f"addr add {address} dev {name} nodad" if ":" in address else f"addr add {address} dev {name}"
            for address in nic["addresses"]
        ]
    for namespace, lines in batches.items():
        ip(plan, *lines, namespace=namespace)


def ip(plan: dict[str, Any], *lines: str, namespace: str = "") -> None:
    """Run commands of ip(8) in one process; raises RuntimeError with what it said."""
    where = ["-netns", namespace] if namespace else []
    done = subprocess.run(
        ["ip", *where, "-batch", "-"],
        input="\n".join(lines),
        env=plan["environment"],
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"ip {'; '.join(lines)}: {done.stderr.strip()}")


def open_port(name: str, flags: int) -> int:
    """Open the virtio-serial port of a name; raises LookupError."""
    for folder in Path("/sys/class/virtio-ports").iterdir():
        if (folder / "name").read_text(encoding="ascii").strip() == f"devmem-lab.{name}":
            return os.open(f"/dev/{folder.name}", flags | os.O_CLOEXEC)
    raise LookupError(f"no virtio-serial port {name}")


def run_job(plan: dict[str, Any]) -> int:
    """Run the job with its input and output on the ports; return its exit code, 128 + n if signal n ended it."""
    ports = {"in": os.O_RDONLY, "out": os.O_WRONLY, "err": os.O_WRONLY}
    port = {name: open_port(name, flags) for name, flags in ports.items()}
    try:
        if plan["terminal"]:
            return run_on_terminal(plan, port["in"], port["out"])
        return run_on_pipes(plan, port)
    except OSError as error:
        os.write(port["err"], f"devmem-tcp lab: {error.filename}: {error.strerror}\n".encode())
        return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE


def run_on_pipes(plan: dict[str, Any], port: dict[str, int]) -> int:
    """Run the job with pipes."""
    process = subprocess.Popen(
        plan["command"],
        cwd=plan["cwd"],
        env=plan["environment"],
        start_new_session=True,
        stdin=subprocess.PIPE if plan["input"] else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdin is not None:
        feed = (port["in"], process.stdin.fileno(), process.stdin.close)
        threading.Thread(target=feed_input, args=feed, name=INPUT_THREAD, daemon=True).start()
    with process.stdout, process.stderr:
        return pump(process, {process.stdout.fileno(): port["out"], process.stderr.fileno(): port["err"]})


def run_on_terminal(plan: dict[str, Any], port_in: int, port_out: int) -> int:
    """Run the job on a pseudo-terminal of its own."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *plan["terminal"], 0, 0))
    process = subprocess.Popen(
        plan["command"],
        cwd=plan["cwd"],
        env=plan["environment"],
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    keyboard = os.dup(master)  # the feeding thread's own, which it may still hold when the job has ended

    def end_input() -> None:
        try:
            os.write(keyboard, _END_OF_INPUT)
        finally:
            os.close(keyboard)

    feed = (port_in, keyboard, end_input)
    threading.Thread(target=feed_input, args=feed, name=INPUT_THREAD, daemon=True).start()
    try:
        return pump(process, {master: port_out})
    finally:
        os.close(master)


def feed_input(port: int, target: int, end: Callable[[], object]) -> None:
    """Carry the job's input to it until there is no more, or the job wants no more; in a thread, as it may block.

    The port carries pieces, each after its length in 4 bytes; an empty one is the end. (Its own end is no use: QEMU
    drops what is on its way when the host closes a port.) A new size of the job's terminal comes between two pieces.
    """
    with open(port, "rb", closefd=False) as pieces, contextlib.suppress(OSError):
        try:
            while size := int.from_bytes(pieces.read(_LENGTH_BYTES), "little"):
                if size == _RESIZE:
                    fcntl.ioctl(target, termios.TIOCSWINSZ, pieces.read(_SIZE_BYTES) + bytes(4))
                else:
                    write_all(target, pieces.read(size))
        finally:
            end()


def carry(source: int, target: int) -> bool:
    """Move what ``source`` has to ``target``, blocking while that is slow; return False at the end of it."""
    try:
        data = os.read(source, _CHUNK)
    except OSError as error:
        if error.errno != errno.EIO:  # that of a terminal whose last user has gone
            raise
        return False
    write_all(target, data)
    return bool(data)


def write_all(target: int, data: bytes) -> None:
    """Write all of ``data``; raises OSError."""
    while data:
        data = data[os.write(target, data) :]


def pump(process: subprocess.Popen[bytes], outputs: dict[int, int]) -> int:
    """Carry the job's outputs until it has ended and they are empty; what it left running is not waited for.

    Returns the exit code, 128 + n if signal n ended the job.
    """
    ended = os.pidfd_open(process.pid)
    sources = [ended, *outputs]
    try:
        while ready := select.select(sources, [], [], None if ended in sources else 0)[0]:
            for source in ready:
                if source == ended or not carry(source, outputs[source]):
                    sources.remove(source)
    finally:
        os.close(ended)
    code = process.wait()
    return code if code >= 0 else 128 - code


def timestamping_socket() -> socket.socket:
    """Return a socket that has the kernel stamp every packet's arrival, for as long as it is open.

    The first such socket makes the kernel patch its own receive path, and the end of the last one patches it back: a
    static key, net/core/dev.c, net_enable_timestamp. Every ping is such a socket. An emulated processor may, under
    load, run the breakpoint of a patch that is finished already, and the kernel stops with "Oops: int3". While this
    one is open no ping is the first or the last. (Not a UNIX socket: those want no stamps, sock_needs_netstamp.)
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    held.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMP, 1)
    return held


def power_off() -> None:
    """Turn the guest off. Kernel: reboot(2)."""
    os.sync()
    _LIBC.reboot(_POWER_OFF)


def main() -> None:
    """Do all of it; whatever goes wrong is said on the console, and the guest goes off all the same."""
    plan = json.loads(Path(sys.argv[1]).read_bytes())
    mount("devtmpfs", "/dev", "devtmpfs")
    mark = _Marks(plan["nonce"])
    try:
        mount_file_systems(plan)
        offer_modules(plan)
        os.environ.update(plan["environment"])
        set_up_networks(plan)
        with timestamping_socket():
            mark("ready")
            mark(f"exit {run_job(plan)}")
    except Exception as error:
        mark(f"failed {type(error).__name__}: {error}")
    finally:
        power_off()


if __name__ == "__main__":
    main()
