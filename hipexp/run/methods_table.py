"""``python -m hipexp methods``: what every method scores and reads on the embedded model, as a table and a picture. Resumable."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hipexp.config.compose import compose
from hipexp.config.model import ModelFacts, model_folder, read_facts
from hipexp.config.schema import Pipeline
from hipexp.report.figures import draw_scatter
from hipexp.report.tables import duration, markdown_table
from hipexp.run import latency
from hipexp.run.ledger import file_name, make_folder, read_json, runs_root, write_text
from hipexp.run.point import check_point, stored
from hipexp.run.several import Named, compose_named, load_once, model_line, refuse_own, resident, run_all, trained_length
from hipexp.suites.infbench import SUBTASKS
from hipexp.suites.sample import LineEncoder

if TYPE_CHECKING:
    from hipexp.hf import Loaded

# What to call it, and the words that choose it.
METHODS = {
    "dense": [],
    "dense, middle cut out": ["task.truncate_tok={trained_tok}"],
    **{name: [f"+pipeline={name}"] for name in (
        "ntk", "self_extend", "lm_infinite", "streaming", "h2o", "infllm", "hip_iclr25", "minference", "xattention", "quest", "kascade",
        "random", "oracle", "3stage", "3stage_scan",
    )},
}  # fmt: skip
RECALL = {"quest": ["pipeline.params.keep_tok=3328"]}  # for recall: an eighth of its own budget is no whole number of pages
FAST = ("dense", "streaming", "oracle", "3stage")
LONG = 8  # times the trained length, where methods are compared


@dataclass(frozen=True)
class Spec:
    """A run of every method: a task at so many times the trained length; ``linear``: only where reading a prompt is not quadratic."""

    task: str
    times: int
    subtasks: tuple[str, ...]
    samples: int
    linear: bool = False


SPECS = (
    Spec("infbench", 1, SUBTASKS, 20),
    Spec("infbench", 2, SUBTASKS, 20),
    Spec("ruler", 1, (), 20),
    Spec("ruler", 2, (), 20),
    Spec("infbench", LONG, ("passkey", "kv_retrieval"), 10),
    Spec("ruler", LONG, ("niah_multikey_1",), 10),
    Spec("infbench", 32, ("passkey",), 3, linear=True),
)
FAST_SPECS = (Spec("infbench", 1, SUBTASKS, 1), Spec("infbench", 2, SUBTASKS, 1))


@dataclass(frozen=True)
class Point:
    """A method under a spec, as a run."""

    method: str
    spec: Spec
    run: Named


def points(overrides: Sequence[str], fast: bool, data: Sequence[str] = ()) -> list[Point]:
    """Every run, shortest prompts first. ``data``: the words that say where RULER's texts are."""
    trained_tok = trained_length(compose(["task=infbench", *resident(overrides)]).model)
    made = []
    for spec in sorted(FAST_SPECS if fast else SPECS, key=lambda spec: spec.times):
        for name in FAST if fast else METHODS:
            words = [word.format(trained_tok=trained_tok) for word in METHODS[name]]
            cuts = any("truncate" in word for word in words)
            if (spec.linear and (cuts or not _linear(name))) or (cuts and spec.task == "ruler"):
                continue
            subtasks = [f"task.subtasks=[{','.join(spec.subtasks)}]"] * bool(spec.subtasks)
            own = [
                f"task={spec.task}",
                *(data if spec.task == "ruler" else ()),
                f"task.length_tok={spec.times * trained_tok}",
                f"task.samples={spec.samples}",
                *subtasks,
            ]
            said = f"{name}, {spec.task} {' '.join(spec.subtasks)} at {spec.times} × the trained length, {spec.samples} sample(s)"
            made.append(Point(name, spec, compose_named(said, [*own, *words], overrides)))
    return made


