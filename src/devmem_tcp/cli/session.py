"""What serve and fetch have in common: the options of a session, its key, and what they print."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import click

from devmem_tcp.cli.failure import say
from devmem_tcp.cli.setup import NicChoice
from devmem_tcp.sansio.frames import MAX_LANES
from devmem_tcp.sansio.handshake import MIN_KEY_BYTES

_MAX_KEY_BYTES: Final = 1 << 16

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class SessionChoice(NicChoice):
    """How sessions are made, and what to print: the options of ``session_options``."""

    key_file: str | None
    insecure: bool
    lanes: int
    tls_cert: str | None
    tls_key: str | None
    tls_ca: str | None
    as_json: bool
    quiet: bool

    def session(self, *, server: bool) -> dict[str, Any]:
        """Return the arguments of a session.

        Raises:
            click.UsageError: options that do not go together.
            OSError, ValueError: a file that cannot be read, or holds no key or certificate.
        """
        return {
            "lanes": self.lanes,
            "insecure": self.insecure,
            "key": read_key(self.key_file) if self.key_file is not None else None,
            "tls": self._tls(server=server),
        }

    def _tls(self, *, server: bool) -> ssl.SSLContext | None:
        if self.tls_key is not None and self.tls_cert is None:
            raise click.UsageError("--tls-key goes with --tls-cert")
        if server and self.tls_ca is not None and self.tls_cert is None:
            raise click.UsageError("a server needs --tls-cert, besides --tls-ca")
        if self.tls_cert is None and self.tls_ca is None:
            return None
        try:
            if server:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                if self.tls_ca is not None:
                    context.load_verify_locations(self.tls_ca)
                    context.verify_mode = ssl.CERT_REQUIRED
            else:
                context = ssl.create_default_context(cafile=self.tls_ca)
            if self.tls_cert is not None:
                context.load_cert_chain(self.tls_cert, self.tls_key)
        except ssl.SSLError as error:
            files = ", ".join(name for name in (self.tls_cert, self.tls_key, self.tls_ca) if name is not None)
            raise ValueError(f"no certificate, key or authority as TLS wants it: {files} ({error.reason})") from None
        return context


def read_key(path: str) -> bytes:
    """Read a shared key: the bytes of a file, but for a newline at its end. Warns if others can read it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too short, or too long to be meant.
    """
    with open(path, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        key = file.read(_MAX_KEY_BYTES + 1).removesuffix(b"\n").removesuffix(b"\r")
    if len(key) > _MAX_KEY_BYTES:
        raise ValueError(f"{path} has over {_MAX_KEY_BYTES} bytes: is this a key?")
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(f"the key in {path} has {len(key)} bytes: at least {MIN_KEY_BYTES} are needed, random ones")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        say(f"warning: {path} can be read or written by others than you (mode {stat.S_IMODE(mode):04o}): chmod 600 it")
    return key


def tensors(count: int) -> str:
    """Write a number of tensors."""
    return f"{count:,} tensor{'' if count == 1 else 's'}"


def session_options(command: Command) -> Command:
    """Add the options that say how sessions are made, and what to print."""
    file = click.Path(exists=True, dir_okay=False)
    for option in reversed(
        (
            click.option(
                "--key-file",
                type=file,
                metavar="FILE",
                help="A secret that both ends have: head -c 32 /dev/urandom > FILE. Without one: this machine only.",
            ),
            click.option("--insecure", is_flag=True, help="Do without a key, also with other machines."),
            click.option(
                "--lanes",
                type=click.IntRange(1, MAX_LANES),
                default=4,
                show_default=True,
                help="Data connections of a session, at most.",
            ),
            click.option("--tls-cert", type=file, metavar="FILE", help="TLS on the control connection: certificate."),
            click.option("--tls-key", type=file, metavar="FILE", help="Its private key, if that is another file."),
            click.option("--tls-ca", type=file, metavar="FILE", help="Whom to believe about the other end."),
            click.option("--json", "as_json", is_flag=True, help="Print reports on stdout, one JSON object a line."),
            click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only."),
        )
    ):
        command = option(command)
    return command
