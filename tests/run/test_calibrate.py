"""``python -m hipexp calibrate``: how budgets are shared out, what is written, and that it is what was measured."""

import dataclasses
import itertools
import json
import random
import statistics

import matplotlib.image
import pytest

from hipexp.config.compose import compose
from hipexp.config.schema import ConfigError, LayerGroup, PruneRope, RopeOverride, Stage, StageOverride, spans
from hipexp.hf.families import FAMILIES
from hipexp.report.runs import Run
from hipexp.run import allocation, calibrate, judged, models_table
from hipexp.run.allocation import allocate, budgets_of, planned, rules, shared_out, strategies_of, strategy_of, yaml_of
from hipexp.run.ledger import RunFailed, open_ledger
from hipexp.run.point import load_model

STAGES = (
    "pipeline.stages=[{chunk_tok:32,keep_tok:256,query_block_tok:64,query_stride_tok:4},"
    "{chunk_tok:8,keep_tok:128,query_block_tok:32,query_stride_tok:1}]"
)
SMALL = [STAGES, "+pipeline=2stage", "pipeline.sink_tok=32", "pipeline.window_tok=64", "task.divisors=[1,2]", "task.samples=2"]
TEXT = ["task.subtasks=[passkey]", "task.contexts_tok=[600]"]
RELATIVE, CHUNKS = PruneRope.relative, PruneRope.chunk_indexed


@pytest.fixture(autouse=True)
def runs(monkeypatch, tmp_path):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "runs"))


def base(name="3stage"):
    return compose([f"+pipeline={name}"]).pipeline


def test_budgets_are_those_of_the_least_missing_mass():
    """Against all combinations, on convex curves."""
    rng = random.Random(0)
    for _ in range(20):
        curves = []
        for _ in range(3):
            falls = sorted((rng.random() for _ in range(4)), reverse=True)
            curves.append({64 * (i + 1): 4 - sum(falls[:i]) for i in range(5)})
        total = 64 * rng.randrange(3, 16)
        keeps = allocate(curves, total)
        best = min(
            sum(curve[keep] for curve, keep in zip(curves, combination, strict=True))
            for combination in itertools.product(*curves)
            if sum(combination) == total
        )
        assert sum(keeps) == total
        assert sum(curve[keep] for curve, keep in zip(curves, keeps, strict=True)) == pytest.approx(best)


def test_a_flat_part_before_a_steep_one_hides_nothing():
    late, steady = {64: 1.0, 128: 1.0, 192: 0.0}, {64: 1.0, 128: 0.8, 192: 0.6}
    assert allocate([steady, late], 256) == [64, 192]


def test_shares_of_a_budget():
    assert shared_out(16384, [2, 2, 2, 1, 1], 64) == [4096, 4096, 4096, 2048, 2048]
    keeps = shared_out(16384, [1] * 5, 64)
    assert sum(keeps) == 16384 and max(keeps) - min(keeps) == 64 and all(keep % 64 == 0 for keep in keeps)


def test_a_strategy_gives_way_to_a_surely_better_one_only():
    sure = {RELATIVE: [0.5, 0.6, 0.7, 0.8], CHUNKS: [0.55, 0.64, 0.76, 0.85]}
    doubtful = {RELATIVE: [0.5, 0.6, 0.7, 0.8], CHUNKS: [0.9, 0.3, 0.9, 0.7]}
    assert strategy_of(sure, RELATIVE) is CHUNKS
    assert strategy_of(doubtful, RELATIVE) is RELATIVE
    assert strategy_of(doubtful, CHUNKS) is CHUNKS
    assert strategy_of({CHUNKS: [0.9], RELATIVE: [0.1]}, RELATIVE) is RELATIVE


def test_ranges():
    assert [spans(x) for x in ([0], [0, 1], [0, 1, 2, 5], [1, 3, 4])] == ["0", "0-1", "0-2,5", "1,3-4"]


def test_what_is_planned_is_what_layers_do():
    choices = [(CHUNKS, 512), (RELATIVE, 1024), (CHUNKS, 512), (RELATIVE, 8192), (PruneRope.infllm, 64)]
    made = planned(base(), choices)
    assert "early" not in made.layers  # all that it said is said otherwise
    for plan, (rope, keep) in zip(made.plan(5), choices, strict=True):
        assert {stage.rope for stage in plan.stages} == {rope}
        assert [stage.keep_tok for stage in plan.stages] == [32768, 8192, keep]
    assert rules(planned(made, choices), 5) == rules(made, 5)


def test_what_a_group_says_besides_stays():
    one = base()
    early = LayerGroup("0-2", RopeOverride(CHUNKS), {"1": StageOverride(keep_tok=4096), "2": StageOverride(keep_tok=4096)}, window_tok=2048)
    made = planned(dataclasses.replace(one, layers={"early": early}), [(RELATIVE, 1024)] * 5)
    assert [(plan.window_tok, plan.stages[1].keep_tok, plan.stages[2].keep_tok) for plan in made.plan(5)] == [
        *[(2048, 4096, 1024)] * 3,
        *[(1024, 8192, 1024)] * 2,
    ]


