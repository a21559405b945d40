"""``devmem-tcp lease``: an RX queue of a NIC for a container."""

from __future__ import annotations

import click

from devmem_tcp.cli.failure import EXIT_STATUS_HELP
from devmem_tcp.kernel.ethtool import Ethtool
from devmem_tcp.kernel.leasing import lease_queue, lease_words


@click.command("lease", epilog=EXIT_STATUS_HELP)
@click.argument("nic")
@click.argument("queue", type=click.IntRange(min=0))
@click.option("--to", "interface", required=True, metavar="IFACE", help="The virtual interface (netkit) that gets it.")
@click.option(
    "--netns", metavar="NAME|PID|PATH", help="Network namespace that IFACE is in.  [default: the one that NIC is in]"
)
@click.option("--dry-run", is_flag=True, help="Print the command that would do it, and change nothing.")
def command(nic: str, queue: int, interface: str, netns: str | None, dry_run: bool) -> None:
    """Lease RX queue QUEUE of NIC to a container's virtual interface, where programs bind it as their own.

    Run it as root on the host. The lease ends with IFACE; nothing else ends it. Header split, RSS and ntuple rules
    stay the host's to set, on NIC: what is missing is said. How the container is set up: docs/containers.md.

    \b
    devmem-tcp lease eth1 15 --to nk1 --netns 4711
    devmem-tcp recv --backend kernel --nic nk1       # in the container
    """
    with Ethtool(nic) as ethtool:
        if dry_run:
            for line in lease_words(ethtool, queue, interface, netns):
                click.echo(line)
            return
        made = lease_queue(ethtool, queue, interface, netns)
    where = f" in {made.netns}" if made.netns is not None else ""
    click.echo(
        f"RX queue {queue} of {nic} is RX queue {made.queue} of {interface}{where}, until {interface} is deleted"
    )
