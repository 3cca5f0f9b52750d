"""What users may rely on, under every method; and that a method which says it does not hold a contract really does not."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from exact_tables import ExactTables
from hipexp.attention import LayerAttention, Memory
from hipexp.attention.method import OPTION_EXCEPTIONS, Contract
from hipexp.attention.methods import method_class
from hipexp.attention.rope import RopeTables
from hipexp.config.check import METHODS
from hipexp.config.schema import AttendRope, ConfigError, Pipeline, PruneRope, Rope, Stage
from hipexp.hf import install

D, TRAINED, T = 16, 4096, 448
NATIVE = Rope(PruneRope.native, AttendRope.native)
STAGES = [Stage(32, 192, 64, 4, 1), Stage(8, 64, 64, 1, 1)]
# A small pipeline of each method, in which something is pruned of T tokens; and what its budget holds: sinks, window and selection.
SMALL = {
    "hip": Pipeline(method="hip", stages=STAGES, sink_tok=8, window_tok=64),
    "streaming": Pipeline(method="streaming", sink_tok=8, window_tok=64),
    "oracle": Pipeline(method="oracle", sink_tok=8, window_tok=64, params={"keep_tok": 64}),
    "random": Pipeline(method="random", sink_tok=8, window_tok=64, params={"keep_tok": 64}),
    "infllm": Pipeline(
        method="infllm", sink_tok=8, window_tok=64, rope=Rope(attend=AttendRope.infllm),
        params={"block_tok": 16, "keep_blocks": 4, "representatives": 2, "query_tok": 64},
    ),
    "hip_tree": Pipeline(method="hip_tree", sink_tok=8, window_tok=64, rope=NATIVE, params={"keep_tok": 64}),
    "quest": Pipeline(method="quest", sink_tok=0, window_tok=16, rope=NATIVE, params={"keep_tok": 64}),
    "h2o": Pipeline(method="h2o", sink_tok=0, window_tok=64, rope=NATIVE, params={"keep_tok": 64}),
    "minference": Pipeline(
        method="minference", sink_tok=0, window_tok=1, rope=NATIVE, params={"verticals": 64, "slashes": 64, "last_tok": 32, "near_tok": 8},
    ),
    "xattention": Pipeline(
        method="xattention", sink_tok=0, window_tok=1, rope=NATIVE, params={"block_tok": 64, "stride_tok": 8, "mass": 0.5},
    ),
    "kascade": Pipeline(method="kascade", sink_tok=8, window_tok=64, rope=NATIVE, params={"keep_tok": 64, "anchors": [1, 5]}),
    "self_extend": Pipeline(method="self_extend", params={"group_tok": 4, "neighbour_tok": 64}),
    "ntk": Pipeline(method="ntk"),
    "lm_infinite": Pipeline(method="lm_infinite", sink_tok=8, window_tok=64),
}  # fmt: skip
HELD = {
    "hip": 136, "streaming": 72, "oracle": 136, "random": 136, "infllm": 152, "hip_tree": 136, "quest": 80, "h2o": 128, "minference": 64,
    "xattention": 64, "kascade": 136, "self_extend": 64, "ntk": 448, "lm_infinite": 64,
}  # fmt: skip

OPTIONS = {"dense_last_tok": 100, "delta_every_tok": 32}  # beside a small pipeline


def cos_sin(positions):
    angle = positions[:, None] * 10_000.0 ** (-torch.arange(0, D, 2) / D)
    return angle.cos(), angle.sin()


class Sequence:
    """One layer that reads a prompt in parts and then decodes."""

    def __init__(self, pipeline, tables=RopeTables):
        self.attention = LayerAttention(pipeline.plan_layer(5, []), tables(cos_sin, TRAINED), D**-0.5)
        self.state, self.shared, self.memory = self.attention.method.new_state(), {}, Memory()

    def read(self, qkv, begin, end):
        q, k, v = qkv
        return self.attention(q[:, begin:end], k[:, :end], v[:, :end], begin, state=self.state, shared=self.shared)

    def step(self, qkv, t):
        q, k, v = qkv
        return self.attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], t, self.memory, state=self.state, shared=self.shared)


def inputs(K=2, G=2, seed=0):
    """Queries, keys, values; keys of like neighbours, so that selections are no ties."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, T, D, generator=generator) for n in (K * G, K, K))
    return 2 * q, k.cumsum(1) / 4 + k, v


