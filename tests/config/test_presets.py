"""The preset files: each composes, passes the checks, and says what the paper says."""

import pytest

from hipexp.config.check import METHODS, OFFLOADING, check_layers
from hipexp.config.compose import compose, compose_point
from hipexp.config.model import ModelFacts
from hipexp.config.overrides import DENSE, conf_dir, group_options
from hipexp.config.schema import AttendRope, Heads, PruneRope, Representative

OPTIONS = group_options(conf_dir())
PRESETS = [name for name in OPTIONS["pipeline"] if name != DENSE]
FIRST_THREE = {0, 1, 2}
SCANS = {  # how many stages score by landmarks, before those that score by all keys
    "3stage_scan": 2, "3stage_long": 2, "4stage_scan": 3, "3stage_plus": 2,
}  # fmt: skip
BLOCKS = {"3stage_long": [256, 64, 64], "3stage_plus": [64, 64, 16]}

# chunk_tok, keep_tok, query_stride_tok and refresh_steps of each stage.
THREE = [(256, 32768, 4, 16), (32, 8192, 4, 8), (8, 2048, 1, 4)]
FIVE = [(64, 32768, 4, 16), (32, 16384, 4, 8), (16, 4096, 1, 4)]
STAGES = {
    "3stage": THREE,
    "3stage_fast": [(256, 32768, 4, 32), (32, 8192, 4, 16), (8, 2048, 1, 8)],
    "3stage_flash": [(256, 32768, 4, 96), (32, 8192, 4, 24), (8, 2048, 1, 8)],
    "3stage_scan": THREE,
    "3stage_plus": THREE,
    "4stage_scan": [(256, 131072, 4, 16), *THREE],  # ours
    "3stage_long": [(256, 8192, 16, 16), (64, 2048, 4, 8), (8, 512, 1, 4)],  # ours
    "5k": FIVE,
    "3k_5k": THREE,
    "16k_shallow": [(32, 16384, 1, 8)],
    "2stage": [(256, 32768, 4, 16), (32, 2048, 1, 4)],
    "1stage": [(32, 2048, 1, 8)],
    "streaming": [],
}
OTHERS = {
    "hip_iclr25": "hip_tree",
    **{name: name for name in METHODS if name not in ("hip", "streaming", "hip_tree")},
}  # fmt: skip


def numbers(stages):
    return [(s.chunk_tok, s.keep_tok, s.query_stride_tok, s.refresh_steps) for s in stages]


