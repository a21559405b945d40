"""One guest, from boot to power-off: its processes, its console, its job."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from devmem_tcp.errors import DevmemError, Timeout
from devmem_tcp.lab.vm import guest_init, processes, qemu
from devmem_tcp.lab.vm.console import Console
from devmem_tcp.lab.vm.kernels import Kernel
from devmem_tcp.lab.vm.networks import NicPlace
from devmem_tcp.lab.vm.programs import Programs
from devmem_tcp.lab.vm.relay import Relay, Resizes, Write

_BOOT_S: Final = 120.0  # a busy machine without KVM takes 10
_POWER_OFF_S: Final = 60.0
_LONGEST_WAIT_S: Final = 3600.0
_BOOT: Final = "the guest's boot"
_JOB: Final = "the job"
_POWER_OFF: Final = "the guest's power-off"
_LOG_LINES: Final = 15
_DRIVERS: Final = ("gve",)


class GuestFailed(DevmemError):
    """The guest's kernel reported a fault, or the guest ended without having run its job; ``log`` is its console."""

    def __init__(self, message: str, *, log: Path, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.log = log


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command of the host's file system to run in the guest.

    ``terminal`` is (rows, columns) to run it on a terminal of its own; else it has pipes, and an empty
    input unless ``input``.
    """

    command: tuple[str, ...]
    cwd: Path = field(default_factory=Path.cwd)
    environment: Mapping[str, str] = field(default_factory=dict)
    terminal: tuple[int, int] | None = None
    input: bool = False


class Machine:
    """A guest that boots on entry, runs one job, and is gone on exit, with every process it took.

    Args:
        folder: where the logs of this guest go: ``console.log``, ``qemu.log``, ``virtiofsd.log``.
        accelerator: ``kvm`` or ``tcg``.
        nics: one for each of ``shape.nic_sockets``.
        name: the guest's host name.
    """

    def __init__(
        self,
        programs: Programs,
        kernel: Kernel,
        shape: qemu.GuestShape,
        job: Job,
        *,
        folder: Path,
        accelerator: str,
        nics: tuple[NicPlace, ...] = (),
        name: str = "lab",
    ) -> None:
        if len(nics) != len(shape.nic_sockets):
            raise ValueError(f"{len(shape.nic_sockets)} NICs are plugged in, {len(nics)} have a place")
        self.log: Final = folder / "console.log"
        self._programs: Final = programs
        self._kernel: Final = kernel
        self._shape: Final = shape
        self._job: Final = job
        self._folder: Final = folder
        self._accelerator: Final = accelerator
        self._nics: Final = nics
        self._name: Final = name
        self._console: Final = Console(uuid.uuid4().hex[:12])
        self._held = contextlib.ExitStack()
        self._ends: dict[str, socket.socket] = {}
        self._qemu: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Machine:
        with contextlib.ExitStack() as held:
            self._boot(held)
            self._held = held.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def wait(
        self,
        *,
        out: Write,
        err: Write,
        source: int | None = None,
        resizes: Resizes | None = None,
        timeout_s: float | None = None,
        booted: Callable[[], object] = lambda: None,
    ) -> int:
        """Carry the job's input and output until the guest is off; return the job's exit code.

        Args:
            out, err: given what the job writes.
            source: fd to read the job's input from.
            resizes: for the job's terminal.
            timeout_s: longest time for the job, from when the guest is ready.
            booted: called when the guest is ready.

        Raises:
            GuestFailed: the guest's kernel reported a fault (even if the job went well), or the job never ran.
            Timeout: the guest did not boot, or the job did not end, in time.
        """
        with contextlib.closing(Relay()) as relay:
            for name, write in (("out", out), ("err", err), (qemu.CONSOLE, self._console.feed)):
                relay.add_output(self._ends[name], write)
            if source is not None:
                relay.set_input(source, self._ends["in"], resizes)
            self._carry(relay, timeout_s, booted)
        return self._verdict()

    def stop(self) -> None:
        """End the guest, as pulling the plug would; whoever is in ``wait``, in any thread, is told. Idempotent."""
        if self._qemu is not None:
            processes.end(self._qemu)

    def _carry(self, relay: Relay, timeout_s: float | None, booted: Callable[[], object]) -> None:
        """Relay until QEMU has closed the console, which is its end."""
        deadline, doing = time.monotonic() + _BOOT_S, _BOOT
        while relay.has_output(self._ends[qemu.CONSOLE]):
            relay.turn(min(max(deadline - time.monotonic(), 0.0), _LONGEST_WAIT_S))
            if doing == _BOOT and self._console.ready:
                deadline, doing = time.monotonic() + (math.inf if timeout_s is None else timeout_s), _JOB
                booted()
            if doing == _JOB and self._console.exit_code is not None:
                deadline, doing = time.monotonic() + _POWER_OFF_S, _POWER_OFF
            if time.monotonic() >= deadline:
                raise Timeout(self._with_tail(doing, "took too long"), hint=self._log_hint())

    def _boot(self, held: contextlib.ExitStack) -> None:
        root_socket = held.enter_context(processes.socket_folder()) / "root"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(root_socket))
            listener.listen(1)
            held.enter_context(
                processes.running(
                    qemu.virtiofsd_command(self._programs, listener.fileno(), privileged=os.geteuid() == 0),
                    self._folder / "virtiofsd.log",
                    fds=[listener.fileno()],
                )
            )
        theirs: dict[str, int] = {}
        with contextlib.ExitStack() as until_started:
            for name in (*qemu.CHANNELS, qemu.CONSOLE):
                mine, other = socket.socketpair()
                self._ends[name] = held.enter_context(mine)
                theirs[name] = until_started.enter_context(other).fileno()
            command = qemu.qemu_command(
                self._programs,
                self._kernel,
                self._shape,
                accelerator=self._accelerator,
                console=self.log,
                root_socket=root_socket,
                init=self._write_init(),
                channel_fds=theirs,
            )
            self._qemu = held.enter_context(
                processes.running(
                    command,
                    self._folder / "qemu.log",
                    environment=self._programs.environment,
                    fds=list(theirs.values()),
                )
            )

    def _write_init(self) -> Path:
        plan, init = self._folder / "plan.json", self._folder / "init"
        if any(map(str.isspace, str(init))):
            raise DevmemError(
                f"{self._folder}: a kernel takes no init from a path with spaces",
                hint="set XDG_CACHE_HOME to a folder whose name has none",
            )
        plan.write_text(json.dumps(self._plan(), indent=1) + "\n", encoding="utf-8")
        python = os.path.realpath(sys.executable)  # a shim or a virtual environment's link costs a second
        init.write_text(f'#!/bin/sh\nexec "{python}" -I -S "{guest_init.__file__}" "{plan}"\n', encoding="utf-8")
        init.chmod(0o755)
        return init

    def _plan(self) -> dict[str, object]:
        return {
            "nonce": self._console.nonce,
            "hostname": self._name,
            "overlay_modules": [str(path) for path in self._kernel.module_files("overlay")],
            "driver_modules": [str(path) for name in _DRIVERS for path in self._kernel.module_files(name)],
            "modules": str(self._kernel.modules or ""),
            "modprobe": str(self._programs.tools / "modprobe") if self._programs.tools else "/sbin/modprobe",
            "nics": [
                {"mac": nic.mac, "mtu": nic.mtu, "namespace": nic.namespace, "addresses": nic.addresses}
                for nic in self._nics
            ],
            "command": list(self._job.command),
            "cwd": str(self._job.cwd.absolute()),
            "environment": guest_environment(self._job.environment, self._programs.tools),
            "terminal": self._job.terminal,
            "input": self._job.input,
        }

    def _verdict(self) -> int:
        console = self._console
        console.finish()
        if console.trouble:
            raise GuestFailed(
                self._with_tail("the guest's kernel", f"reported: {console.trouble[0]}"),
                log=self.log,
                hint=self._log_hint(),
            )
        if console.problem:
            raise GuestFailed(
                self._with_tail("the guest", f"could not be set up: {console.problem}"),
                log=self.log,
                hint=self._log_hint(),
            )
        if console.exit_code is None:
            raise GuestFailed(
                self._with_tail("the guest", "ended before its job did"), log=self.log, hint=self._log_hint()
            )
        return console.exit_code

    def _log_hint(self) -> str:
        return f"the whole console is in {self.log}"

    def _with_tail(self, who: str, what: str) -> str:
        parts = [f"{who} {what}"]
        if lines := list(self._console.tail):
            parts += ["the end of its console:", *(f"  {line}" for line in lines)]
        for name in ("qemu", "virtiofsd"):
            if said := processes.tail(self._folder / f"{name}.log", _LOG_LINES):
                parts += [f"{name} said:", *(f"  {line}" for line in said.splitlines())]
        return "\n".join(parts)


def guest_environment(extra: Mapping[str, str], tools: Path | None) -> dict[str, str]:
    """Return the job's environment: this process's own, with the guest's tools last on PATH."""
    path = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/sbin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
    if tools is not None:
        path.append(str(tools))
    return {**os.environ, "PATH": os.pathsep.join(dict.fromkeys(filter(None, path))), **extra}
