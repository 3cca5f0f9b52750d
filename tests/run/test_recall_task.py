"""``task=recall``: what is sampled, stored and told, with and without a model; budgets that are divided."""

from functools import partial

import pytest
import torch

from hipexp.config.compose import compose
from hipexp.config.schema import ConfigError, LayerGroup, Offload, PruneRope, StageOverride
from hipexp.run import judged, recall
from hipexp.run.budgets import divided
from hipexp.run.identity import key_of
from hipexp.run.ledger import read_json, read_rows
from hipexp.run.point import check_point, execute, report

STAGES = (
    "pipeline.stages=[{chunk_tok:32,keep_tok:256,query_block_tok:64,query_stride_tok:4},"
    "{chunk_tok:8,keep_tok:128,query_block_tok:32,query_stride_tok:1}]"
)
SMALL = [
    "+pipeline=2stage",
    STAGES,
    "pipeline.sink_tok=32",
    "pipeline.window_tok=64",
    "task=recall",
    "task.samples=2",
    "task.divisors=[1,2]",
]
ALONE = [*SMALL, "pipeline.layers.early.range=''", "task.geometry=4/2/16", "task.contexts_tok=[1024]"]


@pytest.fixture(autouse=True)
def runs(monkeypatch, tmp_path):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "runs"))


def test_of_the_embedded_model():
    one = compose([*SMALL, "task.subtasks=[passkey]", "task.contexts_tok=[600]"])
    check_point(one)
    folder = execute(one)
    rows = read_rows(folder)
    assert [(row["subtask"], row["sample"]) for row in rows] == [(f"passkey@600/{d}", b) for b in (0, 1) for d in (1, 2)]
    assert set(rows[0]["layers"]) == {"0", "1", "2", "3", "4"}
    assert all(len(stage["mass"]) == 4 for stages in rows[0]["layers"].values() for stage in stages)
    summary = read_json(folder / "summary.json")
    found = summary["recall"]["passkey@600/1"]
    first, last = found["stages"]
    assert 0 < last["mass"]["mean"] <= first["mass"]["mean"] <= 1 and last["mass"]["p5"] <= last["mass"]["mean"]
    assert found["stages"][1]["mass"]["mean"] > summary["recall"]["passkey@600/2"]["stages"][1]["mass"]["mean"]
    assert summary["scores"]["passkey@600/1"]["score"] == pytest.approx(100 * last["mass"]["mean"], abs=0.02)
    assert "passkey@600/2" in report(one, folder)


def test_without_a_model_and_resumed():
    one = compose(ALONE)
    folder = execute(one)
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    assert folder.name.startswith("4-2-16_2stage") and len(lines) == 3 * 2 * 2
    (folder / "samples.jsonl").write_text("".join(lines[:5]))
    (folder / "status.json").unlink()
    execute(one)
    assert (folder / "samples.jsonl").read_text() == "".join(lines)
    assert key_of(one) == key_of(compose([*ALONE, "model.dtype=float16"])) != key_of(compose([*ALONE, "seed=1"]))


def test_everything_kept_is_everything():
    """Stages that keep all candidates hold all of the mass, and all of what the oracle holds."""
    keep_all = STAGES.replace("keep_tok:256", "keep_tok:1024").replace("keep_tok:128", "keep_tok:1024")
    with pytest.raises(ConfigError, match="nothing is pruned"):
        execute(compose([word if word != STAGES else keep_all for word in ALONE]))
    wide = [word if word != STAGES else STAGES.replace("keep_tok:256", "keep_tok:1024") for word in ALONE]
    summary = read_json(execute(compose([*wide, "task.divisors=[1]"])) / "summary.json")
    for found in summary["recall"].values():
        assert found["stages"][0]["mass"] == {"mean": 1.0, "p5": 1.0} == found["stages"][0]["oracle_ratio"]
        assert found["stages"][1]["mass"]["mean"] < 1


