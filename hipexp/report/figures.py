"""Pictures of results, drawn without a display. Colours stay apart for colour-blind readers and in grey."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipexp.report.parts import Chart, Mark
from hipexp.report.svg import front_of
from hipexp.run.ledger import make_folder, replacing

COLORS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#a4407f", "#7a5c00", "#56b4e9", "#8a8a8a")
MARKERS = ("o", "s", "^", "D")
ASIDE = 4.0  # points between marks of neighbouring series
LETTERS = 9.5  # of a heading, for an inch
MOST_NAMES = 20  # beside the points of a scatter chart; of more points only the best and dense are named
INK, FAINT, EMPTY = "#222222", "#8a8a8a", "#efefef"


@dataclass(frozen=True)
class HeatMap:
    """Scores (0 to 100) by row and column; a cell that is not in ``scores`` has no sample."""

    title: str
    scores: dict[tuple[str, str], float]


@dataclass(frozen=True)
class Axis:
    """One side of a heat map: its name and its labels, in order."""

    name: str
    labels: Sequence[str]


def draw_heat_maps(
    path: Path, heading: str, maps: Sequence[HeatMap], vertical: Axis, horizontal: Axis, note: str = "", formats: Sequence[str] = ("png",)
) -> None:
    """Write heat maps that share their axes and one colour scale, side by side, as a picture at ``path``, in each of ``formats``.

    Every cell carries its number, so no value is told by
    colour alone; cells without samples are hatched.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, columns = vertical.labels, horizontal.labels
    wide = max(8.0, 1.0 + len(maps) * (1.1 * len(columns) + 0.5))
    figure, plots = plt.subplots(1, len(maps), figsize=(wide, 2.3 + 0.62 * len(rows)), sharey=True, squeeze=False, layout="constrained")
    for plot, one in zip(plots[0], maps, strict=True):
        image = _draw(plot, one, rows, columns)
        plot.set_xlabel(horizontal.name, color=INK)
    plots[0][0].set_ylabel(vertical.name, color=INK)
    bar = figure.colorbar(image, ax=plots[0].tolist(), shrink=0.9, pad=0.02, ticks=[0, 25, 50, 75, 100])
    bar.set_label("score", color=INK)
    bar.outline.set_visible(False)
    if note:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=FAINT)
    _save(figure, heading, path, formats)


def _open_frame(plot: Any) -> None:
    for edge in ("top", "right"):
        plot.spines[edge].set_visible(False)


def _save(figure: Any, heading: str, path: Path, formats: Sequence[str] = ("png",)) -> None:
    from matplotlib import pyplot as plt

    heading = textwrap.fill(heading, int(LETTERS * figure.get_figwidth()))
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    make_folder(path.parent)
    for kind in formats:
        with replacing(path.with_suffix(f".{kind}")) as scratch:
            figure.savefig(scratch, dpi=150, format=kind)
        figure.set_layout_engine("none")  # the first has found the places, which takes as long as drawing
    plt.close(figure)


def draw_chart(path: Path, chart: Chart, formats: Sequence[str]) -> None:
    """Write a chart of a report as a picture at ``path``, in each of ``formats``: the same marks as on the page."""
    if chart.kind == "scatter":
        named = [(name, mark) for name, series in chart.series.items() for mark in series]
        best = front_of([mark for _, mark in named])
        told = [(name if len(named) <= MOST_NAMES or mark in best or name == "dense" else "", mark.x, mark.y) for name, mark in named]
        draw_scatter(path, chart.title, told, *chart.axes, formats)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.transforms import ScaledTranslation

    columns = 2 if max(map(len, chart.series)) <= 36 else 1
    figure, plot = plt.subplots(figsize=(6.4, 3.7 + 0.17 * math.ceil(len(chart.series) / columns)), layout="constrained")
    for number, (name, series) in enumerate(chart.series.items()):
        marks = sorted(series, key=lambda mark: mark.x)
        x, y = [mark.x for mark in marks], [mark.y for mark in marks]
        style = {"color": COLORS[number % 8], "marker": MARKERS[number % 4], "fillstyle": "full" if number % 8 < 4 else "none"}
        aside = ASIDE * (number - (len(chart.series) - 1) / 2) / 72  # inches, so that marks at one place are all seen
        place = plot.transData + ScaledTranslation(aside, 0, figure.dpi_scale_trans)
        plot.plot(x, y, label=textwrap.fill(name, 84), transform=place, **style)
        for mark in marks:
            if mark.span:
                plot.plot([mark.x, mark.x], mark.span, color=COLORS[number % 8], linewidth=0.8, alpha=0.55, transform=place)
    plot.update_datalim([(mark.x, y) for series in chart.series.values() for mark in series for y in (mark.y, *(mark.span or ()))])
    plot.autoscale_view()
    plot.set(xscale=chart.scales[0], yscale=chart.scales[1], xlabel=chart.axes[0], ylabel=chart.axes[1])
    if chart.top is not None:
        plot.set_ylim(-0.03 * chart.top, 1.03 * chart.top)
    lengths = sorted({mark.x for series in chart.series.values() for mark in series})
    if len(lengths) <= 8:
        plot.set_xticks(lengths, [f"{length:,.0f}" if float(length).is_integer() else f"{length:g}" for length in lengths])
        plot.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    plot.grid(color=EMPTY)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=columns)
    _open_frame(plot)
    _save(figure, chart.title, path, formats)


