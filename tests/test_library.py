"""hipexp on a model that somebody has already, and the page that tells of it."""

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hipexp
from hipexp import Sampling, generate, install
from hipexp.config.schema import ConfigError, Pipeline, Stage
from hipexp.hf.sampling import Chooser
from pages import scripts

PAGE = Path(__file__).parents[1] / "docs" / "library.md"
MODEL = Path(hipexp.__file__).parent / "needle" / "model"
SMALL = Pipeline(stages=[Stage(16, 128, 64, 4, 4), Stage(8, 64, 64, 1, 2)], sink_tok=8, window_tok=64)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_page_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))  # without runs; tests/report/test_runs.py runs the part about them on some
    code = scripts(PAGE)
    assert len(code) == 6
    exec(compile("\n".join(code), str(PAGE), "exec"), {"__name__": "page"})
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "71432." and second.split()[0].startswith("71432.")
    assert re.fullmatch(r"[1-9]\d* query blocks did not see all their keys", third)
    assert last == "torch.Size([8, 1, 1, 64])"


def test_a_model_is_as_before(model, tokenizer):
    ids = torch.tensor([tokenizer("one two three " * 60).input_ids])
    before = model(ids).logits
    with torch.inference_mode(), install(model, SMALL) as installed:
        assert not torch.equal(model(ids).logits, before) and installed.pruned_blocks
    assert torch.equal(model(ids).logits, before)
    with install(model, None), torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, before, atol=1e-3, rtol=1e-3)


WORDS = "grass green sky blue sun yellow here there again back one two three key info find quiz text".split()
PROMPTS = [" ".join(random.Random(n).choices(WORDS, k=n)) for n in (150, 230, 90)]  # repeated text would be full of ties
LOTS = [Sampling(temperature=1.5, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("sampling", [Sampling(), LOTS])
def test_every_prompt_is_answered_as_alone(model, tokenizer, sampling):
    common = dict(tokenizer=tokenizer, pipeline=SMALL, max_new_tokens=12, stop_token_ids=())
    together = generate(model, PROMPTS, sampling=sampling, prefill_chunk_tok=64, **common)
    each = sampling if isinstance(sampling, list) else [sampling] * 3
    alone = [generate(model, [prompt], sampling=one, **common)[0] for prompt, one in zip(PROMPTS, each, strict=True)]
    assert [one.tokens for one in together] == [one.tokens for one in alone] and all(len(one.tokens) == 12 for one in alone)
    assert [one.text for one in together] == [tokenizer.decode(one.tokens, skip_special_tokens=True) for one in together]
    tokens = generate(model, [tokenizer(prompt).input_ids for prompt in PROMPTS], sampling=sampling, **common | {"tokenizer": None})
    assert [one.tokens for one in tokens] == [one.tokens for one in alone] and {one.text for one in tokens} == {""}


def test_other_seeds_are_other_answers(model, tokenizer):
    common = dict(tokenizer=tokenizer, pipeline=SMALL, max_new_tokens=12, stop_token_ids=())
    found = {tuple(generate(model, PROMPTS[:1], sampling=one, **common)[0].tokens) for one in (*LOTS, LOTS[0])}
    assert len(found) == 3
    (greedy,) = generate(model, PROMPTS[:1], **common)
    (least,) = generate(model, PROMPTS[:1], sampling=Sampling(temperature=1.5, top_k=1), **common)
    assert greedy.tokens == least.tokens


def test_an_answer_ends_with_a_text(model, tokenizer):
    common = dict(tokenizer=tokenizer, pipeline=SMALL, stop_token_ids=())
    (whole,) = generate(model, PROMPTS[:1], max_new_tokens=24, **common)
    middle = whole.text[len(whole.text) // 2 :][:3]
    assert len(middle) == 3
    (cut,) = generate(model, PROMPTS[:1], max_new_tokens=24, stop=["never said", middle], **common)
    assert cut.text == whole.text[: whole.text.index(middle)] and cut.stopped and cut.tokens == whole.tokens[: len(cut.tokens)]
    assert middle in tokenizer.decode(cut.tokens) and middle not in tokenizer.decode(cut.tokens[:-1])
    (ended,) = generate(model, PROMPTS[:1], max_new_tokens=24, tokenizer=tokenizer, pipeline=SMALL, stop_token_ids=[whole.tokens[3]])
    assert ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[3])]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(prompts=["text"]), "need a tokenizer"),
        (dict(prompts=[[1, 2]], stop=["x"]), "need a tokenizer"),
        (dict(prompts=[[1, 2]], pipeline="4stages"), "4stages"),
        (dict(prompts=[[1, 2]], pipeline=["+pipeline=3stage", "pipeline.sink=3"]), "pipeline.sink is unknown"),
        (dict(prompts=[[1, 2]], offload="tape"), "tape"),
        (dict(prompts="text"), "prompts must be a list"),
        (dict(prompts={"input_ids": [1, 2]}), "prompts must be a list"),
        (dict(prompts=[[1, 2]], stop="end"), "stop='end' must be a list"),
        (dict(prompts=[[1, 2]], stop=[""]), "none of them empty"),
    ],
)
def test_mistakes_are_told(model, call, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, **call)


