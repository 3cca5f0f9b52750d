"""``python -m hipexp methods``: contestants beside each other on one model, as a table and a picture. Resumable.

``of=`` names a file of ``conf/comparison``, or is the path of one like those: contestants by name with the words that choose them, the runs
that each of them makes, and how recall is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hipexp.config.compose import compose, conf_dir
from hipexp.config.model import ModelFacts, model_folder, read_facts
from hipexp.config.schema import ConfigError, Pipeline
from hipexp.output import DRY, answer, aside, split_flags
from hipexp.report.figures import draw_scatter
from hipexp.report.tables import duration, markdown_table, score_text
from hipexp.run.forecast import Rate
from hipexp.run.ledger import file_name, make_folder, read_json, runs_root, write_text
from hipexp.run.point import check_point, stored
from hipexp.run.several import (
    Named,
    compose_named,
    helpers,
    load_once,
    model_line,
    refuse_own,
    resident,
    run_all,
    split_jobs,
    told,
    trained_length,
)
from hipexp.suites.data.registry import SUBTASKS

if TYPE_CHECKING:
    from hipexp.hf import Loaded

DIVISOR = 8  # of a budget, where recall is measured and there is one
TIMED_STEPS = 32  # whole refresh periods of the presets
CUTTING = "task.truncate_tok="


@dataclass(frozen=True)
class Spec:
    """A run of every contestant: a task at so many times the trained length; ``linear``: only where reading a prompt is not quadratic."""

    task: str
    times: int
    subtasks: tuple[str, ...] = ()
    samples: int = 20
    linear: bool = False

    def __str__(self) -> str:
        return f"{self.task} {' '.join(self.subtasks)} {self.times}×".replace("  ", " ")


@dataclass(frozen=True)
class Comparison:
    """What is compared: the words that choose each contestant, more words for its recall, the runs, and recall by the name of its column.

    ``{trained_tok}`` in words is the model's trained length, ``{divisor}`` in those of a recall ``DIVISOR``, or 1 for what has no budget.
    """

    name: str
    title: str
    words: dict[str, list[str]]
    recall_words: dict[str, list[str]]
    specs: tuple[Spec, ...]
    recalls: dict[str, list[str]]

    @property
    def longest(self) -> int:
        """The longest prompts that all read, in trained lengths."""
        return max(spec.times for spec in self.specs if not spec.linear)


def read_comparison(name: str, fast: bool) -> Comparison:
    """A comparison of ``conf/comparison``, or the file at a path. Raises ``ConfigError`` for one that is not there or is none."""
    import yaml

    folder = conf_dir() / "comparison"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    path = folder / f"{name}.yaml" if name in known else Path(name).expanduser()
    if path.stem in known and path.resolve().parent != folder.resolve():
        raise ConfigError(f"of={name} has the name of another comparison, whose table it would replace; call the file otherwise")
    if not path.is_file():
        others = ", ".join(known)
        raise ConfigError(
            f"of={name}: there is no such comparison; use {others}, or the path of a file like conf/comparison/{known[0]}.yaml"
        )
    try:
        made = yaml.safe_load(path.read_text(encoding="utf-8"))
        chosen = made["fast"]["contestants"] if fast else list(made["contestants"])
        entries = {key: made["contestants"][key] for key in chosen}
        entries = {key: {"words": entry} if isinstance(entry, list) else entry for key, entry in entries.items()}
        runs = (made["fast"] if fast else made)["runs"]
        specs = tuple(Spec(**{**run, "subtasks": tuple(list[str]() + run.get("subtasks", []))}) for run in runs)
        recalls = {key: [_one_sample(word) if fast else word for word in words] for key, words in made["recall"].items()}
        words = {key: entry["words"] for key, entry in entries.items()}
        more = {key: entry.get("recall", []) for key, entry in entries.items()}
        _check_comparison(entries, specs, [*words.values(), *more.values(), *made["recall"].values()])
        return Comparison(path.stem, made["title"], words, more, specs, recalls)
    except (KeyError, TypeError, AttributeError, ValueError, OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"of={name}: {path} is no comparison ({type(error).__name__}: {error}); it needs title, contestants, runs, recall and fast, "
            f"as conf/comparison/{known[0]}.yaml has them"
        ) from error


def _check_comparison(entries: dict[str, dict[str, Any]], specs: Sequence[Spec], texts: Sequence[Any]) -> None:
    """Refuse what would only be noticed when hours are spent, or be taken for something else. Raises ``ValueError``."""
    for name, entry in entries.items():
        if unknown := entry.keys() - {"words", "recall"}:
            raise ValueError(f"contestant {name} has {', '.join(map(str, unknown))}, not words and recall")
    if not entries or all(spec.linear for spec in specs):
        raise ValueError("there must be a contestant, and a run that is not for linear ones only")
    for spec in specs:
        if not isinstance(spec.times, int) or spec.times < 1:
            raise ValueError(f"times={spec.times} must be a whole number from 1")
    for words in texts:
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{words} must be a list of words")


def _one_sample(word: str) -> str:
    return "task.samples=1" if word.startswith("task.samples=") else word


@dataclass(frozen=True)
class Point:
    """A contestant under a spec, as a run."""

    name: str
    spec: Spec
    run: Named


def points(comparison: Comparison, overrides: Sequence[str], data: Sequence[str] = ()) -> list[Point]:
    """Every run, shortest prompts first. ``data``: the words that say where RULER's texts are."""
    trained_tok = trained_length(compose(["task=infbench", *resident(overrides)]).model)
    made = []
    for spec in sorted(comparison.specs, key=lambda spec: spec.times):
        for name, chosen in comparison.words.items():
            words = [word.replace("{trained_tok}", str(trained_tok)) for word in chosen]
            cuts = _cuts(words)
            if (spec.linear and (cuts or not _linear(_pipeline(tuple(chosen))))) or (cuts and spec.task == "ruler"):
                continue
            own = [
                f"task={spec.task}",
                *(data if spec.task == "ruler" else ()),
                f"task.length_tok={spec.times * trained_tok}",
                f"task.samples={spec.samples}",
                *[f"task.subtasks=[{','.join(spec.subtasks)}]"] * bool(spec.subtasks),
            ]
            said = f"{name}, {spec.task} {' '.join(spec.subtasks)} at {spec.times} × the trained length, {spec.samples} sample(s)"
            made.append(Point(name, spec, compose_named(said, [*own, *words], overrides)))
    return made


