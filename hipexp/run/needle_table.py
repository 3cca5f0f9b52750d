"""``python -m hipexp table``: the measurements of the embedded model's card, with enough samples to believe them. Resumable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipexp.config.compose import compose
from hipexp.output import DRY, answer, aside, split_flags
from hipexp.report.figures import Axis, HeatMap, draw_heat_maps
from hipexp.report.tables import duration, markdown_table
from hipexp.run import latency
from hipexp.run.forecast import Rate
from hipexp.run.identity import model_revision
from hipexp.run.ledger import file_name, make_folder, runs_root, write_text
from hipexp.run.point import stored
from hipexp.run.several import Named, compose_named, load_once, model_line, refuse_own, resident, run_all, told, trained_length
from hipexp.suites.infbench import SUBTASKS

if TYPE_CHECKING:
    from hipexp.run.point import Load

DIGITS, PAIRS = ("passkey", "number_string"), ("kv_retrieval",)
LATENCY = (((65536, 131072), 3), ((262144,), 1))  # (lengths, rounds): the longest takes dense attention many minutes
NO_GROUP = ("+pipeline=3stage", "pipeline.layers.early.range=''")
HELDOUT = "task.wording=heldout"


@dataclass(frozen=True)
class Spec:
    """A run of the table: which subtasks at how many times the trained length, and what is special about it."""

    method: str
    times: int
    subtasks: tuple[str, ...]
    samples: int
    words: tuple[str, ...] = ()

    @property
    def wording(self) -> str:
        return "held out" if HELDOUT in self.words else "default"


HIP = ("+pipeline=3stage",)
SPECS = (
    Spec("dense", 1, DIGITS, 100),
    Spec("dense", 1, PAIRS, 50),
    *(Spec("3stage", 8, (name,), 40, HIP) for name in SUBTASKS),
    Spec("dense", 8, SUBTASKS, 5),
    Spec("3stage", 32, ("passkey",), 15, HIP),
    Spec("dense", 1, SUBTASKS, 20, (HELDOUT,)),
    Spec("3stage", 8, SUBTASKS, 5, (*HIP, HELDOUT)),
    Spec("3stage without its layer group", 8, SUBTASKS, 5, NO_GROUP),
    *(Spec("3stage", times, SUBTASKS, 5, HIP) for times in (1, 2, 4)),
    *(Spec("3stage without its layer group", times, SUBTASKS, 5, NO_GROUP) for times in (1, 2, 4)),
    *(Spec("dense", times, SUBTASKS, 5) for times in (2, 4)),
)
# (attention, multiple of the trained length, subtask, least score)
GOALS = (
    *(("dense", 1, name, 98) for name in DIGITS),
    ("dense", 1, "kv_retrieval", 90),
    *(("3stage", 8, name, 95) for name in DIGITS),
    ("3stage", 8, "kv_retrieval", 50),
    ("3stage", 32, "passkey", 90),
)


def accuracy_points(overrides: Sequence[str]) -> dict[Spec, Named]:
    """Every accuracy run, most telling first."""
    trained_tok = trained_length(compose(["task=infbench", *resident(overrides)]).model)
    found = {}
    for spec in SPECS:
        subtasks = f"task.subtasks=[{','.join(spec.subtasks)}]"
        words = [f"task.length_tok={spec.times * trained_tok}", f"task.samples={spec.samples}", subtasks]
        what = f"{spec.times} × the trained length, {spec.samples} samples, {spec.wording} wording"
        name = f"{spec.method}, {' '.join(spec.subtasks)}, {what}"
        found[spec] = compose_named(name, ["task=infbench", *words, *spec.words], overrides)
    return found


def latency_points(overrides: Sequence[str]) -> list[Named]:
    """The latency runs: dense and 3stage, alternating."""
    made = []
    for lengths_tok, rounds in LATENCY:
        lengths = ",".join(map(str, lengths_tok))
        words = ["task=latency", f"task.lengths_tok=[{lengths}]", "task.decode_steps=48", f"task.repeats={rounds}", *HIP]
        made.append(compose_named(f"latency at {lengths} tokens, {rounds} round(s)", words, overrides))
    return made


def expected_seconds(point: Named, trained_tok: int, rates: dict[bool, Rate]) -> float:
    """What is left to do of a point, by the rates; 0 if it is done."""
    if stored(point.experiment):
        return 0.0
    task, finished = point.experiment.task, {(row["subtask"], row["sample"]) for row in point.rows()}
    if task.name == "latency":
        todo = [one for one in latency.points(point.experiment, trained_tok) if (one.subtask, one.repeat) not in finished]
        return sum(rates[one.impl != "dense"].seconds(one.length_tok) for one in todo)
    assert task.length_tok is not None and task.subtasks is not None
    return (task.samples * len(task.subtasks) - len(finished)) * rates[point.experiment.pipeline is not None].seconds(task.length_tok)


def tell_expected_time(points: Sequence[Named], load: Load, trained_tok: int) -> None:
    """Print what the table will take on this machine, and which part of it."""
    loaded = load(points[0].experiment.model)
    print("measuring this machine ...", flush=True)
    kinds = {pruned: next(p for p in points if (p.experiment.pipeline is not None) == pruned) for pruned in (False, True)}
    rates = {pruned: Rate.of(point, loaded, times=3) for pruned, point in kinds.items()}
    each = [(expected_seconds(point, trained_tok, rates), point.name) for point in points]
    print(f"expected time: {duration(sum(seconds for seconds, _ in each))}; interrupt it as you like, the same command continues")
    for seconds, name in each:
        if seconds:
            print(f"  {duration(seconds):>7}  {name}")


Results = dict[Spec, dict[str, Any]]
"""The summaries of the accuracy runs; empty for one that is not done."""


def score_of(results: Results, subtask: str, **wanted: Any) -> tuple[float, int] | None:
    """Score and number of samples of a subtask in the first run whose spec has the ``wanted`` values."""
    for spec, summary in results.items():
        cell = summary.get("scores", {}).get(subtask)
        if cell and all(getattr(spec, name) == value for name, value in wanted.items()):
            return cell["score"], cell["n"]
    return None


def accuracy_table(results: Results, trained_tok: int) -> str:
    """Scores with their number of samples, by wording, length and method."""
    ordered = sorted(results, key=lambda spec: (spec.wording, spec.times))
    rows = []
    for wording, times, method in dict.fromkeys((spec.wording, spec.times, spec.method) for spec in ordered):
        cells = [score_of(results, name, method=method, times=times, wording=wording) for name in SUBTASKS]
        texts = [f"{cell[0]:.1f} ({cell[1]})" if cell else None for cell in cells]
        rows.append([method, wording, f"{times}× ({times * trained_tok})", *texts])
    return markdown_table(["attention", "wording", "context", *SUBTASKS], rows, left=3)


def claims(results: Results, times: list[dict[str, Any]]) -> str:
    """The figures that the project promises, beside what was measured."""
    rows = []
    for method, multiple, subtask, score in GOALS:
        cell = score_of(results, subtask, method=method, times=multiple, wording="default")
        rows.append([f"{method} at {multiple}×: {subtask}", f"≥ {score}", cell and f"{cell[0]:.1f}", verdict(cell and cell[0] >= score)])
    speed = {(row["phase"], row["context_tok"]): row for row in times if row["impl"] != "dense"}
    for length, least in ((65536, 1.0), (131072, 2.0), (262144, 3.5)):
        gain = speed.get(("prefill", length), {}).get("speedup")
        rows.append([f"prefill at {length} tokens, dense / 3stage", f"≥ {least}", gain and f"{gain:.2f}", verdict(gain and gain >= least)])
    steps = [speed.get(("decode", length), {}).get("mean_ms") for length in (65536, 262144)]
    growth = steps[1] / steps[0] if steps[0] and steps[1] else None
    rows.append(["decode step of 3stage, 262144 / 65536 tokens", "≤ 1.5", growth and f"{growth:.2f}", verdict(growth and growth <= 1.5)])
    return markdown_table(["", "aim", "measured", ""], rows)


def verdict(reached: bool | float | None) -> str:
    """A word for whether an aim is reached."""
    return "not measured" if reached is None else "yes" if reached else "no"


def machines(points: Iterable[Named]) -> str:
    """What the runs ran on."""
    return "Run on: " + "; ".join(sorted({found for point in points if (found := point.machine())})) + "."


def write_table(runs: dict[Spec, Named], times: Sequence[Named], trained_tok: int) -> Path:
    """Write ``table.md`` from what is done so far, and ``accuracy.png`` when all of it is; returns the folder."""
    model = times[0].experiment.model
    results = {spec: run.summary() for spec, run in runs.items()}
    rows = [row for run in times for row in run.summary().get("latency", {}).get("rows", [])]
    rows.sort(key=lambda row: row["phase"] != "prefill")
    parts = [
        f"# {model.name or model.path}, measured",
        f"{model_line(model)}. Trained length {trained_tok} tokens. Scores 0 to 100 with the number of samples in brackets; "
        "protocol hipexp (own prompts, generated samples), not official ∞Bench.",
        "## What it must show",
        claims(results, rows),
        "## Accuracy",
        *([machines(run for spec, run in runs.items() if results[spec])] if any(results.values()) else []),
        accuracy_table(results, trained_tok),
        "## Time",
        *([machines(times), f"```\n{latency.table(rows)}\n```"] if rows else ["not measured yet"]),
        "![accuracy by length](accuracy.png)",
    ]
    folder = runs_root() / f"{file_name(model.name or model.path)}-table_{model_revision(model)[:10]}"
    make_folder(folder)
    if all(results.values()):
        draw(folder / "accuracy.png", results, trained_tok)
    write_text(folder / "table.md", "\n\n".join(parts) + "\n")
    return folder


def draw(path: Path, results: Results, trained_tok: int) -> None:
    """Heat maps of subtask × length for the three methods of the card."""
    lengths = sorted({spec.times for spec in results})
    label = {times: f"{times}×\n{times * trained_tok:,}" for times in lengths}
    maps = []
    for method in ("dense", "3stage", "3stage without its layer group"):
        scores: dict[tuple[str, str], float] = {}
        for name, times in product(SUBTASKS, lengths):
            cell = score_of(results, name, method=method, times=times, wording="default")
            if cell:
                scores[name, label[times]] = cell[0]
        maps.append(HeatMap(method, scores))
    heading = f"Retrieval beyond the trained length of {trained_tok} tokens"
    horizontal = Axis("context: × the trained length, tokens", list(label.values()))
    draw_heat_maps(path, heading, maps, Axis("subtask", SUBTASKS), horizontal)


def main(argv: list[str]) -> int:
    """Measure everything that is missing and write the table; ``--dry-run`` only tells the expected time.

    Other words are overrides for every run.
    """
    flags, overrides = split_flags(argv)
    refuse_own("table", overrides)
    runs, times = accuracy_points(overrides), latency_points(overrides)
    trained_tok = trained_length(times[0].experiment.model)
    points, load = [*runs.values(), *times], load_once()
    with aside(flags):
        if not all(stored(point.experiment) for point in points):
            tell_expected_time(points, load, trained_tok)
        if DRY not in flags:
            run_all(points, load, after=lambda: write_table(runs, times, trained_tok))
    if DRY in flags:
        answer(flags, "", told(points), "")
        return 0
    folder = write_table(runs, times, trained_tok)
    table, picture = folder / "table.md", folder / "accuracy.png"
    text = f"{table.read_text(encoding='utf-8')}\ntable:   {table}\npicture: {picture}"
    answer(flags, text, told(points, table=table, picture=picture), str(table))
    return 0
