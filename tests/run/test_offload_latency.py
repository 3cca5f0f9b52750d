"""Latency of offloaded steps, on a CPU with little to do: same bits, counted traffic. No test looks at a time."""

import pytest
import torch

import triton_device
from hipexp.attention.inputs import GEOMETRIES, Geometry
from hipexp.run import attention_latency as latency
from hipexp.run.gpu import preset
from hipexp.run.offload_latency import _same_selection, offload_row

GEOMETRY, CPU = Geometry(4, 2, 16), torch.device("cpu")


@pytest.mark.parametrize("name", ["3stage", "3stage_scan", "3stage_plus"])
def test_steps_of_an_offloaded_layer_beside_a_resident_one(name):
    layer = latency.make_layers(GEOMETRY, 8192, 1, CPU)[0]
    row = offload_row(latency.layer_attention(preset(name), GEOMETRY, CPU), layer, 1, name, device_tok=4096)
    assert (row["phase"], row["context_tok"], row["steps"], row["other_steps"]) == ("offload", 8192, 16, 0)
    assert 0 < row["link_bytes"] <= row["worst_link_bytes"]
    assert 0 < row["cached_ms"] <= row["worst_ms"] and 0 < row["resident_cached_ms"] <= row["resident_worst_ms"]
    assert row["offloaded_bytes"] < 0.7 * row["resident_bytes"]


def test_where_all_that_is_wanted_fits_the_device():
    """Then a period later nothing crosses the link: all was fetched in the first."""
    layer = latency.make_layers(GEOMETRY, 5120, 1, CPU)[0]
    row = offload_row(latency.layer_attention(preset("3stage"), GEOMETRY, CPU), layer, 1, "3stage", device_tok=5120 + 2048)
    assert row["link_bytes"] < 5120 * 2 * 2 * 16 * 2 * 0.05  # a twentieth of the keys and values


def test_results_that_differ_are_refused(monkeypatch):
    layer = latency.make_layers(GEOMETRY, 8192, 1, CPU)[0]
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    with pytest.raises(ArithmeticError, match="step 0 differs by 0"):
        offload_row(latency.layer_attention(preset("3stage"), GEOMETRY, CPU), layer, 1, "3stage", device_tok=4096)


def test_another_selection_is_no_other_result():
    """Nor is what lies behind the chunks that count."""
    counts, starts = torch.tensor([[2]]), torch.tensor([[[8, 24, 7]]])
    assert _same_selection([(starts, counts), (torch.tensor([[[8, 24, -1]]]), counts.clone())])
    assert not _same_selection([(starts, counts), (torch.tensor([[[8, 32, 7]]]), counts)])
    assert not _same_selection([(starts, counts), (starts, counts + 1)])


@triton_device.needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["3stage", "3stage_scan", "3stage_plus"])
def test_steps_on_a_gpu(name):
    device = torch.device("cuda")
    with torch.inference_mode():
        layer = latency.make_layers(GEOMETRIES["llama31_8b"].as_dtype(torch.bfloat16), 65_536, 1, device)[0]
        row = offload_row(latency.layer_attention(preset(name), layer.geometry, device), layer, 1, name, device_tok=16_384)
    assert 0 < row["link_bytes"] <= row["worst_link_bytes"] and row["offloaded_bytes"] < 0.3 * row["resident_bytes"]
    assert row["other_steps"] == 0 or name == "3stage"
