"""The same work by each peer over loopback, in one interleaved run: throughput, round trips, CPU time, connections.

Every peer has one turn a round, in two fresh processes, and the order is shuffled each round; medians of one run are
what compares. README.md, in this folder, says how to read the figures and how to add a peer.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # bench, not bench/peers

import random

import click
import msgspec
from rich.console import Console

from loopback import MIB, SYSTEM, allowed_congestion, system_congestion
from pairs import cpus_apart
from peers import registry, report, turn
from peers.works import ROUND_TRIPS, Kind, Work, works

GIVE_UP: int = 2
"""A peer that failed at so many works is not run again: each of them may have cost the whole time limit."""


class Rounds:
    """Who can run, what each has done so far, and at what it failed."""

    def __init__(self, references: dict[str, str], settings: report.Settings) -> None:
        self._settings = settings
        self._references: dict[str, str] = {}
        self._works: dict[str, list[Work]] = {}
        self.not_measured: dict[str, str] = {}
        self.runs: dict[str, list[turn.Run]] = {}
        self.failures: dict[str, list[report.Failure]] = {}
        for name, reference in references.items():
            peer = registry.load(reference)
            reason = peer.available()
            if reason:
                self.not_measured[name] = reason
                continue
            self._references[name] = reference
            self._works[name] = [work for work in settings.works if work.connections <= peer.most_connections]
            self.runs[name] = []
            self.failures[name] = []

    def run(self) -> bool:
        """Run all rounds; returns whether that went to its end. Ctrl-C ends the turn under way, and the run."""
        try:
            self._run()
        except KeyboardInterrupt:
            return False
        return True

    def _run(self) -> None:
        shuffled = random.Random(self._settings.seed)
        names = list(self._references)
        with click.progressbar(length=self._settings.rounds * len(names), label="measuring", file=sys.stderr) as bar:
            for _ in range(self._settings.rounds):
                for name in shuffled.sample(names, len(names)):
                    self._turn(name)
                    bar.update(1)

    def _turn(self, name: str) -> None:
        """Let a peer do its works; one at which it fails is not tried again, and the next ones get new processes."""
        left = list(self._works[name])
        while left and len(self.failures[name]) < GIVE_UP:
            settings = self._settings
            outcome = turn.run(self._references[name], left, settings.congestion, settings.limit_s, settings.cpus)
            self.runs[name].extend(outcome.runs)
            left = left[len(outcome.runs) :]
            if outcome.failure:
                self.failures[name].append(report.Failure(left[0], outcome.failure))
                self._works[name].remove(left.pop(0))


def references(only: str) -> dict[str, str]:
    """Return the peers to run, all or those named. Raises click.BadParameter for a name that there is not."""
    if not only:
        return dict(registry.PEERS)
    names = only.split(",")
    unknown = sorted(set(names) - registry.PEERS.keys())
    if unknown:
        raise click.BadParameter(f"no peer {', '.join(unknown)}; there are {', '.join(registry.PEERS)}")
    return {name: registry.PEERS[name] for name in names}


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--only", default="", metavar="NAME,…", help=f"Of {', '.join(registry.PEERS)}.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order of peers in each round.")
@click.option("--total-mib", type=click.IntRange(1), default=512, show_default=True, help="Moved in each work, about.")
@click.option(
    "--largest-mib", type=click.IntRange(1), default=256, show_default=True, help="Leave out larger messages."
)
@click.option("--most-connections", type=click.IntRange(0), default=512, show_default=True, help="Leave out more.")
@click.option("--round-trips", type=click.IntRange(1), default=ROUND_TRIPS, show_default=True)
@click.option("--limit-s", type=click.FloatRange(1), default=60.0, show_default=True, help="For one work of one peer.")
@click.option(
    "--congestion", default="auto", show_default=True, help="auto: cubic or reno where allowed; -: the system's."
)
@click.option(
    "--placement",
    type=click.Choice(["apart", "free"]),
    default="free",
    show_default=True,
    help="apart: server and driver on a CPU each, all threads of a library's too; free: where the scheduler puts them.",
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure there.")
def main(
    rounds: int,
    only: str,
    seed: int,
    total_mib: int,
    largest_mib: int,
    most_connections: int,
    round_trips: int,
    limit_s: float,
    congestion: str,
    placement: str,
    json_path: Path | None,
) -> None:
    listed = [
        work
        for work in works(total_mib * MIB, round_trips)
        if work.size_bytes <= largest_mib * MIB
        and (work.kind is not Kind.CONNECTIONS or work.connections <= most_connections)
    ]
    settings = report.Settings(
        rounds=rounds,
        seed=seed,
        works=listed,
        congestion=allowed_congestion() if congestion == "auto" else congestion,
        cpus=cpus_apart() if placement == "apart" else None,
        limit_s=limit_s,
    )
    machine = report.machine()
    turns = Rounds(references(only), settings)
    complete = turns.run()
    found = report.Report(
        settings=settings,
        complete=complete,
        machine=machine,
        congestion=system_congestion() if settings.congestion == SYSTEM else settings.congestion,
        system_congestion=system_congestion(),
        rows=[row for name, runs in turns.runs.items() for row in report.rows(name, runs)],
        failures=turns.failures,
        not_measured=turns.not_measured,
    )
    report.show(found, Console())
    if json_path is not None:
        json_path.write_bytes(msgspec.json.encode(found))
    if not complete:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
