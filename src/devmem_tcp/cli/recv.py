"""``devmem-tcp recv``: one TCP stream into device memory, and from there to a file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

from devmem_tcp.buffers import Buffer, CpuAccess
from devmem_tcp.cli.failure import EXIT_STATUS_HELP, peer_is_gone
from devmem_tcp.cli.options import (
    ANY_HOST,
    DEFAULT_PORT,
    HostPort,
    Size,
    backend_options,
    pattern_length,
    report_options,
)
from devmem_tcp.cli.progress import Advance, progress
from devmem_tcp.cli.report import ReceivedReport, print_json, print_received, rate
from devmem_tcp.cli.setup import NicChoice, ReportChoice, accept_one, hostport, steered, steering
from devmem_tcp.cli.sinks import STDOUT, FileSink, HashSink, PatternSink, Sink, open_output
from devmem_tcp.contract import DevmemSocket, Nic, RxBinding
from devmem_tcp.errors import DevmemError
from devmem_tcp.types import Address, FragBatch, FragKind, SocketStats

_NO_FRAG_YET: Final = 1 << 32  # larger than any frag: sizes are u32


@dataclass(frozen=True, kw_only=True)
class Request(NicChoice, ReportChoice):
    """The command line of recv."""

    address: Address
    connect: Address | None
    queue: int
    output: str
    force: bool
    pattern: int | None
    read_size: int
    strict: bool


@click.command("recv", epilog=EXIT_STATUS_HELP)
@click.argument("address", type=HostPort(default_host=ANY_HOST), required=False, metavar="[PORT | HOST:PORT]")
@click.option("--connect", type=HostPort(), metavar="HOST:PORT", help="Connect there instead of listening.")
@click.option("-o", "--output", type=click.Path(), default=STDOUT, help="File for the payload.  [default: stdout]")
@click.option("--force", is_flag=True, help="Write payload even to a terminal.")
@click.option(
    "--queue", type=click.IntRange(min=0), default=1, show_default=True, help="RX queue to bind and steer to."
)
@backend_options(buffer_default="64M")
@click.option("--read-size", type=Size(), default="1M", show_default=True, help="Most bytes one recvmsg takes.")
@click.option(
    "--verify",
    "pattern",
    type=pattern_length(),
    metavar="PATTERN-LENGTH",
    help="Check that the payload is 1, 2, … wrapping to 0 at this number (2 to 256), as ncdevmem -v.",
)
@click.option("--strict", is_flag=True, help="Fail if any payload lands in host memory.")
@report_options
def command(address: Address | None, connect: Address | None, as_json: bool, output: str, **options: Any) -> None:
    """Receive one TCP stream into device memory and write it to a file or stdout.

    Listens on PORT (5201) of every address, takes one connection, and ends when that does. A queue is bound to a
    buffer and the connection steered to it; what was changed on the NIC is put back at the end.

    \b
    devmem-tcp recv 5201 -o model.bin
    devmem-tcp recv --connect [2001:db8::1]:5201 --verify 7 -o /dev/null
    """
    if connect is not None and address is not None:
        raise click.UsageError("give an address to listen on or --connect, not both")
    if as_json and output == STDOUT:
        raise click.UsageError("--json takes stdout for the report: send the payload elsewhere with --output")
    where = address or (ANY_HOST, DEFAULT_PORT)
    request = Request(address=where, connect=connect, as_json=as_json, output=output, **options)
    request.check()
    report = receive(request)
    if request.as_json:
        print_json(report)
    if not request.quiet:
        print_received(report)


def receive(request: Request) -> ReceivedReport:
    """Set the NIC up, receive one stream, put everything back; returns the report."""
    with (
        open_output(request.output, force=request.force) as output,
        request.open() as nic,
        request.allocate(nic) as buffer,
        steering(nic, request.queue, spread=request.via is None),
        nic.bind_rx(buffer, [request.queue]) as binding,
        _connection(request, nic) as sock,
    ):
        sock.settimeout(request.timeout_s)
        reception = _Reception(request, output)
        with progress(request.progress, "receiving", None, quiet=request.quiet or output.is_terminal) as advance:
            reception.run(sock, buffer, advance)
        return reception.report(request, nic, binding, sock)


@contextlib.contextmanager
def _connection(request: Request, nic: Nic) -> Iterator[DevmemSocket]:
    """Yield the one connected socket, its flow steered to the queue while the block runs."""
    if request.connect is not None:
        with (
            steered(nic, request.queue, src_port=request.connect[1]),
            nic.connect(request.connect, strict=request.strict, timeout_s=request.timeout_s) as sock,
        ):
            yield sock
        return
    with contextlib.ExitStack() as held:
        host, port = request.address
        if port:
            held.enter_context(steered(nic, request.queue, dst_port=port))
        listener = held.enter_context(nic.listen((host, port), strict=request.strict))
        if not port:
            held.enter_context(steered(nic, request.queue, dst_port=listener.address[1]))
        yield held.enter_context(accept_one(nic, listener, request, f", queue {request.queue}"))


class _Reception:
    """One stream on its way from the socket to the sinks."""

    def __init__(self, request: Request, output: FileSink) -> None:
        self._read_size = request.read_size
        self._output = output
        self._hash = HashSink() if request.hashing else None
        check = [PatternSink(request.pattern)] if request.pattern is not None else []
        self._sinks: list[Sink] = [*check, output, *([self._hash] if self._hash else [])]
        self._moved = 0
        self._seconds = 0.0
        self._smallest = _NO_FRAG_YET
        self._largest = 0

    def run(self, sock: DevmemSocket, buffer: Buffer, advance: Advance) -> None:
        """Receive to the end of the stream; each batch's tokens go back once every sink has read it.

        Raises:
            DevmemError: the peer reset the connection; says after how many bytes.
        """
        peer = hostport(sock.remote_address)
        started = time.perf_counter()
        try:
            while batch := sock.recv_frags(self._read_size):
                with batch:
                    self._take(batch, buffer)
                advance(batch.nbytes)
        except OSError as error:
            if not peer_is_gone(error):
                raise
            raise DevmemError(
                f"connection to {peer} broke ({error.strerror or error}) after {self._moved:,} bytes",
                hint="the payload is incomplete; see why the sender ended",
            ) from error
        self._seconds = time.perf_counter() - started

    def _take(self, batch: FragBatch, buffer: Buffer) -> None:
        with buffer.cpu_access(CpuAccess.READ) as memory:
            pieces = payload(batch, memory)
            for sink in self._sinks:
                sink.take(pieces)
        self._moved += batch.nbytes
        sizes = batch.sizes
        self._smallest = min(self._smallest, int(sizes.min()))
        self._largest = max(self._largest, int(sizes.max()))

    def report(self, request: Request, nic: Nic, binding: RxBinding, sock: DevmemSocket) -> ReceivedReport:
        path: SocketStats = sock.stats
        return ReceivedReport(
            bytes=self._moved,
            seconds=self._seconds,
            gigabytes_per_second=rate(self._moved, self._seconds),
            nic=nic.name,
            queue=request.queue,
            rx_queue=sock.rx_queue,
            dmabuf_id=binding.dmabuf_id,
            memory=binding.buffer.kind,
            buffer_bytes=binding.buffer.size_bytes,
            local=hostport(sock.local_address),
            remote=hostport(sock.remote_address),
            path=path,
            smallest_frag=self._smallest if self._largest else 0,
            largest_frag=self._largest,
            output=self._output.name,
            verified_pattern=request.pattern,
            sha256=self._hash.hexdigest() if self._hash else None,
        )


def payload(batch: FragBatch, memory: memoryview) -> Sequence[memoryview]:
    """Return a batch's payload in the order of the stream: slices of the bound buffer, and of the inline bytes.

    Neighbours in the same memory are one slice: fewer, longer pieces to write.

    Args:
        batch: live frags of one binding.
        memory: that binding's buffer, whole.
    """
    inline = batch.inline
    runs: list[tuple[bool, int, int]] = []  # in the buffer?, first byte, end
    for offset, size, _, _, kind in batch.frags.tolist():
        in_buffer = kind == FragKind.DMABUF
        if runs and runs[-1][0] == in_buffer and runs[-1][2] == offset:
            runs[-1] = (in_buffer, runs[-1][1], offset + size)
        else:
            runs.append((in_buffer, offset, offset + size))
    return [(memory if in_buffer else inline)[first:end] for in_buffer, first, end in runs]
