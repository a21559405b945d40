"""The command ``devmem-tcp``: its verbs, each loaded from its own file when it is asked for."""

from __future__ import annotations

import importlib
import signal
from typing import Any, Final

import click

from devmem_tcp import __version__
from devmem_tcp.cli import failure

VERBS: Final = {
    "recv": "Receive a TCP stream into device memory and write it to a file or stdout.",
    "send": "Send a file, stdin or a pattern from device memory.",
    "serve": "Offer the tensors of safetensors files to whoever fetches them.",
    "fetch": "Fetch tensors from a server into device memory, and from there to a safetensors file.",
    "demo": "Move a real file between two processes, verify it, and explain what happened.",
    "bench": "Measure throughput, round trips, CPU time and many connections, here or between two machines.",
    "doctor": "Say what this machine and a NIC need for devmem TCP, and put settings back after a crash.",
    "lease": "Lease an RX queue of a NIC to a container's virtual interface.",
    "broker": "Bind and steer for programs without CAP_NET_ADMIN, as an administrator's file allows.",
    "lab": "Boot a real kernel on NICs written in Python: devmem TCP without the hardware.",
}


class Program(click.Group):
    """The verbs, and one place where errors become messages and exit statuses."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"devmem_tcp.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        found = super().resolve_command(ctx, args)
        failure.unwind_on_interrupt()
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them: help is quick."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        with failure.reported():
            return super().invoke(ctx)


@click.command(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"{failure.EXIT_STATUS_HELP} `devmem-tcp COMMAND --help` says more about a command.",
)
@click.version_option(__version__, prog_name="devmem-tcp", message="%(prog)s %(version)s")
def program() -> None:
    """TCP payload received straight into device memory, and sent from it."""


def main() -> None:
    """Run the command line: see ``devmem_tcp_main``."""
    failure.end_on_signals()
    try:
        program(prog_name="devmem-tcp")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to close: no traceback while Python goes down
