"""``devmem-tcp bench``: measure devmem-tcp between two ends, and say with which backend and by which paths."""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from click.core import ParameterSource

from devmem_tcp.benchmark import plan as planning
from devmem_tcp.benchmark.listening import listen as listen_for_works
from devmem_tcp.benchmark.measuring import Limits, Measuring, measuring
from devmem_tcp.benchmark.plan import Driver, Form, Kind, Plan, Work
from devmem_tcp.benchmark.results import Report
from devmem_tcp.benchmark.site import Site
from devmem_tcp.benchmark.talk import PORTS
from devmem_tcp.cli.children import Inbox, running
from devmem_tcp.cli.failure import EXIT_STATUS_HELP, say
from devmem_tcp.cli.options import ANY_HOST, MIB, HostPort, Size, backend_options
from devmem_tcp.cli.report import Event, ListeningEvent, print_json
from devmem_tcp.cli.session import read_key
from devmem_tcp.cli.setup import NicChoice, hostport
from devmem_tcp.contract import Nic
from devmem_tcp.errors import DevmemError
from devmem_tcp.sansio.frames import MAX_LANES
from devmem_tcp.types import Address

_STDOUT: Final = "-"
_LOOPBACK: Final = "127.0.0.1"
_WORDS: Final = tuple(choice.value for kind in (Kind, Driver, Form) for choice in kind)
_DMABUF_BYTES: Final = 64 * MIB  # udmabuf's size_limit_mb, unless it was raised (drivers/dma-buf/udmabuf.c)
_PLANNING: Final = ("quick", "sizes", "connections", "only", "rounds", "seconds", "seed", "json_file", "html_file")
_NOT_REPEATED: Final = ("json_file", "html_file", "quiet", "seed")
_CHILD_LIMIT_S: Final = 30.0


class Listed(click.ParamType[tuple[Any, ...]]):
    """Values of another type with commas between them."""

    def __init__(self, item: click.ParamType[Any]) -> None:
        self._item = item
        self.name = f"{item.name},…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        found = [self._item.convert(item.strip(), param, ctx) for item in value.split(",")]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class Request(NicChoice):
    """The command line of bench."""

    listen: Address | None
    to: Address | None
    key_file: str | None
    session: dict[str, Any]
    plan: Plan
    repeat: str
    buffer_chosen: bool
    json_file: str | None
    html_file: str | None
    quiet: bool
    timeout_s: float

    def site(self, nic: Nic) -> Site:
        """Return what to measure with."""
        return Site(nic, lambda size: replace(self, buffer_bytes=size).allocate(nic), self.session, self.timeout_s)

    def limits(self, nic: Nic) -> Limits:
        """Return what may be used here: as many fds as the system lets this process have."""
        real = nic.capabilities.zero_copy
        return Limits(_DMABUF_BYTES if real and not self.buffer_chosen else self.buffer_bytes, raise_fd_limit())


