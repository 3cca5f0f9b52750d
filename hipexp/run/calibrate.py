"""``python -m hipexp calibrate``: give every layer of a pipeline the RoPE strategy and the budget that hold the most of its attention.

On prompts as ``task=recall`` reads, of the trained length, with what stages keep divided by the largest of ``task.divisors``: so they stand
for prompts so many times as long. Of the prompts, every second one chooses; the others, which differ in text and place of what is asked,
judge, at all divisors. Whatever is chosen, the last stages of all layers together keep as much as those of the pipeline it began with.
What a text holds is stored at once, so that the same command continues.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipexp.config.compose import compose
from hipexp.config.model import read_facts
from hipexp.config.overrides import check_pipeline_name, conf_dir, group_options
from hipexp.config.schema import ConfigError, Experiment, Pipeline, PruneRope
from hipexp.output import answer, aside, split_flags
from hipexp.report.figures import draw_layers
from hipexp.report.tables import text_table
from hipexp.run import allocation, judged, recall
from hipexp.run.allocation import EARLY, STRATEGIES, Choice, planned, rules
from hipexp.run.budgets import divided
from hipexp.run.environment import to_yaml
from hipexp.run.identity import key_of, model_revision
from hipexp.run.ledger import Ledger, file_name, open_ledger, runs_root
from hipexp.run.point import check_point, load_model, resolved, token_bar
from hipexp.run.several import model_line, trained_length
from hipexp.run.strategy import describe
from hipexp.suites import infbench
from hipexp.suites.sample import LineEncoder
from hipexp.suites.scoring.statistics import describe as describe_scores
from hipexp.suites.scoring.statistics import paired_difference

if TYPE_CHECKING:
    from hipexp.hf import Loaded

VERSION = 1  # raise it when the same prompts can be measured otherwise
PARTS = ("calibration", "held out")
DEFAULTS = {"task.samples": 4}  # where the user does not say so: blocks of a text
TEXTS = 4
WORDS = (
    "outside: mass outside sinks and window; diagonal, vertical: share of it that a profile over distances or keys explains beyond an\n"
    "even spread; recall: share of it that is selected; missing: mass that is not. All held out, but for the shares; means over heads"
)
BASE, FIXED, CALIBRATED = "base", f"fixed layers 0-{EARLY - 1}", "calibrated"
# Of one text: pipeline -> layer -> recall, missing mass, mass outside sinks and window.
Held = dict[Any, dict[int, tuple[float, float, float]]]


@dataclasses.dataclass
class Bench:
    """Prompts on which pipelines are measured: ``texts`` of a subtask and length in each part. What the ledger has stays.

    ``at_hand``: the model, if it is loaded already.
    """

    experiment: Experiment
    texts: int
    ledger: Ledger
    at_hand: Loaded | None = None

    @cached_property
    def loaded(self) -> Loaded:
        """The model. Raises as :func:`model_of`."""
        return self.at_hand or model_of(self.experiment)

    @cached_property
    def layers(self) -> list[int]:
        """The layers that get the pipeline: those of every stored text, else the model's."""
        for row in self.ledger.rows:
            return sorted(map(int, next(iter(row["held"].values()))))
        return attached(self.loaded)

    def measure(
        self, part: int, pipelines: Mapping[Any, tuple[Pipeline, int]], patterns: bool = False
    ) -> tuple[list[Held], list[list[float]]]:
        """What each pipeline, its stages divided by the number beside it, holds of every text of a part; means over heads and blocks.

        And, if ``patterns`` are asked for, the three sums of ``pattern_mass`` of every layer, added over the texts.
        """
        import torch

        task = self.experiment.task
        texts = [
            (f"{PARTS[part]} {source}@{length}", 2 * i + part, source, length)
            for source in task.subtasks or []
            for length in task.contexts_tok or []
            for i in range(self.texts)
        ]
        todo = [text for text in texts if not self.ledger.has(*text[:2])]
        if todo:
            less = {name: divided(*found) for name, found in pipelines.items()}
            layers_at = lru_cache(1)(partial(judged.attentions, self.loaded, less))  # longrope's factors are those of a text's length
            with torch.inference_mode(), token_bar(sum(length for *_, length in todo)) as bar:
                for subtask, number, source, length in todo:
                    bar.set_description(f"{subtask} {number}")
                    held, sums = self._text(source, number, length, pipelines, layers_at(length), patterns)
                    told = {_word(name): {str(i): values for i, values in found.items()} for name, found in held.items()}
                    score = 100 * statistics.fmean(values[0] for found in held.values() for values in found.values())
                    self.ledger.append(recall.row_of(subtask, number, length, score) | {"held": told, "patterns": sums})
                    bar.advance_to(length)
        rows = {(row["subtask"], row["sample"]): row for row in self.ledger.rows}
        mine = [rows[text[:2]] for text in texts]
        held_of = [{name: {int(i): tuple(x) for i, x in row["held"][_word(name)].items()} for name in pipelines} for row in mine]
        return held_of, [[sum(x) for x in zip(*parts, strict=True)] for parts in zip(*(row["patterns"] for row in mine), strict=True)]

    def _text(
        self, source: str, number: int, length_tok: int, pipelines: Mapping[Any, tuple[Pipeline, int]], layers: Any, patterns: bool
    ) -> tuple[Held, list[list[float]]]:
        from hipexp import hf

        task = self.experiment.task
        encode = LineEncoder(self.loaded.tokenizer)
        prompt = infbench.make_sample(source, number, 2 * self.texts, length_tok, encode, self.experiment.seed, task.wording)
        heard, held, sums = hf.activations(self.loaded, prompt.tokens), Held(), list[list[float]]()
        for divisor in sorted({divisor for _, divisor in pipelines.values()}):
            own = dataclasses.replace(self.experiment, task=dataclasses.replace(task, divisors=[divisor]))
            text = judged.heard_text(own, heard, self.loaded.n_layers, layers, last=True)
            names = [name for name, found in pipelines.items() if found[1] == divisor]
            found = {name: list[Any]() for name in names}
            for block in range(task.samples):
                for name in names:
                    found[name].append(text(name, block))
            held |= {name: {i: _means(blocks, i) for i in heard} for name, blocks in found.items()}
            if patterns:
                sums = _patterns(own, heard, next(iter(layers.values())), self.loaded.n_layers)
        return held, sums


