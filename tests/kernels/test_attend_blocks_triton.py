"""The Triton kernel against the reference: the cases of architecture.md §8, on a GPU or in the interpreter."""

from importlib import import_module

import pytest
import torch
from hipexp_kernels import attend_blocks
from hipexp_kernels.rope import AttendRotation

import brute
import triton_device
from triton_device import DEVICE, DTYPES

pytestmark = triton_device.needs_triton

MODES = (None, "streaming", "infllm", "native", "dynamic")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def call(K=2, G=2, Q=1, D=32, T=150, first=(149,), S=1, M=6, block=8, sink=8, window=32, exact=(), dtype=torch.float32, seed=0):
    """Arguments of a call: ``M`` blocks are asked for, fewer where a block has no more candidates; the last may overlap the window."""
    rng = torch.Generator().manual_seed(seed)
    N = len(first)
    blocks, counts = torch.full((S, N, M), -1), torch.zeros((S, N), dtype=torch.int64)
    for s in range(S):
        for n, start in enumerate(first):
            grid = torch.arange(sink, max(sink, start + 1), block)
            count = min(M, len(grid))
            blocks[s, n, :count] = grid[torch.randperm(len(grid), generator=rng)[:count]].sort().values
            counts[s, n] = count
    q, k, v = (torch.randn(shape, generator=rng).to(dtype) for shape in ((K * G, N, Q, D), (K, T, D), (K, T, D)))
    return dict(q=q, k=k, v=v, blocks=blocks, counts=counts, first=torch.tensor(first), exact=torch.tensor([n in exact for n in range(N)]),
                block_tok=block, sink_tok=sink, window_tok=window, scale=D**-0.5)  # fmt: skip


def rotation(arguments, mode, rotary=None, trained=64):
    if mode is None:
        return None
    Q, T = arguments["q"].shape[2], arguments["k"].shape[1]
    packed = arguments["sink_tok"] + arguments["blocks"].shape[-1] * arguments["block_tok"] + arguments["window_tok"] + Q
    true = T if mode in ("native", "dynamic") or arguments["exact"].any() else 0
    return AttendRotation(mode, brute.rope_table(max(packed, true + Q), rotary or arguments["q"].shape[-1]), trained)


def compare(arguments, mode=None, rotary=None, trained=64, softcap=None):
    turn = rotation(arguments, mode, rotary, trained)
    expected = attend_blocks(**arguments, rotation=turn, softcap=softcap, impl="reference")
    actual = attend_blocks(**triton_device.on_device(arguments), rotation=turn and on_device(turn), softcap=softcap, impl="triton")
    assert_same(arguments, actual, expected)


def on_device(turn):
    table = turn.table
    return AttendRotation(turn.mode, type(table)(table.cos.to(DEVICE), table.sin.to(DEVICE)), turn.trained_tok)


def assert_same(arguments, actual, expected):
    T, Q = arguments["k"].shape[1], arguments["q"].shape[2]
    rows = arguments["first"][:, None] + torch.arange(Q) < T
    assert actual[0].dtype == arguments["q"].dtype and actual[1].dtype == torch.float32
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.cpu()[:, rows].float(), theirs[:, rows].float(), atol=TOLERANCE[arguments["q"].dtype], rtol=1e-5)


PREFILL = dict(Q=16, first=(0, 16, 64, 96, 144), T=150)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [dict(G=4), PREFILL], ids=["decode", "prefill"])
def test_modes(mode, shape, dtype):
    compare(call(**shape, dtype=dtype), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [dict(first=(70, 149)), dict(PREFILL)], ids=["decode", "prefill"])
def test_exact_blocks(mode, shape):
    compare(call(**shape, exact=(1,)), mode)


@pytest.mark.parametrize("exact", [(), (0,)])
def test_a_decode_step_reads_its_numbers_from_one_tensor(exact):
    """``first`` and ``exact`` as parts of one list of ints, as a decode step has them."""
    arguments = call(first=(149,), exact=exact)
    numbers = torch.tensor([149, 7, len(exact)])
    compare(arguments | dict(first=numbers[:1], exact=numbers[2:]), "streaming")


@pytest.mark.parametrize("D", [16, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("shape", [dict(), dict(Q=8, first=(96, 144))], ids=["decode", "prefill"])
def test_head_dimensions(D, shape):
    compare(call(D=D, M=3, **shape), "streaming")
    compare(call(D=D, M=3, **shape), None)


@pytest.mark.parametrize(("D", "rotary"), [(32, 16), (64, 16), (80, 32), (64, 2)])
@pytest.mark.parametrize("Q", [1, 6])
def test_partial_rotary(D, rotary, Q):
    compare(call(D=D, Q=Q, first=(140,)), "streaming", rotary)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (1, 4), (2, 8), (1, 16), (2, 3)])