def recall_points(overrides: Sequence[str], fast: bool) -> dict[str, Named]:
    """Recall of every method that selects, at an eighth of its budget where that can be."""
    found = {}
    for name in FAST if fast else METHODS:
        method = _method(name)
        if method is not None and _selects(method):
            divisor = 8 if method.budgets else 1
            words = ["task=recall", f"task.divisors=[{divisor}]", f"task.samples={1 if fast else 8}", *METHODS[name], *RECALL.get(name, [])]
            found[name] = compose_named(f"{name}, recall with 1/{divisor} of its budget", words, overrides)
    return found


@cache
def _method(name: str) -> Any:
    """The method of that name, in a layer to which no group applies; None for dense attention."""
    from hipexp.attention.methods import make_method

    pipeline = compose(["task=infbench", *(word for word in METHODS[name] if word.startswith("+pipeline="))]).pipeline
    return None if pipeline is None else make_method(pipeline.plan_alone(None))


def _selects(method: Any) -> bool:
    from hipexp.attention.method import SelectingMethod

    return isinstance(method, SelectingMethod)


def _linear(name: str) -> bool:
    method = _method(name)
    return method is not None and method.linear


def decode_bytes(pipeline: Pipeline | None, facts: ModelFacts, heads: int, n_tok: int) -> tuple[float, float]:
    """Bytes of a mean decode step of the whole model: of keys and values attended to, and with them of what is read to choose them."""
    from hipexp.attention.methods import make_method

    size = facts.head_dim * facts.itemsize
    if pipeline is None:
        both = 2.0 * facts.layers * facts.kv_heads * n_tok * size
        return both, both
    rows = [make_method(plan).decode_rows(n_tok, heads, facts.kv_heads) for plan in pipeline.plan(facts.layers)]
    return sum(attended for attended, _ in rows) * size, sum(attended + scanned for attended, scanned in rows) * size


def tell_expected_time(todo: Sequence[Point], loaded: Loaded) -> None:
    """Print what the runs will take on this machine, from one prompt of the trained length for each method."""
    print("measuring this machine ...", flush=True)
    seconds: dict[str, float] = {}
    for point in todo:
        if point.method not in seconds:
            sample = latency.prompt(LineEncoder(loaded.tokenizer), loaded.trained_tok, 8, 0)
            kind = "dense" if point.run.experiment.pipeline is None else "pruned"
            started = time.monotonic()
            latency.timed(point.run.experiment, loaded, kind, sample, 8)
            seconds[point.method] = time.monotonic() - started
    total: dict[str, float] = {}
    for point in todo:
        task = point.run.experiment.task
        times = point.spec.times if task.truncate_tok is None else 1
        growth = float(times) if _linear(point.method) else times**2 / 4 + times
        left = task.samples * len(task.subtasks or range(13)) - len(point.run.rows())
        total[point.method] = total.get(point.method, 0.0) + left * growth * seconds[point.method]
    print(f"expected time: {duration(sum(total.values()))}, at most; interrupt it as you like, the same command continues")
    for name, expected in total.items():
        print(f"  {duration(expected):>7}  {name}")


Results = dict[tuple[str, Spec], dict[str, Any]]


def table(results: Results, recalls: dict[str, dict[str, Any]], costs: dict[str, tuple[float, float]]) -> str:
    """A line for every method: scores by length, recall, times, bytes."""
    specs = list(dict.fromkeys(spec for _, spec in results))
    longest = max(spec.times for spec in specs if not spec.linear)
    header = ["method", *(f"{spec.task} {' '.join(spec.subtasks) if spec.times >= LONG else ''} {spec.times}×" for spec in specs)]
    header += ["mass recall", f"prefill s at {longest}×", "decode ms", "attended MB", "with the choice MB"]
    lines = []
    for name in dict.fromkeys(method for method, _ in results):
        scores: list[str | None] = []
        for spec in specs:
            found = results.get((name, spec), {})
            scores.append(f"{found['average']:.1f}" if found else None)
        held = [found["stages"][-1]["mass"]["mean"] for found in recalls.get(name, {}).get("recall", {}).values()]
        times = [found["latency"] for (method, spec), found in results.items() if found and method == name and spec.times == longest]
        shown = [_mean(times, "prefill_ms", 1e-3), _mean(times, "decode_ms", 1.0)]
        lines.append([name, *scores, f"{fmean(held):.3f}" if held else None, *shown, *(f"{size / 1e6:.2f}" for size in costs[name])])
    return markdown_table(header, lines, left=1)


