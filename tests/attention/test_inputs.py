"""The generated inputs are what their docstrings say, by exact softmax."""

import pytest
import torch
from hipexp_kernels.rope import rotate

from hipexp.attention.inputs import CHUNK_TOK, GENERATORS, GEOMETRIES, SINK_TOK, drifting, isolated_needles, near_equal_needles

LLAMA, NEEDLE = GEOMETRIES["llama31_8b"], GEOMETRIES["needle"]
T = 16384


@pytest.fixture(scope="module")
def text():
    return drifting(LLAMA, T, seed=3)


def weights(made, q):
    """Exact attention weights ``[H, T]`` of queries ``[H, D]``."""
    g = made.geometry
    logits = q.float().view(g.kv_heads, -1, g.head_dim) @ made.keys.float().mT * g.scale
    return torch.softmax(logits.flatten(0, 1).double(), -1)


def beyond_sink(weight):
    rest = weight[:, SINK_TOK:]
    return rest / rest.sum(-1, keepdim=True)


def held_by_best(weight, share):
    """The mass that the best ``share`` of the tokens hold, mean over heads."""
    return weight.topk(int(share * weight.shape[-1])).values.sum(-1).mean().item()


def shared(a, b, share=0.02):
    """The share of the best tokens of ``a`` that are among those of ``b``."""
    best = [torch.zeros_like(w).scatter(-1, w.topk(int(share * w.shape[-1])).indices, 1) for w in (a, b)]
    return (best[0] * best[1]).sum().item() / best[0].sum().item()


@pytest.mark.parametrize("n_tok", [12, 100, CHUNK_TOK + 1])
@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_at_any_length_and_nothing_is_zero(name, n_tok, dtype):
    g = GEOMETRIES["qwen25_7b"].as_dtype(dtype)
    made = GENERATORS[name](g, n_tok)
    tensors = [made.keys, made.values, made.queries(1), made.prefill_queries(min(n_tok, 300))]
    assert [tuple(x.shape) for x in tensors] == [(4, n_tok, 128), (4, n_tok, 128), (28, 128), (28, min(n_tok, 300), 128)]
    assert all(x.dtype == dtype and x.isfinite().all() and (x.float().std(-1) > 0.3).all() for x in tensors)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_seed_decides(name):
    first, again, other = (GENERATORS[name](NEEDLE, 600, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.queries(7), again.queries(7))  # whatever was asked before
    assert torch.equal(first.queries(2), again.queries(2)) and torch.equal(first.keys, again.keys)
    assert torch.equal(first.prefill_queries(300), again.prefill_queries(300))
    assert not torch.equal(first.keys, other.keys) and not torch.equal(first.queries(7), other.queries(7))


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="11 tokens have no room for 8 planted ones beside a sink of 4"):
        isolated_needles(NEEDLE, 11)


def test_mass_is_concentrated(text):
    for step in (0, 40):
        rest = beyond_sink(weights(text, text.queries(step)))
        assert held_by_best(rest, 0.01) > 0.65
        assert held_by_best(rest, 0.02) > 0.75
        assert held_by_best(rest, 0.05) > 0.85
        assert held_by_best(rest, 0.001) < 0.6  # not a single token either


@pytest.mark.parametrize("n_tok", [4096, 65536])
def test_concentration_and_sink_do_not_depend_on_the_length(n_tok):
    made = drifting(NEEDLE, n_tok)
    steps = [weights(made, made.queries(step)) for step in range(0, 400, 40)]
    assert sum(held_by_best(beyond_sink(w), 0.05) for w in steps) / len(steps) > 0.8
    assert 0.15 < sum(w[:, :SINK_TOK].sum(-1).mean().item() for w in steps) / len(steps) < 0.6


def test_spread_sets_how_sharp_it_is():
    flat, sharp = (drifting(NEEDLE, T, spread=spread) for spread in (2.0, 4.0))
    held = [held_by_best(beyond_sink(weights(made, made.queries(0))), 0.02) for made in (flat, sharp)]
    assert held[0] < 0.6 < 0.85 < held[1]


