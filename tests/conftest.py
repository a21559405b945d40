"""What holds for every test: it leaves nothing behind, and is skipped only if ``expected_skips.txt`` says so."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from devmem_tcp.testing.leaks import leak_check

EXPECTED_SKIPS = Path(__file__).with_name("expected_skips.txt")

settings.register_profile("local", deadline=None, max_examples=100, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if "CI" in os.environ else "local")


def pytest_collection_finish() -> None:
    """Hide what imports and collection made from the garbage collector, which every leak check runs twice."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail the test that leaves something behind; starts before the other fixtures and ends after them."""
    with leak_check():
        yield


def read_expected_skips(path: Path) -> dict[str, str]:
    """Read ``nodeid: reason`` lines; a node id stands for all tests below it, and for all its parameter sets."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition(": ") for line in lines if line and not line.startswith("#"))
    return {nodeid: reason.strip() for nodeid, _, reason in pairs}


class SkipJudge:
    """Collects every skip and expected failure; one that is not listed, with this very reason, fails the session."""

    def __init__(self, expected: dict[str, str]) -> None:
        self._expected = expected
        self.expected_skips: list[str] = []
        self.unexpected_skips: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._judge(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._judge(report)

    def _judge(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped:
            return
        reason = self._reason(report)
        listed = any(
            reason == why and (report.nodeid == nodeid or report.nodeid.startswith((f"{nodeid}::", f"{nodeid}[")))
            for nodeid, why in self._expected.items()
        )
        (self.expected_skips if listed else self.unexpected_skips).append(f"{report.nodeid}: {reason}")

    @staticmethod
    def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
        if hasattr(report, "wasxfail"):
            return f"xfail: {report.wasxfail}"
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return text.removeprefix("Skipped: ")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexpected_skips and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        self._section(terminalreporter, "expected skips", self.expected_skips)
        self._section(terminalreporter, f"SKIPS NOT LISTED IN {EXPECTED_SKIPS.name}", self.unexpected_skips)

    @staticmethod
    def _section(reporter: pytest.TerminalReporter, title: str, lines: list[str]) -> None:
        if lines:
            reporter.section(title)
            for line in lines:
                reporter.line(line)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipJudge(read_expected_skips(EXPECTED_SKIPS)), "skip-judge")
