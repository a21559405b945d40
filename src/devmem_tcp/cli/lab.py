"""``devmem-tcp lab``: a virtual machine with a stock kernel, whose NICs are a Python process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Final

import click

from devmem_tcp.cli.failure import EXIT_FAILED, say
from devmem_tcp.cli.lab_options import Fault, GuestChoice, PartsChoice, guest_options, parts_options
from devmem_tcp.lab import control
from devmem_tcp.lab.nic_client import newest
from devmem_tcp.lab.stage import Stage, Streams
from devmem_tcp.lab.vm import acceleration
from devmem_tcp.lab.vm.cache import Cache
from devmem_tcp.lab.vm.machine import Job
from devmem_tcp.lab.vm.packages import Installation
from devmem_tcp.lab.vm.relay import Resizes

_STDIN: Final = 0  # read as an fd, so that nothing of it is left in a buffer of Python's
_KVM_RECORD: Final = "kvm.json"
_RUN_SETTINGS: Final = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@click.group("lab")
def command() -> None:
    """Real devmem TCP without the hardware: a stock kernel in a virtual machine, on NICs written in Python."""


@command.command()
@parts_options
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def setup(parts: PartsChoice, quiet: bool) -> None:
    """Fetch kernel, QEMU and tools into your cache folder, unless they are there.

    They come as Debian packages (suites trixie and trixie-backports) from the mirror that apt on this machine uses, are
    checked with Debian's keys, and are unpacked, not installed. About 160 MB.
    """
    cache = Cache.of_user()
    with _steps(quiet=quiet) as progress:
        made, kernel = parts.gather(cache, progress)
    accelerator = acceleration.accelerator(made, kernel, cache.root / _KVM_RECORD)
    if not quiet:
        say(f"ready: kernel {kernel.name}, {_spelt(accelerator)}; all of it is in {cache.root}")


@command.command()
def status() -> None:
    """Say what is set up. Exit status 0: a guest can boot; 1: not yet."""
    cache = Cache.of_user()
    installation = Installation(cache, lambda what, part: None)
    held, releases = installation.held_programs(), installation.held_kernels()
    click.echo(f"folder   {cache.root}")
    click.echo(f"kernels  {', '.join(releases) or 'none'}")
    click.echo(f"QEMU     {held.get('qemu-system-x86', 'none')}")
    click.echo(f"KVM      {acceleration.recorded(cache.root / _KVM_RECORD)}")
    if not (held and releases):
        say("not set up yet; devmem-tcp lab setup does it")
        raise click.exceptions.Exit(EXIT_FAILED)


@command.command(context_settings=_RUN_SETTINGS)
@parts_options
@guest_options
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD [ARG]...")
def run(parts: PartsChoice, guests: GuestChoice, argv: tuple[str, ...]) -> None:
    """Run a command of this machine in a guest, and exit with its exit status.

    The guest sees this machine's files; what it writes to them stays in its memory and is gone with it. The first NIC
    is in the guest's own namespace, the second in namespace "peer". The environment says where: NETIF, LOCAL_V4,
    REMOTE_V4, LOCAL_V6, REMOTE_V6, REMOTE_ARGS, as the kernel's own selftests expect them. With --two-hosts the
    command runs in both guests; DEVMEM_LAB_HOST is 0 or 1, and each line of output starts with that.
    """
    reads = not os.isatty(_STDIN)
    job = Job(command=argv, input=reads)
    if guests.plan.hosts == 1:
        jobs, streams = (
            [job],
            [Streams(_writer(sys.stdout), _writer(sys.stderr), _STDIN if reads else None)],
        )
    else:
        jobs = [Job(command=argv)] * guests.plan.hosts
        streams = [
            Streams(_Prefixed(f"{host}: ", sys.stdout), _Prefixed(f"{host}: ", sys.stderr))
            for host in range(guests.plan.hosts)
        ]
    codes = _stage(parts, guests, jobs, streams)
    raise click.exceptions.Exit(next((code for code in codes if code), 0))


@command.command()
@parts_options
@guest_options
def shell(parts: PartsChoice, guests: GuestChoice) -> None:
    """Give a shell in a guest with two NICs in two namespaces, addresses up. It ends with the shell.

    See `devmem-tcp lab run --help` for what the guest sees. With --two-hosts the other guest idles, and can be reached.
    """
    program = os.environ.get("SHELL", "")
    program = program if os.access(program, os.X_OK) else "/bin/sh"
    here = os.isatty(_STDIN) and sys.stdout.isatty()
    idle = Job(command=("sleep", "infinity"))
    with _terminal_resizes() if here else contextlib.nullcontext() as resizes:
        job = Job(command=(program,), terminal=_terminal_size() if here else None, input=True)
        jobs = [job, *[idle] * (guests.plan.hosts - 1)]
        streams = [
            Streams(_writer(sys.stdout), _writer(sys.stderr), _STDIN, resizes),
            *[Streams(_nothing, _nothing)] * (guests.plan.hosts - 1),
        ]
        codes = _stage(parts, guests, jobs, streams, terminal=here, wait_for_all=False)
    raise click.exceptions.Exit(codes[0])


@command.command()
@click.option("--nic", metavar="NAME", help="Of this NIC alone: nic0, nic1 …  [default: all]")
@click.argument("faults", nargs=-1, type=Fault())
def fault(nic: str | None, faults: tuple[tuple[str, float], ...]) -> None:
    """Change the faults of the running lab's NICs: `devmem-tcp lab fault drop=0.01 reorder=0.05`; 0 ends one.

    Prints what each NIC's faults are then, as JSON; without an argument, just that.
    """
    with contextlib.closing(newest(Cache.of_user().runs)) as client:
        found = client.ask(control.SetFaults(faults=dict(faults), nic=nic))
    click.echo(json.dumps(found, indent=1))


@command.command()
@click.argument("nic", metavar="NIC")
@click.argument("state", type=click.Choice(["up", "down"]))
def link(nic: str, state: str) -> None:
    """Pull the cable out of a NIC of the running lab, or put it back: `devmem-tcp lab link nic0 down`."""
    with contextlib.closing(newest(Cache.of_user().runs)) as client:
        client.ask(control.SetLink(nic=nic, up=state == "up"))


@command.command()
@click.argument("nic", metavar="NIC")
def reset(nic: str) -> None:
    """Have a NIC of the running lab ask its driver for a reset, as after an error of the hardware."""
    with contextlib.closing(newest(Cache.of_user().runs)) as client:
        client.ask(control.RequestReset(nic=nic))


@command.command()
def stats() -> None:
    """Print the counters of the running lab's NICs, as JSON."""
    with contextlib.closing(newest(Cache.of_user().runs)) as client:
        click.echo(json.dumps(client.ask(control.GetStatistics()), indent=1))


