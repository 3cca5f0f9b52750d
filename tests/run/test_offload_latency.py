"""Latency of offloaded steps, on a CPU with little to do: same bits, counted traffic. No test looks at a time."""

import pytest
import torch

from hipexp.attention.inputs import Geometry
from hipexp.run import attention_latency as latency
from hipexp.run.gpu import preset
from hipexp.run.offload_latency import offload_row

GEOMETRY, CPU = Geometry(4, 2, 16), torch.device("cpu")


@pytest.mark.parametrize("name", ["3stage", "3stage_scan", "3stage_plus"])
def test_steps_of_an_offloaded_layer_beside_a_resident_one(name):
    layer = latency.make_layers(GEOMETRY, 8192, 1, CPU)[0]
    row = offload_row(latency.layer_attention(preset(name), GEOMETRY, CPU), layer, 1, name, device_tok=4096)
    assert (row["phase"], row["context_tok"], row["steps"]) == ("offload", 8192, 16)
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
