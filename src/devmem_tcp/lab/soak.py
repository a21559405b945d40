"""A soak inside a guest: change the NICs and their driver in every way below, over and over, while traffic runs.

Run by ``python -m devmem_tcp.lab.soak`` in a guest of ``devmem-tcp lab run``, which gives two NICs in two network
namespaces and says in LOCAL_V4, REMOTE_V4, LOCAL_V6, REMOTE_V6 where they are. After each step every flow
must go on; TCP connections live through everything, and carry all that was sent when they are ended, which is when the
driver has been reloaded. At the end the kernel's log must hold no complaint. Exit status 1 at the first thing wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from devmem_tcp.lab.soak_traffic import LIMIT_S, TCP_PORT, UDP_PORT, Load, Place, SoakFailed, inside
from devmem_tcp.lab.vm.console import Console

PEER_NAMESPACE: Final = "peer"
MTUS: Final = (1500, 9000)
QUEUES: Final = 4
_RING_SIZES: Final = (512, 1024, 2048, 4096)
_FEATURES: Final = ("tso", "gro", "rx-gro-hw", "rx", "tx", "sg", "rxhash", "ntuple")
_KEY_BYTES: Final = 40
_FLOWS: Final = (("tcp4", TCP_PORT), ("tcp6", TCP_PORT), ("udp4", UDP_PORT), ("udp6", UDP_PORT))
_DRIVER: Final = Path("/sys/bus/pci/drivers/gve")
_BUS: Final = re.compile(r"^bus-info: (\S+)$", re.MULTILINE)
_LINK: Final = re.compile(r"^\d+: (eth\d+)[@:].* link/ether (\S+)", re.MULTILINE)
_RULE: Final = re.compile(r"Added rule with ID (\d+)")
_LINK_DOWN: Final = "Device link is down"
_RESET: Final = "Performing reset"
_RESET_STEP: Final = "ethtool --reset"
_AGAIN: Final = "a step again, after a reset"


class CommandFailed(SoakFailed):
    """A command has another exit status than 0."""


def command(*words: str, said: str = "") -> str:
    """Run a command with ``said`` as its input, and return its output; raises CommandFailed with what it answered."""
    done = subprocess.run(words, input=said, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise CommandFailed(f"{' '.join(words)}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class KernelLog:
    """What the kernel has logged since boot."""

    def __init__(self) -> None:
        self._fd: Final = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._lines: Final[list[str]] = []

    def read(self) -> list[str]:
        """Return all of it so far, a line a record."""
        while True:
            try:
                self._lines.append(os.read(self._fd, 1 << 13).decode("utf-8", "replace"))
            except BlockingIOError:
                return self._lines
            except BrokenPipeError:  # records were overwritten before they were read
                self._lines.append("(lost)")

    def resets(self) -> int:
        """Count the resets of NICs."""
        return sum(_RESET in line for line in self.read())


@dataclass
class Nic:
    """One NIC of the guest: where it belongs, and what it has been set to."""

    place: Place
    name: str
    mac: str
    bus: str
    queues: int = QUEUES

    @classmethod
    def find(cls, place: Place) -> Nic:
        """Return the one NIC of a namespace; raises SoakFailed."""
        with inside(place.namespace):
            found = _LINK.findall(command("ip", "-o", "link"))
            if len(found) != 1:
                raise SoakFailed(f"one NIC is needed in namespace {place.namespace or 'of the guest'!r}, not {found}")
            name, mac = found[0]
            bus = _BUS.search(command("ethtool", "-i", name))
        if bus is None:
            raise SoakFailed(f"{name} is on no bus")
        return cls(place, name, mac, bus[1])

    def ethtool(self, option: str, *words: str) -> str:
        """Run ethtool on it; raises CommandFailed."""
        with inside(self.place.namespace):
            return command("ethtool", option, self.name, *words)

    def up(self, mtu: int) -> None:
        """Bring it up with its addresses: IPv6 loses them when an interface goes down."""
        with inside(self.place.namespace):
            lines = (
                f"link set {self.name} mtu {mtu} up",
                f"addr replace {self.place.ipv4}/24 dev {self.name}",
                f"addr replace {self.place.ipv6}/64 dev {self.name} nodad",
            )
            command("ip", "-batch", "-", said="\n".join(lines))

    def down(self) -> None:
        with inside(self.place.namespace):
            command("ip", "link", "set", self.name, "down")

    def bring_home(self) -> None:
        """Give it back its namespace and name, once the driver has made its interface anew in the guest's own."""
        found = {mac: name for name, mac in _LINK.findall(command("ip", "-o", "link"))}
        if self.mac not in found:
            raise SoakFailed(f"the driver did not come back to {self.bus}")
        if self.place.namespace:
            command("ip", "link", "set", found[self.mac], "netns", self.place.namespace, "name", self.name)
        elif found[self.mac] != self.name:
            command("ip", "link", "set", found[self.mac], "name", self.name)
        self.queues = QUEUES