@pytest.mark.parametrize("shape", [dict(), dict(Q=5, first=(3, 140))], ids=["decode", "prefill"])
def test_heads(heads, shape):
    K, G = heads
    compare(call(K=K, G=G, **shape), "streaming")
    compare(call(K=K, G=G, S=K, **shape), "streaming")
    compare(call(K=K, G=G, S=K * G, **shape), "streaming")


@pytest.mark.parametrize("block", [1, 4, 8])
@pytest.mark.parametrize("sizes", [(0, 1), (3, 6), (8, 200)])
@pytest.mark.parametrize("Q", [1, 7])
def test_sizes(block, sizes, Q):
    sink, window = sizes
    compare(call(block=block, sink=sink, window=window, Q=Q, first=(0, 5, 11, 119), T=122), "streaming")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("Q", [1, 4])
def test_few_keys(mode, Q):
    """A text shorter than a block, nothing selected, a query alone with its key."""
    compare(call(T=3, first=(0, 2), M=0, sink=0, window=1, Q=Q), mode)
    compare(call(T=6, first=(0, 4), M=2, Q=Q), mode)


@pytest.mark.parametrize("Q", [1, 16])
def test_what_is_not_attended_is_not_read(Q):
    """Noise past the counts, lists in int32, NaN in keys outside the selection."""
    arguments = call(Q=Q, first=(128,), T=150, M=6, window=16)
    arguments["counts"][:] = 4
    expected = attend_blocks(**arguments, rotation=rotation(arguments, "streaming"), impl="reference")
    read = torch.zeros(150, dtype=torch.bool)
    read[:8], read[113 : 128 + Q] = True, True
    for start in arguments["blocks"][0, 0, :4].tolist():
        read[start : start + 8] = True
    for name in "kv":
        arguments[name][:, ~read] = float("nan")
    for noise in (-(2**40), -1, 5, 2**40):
        arguments["blocks"][..., 4:] = noise
        turn = on_device(rotation(arguments, "streaming"))
        assert_same(arguments, attend_blocks(**triton_device.on_device(arguments), rotation=turn, impl="triton"), expected)
    short = {**arguments, **{name: arguments[name].clamp(-1, 200).int() for name in ("blocks", "counts", "first")}}
    assert_same(arguments, attend_blocks(**triton_device.on_device(short), rotation=turn, impl="triton"), expected)


@pytest.mark.parametrize("shape", [dict(), dict(Q=8, first=(96, 144))], ids=["decode", "prefill"])
@pytest.mark.parametrize("mode", ["streaming", "native"])
def test_softcap(shape, mode):
    compare(call(**shape), mode, softcap=2.0)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_longer_than_a_tile_of_keys(mode):
    compare(call(K=1, G=1, Q=40, first=(0, 40, 117)), mode)


@pytest.mark.parametrize("trained", [16, 100, 1000])
@pytest.mark.parametrize("Q", [1, 8])
def test_dynamic(trained, Q):
    compare(call(Q=Q, first=(20, 60, 140)), "dynamic", trained=trained)


@pytest.mark.parametrize("Q", [1, 8])
def test_capacity_buffers(Q):
    """Views of a cache larger than the text, tokens outside heads, and queries as a model hands them over."""
    arguments = call(Q=Q, first=(96, 140 if Q == 8 else 149))
    turn = rotation(arguments, "streaming")
    expected = attend_blocks(**arguments, rotation=turn, impl="reference")
    cache = torch.full((2, 200, 2, 32), float("nan"), device=DEVICE)
    moved = triton_device.on_device(arguments)
    for at, name in enumerate("kv"):
        cache[at, :150].transpose(0, 1).copy_(moved[name])
        moved[name] = cache[at].transpose(0, 1)
    moved["q"] = moved["q"].permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    assert_same(arguments, attend_blocks(**moved, rotation=on_device(turn), impl="triton"), expected)


def test_repeated_calls():
    """The counters are back where they were."""
    for seed in range(3):
        compare(call(K=1, first=(140, 149), M=10, seed=seed), "streaming")