def _mean(times: Sequence[dict[str, Any]], key: str, factor: float) -> str | None:
    values = [one[key] for one in times if one.get(key) is not None]
    return f"{fmean(values) * factor:.1f}" if values else None


def write_table(todo: Sequence[Point], recalls: dict[str, Named], trained_tok: int) -> Path:
    """Write ``table.md`` from what is done so far, and ``methods.png``; returns the folder."""
    model = todo[0].run.experiment.model
    results = {(point.method, point.spec): point.run.summary() for point in todo}
    facts, longest = read_facts(model), max(point.spec.times for point in todo if not point.spec.linear)
    folder = model_folder(model)
    assert facts is not None and folder is not None, "trained_length refuses it"
    heads = read_json(folder / "config.json")["num_attention_heads"]
    pipelines = {point.method: point.run.experiment.pipeline for point in todo}
    costs = {name: decode_bytes(pipeline, facts, heads, longest * trained_tok) for name, pipeline in pipelines.items()}
    costs = {name: _cut(cost, name, longest) for name, cost in costs.items()}
    parts = [
        f"# Methods on {model.name or model.path}",
        f"{model_line(model)}. Trained length {trained_tok} tokens; scores 0 to 100, own prompts and generated samples (not official). "
        f"Bytes: of a mean decode step behind {longest * trained_tok} tokens, all layers, in the model's number format, by each rule. "
        "Mass recall: of the attention outside a method's own sinks and window, the share that is selected with an eighth of its budget "
        "(all of it where it has none), in prompts of the trained length; layers that a method keeps dense count as 1.",
        table(results, {name: run.summary() for name, run in recalls.items()}, costs),
        "![accuracy against bytes](methods.png)",
    ]
    folder = runs_root() / f"{file_name(model.name or model.path)}-methods"
    make_folder(folder)
    at = [(name, costs[name][1] / 1e6, fmean(scores)) for name in pipelines if (scores := _long_scores(results, name, longest))]
    if at:
        draw_scatter(folder / "methods.png", f"Accuracy at {longest} × the trained length", at, "MB read by a decode step", "mean score")
    write_text(folder / "table.md", "\n\n".join(parts) + "\n")
    return folder


def _cut(cost: tuple[float, float], name: str, longest: int) -> tuple[float, float]:
    return (cost[0] / longest, cost[1] / longest) if "cut out" in name else cost


def _long_scores(results: Results, name: str, longest: int) -> list[float]:
    return [found["average"] for (method, spec), found in results.items() if found and method == name and spec.times == longest]


def main(argv: list[str]) -> int:
    """Measure every method; ``fast=true``: four of them with one sample; ``--dry-run`` only tells the expected time."""
    fast, data = "fast=true" in argv, [word for word in argv if word.startswith("task.data=")]
    overrides = [word for word in argv if word not in ("--dry-run", "fast=true", *data)]
    refuse_own("methods", overrides, ("task.data",))
    todo, recalls = points(overrides, fast, data), recall_points(overrides, fast)
    trained_tok, load = trained_length(todo[0].run.experiment.model), load_once()
    left = [point for point in todo if not stored(point.run.experiment)]
    if left:
        tell_expected_time(left, load(todo[0].run.experiment.model))
    if "--dry-run" in argv:
        return 0
    runs = [run for run in [*recalls.values(), *(point.run for point in todo)] if not stored(run.experiment)]
    for run in runs:  # a refusal is told before hours are spent
        check_point(run.experiment)
    for run in runs:
        run_all([run], load)
        write_table(todo, recalls, trained_tok)
    folder = write_table(todo, recalls, trained_tok)
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"table:   {folder / 'table.md'}\npicture: {folder / 'methods.png'}")
    return 0