def draw_lines(
    path: Path, heading: str, panels: dict[str, dict[str, list[tuple[int, float]]]], axes: tuple[str, str], scale: str = "log"
) -> None:
    """Write lines over a logarithmic axis of tokens as a picture at ``path``: a panel for each phase, its lines by name.

    ``axes``: what stands at the horizontal and the vertical one; ``scale``: of the vertical one, ``log`` or ``linear``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, plots = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained")
    styles = [("#222222", "o", "-"), ("#0072b2", "s", "-"), ("#d55e00", "^", "--"), ("#009e73", "D", ":"), ("#8a8a8a", "", ":")]
    for plot, (phase, lines) in zip(plots[0], panels.items(), strict=True):
        for (name, points), (color, marker, line) in zip(lines.items(), styles, strict=False):
            lengths, times = zip(*sorted(points), strict=True)
            plot.plot(lengths, times, color=color, marker=marker, linestyle=line, label=name)
        ticks = sorted({length for points in lines.values() for length, _ in points})
        plot.set_xscale("log")
        plot.set_yscale(scale)
        plot.set_xticks(ticks, [f"{tick:,}" for tick in ticks], color=INK)
        plot.minorticks_off()
        plot.set_title(phase, loc="left", fontsize=11, color=INK)
        plot.set_xlabel(axes[0], color=INK)
        plot.set_ylabel(axes[1], color=INK)
        plot.grid(color=EMPTY)
        plot.legend(frameon=False, fontsize=9)
        _open_frame(plot)
    _save(figure, heading, path)


def draw_layers(path: Path, heading: str, panels: dict[str, dict[str, Sequence[float]]]) -> None:
    """Write bars by layer as a picture at ``path``: a panel for each quantity, in it the values of every layer by name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, plots = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False, layout="constrained")
    styles = [("#8a8a8a", ""), ("#0072b2", "//"), ("#d55e00", "..")]
    for plot, (title, bars) in zip(plots[0], panels.items(), strict=True):
        width = 0.8 / len(bars)
        for number, ((name, values), (color, hatch)) in enumerate(zip(bars.items(), styles, strict=False)):
            at = [layer + (number - (len(bars) - 1) / 2) * width for layer in range(len(values))]
            plot.bar(at, values, width, color=color, hatch=hatch, edgecolor="white", label=name)
        n_layers = max(map(len, bars.values()))
        layers = range(0, n_layers, 1 + (n_layers - 1) // 12)  # as many as there is room for
        plot.set_xticks(layers, [str(layer) for layer in layers], color=INK)
        plot.set_title(title, loc="left", fontsize=11, color=INK)
        plot.set_xlabel("layer", color=INK)
        plot.axhline(0, color=FAINT, linewidth=0.8)
        plot.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        _open_frame(plot)
    _save(figure, heading, path)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Falling ``heights``, moved so that two are ``gap`` apart at least: down from the first, then up from the ground."""
    placed = list[float]()
    for height in heights:
        placed.append(min(height, placed[-1] - gap) if placed else height)
    for i in range(len(placed) - 1, -1, -1):
        least = placed[i + 1] + gap if i + 1 < len(placed) else 0.0
        placed[i] = max(placed[i], least)
    return placed


def draw_scatter(
    path: Path,
    heading: str,
    points: Sequence[tuple[str, float, float]],
    horizontal: str,
    vertical: str,
    formats: Sequence[str] = ("png",),
) -> None:
    """Write named points over a logarithmic axis as a picture at ``path``, in each of ``formats``.

    A line joins those that no other beats in both, which are filled; dense is black. A point whose name is empty has none beside it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, plot = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
    front = [(mark.x, mark.y) for mark in front_of([Mark(x, y, "") for _, x, y in points])]
    plot.step(*zip(*front, strict=True), where="post", color=FAINT, linestyle="--", linewidth=1)
    ordered = sorted(points, key=lambda point: (-point[2], -point[1]))
    line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkB": 4, "relpos": (0.0, 0.5)}
    for name, x, y in ordered:
        best, color = (x, y) in front, INK if name.startswith("dense") else COLORS[1]
        plot.plot(x, y, marker="o", color=color, fillstyle="full" if best or name.startswith("dense") else "none")
    named = [point for point in ordered if point[0]]
    for (name, x, y), height in zip(named, _apart([y for *_, y in named], gap=4.6), strict=True):
        beside = dict(xytext=(1.03, height), textcoords=("axes fraction", "data"), annotation_clip=False, va="center")
        plot.annotate(name, (x, y), **beside, fontsize=8, color=INK, arrowprops=line)  # a column, since points lie close together
    plot.set_xscale("log")
    for formatter in (plot.xaxis.set_major_formatter, plot.xaxis.set_minor_formatter):
        formatter(lambda size, _: f"{size:g}")
    plot.set_xlabel(horizontal, color=INK)
    plot.set_ylabel(vertical, color=INK)
    plot.set_ylim(-4, 106)
    plot.grid(color=EMPTY)
    _open_frame(plot)
    _save(figure, heading, path, formats)


def draw_front(path: Path, heading: str, series: dict[str, list[tuple[float, float]]], axes: tuple[str, str]) -> None:
    """Write five series of points over a logarithmic axis at ``path``, as PNG and SVG, told apart by shape: all, found and baseline.

    The last four are of two kinds of prompts each. An empty series is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, plot = plt.subplots(figsize=(6.8, 4.6), layout="constrained")
    styles = [(FAINT, "o", 4), ("#0072b2", "s", 7), ("#0072b2", "D", 6), ("#d55e00", "^", 9), ("#d55e00", "v", 9)]
    for number, ((name, places), (color, marker, size)) in enumerate(zip(series.items(), styles, strict=True)):
        if places:
            x, y = zip(*sorted(places), strict=True)
            fill = "none" if number % 2 else "full"
            plot.plot(x, y, label=name, color=color, marker=marker, markersize=size, linestyle="", fillstyle=fill)
    plot.set_xscale("log")
    for formatter in (plot.xaxis.set_major_formatter, plot.xaxis.set_minor_formatter):
        formatter(lambda size, _: f"{size:g}")
    plot.set_xlabel(axes[0], color=INK)
    plot.set_ylabel(axes[1], color=INK)
    plot.grid(color=EMPTY)
    plot.legend(frameon=False, fontsize=8)
    _open_frame(plot)
    _save(figure, heading, path, ("png", "svg"))


def _draw(plot: Any, one: HeatMap, rows: Sequence[str], columns: Sequence[str]) -> Any:
    from matplotlib.patches import Rectangle

    cells = [(y, x, one.scores.get((row, column))) for y, row in enumerate(rows) for x, column in enumerate(columns)]
    grid = [[one.scores.get((row, column), math.nan) for column in columns] for row in rows]
    image = plot.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for y, x, value in cells:
        if value is None:
            plot.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=EMPTY, edgecolor="#c9c9c9", hatch="///", linewidth=0))
            box = {"facecolor": EMPTY, "edgecolor": "none", "pad": 1.5}
            plot.text(x, y, "no sample", ha="center", va="center", fontsize=8, color=FAINT, bbox=box)
        else:
            shade = "white" if value < 55 else INK
            plot.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=11, color=shade)
    plot.set_title(one.title, loc="left", fontsize=11, color=INK)
    plot.set_xticks(range(len(columns)), columns, color=INK)
    plot.set_yticks(range(len(rows)), rows, color=INK)
    plot.set_xticks([x - 0.5 for x in range(1, len(columns))], minor=True)
    plot.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    plot.grid(which="minor", color="white", linewidth=2)
    plot.tick_params(which="both", length=0)
    for edge in plot.spines.values():
        edge.set_visible(False)
    return image
