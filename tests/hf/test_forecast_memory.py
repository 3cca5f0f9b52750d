"""Predicted memory beside what it was, on the CPU: of whole processes, and of live tensors."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from hipexp_kernels import rows

from hipexp.config.schema import Offload, Pipeline
from hipexp.hf import Generation, install
from hipexp.hf.cache import SequenceCache
from hipexp.hf.families import FAMILIES, SIZES
from hipexp.hf.forecast_memory import Work, forecast
from hipexp.hf.live import LiveBytes
from hipexp.hf.loop import decode, prefill
from hipexp.hf.skeleton import bytes_of, without_weights

WITHIN = 0.1
LLAMA, QWEN, GEMMA = "LlamaConfig", "Qwen3Config", "Gemma3TextConfig"
WINDOWS = {
    "num_hidden_layers": 4, "intermediate_size": 2048, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
HOST = ["+pipeline=3stage", "offload=host", "offload.device_tok=8192"]
MANY = {"num_key_value_heads": 8, "num_hidden_layers": 4}


def case(config, sizes, words, prompt_tok, chunk_tok, **more):
    return {"config": config, "sizes": sizes, "words": words, "prompt_tok": prompt_tok, "chunk_tok": chunk_tok, **more}


QUICK = {
    "dense": case(LLAMA, MANY, [], 6144, 2048),
    "dense, two prompts in one part": case(LLAMA, MANY, [], 4096, 4096, batch=2),
    "3stage": case(LLAMA, {}, ["+pipeline=3stage"], 8192, 4096),
    "3stage_plus, summaries": case(QWEN, {"num_key_value_heads": 2, "head_dim": 128}, ["+pipeline=3stage_plus"], 8192, 4096),
    "3stage, sliding windows": case(GEMMA, WINDOWS, ["+pipeline=3stage"], 7168, 2048),
    "layer by layer": case(LLAMA, {}, [*HOST, "offload.prefill_bytes=100000000"], 8192, 2048),
}
SLOW = {
    "3stage, exact": case(LLAMA, MANY, ["+pipeline=3stage"], 4096, 2048),
    "dense, longer": case(LLAMA, {}, [], 24576, 4096),
    "3stage, longer": case(LLAMA, {}, ["+pipeline=3stage"], 24576, 4096),
    "3stage_plus, small parts": case(LLAMA, {}, ["+pipeline=3stage_plus"], 16384, 1024),
    "host": case(LLAMA, {}, HOST, 16384, 4096),
    "host, fp8": case(LLAMA, {}, [*HOST, "offload.format=fp8"], 12288, 4096),
    "bfloat16": case(LLAMA, {}, ["+pipeline=3stage"], 8192, 4096, dtype="bfloat16"),
    "experts": case("Qwen3MoeConfig", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}, [], 6144, 2048),
}
WIDE = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 16, "intermediate_size": 5632}
LARGE = {"tensors of 32 MiB and more": case(LLAMA, WIDE, [], 16384, 8192)}  # keys of a part among them


def measured(cases, **environment):
    """What a child process says of ``cases``: bytes of ``prefill`` and ``decode`` of each, as ``[predicted, measured]``."""
    child = Path(__file__).with_name("memory_child.py")
    made = subprocess.run(
        [sys.executable, str(child)], input=json.dumps(list(cases.values())), env=os.environ | environment, stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    return dict(zip(cases, map(json.loads, made.stdout.splitlines()), strict=True))


def assert_close(cases, found):
    apart = {f"{name}, {phase}": predicted / was - 1 for name in cases for phase, (predicted, was) in found[name].items()}
    print(*(f"{name:45} {100 * part:+.1f} %" for name, part in apart.items()), sep="\n")
    assert not {name: part for name, part in apart.items() if abs(part) > WITHIN}


def skeleton_of(loaded):
    return without_weights(loaded.model.config, torch.float32)


def giving_back():
    """glibc keeps freed blocks of less than 32 MiB, as models of this size have, unless it is told where to begin to give them back."""
    return {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}


@pytest.mark.slow
def test_the_peak_of_a_process_is_as_predicted():
    assert_close(QUICK, measured(QUICK, **giving_back()))


@pytest.mark.slow
def test_the_peak_of_a_process_is_as_predicted_for_other_lengths_formats_and_tiers():
    assert_close(SLOW, measured(SLOW, **giving_back()))


@pytest.mark.slow
def test_the_peak_of_a_process_with_large_tensors_is_as_predicted_with_the_allocator_as_it_is():
    assert_close(LARGE, measured(LARGE))


@torch.inference_mode()
def test_live_tensors_are_as_predicted(loaded, any_pipeline, tokens, monkeypatch):
    """Every byte of every tensor, in prefill and decode, whatever the allocator does; each way to score, none of its memory left over."""
    monkeypatch.setattr(rows, "_HELD", threading.local())
    work = Work(1280, 8, 256)
    predicted = forecast(skeleton_of(loaded), any_pipeline, Offload(), work, gpu=False)
    with LiveBytes() as live, install(loaded.model, any_pipeline) as installed:  # which makes tables
        cache = SequenceCache(4, work.prompt_tok + work.new_tok, decoding=False, new_store=installed.new_sequence())
        token = prefill(loaded.model, cache, tokens[: work.prompt_tok], work.chunk_tok)
        read_bytes = live.peak
        live.restart()
        decode(loaded.model, [cache], [token], [Generation()], work.new_tok, set())
    assert predicted.prefill_peak == pytest.approx(read_bytes, rel=WITHIN)
    assert predicted.decode_peak == pytest.approx(live.peak, rel=WITHIN)
    assert cache.own_layers[0].rows[0].store.bytes * 4 == predicted.kv


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_forecast_without_weights(name):
    config = getattr(transformers, FAMILIES[name].config)(**{**SIZES, **FAMILIES[name].sizes})
    model = without_weights(config, torch.float32)
    pipeline = Pipeline("streaming", "streaming", window_tok=256) if name != "Gemma 3n (shared keys)" else None
    found = forecast(model, pipeline, Offload(), Work(1000, 8, 256), gpu=False)
    assert found.weights == bytes_of(model) > 0
    assert found.peak_bytes > found.kv > 0
    longer = forecast(model, pipeline, Offload(), Work(2000, 8, 256), gpu=False)
    assert longer.kv > found.kv and longer.peak_bytes > found.peak_bytes


def test_a_gpu_holds_less_for_itself_and_has_the_hosts_tier_elsewhere(loaded, pipeline):
    offload = Offload("host", device_tok=512)
    on_cpu, on_gpu = (forecast(skeleton_of(loaded), pipeline, offload, Work(4096, 8, 256), gpu) for gpu in (False, True))
    assert on_gpu.prefill < on_cpu.prefill and on_gpu.host == on_cpu.host > on_gpu.kv
    assert on_cpu.peak_bytes - on_gpu.peak_bytes > on_cpu.host


def test_other_methods_say_what_is_left_out(loaded):
    assert "h2o" in forecast(skeleton_of(loaded), Pipeline("h2o", "h2o"), Offload(), Work(512, 8, 256), gpu=False).left_out
