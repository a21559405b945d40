"""What drives the fuzzers: choices off bytes, sessions that count and judge, engines that repeat and shrink."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fuzz_engines
from choices import INPUT_BYTES, Choices, blocks
from fuzz import TARGETS, Report
from fuzz_engines import Hang, Session, run_hypothesis, run_random, time_limit

PROGRAM = Path(__file__).with_name("fuzz.py")


@given(block=st.binary(max_size=20), low=st.integers(-(1 << 64), 1 << 64), span=st.integers(0, 1 << 64))
def test_choices_are_in_range_and_repeat(block: bytes, low: int, span: int) -> None:
    made = []
    for _ in range(2):
        choices = Choices()
        choices.refill(block)
        made.append([choices.integer(low, low + span) for _ in range(4)])
    assert made[0] == made[1]
    assert all(low <= number <= low + span for number in made[0])


def test_every_option_can_be_chosen() -> None:
    chosen = set()
    for byte in range(256):
        choices = Choices()
        choices.refill(bytes([byte]))
        chosen.add(choices.one_of("abc"))
    assert chosen == {"a", "b", "c"}


def test_behind_the_end_the_first_is_chosen() -> None:
    choices = Choices()
    choices.refill(b"\xff")
    assert (choices.data(3), choices.integer(5, 300), choices.one_of("abc")) == (b"\xff\0\0", 5, "a")
    assert not choices.once_in(2)


def test_a_case_is_cut_into_the_blocks_of_its_inputs() -> None:
    case = bytes(range(2 * INPUT_BYTES + 1))
    assert b"".join(blocks(case)) == case
    assert [len(block) for block in blocks(case)] == [INPUT_BYTES, INPUT_BYTES, 1]


def count_blocks(case: bytes, tally: Counter[str]) -> None:
    tally["inputs"] += len(blocks(case))


def test_random_cases_are_those_of_the_seed() -> None:
    seen: list[list[bytes]] = []
    for seed in (1, 1, 2):
        cases: list[bytes] = []

        def run(case: bytes, tally: Counter[str], cases: list[bytes] = cases) -> None:
            cases.append(case)
            count_blocks(case, tally)

        session = Session(run, 5000)
        run_random(session, seed)
        assert session.done
        assert session.failing is None
        seen.append(cases)
    assert seen[0] == seen[1] != seen[2]


def test_hypothesis_makes_a_failing_case_simple() -> None:
    def run(case: bytes, tally: Counter[str]) -> None:
        count_blocks(case, tally)
        assert all(block[:1] < b"\x80" for block in blocks(case))

    session = Session(run, 5000)
    with pytest.raises(AssertionError):
        run_hypothesis(session, seed=0)
    assert session.failing == b"\x80" + bytes(INPUT_BYTES - 1)
    assert 0 < session.failed_at <= session.tally["inputs"]


def test_hypothesis_goes_on_until_there_were_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_engines, "_EXAMPLES", 10)
    session = Session(count_blocks, 3000)
    run_hypothesis(session, seed=0)
    assert 3000 <= session.tally["inputs"] < 4000


def test_a_case_that_does_not_end_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(case: bytes, tally: Counter[str]) -> None:
        while True:
            try:
                tally["turns"] += 1
            except Exception:  # as a server that survives everything
                tally["caught"] += 1

    monkeypatch.setattr(fuzz_engines, "HANG_S", 0.05)
    session = Session(run, 1)
    with pytest.raises(Hang):
        session.throw(b"case")
    assert session.failing == b"case"


def test_the_time_limit_ends_with_its_block() -> None:
    with time_limit(60.0):
        assert signal.getitimer(signal.ITIMER_PROF)[0] > 0
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0
    assert signal.getsignal(signal.SIGPROF) == signal.SIG_DFL


def test_a_process_that_grows_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(fuzz_engines, "GROWTH_BYTES", 16 << 20)
    session = Session(lambda case, tally: kept.append(b"\1" * (4 << 20)), 1)
    with pytest.raises(AssertionError, match="not given back"):
        run_random(session, seed=0)
    assert len(kept) < 10


def test_a_case_that_fails_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(case: bytes, tally: Counter[str]) -> None:
        raise ZeroDivisionError("planted")

    report = Report("gvnic", 1, tmp_path / "out")
    session = Session(run, 1, report.update)
    with pytest.raises(ZeroDivisionError) as failure:
        session.throw(b"case")
    report.finish(session, failure.value)
    (path,) = (tmp_path / "out").iterdir()
    assert path.read_bytes() == b"case"
    assert f"--replay {path}" in capsys.readouterr().out


@pytest.mark.parametrize("target", TARGETS)
def test_the_command_fuzzes_and_replays(target: str, tmp_path: Path) -> None:
    case = tmp_path / "saved.case"
    case.write_bytes(bytes(range(256)))
    for arguments, inputs in ((["--count", "300"], 300), (["--replay", str(case)], 7)):
        command = [sys.executable, str(PROGRAM), target, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "nothing failed" in done.stdout
        thrown = int(done.stdout.split(f"\n{target}: ")[1].split()[0].replace(",", ""))
        assert inputs <= thrown < inputs + 2000