def recall_points(comparison: Comparison, overrides: Sequence[str]) -> dict[tuple[str, str], Named]:
    """Recall of every contestant that selects, by contestant and column; at a part of its budget where it has one."""
    found = {}
    for name, words in comparison.words.items():
        method = _method(_pipeline(tuple(words)))
        if method is not None and _selects(method):
            divisor = DIVISOR if method.budgets else 1
            for column, asked in comparison.recalls.items():
                own = [word.replace("{divisor}", str(divisor)) for word in asked]
                found[name, column] = compose_named(f"{name}, {column}", [*own, *words, *comparison.recall_words[name]], overrides)
    return found


def time_points(comparison: Comparison, overrides: Sequence[str]) -> dict[str, Named]:
    """The times of every contestant, by its name: of a prompt of the longest length that all read, or of what is left of it."""
    trained_tok = trained_length(compose(["task=infbench", *resident(overrides)]).model)
    made = {}
    for name, chosen in comparison.words.items():
        length_tok = trained_tok * (1 if _cuts(chosen) else comparison.longest)
        own = ["task=latency", f"task.length_tok={length_tok}", "task.repeats=1", f"task.decode_steps={TIMED_STEPS}"]
        own += ["task.dense_max_tok=1"] * (_pipeline(tuple(chosen)) is not None)
        words = [word for word in chosen if not word.startswith(CUTTING)]
        made[name] = compose_named(f"{name}, times", [*own, *words], overrides)
    return made


@cache
def _pipeline(words: tuple[str, ...]) -> Pipeline | None:
    """The pipeline that words choose."""
    return compose(["task=infbench", *(word for word in words if word.lstrip("+").startswith("pipeline"))]).pipeline


def _method(pipeline: Pipeline | None) -> Any:
    """The method in a layer to which no group applies; None for dense attention."""
    from hipexp.attention.methods import make_method

    return None if pipeline is None else make_method(pipeline.plan_alone(None))


def _selects(method: Any) -> bool:
    from hipexp.attention.method import SelectingMethod

    return isinstance(method, SelectingMethod)


def _linear(pipeline: Pipeline | None) -> bool:
    method = _method(pipeline)
    return method is not None and method.linear


def _cuts(words: Sequence[str]) -> bool:
    """Whether prompts are cut to the trained length."""
    return any(word.startswith(CUTTING) for word in words)