@pytest.mark.parametrize("Q", [1, 4])
def test_offsets_past_two_to_the_31(Q):
    """A cache of more than 2^31 numbers, of which few are touched: the same keys as in a small one, further apart."""
    arguments = call(K=1, Q=Q, first=(140,), dtype=torch.float16)
    turn = rotation(arguments, "streaming")
    expected = attend_blocks(**arguments, rotation=turn, impl="reference")
    far = 2**31 // 32
    moved = triton_device.on_device({**arguments, "blocks": arguments["blocks"] + far, "first": arguments["first"] + far})
    for name in "kv":
        huge = torch.empty(1, 150 + far, 32, dtype=torch.float16, device=DEVICE)
        huge[:, :8], huge[:, far + 8 :] = moved[name][:, :8], moved[name][:, 8:]
        moved[name] = huge
    assert_same(arguments, attend_blocks(**moved, rotation=on_device(turn), impl="triton"), expected)


TILES = [(128, 1, 255), (64, 2, 255), (32, 1, 255), (128, 8, 255)]
IN_EVERY_MODE = (64, 2, 255)


@pytest.mark.parametrize(
    ("tuning", "mode"),
    [
        pytest.param(tuning, mode, marks=() if tuning == IN_EVERY_MODE or mode == "streaming" else pytest.mark.slow)
        for tuning in TILES
        for mode in MODES
    ],
)
def test_decode_tiles(mode, tuning, monkeypatch):
    """Of one piece to eight, more of them than keys or fewer, full and cut."""
    decode = import_module("hipexp_kernels.attend_blocks.triton_decode")
    monkeypatch.setattr(decode, "FP32", decode.Tuning(*tuning))
    for shape in (
        dict(G=4),
        dict(first=(70, 129), exact=(1,)),
        dict(S=2, M=24, sink=16, T=400, first=(399,)),
        dict(block=4, first=(0, 37)),
    ):
        compare(call(**shape), mode)
    compare(call(D=64, M=40, T=500, first=(499,), window=90), mode, rotary=32 if mode else None)


def test_no_query_blocks():
    arguments = triton_device.on_device(call(first=()))
    out, lse = attend_blocks(**arguments, impl="triton")
    assert out.shape == arguments["q"].shape and lse.shape == out.shape[:-1]


def test_refusals():
    arguments = triton_device.on_device(call(D=16))
    with pytest.raises(ValueError, match="attention rotation 'sideways' is unknown"):
        attend_blocks(**arguments, rotation=AttendRotation("sideways", brute.rope_table(80, 16), 64), impl="triton")
    if not triton_device.ON_GPU:
        with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
            attend_blocks(**{**arguments, **{name: arguments[name].bfloat16() for name in "qkv"}}, impl="triton")


@triton_device.needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_graph(dtype):
    """Captured once over a cache with room to grow, replayed as the text grows and the selection changes."""
    big = call(K=8, G=4, D=128, T=3000, first=(2999,), M=128, sink=16, window=256, dtype=dtype)
    turn = on_device(rotation({**big, "exact": torch.tensor([True])}, "streaming"))
    static = triton_device.on_device(big)
    attend_blocks(**static, rotation=turn, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = attend_blocks(**static, rotation=turn, impl="triton")
    for first, exact in ((3, ()), (100, ()), (271, ()), (272, ()), (1000, ()), (1500, (0,)), (2999, ())):
        now = call(K=8, G=4, D=128, T=3000, first=(first,), M=128, sink=16, window=256, exact=exact, dtype=dtype, seed=first)
        for name in ("q", "k", "v", "blocks", "counts", "first", "exact"):
            static[name].copy_(now[name])
        graph.replay()
        expected = attend_blocks(
            **{**now, "k": now["k"][:, : first + 1], "v": now["v"][:, : first + 1]}, rotation=rotation(now, "streaming"), impl="vectorized"
        )
        assert_same(now, actual, expected)


@triton_device.needs_gpu
@pytest.mark.gpu
def test_the_last_program_sees_all_parts():
    """Thousands of replays while other work comes and goes: the same bits every time."""
    arguments = triton_device.on_device(call(K=8, G=4, D=128, T=4000, first=(3999,), M=256, window=1024, sink=256, dtype=torch.bfloat16))
    turn = on_device(rotation(call(T=4000, M=256, window=1024, sink=256, D=128), "streaming"))
    first = attend_blocks(**arguments, rotation=turn, impl="triton")
    differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
    noise = torch.cuda.Stream()
    for i in range(5000):
        if i % 7 == 0:
            with torch.cuda.stream(noise):
                torch.randn(10000 * (i % 11 + 1), device=DEVICE).sort()
        for mine, theirs in zip(attend_blocks(**arguments, rotation=turn, impl="triton"), first, strict=True):
            differ += (mine != theirs).sum()
    assert differ.item() == 0
