"""Plots as SVG, of our own making: axes, lines with ranges, dots with ranges. Colours and fonts are the page's.

A mark carries its exact figures in a ``title``, which browsers show where the pointer rests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Final, NamedTuple

from devmem_tcp.benchmark.results import Range

_WIDTH: Final = 720
_LEFT: Final = 64
_RIGHT: Final = 16
_TOP: Final = 12
_BOTTOM: Final = 52
_PLOT_HEIGHT: Final = 270
_ROW_HEIGHT: Final = 34
_LABELS_WIDTH: Final = 170
_LEGEND_HEIGHT: Final = 26
_LEGEND_LEFT: Final = 32.0
_LETTER: Final = 7.2  # about as wide as one is
_MARK: Final = 3.5


class Point(NamedTuple):
    """A figure at a place on the x axis, and what to say of it."""

    x: float
    y: Range
    words: str


class Line(NamedTuple):
    """Points that belong together. ``style`` is a class of the page's: its colour, and whether it is dashed."""

    name: str
    style: str
    points: list[Point]


class Bar(NamedTuple):
    """A median and a worse case of the same kind."""

    name: str
    style: str
    median: Range
    worse: Range
    words: str


class Scale:
    """Where a value lies on an axis: by its logarithm, or in proportion.

    Args:
        values: what is to be seen; positive.
        start: where the axis begins, in pixels; ``end``: where it ends, which may be less.
        base: of the logarithm: ticks stand at its powers, or for 10 at 1, 2 and 5 times them; None: in proportion,
            from 0.
    """

    def __init__(self, values: Iterable[float], start: float, end: float, base: int | None) -> None:
        found = list(values)
        self._start, self._end = start, end
        if base is None:
            step = _nice_step(max(found))
            self.ticks = [step * n for n in range(math.ceil(max(found) / step) + 1)]
        else:
            self.ticks = _powers(min(found), max(found), base)
        self._place: Callable[[float], float] = float if base is None else math.log
        self._low, self._high = self._place(self.ticks[0]), self._place(self.ticks[-1])

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        span = self._high - self._low
        share = (self._place(value) - self._low) / span if span else 0.5
        return round(self._start + share * (self._end - self._start), 1)


def _nice_step(most: float) -> float:
    """Return the step of about five ticks up to a value: 1, 2 or 5 times a power of ten."""
    rough = most / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= rough)


def _powers(least: float, most: float, base: int) -> list[float]:
    """Return ticks around values: powers of a base; for 10 also 2 and 5 times them, where that stays legible."""
    low, high = math.floor(math.log(least, base) + 1e-9), math.ceil(math.log(most, base) - 1e-9)
    steps = (1, 2, 5) if base == 10 and high - low <= 3 else (1,)
    ticks = [float(base) ** n * step for n in range(low, high + 1) for step in steps]
    first = max((tick for tick in ticks if tick <= least * 1.000001), default=ticks[0])
    last = min((tick for tick in ticks if tick >= most * 0.999999), default=ticks[-1])
    return [tick for tick in ticks if first <= tick <= last]


