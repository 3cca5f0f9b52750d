"""``python -m hipexp calibrate``: give every layer of a pipeline the RoPE strategy and the budget that hold the most of its attention.

On prompts as ``task=recall`` reads, of the trained length, with what stages keep divided by the largest of ``task.divisors``: so they stand
for prompts so many times as long. Of the prompts, every second one chooses; the others, which differ in text and place of what is asked,
judge, at all divisors. Whatever is chosen, the last stages of all layers together keep as much as those of the pipeline it began with.
"""

from __future__ import annotations

import dataclasses
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipexp.config.compose import compose
from hipexp.config.overrides import check_pipeline_name, conf_dir, group_options
from hipexp.config.schema import ConfigError, Experiment, Pipeline, PruneRope
from hipexp.report.figures import draw_layers
from hipexp.report.tables import text_table
from hipexp.run import allocation, recall
from hipexp.run.allocation import EARLY, STRATEGIES, Choice, planned, rules
from hipexp.run.ledger import file_name, make_folder, runs_root, write_text
from hipexp.run.point import check_point, load_model, token_bar
from hipexp.run.several import model_line, trained_length
from hipexp.suites import infbench
from hipexp.suites.sample import LineEncoder
from hipexp.suites.scoring.statistics import paired_difference

if TYPE_CHECKING:
    from hipexp.hf import Loaded

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
    """The model and the prompts on which pipelines are measured; ``texts``: prompts of a subtask and length in each part."""

    experiment: Experiment
    loaded: Loaded
    texts: int

    def measure(self, part: int, pipelines: Mapping[Any, tuple[Pipeline, int]], patterns: list[list[float]] | None = None) -> list[Held]:
        """What each pipeline, its stages divided by the number beside it, holds of every text of a part; means over heads and blocks.

        ``patterns``: the three sums of ``pattern_mass`` of every layer, to which those of the texts are added.
        """
        import torch

        from hipexp import hf

        task, out = self.experiment.task, list[Held]()
        encode = LineEncoder(self.loaded.tokenizer)
        layers = recall.attentions(self.loaded, {name: recall.divided(*found) for name, found in pipelines.items()})
        todo = [
            (source, length, 2 * i + part)
            for source in task.subtasks or []
            for length in task.contexts_tok or []
            for i in range(self.texts)
        ]
        with torch.inference_mode(), token_bar(sum(length for _, length, _ in todo)) as bar:
            for source, length, index in todo:
                bar.set_description(f"{PARTS[part]}: {source} {index}")
                prompt = infbench.make_sample(source, index, 2 * self.texts, length, encode, self.experiment.seed, task.wording)
                heard, held = hf.activations(self.loaded, prompt.tokens), Held()
                for divisor in sorted({divisor for _, divisor in pipelines.values()}):
                    own = self._dividing(divisor)
                    text = recall.heard_text(own, heard, layers, last=True)
                    names = [name for name, found in pipelines.items() if found[1] == divisor]
                    found = {name: list[Any]() for name in names}
                    for block in range(task.samples):
                        for name in names:
                            found[name].append(text(name, block))
                    held |= {name: {i: _means(blocks, i) for i in heard} for name, blocks in found.items()}
                    if patterns is not None:
                        self._add_patterns(own, heard, next(iter(layers.values())), patterns)
                out.append(held)
                bar.advance_to(length)
        return out

    def _dividing(self, divisor: int) -> Experiment:
        return dataclasses.replace(self.experiment, task=dataclasses.replace(self.experiment.task, divisors=[divisor]))

    def _add_patterns(self, experiment: Experiment, heard: Any, layers: Any, patterns: list[list[float]]) -> None:
        from hipexp.attention.patterns import pattern_mass
        from hipexp.attention.recall import logits_in_place

        assert experiment.pipeline is not None
        plans = experiment.pipeline.plan(len(heard))
        for i, (q, k) in heard.items():
            logits, folds, attention = [], [], layers[i]
            for block in range(experiment.task.samples):
                begin = recall.block_of(plans, q.shape[1], block, experiment.task)
                for row in recall.rows_of(min(plans[i].stages[0].query_block_tok, q.shape[1] - begin)):
                    n = begin + row + 1
                    table = attention.tables and attention.tables.upto(n)
                    logits.append(logits_in_place(q[:, n - 1], k[:, :n], attention.scale, table))
                    folds.append(block % 2)
            found = pattern_mass(logits, folds, plans[i].sink_tok, plans[i].window_tok)
            patterns[i] = [a + b for a, b in zip(patterns[i], found, strict=True)]


def _means(blocks: Sequence[dict[int, recall.Stages]], layer: int) -> tuple[float, float, float]:
    found = (statistics.fmean(x for block in blocks for x in block[layer][-1][name]) for name in ("mass", "missing", "fixed"))
    recalled, missing, fixed = found
    return recalled, missing, 1 - fixed


