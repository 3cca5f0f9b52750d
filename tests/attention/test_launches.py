"""What a decode step launches and allocates: a few kernels, and nothing that grows with the context."""

import dataclasses
import importlib
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hipexp.attention import LayerAttention, Memory
from hipexp.attention.rope import RopeTables
from hipexp.config.schema import AttendRope, Heads, LayerPlan, PruneRope, Stage
from triton_device import DEVICE, needs_triton

H, K, D = 4, 2, 16
STAGES = [
    Stage(64, 512, 64, 4, 8, rope=PruneRope.relative),
    Stage(16, 256, 64, 4, 4, rope=PruneRope.relative),
    Stage(8, 128, 64, 1, 2, rope=PruneRope.relative),
]
OPS = ("attend_blocks", "keep_top", "score_chunks", "summarize")
NOTHING = ("empty", "detach", "alias", "_local_scalar_dense", "lift_fresh")  # allocations, names, and values read by the host
FULL, CACHED = 0, 1  # steps


def cos_sin(positions):
    angle = positions.to(DEVICE)[:, None] * 100.0 ** -(torch.arange(0, D, 2, device=DEVICE) / D)
    return angle.cos(), angle.sin()


class Counted(TorchDispatchMode):
    """Operations that read or write memory, bytes that they allocate, and kernels that are launched meanwhile (what these do inside is theirs)."""

    def __init__(self):
        super().__init__()
        self.operations, self.launches, self.bytes, self.inside = [], 0, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.inside and not func.is_view:
            made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
            given = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)} | {
                x.data_ptr() for x in (kwargs or {}).values() if isinstance(x, torch.Tensor)
            }
            self.bytes += sum(x.nbytes for x in made if x.data_ptr() not in given)
            name = func.overloadpacket.__name__
            if not name.startswith(NOTHING):
                self.operations.append(name)
        return out


@pytest.fixture
def counted(monkeypatch):
    """A context that counts; in Triton's interpreter a launch is the call of a grid."""
    active = []

    @contextmanager
    def count():
        with Counted() as counter:
            active.append(counter)
            yield counter
            active.clear()

    from triton.runtime import interpreter, jit

    owner, name = (jit.JITFunction, "run") if DEVICE.type == "cuda" else (interpreter.GridExecutor, "__call__")
    launch = getattr(owner, name)

    def spied(self, *args, **kwargs):
        for now in active:
            now.launches, now.inside = now.launches + 1, True
        try:
            return launch(self, *args, **kwargs)
        finally:
            for now in active:
                now.inside = False

    monkeypatch.setattr(owner, name, spied)
    return count


def on(impl, monkeypatch):
    for op in OPS:
        monkeypatch.setattr(importlib.import_module(f"hipexp_kernels.{op}"), "choose", lambda _, known, device=None: known[impl])


def layer(heads=Heads.shared, second=None, **first):
    stages = [dataclasses.replace(STAGES[0], **first), dataclasses.replace(STAGES[1], **(second or {})), *STAGES[2:]]
    plan = LayerPlan(0, stages, stages, sink_tok=16, window_tok=128, heads=heads, attend=AttendRope.streaming, groups=[])
    return LayerAttention(plan, RopeTables(cos_sin, 512), D**-0.5)


def steps(attention, T, count, *numbers):
    """The counts of steps of a sequence of ``T`` tokens, after steps of all kinds."""
    make = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(n, t, D, generator=make).to(DEVICE) for n, t in ((H, 1), (K, T), (K, T)))
    memory, state, at = Memory(), attention.method.new_state(), attention.step_at(T - 1, DEVICE)
    counters = []
    with torch.inference_mode():
        for memory.step in (FULL, CACHED):
            attention(q, k, v, T - 1, memory, at, state)
        for memory.step in numbers:
            with count() as counter:
                attention(q, k, v, T - 1, memory, at, state)
            counters.append(counter)
    return counters


@needs_triton
@pytest.mark.parametrize(
    ("first", "heads"),
    [
        ("bounds", Heads.shared),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("descent", Heads.shared), ("descent", Heads.per_kv), ("exact", Heads.shared), ("grid", Heads.shared))
        ),
    ],
)
def test_a_step_is_a_few_launches(monkeypatch, counted, heads, first):
    from hipexp.config.schema import Representative

    on("triton", monkeypatch)
    by = dict(representative=Representative(first))
    attention = layer(heads, second=by, **by)
    cached, full = steps(attention, 900, counted, CACHED, FULL)
    assert (cached.launches, cached.operations) == (1, [])
    assert (full.launches, full.operations) == (7, [])  # two for every stage, and attention, whose last program merges


@needs_triton
def test_nothing_grows_with_the_context_on_a_gpu(monkeypatch, counted):
    on("triton", monkeypatch)
    attention = layer()
    (short_cached, short), (long_cached, long) = (steps(attention, T, counted, CACHED, FULL) for T in (8192, 65536))
    assert short_cached.bytes == long_cached.bytes > 0
    assert long.bytes - short.bytes == K * 4 * (65536 - 8192) // 64  # the scores of the first stage


@needs_triton
def test_nothing_grows_with_the_context_on_a_cpu(monkeypatch, counted):
    on("vectorized", monkeypatch)
    attention = layer()
    steps(attention, 65536, counted, FULL)  # memory that is held is there
    (short,), (long,) = (steps(attention, T, counted, CACHED) for T in (8192, 65536))
    assert (short.bytes, short.operations) == (long.bytes, long.operations)


def test_layers_at_one_place_share_their_numbers():
    from hipexp.attention.layer import _shared_step

    _shared_step.cache_clear()
    q, k = torch.randn(H, 1, D), torch.randn(K, 700, D)
    with torch.inference_mode():
        for one in (layer(), layer(), layer(keep_tok=1024)):
            one(q.to(DEVICE), k.to(DEVICE), k.to(DEVICE), 699, Memory())
    assert _shared_step.cache_info().misses == 1
