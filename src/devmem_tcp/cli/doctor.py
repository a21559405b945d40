"""``devmem-tcp doctor``: what this machine and a NIC have for devmem TCP, what is missing, and what helps."""

from __future__ import annotations

import sys
import textwrap
from typing import Final

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from devmem_tcp.cli.failure import EXIT_FAILED, EXIT_STATUS_HELP, say
from devmem_tcp.errors import errno_name
from devmem_tcp.kernel.journal import Journal, Outcome, Result
from devmem_tcp.kernel.state import restore
from devmem_tcp.probe import probe_machine
from devmem_tcp.probe.lookup import explanations
from devmem_tcp.refusals import Refusal
from devmem_tcp.sys import calls
from devmem_tcp.types import ProbeCheck, ProbeReport, Severity

EXIT_WARNINGS: Final = 4
EXIT_HELP: Final = (
    f"{EXIT_STATUS_HELP} Here 0 means that nothing stands in the way: advice does not count; 4 that there are "
    "warnings; 1 that there is an error, a setting could not be put back, or nothing is known about TEXT."
)
_WIDEST: Final = 100
_ADVICE: Final = "advice"
_COMMENT: Final = "# "
_VERDICTS: Final = {
    Severity.OK: "Devmem TCP can run here.",
    Severity.WARNING: "Devmem TCP can run here; see the warnings.",
    Severity.ERROR: "Devmem TCP cannot run like this; --backend software can.",
}
_STYLES: Final = {"ok": "green", _ADVICE: "cyan", "warning": "yellow", "error": "bold red"}


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="doctor"):
    """One examination: ``severity`` is the worst of its checks'; an OK check with a ``fix`` is advice."""

    nic: str | None
    severity: Severity
    checks: tuple[ProbeCheck, ...]