def attached(loaded: Loaded) -> list[int]:
    """The layers of a model that get a pipeline; the others keep their own attention."""
    return [i for i in range(loaded.n_layers) if i not in loaded.own_layers]


def model_of(experiment: Experiment) -> Loaded:
    """The model, once it had the pipeline installed. Raises ``ConfigError`` for one that cannot have it, or prompts that do not fit."""
    from hipexp import hf

    found, task, pipeline = load_model(experiment.model), experiment.task, experiment.pipeline
    assert pipeline is not None and task.contexts_tok is not None
    recall.check_lengths(experiment, LineEncoder(found.tokenizer), found.trained_tok)
    with hf.install(found.model, pipeline, found.trained_tok):
        plans = pipeline.plan(found.n_layers)
    judged.check_blocks(task, task.contexts_tok, [plans[i] for i in attached(found)])
    return found


def _word(name: Any) -> str:
    """What a pipeline is called in the ledger."""
    parts = name if isinstance(name, tuple) else (name,)
    return " ".join(part.value if isinstance(part, PruneRope) else str(part) for part in parts)


def _patterns(experiment: Experiment, heard: Any, layers: Any, n_layers: int) -> list[list[float]]:
    from hipexp.attention.patterns import pattern_mass
    from hipexp.attention.recall import logits_in_place

    assert experiment.pipeline is not None
    plans, sums = experiment.pipeline.plan(n_layers), list[list[float]]()
    for i, (q, k) in heard.items():
        logits, folds, attention = [], [], layers[i]
        for block in range(experiment.task.samples):
            begin = judged.block_of([plans[layer] for layer in heard], q.shape[1], block, experiment.task)
            for row in judged.rows_of(min(plans[i].stages[0].query_block_tok, q.shape[1] - begin)):
                n = begin + row + 1
                table = attention.tables and attention.tables.upto(n)
                logits.append(logits_in_place(q[:, n - 1], k[:, :n], attention.scale, table, attention.softcap))
                folds.append(block % 2)
        sums.append(list(pattern_mass(logits, folds, plans[i].sink_tok, plans[i].window_tok)))
    return sums


