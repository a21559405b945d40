"""One wire, the NICs on it, and the guests that they are plugged into."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab import control
from devmem_tcp.lab.nic_client import NicClient, NicProcess
from devmem_tcp.lab.vm import networks
from devmem_tcp.lab.vm.kernels import Kernel
from devmem_tcp.lab.vm.machine import Job, Machine
from devmem_tcp.lab.vm.programs import Programs
from devmem_tcp.lab.vm.qemu import GuestShape
from devmem_tcp.lab.vm.relay import Resizes, Write

MAX_MTU: Final = 9216
"""The largest MTU that the NICs offer; a guest's own may be anything up to it."""

HOST_VARIABLE: Final = "DEVMEM_LAB_HOST"
"""Tells a job which guest it runs in, counted from 0."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What to set up.

    ``nics`` are of each guest; ``mtu`` is what the guests set; ``faults`` are FaultSettings' names and values, the same
    for all NICs; each NIC's seed is ``seed`` plus its number; ``capture`` is a file for all packets; ``host_port`` the
    path of a UNIX socket to make, at which processes of the host are plugged into the wire.
    """

    hosts: int = 1
    nics: int = 2
    queues: int = 4
    mtu: int = 1500
    shape: GuestShape = field(default_factory=GuestShape)
    faults: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    capture: Path | None = None
    host_port: Path | None = None


@dataclass(frozen=True)
class Streams:
    """Where one guest's job writes to, the fd that it reads from, if any, and what its terminal's size follows."""

    out: Write
    err: Write
    source: int | None = None
    resizes: Resizes | None = None


class Stage:
    """NICs from entry to exit, and guests to run jobs in.

    Args:
        folder: where all logs go.
        accelerator: ``kvm`` or ``tcg``.

    Raises (on entry):
        DevmemError: the NICs did not come up.
        OSError: the capture's file cannot be written.
    """

    def __init__(self, plan: StagePlan, programs: Programs, kernel: Kernel, *, folder: Path, accelerator: str) -> None:
        self._plan: Final = plan
        self._programs: Final = programs
        self._kernel: Final = kernel
        self._folder: Final = folder
        self._accelerator: Final = accelerator
        self._places: Final = networks.places(plan.nics, hosts=plan.hosts, mtu=plan.mtu)
        self._sockets: tuple[Path, ...] = ()
        self._held = contextlib.ExitStack()
        self.nics: NicClient | None = None
        """Takes commands for the NICs; None if there are none."""
        self.capture_failure: str = ""
        """After the exit: what ended the capture early, as a full disk does; empty: nothing did."""

    def __enter__(self) -> Stage:
        plan = self._plan
        plugs = [
            control.NicPlug(
                name=f"nic{number}",
                path="",
                mac=place.mac,
                queues=plan.queues,
                mtu=MAX_MTU,
                seed=plan.seed + number,
                faults=dict(plan.faults),
            )
            for number, place in enumerate(nic for host in self._places for nic in host)
        ]
        if plugs or plan.host_port is not None or plan.capture is not None:
            with contextlib.ExitStack() as held:
                process = held.enter_context(NicProcess(plugs, self._folder, host_port=plan.host_port))
                self.nics, self._sockets = process.client, process.sockets
                if plan.capture is not None:
                    self.nics.ask(control.StartCapture(path=str(plan.capture.absolute())))
                    held.callback(self._stop_capture, self.nics)
                self._held = held.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def _stop_capture(self, nics: NicClient) -> None:
        try:
            captured = msgspec.convert(nics.ask(control.StopCapture()), control.Captured)
            self.capture_failure = captured.failure
        except DevmemError as error:
            self.capture_failure = str(error)

    def machine(self, host: int, job: Job) -> Machine:
        """Return the guest of that number, to be entered, which will run ``job``."""
        places = self._places[host]
        first = host * self._plan.nics
        shape = replace(self._plan.shape, nic_sockets=self._sockets[first : first + len(places)])
        folder = self._folder / f"host{host}" if self._plan.hosts > 1 else self._folder
        folder.mkdir(exist_ok=True)
        told = {HOST_VARIABLE: str(host), **networks.job_environment(self._places, host), **job.environment}
        return Machine(
            self._programs,
            self._kernel,
            shape,
            replace(job, environment=told),
            folder=folder,
            accelerator=self._accelerator,
            nics=places,
            name=f"lab{host}" if self._plan.hosts > 1 else "lab",
        )

    def run(
        self,
        jobs: Sequence[Job],
        streams: Sequence[Streams],
        *,
        timeout_s: float | None = None,
        booted: Callable[[], object] = lambda: None,
        wait_for_all: bool = True,
    ) -> list[int]:
        """Boot a guest for each job, all at once, and return the jobs' exit codes.

        When one fails (its guest, not its job) the others are ended.

        Args:
            timeout_s: longest time for each job, from when its guest is up.
            booted: called when the first guest is up.
            wait_for_all: if not, the first job's end ends the others too, and its code is the only one.

        Raises:
            GuestFailed, Timeout: as ``Machine.wait``.
        """
        with contextlib.ExitStack() as held, ThreadPoolExecutor(len(jobs)) as threads:
            machines = [held.enter_context(self.machine(host, job)) for host, job in enumerate(jobs)]
            others = [
                threads.submit(machine.wait, out=one.out, err=one.err, source=one.source, timeout_s=timeout_s)
                for machine, one in zip(machines[1:], streams[1:], strict=True)
            ]
            first = streams[0]
            try:
                code = machines[0].wait(
                    out=first.out,
                    err=first.err,
                    source=first.source,
                    resizes=first.resizes,
                    timeout_s=timeout_s,
                    booted=booted,
                )
                return [code, *(one.result() for one in others)] if wait_for_all else [code]
            finally:
                for machine in machines:
                    machine.stop()
                wait(others)  # before the sockets that they poll are closed
