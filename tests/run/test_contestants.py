"""The dense contestants compute attention, and the timers count as they say. No test looks at a time."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from hipexp.run import contestants as c
from hipexp.run import timing
from hipexp.run.contestants import decode_contestants, prefill_contestants
from hipexp.run.timing import Contestant, runnable

CPU = torch.device("cpu")
GPU = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def inputs(H, K, Q, T, D, device=CPU, dtype=torch.float32):
    generator = torch.Generator().manual_seed(H * T + Q)
    return tuple(torch.randn(n, m, D, generator=generator).to(device, dtype) for n, m in ((H, Q), (K, T), (K, T)))


def reference(q, k, v):
    """Attention in fp64 of the last queries ``[H, Q, D]``, the mask written out."""
    Q, T = q.shape[1], k.shape[1]
    q, k, v = (x.double().cpu() for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    hidden = torch.ones(Q, T, dtype=torch.bool).triu(T - Q + 1)
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, float("-inf"))
    return torch.softmax(logits, -1) @ v


def assert_close(out, expected):
    error = (out.double().cpu() - expected).norm() / expected.norm()
    assert error < (1e-5 if out.dtype == torch.float32 else 2e-2), f"relative error {error:.2g}"


def named(makers, device):
    """Contestants as parameters; what one lacks here is the reason to skip it."""

    def parameter(contestant):
        lacks = contestant.missing()
        return pytest.param(contestant, id=contestant.name, marks=pytest.mark.skipif(lacks is not None, reason=str(lacks)))

    return [parameter(contestant) for contestant in makers(device)]


DECODE_SHAPES = [(4, 2, 77, 64), (6, 1, 512, 128), (8, 8, 130, 64)]  # H, K, T, D


def check_decode(contestant, dtype, device, shapes=DECODE_SHAPES):
    for H, K, T, D in shapes:
        q, k, v = inputs(H, K, 1, T, D, device, dtype)
        out = contestant.run(q[:, 0], k, v)
        assert out.shape == (H, D) and out.dtype == dtype
        assert_close(out[:, None], reference(q, k, v))


def check_prefill(contestant, dtype, device):
    for H, K, Q, T, D in [(4, 2, 40, 40, 64), (4, 2, 37, 300, 64), (6, 2, 256, 1024, 64), (2, 2, 130, 131, 64)]:
        q, k, v = inputs(H, K, Q, T, D, device, dtype)
        out = contestant.run(q, k, v)
        assert out.shape == q.shape and out.dtype == dtype
        assert_close(out, reference(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contestant", [x for x in named(decode_contestants, CPU) if "flex" not in x.id])
def test_decode_on_a_cpu(contestant, dtype):
    check_decode(contestant, dtype, CPU)


@pytest.mark.slow
@pytest.mark.skipif(bool(timing.missing_compiler()), reason="no C++ compiler")
def test_compiled_decode_on_a_cpu():
    (flex,) = [x for x in decode_contestants(CPU) if "flex" in x.name]
    check_decode(flex, torch.float32, CPU, DECODE_SHAPES[:1])  # each one is compiled anew


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("contestant", named(prefill_contestants, CPU))
def test_prefill_on_a_cpu(contestant, dtype, monkeypatch):
    monkeypatch.setattr(c, "TILE_LOGITS", 4 * 300 * 11)  # several tiles
    check_prefill(contestant, dtype, CPU)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("contestant", named(decode_contestants, GPU))
def test_decode_on_a_gpu(contestant):
    check_decode(contestant, torch.bfloat16, GPU)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("contestant", named(prefill_contestants, GPU))
def test_prefill_on_a_gpu(contestant):
    check_prefill(contestant, torch.bfloat16, GPU)


@pytest.mark.gpu
@needs_gpu
def test_graphs_give_what_calls_give():
    layers = [(q[:, 0], k, v) for q, k, v in (inputs(8, 2, 1, 300 + i, 64, GPU, torch.bfloat16) for i in range(3))]
    outs = [torch.empty_like(q) for q, _, _ in layers]
    able, _ = runnable(decode_contestants(GPU), layers)
    for contestant in able:
        call, graph = timing._captured(Contestant("x", lambda q, k, v, out, run=contestant.run: out.copy_(run(q, k, v))), [
            (*layer, out) for layer, out in zip(layers, outs, strict=True)
        ])  # fmt: skip
        for out in outs:
            out.zero_()
        call()
        assert graph, contestant.name
        for (q, k, v), out in zip(layers, outs, strict=True):
            assert_close(out[:, None], reference(q[:, None], k, v))


@pytest.mark.gpu
@needs_gpu
def test_what_cannot_be_captured_is_timed_without_a_graph():
    layers = [(torch.ones(8, device=GPU),)] * 2
    able = Contestant("able", lambda x: x + 1)
    rows = timing.time_alternating([Contestant("reads back", lambda x: x * x.sum().item()), able], layers, rounds=3)
    assert [row["graph"] for row in rows] == [False, True]
    assert not timing.time_alternating([able], layers, rounds=3, graphs=False)[0]["graph"]


def test_our_own_operation_without_pruning():
    """What runs as ``attend_blocks triton``, here by the implementation that a CPU has."""
    check_decode(Contestant("own", partial(c._decode_own, impl="vectorized")), torch.float32, CPU)


@pytest.mark.parametrize(("Q", "T"), [(40, 40), (128, 128), (37, 300), (256, 1024), (130, 131), (300, 1000)])
def test_the_block_mask_is_the_lower_right_one(Q, T):
    mask = c.lower_right(Q, T, CPU)
    size = c.FLEX_BLOCK_TOK
    seen = torch.zeros(-(-Q // size) * size, -(-T // size) * size, dtype=torch.bool)
    query, key = torch.arange(len(seen))[:, None], torch.arange(seen.shape[1])
    for n, (some, full) in enumerate(zip(mask.kv_num_blocks[0, 0], mask.full_kv_num_blocks[0, 0], strict=True)):
        rows = slice(n * size, (n + 1) * size)
        for block in mask.full_kv_indices[0, 0, n, :full]:
            seen[rows, block * size : (block + 1) * size] = True
        for block in mask.kv_indices[0, 0, n, :some]:
            columns = slice(block * size, (block + 1) * size)
            assert not seen[rows, columns].any()
            seen[rows, columns] = mask.mask_mod(None, None, query[rows], key[columns])
    assert torch.equal(seen[:Q, :T], torch.ones(Q, T, dtype=torch.bool).tril(T - Q))


def test_who_cannot_run_is_named_with_the_reason(monkeypatch):
    def fails(*_):
        raise RuntimeError("No available kernel.\nmore")

    monkeypatch.setattr("shutil.which", lambda _: None)
    able, reasons = runnable([*decode_contestants(CPU), Contestant("odd", fails)], [(torch.ones(2, 4), *[torch.ones(1, 8, 4)] * 2)])
    assert [x.name for x in able] == ["sdpa packed", "matmuls, keys first", "matmuls packed"]
    assert reasons == {"flex packed": "no C++ compiler", "odd": "RuntimeError: No available kernel."}


def test_contestants_take_turns_over_all_layers():
    seen = []
    players = [Contestant(name, lambda x, name=name: seen.append((name, int(x)))) for name in "ab"]
    rows = timing.time_alternating(players, [(torch.tensor(i),) for i in range(3)], rounds=4, warmup=1)
    assert [name for name, _ in seen] == ["a", "b"] * 5
    assert [layer for _, layer in seen] == [i % 3 for i in range(10)]
    assert [(row["name"], row["rounds"], row["layers"], row["graph"]) for row in rows] == [("a", 4, 3, False), ("b", 4, 3, False)]
    assert all(row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in rows)


def test_fastest():
    assert timing.fastest([{"name": "a", "mean_ms": 2.0}, {"name": "b", "mean_ms": 1.0}])["name"] == "b"


def test_bandwidth_and_machine():
    rates = timing.memory_bandwidth(CPU, n_bytes=1 << 20, repeats=2)
    assert set(rates) == {"read", "copy"} and min(rates.values()) > 0
    assert {"packages", "device", "threads", "load"} <= set(timing.describe_machine(CPU))


def test_it_loads_without_the_framework():
    blocked = ["hydra", "omegaconf", "transformers", "matplotlib", "datasets", "wandb", "pyarrow"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import hipexp.run.gpu, hipexp.run.probes, hipexp.run.selected"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
