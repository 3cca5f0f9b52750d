"""Predicts and measures the memory of prompts and answers, each case in a process of its own; started by ``test_forecast_memory.py``.

Reads a JSON list of cases on stdin, prints for each a line of JSON: bytes of ``prefill`` and ``decode`` as ``[predicted, measured]``. Measured
is what :class:`hipexp.hf.memory.PeakMemory` says, as in :attr:`hipexp.hf.Generation.peak_bytes`: how far the process rose.
"""

import json
import os
import sys

import torch
import transformers

from hipexp.config.compose import compose
from hipexp.hf import Generation, Loaded, generate, install
from hipexp.hf.cache import SequenceCache
from hipexp.hf.forecast_memory import Work, forecast
from hipexp.hf.loop import decode, prefill, prefill_layer_major
from hipexp.hf.memory import PeakMemory
from hipexp.hf.skeleton import without_weights

SIZES = dict(
    vocab_size=1024, max_position_embeddings=8192, eos_token_id=None, bos_token_id=None, pad_token_id=0, hidden_size=512,
    intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
)  # fmt: skip
WARM_TOK = 256


def run(config, sizes, words, prompt_tok, chunk_tok, new_tok=8, batch=1, dtype="float32"):
    config, dtype = getattr(transformers, config)(**{**SIZES, **sizes}), getattr(torch, dtype)
    made = compose(words)
    predicted = forecast(
        without_weights(config, dtype), made.pipeline, made.offload, Work(prompt_tok, new_tok, chunk_tok, batch), gpu=False
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    loaded = Loaded(model, None, 8192, config.num_hidden_layers, str(dtype))
    prompts = torch.randint(3, 1000, (batch, prompt_tok)).tolist()
    caches, last, memory, later = [], [], PeakMemory(), PeakMemory()
    with torch.inference_mode(), install(model, made.pipeline, 8192, made.offload) as installed:
        generate(loaded, [prompts[0][:WARM_TOK]], max_new_tok=2, prefill_chunk_tok=WARM_TOK, installed=installed)  # code is read once
        read = prefill_layer_major if installed.reads_by_layer(prompt_tok) else prefill
        memory.start()
        for prompt in prompts:
            caches.append(SequenceCache(len(installed.kinds), prompt_tok + new_tok, decoding=False, new_store=installed.new_sequence()))
            last.append(read(model, caches[-1], prompt, chunk_tok))
        read_bytes = memory.peak()
        later.start()
        later.base = memory.base
        decode(model, caches, last, [Generation() for _ in caches], new_tok, set())
        return {"prefill": [predicted.prefill_peak, read_bytes], "decode": [predicted.decode_peak, later.peak()]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in json.load(sys.stdin):
        if not (child := os.fork()):
            print(json.dumps(run(**case)), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
