"""Parameter types of the command line, and the options that several verbs share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from devmem_tcp.buffers import check_buffer_size
from devmem_tcp.testing.patterns import MAX_LENGTH, MIN_LENGTH
from devmem_tcp.types import PAGE_SIZE, Address

KIB: Final = 1 << 10
MIB: Final = 1 << 20
DEFAULT_PORT: Final = 5201  # as ncdevmem and iperf3
ANY_HOST: Final = "::"

_UNITS: Final = {"": 1, "K": KIB, "M": MIB, "G": 1 << 30, "T": 1 << 40}
_SIZE: Final = re.compile(r"(?P<number>\d+)(?:(?P<unit>[KMGT])(?:iB)?|B)?", re.IGNORECASE | re.ASCII)

Command = TypeVar("Command", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """A number of bytes: ``4096``, ``64K``, ``256M``, ``4KiB``; K, M, G and T are powers of 1024."""

    name = "size"

    def __init__(self, *, whole_pages: bool = False) -> None:
        self._whole_pages = whole_pages

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value)
        if match is None:
            self.fail(f"{value!r} is not a size: give bytes, or K, M, G, T of 1024, as in 64K or 4MiB", param, ctx)
        size = int(match["number"]) * _UNITS[(match["unit"] or "").upper()]
        if size == 0:
            self.fail("a size must be positive", param, ctx)
        if self._whole_pages:
            try:
                check_buffer_size(size)
            except ValueError as error:
                self.fail(str(error), param, ctx)
        return size


class HostPort(click.ParamType[Address]):
    """A TCP address: ``HOST:PORT``, ``[::1]:PORT``, and where a default host is given ``PORT`` alone."""

    name = "host:port"

    def __init__(self, *, default_host: str | None = None) -> None:
        self._default_host = default_host

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        if isinstance(value, tuple):
            return value
        form = "HOST:PORT" if self._default_host is None else "PORT or HOST:PORT"
        host, colon, port = value.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            self.fail(f"{value!r}: write an IPv6 address in brackets, as in [::1]:{DEFAULT_PORT}", param, ctx)
        if not host:
            if self._default_host is None:
                self.fail(f"{value!r} is not {form}: the {'host' if colon else 'port'} is missing", param, ctx)
            host = self._default_host
        if not (port.isascii() and port.isdigit() and int(port) <= 65535):
            self.fail(f"{value!r} is not {form}: a port is a number from 0 to 65535", param, ctx)
        if port == "0" and self._default_host is None:
            self.fail(f"{value!r}: port 0 stands for any free one, which only listening can take", param, ctx)
        return host, int(port)


def pattern_length() -> click.IntRange:
    """Return the type of a pattern length."""
    return click.IntRange(MIN_LENGTH, MAX_LENGTH)


def backend_options(buffer_default: str) -> Callable[[Command], Command]:
    """Add the options that say which NIC, backend and memory to use."""

    def add(command: Command) -> Command:
        for option in reversed(
            (
                click.option("--nic", default="soft0", show_default=True, metavar="NAME", help="Network interface."),
                click.option(
                    "--backend",
                    type=click.Choice(["auto", "software", "kernel"]),
                    default="auto",
                    show_default=True,
                    help="What carries the contract; auto says so when it has to settle for software.",
                ),
                click.option(
                    "--via",
                    type=click.Path(),
                    metavar="SOCKET",
                    help="Kernel backend: have a broker bind, steer and allocate (devmem-tcp broker --help).",
                ),
                click.option(
                    "--memory",
                    type=click.Choice(["host", "udmabuf", "dma-heap"]),
                    help="What the buffer is made of.  [default: udmabuf for the kernel backend, else host]",
                ),
                click.option(
                    "--buffer",
                    "buffer_bytes",
                    type=Size(whole_pages=True),
                    default=buffer_default,
                    show_default=True,
                    help=f"Size of the bound buffer, a multiple of {PAGE_SIZE}: 64K, 256M, 1G.",
                ),
                click.option(
                    "--frag-size",
                    type=Size(),
                    help="Software backend: largest frag; 4096 gives the kernel's own shape.  [default: 1M]",
                ),
                click.option(
                    "--congestion",
                    metavar="NAME",
                    help="Software backend: TCP congestion control; auto changes it on loopback only, system never."
                    "  [default: auto]",
                ),
                click.option(
                    "--hostile",
                    "hostile_seed",
                    type=int,
                    metavar="SEED",
                    help="Software backend: make every legal but nasty choice, repeatably.",
                ),
            )
        ):
            command = option(command)
        return command

    return add


def report_options(command: Command) -> Command:
    """Add the options that say what to print."""
    for option in reversed(
        (
            click.option("--hash", "hashing", is_flag=True, help="Print the payload's SHA-256."),
            click.option("--json", "as_json", is_flag=True, help="Print the report on stdout, one JSON object a line."),
            click.option(
                "--progress",
                type=click.Choice(["auto", "json", "none"]),
                default="auto",
                show_default=True,
                help="auto: a bar, if stderr is a terminal; json: lines among those of --json.",
            ),
            click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only."),
            click.option(
                "--timeout",
                "timeout_s",
                type=click.FloatRange(min=0, min_open=True),
                metavar="SECONDS",
                help="Longest wait for a connection, for data or for a completion.  [default: for ever]",
            ),
        )
    ):
        command = option(command)
    return command
