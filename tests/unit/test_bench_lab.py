"""The lab's benches: the one without a guest runs, and what the one with a guest makes of what it reads is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.append(str(BENCH))

import lab  # noqa: E402
from devmem_tcp.lab import control  # noqa: E402


def test_the_device_is_measured_without_a_guest(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, str(BENCH / "lab_device.py"), "--rounds", "1", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_bytes())
    by_name = {case["name"]: case for case in report["cases"]}
    assert {"frame 64, alone", "frame 1500, bursts", "superframe, cut to 1448, bursts"} <= by_name.keys()
    assert all(0 < case["us_least"] <= case["us"] <= case["us_most"] for case in report["cases"])
    assert by_name["superframe, cut to 1448, hot"]["us"] > by_name["superframe, whole, hot"]["us"]
    assert [limit["name"] for limit in report["limits"]] == ["frame 1500, bursts", "superframe, whole, bursts"]
    for limit in report["limits"]:
        assert limit["value"] == by_name[limit["name"]]["us"]
        assert limit["holds"] == (limit["value"] <= limit["bar"])


class Nics:
    """A process of two NICs whose counters go on by the same amount with each question."""

    def __init__(self) -> None:
        self.asked = 0

    def ask(self, command: control.Command) -> Any:
        assert command == control.GetStatistics()
        self.asked += 1
        nic = {
            "device": {"rx": {"0": {"packets": 10 * self.asked}, "1": {"packets": self.asked}}, "interrupts": 7},
            "wire": {"sent_packets": 5 * self.asked},
            "socket": {"messages": 3 * self.asked},
        }
        return {"nics": {"nic0": nic, "nic1": nic}, "cpu_s": 0.5 * self.asked}


def test_runs_are_what_grew_between_their_start_and_their_end() -> None:
    nics = Nics()
    watcher = lab.Watcher(nics.ask)
    watcher.feed(b'{"start": "one"}\n{"end": "one", "bytes": 250000000')
    assert nics.asked == 1
    watcher.feed(b', "wall_s": 2.0}\n{"start": "two"}\n')
    watcher.feed(b'{"end": "two", "bytes": 1, "wall_s": 1.0}\n')
    (run,), (_,) = watcher.runs["one"], watcher.runs["two"]
    assert (run.bytes, run.wall_s, run.nic_cpu_s) == (250_000_000, 2.0, 0.5)
    assert (run.sent, run.received, run.messages, run.interrupts) == (10, 22, 6, 0)
    assert run.gbit_per_s == 1.0
    row = lab.row("one", [run])
    assert (row.gbit_per_s, row.us_a_packet_sent) == (1.0, 50_000.0)
    assert row.us_a_packet_received == pytest.approx(500_000 / 22)
    assert row.bytes_a_packet == 25_000_000


def test_the_limit_is_held_against_the_cases_that_it_is_for() -> None:
    run = lab.Run(125_000_000, 1.0, 1.0, 0.5, 10, 10, 1, 1)
    slow = lab.Run(124_000_000, 1.0, 1.0, 0.5, 10, 10, 1, 1)
    rows = [lab.row(case.name, [slow if case.mtu == 9000 else run]) for case in lab.CASES]
    assert [(limit.name, limit.holds) for limit in lab.limits(rows)] == [("MTU 1500", True), ("MTU 9000", False)]