def decode_bytes(pipeline: Pipeline | None, facts: ModelFacts, heads: int, n_tok: int) -> tuple[float, float]:
    """Bytes of a mean decode step of the whole model: of keys and values attended to, and with them of what is read to choose them."""
    from hipexp.attention.methods import make_method

    size = facts.head_dim * facts.itemsize
    if pipeline is None:
        both = 2.0 * facts.layers * facts.kv_heads * n_tok * size
        return both, both
    rows = [make_method(plan).decode_rows(n_tok, heads, facts.kv_heads) for plan in pipeline.plan(facts.layers)]
    return sum(attended for attended, _ in rows) * size, sum(attended + scanned for attended, scanned in rows) * size


def tell_expected_time(todo: Sequence[Point], loaded: Loaded, jobs: int) -> None:
    """Print what the runs will take on this machine, by two prompts of each contestant; ``jobs`` processes share them."""
    print("measuring this machine ...", flush=True)
    rates: dict[str, Rate] = {}
    total: dict[str, float] = {}
    for point in todo:
        task = point.run.experiment.task
        if point.name not in rates:
            rates[point.name] = Rate.of(point.run, loaded, times=2)
        length_tok = loaded.trained_tok * (point.spec.times if task.truncate_tok is None else 1)
        left = task.samples * len(task.subtasks or SUBTASKS[task.name]) - len(point.run.rows())
        total[point.name] = total.get(point.name, 0.0) + left * rates[point.name].seconds(length_tok)
    text = duration(sum(total.values()) / jobs)
    print(f"expected time of the scores: {text}, at most, without recall and times; interrupt it as you like, the same command continues")
    for name, expected in total.items():
        print(f"  {duration(expected / jobs):>7}  {name}")


Results = dict[tuple[str, Spec], dict[str, Any]]
Recalls = dict[tuple[str, str], dict[str, Any]]
Times = dict[str, dict[str, Any]]


def table(results: Results, recalls: Recalls, times: Times, costs: dict[str, tuple[float, float]]) -> str:
    """A line for every contestant: scores by run (with their 95 % interval where it is of one subtask), recall, times, bytes."""
    specs = list(dict.fromkeys(spec for _, spec in results))
    longest = max(spec.times for spec in specs if not spec.linear)
    columns = list(dict.fromkeys(column for _, column in recalls))
    header = ["", *(f"{spec}" if len(spec.subtasks) == 1 or spec.linear else f"{spec.task} {spec.times}×" for spec in specs)]
    header += [*columns, f"prefill s at {longest}×", "decode ms", "attended MB", "with the choice MB"]
    lines = []
    for name in costs:
        scores = [_score(results.get((name, spec), {})) for spec in specs]
        held = [_mass(recalls.get((name, column), {})) for column in columns]
        rows = {row["phase"]: row["mean_ms"] for row in times[name]["latency"]["rows"]} if times.get(name) else {}
        shown = [f"{rows['prefill'] / 1e3:.1f}", f"{rows['decode']:.1f}"] if rows else [None, None]
        lines.append([name, *scores, *held, *shown, *(f"{size / 1e6:.2f}" for size in costs[name])])
    return markdown_table(header, lines, left=1)


def _score(summary: dict[str, Any]) -> str | None:
    if not summary:
        return None
    scores = list(summary["scores"].values())
    return score_text(summary["average"], scores[0].get("interval") if len(scores) == 1 else None)


def _mass(summary: dict[str, Any]) -> str | None:
    """Of the last stage, the mean over everything that was measured."""
    held = [found["stages"][-1]["mass"]["mean"] for found in summary.get("recall", {}).values()]
    return f"{fmean(held):.3f}" if held else None


