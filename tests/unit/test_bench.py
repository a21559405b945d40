"""The speed measurement runs and says everything: a smoke test with sizes too small to measure anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

THROUGHPUT = Path(__file__).resolve().parents[2] / "bench" / "throughput.py"
TOTAL_MIB = 4
SMALL = [
    "--rounds",
    "1",
    "--total-mib",
    str(TOTAL_MIB),
    "--buffer-mib",
    "1",
    "--send-buffer-mib",
    "1",
    "--read-kib",
    "64",
]
NO_COMPILER = "no C compiler: the C limit is not measured"


def run_throughput(path: Path, **environment: str) -> dict[str, Any]:
    """Run the whole driver once, with one small round; returns what it wrote."""
    command = [sys.executable, str(THROUGHPUT), *SMALL, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_throughput(tmp_path_factory.mktemp("bench") / "report.json")


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["variants"]}


@pytest.mark.parametrize("name", ["recv_into", "recv_into-reused", "recv_into-both"])
def test_plain_variants_move_all_bytes_through_host_memory(report: dict[str, Any], name: str) -> None:
    row = by_name(report)[name]
    assert row["gb_per_s"] > 0
    assert (row["dmabuf_bytes"], row["linear_bytes"], row["host_bytes"]) == (0, 0, TOTAL_MIB << 20)


@pytest.mark.parametrize("name", ["software", "software-held", "software-both"])
def test_software_variants_move_all_bytes_into_the_bound_buffer(report: dict[str, Any], name: str) -> None:
    row = by_name(report)[name]
    assert row["backend"] == "software"
    assert row["gb_per_s"] > 0
    assert (row["dmabuf_bytes"], row["linear_bytes"], row["host_bytes"]) == (TOTAL_MIB << 20, 0, 0)
    assert 0 < row["reach_bytes"] <= 1 << 20


def test_c_is_measured_and_the_limits_are_held_against_it(report: dict[str, Any]) -> None:
    if shutil.which("cc") is None:
        pytest.skip(NO_COMPILER)
    assert by_name(report)["c"]["host_bytes"] == TOTAL_MIB << 20
    assert by_name(report)["c"]["speed_over_c"] == 1.0
    assert [limit["name"] for limit in report["limits"]] == [
        "software: speed over C, at least",
        "software-held: speed over C, at least",
        "software-both: CPU of both ends over C, at most",
        "software: speed over recv_into, at least",
    ]


def test_without_a_compiler_the_rest_is_measured_and_the_gap_is_named(tmp_path: Path) -> None:
    report = run_throughput(tmp_path / "report.json", PATH="")
    assert report["not_measured"] == {"c": NO_COMPILER}
    assert "c" not in by_name(report)
    assert [limit["name"] for limit in report["limits"]] == ["software: speed over recv_into, at least"]


def test_the_congestion_control_is_one_and_is_named(report: dict[str, Any]) -> None:
    for row in report["variants"]:
        assert row["congestion_control"].startswith(report["congestion"])