def _means(blocks: Sequence[dict[int, judged.Stages]], layer: int) -> tuple[float, float, float]:
    found = (statistics.fmean(x for block in blocks for x in block[layer][-1][name]) for name in ("mass", "missing", "fixed"))
    recalled, missing, fixed = found
    return recalled, missing, 1 - fixed


@dataclasses.dataclass
class Calibration:
    """What was found: by layer the diagonal and vertical share and the choice, the contestants, and what they hold of held-out texts.

    Of ``n_layers`` those that keep their own attention have no choice.
    """

    n_layers: int
    shares: dict[int, tuple[float, float]]
    choices: dict[int, Choice]
    divisors: list[int]
    pipelines: dict[str, Pipeline]
    held: list[Held]  # by contestant and divisor

    @property
    def base(self) -> str:
        """The contestant that it began with."""
        return BASE if BASE in self.pipelines else FIXED

    def values(self, name: str, divisor: int, what: int, layer: int | None = None) -> list[float]:
        """Recall (``what`` 0), missing mass (1) or mass outside (2) of a contestant by text, of a layer or as the mean of all."""
        return [statistics.fmean(x[what] for i, x in one[name, divisor].items() if layer in (None, i)) for one in self.held]


def calibrate(bench: Bench, name: str) -> Calibration:
    """Choose on one part of the prompts, judge on the other."""
    base, facts, divisors = bench.experiment.pipeline, read_facts(bench.experiment.model), bench.experiment.task.divisors
    assert base is not None and facts is not None and divisors is not None
    n_layers, layers = facts.layers, bench.layers
    step_tok = divisors[-1] * base.stages[-1].chunk_tok
    strategies, whole = allocation.strategies_of(base, n_layers), base.plan(n_layers)
    own, plans = [strategies[i] for i in layers], [whole[i] for i in layers]
    before = [plan.stages[-1].keep_tok for plan in plans]
    budgets = allocation.budgets_of(plans, step_tok)

    def made(choices: Sequence[Choice], name: str = "") -> Pipeline:
        """The base with these choices in the layers that get it."""
        of = dict(zip(layers, choices, strict=True))
        return planned(base, [of.get(i) for i in range(n_layers)], name)

    tried = [*STRATEGIES, *([None] if None in own else [])]
    grid = {(rope, keep): (made([(rope, keep)] * len(layers)), divisors[-1]) for rope in tried for keep in budgets}
    seen, sums = bench.measure(0, grid, patterns=True)
    ropes = [
        allocation.strategy_of(
            {rope: [statistics.fmean(one[rope, keep][i][0] for keep in budgets) for one in seen] for rope in tried}, mine
        )
        for i, mine in zip(layers, own, strict=True)
    ]
    curves = [
        {keep: statistics.fmean(one[rope, keep][i][1] for one in seen) for keep in budgets} for i, rope in zip(layers, ropes, strict=True)
    ]
    keeps, early = allocation.allocate(curves, sum(before)), [layer < EARLY for layer in layers]
    paper = [PruneRope.chunk_indexed if first else PruneRope.relative for first in early]
    fixed = allocation.shared_out(sum(before), [1 + first for first in early], step_tok)
    pipelines = {
        BASE: base,
        FIXED: made(list(zip(paper, fixed, strict=True))),
        "uniform": made([(PruneRope.relative, keep) for keep in allocation.shared_out(sum(before), [1] * len(layers), step_tok)]),
        "strategies only": made(list(zip(ropes, before, strict=True))),
        "budgets only": made(list(zip(own, keeps, strict=True))),
        CALIBRATED: made(list(zip(ropes, keeps, strict=True)), name),
    }
    if rules(base, n_layers) == rules(pipelines[FIXED], n_layers):
        del pipelines[FIXED]
        pipelines = {FIXED if name == BASE else name: one for name, one in pipelines.items()}
    pipelines = {key: one for key, one in pipelines.items() if allocation.fits(one, n_layers)}
    held, _ = bench.measure(1, {(name, divisor): (one, divisor) for name, one in pipelines.items() for divisor in divisors})
    shares = [(x / max(left, 1e-12), y / max(left, 1e-12)) for x, y, left in sums]
    choices = zip(ropes, keeps, strict=True)
    return Calibration(n_layers, dict(zip(layers, shares, strict=True)), dict(zip(layers, choices, strict=True)), divisors, pipelines, held)


