"""The Triton merge against the reference: empty parts, any number of them, every type."""

from types import SimpleNamespace

import pytest
import torch
from hipexp_kernels import dispatch, merge_lse

import triton_device
from triton_device import DEVICE

pytestmark = triton_device.needs_triton


def parts(n, shape, dtype=torch.float32, spread=3.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    outs = [torch.randn(shape, generator=rng).to(dtype) for _ in range(n)]
    lses = [spread * torch.randn(shape[:-1], generator=rng) for _ in range(n)]
    return outs, lses


def compare(outs, lses, atol):
    expected = merge_lse(outs, lses, impl="reference")
    actual = merge_lse([x.to(DEVICE) for x in outs], [x.to(DEVICE) for x in lses], impl="triton")
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine.cpu(), theirs, atol=atol, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5, 80), (40, 128), (0, 16)])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_same_as_the_reference(n, shape, spread):
    compare(*parts(n, shape, spread=spread), atol=1e-5)


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    compare(*parts(2, (30, 64), dtype), atol=2e-2)


def test_empty_parts():
    """What stands in an empty part does not matter; where all are empty the output is 0."""
    outs, lses = parts(3, (8, 16))
    for i in range(3):
        lses[i][i : i + 3], outs[i][i : i + 3] = float("-inf"), float("nan")
    compare(outs, lses, atol=1e-5)
    assert (lses[0][2], lses[1][2], lses[2][2]) == (float("-inf"),) * 3
    out, lse = merge_lse([x.to(DEVICE) for x in outs], [x.to(DEVICE) for x in lses], impl="triton")
    assert (out[2] == 0).all() and lse[2] == float("-inf")


@pytest.mark.parametrize(("out", "lse"), [(1.0, float("nan")), (float("nan"), 0.0), (float("nan"), -300.0), (float("nan"), float("inf"))])
def test_what_is_no_number_stays_visible(out, lse):
    outs, lses = parts(2, (2, 4))
    outs[0][0, 0], lses[0][0] = out, lse
    compare(outs, lses, atol=1e-5)


def test_views():
    """Parts that do not lie one row after the other, outputs in another order than they are made in."""
    outs, lses = parts(2, (4, 6, 16))
    swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in outs], [x.transpose(0, 1).contiguous().transpose(0, 1) for x in lses]
    for mine, theirs in zip(
        merge_lse(*[[x.to(DEVICE) for x in part] for part in swapped], impl="triton"), merge_lse(outs, lses), strict=True
    ):
        torch.testing.assert_close(mine.cpu(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("major", "shared", "hopper"), [(9, 227 << 10, True), (12, 99 << 10, False), (8, 163 << 10, False)])
def test_which_gpus_are_of_hoppers_kind(monkeypatch, major, shared, hopper):
    found = SimpleNamespace(multi_processor_count=84, major=major, shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert dispatch.gpu.__wrapped__(torch.device("cuda")) == (84, hopper)


def test_which_implementation_runs(monkeypatch):
    names = {"reference": 1, "vectorized": 2, "triton": 3}
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [dispatch.choose("auto", names, device) for device in (cpu, gpu)] == [2, 3]
    assert dispatch.choose("reference", names, gpu) == 1 and dispatch.choose("auto", {"vectorized": 2}, gpu) == 2
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert dispatch.choose("auto", names, gpu) == 2
    with pytest.raises(ValueError, match="pip install triton"):
        merge_lse(*parts(2, (3, 4)), impl="triton")
