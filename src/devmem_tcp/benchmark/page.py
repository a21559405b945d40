"""The report as one HTML file: plots, every number, how to repeat it. It loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Final

from devmem_tcp.benchmark import words
from devmem_tcp.benchmark.plan import CONNECTION_SIZE, Driver, Form, Kind, size_name
from devmem_tcp.benchmark.plots import Bar, Line, Point, bars, lines
from devmem_tcp.benchmark.results import LeftOut, Range, Report, Row

_WAYS: Final = tuple((driver, form) for driver in Driver for form in Form)

_STYLE: Final = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --faint: #5c6570; --rule: #d9dee4; --head: #f3f5f7;
  --blocking: #0a58b5; --asyncio: #b3470b; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #e4e8ec; --faint: #9aa5b1; --rule: #343b44; --head: #1d2228;
    --blocking: #6cb2ff; --asyncio: #ffa25c; }
}
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 76rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0; max-width: 52rem; }
.faint, caption { color: var(--faint); }
.notice { border-left: 4px solid var(--asyncio); padding-left: .75rem; }
.plots { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); }
figure { margin: 1.5rem 0 0; }
figcaption { font-weight: 600; }
svg { display: block; height: auto; max-width: 45rem; width: 100%; }
svg text { fill: var(--ink); font-size: 13px; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg polyline { fill: none; stroke: var(--mark); stroke-width: 2; }
svg circle { fill: var(--mark); stroke: var(--mark); stroke-width: 1.5; }
svg .hollow circle { fill: var(--page); }
svg .range { stroke: var(--mark); stroke-width: 1.5; opacity: .6; }
svg .reach { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 1 4; }
.blocking { --mark: var(--blocking); }
.asyncio { --mark: var(--asyncio); }
.plain { --mark: var(--faint); }
svg .series polyline { stroke-dasharray: 6 4; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin-top: .75rem; }
caption { padding-bottom: .25rem; text-align: left; }
th, td { border-bottom: 1px solid var(--rule); padding: .3rem .6rem; text-align: right; vertical-align: top;
  white-space: nowrap; }
th { background: var(--head); font-weight: 600; }
.left { text-align: left; }
small { color: var(--faint); display: block; }
pre { background: var(--head); overflow-x: auto; padding: .75rem; }
"""