def test_every_preset_is_listed_here():
    assert set(PRESETS) == set(STAGES) | set(OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_presets_of_other_methods_say_every_parameter(name):
    from hipexp.attention.methods import check_methods, method_class
    from hipexp.config.convert import fields_of

    pipeline = compose([f"+pipeline={name}"]).pipeline
    assert (pipeline.method, pipeline.stages) == (OTHERS[name], [])
    check_methods(pipeline)
    assert {"plan", *pipeline.params} == set(fields_of(method_class(pipeline.method)))


@pytest.mark.parametrize("name", STAGES)
def test_preset_has_the_published_numbers(name):
    pipeline = compose([f"+pipeline={name}"]).pipeline
    assert pipeline.name == name
    assert numbers(pipeline.stages) == STAGES[name]
    assert (pipeline.sink_tok, pipeline.window_tok, pipeline.heads) == (256, 1024, Heads.per_kv if name == "3stage_plus" else Heads.shared)
    assert pipeline.staggered_refresh is (name == "3stage_plus")
    assert (pipeline.rope.prune, pipeline.rope.attend) == (PruneRope.relative, AttendRope.streaming)
    assert [s.query_block_tok for s in pipeline.stages] == BLOCKS.get(name, [64] * len(pipeline.stages))
    assert [s.piece_tok for s in pipeline.stages] == ([256, None, None, None] if name == "4stage_scan" else [None] * len(pipeline.stages))


@pytest.mark.parametrize("name", STAGES)
def test_only_scans_have_other_scores_than_descents(name):
    for plan in compose([f"+pipeline={name}"]).pipeline.plan(5):
        for stages in (plan.stages, plan.decode):
            others = dict.fromkeys(range(SCANS.get(name, 0)), Representative.bounds)
            usual = Representative.exact if name in SCANS else Representative.descent
            assert [stage.representative for stage in stages] == [others.get(i, usual) for i in range(len(stages))]


@pytest.mark.parametrize("layers", [5, 32])
@pytest.mark.parametrize("name", PRESETS)
def test_preset_passes_the_checks_in_every_layer(name, layers):
    experiment = compose([f"+pipeline={name}"])
    check_layers(experiment, ModelFacts(layers, 6144))
    plans = experiment.pipeline.plan(layers)
    assert [plan.layer for plan in plans] == list(range(layers))
    for plan in plans:
        if name in OTHERS:
            continue
        early = plan.layer in FIRST_THREE and name != "streaming"
        assert plan.groups == (["early"] if early else [])
        assert {s.rope for s in plan.stages + plan.decode} <= {PruneRope.chunk_indexed if early else PruneRope.relative}


@pytest.mark.parametrize("name", ["3stage", "3stage_fast", "3stage_flash", *SCANS, "3k_5k"])
def test_the_first_layers_keep_twice_as_much(name):
    kept = [plan.stages[-1].keep_tok for plan in compose([f"+pipeline={name}"]).pipeline.plan(5)]
    usual = STAGES[name][-1][1]
    assert kept == [2 * usual] * 3 + [usual] * 2


def test_3k_5k_decodes_with_the_stages_of_5k():
    plans = compose(["+pipeline=3k_5k"]).pipeline.plan(32)
    assert all(numbers(plan.decode) == FIVE for plan in plans)
    assert numbers(plans[31].stages) == THREE


def test_16k_shallow_widens_the_window_of_the_first_layers():
    windows = [plan.window_tok for plan in compose(["+pipeline=16k_shallow"]).pipeline.plan(5)]
    assert windows == [131072] * 3 + [1024] * 2


def test_streaming_has_no_stages():
    pipeline = compose(["+pipeline=streaming"]).pipeline
    assert pipeline.method == "streaming" and not any(plan.stages or plan.decode for plan in pipeline.plan(5))


def test_the_methods_that_are_accepted_are_the_ones_there_are():
    from hipexp.attention.methods import method_class

    assert {"hip", "streaming"} <= set(METHODS)
    for name in METHODS:
        assert method_class(name).__module__ == f"hipexp.attention.methods.{name}"
        assert method_class(name).offloads == (name in OFFLOADING)


@pytest.mark.parametrize("group", [group for group in OPTIONS if group != "pipeline"])
def test_every_option_of_every_group_composes(group):
    for name in OPTIONS[group]:
        path = "++model.path='org/model'"
        pipeline = {key: ["+pipeline=3stage"] for key in ("recall", "host", "disk")}
        needed = ({"hf": [path], "openai": [path, "++model.base_url='http://localhost/v1'"]} | pipeline).get(name, [])
        assert getattr(compose_point([f"{group}={name}", *needed]), group).name == {"hf": "model", "openai": "model"}.get(name, name)


def test_without_a_pipeline_attention_is_dense():
    experiment = compose([])
    assert experiment.pipeline is None
    assert (experiment.model.name, experiment.task.name, experiment.task.samples, experiment.task.length_tok) == (
        "needle",
        "infbench",
        5,
        None,
    )
    assert (experiment.offload.name, experiment.track.name, experiment.seed) == ("none", "local", 0)


@pytest.mark.parametrize("path", sorted(conf_dir().rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_file_begins_with_the_command_that_uses_it(path):
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#") and "@package" not in line]
    assert any(word in comments[0] for word in ("python -m hipexp", "wandb sweep", "make ")), comments[:1]