def layer_table(found: Calibration) -> str:
    """By layer: what its attention follows, what was chosen, and what that holds of held-out texts where the budget is least."""
    divisor, base, rows = found.divisors[-1], found.base, list[list[Any]]()
    for i, (rope, keep) in found.choices.items():
        diagonal, vertical = found.shares[i]
        rule = PruneRope.chunk_indexed if diagonal > max(vertical, 0) else PruneRope.relative
        before = found.pipelines[base].plan(found.n_layers)[i].stages[-1]
        outside = statistics.fmean(found.values(base, divisor, 2, i))
        held = [statistics.fmean(found.values(name, divisor, what, i)) for what in (0, 1) for name in (base, CALIBRATED)]
        strategies = [rule.value, before.rope.value if before.rope else None, rope.value if rope else "as before"]
        shown = [f"{x:.3f}" for x in (outside, diagonal, vertical)]
        rows.append([i, *shown, *strategies, before.keep_tok, keep, *(f"{x:.4f}" for x in held)])
    header = ["layer", "outside", "diagonal", "vertical", "paper's rule", "strategy was", "is", "keep was", "is"]
    return text_table([*header, "recall was", "is", "missing was", "is"], rows)


def total_table(found: Calibration) -> str:
    """By divisor and contestant, all with the same total budget: means over held-out texts, and their differences from the base."""
    rows = list[list[Any]]()
    for divisor in found.divisors:
        for name in found.pipelines:
            row: list[Any] = [f"1/{divisor}" if name == next(iter(found.pipelines)) else "", name]
            for what in (0, 1):
                ours, theirs = found.values(name, divisor, what), found.values(found.base, divisor, what)
                told = paired_difference(ours, theirs)
                around = f" ({told['interval'][0]:+.4f} to {told['interval'][1]:+.4f})" if told["interval"] else ""
                row += [f"{statistics.fmean(ours):.4f}", None if name == found.base else f"{told['mean']:+.4f}{around}"]
            rows.append(row)
    return text_table(["budget", "pipeline", "recall", "difference", "missing mass", "difference"], rows, left=2)


def report(found: Calibration, experiment: Experiment) -> str:
    """Both tables and what they mean."""
    divisor = found.divisors[-1]
    chose = f"{model_line(experiment.model)}; {len(found.held)} texts chose, with 1/{divisor} of the budget, as many others judge."
    told = f"the same total budget each; differences from {found.base}, 95 % interval over texts"
    return "\n\n".join([chose, layer_table(found), WORDS, total_table(found), told])


def summary(found: Calibration, run_key: str) -> dict[str, Any]:
    """Recall of every contestant where the budget is least, in the form of a run's summary."""
    divisor = found.divisors[-1]
    held = {name: [100 * x for x in found.values(name, divisor, 0)] for name in found.pipelines}
    scores = {f"{name}/{divisor}": {"metric": "mass_recall"} | describe_scores(values) for name, values in held.items()}
    return {
        "run_key": run_key, "task": "calibrate", "status": "done", "scores": scores, "average": statistics.fmean(held[CALIBRATED]),
        "protocol": "hipexp", "note": "", "exact": False, "latency": {},
    }  # fmt: skip


def picture(path: Path, heading: str, found: Calibration) -> None:
    """Shares, budgets and held-out recall by layer; nothing where a layer keeps its own attention."""
    divisor, n = found.divisors[-1], found.n_layers

    def by_layer(values: Mapping[int, float]) -> list[float]:
        return [values.get(i, math.nan) for i in range(n)]

    both = {name: found.pipelines[name] for name in (found.base, CALIBRATED)}
    plans = {name: one.plan(n) for name, one in both.items()}
    panels: dict[str, dict[str, Sequence[float]]] = {
        "explained share of the attention": {
            name: by_layer({i: shares[part] for i, shares in found.shares.items()}) for part, name in enumerate(("diagonal", "vertical"))
        },
        "tokens kept by the last stage": {name: by_layer({i: plans[name][i].stages[-1].keep_tok for i in found.choices}) for name in both},
        f"recall, held out, 1/{divisor} of the budget": {
            name: by_layer({i: statistics.fmean(found.values(name, divisor, 0, i)) for i in found.choices}) for name in both
        },
    }
    draw_layers(path, heading, panels)