def page(report: Report) -> str:
    """Return the report as an HTML document."""
    body = [
        "<h1>devmem-tcp bench</h1>",
        *_summary(report),
        '<div class="plots">',
        *_plots(report.rows),
        "</div>",
        *_table(report.rows),
        *_left_out(report.left_out, "Left out"),
        *_left_out(report.failed, "Failed"),
        *_ends(report),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>devmem-tcp bench, {escape(report.began_at)}</title>",
            f"<style>{_STYLE}</style></head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def _summary(report: Report) -> Iterable[str]:
    sender, receiver = report.sender.backend, report.receiver.backend
    backends = f"{sender} backend at both ends" if sender == receiver else f"{sender} to {receiver} backend"
    where = "both on one machine" if report.same_machine else "two machines"
    rounds = f"{report.plan.rounds} rounds, each in another order" if report.plan.rounds > 1 else "one round"
    yield f"<p><strong>{escape(backends)}</strong>, {where}; {rounds}. Figures are medians, with their ranges.</p>"
    if "software" in (sender, receiver):
        yield (
            '<p class="notice">The software backend receives by ordinary TCP: the system copies every byte. '
            "“dmabuf” then means the bound Buffer, in host memory.</p>"
        )
    host = sum(words.host_bytes(row) for row in report.rows)
    if host:
        yield f'<p class="notice">{host:,} bytes landed in host memory: see “received by” in the table.</p>'
    begun = f"Begun {report.began_at}, took {report.took_s:g} s."
    yield f'<p class="faint">{escape(begun)} Differences under 15 % are noise.</p>'


def _plots(rows: Sequence[Row]) -> Iterable[str]:
    throughput = [row for row in rows if row.work.kind is Kind.THROUGHPUT]
    if throughput:
        yield _by_size(throughput, "Throughput by size of a message", "GB/s", lambda row: row.gb_per_s)
        yield _by_size(
            throughput, "CPU time of both ends, by size of a message", "CPU s/GiB", lambda row: row.cpu_s_per_gib
        )
    trips = [row for row in rows if row.round_trip_us is not None]
    if trips:
        yield _round_trips(trips)
    connections = [row for row in rows if row.work.kind is Kind.CONNECTIONS]
    if connections:
        yield _by_connections(connections)


def _by_size(rows: Sequence[Row], title: str, unit: str, figure: Callable[[Row], Range]) -> str:
    found = []
    for driver, form in _WAYS:
        points = [
            Point(row.work.size_bytes, figure(row), f"{words.what(row.work)}, {words.both(figure(row))} {unit}")
            for row in sorted(rows, key=lambda row: row.work.size_bytes)
            if (row.work.driver, row.work.form) == (driver, form)
        ]
        if points:
            found.append(Line(f"{form.value}, {driver.value}", f"{driver.value} {form.value}", points))
    drawn = lines(
        found,
        x_label="size of a message",
        y_label=unit,
        x_name=lambda size: size_name(int(size)),
        x_base=4,
        y_base=10,
        alt=f"{title}; the figures are in the table below",
    )
    return _figure(title, drawn)


def _round_trips(rows: Sequence[Row]) -> str:
    found = []
    for row in sorted(rows, key=lambda row: _WAYS.index((row.work.driver, row.work.form))):
        assert row.round_trip_us is not None
        assert row.round_trip_p99_us is not None
        said = f"median {words.both(row.round_trip_us)} µs, 99 % within {words.both(row.round_trip_p99_us)} µs"
        style = row.work.driver.value
        found.append(Bar(words.way(row.work), style, row.round_trip_us, row.round_trip_p99_us, said))
    drawn = bars(
        found,
        x_label="µs, there and back",
        names=("median trip", "99 % are within"),
        alt="Time of a round trip; the figures are in the table below",
    )
    return _figure(f"Round trip of {size_name(rows[0].work.size_bytes)}, by two sessions", drawn)


def _by_connections(rows: Sequence[Row]) -> str:
    points = [
        Point(
            row.work.connections,
            row.gb_per_s,
            f"{row.work.connections} connections, {words.both(row.gb_per_s)} GB/s",
        )
        for row in sorted(rows, key=lambda row: row.work.connections)
    ]
    drawn = lines(
        [Line("messages, blocking", "blocking messages", points)],
        x_label="senders to one receiver, a process at either end",
        y_label="GB/s, all together",
        x_name=lambda count: f"{count:g}",
        x_base=8,
        y_base=None,
        alt="Throughput by number of connections; the figures are in the table below",
    )
    return _figure(f"Throughput by number of connections, messages of {size_name(CONNECTION_SIZE)}", drawn)


def _figure(title: str, drawn: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawn}</figure>"


_COLUMNS: Final[tuple[tuple[str, Callable[[Row], str]], ...]] = (
    ("messages<small>measured</small>", lambda row: f"{row.messages:,}<small>{_times(row.rounds)}</small>"),
    ("payload<small>bytes, one way</small>", lambda row: f"{row.payload_bytes:,}"),
    ("GB/s", lambda row: _cell(row.gb_per_s)),
    ("messages/s", lambda row: _cell(row.messages_per_s)),
    ("round trip<small>µs</small>", lambda row: _cell(row.round_trip_us)),
    ("99 % within<small>µs</small>", lambda row: _cell(row.round_trip_p99_us)),
    ("CPU s/GiB<small>both ends</small>", lambda row: _cell(row.cpu_s_per_gib)),
    ("CPU s/GiB<small>sender</small>", lambda row: _cell(row.cpu_s_per_gib_sender)),
    ("CPU s/GiB<small>receiver</small>", lambda row: _cell(row.cpu_s_per_gib_receiver)),
    ("CPU µs<small>a message, both ends</small>", lambda row: _cell(row.cpu_us_per_message)),
)


def _table(rows: Sequence[Row]) -> Iterable[str]:
    yield "<h2>All numbers</h2>"
    yield (
        '<p class="faint">GB/s: 10⁹ bytes of payload a second, from before the first send until the receiver has all. '
        "CPU: user and system time of a process. Bytes: payload of all measured parts. “copied” bytes are some of the "
        "others, which the CPU moved again to make a message contiguous.</p>"
    )
    for kind, title in (
        (Kind.THROUGHPUT, "Throughput by size"),
        (Kind.ROUND_TRIP, "Round trips: payload and CPU by the messages of one way"),
        (Kind.CONNECTIONS, "Many connections"),
    ):
        chosen = [row for row in rows if row.work.kind is kind]
        if chosen:
            yield from _one_table(title, chosen)


def _one_table(title: str, rows: Sequence[Row]) -> Iterable[str]:
    shown = [(head, cell) for head, cell in _COLUMNS if any(cell(row) for row in rows)]
    heads = "".join(f"<th>{head}</th>" for head, _ in shown)
    yield f'<div class="wide"><table><caption>{escape(title)}</caption>'
    yield (
        f'<thead><tr><th class="left">size</th><th class="left">how</th>{heads}'
        '<th class="left">received by<small>bytes</small></th><th class="left">sent from<small>bytes</small></th>'
        '<th class="left">congestion control</th></tr></thead><tbody>'
    )
    for row in rows:
        cells = "".join(f"<td>{cell(row)}</td>" for _, cell in shown)
        yield (
            f'<tr><td class="left">{escape(words.what(row.work))}</td><td class="left">{words.way(row.work)}</td>'
            f'{cells}<td class="left">{_received(row)}</td><td class="left">{_sent(row)}</td>'
            f'<td class="left">{_congestion(row)}</td></tr>'
        )
    yield "</tbody></table></div>"


def _times(rounds: int) -> str:
    return "in 1 round" if rounds == 1 else f"in {rounds} rounds"


def _cell(found: Range | None) -> str:
    if found is None:
        return ""
    return f"{words.number(found.median)}<small>{words.span(found)}</small>"


def _received(row: Row) -> str:
    back = f"<br>back, {escape(words.received(row.sender))}" if row.work.kind is Kind.ROUND_TRIP else ""
    return escape(words.received(row.receiver)) + back


def _sent(row: Row) -> str:
    back = f"<br>back, {escape(words.sent(row.receiver))}" if row.work.kind is Kind.ROUND_TRIP else ""
    return escape(words.sent(row.sender)) + back


def _congestion(row: Row) -> str:
    names = sorted({*row.sender.congestion_controls, *row.receiver.congestion_controls})
    return escape(", ".join(names))


def _left_out(found: Sequence[LeftOut], title: str) -> Iterable[str]:
    if found:
        yield f"<h2>{title}</h2><ul>"
        yield from (f"<li>{escape(one.work.name)}: {escape(one.words)}</li>" for one in found)
        yield "</ul>"


def _ends(report: Report) -> Iterable[str]:
    yield "<h2>Where and how</h2>"
    for name, end in (("Sender", report.sender), ("Receiver", report.receiver)):
        yield f"<p><strong>{name}</strong>: {escape(words.where(end))}.</p>"
    yield f"<p>{report.lanes} data connection{'s' if report.lanes > 1 else ''} a session. Order of turns by seed "
    yield f"{report.plan.seed}; measured parts of about {report.plan.seconds:g} s each.</p>"
    yield f"<pre>{escape(report.command)}</pre>"
