"""Positions of every RoPE strategy against tables written by hand, and the rotation itself."""

import numpy as np
import pytest
import torch
from hipexp_kernels.rope import AttendRotation, RopeTable, ScoreRotation, paired, rotate, turn

import brute

INDEX = RopeTable(torch.arange(200.0)[:, None], torch.arange(200.0)[:, None] + 0.5)  # cos of position p is p itself


def key_positions(mode, tokens, first, last, trained_tok):
    rotation = ScoreRotation(mode, INDEX, trained_tok, 0, torch.tensor([[first]]), torch.tensor([first]), torch.tensor([last]))
    return rotation.keys(torch.tensor([[tokens]]), torch.arange(len(tokens)))[0, 0].tolist()


def test_keys_by_rank_of_their_chunk():
    assert key_positions("rank", [16, 24, 80, 7], 100, 103, 64) == [0, 1, 2, 3]


def test_keys_at_their_true_positions():
    assert key_positions("native", [16, 24, 80, 7], 100, 103, 64) == [16, 24, 80, 7]


def test_dynamic_squeezes_what_lies_before_the_newest_quarter():
    # trained 64: the newest 16 stay; tokens 0..96 before block 112..115 are squeezed into 48 positions that end at 96,
    # none more than 64 before the last query (51)
    tokens = [0, 6, 8, 32, 64, 94, 95, 96, 98, 99, 111]
    assert key_positions("dynamic", tokens, 112, 115, 64) == [51, 51, 52, 64, 80, 95, 96, 96, 98, 99, 111]


def test_dynamic_leaves_short_contexts_alone():
    assert key_positions("dynamic", [0, 5, 40, 59], 60, 63, 64) == [0, 5, 40, 59]


def test_self_extend_groups_far_keys_by_sixteen():
    # trained 64: 32 neighbours of the first query (100) stay, others count in steps of 16 backwards from it
    tokens = [0, 3, 4, 5, 52, 67, 68, 69, 99]
    assert key_positions("self_extend", tokens, 100, 103, 64) == [93, 93, 94, 94, 97, 97, 98, 69, 99]
    assert key_positions("self_extend", tokens, 60, 63, 64) == tokens


def test_self_extend_keeps_at_most_8192_neighbours():
    assert key_positions("self_extend", [100_000 - 8192, 100_000 - 8191], 100_000, 100_063, 65_536) == [100_000 - 512, 100_000 - 8191]


def attend_positions(mode, first, last, far, near, window_tok, trained_tok=64):
    """cos column of an :data:`INDEX` table: the positions of a block's queries and of its keys."""
    rotation = AttendRotation(mode, INDEX, trained_tok)
    query = rotation.query(torch.arange(first, last + 1), first, len(far), window_tok)
    factor = rotation.keys(torch.tensor(far + near), first, last, len(far), window_tok)
    assert torch.equal(factor.imag, factor.real + 0.5)
    return query.tolist(), factor.real[:, 0].tolist()


# Block 100..101, window 4 (keys 97..99 before the block, 100 and 101 in it), sinks 0 and 1, blocks 40..43 and 60..63.
FAR, NEAR = [0, 1, 40, 41, 42, 43, 60, 61, 62, 63], [97, 98, 99, 100, 101]


def test_streaming_numbers_without_gaps():
    query, keys = attend_positions("streaming", 100, 101, FAR, NEAR, 4)
    assert keys == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert query == [13, 14]  # the positions of keys 100 and 101


def test_infllm_puts_far_keys_one_window_away():
    query, keys = attend_positions("infllm", 100, 101, FAR, NEAR, 4)
    assert keys == [0] * 10 + [1, 2, 3, 4, 5]
    assert query == [4, 5]


def test_native_keeps_true_positions():
    assert attend_positions("native", 100, 101, FAR, NEAR, 4) == ([100, 101], FAR + NEAR)


def test_dynamic_blends_three_to_one():
    # streaming: the ten far keys end right before the window, 87..96; dynamic: trained 64, span 0..84 into 48 that end at 84
    query, keys = attend_positions("dynamic", 100, 101, FAR, NEAR, 4)
    squeezed = [37, 37, 59, 60, 60, 61, 71, 71, 72, 72]
    assert keys == [0.75 * (87 + u) + 0.25 * squeezed[u] for u in range(10)] + NEAR
    assert query == [100, 101]


def test_unknown_strategy():
    with pytest.raises(ValueError, match="attention rotation 'sideways' is unknown; use streaming, infllm, native or dynamic"):
        attend_positions("sideways", 100, 101, FAR, NEAR, 4)


@pytest.mark.parametrize(("width", "rotary"), [(8, 8), (8, 4), (10, 2)])
def test_rotation_is_a_product_of_complex_numbers(width, rotary):
    x, table = np.random.default_rng(0).standard_normal((5, width)), brute.rope_table(50, rotary)
    at = torch.tensor([0, 1, 7, 30, 49])
    turned = rotate(torch.from_numpy(x).float(), table.cos[at], table.sin[at])
    expected = np.stack([brute.turned(row, brute.phase(int(p), rotary)) for row, p in zip(x, at, strict=True)])
    np.testing.assert_allclose(turned, expected, atol=1e-5)
    pairs = turn(paired(torch.from_numpy(x).float(), table), table.factor[at])
    torch.testing.assert_close(pairs, torch.view_as_real(paired(turned, table)).flatten(-2))


def test_rotation_broadcasts():
    x, table = torch.randn(2, 1, 3, 6), brute.rope_table(12, 4)
    cos, sin = table.cos.view(4, 3, 2), table.sin.view(4, 3, 2)
    turned = rotate(x, cos, sin)
    assert turned.shape == (2, 4, 3, 6)
    for i in range(4):
        torch.testing.assert_close(turned[:, i], rotate(x[:, 0], cos[i], sin[i]))