def test_strategies_and_budgets_of_a_base():
    assert strategies_of(base(), 5) == [CHUNKS] * 3 + [RELATIVE] * 2
    mixed = dataclasses.replace(base(), stages=[Stage(32, 256), Stage(8, 128, rope=PruneRope.none)], layers={})
    assert strategies_of(mixed, 1) == [None]
    assert budgets_of(base().plan(5), 64) == [512, 1024, 2048, 3072, 4096, 8192]
    assert planned(mixed, [(None, 64)]).plan(1)[0].stages[1].rope is PruneRope.none


@pytest.mark.parametrize("name", ["3stage", "3stage_scan", "1stage"])
def test_the_file_is_the_pipeline(name, tmp_path):
    made = planned(base(name), [(CHUNKS, 512), (RELATIVE, 1024), (CHUNKS, 512), (RELATIVE, 2048), (None, 64)])
    made = dataclasses.replace(made, heads=type(made.heads).per_kv, late_refresh=True)
    (tmp_path / "mine.yaml").write_text(yaml_of(made, ["made here"]))
    read = compose([f"+pipeline={tmp_path}/mine.yaml"]).pipeline
    assert read.name == "mine" and rules(read, 5) == rules(made, 5)


@pytest.mark.parametrize("longrope", [False, True])
def test_texts_are_measured_as_task_recall_does(longrope, monkeypatch, tmp_path):
    """By the mean over blocks and heads of what ``task=recall`` makes of the same prompt; under longrope with the factors of its length."""
    make_sample = judged.infbench.make_sample
    monkeypatch.setattr(judged.infbench, "make_sample", lambda source, index, count, *more: make_sample(source, 0, 1, *more))
    words = []
    if longrope:  # short factors up to 1024 tokens, trained to 2048
        family = FAMILIES["Phi-3, Phi-4-mini (longrope, partial RoPE)"]
        kind = family.sizes["rope_parameters"] | {"original_max_position_embeddings": 1024}
        changes = dict(rope_parameters=kind, original_max_position_embeddings=1024, max_position_embeddings=2048)
        changed = dataclasses.replace(family, sizes=family.sizes | changes)
        words = ["model=hf", f"model.path={models_table.checkpoint(changed, tmp_path / 'model')}"]
    experiment, own = calibrate.read_words([*SMALL, *TEXT, *words])
    loaded = load_model(experiment.model)
    with open_ledger(tmp_path / "calibration", "key") as ledger:
        bench = calibrate.Bench(experiment, 1, ledger)
        (held,), patterns = bench.measure(0, {"base": (experiment.pipeline, 2)}, patterns=True)
    alone = dataclasses.replace(experiment, task=dataclasses.replace(experiment.task, divisors=[2]))
    text = judged.text_of(alone, loaded, "passkey", 600)
    blocks = [text(2, block) for block in range(2)]
    for layer in range(loaded.n_layers):
        recalled, missing, fixed = (
            statistics.fmean(x for block in blocks for x in block[layer][-1][name]) for name in ("mass", "missing", "fixed")
        )
        assert held["base"][layer] == pytest.approx((recalled, missing, 1 - fixed))
        assert missing <= 1 - fixed + 1e-6
    assert all(left > 0 for _, _, left in patterns) and own == {"name": "2stage_calibrated"}


