"""Charts as SVG text that a page holds: named for screen readers, coloured by the page's style sheet, told apart by shape as well."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

from hipexp.report.parts import Chart, HeatChart, Mark

WIDE, HIGH, LEFT, BELOW, ABOVE, RIGHT, INSET = 420, 290, 60, 50, 12, 10, 14
CELL_WIDE, CELL_HIGH = 62, 34
MARKS = "Filled: on the Pareto front; black: dense."
ASIDE = 6.0  # between marks of neighbouring series at the same place
# cividis in five steps: readable by colour-blind people, and in grey.
RAMP = ((0, 34, 78), (66, 78, 108), (124, 123, 120), (188, 175, 111), (254, 232, 56))


def draw(chart: Chart) -> str:
    """A chart of lines or points."""
    marks = [mark for series in chart.series.values() for mark in series]
    x = Axis(chart.scales[0], [mark.x for mark in marks], LEFT + INSET, WIDE - RIGHT - INSET)
    heights = [value for mark in marks for value in (mark.y, *(mark.span or ()))]
    y = Axis(chart.scales[1], heights, HIGH - BELOW, ABOVE, chart.top)
    parts = [_grid(chart, x, y)]
    if chart.kind == "scatter":
        parts.append(_front(marks, x, y))
        parts += [_numbered(number, name, mark, x, y, marks) for number, name, mark in numbered(chart)]
    else:
        for number, (name, series) in enumerate(chart.series.items()):
            aside = (number - (len(chart.series) - 1) / 2) * ASIDE
            drawn = _series(name, series, x, y, number % 8)
            parts.append(f'<g class="s{number % 8}" transform="translate({aside:g} 0)">{drawn}</g>')
    return _svg(chart.name, chart.title, _told(chart), WIDE, HIGH, "".join(parts))


def legend(chart: Chart) -> str:
    """The names of the series with their shapes, as a list."""
    if chart.kind == "scatter":
        items = [f'<li value="{number}">{escape(name)}</li>' for number, name, _ in numbered(chart)]
        return f'<p class="legend">{MARKS}</p><ol class="legend">{"".join(items)}</ol>'
    items = []
    for number, name in enumerate(chart.series):
        shape = f'<svg class="key s{number % 8}" width="16" height="12" aria-hidden="true">{_shape(8, 6, number % 8)}</svg>'
        items.append(f"<li>{shape}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


class Axis:
    """Numbers to places between two ends. ``top`` fixes the scale to 0 … top."""

    def __init__(self, scale: str, values: Sequence[float], start: float, end: float, top: float | None = None):
        self.log = scale == "log" and min(values) > 0
        low, high = (0.0, top) if top is not None else (min(values), max(values))
        if not self.log and top is None:
            low = min(0.0, low)
        if self.log:
            low, high = low / 1.12, high * 1.12
        elif high == low:
            high = low + 1
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, values: Sequence[float], most: int = 6) -> list[float]:
        """Places for labels: the values themselves where they are few, else round numbers."""
        own = sorted(set(values))
        if self.log and len(own) <= most and all(abs(self(b) - self(a)) > 34 for a, b in itertools.pairwise(own)):
            return own
        if self.log:
            tens = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = [factor * 10.0**ten for ten in tens for factor in (1, 2, 5) if self.low <= factor * 10.0**ten <= self.high]
            if len(steps) > 2:
                return steps[:: 1 + len(steps) // (most + 1)]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
        step = next(step * factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= most)
        return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def _grid(chart: Chart, x: Axis, y: Axis) -> str:
    marks = [mark for series in chart.series.values() for mark in series]
    parts = []
    for value in y.ticks([mark.y for mark in marks]):
        place = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{short(value)}</text>')
    ticks = sorted({mark.x for mark in marks}) if chart.axes[0] == "stage" else x.ticks([mark.x for mark in marks])
    for value in ticks:
        place = x(value)
        parts.append(f'<line class="grid" y1="{ABOVE}" y2="{HIGH - BELOW}" x1="{place:.1f}" x2="{place:.1f}"/>')
        parts.append(f'<text x="{place:.1f}" y="{HIGH - BELOW + 16}" text-anchor="middle">{short(value)}</text>')
    middle = (ABOVE + HIGH - BELOW) / 2
    parts.append(f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{HIGH - 6}" text-anchor="middle">{escape(chart.axes[0])}</text>')
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(chart.axes[1])}</text>')
    return "".join(parts)


def short(value: float) -> str:
    """A number on an axis: thousands as K (1024 where they are whole), millions as M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{unit}"
    if abs(value) >= 10_000:
        return f"{value / 1e6:.3g}M" if abs(value) >= 1e6 else f"{value / 1000:.3g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _series(name: str, series: Sequence[Mark], x: Axis, y: Axis, style: int) -> str:
    parts, ordered = [], sorted(series, key=lambda mark: mark.x)
    if len(ordered) > 1:
        points = " ".join(f"{x(mark.x):.1f},{y(mark.y):.1f}" for mark in ordered)
        parts.append(f'<polyline points="{points}"/>')
    for mark in ordered:
        around = ""
        if mark.span:
            parts.append(
                f'<line class="span" x1="{x(mark.x):.1f}" x2="{x(mark.x):.1f}" y1="{y(mark.span[0]):.1f}" y2="{y(mark.span[1]):.1f}"/>'
            )
            around = f" ({mark.span[0]:.3g} to {mark.span[1]:.3g})"
        told = f"{name}: {mark.y:.4g}{around} at {mark.x:,.6g}; {mark.words}"
        parts.append(f"<g><title>{escape(told)}</title>{_shape(x(mark.x), y(mark.y), style)}</g>")
    return "".join(parts)


