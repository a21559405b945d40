"""``devmem-tcp fetch``: tensors of a server's safetensors files, into device memory and from there to a file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import click
import msgspec

from devmem_tcp.cli.failure import EXIT_STATUS_HELP, say
from devmem_tcp.cli.options import HostPort, Size, backend_options
from devmem_tcp.cli.report import ProgressEvent, amount, binary, print_json, rate
from devmem_tcp.cli.session import SessionChoice, session_options, tensors
from devmem_tcp.cli.setup import hostport
from devmem_tcp.safetensors.catalog import Catalog
from devmem_tcp.safetensors.fetching import FetchSummary, Tally, TensorFigures, store_tensors
from devmem_tcp.safetensors.remote import FetchProgress, Progress, RemoteTensors, open_remote
from devmem_tcp.types import Address

_INTERVAL_S: Final = 0.1  # between two updates
_LARGE_BYTES: Final = 64 << 20  # a tensor of more has a bar of its own
_LABEL_WIDTH: Final = 12
_MOST_NAME: Final = 40  # characters, beside a bar


class FetchedEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="fetched"):
    """A fetch is complete; ``output``: the file, if one was written."""

    summary: FetchSummary
    peer: str
    output: str | None


class CatalogEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="catalog"):
    """What a server offers."""

    catalog: Catalog


@dataclass(frozen=True, kw_only=True)
class Request(SessionChoice):
    """The command line of fetch."""

    to: Address
    only: tuple[str, ...]
    output: str | None
    listing: bool
    overwrite: bool
    checkpoint_bytes: int
    queue: int | None
    strict: bool
    progress: str
    verbose: bool
    timeout_s: float | None

    def check(self) -> None:
        """Raise click.UsageError if the options do not go together."""
        if self.progress == "json" and not self.as_json:
            raise click.UsageError("--progress json goes with --json")
        if self.listing and self.output is not None:
            raise click.UsageError("give --list or --out, not both")

    @property
    def part(self) -> str | None:
        """The unfinished file, if there is one."""
        part = f"{self.output}.part"
        return part if self.output is not None and os.path.exists(part) else None


@click.command("fetch", epilog=EXIT_STATUS_HELP)
@click.argument("to", type=HostPort(), metavar="HOST:PORT")
@click.option("--only", multiple=True, metavar="GLOB", help="Tensors whose names match; may be given several times.")
@click.option("-o", "--out", "output", type=click.Path(), metavar="FILE", help="Write them to a safetensors file.")
@click.option("--list", "listing", is_flag=True, help="Print what there is, and fetch nothing.")
@click.option("--overwrite", is_flag=True, help="Replace FILE, when all is complete.")
@click.option(
    "--checkpoint",
    "checkpoint_bytes",
    type=Size(),
    default="256M",
    show_default=True,
    help="How much may have to be fetched again after a kill or a power cut.",
)
@click.option("--queue", type=click.IntRange(min=0), help="RX queue to bind and steer to.  [default: the last one]")
@click.option("--strict", is_flag=True, help="Fail if any payload lands in host memory.")
@backend_options(buffer_default="64M")
@session_options
@click.option(
    "--progress",
    type=click.Choice(["auto", "json", "none"]),
    default="auto",
    show_default=True,
    help="auto: bars, if stderr is a terminal; json: lines among those of --json.",
)
@click.option("-v", "--verbose", is_flag=True, help="Print figures of each tensor.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Longest wait for the server, or for anything more from it.  [default: for ever]",
)
def command(**options: Any) -> None:
    """Fetch tensors from a server (devmem-tcp serve) into device memory, and write them to a safetensors file.

    Tensors that are whole are kept, whatever ends the command: the same command again fetches the others. Without
    --out they are verified, counted and dropped.

    \b
    devmem-tcp fetch 10.0.0.1:5201 --key-file key --out model.safetensors
    devmem-tcp fetch 10.0.0.1:5201 --key-file key --only 'model.layers.0.*' --list
    """
    request = Request(**options)
    request.check()
    with (
        request.open() as nic,
        request.allocate(nic) as buffer,
        open_remote(
            nic,
            request.to,
            buffer=buffer,
            queues=None if request.queue is None else [request.queue],
            strict=request.strict,
            timeout_s=request.timeout_s,
            **request.session(server=False),
        ) as remote,
    ):
        chosen = remote.catalog.select(request.only)
        if request.listing:
            _print_catalog(request, chosen)
        else:
            _print_summary(request, _fetch(request, remote, chosen))


def _fetch(request: Request, remote: RemoteTensors, chosen: Catalog) -> FetchSummary:
    with _resumable(request) as note, _shown(request) as show:

        def progress(told: FetchProgress) -> None:
            note.told = told
            show(told)

        if request.output is not None:
            return store_tensors(
                remote,
                chosen,
                request.output,
                progress=progress,
                overwrite=request.overwrite,
                checkpoint_bytes=request.checkpoint_bytes,
            )
        tally = Tally(remote)
        for message in remote.receive(chosen.entries, progress=progress):
            with message:
                tally.add(message)
        return tally.summary()


class _Note:
    """How far a fetch came."""

    told: FetchProgress | None = None


@contextlib.contextmanager
def _resumable(request: Request) -> Iterator[_Note]:
    """Say, if the block fails, what is kept and how to go on."""
    note = _Note()
    try:
        yield note
    except BaseException:
        if request.part is not None and note.told is not None:
            told = note.told
            what = f"{told.tensors} of {told.all_tensors} tensors are kept in {request.part}"
            say(f"{what}: the same command goes on from there")
        raise


# --- progress ---


@contextlib.contextmanager
def _shown(request: Request) -> Iterator[Progress]:
    """Show progress until the block ends: a bar for all, and one for a large tensor while it comes."""
    if request.progress == "json":
        yield _throttled(lambda told: print_json(ProgressEvent(bytes=told.bytes)))
    elif request.progress == "none" or request.quiet or not sys.stderr.isatty():
        yield lambda told: None
    else:
        from rich import progress as parts
        from rich.console import Console

        with parts.Progress(
            parts.TextColumn("{task.description}", markup=False),
            parts.BarColumn(),
            parts.DownloadColumn(),
            parts.TransferSpeedColumn(),
            parts.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as bars:
            whole = bars.add_task("fetching")
            large = bars.add_task("", visible=False)

            def show(told: FetchProgress) -> None:
                what = f"tensor {min(told.tensors + 1, told.all_tensors)} of {told.all_tensors}"
                bars.update(whole, description=what, completed=told.bytes, total=told.all_bytes)
                visible = told.name_all_bytes >= _LARGE_BYTES
                if visible and bars.tasks[large].description != _short(told.name):
                    bars.reset(large, description=_short(told.name))
                bars.update(large, completed=told.name_bytes, total=told.name_all_bytes, visible=visible)

            yield _throttled(show)


def _throttled(show: Progress) -> Progress:
    """Show at most once an interval, and the end."""
    next_s = 0.0

    def told(progress: FetchProgress) -> None:
        nonlocal next_s
        now = time.monotonic()
        if now >= next_s or progress.tensors == progress.all_tensors:
            next_s = now + _INTERVAL_S
            show(progress)

    return told


def _short(name: str) -> str:
    return name if len(name) <= _MOST_NAME else "…" + name[1 - _MOST_NAME :]


# --- reports ---


def _print_catalog(request: Request, catalog: Catalog) -> None:
    if request.as_json:
        print_json(CatalogEvent(catalog=catalog))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("tensor", "dtype", "shape", "size", "file"):
        table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
    for entry in catalog.entries:
        shape = " × ".join(map(str, entry.shape)) or "one"
        cells = (entry.name, entry.dtype, shape, binary(entry.nbytes), catalog.files[entry.file].name)
        table.add_row(*map(Text, cells))
    Console().print(table)
    if not request.quiet:
        say(f"{tensors(len(catalog.entries))}, {amount(catalog.total_bytes)}")


def _print_summary(request: Request, summary: FetchSummary) -> None:
    peer = hostport(request.to)
    if request.as_json:
        print_json(FetchedEvent(summary=summary, peer=peer, output=request.output))
    if request.quiet:
        return
    speed = rate(summary.bytes, summary.seconds)
    moved = (
        f"{summary.tensors} tensors, {amount(summary.bytes)} from {peer} in {summary.seconds:.2f} s, {speed:.2f} GB/s"
    )
    click.echo(f"fetched {moved}", err=True)
    if summary.resumed_tensors:
        _line("resumed", f"{tensors(summary.resumed_tensors)}, {amount(summary.resumed_bytes)} were there already")
    _line("backend", f"{summary.backend}, the server's {summary.peer_backend}")
    copied = f"; {summary.copied_bytes:,} of them copied on the way" if summary.copied_bytes else ""
    _line(
        "path",
        f"dmabuf {summary.dmabuf_bytes:,} bytes, linear {summary.linear_bytes:,}, host {summary.host_bytes:,}{copied}",
    )
    _line("verified", f"every tensor, by {summary.checksum}" if summary.checksum else "by TCP alone (no xxhash)")
    _line("written to", request.output or "nowhere: --out FILE keeps them")
    if request.verbose:
        before = 0.0
        for figures in summary.figures:
            _print_figures(figures, before)
            before = figures.seconds


def _print_figures(figures: TensorFigures, before: float) -> None:
    seconds = figures.seconds - before
    path = f"dmabuf {figures.dmabuf_bytes:,}, linear {figures.linear_bytes:,}, host {figures.host_bytes:,}"
    what = f"{figures.dtype} {list(figures.shape)}, {amount(figures.bytes)} in {seconds:.3f} s"
    click.echo(f"  {figures.name}: {what}; {path}", err=True)


def _line(label: str, text: str) -> None:
    click.echo(f"  {label:<{_LABEL_WIDTH}}{text}", err=True)
