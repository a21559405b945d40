"""``devmem-tcp serve``: the tensors of safetensors files, for whoever fetches them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import click
import msgspec

from devmem_tcp.cli.failure import EXIT_STATUS_HELP, say
from devmem_tcp.cli.options import ANY_HOST, DEFAULT_PORT, HostPort, backend_options
from devmem_tcp.cli.report import ListeningEvent, amount, print_json, rate
from devmem_tcp.cli.session import SessionChoice, session_options, tensors
from devmem_tcp.cli.setup import hostport
from devmem_tcp.contract import Nic
from devmem_tcp.safetensors.serving import DEFAULT_PEERS, ServedSession, TensorServer, serve_tensors
from devmem_tcp.types import Address

_REFUSALS_S: Final = 1.0  # between two lines about strangers


class ServedEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="served"):
    """One client's session is over."""

    session: ServedSession


@dataclass(frozen=True, kw_only=True)
class Request(SessionChoice):
    """The command line of serve."""

    files: tuple[str, ...]
    listen: Address
    data_port: int | None
    max_peers: int


@click.command("serve", epilog=EXIT_STATUS_HELP)
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILE...")
@click.option(
    "--listen",
    type=HostPort(default_host=ANY_HOST),
    default=str(DEFAULT_PORT),
    show_default=True,
    metavar="[HOST:]PORT",
    help="Where clients come.",
)
@click.option(
    "--data-port", type=click.IntRange(1, 65535), help="TCP port of data connections.  [default: the next one]"
)
@click.option(
    "--max-peers", type=click.IntRange(min=1), default=DEFAULT_PEERS, show_default=True, help="Clients at a time."
)
@backend_options(buffer_default="64M")
@session_options
def command(**options: Any) -> None:
    """Offer the tensors of safetensors files to whoever fetches them.

    Serves any number of clients, one after the other and at the same time, until Ctrl-C; each has an even part of the
    buffer. Prints a line for each when it is done. A file that changes meanwhile is not served any more.

    \b
    devmem-tcp serve model-*.safetensors
    devmem-tcp serve --key-file key --listen 10.0.0.1:5201 model.safetensors
    """
    request = Request(**options)
    with (
        request.open() as nic,
        request.allocate(nic) as buffer,
        serve_tensors(
            nic,
            request.files,
            listen=request.listen,
            data_port=request.data_port,
            buffer=buffer,
            max_peers=request.max_peers,
            **request.session(server=True),
        ) as server,
    ):
        _say_where(request, nic, server)
        _serve(request, server)


def _serve(request: Request, server: TensorServer) -> None:
    """Serve until the program is interrupted."""
    told, next_s = 0, 0.0
    while True:
        for session in server.step(None):
            if request.as_json:
                print_json(ServedEvent(session=session))
            elif not request.quiet:
                say(described(session))
        if server.refused > told and not request.quiet and time.monotonic() >= next_s:
            count = server.refused - told
            say(f"turned away {count} connection{'s' * (count > 1)}: {server.last_refusal.splitlines()[0]}")
            told, next_s = server.refused, time.monotonic() + _REFUSALS_S


def _say_where(request: Request, nic: Nic, server: TensorServer) -> None:
    host, port = server.address
    if request.as_json:
        print_json(ListeningEvent(host=host, port=port))
    elif not request.quiet:
        catalog = server.catalog
        what = f"{tensors(len(catalog.entries))}, {amount(catalog.total_bytes)}"
        say(f"listening on {hostport((host, port))} ({nic.capabilities.backend} backend, {nic.name}): {what}")


def described(session: ServedSession) -> str:
    """Write what a client got in one line."""
    peer, error = hostport(session.peer), f"; {session.error}" if session.error else ""
    if not session.tensors:
        return f"{peer}: no tensors{error}"
    moved = f"{tensors(session.tensors)}, {amount(session.bytes)} in {session.seconds:.2f} s"
    path = f"dmabuf {session.dmabuf_bytes:,} bytes, host {session.host_bytes:,}"
    backends = f"{session.backend} to {session.peer_backend}"
    return f"{peer}: {moved}, {rate(session.bytes, session.seconds):.2f} GB/s; {backends}, {path}{error}"