def numbered(chart: Chart) -> list[tuple[int, str, Mark]]:
    """The marks of a scatter chart with their numbers and names, best scores first, of equal ones the fastest."""
    named = [(name, mark) for name, series in chart.series.items() for mark in series]
    ordered = sorted(named, key=lambda one: (-one[1].y, one[1].x, one[0]))
    return [(number, name, mark) for number, (name, mark) in enumerate(ordered, 1)]


def _numbered(number: int, name: str, mark: Mark, x: Axis, y: Axis, marks: Sequence[Mark]) -> str:
    """A circle with its number: filled on the Pareto front, black for dense."""
    kind = "dense" if name.startswith("dense") else "best" if mark in front_of(marks) else "other"
    at = f'cx="{x(mark.x):.1f}" cy="{y(mark.y):.1f}"'
    told = f"<title>{escape(f'{name}: {mark.y:.4g} at {mark.x:,.4g}; {mark.words}')}</title>"
    text = f'<text x="{x(mark.x):.1f}" y="{y(mark.y) + 3.5:.1f}" text-anchor="middle">{number}</text>'
    return f'<g class="point {kind}">{told}<circle {at} r="8"/>{text}</g>'


def _shape(x: float, y: float, style: int) -> str:
    """Circle, square, triangle or diamond, filled or open."""
    filled = "" if style < 4 else ' class="open"'
    if style % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"{filled}/>'
    if style % 4 == 1:
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"{filled}/>'
    corners = [(0, -5), (4.5, 4), (-4.5, 4)] if style % 4 == 2 else [(0, -5), (5, 0), (0, 5), (-5, 0)]
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"{filled}/>'


def front_of(marks: Sequence[Mark]) -> list[Mark]:
    """The marks that no other beats: none has x as small and y as large, and one of them better. From small x to large."""
    beaten = [any(b.x <= a.x and b.y >= a.y and (b.x, b.y) != (a.x, a.y) for b in marks) for a in marks]
    return sorted((mark for mark, lost in zip(marks, beaten, strict=True) if not lost), key=lambda mark: (mark.x, mark.y))


def _front(marks: Sequence[Mark], x: Axis, y: Axis) -> str:
    path, last = [], 0.0
    for number, mark in enumerate(front_of(marks)):
        path.append(f"M{x(mark.x):.1f} {y(mark.y):.1f}" if number == 0 else f"L{x(mark.x):.1f} {last:.1f}L{x(mark.x):.1f} {y(mark.y):.1f}")
        last = y(mark.y)
    return f'<path class="front" d="{"".join(path)}"/>'


