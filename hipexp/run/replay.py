"""``python -m hipexp replay``: what caches of any size and policy would have done in a recorded run; ``replay record`` records one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipexp.cache.policies import POLICIES
from hipexp.cache.replay import LayerTrace, Outcome, by_layer, replay
from hipexp.cache.traces import ATTEND, PHASES, REUSE, TraceReader
from hipexp.config.convert import unknown
from hipexp.config.schema import ConfigError, Experiment
from hipexp.report.figures import draw_lines
from hipexp.report.tables import text_table
from hipexp.run.ledger import file_name, make_folder, on_disk, runs_root

if TYPE_CHECKING:
    from tqdm import tqdm

SUFFIX = ".trace.gz"
USAGE = (
    "python -m hipexp replay <trace> [policies=lru,clock,lfu,belady] [sizes=<tokens>,...] [--json], "
    "or replay record [out=<trace>] [steps=64] [phases=decode,prefill] +pipeline=... [key=value ...]"
)
RECORD = {"out": "", "steps": "64", "phases": "decode"}
WORDS = (
    "hit %: keys and values, by chunks of the last stage, that were there when they were read: by a stage that scores, by attention to a\n"
    "new list, by attention to a list used again. again: of KiB/step, what had been evicted; the rest was read for the first time, which\n"
    "no cache avoids. tokens: in the cache of a layer, keys and values; sinks and window come on top. KiB: of all layers together"
)
Results = dict[tuple[int, str], Outcome]
"""By size in tokens and policy."""


def main(words: list[str]) -> int:
    """Replay a trace, or record one. Raises ``ConfigError`` for wrong words and for a trace that is damaged."""
    if not words or "=" in words[0] or words[0].startswith(("-", "+")):
        raise ConfigError(f"replay needs a trace, or the word record: {USAGE}")
    return _record(words[1:]) if words[0] == "record" else _replay(Path(words[0]), words[1:])


def _replay(path: Path, words: list[str]) -> int:
    asked, rest = settings(words, {"policies": ",".join(POLICIES), "sizes": ""})
    for word in rest:
        if word != "--json":
            raise unknown(f"replay: {word}", word.partition("=")[0], ["policies", "sizes", "--json"])
    policies = chosen("policies", asked["policies"], POLICIES)
    reader = TraceReader(path)
    layers = by_layer(reader.header, reader)
    n_reads = sum(len(request.halves) for trace in layers.values() for request in trace.requests)
    if not n_reads:
        raise ConfigError(f"nothing is read in {path}: sinks and window hold all of it; record a longer prompt (task.length_tok=...)")
    sizes = sizes_of(asked["sizes"], layers)
    results: Results = {}
    with _bar(n_reads * len(sizes) * len(policies)) as bar:
        for size in sizes:
            for policy in policies:
                bar.set_description(f"{policy} {size}")
                results[size, policy] = replay(layers, policy, size, bar.update)
    if "--json" in rest:
        print(json.dumps([row for phase in PHASES for row in rows_of(results, phase)], indent=2))
        return 0
    print(heading(reader.header.about, layers))
    print("\n".join([*filter(None, (table(results, phase) for phase in PHASES)), WORDS]))
    picture = path.with_name(path.name.removesuffix(SUFFIX) + ".png")
    draw(picture, results, reader.header.about)
    print(f"picture: {picture}")
    return 0


def settings(words: Sequence[str], defaults: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Values of the keys in ``defaults``, and the words that set none of them."""
    asked, rest = dict(defaults), []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in defaults:
            asked[key] = value
        else:
            rest.append(word)
    return asked, rest


def listed(text: str) -> list[str]:
    """The parts of ``a,b`` or ``[a,b]``, each once."""
    return list(dict.fromkeys(filter(None, text.strip("[]").replace(" ", "").split(","))))


def chosen(key: str, text: str, known: Iterable[str]) -> list[str]:
    """The names in a setting. Raises ``ConfigError`` for one that is not ``known``, and if there are none."""
    names, known = listed(text), list(known)
    for name in names:
        if name not in known:
            raise unknown(f"{key}={name}", name, known)
    if not names:
        raise ConfigError(f"{key}= names nothing; use some of {', '.join(known)}")
    return names


