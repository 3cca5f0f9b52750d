"""What a model answers, whole or split over processes: `python -m torch.distributed.run … tests/hf/split.py <folder>` writes it down."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hipexp
from hipexp.config.schema import ConfigError, Heads, Model, Offload, Pipeline, Representative
from hipexp.hf import generate, install, load, parallel, selfcheck
from hipexp.hf.families import FAMILIES, Family
from hipexp.hf.sampling import Sampling
from hipexp.run.models_table import pruning, tokens_of

MODELS = {
    "heads of their own": Family("LlamaConfig", {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2}),
    "grouped": Family(
        "LlamaConfig", {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 128}
    ),
    "sliding": FAMILIES["Gemma 3 (windows)"],
    "no heads split": FAMILIES["OLMo 2"],
}
METHODS = {
    "h2o": {"keep_tok": 64},
    "hip_tree": {"keep_tok": 64, "dense_layers": 0},
    "infllm": {"block_tok": 16, "keep_blocks": 4, "representatives": 2, "query_tok": 64},
    "kascade": {"anchors": [0], "keep_tok": 64},
    "lm_infinite": {},
    "minference": {"verticals": 40, "slashes": 40, "first_tok": 4, "near_tok": 8, "last_tok": 16},
    "ntk": {},
    "oracle": {"keep_tok": 64, "block_tok": 8},
    "quest": {"keep_tok": 64, "dense_layers": 0},
    "random": {"keep_tok": 64},
    "self_extend": {"group_tok": 4, "neighbour_tok": 64},
    "streaming": {},
    "xattention": {"block_tok": 16, "stride_tok": 8, "mass": 0.5},
}
OWN_METHOD = "from hipexp.attention.methods.streaming import Streaming\n\n\nclass Mine(Streaming):\n    splits = False\n"
PROMPTS = [tokens_of(260, 1), tokens_of(200, 2)]


def pipelines(name):
    """What is tried on a model: shared and per-head lists; every method on one."""
    found = {heads.value: dataclasses.replace(pruning(), heads=heads) for heads in Heads}
    if name == "grouped":
        for method, params in METHODS.items():
            found[method] = Pipeline(method=method, params=params, sink_tok=16, window_tok=64)
        found["staggered"] = dataclasses.replace(pruning(), staggered_refresh=True, late_refresh=True)
        first, last = pruning().stages
        found["by landmarks"] = dataclasses.replace(
            pruning(), stages=[dataclasses.replace(first, representative=Representative.bounds), last]
        )
        found["oracle, per_kv"] = dataclasses.replace(found["oracle"], heads=Heads.per_kv)
    return found


def answers(loaded, pipeline, offload=None, **kwargs):
    """Tokens, and how many query blocks did not see everything."""
    with install(loaded.model, pipeline, loaded.trained_tok, offload) as installed:
        done = generate(loaded, PROMPTS, max_new_tok=6, prefill_chunk_tok=128, installed=installed, **kwargs)
        return [[one.tokens for one in done], installed.pruned_blocks]


def everything(folder, tp_plan=None):
    """The answers of all models with all pipelines, offloaded, by lot, and through the library."""
    out = {}
    for name in MODELS:
        loaded = load(Model(path=str(folder / name), dtype="float32", tp_plan=tp_plan))
        for kind, pipeline in pipelines(name).items():
            out[f"{name}: {kind}"] = answers(loaded, pipeline)
        if name == "grouped":
            out["offloaded"] = answers(loaded, pruning(), Offload("host", device_tok=208))
            out["onto disk"] = answers(loaded, pruning(), Offload("disk", device_tok=208, host_tok=64, disk_dir=str(folder), disk_tok=400))
            out["layer by layer"] = answers(loaded, pruning(), Offload("host", device_tok=208, prefill_bytes=1 << 30))
            out["by lot"] = answers(loaded, pruning(), sampling=Sampling(temperature=1.0, seed=3))
    return out


def through_the_library(folder, **kwargs):
    """A model that the user loaded."""
    model = AutoModelForCausalLM.from_pretrained(folder / "grouped", dtype="float32", **kwargs).eval()
    made = hipexp.generate(model, PROMPTS, pipeline=pruning(), max_new_tokens=6, prefill_chunk_tok=128)
    with hipexp.install(model, pruning()):
        own = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=6, do_sample=False)
    return {"hipexp.generate": [one.tokens for one in made], "model.generate": own[0, len(PROMPTS[0]) :].tolist()}


def refusal(loaded, pipeline):
    """What an installation says that must not succeed."""
    try:
        with install(loaded.model, pipeline):
            return None
    except ConfigError as error:
        return str(error)


def agreements(folder, number):
    """What processes say where only the second one has a reason to, and which tokens they take where they chose different ones."""
    group = dist.group.WORLD
    loaded = load(Model(path=str(folder / "sliding"), dtype="float32", tp_plan="auto"))
    own = folder / f"mine_{number}.py"  # no process reads what another one is writing
    own.write_text(OWN_METHOD)
    found = {"own method": refusal(loaded, Pipeline(method=str(own), sink_tok=16, window_tok=64))}
    differ, selfcheck.differ = selfcheck.differ, lambda *_: number == 1
    found["check"] = refusal(loaded, pruning())
    selfcheck.differ = differ
    found["tokens"] = parallel.agreed(torch.tensor([number, 5 + number]), group).tolist()
    return found


def main(folder):
    number = int(os.environ["RANK"])
    library = through_the_library(folder, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))
    parallel.join()
    told = {"answers": everything(folder, "auto"), "library": library, "agreed": agreements(folder, number)}
    (folder / f"told-{number}.json").write_text(json.dumps(told))
    parallel.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
