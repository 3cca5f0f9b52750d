"""Layer ranges, and which override wins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipexp.config.schema import (
    AttendRope,
    ConfigError,
    LayerGroup,
    Pipeline,
    PruneRope,
    Rope,
    RopeOverride,
    Stage,
    StageOverride,
    select_layers,
)

RANGES = {
    "0-2": {0, 1, 2},
    "0,3,31": {0, 3},
    "3-": {3, 4},
    "-1": {4},
    "-2--1": {3, 4},
    "-3-": {2, 3, 4},
    "": set(),
    " 1 , 2 ": {1, 2},
    "4-9": {4},
    "0": {0},
}


@pytest.mark.parametrize("text, layers", RANGES.items())
def test_ranges(text, layers):
    assert select_layers(text, 5) == layers


@pytest.mark.parametrize("text", ["a", "1-2-3", "1;2", "1,,2", "-", "1.0", "3-1", "5", "7-", "-9"])
def test_bad_ranges_name_the_key(text):
    with pytest.raises(ConfigError, match="the key="):
        select_layers(text, 5, "the key")


@given(st.sets(st.integers(0, 31), min_size=1))
def test_a_list_of_layers_selects_them(layers):
    assert select_layers(",".join(map(str, sorted(layers))), 32) == layers


def pipeline(**groups):
    """Two stages, of which the second has a RoPE of its own, and layer groups."""
    stages = [Stage(64, 4096), Stage(16, 1024, rope=PruneRope.infllm)]
    return Pipeline(stages=stages, rope=Rope(PruneRope.native, AttendRope.dynamic), layers=groups)


def ropes(plan):
    return [stage.rope for stage in plan.stages]


def test_rope_of_a_stage_wins_over_the_pipeline():
    assert ropes(pipeline().plan(1)[0]) == [PruneRope.native, PruneRope.infllm]


def test_rope_of_a_group_wins_over_a_stage():
    group = LayerGroup("0", rope=RopeOverride(PruneRope.relative, AttendRope.streaming))
    inside, outside = pipeline(g=group).plan(2)
    assert ropes(inside) == [PruneRope.relative] * 2 and inside.attend is AttendRope.streaming
    assert ropes(outside) == [PruneRope.native, PruneRope.infllm] and outside.attend is AttendRope.dynamic


def test_rope_of_a_stage_of_a_group_wins_over_all():
    group = LayerGroup("0", rope=RopeOverride(PruneRope.relative), stages={"1": StageOverride(rope=PruneRope.dynamic)})
    assert ropes(pipeline(g=group).plan(1)[0]) == [PruneRope.relative, PruneRope.dynamic]


def test_a_later_group_wins():
    first = LayerGroup("0-1", rope=RopeOverride(PruneRope.relative), stages={"1": StageOverride(keep_tok=512)}, window_tok=2048)
    second = LayerGroup("1-2", stages={"0": StageOverride(rope=PruneRope.dynamic), "1": StageOverride(keep_tok=256)}, window_tok=512)
    plans = pipeline(first=first, second=second).plan(3)
    assert [plan.groups for plan in plans] == [["first"], ["first", "second"], ["second"]]
    assert [plan.window_tok for plan in plans] == [2048, 512, 512]
    assert [plan.stages[1].keep_tok for plan in plans] == [512, 256, 256]
    assert [ropes(plan)[0] for plan in plans] == [PruneRope.relative, PruneRope.dynamic, PruneRope.dynamic]


def test_a_later_group_wins_over_a_single_stage_of_an_earlier_one():
    first = LayerGroup("0", stages={"0": StageOverride(rope=PruneRope.dynamic)})
    second = LayerGroup("0", rope=RopeOverride(PruneRope.relative))
    assert ropes(pipeline(first=first, second=second).plan(1)[0]) == [PruneRope.relative] * 2


def test_stage_overrides_of_a_group_leave_decode_stages_of_their_own_alone():
    group = LayerGroup("0", rope=RopeOverride(PruneRope.relative), stages={"0": StageOverride(keep_tok=2048)})
    same, other = pipeline(g=group), pipeline(g=group)
    other.decode = [Stage(32, 8192)]
    assert same.plan(1)[0].decode == same.plan(1)[0].stages
    assert other.plan(1)[0].decode == [Stage(32, 8192, rope=PruneRope.relative)]
    assert other.plan(1)[0].stages[0].keep_tok == 2048


def test_planning_changes_nothing():
    one, other = (pipeline(g=LayerGroup("0", stages={"0": StageOverride(keep_tok=2048)})) for _ in range(2))
    one.plan(3)
    assert one == other