def test_a_calibration(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(allocation, "BUDGETS", (1 / 2, 1, 2))
    monkeypatch.setattr(calibrate, "STRATEGIES", (CHUNKS, RELATIVE))
    words = [*SMALL, *TEXT, "texts=1", "name=mine", f"out={tmp_path}/he, re"]
    assert calibrate.main(words) == 0
    made = compose([f"+pipeline='{tmp_path}/he, re/mine.yaml'"]).pipeline
    keeps = [plan.stages[-1].keep_tok for plan in made.plan(5)]
    assert sum(keeps) == 5 * 128 and all(keep % 16 == 0 and 64 <= keep <= 256 for keep in keeps)
    out = capsys.readouterr().out
    assert out.count("fixed layers 0-2") == 2 and "calibrated" in out
    assert out.startswith((tmp_path / "he, re" / "table.txt").read_text().rstrip())
    assert matplotlib.image.imread(tmp_path / "he, re" / "layers.png").std() > 0.05
    folder = tmp_path / "he, re"
    assert Run(folder).state == "done"
    lines = (folder / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["subtask"].split(" passkey")[0] for line in lines] == ["calibration", "held out"]

    written = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(calibrate, "load_model", lambda model: pytest.fail("there is nothing to measure"))
    assert calibrate.main(words) == 0
    assert capsys.readouterr().out == out
    same = ("mine.yaml", "table.txt", "samples.jsonl", "summary.json")
    assert all((folder / name).read_bytes() == written[name] for name in same)
    with pytest.raises(RunFailed, match="belongs to another run"):
        calibrate.main([*words, "seed=7"])


def test_a_killed_calibration_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(allocation, "BUDGETS", (1, 2))
    monkeypatch.setattr(calibrate, "STRATEGIES", (CHUNKS, RELATIVE))
    words = [*SMALL, *TEXT, "texts=1", f"out={tmp_path}/here"]
    assert calibrate.main(words) == 0
    whole, out = (tmp_path / "here" / "samples.jsonl").read_bytes(), capsys.readouterr().out
    (tmp_path / "here" / "samples.jsonl").write_bytes(whole[: whole.index(b"\n") + 30])
    assert calibrate.main(words) == 0
    assert capsys.readouterr().out == out
    assert (tmp_path / "here" / "samples.jsonl").read_bytes() == whole


def of_family(name, folder, **changes):
    """Words for a model of a family with four layers, trained to 1024 tokens."""
    family = FAMILIES[name]
    longer = dataclasses.replace(family, sizes={**family.sizes, "max_position_embeddings": 1024, **changes})
    return ["model=hf", f"model.path={models_table.checkpoint(longer, folder)}"]


@pytest.mark.parametrize("family", ["Gemma 3 (windows)", "Qwen 3-Next (linear attention)", "Gemma 3n (shared keys)"])
def test_layers_with_their_own_attention_are_left_out(family, tmp_path, monkeypatch, capsys):
    """The others share what they kept together; what the base says of layers 0-2 stays where it is of no use."""
    monkeypatch.setattr(allocation, "BUDGETS", (1 / 2, 1, 2))
    monkeypatch.setattr(calibrate, "STRATEGIES", (CHUNKS, RELATIVE))
    groups = ["+pipeline.layers.early={range: 0-2, stages: {1: {keep_tok: 256}}}"]
    words = [*SMALL, *TEXT, *groups, *of_family(family, tmp_path / "model"), "texts=1", f"out={tmp_path}/here", "name=mine"]
    assert calibrate.main(words) == 0
    out, n = capsys.readouterr().out, 6 if "3n" in family else 4
    attached = [0] if "3n" in family else [1, 3]
    rows = [json.loads(line) for line in (tmp_path / "here" / "samples.jsonl").read_text().splitlines()]
    assert {layer for row in rows for held in row["held"].values() for layer in held} == {str(i) for i in attached}
    assert all(len(row["patterns"]) in (0, len(attached)) for row in rows)
    made, before = compose([f"+pipeline='{tmp_path}/here/mine.yaml'"]).pipeline.plan(n), calibrate.read_words(words)[0].pipeline.plan(n)
    assert sum(made[i].stages[-1].keep_tok for i in attached) == sum(before[i].stages[-1].keep_tok for i in attached)
    for i in set(range(n)) - set(attached):
        assert dataclasses.replace(made[i], groups=[]) == dataclasses.replace(before[i], groups=[])
    lines = out.split("layer  outside")[1].split("\n\n")[0].splitlines()[1:]
    assert [int(line.split()[0]) for line in lines if line.split()[0].isdecimal()] == attached
    strategy = "\n".join(json.loads((tmp_path / "here" / "card.json").read_text())["strategy"])
    assert all(f"layer {i} (" in strategy for i in attached) and "layer 2" not in strategy

    monkeypatch.setattr(calibrate, "load_model", lambda model: pytest.fail("there is nothing to measure"))
    assert calibrate.main(words) == 0 and capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("family", "changes", "words", "message"),
    [
        ("Mistral 0.2", {"sliding_window": 40}, [], "no layer of it sees all tokens"),
        ("Llama 3", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, [], "RoPE of type 'dynamic'"),
        ("Gemma 3 (windows)", {}, ["task.contexts_tok=[300]"], r"task\.contexts_tok\[0\]=300 is too short: nothing is pruned"),
        ("Gemma 3 (windows)", {}, ["task.samples=99"], r"task\.samples=99 must be at most"),
    ],
)
def test_what_is_refused_leaves_no_folder(family, changes, words, message, tmp_path):
    asked = {word.split("=")[0] for word in words}
    kept = [word for word in [*SMALL, *TEXT] if word.split("=")[0] not in asked]
    with pytest.raises(ConfigError, match=message):
        calibrate.main([*kept, *words, *of_family(family, tmp_path / "model", **changes), f"out={tmp_path}/here"])
    assert not (tmp_path / "here").exists()


def test_contestants_that_fit(tmp_path):
    one = base()
    assert allocation.fits(one, 5)
    assert not allocation.fits(planned(one, [(RELATIVE, 16384)] * 5), 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+pipeline=quest"], r"pipeline\.method=quest cannot be calibrated"),
        (["+pipeline=3k_5k"], r"pipeline\.decode cannot be calibrated"),
        (["task.samples=1"], r"task\.samples=1 must be at least 2"),
        (["texts=0"], "texts=0 must be a whole number from 1"),
        (["texts=00"], "texts=00 must be a whole number from 1"),
        (["name=3stage"], "name=3stage has the name of another pipeline"),
        (["name=v1.2"], "name=v1.2 must be called by letters"),
        (["name=12"], "name=12 must be called by a word"),
        (["task=passkey"], "second time|measures recall"),
        (["task.divisors=[7]"], r"task\.divisors: 7 does not divide"),
    ],
)
def test_what_cannot_be_calibrated(words, message):
    with pytest.raises(ConfigError, match=message):
        calibrate.read_words(words)