@pytest.mark.parametrize("format", ["auto", "int4"])
def test_against_a_sum_over_tokens(format):
    """The mass of the last stage of one block, from the selection that prefill makes, token by token.

    Of a lossy format: the selection is that of the keys as they are kept, the mass that of the true ones.
    """
    from hipexp.attention.blocks import QueryBlocks
    from hipexp.attention.inputs import Geometry, drifting
    from hipexp.attention.method import Call
    from hipexp.attention.methods.hip import Hip
    from hipexp.attention.recall import logits_at_one_distance
    from hipexp.cache.tiers import as_kept
    from hipexp.run.attention_latency import layer_attention

    pipeline, geometry = compose(SMALL).pipeline, Geometry(4, 2, 16)
    made, begin = drifting(geometry, 640), 576
    attention = layer_attention(pipeline, geometry, torch.device("cpu"))
    own = made.prefill_queries(64)
    offload = Offload("host", format=format)
    logits = partial(logits_at_one_distance, scale=0.25, table=None, distance_tok=0)
    stages = judged.stages_of(attention, own, begin, made.keys, begin, 64, logits, offload, {})
    kept = as_kept(made.keys, format, 64, sink_tok=32)
    chosen, of_true = (
        Hip(attention.plan).select(Call(QueryBlocks.cut(own, begin, 64), keys, attention.tables, scale=1.0)) for keys in (kept, made.keys)
    )
    assert torch.equal(chosen.blocks, of_true.blocks) == (format == "auto")
    for head in range(4):
        shares = []
        for row in range(8, 64, 16):
            weights = torch.softmax(0.25 * made.keys[head // 2, : begin + row + 1] @ own[head, row], 0)
            first = begin + row // 32 * 32
            outside = range(32, first - 63)
            blocks = chosen.blocks[0, row // 32, : chosen.counts[0, row // 32]].tolist()
            inside = [t for start in blocks for t in range(start, start + 8) if t in outside]
            shares.append(float(weights[inside].sum() / weights[list(outside)].sum()))
        assert stages[-1]["mass"][head] == pytest.approx(sum(shares) / 4, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=recall"], "task=recall measures what a pipeline selects; choose one, as in"),
        ([*ALONE, "task.subtasks=[passkey]"], "task.subtasks=passkey is unknown; use drifting or isolated_needles"),
        ([*SMALL, "task.layer=2"], "task.layer=2 is for keys without a model; name a task.geometry, or leave it out"),
        ([*SMALL, "task.divisors=[0]"], r"task.divisors=\[0\] must hold whole numbers from 1"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(ConfigError, match=message):
        compose(words)


def test_budgets_that_cannot_be_divided():
    with pytest.raises(ConfigError, match=r"task.divisors: 3 does not divide pipeline.stages\[0\].keep_tok=256 into chunks of 32"):
        check_point(compose([*SMALL, "task.divisors=[3]"]))
    early = divided(compose(["+pipeline=3stage"]).pipeline, 8)
    assert [stage.keep_tok for stage in early.stages] == [4096, 1024, 256] and early.layers["early"].stages["2"].keep_tok == 512


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SMALL, "task.contexts_tok=[8192]"], r"task.contexts_tok\[0\]=8192 must be at most the trained length 6144"),
        ([*ALONE[:-1], "task.contexts_tok=[128]"], r"task.contexts_tok\[0\]=128 is too short: nothing is pruned in it"),
        ([*ALONE, "task.samples=90"], "task.samples=90 must be at most 8, the query blocks of 1024 tokens that are pruned"),
        (
            [*SMALL, "pipeline.layers.early={range: '0', stages: {'1': {chunk_tok: 32}}}", "task.divisors=[8]"],
            "task.divisors: 8 leaves too little .pipeline.stages.1..keep_tok=16 must be a multiple of .*chunk_tok=32",
        ),
        ([*ALONE, "task.layer=100000000"], "task.layer=100000000 must be a layer from 0 to 1023"),
        ([*ALONE, "task.wording=heldout"], "task.wording=heldout is for prompts of a model"),
    ],
)
def test_refusals_before_anything_loads(monkeypatch, words, message):
    monkeypatch.setattr("hipexp.run.point.load_model", lambda model: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        check_point(compose(words))


def test_a_layer_without_rope_and_blocks_of_several_sizes():
    """Nothing is rotated where there is no RoPE; layers with other query blocks are judged by the same ones."""
    from hipexp.attention.inputs import Geometry, drifting
    from hipexp.attention.recall import logits_in_place
    from hipexp.run.attention_latency import layer_attention

    pipeline, geometry = compose(SMALL).pipeline, Geometry(4, 2, 16)
    attention, made = layer_attention(pipeline, geometry, torch.device("cpu")), drifting(geometry, 640)
    for stage in attention.plan.stages:
        stage.rope = PruneRope.none
    attention.tables = None
    logits = partial(logits_in_place, scale=0.25, table=None)
    stages = judged.stages_of(attention, made.prefill_queries(64), 576, made.keys, 576, 64, logits, Offload(), {})
    assert 0 < stages[-1]["mass"][0] <= 1
    wide = compose(SMALL).pipeline
    wide.layers["early"] = LayerGroup("0", stages={"0": StageOverride(query_block_tok=128)})
    begins = [judged.block_of(wide.plan(5), 1024, number, compose([*SMALL, "task.samples=4"]).task) for number in range(4)]
    assert begins == [512, 640, 768, 896]


OTHERS = {
    "oracle": ["+pipeline=oracle", "pipeline.params.keep_tok=128", "pipeline.heads=per_kv"],
    "random": ["+pipeline=random", "pipeline.params.keep_tok=128"],
    "infllm": ["+pipeline=infllm", "pipeline.params={block_tok: 16, keep_blocks: 8, representatives: 2, query_tok: 64}"],
    "hip_iclr25": ["+pipeline=hip_iclr25", "pipeline.params.keep_tok=128"],
    "h2o": ["+pipeline=h2o", "pipeline.params.keep_tok=128"],
    "quest": ["+pipeline=quest", "pipeline.params.keep_tok=128"],
    "minference": ["+pipeline=minference", "pipeline.params={verticals: 64, slashes: 128, near_tok: 16}"],
    "xattention": ["+pipeline=xattention"],
    "kascade": ["+pipeline=kascade", "pipeline.params.keep_tok=128", "pipeline.params.anchors=[4]"],
    "streaming": ["+pipeline=streaming"],
}  # fmt: skip


def test_every_method_that_selects_has_a_recall():
    """At equal budgets none is above the oracle, none with a rule below a draw by lot; sinks and window alone hold nothing else."""
    found = {}
    for name, words in OTHERS.items():
        sizes = ["pipeline.sink_tok=0" if name in ("h2o", "quest", "minference", "xattention") else "pipeline.sink_tok=32"]
        sizes += ["pipeline.window_tok=64"] * (name not in ("minference", "xattention"))
        alone = [
            "task=recall",
            "task.geometry=2/2/16",
            "task.contexts_tok=[1024]",
            "task.samples=2",
            "task.divisors=[1]",
            "task.subtasks=[drifting]",
        ]
        summary = read_json(execute(compose([*words, *sizes, *alone, "task.layer=4"])) / "summary.json")
        (held,) = summary["recall"].values()
        found[name] = held["stages"][0]["mass"]["mean"]
    assert found["streaming"] == 0
    assert found["oracle"] > max(found[name] for name in ("infllm", "hip_iclr25", "random"))
    assert min(found[name] for name in ("infllm", "hip_iclr25", "h2o", "quest")) > found["random"]


@pytest.mark.parametrize("words", [SMALL[:1], OTHERS["oracle"]])
def test_decode_steps_select_for_one_query(words):
    """By what the layer itself selects in a decode step; every stage of it."""
    from hipexp.attention import Memory
    from hipexp.attention.inputs import Geometry, drifting
    from hipexp.attention.recall import attention_mass, chosen_tokens, fixed_tokens, logits_in_place
    from hipexp.run.attention_latency import layer_attention

    chosen = [*words, "pipeline.sink_tok=32", "pipeline.window_tok=64"] if words is OTHERS["oracle"] else SMALL
    pipeline, geometry = compose(chosen).pipeline, Geometry(4, 2, 16)
    attention, made = layer_attention(pipeline, geometry, torch.device("cpu")), drifting(geometry, 640)
    q, logits = made.prefill_queries(64), partial(logits_in_place, scale=0.25, table=None)
    stages = judged.stages_of(attention, q, 576, made.keys, 576, 64, logits, Offload(), {}, decoding=True)
    assert len(stages) == max(1, len(attention.plan.stages))
    expected = []
    for row in judged.rows_of(64):
        at, memory = 576 + row, Memory()
        asked = judged.selecting(attention, q, 576, made.keys, 576, 640, {}, True)(row)[-1]
        if attention.plan.stages:
            attention(q[:, row : row + 1], made.keys[:, : at + 1], made.values[:, : at + 1], at, memory)
            assert torch.equal(memory.lists[len(attention.plan.decode)][0], asked[0])
        held = chosen_tokens(asked[0][:, 0], asked[1][:, 0], asked[2], at + 1)
        fixed = fixed_tokens(at + 1, attention.plan.sink_tok, at + 1 - attention.plan.window_tok, torch.device("cpu"))
        expected.append(attention_mass(logits(q[:, row], made.keys[:, : at + 1]), held, fixed).recall)
    assert stages[-1]["mass"] == pytest.approx(torch.stack(expected).mean(0).tolist())


def test_a_decode_step_takes_over_what_its_own_query_chose_in_an_earlier_layer():
    """Not what another row did: of Kascade, whose first layer is dense and an anchor."""
    from hipexp.attention import Memory
    from hipexp.attention.blocks import QueryBlocks, Step
    from hipexp.attention.inputs import Geometry, drifting
    from hipexp.attention.method import Call
    from hipexp.run.attention_latency import layer_attention

    words = ["+pipeline=kascade", "pipeline.params.keep_tok=32", "pipeline.sink_tok=32", "pipeline.window_tok=64"]
    pipeline, geometry, cpu = compose(words).pipeline, Geometry(4, 2, 16), torch.device("cpu")
    anchor, other = (layer_attention(pipeline, geometry, cpu, layer) for layer in (0, 1))
    made, shared = drifting(geometry, 640), {}
    q = made.prefill_queries(64)
    everything, found = (judged.selecting(one, q, 576, made.keys, 576, 640, shared, True) for one in (anchor, other))
    for row in judged.rows_of(64):
        at = 576 + row
        query = QueryBlocks.one(q[:, row : row + 1], at, Step.at(at, 0, False, cpu))
        asked = Call(query, made.keys[:, : at + 1], anchor.tables, anchor.scale, True, Memory(), None, {})
        anchor.method.observe(asked)
        ((blocks, counts, _, _),), expected = found(row), other.method.select(asked)
        assert torch.equal(blocks, expected.blocks) and torch.equal(counts, expected.counts)
        assert everything(row)[0][1].item() == 640


def test_phases_of_recall():
    with pytest.raises(
        ConfigError, match=r"task.phases=\['decode', 'prefill'\] must name one of decode, prefill for task=recall; try \[decode\]"
    ):
        check_point(compose([*SMALL, "task.phases=[decode,prefill]"]))
    usual, said, other = (compose([*SMALL, *words]) for words in ((), ["task.phases=[prefill]"], ["task.phases=[decode]"]))
    assert recall.filled(usual.task, 6144) == recall.filled(said.task, 6144) != recall.filled(other.task, 6144)


def test_a_block_is_judged_by_its_own_selection_where_later_queries_decide():
    """MInference selects for all that is read at once; of what it reads, the last key of every row is in its own block."""
    from hipexp.attention.inputs import Geometry, drifting
    from hipexp.attention.recall import logits_in_place
    from hipexp.run.attention_latency import layer_attention

    pipeline, geometry = compose(OTHERS["minference"]).pipeline, Geometry(2, 2, 16)
    attention, made = layer_attention(pipeline, geometry, torch.device("cpu")), drifting(geometry, 2048)
    q, logits = made.prefill_queries(2048), partial(logits_in_place, scale=0.25, table=None)
    whole = judged.stages_of(attention, q, 0, made.keys, 1024, 64, logits, Offload(), {})
    found = judged.selecting(attention, q, 0, made.keys, 1024, 1088, {})
    ((starts, counts, chunk_tok, decoding),) = found(0)
    assert starts.shape[1] == counts.shape[1] == 1 and chunk_tok == 1 and not decoding
    assert int(starts.max()) < 1024 and 0 < min(whole[0]["mass"]) <= max(whole[0]["mass"]) <= 1


def test_divided_params_in_groups_and_what_they_hold():
    words = ["+pipeline=oracle", "+pipeline.layers.low.range=0", "+pipeline.layers.low.params.keep_tok=1024"]
    less = divided(compose(words).pipeline, 8)
    assert less.params["keep_tok"] == 256 and less.layers["low"].params == {"keep_tok": 128}
    with pytest.raises(ConfigError, match=r"8 does not divide pipeline\.layers\.low\.params\.keep_tok=12"):
        divided(compose([*words, "pipeline.layers.low.params.keep_tok=12"]).pipeline, 8)
    plan = compose(words).pipeline.plan_alone(None)
    assert judged._sizes(plan, 8) == (64, 256 + 1024 + 256)


def test_what_remembers_is_told_the_whole_prompt(monkeypatch):
    from hipexp.attention.inputs import Queries

    asked, prefill = [], Queries.prefill
    monkeypatch.setattr(Queries, "prefill", lambda self, n: asked.append(n) or prefill(self, n))
    alone = ["task=recall", "task.geometry=2/2/16", "task.contexts_tok=[1024]", "task.samples=1", "task.divisors=[1]"]
    for name in ("infllm", "oracle"):
        sizes = ["pipeline.sink_tok=32", "pipeline.window_tok=64", "task.subtasks=[drifting]"]
        execute(compose([*OTHERS[name], *sizes, *alone]))
    assert asked == [1024, 512]


@pytest.mark.parametrize(
    "words, message",
    [
        (["+pipeline=quest", "task.divisors=[8]"], r"8 leaves too little .*keep_tok=414 must be a multiple of page_tok=16; try 400"),
        (["+pipeline=kascade", "task.geometry=4/2/16"], r"task.layer=31 takes over what layer 14 selects .* try task.layer=14"),
        (["+pipeline=oracle", "task.geometry=4/2/16", "task.contexts_tok=[1024]", "task.divisors=[8]"], "is too short: nothing is pruned"),
        (["+pipeline=ntk"], "method=ntk attends to everything"),
    ],
)
def test_methods_are_refused_before_anything_loads(monkeypatch, words, message):
    monkeypatch.setattr("hipexp.run.point.load_model", lambda model: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        check_point(compose(["task=recall", *words]))


def test_a_bound_by_true_positions_is_judged_there():
    """What holds most attention at true positions holds no less of it than at any other measure."""
    alone = ["task=recall", "task.geometry=2/2/16", "task.contexts_tok=[1024]", "task.samples=1", "task.divisors=[1]"]
    sizes = ["pipeline.sink_tok=32", "pipeline.window_tok=64", "task.subtasks=[drifting]", "pipeline.rope.prune=native"]
    summary = read_json(execute(compose([*OTHERS["oracle"], *sizes, *alone])) / "summary.json")
    (held,) = summary["recall"].values()
    assert held["stages"][0]["oracle_ratio"]["mean"] > 0.9


def test_what_selects_nothing_has_no_recall():
    with pytest.raises(ConfigError, match="method=streaming has no budget to divide by 4; use"):
        recall.check_budgets(compose(["+pipeline=streaming", "task=recall"]))
    with pytest.raises(ConfigError, match="attends to everything"):
        execute(compose(["+pipeline=ntk", "task=recall", "task.geometry=4/2/16", "task.contexts_tok=[1024]", "task.divisors=[1]"]))