def _stage(
    parts: PartsChoice,
    guests: GuestChoice,
    jobs: Sequence[Job],
    streams: Sequence[Streams],
    *,
    terminal: bool = False,
    wait_for_all: bool = True,
) -> list[int]:
    """Boot the guests, run the jobs, and return their exit codes."""
    cache = Cache.of_user()
    with _steps(quiet=guests.quiet) as progress:
        made, kernel = parts.gather(cache, progress)
    accelerator = acceleration.accelerator(made, kernel, cache.root / _KVM_RECORD, guests.accelerator)
    folder = cache.new_run()
    plan = guests.plan
    if not guests.quiet:
        count = "a guest" if plan.hosts == 1 else f"{plan.hosts} guests"
        say(f"booting {count}: kernel {kernel.name}, {_spelt(accelerator)}, {plan.nics} NICs; logs in {folder}")
    started = time.monotonic()

    stage = Stage(plan, made, kernel, folder=folder, accelerator=accelerator)
    try:
        with stage, contextlib.ExitStack() as while_up:

            def booted() -> None:
                if not guests.quiet:
                    say(f"up after {time.monotonic() - started:.1f} s")
                if terminal:
                    while_up.enter_context(_raw_terminal())

            codes = stage.run(jobs, streams, timeout_s=guests.timeout_s, booted=booted, wait_for_all=wait_for_all)
    finally:
        if stage.capture_failure:
            say(f"error: {plan.capture}: the capture is not whole: {stage.capture_failure}")
    return [code or EXIT_FAILED for code in codes] if stage.capture_failure else codes


class _Prefixed:
    """Writes whole lines, each after a prefix."""

    def __init__(self, prefix: str, stream: Any) -> None:
        self._prefix = prefix.encode()
        self._write = _writer(stream)
        self._rest = b""

    def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines:
            self._write(b"".join(self._prefix + line + b"\n" for line in lines))


def _writer(stream: Any) -> Callable[[bytes], object]:
    def write(data: bytes) -> None:
        stream.buffer.write(data)
        stream.buffer.flush()

    return write


def _nothing(data: bytes) -> None:
    """Write nowhere."""


def _spelt(accelerator: str) -> str:
    return "KVM" if accelerator == "kvm" else "software emulation"


def _terminal_size() -> tuple[int, int]:
    """Return the rows and columns of the terminal."""
    size = os.get_terminal_size(sys.stdout.fileno())
    return size.lines, size.columns


@contextlib.contextmanager
def _terminal_resizes() -> Iterator[Resizes]:
    """Follow the terminal's size. The signal makes an fd readable, so that no wait for fds can miss it."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    before = signal.signal(signal.SIGWINCH, _take_note), signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    try:
        yield Resizes(readable, _terminal_size)
    finally:
        signal.signal(signal.SIGWINCH, before[0])
        signal.set_wakeup_fd(before[1])
        os.close(readable)
        os.close(writable)


def _take_note(number: int, frame: FrameType | None) -> None:
    """Do nothing, which is more than ignoring a signal: its number is written to the wakeup fd."""


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Hand every key to the guest, Ctrl-C too, until the block ends."""
    before = termios.tcgetattr(_STDIN)
    tty.setraw(_STDIN, termios.TCSADRAIN)  # what was typed while the guest booted is for it, too
    try:
        yield
    finally:
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _steps(*, quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """Show the steps of a set-up: a bar on a terminal, else a line for each step."""
    if quiet or not sys.stderr.isatty():
        seen: list[str] = []

        def line(what: str, part: float) -> None:
            if not quiet and what not in seen:
                seen.append(what)
                say(what)

        yield line
        return
    from rich import progress as rich_parts
    from rich.console import Console

    with rich_parts.Progress(
        rich_parts.TextColumn("{task.description}"),
        rich_parts.BarColumn(),
        rich_parts.TaskProgressColumn(),
        rich_parts.TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as shown:
        tasks: dict[str, Any] = {}

        def bar(what: str, part: float) -> None:
            for other, task in tasks.items():
                if other != what:
                    shown.update(task, completed=1.0)
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=1.0)
            shown.update(tasks[what], completed=part)

        yield bar
        for task in tasks.values():
            shown.update(task, completed=1.0)