def read_words(argv: Sequence[str]) -> tuple[Experiment, dict[str, str]]:
    """The recall experiment that the words describe, and the command's own words ``name``, ``out`` and ``texts``. Raises ConfigError."""
    own = {word.split("=")[0]: word.split("=", 1)[1] for word in argv if word.startswith(("name=", "out=", "texts="))}
    words = [word for word in argv if word.split("=")[0] not in own]
    keys = {word.lstrip("+-").split("=")[0] for word in words}
    defaults = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in keys]
    experiment = compose(["task=recall", *(["+pipeline=3stage"] if "pipeline" not in keys else []), *defaults, *words])
    pipeline, task = experiment.pipeline, experiment.task
    assert pipeline is not None, "recall refuses it"
    if task.name != "recall" or task.geometry is not None:
        raise ConfigError("calibrate measures recall on prompts of a model; leave out task=… and task.geometry")
    if pipeline.method != "hip" or pipeline.decode is not None:
        what = f"pipeline.method={pipeline.method}" if pipeline.method != "hip" else "pipeline.decode"
        raise ConfigError(f"{what} cannot be calibrated: there must be stages that prefill and decode share; try +pipeline=3stage")
    if task.samples < 2:
        raise ConfigError(f"task.samples={task.samples} must be at least 2: every second block judges the patterns of the others; try 4")
    if not own.get("texts", "1").isdecimal() or int(own.get("texts", "1")) < 1:
        raise ConfigError(f"texts={own['texts']} must be a whole number from 1: prompts of a subtask that choose, and as many that judge")
    own["name"] = own.get("name") or f"{pipeline.name or 'pipeline'}_calibrated"
    check_pipeline_name(f"name={own['name']}", own["name"], group_options(conf_dir())["pipeline"])
    check_point(experiment)
    return dataclasses.replace(experiment, task=recall.filled(task, trained_length(experiment.model))), own


def main(argv: list[str]) -> int:
    """Calibrate, and write the pipeline, the tables and a picture; ``argv`` are overrides, and ``name=``, ``out=<folder>``, ``texts=``."""
    flags, words = split_flags(argv)
    experiment, own = read_words(words)
    assert experiment.pipeline is not None
    name = own["name"]
    model = experiment.model.name or experiment.model.path
    folder = Path(own["out"]).expanduser() if "out" in own else runs_root() / "calibrate" / f"{file_name(model)}_{name}"
    texts = int(own.get("texts", TEXTS))
    path = folder / f"{name}.yaml"
    loaded = None if folder.exists() else model_of(experiment)  # what it refuses leaves no folder
    with aside(flags), open_ledger(folder, hashlib.sha256(f"{VERSION} {key_of(experiment)} {texts}".encode()).hexdigest()) as ledger:
        ledger.status("running")
        ledger.write("config.yaml", to_yaml(resolved(experiment)))
        found = calibrate(Bench(experiment, texts, ledger, loaded), name)
        n_layers, best = found.n_layers, found.pipelines[CALIBRATED]
        commands = [shlex.join(["python", "-m", "hipexp", *line]) for line in ([f"+pipeline={path}"], ["calibrate", *words])]
        ledger.write(path.name, allocation.yaml_of(best, [commands[0], f"made by: {commands[1]}", model_line(experiment.model)]))
        made = compose([f"+pipeline='{path}'"]).pipeline  # what was written is what was measured
        assert made is not None and rules(made, n_layers) == rules(best, n_layers)
        text = report(found, experiment)
        ledger.write("table.txt", text + "\n")
        picture(folder / "layers.png", f"{name} on {model}", found)
        of = {"name": model, "revision": model_revision(experiment.model)}
        ledger.write("card.json", {"model": of, "strategy": describe(best, n_layers, own_layers=set(range(n_layers)) - set(found.choices))})
        ledger.write("summary.json", summary(found, ledger.key))
        ledger.status("done")
    files = {"pipeline": path, "table": folder / "table.txt", "picture": folder / "layers.png"}
    text += f"\nmore recall need not be more right answers; compare both on your task: {commands[0]} task=…"
    text += f"\npipeline: {path}\ntable:    {files['table']}\npicture:  {files['picture']}"
    answer(flags, text, {name: str(file) for name, file in files.items()}, str(path))
    return 0
