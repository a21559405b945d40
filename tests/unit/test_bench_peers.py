"""The comparison with peers: all bytes are accounted for, and a peer that hangs, dies or cheats is found out."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
BENCH = HERE.parents[1] / "bench"
sys.path.append(str(BENCH))

from loopback import GIB, allowed_congestion, system_congestion  # noqa: E402
from misbehaving_peers import (  # noqa: E402
    BYTE,
    MESSAGES,
    Corrupting,
    Dying,
    Halving,
    Hanging,
    Leaving,
    LeavingOut,
    Missing,
    Raising,
    Waiting,
)
from peers import compare, registry, report, turn  # noqa: E402
from peers.control import Figures  # noqa: E402
from peers.plain import Plain  # noqa: E402
from peers.works import FEWEST_MESSAGES, Kind, Work, works  # noqa: E402

KIB = 1 << 10
LARGE = Work(Kind.THROUGHPUT, 3 << 20, 2)
TRIPS = Work(Kind.ROUND_TRIP, 4 * KIB, 16)
MANY = Work(Kind.CONNECTIONS, 4 * KIB, 4, connections=5)
ALL = [MESSAGES, LARGE, TRIPS, MANY]


@pytest.fixture(autouse=True)
def misbehaving_peers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def here(peer: type[Plain]) -> str:
    return f"{peer.__module__}:{peer.__name__}"


def run(reference: str, listed: list[Work], limit_s: float = 20.0) -> turn.Outcome:
    return turn.run(reference, listed, allowed_congestion(), limit_s, None)


@pytest.mark.parametrize("name", ["plain", "asyncio-streams", "asyncio-buffered", "c"])
def test_a_peer_does_every_kind_of_work(name: str) -> None:
    reason = registry.load(registry.PEERS[name]).available()
    if name == "c" and shutil.which("cc") is None:
        assert reason.startswith("no C compiler")
        return
    assert reason == ""
    outcome = run(registry.PEERS[name], ALL)
    assert outcome.failure == ""
    assert [done.work for done in outcome.runs] == ALL
    for done in outcome.runs:
        assert done.gb_per_s > 0
        assert len(done.driver.laps_us) == (TRIPS.messages if done.work == TRIPS else 0)
        for end in (done.server, done.driver):
            assert end.tcp_sockets == done.work.connections
            assert end.congestion_controls == [allowed_congestion().replace("-", system_congestion())]


@pytest.mark.parametrize("name", registry.PEERS)
def test_every_peer_says_whether_it_can_run_here(name: str) -> None:
    reason = registry.load(registry.PEERS[name]).available()
    assert reason == "" or " install " in reason


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        (Corrupting, f"WrongBytes: byte {BYTE} is "),
        (Leaving, "WrongBytes: byte 0 is "),
        (Halving, f"WrongBytes: a message has {MESSAGES.size_bytes // 2} bytes, not {MESSAGES.size_bytes}"),
    ],
)
def test_bytes_that_are_not_what_was_sent_are_seen(peer: type[Plain], words: str) -> None:
    outcome = run(here(peer), [MESSAGES])
    assert outcome.runs == []
    assert words in outcome.failure


def test_a_peer_that_leaves_a_part_out_has_failed() -> None:
    assert "the peer left out a part" in run(here(LeavingOut), [MESSAGES]).failure


def test_a_peer_that_hangs_is_cut_off_and_what_it_did_before_counts() -> None:
    outcome = run(here(Hanging), [MESSAGES, TRIPS], limit_s=1.0)
    assert [done.work for done in outcome.runs] == [MESSAGES]
    assert outcome.failure == "cut off: no result within 1 s: waiting for Godot"


def test_a_peer_that_dies_is_named_with_its_last_words() -> None:
    outcome = run(here(Dying), [MESSAGES])
    assert outcome.runs == []
    assert "drive was ended by signal 9: out of memory" in outcome.failure


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A named pipe that Waiting writes to."""
    path = tmp_path / "pids"
    os.mkfifo(path)
    monkeypatch.setenv("PIDS", str(path))
    with os.fdopen(os.open(path, os.O_RDWR), "r", encoding="ascii") as pipe:
        yield pipe


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_lives_on_when_the_comparison_is_ended(pids: Any, number: signal.Signals) -> None:
    call = f"turn.run({here(Waiting)!r}, [misbehaving_peers.MESSAGES], '-', 60.0, None)"
    code = f"import misbehaving_peers; from peers import turn; {call}"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as comparison:
        fds = [os.pidfd_open(int(pids.readline())) for _ in range(2)]
        comparison.send_signal(number)
        comparison.communicate()
    for fd in fds:
        assert select.select([fd], [], [], 10.0)[0], "a process of the peer is still there"
        os.close(fd)


