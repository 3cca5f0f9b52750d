"""Every preset of a method runs in the tasks: attention alone, and the embedded model's prompts."""

import pytest

from hipexp.config.compose import compose
from hipexp.config.overrides import DENSE, conf_dir, group_options
from hipexp.run.ledger import read_json
from hipexp.run.point import execute

PRESETS = [name for name in group_options(conf_dir())["pipeline"] if name != DENSE and not name[0].isdigit()]
SMALL = {  # so that something is pruned of 2048 tokens
    "infllm": ["pipeline.window_tok=512", "pipeline.params.keep_blocks=4"],
    "minference": ["pipeline.params.verticals=128", "pipeline.params.slashes=256"],
    "xattention": ["pipeline.params.mass=0.5"],
    "quest": ["pipeline.params.keep_tok=512"],
    "kascade": ["pipeline.window_tok=512", "pipeline.params.keep_tok=512", "pipeline.params.anchors=[0,5]"],
    "self_extend": [],
    "ntk": [],
    "streaming": ["pipeline.window_tok=512"],
    "lm_infinite": ["pipeline.window_tok=512"],
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))


def words(name):
    return [f"+pipeline={name}", *SMALL.get(name, ["pipeline.window_tok=512", "pipeline.params.keep_tok=512"])]


@pytest.mark.parametrize("name", [name if name in ("quest", "ntk") else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS])
def test_latency_of_attention_alone(name):
    """In an anchor layer of what reuses lists of other layers."""
    alone = [
        "task=latency",
        "task.geometry=4/2/16",
        "task.contexts_tok=[2048]",
        "task.queries_tok=512",
        "task.decode_steps=4",
        "task.layer=5",
    ]
    summary = read_json(execute(compose([*words(name), *alone])) / "summary.json")
    rows = [row for row in summary["latency"]["rows"] if row["impl"] == name]
    assert {row["phase"] for row in rows} == {"prefill", "decode"} and all(row["mean_ms"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_prompts_of_the_embedded_model(name):
    """Within the trained length every method that sees the needle says it."""
    task = ["task=passkey", "task.lengths_tok=[2048]", "task.depths=[1.0]", "task.samples=1"]
    folder = execute(compose([*words(name), *task]))
    summary = read_json(folder / "summary.json")
    assert summary["average"] == 100, summary["scores"]
    assert summary["exact"] == (name == "ntk")  # at any length up to the trained one
