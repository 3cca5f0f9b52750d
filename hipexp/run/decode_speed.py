"""Tokens per second of a whole model in decode, on a GPU: ``python -m hipexp.run.decode_speed``. Needs torch, Triton, transformers, PyYAML.

A Llama of the size of Llama-3.1-8B with random weights, one sequence, whose cache is filled with structured random keys of every length
(:mod:`hipexp.attention.inputs`): nothing is prefilled. Each pipeline decodes with hipexp's own loop, at first launched by the host and then
by CUDA graphs; dense attention is torch's own for packed heads, in a graph of one step. Times are those of the host, from a token to the
next one, with the choice of it and the wait for it. Writes ``decode.json`` and ``decode.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hipexp.attention import Memory
from hipexp.attention.blocks import Step
from hipexp.attention.inputs import Geometry, drifting
from hipexp.cache.resident import ResidentStore
from hipexp.config.compiler import missing_compiler
from hipexp.config.schema import Pipeline
from hipexp.hf import Generation, install
from hipexp.hf.cache import SequenceCache
from hipexp.hf.graphs import record_cuda, steps_until_recorded
from hipexp.hf.load import compile_parts
from hipexp.hf.loop import choose, decode
from hipexp.run.gpu import preset, table
from hipexp.run.latency import quantile
from hipexp.run.strategy import refresh_pattern
from hipexp.run.timing import describe_machine

SIZES = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128_256)
ROPE = dict(rope_type="default", rope_theta=500_000.0)
TOKEN, DENSE_STEPS = 1, 10


def build(n_layers: int, device: torch.device) -> PreTrainedModel:
    """The model, in bf16."""
    config = LlamaConfig(**SIZES, num_hidden_layers=n_layers, max_position_embeddings=131_072, rope_parameters=ROPE)
    with device:
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def filled(model: PreTrainedModel, n_tok: int, room_tok: int) -> SequenceCache:
    """A cache of ``n_tok`` tokens, with room for ``room_tok``; every layer has the same keys, at a place of its own."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    geometry = Geometry(config.num_attention_heads, config.num_key_value_heads, head_dim, model.dtype)
    layer = drifting(geometry, n_tok, seed=0, device=model.device)
    cache = SequenceCache(config.num_hidden_layers, room_tok, decoding=True)
    for one in cache.own_layers:
        one.lazy_initialization(layer.keys[None], layer.values[None])
        store = one.rows[0].store
        assert isinstance(store, ResidentStore)
        store.append(layer.keys, layer.values)
        for part in store.room:
            part[:, n_tok:] = 0  # dense steps see it
    return cache


def rewind(cache: SequenceCache, n_tok: int) -> None:
    """As if only the first ``n_tok`` tokens were there, and nothing was known of them."""
    for layer in cache.own_layers:
        (row,) = layer.rows
        row.store.length, row.memory, row.state, row.step = n_tok, Memory(), None, None


def pipeline_row(model: PreTrainedModel, cache: SequenceCache, pipeline: Pipeline, periods: int) -> dict[str, Any]:
    """Steps of whole refresh periods: the first by the host, more until every pattern has its graph, then ``periods`` measured ones."""
    made, begun_tok = Generation(), cache.get_seq_length()
    with install(model, pipeline) as installed:
        period, _ = refresh_pattern(pipeline, len(installed.layers))
        for i, layer in enumerate(cache.own_layers):
            layer.rows[0].state = installed.layers[i].method.new_state()
        decode(model, [cache], [TOKEN], [made], _steps(period, periods) + 1, set(), installed=installed)
    rewind(cache, begun_tok)
    return {"by_host_ms": statistics.fmean(made.decode_ms[1:period])} | times(made.decode_ms[steps_until_recorded(period) :])


def _steps(period: int, periods: int) -> int:
    """Decode steps of a pipeline in all."""
    return steps_until_recorded(period) + periods * period


def dense_row(model: PreTrainedModel, cache: SequenceCache) -> dict[str, Any]:
    """Steps that see the whole cache and its room, all at one place."""
    n_tok, device = cache.get_seq_length(), model.device
    step = Step.at(n_tok, 0, True, device)
    ids, positions = torch.full((1, 1), TOKEN, device=device), torch.full((1, 1), n_tok, device=device)

    def run() -> Tensor:
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    with install(model, None):
        for layer in cache.own_layers:
            layer.rows[0].step = step
        by_host = [_timed(lambda: choose(run(), [n_tok])) for _ in range(4)]
        logits, replay = record_cuda(run)

        def replayed() -> None:
            replay()
            choose(logits, [n_tok])

        found = [_timed(replayed) for _ in range(DENSE_STEPS + 2)][2:]
    rewind(cache, n_tok)
    return {"by_host_ms": statistics.fmean(by_host[1:])} | times(found)


def _timed(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def times(steps_ms: list[float]) -> dict[str, float]:
    """Mean, spread and tokens per second of some steps."""
    mean = statistics.fmean(steps_ms)
    spread = {"p10_ms": quantile(steps_ms, 0.1), "p90_ms": quantile(steps_ms, 0.9), "worst_ms": max(steps_ms)}
    return {"mean_ms": mean, **spread, "tokens_per_s": 1e3 / mean, "steps": len(steps_ms)}


def main(argv: list[str] | None = None) -> int:
    """Measure at every length; 2 without a GPU."""
    parser = argparse.ArgumentParser(description="Tokens per second of a whole model of random weights in decode, against dense attention.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[131_072, 524_288, 900_000], help="tokens (default: %(default)s)")
    parser.add_argument("--presets", nargs="+", default=["3stage", "3stage_plus"], help="pipelines (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="of the model (default: %(default)s)")
    parser.add_argument("--periods", type=int, default=2, help="refresh periods that are measured (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of norms and MLPs, for all contestants")
    args = parser.parse_args(argv)
    if args.compile and (lacks := missing_compiler()):
        parser.error(f"--compile needs a C++ compiler and Python's headers, and there is {lacks} here")
    if not torch.cuda.is_available():
        print("error: no GPU that torch can use (`python -m hipexp task=latency` measures a model on a CPU)", file=sys.stderr)
        return 2
    device, rows = torch.device("cuda", torch.cuda.current_device()), list[dict[str, Any]]()
    about = describe_machine(device) | {"layers": args.layers, "compiled": args.compile}
    with torch.inference_mode():
        model = build(args.layers, device)
        if args.compile:
            compile_parts(model)
        longest = max(_steps(refresh_pattern(preset(name), args.layers)[0], args.periods) + 2 for name in args.presets)
        for n_tok in sorted(args.lengths):
            torch.cuda.empty_cache()
            cache = filled(model, n_tok, n_tok + longest)
            found = {"dense": dense_row(model, cache)}
            found |= {name: pipeline_row(model, cache, preset(name), args.periods) for name in args.presets}
            for name, row in found.items():
                speedup = {"speedup": found["dense"]["mean_ms"] / row["mean_ms"]}
                rows.append({"context_tok": n_tok, "impl": name, **row, **(speedup if name != "dense" else {})})
                print(rows[-1], flush=True)
            cache.close()
            del cache
            about["peak_bytes"] = torch.cuda.max_memory_allocated()
            _write(args.out, about, rows)
    print(args.out / "decode.md")
    return 0


def _write(folder: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decode.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    machine = "\n".join(f"* {name}: {value}" for name, value in about.items())
    (folder / "decode.md").write_text(f"{machine}\n\n{table(rows)}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
