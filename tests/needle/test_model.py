"""The embedded model is what its card says: small, loaded like any other, and able to retrieve."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import hipexp
from hipexp.config.compose import compose
from hipexp.hf import generate, install, load
from hipexp.suites.infbench import make_sample, score
from hipexp.suites.sample import LineEncoder

FOLDER = Path(hipexp.__file__).parent / "needle" / "model"


@pytest.fixture(scope="module")
def needle():
    return load(compose([]).model)


def test_loads_from_its_folder_like_any_other():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 10_000_000
    config = AutoModelForCausalLM.from_pretrained(FOLDER).config
    assert config.model_type == "llama" and config.num_hidden_layers >= 5 and config.max_position_embeddings >= 6000
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.is_fast and tokenizer("x").input_ids[0] == tokenizer.bos_token_id


def average(needle, pipeline, subtask, length_tok, samples):
    encode, scores = LineEncoder(needle.tokenizer), []
    with install(needle.model, pipeline):
        for i in range(samples):
            sample = make_sample(subtask, i, samples, length_tok, encode, 0, "default")
            made = generate(
                needle, [sample.tokens], max_new_tok=sample.max_new_tok, prefill_chunk_tok=8192, stop_ids={needle.tokenizer.eos_token_id}
            )
            scores.append(score(subtask, needle.tokenizer.decode(made[0].tokens), sample.references))
    return sum(scores) / samples


@pytest.mark.parametrize("subtask", ["passkey", "number_string"])
def test_finds_numbers_at_half_the_trained_length(needle, subtask):
    assert average(needle, None, subtask, needle.trained_tok // 2, 5) >= 80


def test_finds_values_of_keys_in_short_prompts(needle):
    assert average(needle, None, "kv_retrieval", 1024, 10) >= 80


def test_pruning_finds_a_pass_key_in_the_middle_beyond_the_trained_length(needle):
    assert average(needle, compose(["+pipeline=3stage"]).pipeline, "passkey", 2 * needle.trained_tok, 1) == 100


@pytest.mark.slow
def test_pruning_finds_pass_keys_where_dense_attention_does_not(needle):
    pipeline, length_tok = compose(["+pipeline=3stage"]).pipeline, 4 * needle.trained_tok
    assert average(needle, pipeline, "passkey", length_tok, 5) >= 80
    assert average(needle, None, "passkey", length_tok, 5) <= 20


@pytest.mark.slow
def test_finds_everything_at_its_trained_length(needle):
    assert average(needle, None, "number_string", needle.trained_tok, 10) >= 90
    assert average(needle, None, "kv_retrieval", needle.trained_tok, 10) >= 70