def whole_number(key: str, text: str, least: int) -> int:
    """A number among the settings. Raises ``ConfigError`` for anything else, or less than ``least``."""
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"replay: {key}={text} must be a whole number from {least} on")
    return int(text)


def sizes_of(text: str, layers: dict[int, LayerTrace]) -> list[int]:
    """The sizes that are asked for, in tokens, ascending; else some, from what is attended to at once to all that is ever read.

    Raises ``ConfigError`` for a size below what is attended to at once, and for one that cuts a unit.
    """
    least, most = (max(getattr(trace, name) for trace in layers.values()) for name in ("least_tok", "whole_tok"))
    unit = max(trace.units.unit_tok for trace in layers.values())
    if not text:
        sizes = [max(2 * unit, 1 << (least - 1).bit_length())]
        while sizes[-1] < most:
            sizes.append(sizes[-1] * 3 // 2 if sizes[-1].bit_count() == 1 else sizes[-1] // 3 * 4)
        return sizes
    sizes = sorted({whole_number("sizes", part, 1) for part in listed(text)})
    for size in sizes:
        if size < least:
            raise ConfigError(f"sizes={size} is too small: {least} tokens are attended to at once in this trace; use {least} or more")
        if size % unit:
            raise ConfigError(f"sizes={size} must be a multiple of {unit}, the tokens of a unit; try {size // unit * unit + unit}")
    return sizes


def rows_of(results: Results, phase: str) -> list[dict[str, Any]]:
    """A row for each policy and size; ``bytes`` are those fetched in a step, over all layers."""
    rows = []
    for (size, policy), outcome in results.items():
        total, steps = outcome.total(phase), outcome.steps(phase)
        if not total.reads:
            continue
        readers = sorted({by for its_phase, by in outcome.tallies if its_phase == phase})
        rows.append(
            {"phase": phase, "policy": policy, "size_tok": size, "steps": len(steps), "hit_ratio": total.hit_ratio}
            | {"best_ratio": total.best_ratio, "by": {by: outcome.total(phase, by).hit_ratio for by in readers}}
            | {"reads": total.reads, "missed": total.missed, "first": total.first}
            | {"bytes": total.missed_bytes / len(steps), "first_bytes": total.first_bytes / len(steps), "worst_bytes": max(steps)}
        )
    return rows


def table(results: Results, phase: str) -> str:
    """The rows of a phase; empty if nothing of it was recorded."""
    rows = rows_of(results, phase)
    if not rows:
        return ""
    readers = [by for by in rows[0]["by"] if by not in (ATTEND, REUSE)] + [by for by in (ATTEND, REUSE) if by in rows[0]["by"]]
    names = {ATTEND: "new list", REUSE: "used again"}
    cells = [
        [row["size_tok"], row["policy"], _percent(row["hit_ratio"]), *(_percent(row["by"][by]) for by in readers)]
        + [count / 1024 for count in (row["bytes"], row["bytes"] - row["first_bytes"], row["worst_bytes"])]
        for row in rows
    ]
    step = "query block" if phase == "prefill" else "step"
    header = ["tokens", "policy", "hit %", *(names.get(by, f"stage {by}") for by in readers), f"KiB/{step}", "again", "worst"]
    best, first = _percent(rows[0]["best_ratio"]), rows[0]["first_bytes"] / 1024
    title = f"{phase}, {rows[0]['steps']} {step}s: at best {best} % hits and {first:.1f} KiB/{step}, without ever evicting"
    return f"{title}\n{text_table(header, cells, left=0)}"


def _percent(ratio: float | None) -> str | None:
    return None if ratio is None else f"{100 * ratio:.1f}"


def heading(about: dict[str, Any], layers: dict[int, LayerTrace]) -> str:
    """What the trace is of, and what a cache has to hold in it."""
    whole = max(trace.whole_tok for trace in layers.values())
    least = max(trace.least_tok for trace in layers.values())
    return f"{_source(about, 'model', 'pipeline', 'task')}; at most {least} tokens attended to at once, {whole} ever read in a layer"


def _source(about: dict[str, Any], *keys: str) -> str:
    return ", ".join([*(str(about[key]) for key in keys if key in about), f"{about.get('prompt_tok', '?')} tokens"])


def draw(path: Path, results: Results, about: dict[str, Any]) -> None:
    """Hit ratio over cache size, a line for each policy, a panel for each phase."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for phase in PHASES:
        rows = rows_of(results, phase)
        if rows:
            lines = panels.setdefault(phase, {})
            for row in rows:
                lines.setdefault(row["policy"], []).append((row["size_tok"], 100 * row["hit_ratio"]))
            lines["never evicts"] = [(size, 100 * rows[0]["best_ratio"]) for size in sorted({row["size_tok"] for row in rows})]
    title = f"Hits of a layer's cache\n{_source(about, 'model', 'pipeline')}"
    draw_lines(path, title, panels, ("tokens in a layer's cache", "hit %"), scale="linear")


@contextmanager
def _bar(total: int) -> Iterator[tqdm]:
    """Progress on stderr; where that is no terminal, a line every ten seconds."""
    from tqdm import tqdm

    every = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, unit="read", unit_scale=True, file=sys.stderr, mininterval=every, leave=False) as bar:
        yield bar


def _record(words: list[str]) -> int:
    from hipexp.config.compose import compose
    from hipexp.run.point import EXACT, check_point

    asked, overrides = settings(words, RECORD)
    steps, phases = whole_number("steps", asked["steps"], 1), chosen("phases", asked["phases"], PHASES)
    experiment = compose(overrides)
    check_recordable(experiment)
    check_point(experiment)
    path = Path(asked["out"] or default_path(experiment))
    if asked["out"]:
        if not path.parent.is_dir():
            raise ConfigError(f"out={path}: there is no folder {path.parent}; make it first")
    else:
        make_folder(path.parent)
    if record(experiment, path, steps, phases).exact:
        print(EXACT)
    print(path)
    return 0


def check_recordable(experiment: Experiment) -> None:
    """Refuse what has no stages or no samples, or is not resident. Raises ``ConfigError``."""
    if experiment.model.base_url is not None:
        raise ConfigError("replay record needs a model that is loaded here: a server does not tell what it reads")
    if experiment.pipeline is None or not experiment.pipeline.stages:
        raise ConfigError("replay record needs a pipeline with stages, as nothing else chooses what it reads; add +pipeline=3stage")
    if experiment.offload.on:
        raise ConfigError(
            f"replay record: offload={experiment.offload.name} has no place here: a trace says what a resident run reads, in the "
            "model's own format; leave it out, and try its sizes and policies on the trace, as in replay <trace> sizes=8192 policies=clock"
        )
    if experiment.task.name in ("latency", "recall"):
        raise ConfigError(f"replay record needs a task with prompts, and task={experiment.task.name} has none; use task=passkey")


def default_path(experiment: Experiment) -> Path:
    """Where a trace lies if nobody says where."""
    from hipexp.run.identity import key_of
    from hipexp.run.point import model_name, pipeline_name

    names = file_name(model_name(experiment)), file_name(pipeline_name(experiment) or ""), key_of(experiment)[:10]
    return runs_root() / "traces" / ("_".join(names) + SUFFIX)


def record(experiment: Experiment, path: Path, steps: int, phases: Sequence[str]) -> Any:
    """Record the first sample of the experiment's task; returns its ``Generation``."""
    from hipexp.hf.trace import record as record_trace
    from hipexp.run.identity import model_revision
    from hipexp.run.point import load_model, model_name, open_suite_for, pipeline_name, token_bar

    loaded = load_model(experiment.model)
    suite = open_suite_for(experiment, loaded.tokenizer, loaded.trained_tok)
    assert suite is not None and experiment.pipeline is not None, "refused by the checks"
    item = suite.items()[0]
    tokens = suite.sample(item).tokens
    about = {
        "model": model_name(experiment),
        "revision": model_revision(experiment.model),
        "pipeline": pipeline_name(experiment),
        "task": f"{experiment.task.name} {item.subtask}",
        "prompt_tok": len(tokens),
        "steps": steps,
        "phases": list(phases),
        "dtype": loaded.dtype,
        "seed": experiment.seed,
    }
    with on_disk(path), token_bar(len(tokens)) as bar:
        bar.set_description("replay record")
        return record_trace(
            loaded,
            experiment.pipeline,
            tokens,
            path,
            steps=steps,
            phases=phases,
            prefill_chunk_tok=experiment.model.prefill_chunk_tok,
            about=about,
            progress=bar.update,
        )