def write_table(
    comparison: Comparison, todo: Sequence[Point], recalls: dict[tuple[str, str], Named], timed: dict[str, Named], trained_tok: int
) -> Path:
    """Write ``table.md`` from what is done so far, and ``picture.png``; returns the folder."""
    model = todo[0].run.experiment.model
    results = {(point.name, point.spec): point.run.summary() for point in todo}
    facts, longest = read_facts(model), comparison.longest
    folder = model_folder(model)
    assert facts is not None and folder is not None, "trained_length refuses it"
    heads = read_json(folder / "config.json")["num_attention_heads"]
    pipelines = {point.name: point.run.experiment.pipeline for point in todo}
    costs = {name: decode_bytes(pipeline, facts, heads, longest * trained_tok) for name, pipeline in pipelines.items()}
    for name in costs:
        if _cuts(comparison.words[name]):
            costs[name] = costs[name][0] / longest, costs[name][1] / longest
    parts = [
        f"# {comparison.title}: {model.name or model.path}",
        f"{model_line(model)}. Trained length {trained_tok} tokens; scores 0 to 100, own prompts and generated samples (not official). "
        f"Bytes: of a mean decode step behind {longest * trained_tok} tokens, all layers, in the model's number format, by each rule. "
        "Recall: of the attention outside a contestant's own sinks and window, the share that is selected in the end; layers that a method "
        f"keeps dense count as 1. {_told(comparison)} Times: of one prompt, one contestant after the other{_machines(timed.values())}.",
        table(results, {key: run.summary() for key, run in recalls.items()}, {name: run.summary() for name, run in timed.items()}, costs),
        "![accuracy against bytes](picture.png)",
    ]
    folder = table_folder(comparison, todo)
    make_folder(folder)
    at = [(name, costs[name][1] / 1e6, fmean(scores)) for name in pipelines if (scores := _long_scores(results, name, longest))]
    if at:
        draw_scatter(folder / "picture.png", f"Accuracy at {longest} × the trained length", at, "MB read by a decode step", "mean score")
    write_text(folder / "table.md", "\n\n".join(parts) + "\n")
    return folder


def table_folder(comparison: Comparison, todo: Sequence[Point]) -> Path:
    """Where the table of a comparison is."""
    model = todo[0].run.experiment.model
    return runs_root() / f"{file_name(model.name or model.path)}-{comparison.name}"


def _told(comparison: Comparison) -> str:
    """The words by which recall of each column was measured."""
    if not comparison.recalls:
        return "None was asked for."
    told = "; ".join(f"{column}: `{' '.join(words)}`" for column, words in comparison.recalls.items())
    return told.replace("{divisor}", str(DIVISOR)) + f". Budgets are divided by {DIVISOR} where it says so, and where there is one."


def _machines(runs: Iterable[Named]) -> str:
    found = dict.fromkeys(machine for run in runs if (machine := run.machine()))
    return f" ({'; '.join(found)})" if found else ""


def _long_scores(results: Results, name: str, longest: int) -> list[float]:
    return [found["average"] for (contestant, spec), found in results.items() if found and contestant == name and spec.times == longest]


def main(argv: list[str]) -> int:
    """Measure every contestant; ``fast=true``: few of them with one sample; ``--dry-run`` only tells the expected time.

    ``jobs=``: so many processes share the runs. The same command in another terminal shares them too.
    """
    flags, words = split_flags(argv)
    jobs, words = split_jobs(words)
    data = [word for word in words if word.startswith("task.data=")]
    of = [word.removeprefix("of=") for word in words if word.startswith("of=")]
    overrides = [word for word in words if word not in ("fast=true", *data) and not word.startswith("of=")]
    refuse_own("methods", overrides, ("task.data",))
    comparison = read_comparison((of or ["methods"])[-1], "fast=true" in words)
    todo, recalls, timed = points(comparison, overrides, data), recall_points(comparison, overrides), time_points(comparison, overrides)
    trained_tok, load = trained_length(todo[0].run.experiment.model), load_once()
    runs = [*recalls.values(), *(point.run for point in todo)]
    for run in [*runs, *timed.values()]:  # a refusal is told before anything takes long
        check_point(run.experiment)
    left = [point for point in todo if not stored(point.run.experiment)]
    dry, write = DRY in flags, partial(write_table, comparison, todo, recalls, timed, trained_tok)
    folder = table_folder(comparison, todo)
    table, picture = folder / "table.md", folder / "picture.png"
    with aside(flags):
        with helpers([] if dry else runs, jobs, folder):
            if left:
                tell_expected_time(left, load(todo[0].run.experiment.model), jobs)
            if not dry:
                run_all(runs, load, write)
        if not dry:
            run_all([*timed.values()], load, write)
            write()
    text = "" if dry else f"{table.read_text(encoding='utf-8')}\ntable:   {table}\npicture: {picture}"
    answer(flags, text, told([*runs, *timed.values()], **({} if dry else {"table": table, "picture": picture})), "" if dry else str(table))
    return 0
