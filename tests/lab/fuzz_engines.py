"""What drives the fuzzers: seeded random bytes, Hypothesis, or atheris, which looks for new coverage.

All three make cases, strings of bytes, and give them to a Session, which runs them, counts, watches over time and
memory, and keeps the case that failed.
"""

from __future__ import annotations

import importlib
import io
import os
import random
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Final, TypeAlias

import hypothesis
from hypothesis import strategies as st

from choices import INPUT_BYTES

Run: TypeAlias = Callable[[bytes, Counter[str]], None]
"""Runs one case and adds to the tally; raises what the judgement says."""

CASE_BYTES: Final = 4096  # of a case that is to be understood, or mutated
RANDOM_CASE_BYTES: Final = (256, CASE_BYTES, 1 << 15)  # short ones start often, long ones pile up state
HANG_S: Final = 20.0  # of processor time; no case takes a tenth of it
GROWTH_BYTES: Final = 256 << 20  # of this process, over all cases; what a run of each engine needs is far less
_EXAMPLES: Final = 1000  # of a round of Hypothesis, which remembers all of them
_SEEDS: Final = 64  # cases that atheris starts with


class Hang(BaseException):
    """A case did not end. No ``Exception``, which a server survives."""


class Session:
    """One run of a fuzzer, until so many inputs were thrown.

    Args:
        run: the fuzzer.
        inputs: how many to throw, at least.
        progress: is told of the inputs so far after each case.
    """

    def __init__(self, run: Run, inputs: int, progress: Callable[[int], None] = lambda inputs: None) -> None:
        self.tally: Counter[str] = Counter()
        self.failing: bytes | None = None  #: the case that failed last
        self.failed_at = 0  #: so many inputs had been thrown when one failed first
        self.coverage = ""  #: what the engine says of it
        self._run = run
        self._inputs = inputs
        self._progress = progress
        self._first_bytes = resident_bytes()

    @property
    def done(self) -> bool:
        """Whether enough inputs were thrown."""
        return self.tally["inputs"] >= self._inputs

    def throw(self, case: bytes) -> None:
        """Run one case.

        Raises:
            Hang: it did not end in time.
            AssertionError: the judgement, or this process grows; or whatever escaped from the subject.
        """
        try:
            with time_limit(HANG_S):
                self._run(case, self.tally)
            if self.failing is None:  # what a failure held may stay: a traceback holds it
                grown = resident_bytes() - self._first_bytes
                assert grown < GROWTH_BYTES, f"{grown >> 20} MiB of memory are not given back"
        except BaseException:
            if self.failing is None:
                self.failed_at = self.tally["inputs"]
            self.failing = case
            raise
        self._progress(self.tally["inputs"])


def resident_bytes() -> int:
    """Return how much memory this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang in here after so many seconds of processor time: a loaded machine is no hang.

    SIGALRM stays with libFuzzer and with the time limit of a test, which watch the clock.
    """

    def hang(number: int, frame: object) -> None:
        raise Hang(f"a case took more than {seconds:g} s")

    handler = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def cases() -> st.SearchStrategy[bytes]:
    """Return the strategy for cases: some short, most long enough to get somewhere, each made of blocks that can go."""
    block = st.binary(min_size=INPUT_BYTES, max_size=INPUT_BYTES)
    lengths = (st.lists(block), st.lists(block, min_size=25), st.lists(block, min_size=60))
    return st.one_of(lengths).map(b"".join)


def run_random(session: Session, seed: int) -> None:
    """Throw random cases, the same for the same seed."""
    source = random.Random(seed)
    while not session.done:
        session.throw(source.randbytes(source.choice(RANDOM_CASE_BYTES)))


def run_hypothesis(session: Session, seed: int) -> None:
    """Throw cases that Hypothesis makes; one that fails is made as simple as it can be."""

    def throw(case: bytes) -> None:
        if not session.done or session.failing is not None:
            session.throw(case)

    settings = hypothesis.settings(
        max_examples=_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=False,
        verbosity=hypothesis.Verbosity.quiet,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    while not session.done:
        hypothesis.seed(seed)(settings(hypothesis.given(cases())(throw)))()
        seed += 1


def run_atheris(session: Session, seed: int, out: Path, finish: Callable[[BaseException | None], None]) -> None:
    """Throw cases that atheris makes of those that reached something new.

    The modules to be covered were imported within ``instrumented``. libFuzzer ends the process, so this never returns:
    it calls ``finish``, with the failure if there is one, and exits. What libFuzzer says goes to a log in ``out``, and
    if it is the first to notice something, as a crash of the interpreter, the case goes there too.
    """
    atheris = importlib.import_module("atheris")
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
    source = random.Random(seed)
    for number in range(_SEEDS):
        (directory / f"{number}").write_bytes(source.randbytes(source.randrange(16, CASE_BYTES)))
    out.mkdir(parents=True, exist_ok=True)
    log = out / "libfuzzer.log"
    error_output = os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)

    def end(failure: BaseException | None) -> None:
        os.dup2(error_output, 2)
        found = re.findall(rb"cov: (\d+) ft: (\d+) corp: (\d+)", log.read_bytes())
        session.coverage = "{} edges, {} features, {} cases kept".format(*map(int, found[-1])) if found else ""
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
        finish(failure)
        sys.stdout.flush()
        os._exit(failure is not None)

    def throw(case: bytes) -> None:
        try:
            session.throw(case)
        except BaseException as failure:
            end(failure)
        if session.done:
            end(None)

    flags = ("-len_control=0", "-timeout=300", "-rss_limit_mb=0", f"-max_len={CASE_BYTES}", f"-artifact_prefix={out}/")
    atheris.Setup([sys.argv[0], f"-seed={seed + 1}", *flags, str(directory)], throw)
    atheris.Fuzz()


@contextmanager
def instrumented(package: str) -> Iterator[None]:
    """Measure the coverage of what is imported of ``package`` in here, be it for the second time.

    Raises:
        ModuleNotFoundError: atheris is not installed.
    """
    atheris = importlib.import_module("atheris")
    importlib.import_module("devmem_tcp")  # before, or it is measured too, being around the package
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
    with (
        redirect_stderr(io.StringIO()),  # which has a line for each module
        atheris.instrument_imports(include=[package], enable_loader_override=False),
    ):
        yield