def test_what_is_selected_changes_slowly_but_really(text):
    first = beyond_sink(weights(text, text.queries(0)))
    near, later, far = (shared(first, beyond_sink(weights(text, text.queries(step)))) for step in (1, 16, 200))
    assert 0.97 > near > 0.7 > later > 0.2 > far


def test_neighbours_are_alike_for_some_tens_of_tokens(text):
    logits = text.queries(0)[:8] @ text.keys[0].T
    logits = logits - logits.mean(-1, keepdim=True)

    def correlation(lag):
        return ((logits[:, :-lag] * logits[:, lag:]).mean() / logits.square().mean()).item()

    assert correlation(4) > 0.6 > 0.5 > correlation(40) > 0.15
    assert abs(correlation(3000)) < 0.1


def test_all_queries_like_the_hitters(text):
    for step in (0, 300):
        weight = beyond_sink(weights(text, text.queries(step)))
        held = weight[:, text.planted - SINK_TOK].sum(-1).mean().item()
        assert 0.05 < held < 0.5 and len(text.planted) < T / 500


def test_prefill_queries_are_as_sharp_as_those_of_decode(text):
    rest = beyond_sink(weights(text, text.prefill_queries(40)[:, 39].contiguous()))
    assert held_by_best(rest, 0.02) > 0.7


@pytest.mark.parametrize("geometry", [LLAMA, NEEDLE])
def test_an_isolated_needle_holds_half_of_the_mass_and_its_neighbours_nothing(geometry):
    made = isolated_needles(geometry, T, hold_steps=4)
    for step in (0, 4, 8):
        weight = beyond_sink(weights(made, made.queries(step)))
        held = weight[:, made.planted - SINK_TOK]
        around = torch.cat([weight[:, made.planted - SINK_TOK + d] for d in (-1, 1)], -1)
        assert 0.2 < held.max(-1).values.mean() < 0.9
        assert around.sum(-1).mean() < 0.05
    sought = [weights(made, made.queries(step))[:, made.planted].argmax(-1) for step in (0, 3, 4)]
    assert (sought[0] == sought[1]).float().mean() > 0.7 > (sought[0] == sought[2]).float().mean()


def test_near_equal_needles_are_close_behind_the_one_looked_for():
    made = near_equal_needles(LLAMA, T)
    keys = torch.nn.functional.normalize(made.keys[:, made.planted][..., LLAMA.slow(made.keys.device)], dim=-1)
    assert 0.85 < (keys @ keys.mT).flatten(1)[:, 1:-1].mean() < 0.95
    held = beyond_sink(weights(made, made.queries(0)))[:, made.planted - SINK_TOK].sort(-1, descending=True).values
    assert held.sum(-1).mean() > 0.4
    assert (held[:, 1] / held[:, 0]).median() > 0.15


def test_meaning_survives_rope_by_a_thousand_positions(text):
    angle = 1024 * 500000.0 ** -(torch.arange(64) / 64)
    q = text.queries(0)
    turned = rotate(q, angle.cos(), angle.sin())
    plain, moved = (beyond_sink(weights(text, x)) for x in (q, turned))
    assert shared(plain, moved) > 0.35


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_like():
    made = drifting(LLAMA.as_dtype(torch.bfloat16), T, device="cuda")
    assert made.keys.is_cuda and made.planted.is_cuda and made.prefill_queries(70).is_cuda
    assert held_by_best(beyond_sink(weights(made, made.queries(0))), 0.02) > 0.7
    for generate in (isolated_needles, near_equal_needles):
        made = generate(LLAMA.as_dtype(torch.bfloat16), T, device="cuda")
        assert beyond_sink(weights(made, made.queries(0)))[:, made.planted - SINK_TOK].sum(-1).mean() > 0.2