def test_texts_and_tokens_are_not_mixed(model, tokenizer):
    with pytest.raises(ConfigError, match="all be texts or all be lists"):
        generate(model, ["text", [1, 2]], tokenizer=tokenizer)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hipexp.__getattr__("nothing")


def test_words_and_offload(model, tokenizer):
    words = ["+pipeline=streaming", "pipeline.sink_tok=8", "pipeline.window_tok=64"]
    common = dict(tokenizer=tokenizer, max_new_tokens=8, stop_token_ids=())
    resident, off = (generate(model, PROMPTS, pipeline=words, offload=where, **common) for where in (None, "host"))
    assert [one.tokens for one in resident] == [one.tokens for one in off]
    assert off[0].traffic and not resident[0].traffic


@pytest.mark.parametrize("mistake", [dict(temperature=-1), dict(temperature=float("inf")), dict(top_k=-2), dict(top_p=0), dict(top_p=1.1), dict(top_k=1.5), dict(seed=1.5), dict(seed=-1)])
def test_what_is_no_sampling(mistake):
    (name,) = mistake
    with pytest.raises(ConfigError, match=f"{name}={mistake[name]} must be"):
        Sampling(**mistake)


def test_tokens_are_drawn_by_their_shares():
    """Against shares of HF's rule: temperature, then the most likely ones, then the fewest that hold a part."""
    logits = torch.tensor([0.0, 2.0, 1.0, -torch.inf, 3.0])
    n = 4000

    def shares(**how):
        chooser = Chooser(Sampling(**how))
        return torch.bincount(torch.tensor([chooser.choose(logits) for _ in range(n)]), minlength=5) / n

    close = dict(atol=0.03, rtol=0)
    torch.testing.assert_close(shares(temperature=1.0), logits.softmax(-1), **close)
    torch.testing.assert_close(shares(temperature=2.0), (logits / 2).softmax(-1), **close)
    top = torch.where(logits >= 2, logits, -torch.inf)
    torch.testing.assert_close(shares(temperature=1.0, top_k=2), top.softmax(-1), **close)
    assert logits.softmax(-1)[4] < 0.7 < top.softmax(-1)[4]  # so that the order of both rules matters
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.7), top.softmax(-1), **close)
    assert shares(temperature=1.0, top_k=2, top_p=0.7)[4] == 1
    assert Chooser(Sampling()).choose(logits) == 4
    assert shares(temperature=1e-310)[4] == 1


def test_there_is_one_sampling_or_one_for_each(model):
    for prompts, n in ((2, 1), (1, 2)):
        with pytest.raises(ValueError, match=f"sampling has {n} entries for {prompts} prompts"):
            generate(model, [[1, 2]] * prompts, sampling=[Sampling()] * n, pipeline=None)
