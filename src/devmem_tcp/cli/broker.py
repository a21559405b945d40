"""``devmem-tcp broker``: bind, steer and lease queues for programs that may not do so themselves."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Final

import click

from devmem_tcp import memory
from devmem_tcp.broker import configuration
from devmem_tcp.broker.leasing import Leasing
from devmem_tcp.broker.policy import Policy
from devmem_tcp.broker.protocol import DEFAULT_PATH
from devmem_tcp.broker.server import Server, inherited, listening
from devmem_tcp.buffers import Allocator
from devmem_tcp.cli.failure import EXIT_STATUS_HELP, say
from devmem_tcp.kernel.control import LocalControl
from devmem_tcp.sys import calls, namespaces

_ALLOCATORS: Final[dict[str, Allocator]] = {
    "udmabuf": memory.Udmabuf(),
    "dma-heap system": memory.DmaHeap("system"),
    "dma-heap default_cma_region": memory.DmaHeap("default_cma_region"),
}


@click.command("broker", epilog=EXIT_STATUS_HELP)
@click.option(
    "--socket",
    "path",
    type=click.Path(),
    default=DEFAULT_PATH,
    show_default=True,
    help="Where clients connect; not looked at if systemd passes a socket.",
)
@click.option("--group", help="Let only this group connect.  [default: everybody may; the file decides]")
@click.option(
    "--config",
    type=click.Path(),
    default=configuration.DEFAULT_PATH,
    show_default=True,
    help="Who may do what.",
)
@click.option("--check", is_flag=True, help="Read the file, say whether it is right, and end.")
@click.option("--example-config", is_flag=True, help="Print a file that is right, and end.")
def command(path: str, group: str | None, config: str, check: bool, example_config: bool) -> None:
    """Bind, steer and lease RX queues for programs without CAP_NET_ADMIN.

    Runs as root until SIGTERM or Ctrl-C, and then ends with status 0. Programs use it by open_nic(NAME, via=SOCKET).
    What a program was given is undone when it ends, however it ends. What the file must say: docs/broker.md.

    \b
    devmem-tcp broker --example-config > /etc/devmem-tcp/broker.toml
    devmem-tcp broker --check
    devmem-tcp broker
    """
    if example_config:
        click.echo(configuration.EXAMPLE, nl=False)
        return
    policy = read_policy(config)
    if check:
        _describe(policy)
        return
    with _socket(path, group) as listener, _signalled() as stop:
        leasing = Leasing(policy, LocalControl, _ALLOCATORS, network_namespace=namespaces.namespace("net"), log=say)
        with contextlib.closing(Server(listener, leasing, say)) as server:
            say(f"broker: serving at {listener.getsockname()}, as {policy.source} says")
            server.serve(stop.fileno())
            say("broker: ending; what was given is undone")


def read_policy(path: str) -> Policy:
    """Read the administrator's file.

    Raises:
        OSError: it cannot be read; a note says how to make one.
        ValueError: it is not right; says where and what belongs there.
    """
    try:
        text = calls.read_bytes(path).decode()
    except FileNotFoundError as error:
        error.add_note(f"hint: devmem-tcp broker --example-config | sudo tee {path}   # then change it")
        raise
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this is no UTF-8 text") from None
    return configuration.parse(
        text, path, user_id_of=calls.user_id_of, group_id_of=calls.group_id_of, kinds=_ALLOCATORS
    )


def _describe(policy: Policy) -> None:
    for permit in policy.permits:
        click.echo(f"{permit.nic}: {permit.who.words}: queues {permit.queues}, ports {permit.ports}")
    click.echo(f"memory: {', '.join(policy.memory) or 'none'}")
    click.echo(f"{policy.source} is right")


@contextlib.contextmanager
def _socket(path: str, group: str | None) -> Iterator[socket.socket]:
    """Yield the socket to serve: systemd's if there is one, else one of our own at ``path``."""
    passed = inherited()
    if passed is not None:
        with passed:
            yield passed
        return
    if path == DEFAULT_PATH:
        directory = path.rpartition("/")[0]
        calls.make_directory(directory, 0o755)
        calls.change_mode(directory, 0o755)  # the journal of NIC settings is here too, and makes it for root alone
    with listening(path, None if group is None else _group_id(group)) as own:
        yield own


def _group_id(name: str) -> int:
    try:
        return calls.group_id_of(name)
    except KeyError:
        raise click.BadParameter(f"this machine has no group {name!r}", param_hint="--group") from None


@contextlib.contextmanager
def _signalled() -> Iterator[socket.socket]:
    """Yield a socket that is readable once SIGTERM, SIGHUP or SIGINT came, so that no change is left half done."""
    stop, wakeup = socket.socketpair()
    with stop, wakeup, contextlib.ExitStack() as undo:
        wakeup.setblocking(False)
        undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(wakeup.fileno()))
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            undo.callback(signal.signal, number, signal.signal(number, _nothing))
        yield stop


def _nothing(number: int, frame: FrameType | None) -> None:
    """The byte on the wakeup fd is what counts."""
