"""The training's own attention and its locality loss."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from hipexp.needle import locality
from hipexp.needle.locality import HEAD_DIM, NEAR_SINK_TOK, OWN_HEADS, Asking, Locality, attend_near, turn
from hipexp.needle.train import make_config


@pytest.mark.parametrize(("tokens", "near_tok"), [(96, 8), (93, 16), (1000, 128)])
def test_near_attention_is_a_masked_attention(tokens, near_tok):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, tokens, 8) for _ in range(3))
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
    mask = (column <= row) & ((column < NEAR_SINK_TOK) | (column // near_tok >= row // near_tok - 1))
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.2)
    assert torch.allclose(attend_near(q, k, v, near_tok, 0.2), expected, atol=1e-5)


def test_only_the_layers_of_a_near_step_see_near_tokens_only(monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 64, HEAD_DIM), torch.randn(1, 2, 64, HEAD_DIM), torch.randn(1, 2, 64, HEAD_DIM)
    monkeypatch.setattr(locality, "LOCALITY", Locality())
    locality.LOCALITY.near_tok, locality.LOCALITY.near_layers = 8, (0, 1, 3)
    everything = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True).transpose(1, 2)
    for layer in range(locality.LAYERS):
        out, _ = locality.attention(SimpleNamespace(layer_idx=layer), q, k, v, None, scaling=0.2)
        assert torch.allclose(out, everything, atol=1e-5) == (layer not in (0, 1, 3))


def test_turning_is_the_rotary_embedding_of_the_model():
    torch.manual_seed(0)
    x, positions = torch.randn(1, 2, 9, HEAD_DIM), torch.tensor([[0, 1, 5, 77, 1000, 3000, 4095, 5000, 6143]])
    rotated, _ = apply_rotary_pos_emb(x, x, *LlamaRotaryEmbedding(make_config(64))(x, positions))
    assert torch.allclose(turn(x, positions[:, None]), rotated, atol=2e-3)
    assert torch.allclose(turn(rotated, -positions[:, None]), x, atol=2e-3)


def test_locality_compares_at_one_distance_and_pools_heads_and_queries(monkeypatch):
    torch.manual_seed(0)
    B, H, T, distance = 2, 4, 48, 20
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.full(size, distance))
    q, k = torch.randn(B, H, T, HEAD_DIM), torch.randn(B, H, T, HEAD_DIM)
    allowed = torch.zeros(B, 1, T, dtype=torch.bool)
    allowed[:, :, 4:30] = True
    target = torch.zeros(B, 1, T)
    target[0, 0, 10:14], target[1, 0, 20] = 0.25, 1.0
    found_in = Locality()
    found_in.single = Asking(torch.tensor([[[40]], [[41]]]), target, allowed)
    found_in.blocks = Asking(torch.tensor([[[36, 40, 44]], [[40, 41, 42]]]), target, allowed)
    position = torch.arange(T)
    found_in.add(turn(q, position), turn(k, position), 0.3)

    def expected(asking, heads):
        total = 0.0
        for b in range(B):
            pooled = torch.full((T,), -torch.inf)
            for t in range(4, 30):
                found = [turn(q[b, h, r], torch.tensor(distance)) @ k[b, h, t] * 0.3 for h in heads for r in asking.rows[b, 0]]
                pooled[t] = torch.stack(found).logsumexp(0)
            for t in target[b, 0].nonzero().flatten().tolist():
                rivals = [r for r in range(4, 30) if r == t or target[b, 0, r] == 0]
                total -= float(target[b, 0, t] * (pooled[t] - pooled[rivals].logsumexp(0)))
        return total / B

    assert len(found_in.own) == len(OWN_HEADS)
    for head, own in zip(OWN_HEADS, found_in.own, strict=True):
        assert float(own) == pytest.approx(expected(found_in.single, [head]), rel=1e-3)
    assert float(found_in.shared[0]) == pytest.approx(expected(found_in.blocks, range(H)), rel=1e-3)