def settings(listed: list[Work], rounds: int = 2) -> report.Settings:
    return report.Settings(
        rounds=rounds, seed=1, works=listed, congestion=allowed_congestion(), cpus=None, limit_s=20.0
    )


def test_a_work_that_failed_is_not_tried_again_and_the_others_are() -> None:
    turns = compare.Rounds({"raising": here(Raising)}, settings([LARGE, MESSAGES, TRIPS]))
    assert turns.run()
    assert [done.work for done in turns.runs["raising"]] == [LARGE, TRIPS, LARGE, TRIPS]
    assert turns.failures == {"raising": [report.Failure(MESSAGES, "drive: ValueError: 64 KiB is too much")]}


def test_ctrl_c_keeps_what_was_done_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    first = turn.Outcome([turn.Run(TRIPS, figures(1.0, 0.0), figures(1.0, 0.0, [5.0]))])
    turns_taken: Iterator[turn.Outcome] = iter([first])

    def one_turn(*_: Any) -> turn.Outcome:
        for outcome in turns_taken:
            return outcome
        raise KeyboardInterrupt

    monkeypatch.setattr(turn, "run", one_turn)
    turns = compare.Rounds({"plain": registry.PEERS["plain"]}, settings([TRIPS]))
    assert not turns.run()
    assert turns.runs == {"plain": first.runs}


def test_a_peer_that_is_not_installed_is_named_with_the_command() -> None:
    turns = compare.Rounds({"missing": here(Missing), "plain": registry.PEERS["plain"]}, settings([MESSAGES], rounds=1))
    turns.run()
    assert turns.not_measured == {"missing": "module no_such_module is missing: pip install no-such-package"}
    assert list(turns.runs) == ["plain"]


def test_a_peer_gets_no_more_connections_than_make_sense_with_it() -> None:
    gloo = registry.load(registry.PEERS["gloo"])
    assert gloo.most_connections < MANY.connections
    assert [work.connections for work in works(1 << 30) if work.kind is Kind.CONNECTIONS] == [1, 8, 64, 512]
    assert all(work.messages >= FEWEST_MESSAGES for work in works(1))


def figures(wall_s: float, cpu_s: float, laps_us: list[float] | None = None, sockets: int = 1) -> Figures:
    return Figures(wall_s, cpu_s, sockets, ["reno"], laps_us or [])


def test_rows_are_medians_over_the_rounds() -> None:
    gib = Work(Kind.THROUGHPUT, GIB // 4, 2)
    runs = [turn.Run(gib, figures(9.0, 0.5), figures(wall_s, 0.25)) for wall_s in (1.0, 8.0, 2.0)]
    runs += [
        turn.Run(TRIPS, figures(1.0, 0.0, sockets=0), figures(1.0, 0.0, laps)) for laps in ([5.0, 7.0, 99.0], [3.0])
    ]
    speed, trip = report.rows("plain", runs)
    half = GIB / 2 / 1e9
    assert (speed.gb_per_s, speed.gb_per_s_least, speed.gb_per_s_most) == (half / 2, half / 8, half)
    assert (speed.cpu_s_per_gib, speed.round_trip_us, speed.runs) == (1.5, None, 3)
    assert (trip.round_trip_us, trip.round_trip_us_least, trip.round_trip_us_most) == (5.0, 3.0, 7.0)
    assert trip.tcp_sockets == [0, 1]


def test_the_whole_comparison(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    options = ["--rounds", "2", "--total-mib", "1", "--largest-mib", "1", "--most-connections", "8"]
    command = [sys.executable, str(BENCH / "peers" / "compare.py"), *options, "--round-trips", "20"]
    done = subprocess.run(
        [*command, "--only", "plain,asyncio-streams", "--json", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plain" in done.stdout
    assert "failed" not in done.stdout
    found = json.loads(path.read_bytes())
    assert [row["work"]["connections"] for row in found["rows"] if row["peer"] == "plain"] == [1, 1, 1, 1, 1, 8]
    assert {row["peer"] for row in found["rows"]} == {"plain", "asyncio-streams"}
    assert all(row["runs"] == 2 for row in found["rows"])


def test_an_unknown_peer_is_refused_with_the_names_there_are() -> None:
    command = [sys.executable, str(BENCH / "peers" / "compare.py"), "--only", "plain,carrier-pigeon"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no peer carrier-pigeon; there are devmem-tcp, " in " ".join(done.stderr.split())
