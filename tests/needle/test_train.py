"""The training's own attention."""

import pytest
import torch
import torch.nn.functional as F

from hipexp.needle.train import NEAR_SINK_TOK, _attend_near


@pytest.mark.parametrize(("tokens", "near_tok"), [(96, 8), (93, 16), (1000, 128)])
def test_near_attention_is_a_masked_attention(tokens, near_tok):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, tokens, 8) for _ in range(3))
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
    mask = (column <= row) & ((column < NEAR_SINK_TOK) | (column // near_tok >= row // near_tok - 1))
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.2)
    assert torch.allclose(_attend_near(q, k, v, near_tok, 0.2), expected, atol=1e-5)