def close(a, b):
    assert torch.allclose(a, b, atol=2e-5), float((a - b).abs().max())


def causal(pipeline):
    """Of queries up to a block's end nothing changes with the tokens behind it, or if there are none."""
    one, other = inputs(), inputs(seed=1)
    mixed = tuple(torch.cat([x[:, :384], y[:, 384:]], 1) for x, y in zip(one, other, strict=True))
    out = Sequence(pipeline).read(one, 0, T)[:, :384]
    close(out, Sequence(pipeline).read(mixed, 0, T)[:, :384])
    close(out, Sequence(pipeline).read(one, 0, 384))


def chunked(pipeline):
    qkv = inputs()
    whole, parts = Sequence(pipeline).read(qkv, 0, T), Sequence(pipeline)
    close(torch.cat([parts.read(qkv, b, min(T, b + 128)) for b in range(0, T, 128)], 1), whole)


def grouped(pipeline):
    """Query heads that ask the same get the same, however many share a key/value head."""
    q, k, v = inputs(G=1)
    alone = Sequence(pipeline).read((q, k, v), 0, T)
    for G in (4, 8):
        several = Sequence(pipeline).read((q.repeat_interleave(G, 0), k, v), 0, T)
        close(several, alone.repeat_interleave(G, 0))


def deterministic(pipeline):
    runs = []
    for _ in range(2):
        one = Sequence(pipeline)
        runs.append([one.read(inputs(), 0, T - 4), *(one.step(inputs(), t) for t in range(T - 4, T))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def growing(pipeline):
    """A step is the same whether the tokens before it were read or decoded."""
    qkv, read, decoded = inputs(), Sequence(pipeline), Sequence(pipeline)
    read.read(qkv, 0, T - 1)
    decoded.read(qkv, 0, T - 64)
    for t in range(T - 64, T - 1):
        decoded.step(qkv, t)
    close(decoded.step(qkv, T - 1), read.step(qkv, T - 1))


def exact(pipeline):
    """All that the budget holds is attended to, at true positions."""
    qkv = inputs()
    held = HELD[pipeline.method]
    n = held // 64 * 64
    q, k, v = (x[:, :n] for x in qkv)
    angles = cos_sin(torch.arange(n))

    def turned(x):
        (cos, sin), (a, b) = angles, x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    one = Sequence(pipeline)
    dense = torch.nn.functional.scaled_dot_product_attention(
        turned(q), turned(k).repeat_interleave(2, 0), v.repeat_interleave(2, 0), is_causal=True
    )
    close(torch.cat([one.read(qkv, 0, n - 1), one.step(qkv, n - 1)], 1), dense)
    assert one.attention.pruned_blocks == 0


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=D,
        max_position_embeddings=TRAINED, initializer_range=0.15, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def padded(pipeline):
    """Rows of a batch, padded on the left, are the rows alone."""
    made, ids = model(), torch.randint(3, 64, (2, T), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :128] = ids[0, :128] = 0
    with install(made, pipeline):
        both = made(ids, attention_mask=mask, use_cache=False).logits
        for row, begin in ((0, 128), (1, 0)):
            close(both[row, begin:], made(ids[row : row + 1, begin:], use_cache=False).logits[0])


@torch.inference_mode()
def restored(pipeline):
    made, ids = model(), torch.randint(3, 64, (1, T), generator=torch.Generator().manual_seed(0))
    before = made(ids, use_cache=False).logits
    with install(made, pipeline):
        made(ids, use_cache=False)
    assert torch.equal(made(ids, use_cache=False).logits, before)


CHECKS = {check.__name__: check for check in (causal, chunked, padded, grouped, deterministic, growing, exact, restored)}


def test_every_contract_and_every_method_is_here():
    assert set(CHECKS) == {contract.value for contract in Contract}
    assert set(SMALL) == set(METHODS) == set(HELD)


def holds_or_says_why(contract, pipeline, reason):
    check = partial(CHECKS[contract.value], pipeline)
    if reason is None:
        check()
        return
    assert len(reason) > 20
    with pytest.raises((AssertionError, ValueError)):
        check()


@pytest.mark.parametrize("contract", list(Contract))
@pytest.mark.parametrize("method", METHODS)
def test_contract(method, contract):
    holds_or_says_why(contract, SMALL[method], method_class(method).exceptions.get(contract))


@pytest.mark.parametrize("contract", list(Contract))
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("method", ["hip", "streaming", "oracle", "infllm"])
def test_contract_under_an_option(method, option, contract):
    holds_or_says_why(contract, replace(SMALL[method], **{option: OPTIONS[option]}), OPTION_EXCEPTIONS.get(option, {}).get(contract))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_dense_is_counted(method):
    one = Sequence(SMALL[method], lambda cos_sin, _: RopeTables(cos_sin, 64))
    one.read(inputs(), 0, T - 1)
    one.step(inputs(), T - 1)
    assert one.attention.pruned_blocks > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attend", list(AttendRope))
def test_every_strategy_of_attention(method, attend):
    """Finite everywhere, prefill and decode, from tables that hold no position that was not asked for."""
    pipeline = replace(SMALL[method], rope=Rope(attend=attend))
    one = Sequence(pipeline, ExactTables)
    for out in (one.read(inputs(), 0, T - 1), one.step(inputs(), T - 1)):
        assert out.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_rope_is_one_whose_angles_are_zero(method):
    pipeline, outs = SMALL[method], []
    if pipeline.stages:  # each of which says how it rotates
        pipeline = replace(pipeline, rope=Rope(PruneRope.none))
    for tables in (None, RopeTables(lambda positions: (torch.ones(len(positions), D // 2), torch.zeros(len(positions), D // 2)), TRAINED)):
        one = Sequence(pipeline)
        one.attention.tables = tables
        outs.append(torch.cat([one.read(inputs(), 0, T - 2), *(one.step(inputs(), t) for t in (T - 2, T - 1))], 1))
    close(*outs)


@pytest.mark.parametrize("method", METHODS)
def test_without_state_it_is_the_same_or_refused(method):
    """A prompt that is read at once needs none."""
    one, qkv = Sequence(SMALL[method]), inputs()
    out = one.read(qkv, 0, T - 1)
    kept, one.state = one.state, None
    close(one.read(qkv, 0, T - 1), out)
    if one.attention.method.remembers:
        with pytest.raises(ValueError, match=f"method {method} .* nothing was kept"):
            one.step(qkv, T - 1)
    else:
        bare = one.step(qkv, T - 1)
        one.state, one.memory = kept, Memory()
        close(one.step(qkv, T - 1), bare)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"keep_tok": -1}, "pipeline.params.keep_tok=-1 must not be negative"),
        ({"block_tok": 0}, "pipeline.params={'block_tok': 0} cut keys or queries into blocks of 0 tokens"),
    ],
)
def test_parameters_that_cannot_be_are_refused(params, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Sequence(replace(SMALL["oracle"], params=params))


def test_the_page_names_every_exception():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in METHODS:
        for contract, reason in method_class(name).exceptions.items():
            assert f"| `{name}` | {contract.value} | {reason} |" in page
    for option, broken in OPTION_EXCEPTIONS.items():
        for contract, reason in broken.items():
            assert f"| `{option}` | {contract.value} | {reason} |" in page
