"""The share of attention that a selection holds, against sums over tokens by hand."""

import torch
from hipexp_kernels.rope import rotate

import brute
from hipexp.attention.recall import attention_mass, chosen_tokens, fixed_tokens, logits_at_one_distance, logits_in_place


def measured(blocks, counts, H=4, K=2, T=50, D=8):
    torch.manual_seed(0)
    q, k = torch.randn(H, D), torch.randn(K, T, D)
    chosen = chosen_tokens(torch.tensor(blocks), torch.tensor(counts), 4, T)
    logits = logits_at_one_distance(q, k, 0.4, None, 0)
    made = attention_mass(logits, chosen, fixed_tokens(T, 3, T - 10, q.device))
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
    torch.testing.assert_close(made.top, torch.full((4,), 10 / 37))  # there are fewer than 64 others


def test_a_list_for_each_head_and_nothing_selected():
    made, weights = measured([[8, 20], [-1, -1]], [1, 0])
    torch.testing.assert_close(made.selected[:2], weights[:2, 8:12].sum(1))
    assert made.selected[2:].tolist() == made.oracle[2:].tolist() == made.oracle_ratio[2:].tolist() == [0, 0]


def test_everything_selected_is_everything():
    made, _ = measured([list(range(3, 43, 4))], [10])
    torch.testing.assert_close(made.recall, torch.ones(4))
    torch.testing.assert_close(made.oracle_ratio, torch.ones(4))


def test_the_heaviest_tokens():
    logits = torch.arange(100.0)[None]  # the 64 heaviest of tokens 2 to 89 are 26 to 89
    chosen = chosen_tokens(torch.tensor([[20, 40]]), torch.tensor([2]), 16, 100)
    made = attention_mass(logits, chosen, fixed_tokens(100, 2, 90, logits.device))
    assert made.top.tolist() == [(10 + 16) / 64]


def test_positions():
    """Dense attention rotates both sides, scoring only the query: by hand, for one head."""
    q, k, table = torch.randn(2, 8), torch.randn(1, 20, 8), brute.rope_table(30, 8)
    in_place, apart = logits_in_place(q, k, 0.5, table), logits_at_one_distance(q, k, 0.5, table, 7)
    for t in range(20):
        turned = rotate(k[0, t], table.cos[t], table.sin[t])
        torch.testing.assert_close(in_place[:, t], rotate(q, table.cos[19], table.sin[19]) @ turned * 0.5)
        torch.testing.assert_close(apart[:, t], rotate(q, table.cos[7], table.sin[7]) @ k[0, t] * 0.5)
    torch.testing.assert_close(logits_in_place(q, k, 0.5, table, softcap=1.5), 1.5 * torch.tanh(in_place / 1.5))


def test_a_head_with_nothing_outside_loses_nothing():
    logits = torch.zeros(1, 100)
    logits[:, :4] = 40.0
    made = attention_mass(logits, torch.zeros(1, 100, dtype=torch.bool), fixed_tokens(100, 4, 90, logits.device))
    assert made.recall.item() == made.oracle_ratio.item() == 1.0
