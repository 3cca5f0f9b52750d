"""Positions of the pooled queries under every strategy against a table written by hand (those of keys: tests/kernels)."""

from types import SimpleNamespace

import pytest
import torch

from exact_tables import ExactTables
from hipexp.attention.rope import score_rotation
from hipexp.config.schema import PruneRope

SCAN = 768  # the paper's window of 1024 less its first chunk of 256
POSITION = torch.tensor([[1280, 1284], [5000, 5004]])  # two blocks, two groups of four queries each
CHUNKS = torch.tensor([[2, 17]])

# Left probe and right probe: a row for each block. Chunk-indexed: 768 + 2 and 768 + 17, but never after the query.
TABLE = {
    PruneRope.relative: ([[769, 769], [769, 769]], [[768, 768], [768, 768]], None),
    PruneRope.infllm: ([[768, 768], [768, 768]], [[768, 768], [768, 768]], None),
    PruneRope.chunk_indexed: ([[770, 770], [785, 785]], [[770, 770], [785, 785]], "rank"),
    PruneRope.dynamic: ([[1280, 1284], [5000, 5004]], [[1280, 1284], [5000, 5004]], "dynamic"),
    PruneRope.self_extend: ([[1280, 1284], [5000, 5004]], [[1280, 1284], [5000, 5004]], "self_extend"),
    PruneRope.native: ([[1280, 1284], [5000, 5004]], [[1280, 1284], [5000, 5004]], "native"),
}


def rotation_of(strategy, cos_sin, position=POSITION, n_chunks=17):
    queries = SimpleNamespace(first=position[:, 0], last=position[:, 0] + 63, end=5064)
    return score_rotation(strategy, ExactTables(cos_sin, 2048), position, n_chunks, queries, SCAN)


def positions_of(strategy, position=POSITION, chunks=CHUNKS, heads=1):
    """Positions of the queries ``[H, N, R]`` for the left and the right probe, and the rotation."""
    rotation = rotation_of(strategy, lambda p: (p[:, None] + 1.0, torch.zeros(len(p), 1)), position, int(chunks.max()))  # cos of p is p + 1
    left, right = rotation.queries(torch.tensor([1.0, 0.0]).expand(heads, *position.shape, 2), chunks)
    return (left[..., 0] - 1).tolist(), (right[..., 0] - 1).tolist(), rotation


def test_the_table_is_complete():
    assert set(TABLE) == set(PruneRope) - {PruneRope.none}


@pytest.mark.parametrize("strategy", list(TABLE))
def test_positions_of_pooled_queries(strategy):
    left, right, mode = TABLE[strategy]
    *found, keys = positions_of(strategy)
    assert found == [[left], [right]]
    assert keys.turns_keys == bool(mode) and keys.mode == (mode or strategy.value)
    if mode:
        assert keys.first.tolist() == [1280, 5000] and keys.last.tolist() == [1343, 5063] and keys.trained_tok == 2048


def test_chunk_indexed_queries_never_move_later():
    assert positions_of(PruneRope.chunk_indexed, torch.tensor([[769, 770, 771]]), torch.tensor([[2]]))[0] == [[[769, 770, 770]]]


def test_chunk_indexed_counts_each_list_by_itself():
    """Two key/value heads with two query heads each: the number of chunks is that of the head's own list."""
    left, _, _ = positions_of(PruneRope.chunk_indexed, POSITION, torch.tensor([[2, 17], [3, 30]]), heads=4)
    assert left == [[[770, 770], [785, 785]]] * 2 + [[[771, 771], [798, 798]]] * 2


def test_none_rotates_nothing():
    assert rotation_of(PruneRope.none, None) is None


@pytest.mark.parametrize("strategy", [PruneRope.relative, PruneRope.infllm])
def test_a_query_that_meets_raw_keys_carries_their_attention_factor(strategy):
    """YaRN multiplies queries and keys, in the rotated dimensions alone."""
    q = torch.randn(2, 2, 2, 4)
    plain, yarn = (
        rotation_of(strategy, lambda p, f=f: (f * torch.cos(p[:, None] * 0.1), f * torch.sin(p[:, None] * 0.1))) for f in (1, 1.5)
    )
    for raw, own in zip(plain.queries(q, CHUNKS), yarn.queries(q, CHUNKS), strict=True):
        torch.testing.assert_close(own, raw * torch.tensor([2.25, 2.25, 1, 1]))