@click.command("bench", epilog=EXIT_STATUS_HELP)
@click.option(
    "--listen", type=HostPort(default_host=ANY_HOST), metavar="[HOST:]PORT", help="Be the receiving end; waits there."
)
@click.option("--to", type=HostPort(), metavar="HOST:PORT", help="Be the sending end, which measures; goes there.")
@click.option("--quick", is_flag=True, help="A rough look: one round, fewer and smaller sizes, 64 connections at most.")
@click.option("--sizes", type=Listed(Size()), help="Sizes of messages.  [default: 4K to 1G, each four times the last]")
@click.option("--connections", type=Listed(click.IntRange(1, 4096)), help="Numbers of senders.  [default: 1,8,64,512]")
@click.option("--only", type=Listed(click.Choice(_WORDS)), help=f"Of all that can be measured: {', '.join(_WORDS)}.")
@click.option("--rounds", type=click.IntRange(min=1), help="How often to measure each.  [default: 3]")
@click.option(
    "--seconds", type=click.FloatRange(0, 3600, min_open=True), help="How long each measured part.  [default: 0.15]"
)
@click.option("--seed", type=int, help="Of the order of turns.  [default: another one each time]")
@backend_options(buffer_default="2G")
@click.option(
    "--key-file", type=click.Path(exists=True, dir_okay=False), metavar="FILE", help="A secret that both ends have."
)
@click.option("--insecure", is_flag=True, help="Do without a key between two machines.")
@click.option(
    "--lanes", type=click.IntRange(1, MAX_LANES), default=1, show_default=True, help="Data connections of a session."
)
@click.option("--json", "json_file", type=click.Path(), metavar="FILE", help="Write all figures there; - for stdout.")
@click.option("--html", "html_file", type=click.Path(), metavar="FILE", help="Write a page with plots there.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings, and tables, only.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest wait for the other end at any point of a measurement.",
)
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Measure devmem-tcp: throughput by size, round trips, CPU time, many connections.

    Alone, it runs both ends on this machine, over loopback, with the software backend. With --listen on one machine and
    --to on another it measures those, their NICs and the network between. Every figure comes with the backend, and with
    the bytes by the paths they took.

    \b
    devmem-tcp bench --quick
    devmem-tcp bench --html report.html --json report.json
    devmem-tcp bench --listen 5201 --nic eth1 --key-file key
    devmem-tcp bench --to 10.0.0.1:5201 --nic eth1 --key-file key --html report.html
    """
    request = read_request(context, **options)
    if request.listen is not None:
        listen(request, request.listen)
        return
    for name in (request.json_file, request.html_file):
        check_writable(name)
    report = measure_alone(request) if request.to is None else measure(request, request.to)
    write(report, request)
    if report.failed:
        raise DevmemError(f"{len(report.failed)} of {len(report.plan.works)} measurements failed: see above")


def read_request(
    context: click.Context,
    *,
    quick: bool,
    sizes: tuple[int, ...] | None,
    connections: tuple[int, ...] | None,
    only: tuple[str, ...] | None,
    rounds: int | None,
    seconds: float | None,
    seed: int | None,
    key_file: str | None,
    insecure: bool,
    lanes: int,
    **options: Any,
) -> Request:
    """Make sense of the command line.

    Raises:
        click.UsageError: options that do not go together.
        OSError, ValueError: the file of the key cannot be read, or has none.
    """
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    _check(options, given)
    works = planning.list_works(
        sizes or (planning.QUICK_SIZES if quick else planning.SIZES),
        connections or (planning.QUICK_CONNECTIONS if quick else planning.CONNECTIONS),
        frozenset(only or ()),
    )
    if not works:
        raise click.BadParameter("nothing is all of that at once", param_hint="--only")
    seed = secrets.randbelow(1 << 31) if seed is None else seed
    key = None if key_file is None else read_key(key_file)
    plan = Plan(works, rounds or (1 if quick else 3), seconds or (0.05 if quick else 0.15), seed)
    return Request(
        plan=plan,
        key_file=key_file,
        session={"key": key, "insecure": insecure, "lanes": lanes},
        repeat=_repeat(context, given, seed, options["to"]),
        buffer_chosen="buffer_bytes" in given,
        **options,
    )


def _check(options: dict[str, Any], given: set[str]) -> None:
    """Raise click.UsageError for options that do not go together."""
    if options["listen"] is not None:
        if options["to"] is not None:
            raise click.UsageError("give --listen at one end and --to at the other")
        if options["listen"][1] > 65536 - PORTS:
            raise click.UsageError(f"--listen takes {PORTS} TCP ports, from the one given on")
        for name in _PLANNING:
            if name in given and not (name == "json_file" and options[name] == _STDOUT):
                option = name.removesuffix("_file")
                raise click.UsageError(f"--{option} is for the end that measures: give it with --to")
    elif options["to"] is None:
        if options["backend"] == "kernel":
            raise click.UsageError(
                "two NICs of one machine reach each other over loopback, by neither of them: run one end with --listen "
                "and the other with --to, on another machine or in another network namespace"
            )
        options["backend"] = "software"


def _repeat(context: click.Context, given: set[str], seed: int, to: Address | None) -> str:
    """Write the command line that measures the same once more."""
    words = ["devmem-tcp", "bench"]
    for parameter in context.command.params:
        if parameter.name in given and parameter.name not in _NOT_REPEATED:
            words.append(parameter.opts[0])
            value = context.params[parameter.name]
            if isinstance(parameter.type, HostPort):
                words.append(hostport(value))
            elif value is not True:
                words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    line = f"{shlex.join(words)} --seed {seed}"
    return line if to is None else f"devmem-tcp bench --listen {to[1]}   # at the receiving end, with its NIC\n{line}"


def listen(request: Request, address: Address) -> None:
    """Be the receiving end, for one run."""
    with request.open() as nic, request.site(nic) as site:
        limits = request.limits(nic)

        def listening(where: Address) -> None:
            if request.json_file == _STDOUT:
                print_json(ListeningEvent(host=where[0], port=where[1]))
            elif not request.quiet:
                say(f"listening on {hostport(where)} ({site.backend} backend, {nic.name}) for devmem-tcp bench --to")

        listen_for_works(site, address, buffer_bytes=limits.buffer_bytes, fds=limits.fds, listening=listening)


def measure_alone(request: Request) -> Report:
    """Run the receiving end as a process of its own, and measure with it."""
    given = {
        "--nic": request.nic,
        "--backend": request.backend,
        "--memory": request.memory,
        "--buffer": request.buffer_bytes,
        "--frag-size": request.frag_size,
        "--congestion": request.congestion,
        "--hostile": request.hostile_seed,
        "--key-file": request.key_file,
        "--lanes": request.session["lanes"],
        "--timeout": request.timeout_s,
    }
    arguments = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    inbox: Inbox = queue.SimpleQueue()
    with running("receiving end", ["bench", "--listen", f"{_LOOPBACK}:0", "--json", "-", *arguments], inbox) as child:
        event = _first_event(inbox)
        if event is None:
            child.check()
        if not isinstance(event, ListeningEvent):
            raise DevmemError("the receiving end did not say where it listens")
        report = measure(replace(request, nic=_far_name(request.nic)), (event.host, event.port))
        child.check()
    return report


def _first_event(inbox: Inbox) -> Event | None:
    """Return what the child says first; None: it ended, or says nothing for long."""
    try:
        return inbox.get(timeout=_CHILD_LIMIT_S)[1]
    except queue.Empty:
        return None


def _far_name(nic: str) -> str:
    """Return the name of the other software NIC: any will do, but two of one name would puzzle the reader."""
    return "soft1" if nic != "soft1" else "soft0"


def measure(request: Request, to: Address) -> Report:
    """Be the sending end: measure all that both ends have means for."""
    with (
        request.open() as nic,
        request.site(nic) as site,
        measuring(site, to, request.plan, request.limits(nic)) as run,
    ):
        if not request.quiet:
            for line in announce(run):
                say(line)
        with _progress(run, quiet=request.quiet) as before:
            return run.run(before, request.repeat)


def announce(run: Measuring) -> Iterator[str]:
    """Say what is going to be done, what it takes, and what is left out."""
    here, there = run.pools.tx_bytes >> 20, run.pools.rx_bytes >> 20
    memory = f"{here + there:,} MiB" if run.same_machine else f"{here:,} MiB here and {there:,} MiB there"
    plan = run.plan
    yield f"{run.turns} measurements of about {plan.seconds:g} s, binding up to {memory} of memory"
    for one in run.left_out:
        yield f"left out: {one.work.name}: {one.words}"


@contextlib.contextmanager
def _progress(run: Measuring, *, quiet: bool) -> Iterator[Callable[[Work], None]]:
    """Show a bar on a terminal; drawn between measurements only, so that it costs none of them anything."""
    if quiet or not sys.stderr.isatty():
        yield lambda work: None
        return
    from rich import progress as parts
    from rich.console import Console

    columns = (
        parts.BarColumn(),
        parts.MofNCompleteColumn(),
        parts.TimeElapsedColumn(),
        parts.TextColumn("{task.description}"),
    )
    with parts.Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as shown:
        task = shown.add_task("", total=run.turns, completed=-1)

        def before(work: Work) -> None:
            shown.update(task, description=work.name, advance=1, refresh=True)

        yield before


def raise_fd_limit() -> int:
    """Let this process have as many fds as the system allows it, and return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:  # Linux never says so
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def check_writable(name: str | None) -> None:
    """Raise OSError now, not after a minute, if a file cannot be written; nothing of it is lost yet."""
    if name is not None and name != _STDOUT:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))


def write(report: Report, request: Request) -> None:
    """Print tables, or JSON in their place, and write the files that were asked for."""
    from devmem_tcp.benchmark.page import page
    from devmem_tcp.benchmark.table import console, print_tables

    if request.json_file == _STDOUT:
        click.echo(msgspec.json.encode(report))
    else:
        print_tables(report, console())
    if request.json_file not in (None, _STDOUT):
        Path(request.json_file).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if request.html_file is not None:
        Path(request.html_file).write_text(page(report), encoding="utf-8")
        if not request.quiet:
            say(f"wrote {request.html_file}")
