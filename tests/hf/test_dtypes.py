"""A pipeline that prunes, in all number formats: the embedded model, whose answers are no matter of luck, says the same as in fp32."""

from functools import cache

import pytest
import torch

from hipexp.config.schema import Model, Pipeline, Stage
from hipexp.hf import end_tokens, generate, install, load
from hipexp.hf.cache import SequenceCache
from hipexp.suites import infbench
from hipexp.suites.sample import LineEncoder

# How far the logits of a token may be apart, in parts of their norm: the median one's, whose keys are the same ones, and the last one's. In
# either format a few tokens select other chunks, where scores are nearly equal.
APART = {"bfloat16": 0.03, "float16": 0.004}
PIPELINE = Pipeline(stages=[Stage(32, 256, 64, 4, 4), Stage(8, 128, 64, 1, 2)], sink_tok=32, window_tok=64)


@cache
def answered(dtype):
    """Logits of a whole prompt that is read in parts, and the answers, as a batch of prompts that are pruned and each alone."""
    loaded = load(Model(path="hipexp/needle/model", dtype=dtype))
    encode = LineEncoder(loaded.tokenizer)
    samples = [
        infbench.make_sample(name, 0, 1, length, encode, 0, "default") for name, length in (("passkey", 600), ("number_string", 700))
    ]
    prompts = [sample.tokens for sample in samples]
    asked = dict(max_new_tok=12, prefill_chunk_tok=128, stop_ids=end_tokens(loaded.model, loaded.tokenizer))
    with install(loaded.model, PIPELINE, loaded.trained_tok) as installed, torch.inference_mode():
        store, logits = SequenceCache(loaded.n_layers, decoding=False), []
        for part in torch.tensor(prompts[:1]).split(128, 1):
            positions = torch.arange(store.get_seq_length(), store.get_seq_length() + part.shape[1])[None]
            logits.append(loaded.model(part, position_ids=positions, past_key_values=store, use_cache=True).logits[0].float())
        done = generate(loaded, prompts, installed=installed, **asked)
        alone = [generate(loaded, [prompt], installed=installed, **asked)[0].tokens for prompt in prompts]
    assert alone == [one.tokens for one in done] and not any(one.exact for one in done)
    texts = [loaded.tokenizer.decode(one.tokens).strip().rstrip(".") for one in done]
    assert texts == [sample.references[0] for sample in samples]
    return torch.cat(logits), [one.tokens for one in done], done[0].cache_bytes


@pytest.mark.parametrize("dtype", APART)
def test_answers_in_half_precision_are_those_in_fp32(dtype):
    (ours, tokens, size), (exact, expected, whole) = answered(dtype), answered("float32")
    assert tokens == expected and 2 * size == whole
    apart = (ours - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 0 < float(apart.median()) < APART[dtype] and float(apart[-1]) < APART[dtype]