@dataclass
class Soak:
    """The NICs, the load between them, and the steps: each a method that changes something of one NIC, or of both."""

    near: Nic
    far: Nic
    load: Load
    chance: random.Random
    log: KernelLog
    mtu: int = MTUS[0]
    done: Counter[str] = field(default_factory=Counter)

    def channels(self, nic: Nic) -> None:
        nic.ethtool("-X", "default")  # else ethtool refuses fewer queues than the table names
        nic.queues = self.chance.randint(1, QUEUES)
        nic.ethtool("-L", "rx", str(nic.queues), "tx", str(self.chance.randint(1, QUEUES)))

    def ring_sizes(self, nic: Nic) -> None:
        nic.ethtool("-G", "rx", str(self.chance.choice(_RING_SIZES)), "tx", str(self.chance.choice(_RING_SIZES)))

    def header_split(self, nic: Nic) -> None:
        for state in ("on", "off"):
            nic.ethtool("-G", "tcp-data-split", state)
            self.load.wait_until_moving(f"ethtool -G {nic.name} tcp-data-split {state}")

    def features(self, nic: Nic) -> None:
        feature = self.chance.choice(_FEATURES)
        nic.ethtool("-K", feature, "off")
        self.load.wait_until_moving(f"ethtool -K {nic.name} {feature} off")
        nic.ethtool("-K", feature, "on")

    def rss(self, nic: Nic) -> None:
        nic.ethtool("-X", "equal", str(self.chance.randint(1, nic.queues)))
        self.load.wait_until_moving(f"ethtool -X {nic.name} equal")
        nic.ethtool("-X", "hkey", self.chance.randbytes(_KEY_BYTES).hex(":"))
        self.load.wait_until_moving(f"ethtool -X {nic.name} hkey")
        nic.ethtool("-X", "default")

    def rules(self, nic: Nic) -> None:
        nic.ethtool("-K", "ntuple", "on")
        added = []
        for flow, port in _FLOWS:
            end = "src-port" if nic is self.near and port == TCP_PORT else "dst-port"  # it is the far end that listens
            queue = str(self.chance.randrange(nic.queues))
            added += _RULE.findall(nic.ethtool("-N", "flow-type", flow, end, str(port), "action", queue))
        self.load.wait_until_moving(f"ethtool -N {nic.name}")
        for rule in added:
            nic.ethtool("-N", "delete", rule)

    def look(self, nic: Nic) -> None:
        for option in ("-S", "-x", "-k", "-g", "-l", "-n"):
            nic.ethtool(option)

    def link(self, nic: Nic) -> None:
        nic.down()
        nic.up(self.mtu)

    def change_mtu(self, nic: Nic) -> None:
        """Change it at both ends: one after the other, so that for a moment they differ."""
        self.mtu = next(mtu for mtu in MTUS if mtu != self.mtu)
        for one in (nic, self.other(nic)):
            one.up(self.mtu)

    def reset(self, nic: Nic) -> None:
        nic.ethtool("--reset", "all")

    def rebind(self, nic: Nic) -> None:
        """Take the driver from one NIC and give it back."""
        for what in ("unbind", "bind"):
            (_DRIVER / what).write_text(nic.bus, encoding="ascii")
        nic.bring_home()
        nic.up(self.mtu)
        self.load.connect()

    def reload(self, nic: Nic) -> None:
        """Unload the driver, and load it again."""
        command("modprobe", "-r", "gve")
        command("modprobe", "gve")
        for one in (self.far, self.near):  # so the far one's name is free when the near one wants its own
            one.bring_home()
            one.up(self.mtu)
        self.load.connect()

    def other(self, nic: Nic) -> Nic:
        return self.far if nic is self.near else self.near

    def run(self, seconds: float) -> None:
        """Take the steps, in rounds of all in any order, until the time is over; the first round is always taken whole.

        Raises:
            SoakFailed: anything is not as it must be.
            OSError: no new connection, no namespace.
        """
        deadline = time.monotonic() + seconds
        for name in self._order():
            if time.monotonic() >= deadline and all(self.done[each] for each in STEPS):
                return
            nic = self.chance.choice((self.near, self.far))
            self._take(name, STEPS[name], nic)
            self.load.wait_until_moving(f"{name} of {nic.name}")
            self.done[name] += 1

    def _order(self) -> Iterator[str]:
        while True:
            yield from self.chance.sample(sorted(STEPS), len(STEPS))

    def _take(self, name: str, step: Callable[[Soak, Nic], None], nic: Nic) -> None:
        """Take a step, again if a reset came in between: gve forgets flow rules then, and refuses a change."""
        resets = self.log.resets()
        try:
            step(self, nic)
        except CommandFailed:
            if self.log.resets() == resets:
                raise
            self.done[_AGAIN] += 1
            step(self, nic)


