"""All ways to attend to a selection give the same result; other libraries are given what they ask for."""

import sys
from types import ModuleType

import pytest
import torch
from hipexp_kernels.rope import AttendRotation, RopeTable
from torch.nn.attention.flex_attention import flex_attention

from hipexp.attention.inputs import Geometry
from hipexp.config.schema import Pipeline, Rope, Stage
from hipexp.run import attention_latency as latency
from hipexp.run import selected
from hipexp.run.selected import Chosen

GEOMETRY = Geometry(4, 2, 16, torch.float32)
N_TOK = 512
PIPELINE = Pipeline(
    method="hip", sink_tok=16, window_tok=64, rope=Rope(), name="small",
    stages=[Stage(chunk_tok=32, keep_tok=128, query_block_tok=32), Stage(chunk_tok=8, keep_tok=64, query_block_tok=32)],
)  # fmt: skip


class FakePlan:
    """FlashInfer's decode wrapper for one sequence, as its documentation says: pages ``[P, K, page_size, D]`` under ``HND``."""

    def __init__(self, workspace, kv_layout, use_tensor_cores):
        assert workspace.dtype == torch.uint8 and kv_layout == "HND"

    def plan(self, indptr, indices, last_page_len, n_heads, n_kv_heads, head_dim, page_size, q_data_type, kv_data_type):
        assert {x.dtype for x in (indptr, indices, last_page_len)} == {torch.int32} and indptr.tolist() == [0, len(indices)]
        self.pages, self.last, self.heads, self.shape = indices.long(), int(last_page_len), n_heads, (n_kv_heads, page_size, head_dim)

    def run(self, q, pages):
        assert q.shape == (1, self.heads, self.shape[2]) and all(x.shape[1:] == self.shape for x in pages)
        n = (len(self.pages) - 1) * self.shape[1] + self.last
        k, v = (x[self.pages].transpose(0, 1).flatten(1, 2)[:, :n] for x in pages)
        logits = q.view(len(k), -1, q.shape[-1]) @ k.mT * q.shape[-1] ** -0.5
        return (logits.softmax(-1) @ v).view(q.shape)


@pytest.fixture
def others(monkeypatch):
    """FlexAttention uncompiled, and something that looks like FlashInfer."""
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = FakePlan
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(selected, "compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(selected, "missing", lambda _: None)
    monkeypatch.setattr(selected, "missing_compiler", lambda: None)


def test_all_attend_to_the_same_tokens(others):
    chosen = Chosen(torch.tensor([16, 40, 120, 200, 440]), N_TOK, 16, 64, 8)
    assert len(chosen.tokens) == 16 + 5 * 8 + 64 and (chosen.tokens.diff() > 0).all()
    torch.manual_seed(0)
    q, (k, v) = torch.randn(4, 16), torch.randn(2, 2, N_TOK, 16)
    table = RopeTable(torch.ones(256, 8), torch.zeros(256, 8))  # no angle at all, so that the rotating one has the same result
    for contestant in selected.selected_contestants(AttendRotation("streaming", table, 0)):
        assert selected.relative_error(contestant.run(q, k, v, chosen), q, k, v, chosen) < 1e-5, contestant.name
    fewer = Chosen(chosen.starts[1:], N_TOK, 16, 64, 8)
    assert selected.relative_error(contestant.run(q, k, v, fewer), q, k, v, chosen) > 1e-3


def test_few_blocks_of_many(others):
    """FlexAttention's lists have to be as wide as there are blocks."""
    n_tok = 96 * 128
    chosen = Chosen(torch.tensor([16, 1024, 1152, 5000, *range(6016, 6400, 8), 11000]), n_tok, 16, 64, 8)
    torch.manual_seed(0)
    q, (k, v) = torch.randn(4, 16), torch.randn(2, 2, n_tok, 16)
    mask = selected.block_mask(chosen, 2)
    assert mask.kv_indices[0, 0, 0, : mask.kv_num_blocks.item()].tolist() == [0, 8, 9, 39, 85, 95]
    assert mask.full_kv_indices[0, 0, 0, : mask.full_kv_num_blocks.item()].tolist() == [47, 48, 49]
    assert selected.relative_error(selected._flex(q, k, v, chosen), q, k, v, chosen) < 1e-5


def test_who_is_wrong_is_left_out(others, monkeypatch):
    monkeypatch.setattr(selected, "_gather_sdpa", lambda q, k, v, chosen: 2 * q)
    layers = latency.make_layers(GEOMETRY, N_TOK, 1, torch.device("cpu"))
    attention = latency.layer_attention(PIPELINE, GEOMETRY, torch.device("cpu"))
    rows = {row["impl"]: row for row in selected.selected_rows(attention, layers, rounds=1, skip=("flex, our mask",))}
    assert rows["gather, then sdpa"]["note"].startswith("wrong: ") and "mean_ms" not in rows["gather, then sdpa"]
    assert rows["attend_blocks"]["against"] != "gather, then sdpa"


def test_rows(others):
    layers = latency.make_layers(GEOMETRY, N_TOK, 2, torch.device("cpu"))
    attention = latency.layer_attention(PIPELINE, GEOMETRY, torch.device("cpu"))
    rows = {row["impl"]: row for row in selected.selected_rows(attention, layers, rounds=2, skip=("flex, our mask",))}
    others = {"gather, then sdpa", "sdpa, gathered before", "flashinfer, a block a page"}
    assert set(rows) == {"attend_blocks", "attend_blocks, rotating"} | others
    mine, rotating = rows["attend_blocks"], rows["attend_blocks, rotating"]
    assert 16 + 64 < mine["tokens"] <= 16 + 64 + 64 and mine["error"] < 1e-5 and rotating["error"] is None
    best = min((rows[name] for name in rows if "attend" not in name), key=lambda row: row["mean_ms"])
    assert mine["against"] == best["impl"] and mine["speedup"] == best["mean_ms"] / mine["mean_ms"]
    assert "speedup" not in best


def test_what_is_not_installed_is_told():
    layers = latency.make_layers(GEOMETRY, N_TOK, 1, torch.device("cpu"))
    attention = latency.layer_attention(PIPELINE, GEOMETRY, torch.device("cpu"))
    rows = selected.selected_rows(attention, layers, rounds=1, skip=("flex, our mask",))
    assert [row["note"] for row in rows if "note" in row] == ["flashinfer is not installed"]


def test_pages_that_do_not_fit(others):
    chosen = Chosen(torch.tensor([16]), 509, 16, 64, 8)
    with pytest.raises(ValueError, match="pages of 8 tokens need a context, sinks and a window that are multiples"):
        selected._flashinfer(torch.randn(4, 16), *torch.randn(2, 2, 509, 16), chosen)
