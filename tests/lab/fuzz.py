"""Fuzz what trusts nobody, for long: ``python tests/lab/fuzz.py {vfio,gvnic,handshake,session} --count 1000000``.

``vfio`` is the lab's vfio-user server, ``gvnic`` the device behind it; ``handshake`` is the start of a session, and
``session`` what follows. Each counts as inputs what its module says.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fuzz_engines import Run, Session, instrumented, run_atheris, run_hypothesis, run_random

TARGETS: Final = {  # what of the package each is about
    "vfio": "devmem_tcp.lab",
    "gvnic": "devmem_tcp.lab",
    "handshake": "devmem_tcp.sansio",
    "session": "devmem_tcp.sansio",
}
_OTHER_FUZZERS: Final = Path(__file__).resolve().parents[1] / "session_fuzz"
ENGINES: Final = ("random", "hypothesis", "atheris")
_REDRAW_S: Final = 0.25


class Report:
    """What the terminal shows of a session: a bar, then what happened, and where a failing case is.

    Args:
        target: what is fuzzed.
        inputs: how many inputs there will be.
        out: where to save a case that fails.
    """

    def __init__(self, target: str, inputs: int, out: Path) -> None:
        self._target = target
        self._out = out
        self._console = Console()
        columns = (TextColumn(target), BarColumn(), MofNCompleteColumn(), TextColumn("inputs"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, auto_refresh=False)
        self._task = self._bar.add_task(target, total=inputs)
        self._bar.start()
        self._began_s = self._drawn_s = time.monotonic()

    def update(self, inputs: int) -> None:
        """Move the bar, not too often."""
        now_s = time.monotonic()
        if now_s - self._drawn_s > _REDRAW_S:
            self._drawn_s = now_s
            self._bar.update(self._task, completed=inputs, refresh=True)

    def finish(self, session: Session, failure: BaseException | None) -> None:
        """Say what happened; save the case that failed."""
        seconds = time.monotonic() - self._began_s
        self._bar.update(self._task, completed=session.tally["inputs"], refresh=True)
        self._bar.stop()
        inputs = session.tally["inputs"]
        print(f"{self._target}: {inputs:,} inputs in {seconds:.1f} s, {inputs / seconds:,.0f} a second")
        if session.coverage:
            print(f"  coverage: {session.coverage}")
        for name, count in session.tally.items():
            if name != "inputs":
                print(f"  {name}: {count:,}")
        if failure is None:
            print("  nothing failed")
            return
        traceback.print_exception(failure)
        if session.failing is not None:
            self._out.mkdir(parents=True, exist_ok=True)
            path = self._out / f"{self._target}-{hashlib.sha256(session.failing).hexdigest()[:12]}.case"
            path.write_bytes(session.failing)
            print(f"FAILED within {session.failed_at:,} inputs. Again:")
            print(f"python tests/lab/fuzz.py {self._target} --replay {path}")


@click.command()
@click.argument("target", type=click.Choice(tuple(TARGETS)))
@click.option(
    "--count", default=1_000_000, show_default=True, type=click.IntRange(1), help="Inputs to throw, at least."
)
@click.option("--engine", default="random", show_default=True, type=click.Choice(ENGINES), help="Who makes the cases.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of everything random.")
@click.option("--out", default="build/fuzz", show_default=True, type=click.Path(path_type=Path), help="For what fails.")
@click.option("--replay", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Run this case alone.")
def main(target: str, count: int, engine: str, seed: int, out: Path, replay: Path | None) -> None:
    """Fuzz the lab's vfio-user server or gVNIC, or the session protocol; exit with 1 if it fails."""
    logging.disable(logging.WARNING)  # a guest's mistakes are what this is about; faults are still shown
    sys.path.append(str(_OTHER_FUZZERS))
    covered = engine == "atheris" and replay is None
    try:
        with instrumented(TARGETS[target]) if covered else nullcontext():
            run: Run = importlib.import_module(f"{target}_fuzzer").run
    except ModuleNotFoundError as missing:
        if missing.name != "atheris":
            raise
        raise click.ClickException("atheris is not installed: pip install -e '.[fuzz]'") from None
    report = Report(target, count if replay is None else 0, out)
    session = Session(run, count, report.update)
    failure: BaseException | None = None
    try:
        if replay is not None:
            session.throw(replay.read_bytes())
        elif engine == "random":
            run_random(session, seed)
        elif engine == "hypothesis":
            run_hypothesis(session, seed)
        else:
            run_atheris(session, seed, out, lambda failed: report.finish(session, failed))
    except KeyboardInterrupt:
        report.finish(session, None)
        raise
    except BaseException as failed:
        failure = failed
    report.finish(session, failure)
    raise SystemExit(failure is not None)


if __name__ == "__main__":
    main()