def lines(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_name: Callable[[float], str],
    x_base: int,
    y_base: int | None,
    alt: str,
) -> str:
    """Draw lines over a logarithmic x axis.

    Args:
        x_name: writes a value of the x axis.
        x_base, y_base: see Scale; every x that a point has is a tick.
        alt: says what is seen, for those who do not see it.
    """
    points = [point for line in lines for point in line.points]
    top, bottom = _TOP + _LEGEND_HEIGHT, _TOP + _LEGEND_HEIGHT + _PLOT_HEIGHT
    xs = sorted({point.x for point in points})
    x = Scale(xs, _LEFT + 12, _WIDTH - _RIGHT - 12, x_base)
    y = Scale([value for point in points for value in (point.y.least, point.y.most)], bottom, top, y_base)
    parts = [_open(bottom + _BOTTOM, alt), _legend(lines)]
    for tick in y.ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(_text(_LEFT - 8, y(tick) + 4, f"{tick:,g}", "end"))
    for tick in xs:
        parts.append(f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(_text(x(tick), bottom + 20, x_name(tick), "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 42, x_label, "middle"))
    middle = (top + bottom) / 2
    parts.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    parts += [_line(line, x, y) for line in lines]
    return "\n".join([*parts, "</svg>"])


def _line(line: Line, x: Scale, y: Scale) -> str:
    places = [(x(point.x), y(point.y.median), point) for point in line.points]
    path = " ".join(f"{at},{height}" for at, height, _ in places)
    parts = [f'<g class="{line.style}"><polyline points="{path}"/>']
    for at, height, point in places:
        parts.append(f'<line class="range" x1="{at}" x2="{at}" y1="{y(point.y.least)}" y2="{y(point.y.most)}"/>')
        parts.append(_dot(at, height, f"{line.name}: {point.words}"))
    return "".join([*parts, "</g>"])


def bars(bars: Sequence[Bar], *, x_label: str, names: tuple[str, str], alt: str) -> str:
    """Draw a row for each bar, over a logarithmic axis: its median as a dot, its worse case as a hollow one.

    Args:
        names: what the two kinds of dots stand for.
        alt: as in ``lines``.
    """
    top = _TOP + _LEGEND_HEIGHT
    bottom = top + _ROW_HEIGHT * len(bars)
    values = [value for bar in bars for one in (bar.median, bar.worse) for value in (one.least, one.most)]
    x = Scale(values, _LABELS_WIDTH, _WIDTH - _RIGHT - 12, 10)
    parts = [_open(bottom + _BOTTOM, alt)]
    for place, (name, style) in enumerate(zip(names, ("", "hollow"), strict=True)):
        left = _LABELS_WIDTH + 150 * place
        parts.append(f'<g class="plain {style}">{_dot(left, _TOP + 8, "")}</g>{_text(left + 12, _TOP + 12, name)}')
    for tick in x.ticks:
        parts.append(f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="{top}" y2="{bottom}"/>')
        parts.append(_text(x(tick), bottom + 18, f"{tick:,g}", "middle"))
    parts.append(_text((_LABELS_WIDTH + _WIDTH - _RIGHT) / 2, bottom + 40, x_label, "middle"))
    for row, bar in enumerate(bars):
        height = top + _ROW_HEIGHT * (row + 0.5)
        parts.append(_text(_LABELS_WIDTH - 14, height + 4, bar.name, "end"))
        reach = f'x1="{x(bar.median.median)}" x2="{x(bar.worse.median)}"'
        parts.append(f'<g class="{bar.style}"><line class="reach" {reach} y1="{height}" y2="{height}"/>')
        for one, style in ((bar.median, ""), (bar.worse, "hollow")):
            ends = f'x1="{x(one.least)}" x2="{x(one.most)}"'
            parts.append(f'<g class="{style}"><line class="range" {ends} y1="{height + 7}" y2="{height + 7}"/>')
            parts.append(f"{_dot(x(one.median), height, bar.words)}</g>")
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"])


def _open(height: float, alt: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(alt)}">'


def _legend(lines: Sequence[Line]) -> str:
    parts = []
    left, height = _LEGEND_LEFT, _TOP + 8.0
    for line in lines:
        sample = f'<polyline points="{left:g},{height:g} {left + 26:g},{height:g}"/>{_dot(left + 13, height, "")}'
        parts.append(f'<g class="{line.style}">{sample}</g>{_text(left + 32, height + 4, line.name)}')
        left += 50 + _LETTER * len(line.name)
    return "".join(parts)


def _dot(x: float, y: float, words: str) -> str:
    title = f"<title>{escape(words)}</title>" if words else ""
    return f'<circle cx="{x:g}" cy="{y:g}" r="{_MARK}">{title}</circle>'


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'