@dataclasses.dataclass
class Calibration:
    """What was found: by layer the diagonal and vertical share and the choice, the contestants, and what they hold of held-out texts."""

    shares: list[tuple[float, float]]
    choices: list[Choice]
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
    base, n_layers, divisors = bench.experiment.pipeline, bench.loaded.n_layers, bench.experiment.task.divisors
    assert base is not None and divisors is not None
    step_tok = divisors[-1] * base.stages[-1].chunk_tok
    own, before = allocation.strategies_of(base, n_layers), [plan.stages[-1].keep_tok for plan in base.plan(n_layers)]
    budgets = allocation.budgets_of(base, n_layers, step_tok)
    tried = [*STRATEGIES, *([None] if None in own else [])]
    grid = {(rope, keep): (planned(base, [(rope, keep)] * n_layers), divisors[-1]) for rope in tried for keep in budgets}
    sums = [[0.0, 0.0, 0.0] for _ in range(n_layers)]
    seen = bench.measure(0, grid, sums)
    ropes = [
        allocation.strategy_of(
            {rope: [statistics.fmean(one[rope, keep][i][0] for keep in budgets) for one in seen] for rope in tried}, own[i]
        )
        for i in range(n_layers)
    ]
    curves = [{keep: statistics.fmean(one[rope, keep][i][1] for one in seen) for keep in budgets} for i, rope in enumerate(ropes)]
    keeps, early = allocation.allocate(curves, sum(before)), [layer < EARLY for layer in range(n_layers)]
    paper = [PruneRope.chunk_indexed if first else PruneRope.relative for first in early]
    fixed = allocation.shared_out(sum(before), [1 + first for first in early], step_tok)
    pipelines = {
        BASE: base,
        FIXED: planned(base, list(zip(paper, fixed, strict=True))),
        "uniform": planned(base, [(PruneRope.relative, keep) for keep in allocation.shared_out(sum(before), [1] * n_layers, step_tok)]),
        "strategies only": planned(base, list(zip(ropes, before, strict=True))),
        "budgets only": planned(base, list(zip(own, keeps, strict=True))),
        CALIBRATED: planned(base, list(zip(ropes, keeps, strict=True)), name),
    }
    if rules(base, n_layers) == rules(pipelines[FIXED], n_layers):
        del pipelines[FIXED]
        pipelines = {FIXED if name == BASE else name: one for name, one in pipelines.items()}
    held = bench.measure(1, {(name, divisor): (one, divisor) for name, one in pipelines.items() for divisor in divisors})
    shares = [(x / max(left, 1e-12), y / max(left, 1e-12)) for x, y, left in sums]
    return Calibration(shares, list(zip(ropes, keeps, strict=True)), divisors, pipelines, held)


def layer_table(found: Calibration) -> str:
    """By layer: what its attention follows, what was chosen, and what that holds of held-out texts where the budget is least."""
    divisor, base, rows = found.divisors[-1], found.base, list[list[Any]]()
    for i, ((diagonal, vertical), (rope, keep)) in enumerate(zip(found.shares, found.choices, strict=True)):
        rule = PruneRope.chunk_indexed if diagonal > max(vertical, 0) else PruneRope.relative
        before = found.pipelines[base].plan(len(found.choices))[i].stages[-1]
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


def picture(path: Path, heading: str, found: Calibration) -> None:
    """Shares, budgets and held-out recall by layer."""
    divisor, n = found.divisors[-1], len(found.choices)
    both = {name: found.pipelines[name] for name in (found.base, CALIBRATED)}
    panels: dict[str, dict[str, Sequence[float]]] = {
        "explained share of the attention": {"diagonal": [x for x, _ in found.shares], "vertical": [y for _, y in found.shares]},
        "tokens kept by the last stage": {name: [plan.stages[-1].keep_tok for plan in one.plan(n)] for name, one in both.items()},
        f"recall, held out, 1/{divisor} of the budget": {
            name: [statistics.fmean(found.values(name, divisor, 0, i)) for i in range(n)] for name in both
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
    experiment, own = read_words(argv)
    assert experiment.pipeline is not None
    name = own["name"]
    model = experiment.model.name or experiment.model.path
    folder = Path(own["out"]).expanduser() if "out" in own else runs_root() / "calibrate" / f"{file_name(model)}_{name}"
    make_folder(folder)
    loaded = load_model(experiment.model)
    recall.check_lengths(experiment, LineEncoder(loaded.tokenizer), loaded.trained_tok)
    found = calibrate(Bench(experiment, loaded, int(own.get("texts", TEXTS))), name)
    path = folder / f"{name}.yaml"
    commands = [shlex.join(["python", "-m", "hipexp", *words]) for words in ([f"+pipeline={path}"], ["calibrate", *argv])]
    lines = [commands[0], f"made by: {commands[1]}", model_line(experiment.model)]
    write_text(path, allocation.yaml_of(found.pipelines[CALIBRATED], lines))
    made = compose([f"+pipeline='{path}'"]).pipeline  # what was written is what was measured
    assert made is not None and rules(made, loaded.n_layers) == rules(found.pipelines[CALIBRATED], loaded.n_layers)
    divisor = found.divisors[-1]
    text = "\n\n".join(
        [
            f"{model_line(experiment.model)}; {len(found.held)} texts chose, with 1/{divisor} of the budget, as many others judge.",
            layer_table(found),
            WORDS,
            total_table(found),
            f"the same total budget each; differences from {found.base}, 95 % interval over texts",
        ]
    )
    write_text(folder / "table.txt", text + "\n")
    picture(folder / "layers.png", f"{name} on {model}", found)
    print(text)
    print(f"pipeline: {path}\ntable:    {folder / 'table.txt'}\npicture:  {folder / 'layers.png'}")
    return 0