STEPS: Final[dict[str, Callable[[Soak, Nic], None]]] = {
    "ethtool -L (channels)": Soak.channels,
    "ethtool -G (ring sizes)": Soak.ring_sizes,
    "ethtool -G (header split on, off)": Soak.header_split,
    "ethtool -K (a feature off, on)": Soak.features,
    "ethtool -X (equal, key, default)": Soak.rss,
    "ethtool -N (4 rules, deleted)": Soak.rules,
    "ethtool -S -x -k -g -l -n": Soak.look,
    _RESET_STEP: Soak.reset,
    "ip link down, up": Soak.link,
    "MTU of both ends": Soak.change_mtu,
    "driver unbound, bound": Soak.rebind,
    "driver unloaded, loaded": Soak.reload,
}


def complaints(lines: list[str]) -> list[str]:
    """Return the lines in which the kernel reports a fault of its own."""
    console = Console("")
    console.feed("\n".join(lines).encode() + b"\n")
    return console.trouble


def prods(soak: Soak) -> dict[str, int]:
    """Count what the kernel's log tells of and the soak did not do."""
    downs = sum(_LINK_DOWN in line for line in soak.log.read())
    return {"link down, from outside": downs, "reset, from outside": soak.log.resets() - soak.done[_RESET_STEP]}


def table(soak: Soak) -> str:
    """Write what was done, and what was moved meanwhile."""
    rows = [f"{name:<36} {soak.done[name]:>14,}" for name in (*STEPS, _AGAIN)]
    rows += [f"{name:<36} {count:>14,}" for name, count in prods(soak).items()]
    rows += ["", f"{'':<36} {'bytes sent':>14} {'received':>14}"]
    rows += [f"{flow.name:<36} {flow.sent:>14,} {flow.received:>14,}" for flow in soak.load.flows]
    rows += ["", f"{'':<36} {'sent':>14} {'lost':>14} {'processes':>14}"]
    rows += [
        f"{one.name:<36} {one.sent:>14,} {one.sent - one.received:>14,} {one.processes:>14,}" for one in soak.load.pings
    ]
    return "\n".join(rows)


def soak(seconds: float, seed: int, *, prodded: bool) -> None:
    """Do all of it, and print the table.

    Args:
        prodded: somebody outside pulls cables and asks for resets; that nothing of it is seen is a failure.

    Raises:
        SoakFailed: anything is not as it must be.
        OSError: no connection.
    """
    told = os.environ
    near = Nic.find(Place(namespace="", ipv4=told["LOCAL_V4"], ipv6=told["LOCAL_V6"]))
    far = Nic.find(Place(namespace=PEER_NAMESPACE, ipv4=told["REMOTE_V4"], ipv6=told["REMOTE_V6"]))
    running = Soak(near, far, Load(near.place, far.place), random.Random(seed), KernelLog())
    started = time.monotonic()
    running.load.start()
    try:
        running.run(seconds)
        running.load.finish()
    finally:
        print(table(running), flush=True)
    if found := complaints(running.log.read()):
        raise SoakFailed(f"the kernel reported: {found[0]}")
    if prodded and not all(prods(running).values()):
        raise SoakFailed(f"too little came from outside: {prods(running)}")
    steps, connections = sum(running.done[name] for name in STEPS), running.load.connections
    print(f"\n{time.monotonic() - started:.0f} s, seed {seed}: {steps} steps, {connections} TCP connections, all right")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m devmem_tcp.lab.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--seed", type=int, default=1, help="of the steps' order and values")
    parser.add_argument("--prodded", action="store_true", help="somebody outside changes links and asks for resets")
    chosen: Any = parser.parse_args(arguments)
    try:
        soak(chosen.seconds, chosen.seed, prodded=chosen.prodded)
    except (SoakFailed, OSError, subprocess.SubprocessError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
