"""What is refused of methods and their parameters before a model loads."""

import re
from pathlib import Path

import pytest

from hipexp.attention.methods import make_method
from hipexp.config.compose import compose
from hipexp.config.runkey import key_fields
from hipexp.config.schema import ConfigError
from hipexp.run.point import check_point

KASCADE = ["+pipeline=kascade", "pipeline.window_tok=256", "pipeline.params.keep_tok=64"]
LATE = ["+pipeline.layers.late.range=3-4"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["+pipeline=infllm", "model.prefill_chunk_tok=1100"], "prefill_chunk_tok=1100 must be a multiple of 512"),
        (["+pipeline=hip_iclr25", "model.prefill_chunk_tok=100"], "must be a multiple of 64"),
        ([*KASCADE, "pipeline.params.query_tok=48"], "prefill_chunk_tok=8192 must be a multiple of 48"),
        ([*KASCADE, *LATE, "+pipeline.layers.late.params.query_tok=64"], "layers (late) must give layers 2 and 3 the same params"),
        (
            [*KASCADE, *LATE, "+pipeline.layers.late.window_tok=128"],
            "layers (late) must give layers 2 and 3 the same params and window_tok",
        ),
        ([*KASCADE, "task=latency", "task.geometry=4/2/16"], "task.layer=31 takes over what layer 14 selects"),
        (["+pipeline=oracle", "pipeline.params.block_tok=3"], "keep_tok=2048 must be a multiple of block_tok=3; try 2046"),
        (["+pipeline=random", "pipeline.params.keep_tok=5"], "keep_tok=5 must be a multiple of block_tok=8; try 8"),
        (["+pipeline=oracle", "pipeline.params.keep_tok=null"], "pipeline.params.keep_tok=null must be a value"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_point(compose(words if any(word.startswith("task=") for word in words) else ["task=passkey", *words]))


@pytest.mark.parametrize(
    "words",
    [
        ["+pipeline=h2o", "model.prefill_chunk_tok=100"],  # prompts are read densely
        ["+pipeline=streaming", "model.prefill_chunk_tok=100"],
        [*KASCADE, "+pipeline.layers.late.range=2-4", "+pipeline.layers.late.window_tok=128"],  # an anchor and all behind it
        [*KASCADE, *LATE, "+pipeline.layers.late.rope.attend=streaming"],
    ],
)
def test_what_is_not_refused(words):
    check_point(compose(["task=passkey", *words]))


def test_a_layer_alone_is_none_that_is_dense():
    for name in ("quest", "hip_iclr25"):
        plan = compose([f"+pipeline={name}"]).pipeline.plan_alone(None)
        attended, _ = make_method(plan).decode_rows(100_000, 4, 2)
        assert attended < 2 * 2 * 100_000


def test_a_budget_of_nothing():
    plan = compose(["+pipeline=hip_iclr25", "pipeline.params.keep_tok=0"]).pipeline.plan_alone(None)
    assert make_method(plan).decode_rows(10_000, 4, 2) == (2 * 4 * 1280, 0)


def test_whole_numbers_as_sweep_agents_print_them_are_the_same_run():
    one, other = (key_fields(compose(["+pipeline=oracle", f"pipeline.params.keep_tok={value}"])) for value in ("512", "512.0"))
    assert repr(one) == repr(other)
    assert compose(["+pipeline=xattention", "pipeline.params.mass=0.5"]).pipeline.params["mass"] == 0.5


@pytest.mark.parametrize(
    "body, message",
    [
        ("    def block(self, decoding):\n        return 1\n", "Own lacks decode_rows|Own lacks keep, select"),
        (
            "    size: int\n    block = keep = lambda self, decoding: 1\n    def select(self, call): ...\n",
            "must give every parameter a default; Own gives none for size",
        ),
        (
            "    sizes: tuple[int, ...] = (1,)\n    near: list[int] | None = None\n    block = keep = lambda self, decoding: 1\n"
            "    def select(self, call): ...\n",
            "must have parameters of int, float, str or bool, .* of another type is sizes$",
        ),
    ],
)
def test_half_a_method_is_refused(tmp_path: Path, body, message):
    path = tmp_path / "own.py"
    head = "from dataclasses import dataclass\nfrom hipexp.attention.method import SelectingMethod\n\n\n@dataclass\nclass Own(SelectingMethod):\n"
    path.write_text(head + body, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        check_point(compose(["+pipeline=streaming", f"pipeline.method={path}", "task=passkey"]))