def _told(chart: Chart) -> str:
    """The description of a chart for those who do not see it."""
    ends = []
    for name, series in chart.series.items():
        ordered = sorted(series, key=lambda mark: mark.x)
        ends.append(
            f"{name} {ordered[0].y:.3g} at {ordered[0].x:,.6g}"
            + (f" to {ordered[-1].y:.3g} at {ordered[-1].x:,.6g}" if len(ordered) > 1 else "")
        )
    return f"{chart.axes[1]} over {chart.axes[0]}. {'; '.join(ends)}. All values are in the table below."


def draw_heat(chart: HeatChart) -> str:
    """All maps of a chart, each an SVG under its name."""
    return "".join(_heat(chart, name, number) for number, name in enumerate(chart.maps))


def _heat(chart: HeatChart, name: str, number: int) -> str:
    left, above, cells = 64, 2, chart.maps[name]
    wide, high = left + CELL_WIDE * len(chart.columns) + 4, above + CELL_HIGH * len(chart.rows) + 40
    parts = []
    for i, row in enumerate(chart.rows):
        top = above + i * CELL_HIGH
        parts.append(f'<text x="{left - 6}" y="{top + CELL_HIGH / 2 + 4}" text-anchor="end">{escape(row)}</text>')
        for j, column in enumerate(chart.columns):
            parts.append(_cell(left + j * CELL_WIDE, top, cells.get((row, column))))
    bottom = above + CELL_HIGH * len(chart.rows)
    for j, column in enumerate(chart.columns):
        parts.append(f'<text x="{left + (j + 0.5) * CELL_WIDE}" y="{bottom + 15}" text-anchor="middle">{escape(column)}</text>')
    parts.append(f'<text x="{left + len(chart.columns) * CELL_WIDE / 2}" y="{bottom + 32}" text-anchor="middle">tokens</text>')
    parts.append(f'<text x="{left - 6}" y="{bottom + 15}" text-anchor="end">depth</text>')
    told = "; ".join(f"depth {row}, {column} tokens: {score:.0f} ({n} samples)" for (row, column), (score, n) in cells.items())
    drawn = _svg(f"{chart.name}-{number}", f"{name}, {chart.title}", told, wide, high, "".join(parts), fixed=True)
    return f'<div class="map" style="width:{wide}px"><h3>{escape(name)}</h3>{drawn}</div>'


def _cell(x: float, y: float, found: tuple[float, int] | None) -> str:
    box = f'x="{x + 1}" y="{y + 1}" width="{CELL_WIDE - 2}" height="{CELL_HIGH - 2}"'
    middle = x + CELL_WIDE / 2
    if found is None:
        at = f'x="{middle}" y="{y + CELL_HIGH / 2 + 4}" text-anchor="middle"'
        return f'<rect class="none" {box}/><text class="faint" {at}>no sample</text>'
    score, n = found
    ink = "#fff" if score < 55 else "#111"
    text = f'<text style="fill:{ink}" x="{middle}" y="{y + 15}" text-anchor="middle">{score:.0f}</text>'
    below = f'<text class="small" style="fill:{ink}" x="{middle}" y="{y + 27}" text-anchor="middle">n={n}</text>'
    return f'<rect style="fill:{colour(score)}" {box}/>{text}{below}'


def colour(score: float) -> str:
    """The colour of a score from 0 to 100."""
    at = min(max(score, 0.0), 100.0) / 100 * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))


def _svg(name: str, title: str, told: str, wide: float, high: float, inside: str, fixed: bool = False) -> str:
    """``fixed``: drawn at its own size; else as wide as its place, up to a quarter more."""
    names = f'role="img" aria-labelledby="{name}-t" aria-describedby="{name}-d"'
    head = f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(told)}</desc>'
    return f'<svg {names} viewBox="0 0 {wide:g} {high:g}" style="max-width:{wide * (1 if fixed else 1.25):g}px">{head}{inside}</svg>'
