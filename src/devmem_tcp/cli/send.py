"""``devmem-tcp send``: a file, stdin or a pattern, sent from a bound buffer by offset."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import click

from devmem_tcp.buffers import CpuAccess
from devmem_tcp.cli.failure import EXIT_STATUS_HELP, peer_is_gone
from devmem_tcp.cli.options import (
    ANY_HOST,
    MIB,
    HostPort,
    Size,
    backend_options,
    pattern_length,
    report_options,
)
from devmem_tcp.cli.progress import Advance, progress
from devmem_tcp.cli.report import SentReport, print_json, print_sent, rate
from devmem_tcp.cli.setup import NicChoice, ReportChoice, accept_one, hostport
from devmem_tcp.cli.sinks import HashSink
from devmem_tcp.cli.sources import STDIN, PatternSource, Source, open_file
from devmem_tcp.cli.windows import Windows
from devmem_tcp.contract import DevmemSocket, Nic, TxBinding
from devmem_tcp.errors import DevmemError, Timeout
from devmem_tcp.types import Address

_DEFAULT_WINDOW_BYTES: Final = 1 * MIB
_DISCARD_BYTES: Final = 1 * MIB


@dataclass(frozen=True, kw_only=True)
class Request(NicChoice, ReportChoice):
    """The command line of send."""

    to: Address | None
    listen: Address | None
    file: str
    pattern: int | None
    size_bytes: int | None
    window_bytes: int | None


@click.command("send", epilog=EXIT_STATUS_HELP)
@click.argument("operands", nargs=-1, metavar="[HOST:PORT] [FILE]")
@click.option(
    "--listen",
    type=HostPort(default_host=ANY_HOST),
    metavar="[HOST:]PORT",
    help="Wait for a connection there instead of connecting.",
)
@click.option("--pattern", type=pattern_length(), metavar="N", help="Send 1, 2, … wrapping to 0 at N, not a file.")
@click.option("--size", "size_bytes", type=Size(), help="How much of the pattern.")
@backend_options(buffer_default="64M")
@click.option(
    "--window",
    "window_bytes",
    type=Size(),
    help="Piece of the buffer that one sendmsg sends.  [default: 1M, or all of a smaller buffer]",
)
@report_options
def command(
    operands: tuple[str, ...], listen: Address | None, pattern: int | None, size_bytes: int | None, **options: Any
) -> None:
    """Send FILE (default: stdin) from a bound buffer.

    Connects to HOST:PORT; with --listen, waits for the other side. A piece of the buffer is filled again only after
    its completion. Ends when everything is complete and the other side has closed.

    \b
    devmem-tcp send 10.0.0.2:5201 model.bin
    devmem-tcp send --pattern 7 --size 1G [::1]:5201
    """
    to, file = _operands(operands, listening=listen is not None)
    if (pattern is None) != (size_bytes is None):
        raise click.UsageError("--pattern and --size go together")
    if pattern is not None and file is not None:
        raise click.UsageError("give FILE or --pattern, not both")
    request = Request(to=to, listen=listen, file=file or STDIN, pattern=pattern, size_bytes=size_bytes, **options)
    request.check()
    report = send(request)
    if request.as_json:
        print_json(report)
    if not request.quiet:
        print_sent(report)


def _operands(operands: tuple[str, ...], *, listening: bool) -> tuple[Address | None, str | None]:
    """Return the address to connect to (None: listening), and the file (None: not given)."""
    rest = list(operands)
    to: Address | None = None
    if not listening:
        if not rest:
            raise click.UsageError("give HOST:PORT to send to, or --listen PORT")
        to = HostPort().convert(rest.pop(0), None, None)
    if len(rest) > 1:
        raise click.UsageError(f"one FILE at a time: {rest[1]!r} is one too many")
    return to, rest[0] if rest else None


def send(request: Request) -> SentReport:
    """Bind a buffer, send one stream from it, wait for its end; returns the report."""
    windows = Windows(request.buffer_bytes, request.window_bytes or min(_DEFAULT_WINDOW_BYTES, request.buffer_bytes))
    with (
        _source(request, windows) as source,
        request.open() as nic,
        request.allocate(nic) as buffer,
        nic.bind_tx(buffer) as binding,
        _connection(request, nic) as sock,
    ):
        sock.settimeout(request.timeout_s)
        sock.set_zerocopy()
        sending = _Sending(request, source, windows)
        with progress(request.progress, "sending", source.total, quiet=request.quiet or source.is_terminal) as advance:
            sending.run(sock, binding, advance)
        return sending.report(nic, binding, sock)


@contextlib.contextmanager
def _source(request: Request, windows: Windows) -> Iterator[Source]:
    if request.pattern is not None and request.size_bytes is not None:
        yield PatternSource(request.pattern, request.size_bytes, windows.window_bytes)
    else:
        with open_file(request.file) as source:
            yield source


@contextlib.contextmanager
def _connection(request: Request, nic: Nic) -> Iterator[DevmemSocket]:
    if request.to is not None:
        with nic.connect(request.to, timeout_s=request.timeout_s) as sock:
            yield sock
        return
    assert request.listen is not None
    with nic.listen(request.listen) as listener, accept_one(nic, listener, request, "") as sock:
        yield sock


class _Sending:
    """One stream on its way from the source to the socket."""

    def __init__(self, request: Request, source: Source, windows: Windows) -> None:
        self._source = source
        self._windows = windows
        self._timeout_s = request.timeout_s
        self._hash = HashSink() if request.hashing else None
        self._sent = 0
        self._seconds = 0.0

    def run(self, sock: DevmemSocket, binding: TxBinding, advance: Advance) -> None:
        """Send to the end of the source, then wait for all completions and for the peer's end of stream.

        Raises:
            DevmemError: the peer reset the connection, or stopped taking or closing; says after how many bytes.
        """
        peer = hostport(sock.remote_address)
        started = time.perf_counter()
        try:
            while self._send_window(sock, binding, advance):
                pass
            sock.shutdown_send()
            self._windows.wait_all(sock, self._timeout_s)
            self._seconds = time.perf_counter() - started
            while sock.discard(_DISCARD_BYTES):
                pass
        except Timeout as error:
            raise DevmemError(
                f"{peer} did not go on within {self._timeout_s:g} s, after {self._sent:,} bytes were sent",
                hint="see whether it still reads, or give a longer --timeout",
            ) from error
        except OSError as error:
            if not peer_is_gone(error):
                raise
            raise DevmemError(
                f"connection to {peer} broke ({error.strerror or error}) after {self._sent:,} bytes were sent",
                hint="the peer ended before it had everything; see why",
            ) from error

    def _send_window(self, sock: DevmemSocket, binding: TxBinding, advance: Advance) -> bool:
        """Fill a free window and send it; False at the end of the source."""
        offset = self._windows.take(sock, self._timeout_s)
        end = offset + self._windows.window_bytes
        with binding.buffer.cpu_access(CpuAccess.WRITE) as memory:
            filled = memory[offset:end]
            count = self._source.fill(filled)
            if self._hash:
                self._hash.take([filled[:count]])
        if not count:
            return False
        done = 0
        while done < count:
            taken = sock.send_frags(binding, [offset + done], [count - done])
            self._windows.sent(offset)
            done += taken
            self._sent += taken
            advance(taken)
        return True

    def report(self, nic: Nic, binding: TxBinding, sock: DevmemSocket) -> SentReport:
        return SentReport(
            bytes=self._sent,
            seconds=self._seconds,
            gigabytes_per_second=rate(self._sent, self._seconds),
            nic=nic.name,
            dmabuf_id=binding.dmabuf_id,
            memory=binding.buffer.kind,
            buffer_bytes=binding.buffer.size_bytes,
            window_bytes=self._windows.window_bytes,
            local=hostport(sock.local_address),
            remote=hostport(sock.remote_address),
            path=sock.stats,
            completions=self._windows.completions,
            source=self._source.name,
            sha256=self._hash.hexdigest() if self._hash else None,
        )
