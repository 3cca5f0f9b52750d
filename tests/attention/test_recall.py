"""The share of attention that a selection holds, against sums over tokens by hand."""

import torch

from hipexp.attention.recall import attention_mass
from hipexp.attention.selection import Selection


def measured(blocks, counts, H=4, K=2, T=50, D=8, **sizes):
    torch.manual_seed(0)
    q, k = torch.randn(H, D), torch.randn(K, T + 9, D)  # keys after the query are not seen
    selection = Selection(torch.tensor(blocks)[:, None], torch.tensor(counts)[:, None])
    made = attention_mass(q, k, selection, T - 1, block_tok=4, sink_tok=3, window_tok=10, scale=0.4)
    weights = torch.stack([torch.softmax(k[h // (H // K), :T] @ q[h] * 0.4, 0) for h in range(H)])
    return made, weights


def test_one_list_for_all_heads():
    made, weights = measured([[8, 20, 38, -1]], [3])  # of the third block only two tokens lie before the window
    fixed, chosen = [0, 1, 2, *range(40, 50)], [8, 9, 10, 11, 20, 21, 22, 23, 38, 39]
    torch.testing.assert_close(made.fixed, weights[:, fixed].sum(1))
    torch.testing.assert_close(made.selected, weights[:, chosen].sum(1))
    best = weights[:, 3:40].sort(descending=True).values[:, :10].sum(1)
    torch.testing.assert_close(made.oracle, best)
    torch.testing.assert_close(made.recall, weights[:, chosen].sum(1) / weights[:, 3:40].sum(1))


def test_a_list_for_each_head_and_nothing_selected():
    made, weights = measured([[8, 20], [-1, -1]], [1, 0])
    torch.testing.assert_close(made.selected[:2], weights[:2, 8:12].sum(1))
    assert made.selected[2:].tolist() == made.oracle[2:].tolist() == [0, 0]


def test_everything_selected_is_everything():
    made, _ = measured([list(range(3, 43, 4))], [10])
    torch.testing.assert_close(made.recall, torch.ones(4))
    torch.testing.assert_close(made.oracle_ratio, torch.ones(4))
