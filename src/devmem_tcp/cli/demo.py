"""``devmem-tcp demo``: a real file between two real processes, verified, and what happened on the way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import numpy as np

from devmem_tcp.cli.children import Child, Inbox, running, signals_held
from devmem_tcp.cli.explanation import explain
from devmem_tcp.cli.failure import EXIT_STATUS_HELP, VerificationFailed, say
from devmem_tcp.cli.options import MIB, Size
from devmem_tcp.cli.progress import Advance, progress
from devmem_tcp.cli.report import (
    DemoReport,
    Event,
    ListeningEvent,
    ProgressEvent,
    ReceivedReport,
    SentReport,
    binary,
    print_json,
)
from devmem_tcp.cli.setup import hostport
from devmem_tcp.errors import DevmemError

_HOST: Final = "127.0.0.1"
_SEED: Final = 5201  # of the file made: the same bytes every time
_PIECE_BYTES: Final = 1 * MIB
_CHILD_TIMEOUT_S: Final = 60


@click.command("demo", epilog=EXIT_STATUS_HELP)
@click.option("--file", type=click.Path(path_type=Path), help="Move this file instead of one made for the purpose.")
@click.option("--size", "size_bytes", type=Size(), default="1G", show_default=True, help="Size of the file to make.")
@click.option(
    "--hostile", "hostile_seed", type=int, metavar="SEED", help="Make every legal but nasty choice, repeatably."
)
@click.option("--keep", is_flag=True, help="Write the received copy to a file, keep it and the file made; say where.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of the explanation.")
def command(file: Path | None, size_bytes: int, hostile_seed: int | None, keep: bool, as_json: bool) -> None:
    """Move a real file into registered memory and see how.

    A receiver and a sender run as two processes on loopback, with the software backend: the calls, tokens and rules
    of device memory TCP over ordinary sockets. The file's SHA-256 is compared on both ends.
    """
    with _folder(keep=keep) as folder:
        made = file is None
        if file is None:
            file = folder / "sent.bin"
            make_file(file, size_bytes, quiet=as_json)
        else:
            check_regular(file)
        expected = hash_file(file, quiet=as_json)
        copy = folder / "received.bin" if keep else Path(os.devnull)
        received, sent = move(file, copy, hostile_seed, quiet=as_json)
        for end, found in (("receiver", received), ("sender", sent)):
            if found.sha256 != expected:
                raise VerificationFailed(f"the {end} hashed {found.sha256}, but the file is {expected}")
    report = DemoReport(
        file=str(file),
        made=made,
        bytes=received.bytes,
        sha256=expected,
        received=received,
        sent=sent,
        kept=str(copy) if keep else None,
    )
    if as_json:
        print_json(report)
    else:
        for line in explain(report):
            click.echo(line)


@contextlib.contextmanager
def _folder(*, keep: bool) -> Iterator[Path]:
    """Make a temporary folder; removed with everything in it at the end, unless it is to be kept."""
    path = Path(tempfile.mkdtemp(prefix="devmem-tcp-demo-"))
    try:
        yield path
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            with signals_held():
                shutil.rmtree(path)


@contextlib.contextmanager
def _step(what: str, total: int, *, quiet: bool) -> Iterator[Advance]:
    """Say what is done next, and show how far it is."""
    if not quiet:
        say(what)
    with progress("auto", what, total, quiet=quiet) as advance:
        yield advance


def check_regular(file: Path) -> None:
    """Raise OSError unless ``file`` is there and a regular file."""
    mode = file.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))


def make_file(path: Path, size_bytes: int, *, quiet: bool) -> None:
    """Write ``size_bytes`` of pseudo-random data, the same every time.

    Raises:
        DevmemError: there is not enough room on the disk.
    """
    room = shutil.disk_usage(path.parent).free
    if room < size_bytes:
        raise DevmemError(
            f"{path.parent} has {binary(room)} free, and the file needs {binary(size_bytes)}",
            hint="give a smaller --size, a --file of your own, or another folder in TMPDIR",
        )
    words = np.random.SFC64(_SEED)
    what = f"making a file of {binary(size_bytes)}"
    with open(path, "wb") as file, _step(what, size_bytes, quiet=quiet) as advance:
        left = size_bytes
        while left:
            piece = words.random_raw(_PIECE_BYTES // 8).view(np.uint8)[:left]
            file.write(piece.data)
            left -= len(piece)
            advance(len(piece))


def hash_file(path: Path, *, quiet: bool) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    piece = memoryview(bytearray(_PIECE_BYTES))
    total = path.stat().st_size
    with open(path, "rb", buffering=0) as file, _step("hashing it", total, quiet=quiet) as advance:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            advance(count)
    return digest.hexdigest()


def move(file: Path, copy: Path, hostile_seed: int | None, *, quiet: bool) -> tuple[ReceivedReport, SentReport]:
    """Run a receiver and a sender as processes of their own, and return what they reported.

    Raises:
        DevmemError: one of them failed; shows what it said.
    """
    nasty = [] if hostile_seed is None else ["--hostile", str(hostile_seed)]
    both = ["--backend", "software", "--json", "--quiet", "--hash", "--timeout", str(_CHILD_TIMEOUT_S), *nasty]
    inbox: Inbox = queue.SimpleQueue()
    receive = ["recv", f"{_HOST}:0", "--output", str(copy), "--progress", "json", *both]
    with running("receiver", receive, inbox) as receiver:
        _, listening = inbox.get()
        if not isinstance(listening, ListeningEvent):
            receiver.check()
            raise DevmemError("the receiver ended before it listened")
        send = ["send", hostport((listening.host, listening.port)), str(file.absolute()), *both]
        with running("sender", send, inbox) as sender:
            reports = _follow(inbox, {receiver, sender}, file.stat().st_size, quiet=quiet)
    received, sent = reports.get(receiver), reports.get(sender)
    if not (isinstance(received, ReceivedReport) and isinstance(sent, SentReport)):
        raise DevmemError("a process ended without its report")
    return received, sent


def _follow(inbox: Inbox, children: set[Child], total: int, *, quiet: bool) -> dict[Child, Event]:
    """Show progress until every child has ended well; returns the last thing each said."""
    last: dict[Child, Event] = {}
    shown = 0
    with _step("moving it from process to process", total, quiet=quiet) as advance:
        while children:
            child, event = inbox.get()
            if event is None:
                child.check()
                children.remove(child)
            elif isinstance(event, ProgressEvent):
                advance(event.bytes - shown)
                shown = event.bytes
            else:
                last[child] = event
    return last