class RestoredSetting(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one change in the journal; ``nic`` and ``words`` are empty if its record cannot be read."""

    result: str
    nic: str
    words: str
    text: str


class RestoreReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="restored"):
    """One replay of a journal."""

    journal: str
    settings: tuple[RestoredSetting, ...]


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """One refusal of the kernel."""

    call: str
    errno: str
    extack: str
    attr: str
    cause: str
    fix: str
    source: str


class ExplainReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="explained"):
    """What is known about a text."""

    text: str
    refusals: tuple[Explained, ...]


@click.command("doctor", epilog=EXIT_HELP)
@click.argument("nic", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--restore", "restoring", is_flag=True, help="Put back the NIC settings that dead programs left.")
@click.option(
    "--explain", "text", metavar="TEXT", help="Say what an error of the kernel means: paste it, or its words."
)
def command(nic: str | None, as_json: bool, restoring: bool, text: str | None) -> None:
    """Examine this machine and NIC for devmem TCP; without NIC, say which NICs could carry it.

    Changes nothing, and works without privileges; with them it can ask more.

    \b
    devmem-tcp doctor eth1
    sudo devmem-tcp doctor --restore
    devmem-tcp doctor --explain 'bind-rx EINVAL tcp-data-split is disabled'
    """
    if sum((nic is not None, restoring, text is not None)) > 1:
        raise click.UsageError("NIC, --restore and --explain go each alone")
    if text is not None:
        status = _explain(text, as_json)
    elif restoring:
        status = _restore(as_json)
    else:
        status = _examine(nic, as_json)
    sys.stdout.flush()
    raise click.exceptions.Exit(status)


# --- examining ------------------------------------------------------------------------------------------------------


def _examine(nic: str | None, as_json: bool) -> int:
    report = probe_machine(nic)
    worst = severity(report)
    if as_json:
        _print_json(DoctorReport(nic=nic, severity=worst, checks=report.checks))
    else:
        _print_report(report)
    return {Severity.OK: 0, Severity.WARNING: EXIT_WARNINGS, Severity.ERROR: EXIT_FAILED}[worst]


def severity(report: ProbeReport) -> Severity:
    """Return the worst severity of all checks."""
    found = {check.severity for check in report.checks}
    return next((one for one in (Severity.ERROR, Severity.WARNING) if one in found), Severity.OK)


def _print_report(report: ProbeReport) -> None:
    console = Console(highlight=False)
    console.width = min(console.width, _WIDEST)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found")
    for check in report.checks:
        mark = _mark(check)
        found = Text(check.found)
        if check.severity is not Severity.OK and check.needed:
            found.append(f"\nneeded: {check.needed}")
        table.add_row(Text(mark, _STYLES[mark]), Text(check.name), found)
    console.print(table)
    bad = [check for check in report.checks if check.severity is not Severity.OK]
    _print_fixes("What would mend it", bad, console.width)
    told = {check.fix for check in bad}
    rest = [check for check in report.checks if check.severity is Severity.OK and check.fix not in told]
    _print_fixes("Advice (programs turn header split and ntuple rules on by themselves)", rest, console.width)
    click.echo(_VERDICTS[severity(report)])


def _print_fixes(title: str, checks: list[ProbeCheck], width: int) -> None:
    """Print fixes so that the whole block can be pasted into a shell: what is not a command is a comment."""
    fixes: dict[str, list[str]] = {}
    for check in checks:
        if check.fix:
            fixes.setdefault(check.fix, []).append(check.name)
    if not fixes:
        return
    click.echo(f"# {title}:")
    for fix, names in fixes.items():
        typed, _, comment = fix.partition("#")
        about = ": ".join(filter(None, (", ".join(names), comment.strip())))
        for line in textwrap.wrap(about, width - len(_COMMENT), break_long_words=False, break_on_hyphens=False):
            click.echo(f"{_COMMENT}{line}")
        if typed.strip():
            click.echo(typed.strip())
    click.echo()


def _mark(check: ProbeCheck) -> str:
    return _ADVICE if check.severity is Severity.OK and check.fix else check.severity.value


# --- putting back ---------------------------------------------------------------------------------------------------


def _restore(as_json: bool) -> int:
    """Replay the journal of this user; returns the exit status."""
    journal = Journal.default()
    others = [other.directory for other in Journal.candidates() if other.directory != journal.directory]
    outcomes = restore(journal)
    if as_json:
        settings = tuple(_restored(outcome) for outcome in outcomes)
        _print_json(RestoreReport(journal=journal.directory, settings=settings))
    else:
        for outcome in outcomes:
            click.echo(f"{outcome.entry.nic.name}: {outcome.text}" if outcome.entry else outcome.text)
        if not outcomes:
            click.echo(f"nothing to put back: {journal.directory} has no entry")
        if calls.user_id() and others:
            say(f"this is the journal of your user; for {', '.join(others)}: sudo devmem-tcp doctor --restore")
    return EXIT_FAILED if any(outcome.result is Result.FAILED for outcome in outcomes) else 0


def _restored(outcome: Outcome) -> RestoredSetting:
    entry = outcome.entry
    name, words = (entry.nic.name, entry.words) if entry else ("", "")
    return RestoredSetting(result=outcome.result.name.lower(), nic=name, words=words, text=outcome.text)


# --- explaining -----------------------------------------------------------------------------------------------------


def _explain(text: str, as_json: bool) -> int:
    """Say what a text of the kernel means; returns the exit status."""
    found = explanations(text)
    if as_json:
        _print_json(ExplainReport(text=text, refusals=tuple(_explained(refusal) for refusal in found)))
    elif not found:
        say(f"nothing is known about {text!r}")
        click.echo("hint: give the kernel's own words, or a call and an errno: 'bind-rx EBUSY'", err=True)
    for number, refusal in enumerate([] if as_json else found):
        one = _explained(refusal)
        if number:
            click.echo()
        click.echo(" ".join(filter(None, (one.call, one.errno, one.extack, one.attr and f"[attribute {one.attr}]"))))
        click.echo(f"  because  {one.cause}\n  so       {one.fix}\n  source   {one.source}")
    return 0 if found else EXIT_FAILED


def _explained(refusal: Refusal) -> Explained:
    return Explained(
        call=refusal.call,
        errno=errno_name(refusal.errno),
        extack=refusal.extack,
        attr=refusal.attr,
        cause=refusal.cause,
        fix=refusal.fix,
        source=refusal.source,
    )


def _print_json(report: DoctorReport | RestoreReport | ExplainReport) -> None:
    click.echo(msgspec.json.encode(report))
