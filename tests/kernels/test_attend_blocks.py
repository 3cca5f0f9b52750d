"""Attention over sinks, selected blocks and window: brute force, dense equality, partition, padding."""

import numpy as np
import pytest
import torch
from hipexp_kernels import Held, attend_blocks
from hipexp_kernels.rope import AttendRotation
from hypothesis import given
from hypothesis import strategies as st

import brute

IMPLS = ("reference", "vectorized")
HEADS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 4), (2, 4), (1, 8)]  # key/value heads, query heads of each
MODES = (None, "streaming", "infllm", "native", "dynamic")


@st.composite
def calls(draw):
    """Arguments of a call, by name: decode and prefill, ragged ends, windows that reach the start, exact blocks mixed in."""
    (K, G), N, Q = draw(st.sampled_from(HEADS)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 4, 7]))
    D, T, S = draw(st.sampled_from([4, 6, 16])), draw(st.integers(1, 120)), draw(st.sampled_from([1, K, K * G]))
    block, sink, window = draw(st.sampled_from([1, 4, 8])), draw(st.sampled_from([0, 3, 8])), draw(st.sampled_from([1, 6, 32, 200]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    M = draw(st.integers(0, 8))
    first, blocks, counts = rng.integers(0, T, N), np.full((S, N, M), -1), np.zeros((S, N), int)
    for s, n in np.ndindex(S, N):
        grid = np.arange(sink, first[n] + 1, block)  # the last ones overlap the window
        counts[s, n] = min(rng.integers(0, M + 1), len(grid))
        blocks[s, n, : counts[s, n]] = np.sort(rng.choice(grid, counts[s, n], replace=False))
    q, k, v = (rng.standard_normal(shape) for shape in ((K * G, N, Q, D), (K, T, D), (K, T, D)))
    return dict(q=q, k=k, v=v, blocks=blocks, counts=counts, first=first, exact=rng.random(N) < 0.3,
                block_tok=block, sink_tok=sink, window_tok=window, scale=0.7)  # fmt: skip


def table_rows(call, mode):
    """As many as the contract asks for, not one more."""
    Q, T = call["q"].shape[2], call["k"].shape[1]
    packed = call["sink_tok"] + call["blocks"].shape[-1] * call["block_tok"] + call["window_tok"] + Q
    true = max([T if mode in ("native", "dynamic") else 0, *(int(p) + Q for p, e in zip(call["first"], call["exact"], strict=True) if e)])
    return max(packed, true)


def run(impl, call, mode=None, rotary=0, trained=0, softcap=None, held=None):
    tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x for name, x in call.items()}
    for name in "qkv":
        tensors[name] = tensors[name].float()
    rotation = mode and AttendRotation(mode, brute.rope_table(table_rows(call, mode), rotary), trained)
    out, lse = attend_blocks(**tensors, rotation=rotation, softcap=softcap, held=held, impl=impl)
    assert out.shape == call["q"].shape and lse.shape == out.shape[:-1] and lse.dtype == torch.float32
    return out.numpy(), lse.numpy()


def valid_rows(call):
    return call["first"][:, None] + np.arange(call["q"].shape[2]) < call["k"].shape[1]


def compare(call, actual, expected, atol=1e-5):
    rows = valid_rows(call)
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine[:, rows], theirs[:, rows], atol=atol, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@given(call=calls(), partial=st.booleans(), trained=st.sampled_from([16, 64, 1000]), softcap=st.sampled_from([None, 2.0]))
def test_brute_force(impl, mode, call, partial, trained, softcap):
    width = call["q"].shape[-1]
    options = dict(mode=mode, rotary=2 * max(1, width // 4) if partial else width, trained=trained, softcap=softcap)
    compare(call, run(impl, call, **options), brute.attend_blocks(**call, **options), atol=3e-5)


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data(), call=calls(), softcap=st.sampled_from([None, 2.0]))
def test_steps_that_share_what_is_held(mode, data, call, softcap):
    """Steps that follow each other, repeat, jump, and change the selection, each as if it were alone."""
    T, (S, _, M), held = call["k"].shape[1], call["blocks"].shape, Held()
    options = dict(mode=mode, rotary=call["q"].shape[-1] // 2 * 2, trained=64, softcap=softcap)
    rng = np.random.default_rng(0)
    call |= dict(exact=np.zeros(1, bool), blocks=call["blocks"][:, :1], counts=call["counts"][:, :1])
    position = int(call["first"][0])
    for move in data.draw(st.lists(st.sampled_from([1, 1, 1, 1, 0, -1, 5, "select"]), max_size=12)):
        if move == "select":
            grid = np.arange(call["sink_tok"], max(position, call["sink_tok"]) + 1, call["block_tok"])
            call["counts"] = np.full((S, 1), min(M, len(grid)))
            call["blocks"] = np.full((S, 1, M), -1)
            for s in range(S):
                call["blocks"][s, 0, : call["counts"][s, 0]] = np.sort(rng.choice(grid, call["counts"][s, 0], replace=False))
            held.clear()
        else:
            position = min(max(0, position + move), T - 1)
        call |= dict(first=np.array([position]), q=rng.standard_normal((call["q"].shape[0], 1, 1, call["q"].shape[3])))
        compare(call, run("vectorized", call, **options, held=held), brute.attend_blocks(**call, **options), atol=3e-5)


def prefill(D=32, H=4, K=2, T=300, Q=16, block=8, sink=16, window=64, keep=6, seed=0):
    """All blocks of a prompt, the last one ragged, ``keep`` random blocks selected for each."""
    rng = np.random.default_rng(seed)
    first = np.arange(0, T, Q)
    blocks, counts = np.full((1, len(first), keep), -1), np.zeros((1, len(first)), int)
    for n, start in enumerate(first):
        grid = np.arange(sink, max(sink, start - window + block), block)
        counts[0, n] = min(keep, len(grid))
        blocks[0, n, : counts[0, n]] = np.sort(rng.choice(grid, counts[0, n], replace=False))
    q, k, v = (rng.standard_normal(shape) for shape in ((H, len(first), Q, D), (K, T, D), (K, T, D)))
    return dict(
        q=q,
        k=k,
        v=v,
        blocks=blocks,
        counts=counts,
        first=first,
        exact=np.zeros(len(first), bool),
        block_tok=block,
        sink_tok=sink,
        window_tok=window,
        scale=D**-0.5,
    )


@pytest.mark.parametrize("D", [32, 64, 80, 128])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (8, 1)])
def test_head_dimensions(D, heads):
    call = prefill(D, *heads, T=150)
    options = dict(mode="streaming", rotary=D, trained=64)
    expected = brute.attend_blocks(**call, **options)
    for impl in IMPLS:
        compare(call, run(impl, call, **options), expected)


def dense(call, mode):
    """torch's own causal attention over all keys, at true positions."""
    q, k, v = (torch.from_numpy(call[name]).float() for name in "qkv")
    T = k.shape[1]
    q = q.flatten(1, 2)[:, :T]
    if mode:
        turn = brute.phase(np.arange(T)[:, None], q.shape[-1])
        q, k = (
            torch.from_numpy(
                np.stack([brute.turned(row, turn[t]) for t, row in enumerate(x.numpy().swapaxes(0, 1))]).swapaxes(0, 1)
            ).float()
            for x in (q, k)
        )
    out = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=call["scale"], enable_gqa=True)[
        0
    ]
    return out.numpy()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["exact", "selected"])
def test_equals_dense_attention_when_everything_is_attended(impl, mode, how):
    call = prefill(T=200, keep=100 if how == "selected" else 0)
    call["exact"][:] = how == "exact"
    if how == "selected" and mode == "infllm":
        pytest.skip("far keys share one position by definition")
    out, _ = run(impl, call, mode, rotary=32, trained=1000)  # dynamic squeezes nothing within the trained length
    np.testing.assert_allclose(out.reshape(4, -1, 32)[:, :200], dense(call, mode), atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@given(call=calls())
def test_every_key_counts_once(impl, call):
    """Equal logits: the log-sum-exp is the log of the number of keys, and one-hot values show which they are."""
    T, H = call["k"].shape[1], call["q"].shape[0]
    call["q"], call["k"] = np.zeros((*call["q"].shape[:3], T)), np.zeros((len(call["k"]), T, T))
    call["v"] = np.tile(np.eye(T), (len(call["k"]), 1, 1))
    out, lse = run(impl, call)
    group = H // len(call["k"])
    for h, n, r in np.ndindex(out.shape[:3]):
        p0 = int(call["first"][n])
        if p0 + r >= T:
            continue
        s = (h // group) % len(call["blocks"])
        chosen = call["blocks"][s, n, : call["counts"][s, n]]
        far, near = brute.attended(T, chosen, p0 + r, p0, call["sink_tok"], call["window_tok"], call["block_tok"], call["exact"][n])
        keys = {*far.tolist(), *near.tolist()}
        assert {*range(max(0, p0 + r - call["window_tok"] + 1), p0 + r + 1)} <= keys  # the whole window
        assert np.exp(lse[h, n, r]) == pytest.approx(len(keys), rel=1e-4)
        np.testing.assert_allclose(out[h, n, r] * len(keys), np.isin(np.arange(T), list(keys)), atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@given(call=calls(), noise=st.sampled_from([-(2**40), -1, 5, 2**40]))
def test_what_is_not_attended_is_not_read(impl, mode, call, noise):
    """NaN in keys and values nobody attends to and in padded query rows; anything in the list past its count."""
    options = dict(mode=mode, rotary=call["q"].shape[-1], trained=16)
    clean = run(impl, call, **options)
    T, Q, S = call["k"].shape[1], call["q"].shape[2], len(call["blocks"])
    read = np.zeros(call["k"].shape[:2], bool)
    for s, n in np.ndindex(call["counts"].shape):
        p0 = int(call["first"][n])
        far, near = brute.attended(
            T,
            call["blocks"][s, n, : call["counts"][s, n]],
            min(p0 + Q, T) - 1,
            p0,
            call["sink_tok"],
            call["window_tok"],
            call["block_tok"],
            call["exact"][n],
        )
        read[s * len(read) // S if S > 1 else slice(None), np.concatenate([far, near])] = True
    for name in "kv":
        call[name] = np.where(read[..., None], call[name], np.nan)
    call["q"] = np.where(valid_rows(call)[..., None], call["q"], np.nan)
    call["blocks"] = np.where(np.arange(call["blocks"].shape[-1]) < call["counts"][..., None], call["blocks"], noise)
    compare(call, run(impl, call, **options), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lists", "mode"), [(1, "streaming"), (2, "streaming"), (4, "streaming"), (1, None), (1, "native")])
def test_what_is_held_is_what_would_be_made_again(lists, mode, dtype):
    """Steps over which the window leaves a selected block behind, then another selection in the same memory."""
    make = torch.Generator().manual_seed(lists)
    k, v = (torch.randn(2, 120, 8, generator=make).to(dtype) for _ in range(2))
    rotation = mode and AttendRotation(mode, brute.rope_table(200, 8), 64)
    held = Held()
    for begin, blocks in (
        (70, [[8, 24, 48, 56], [4, 8, 16, 52], [4, 12, 20, 28], [32, 36, 40, 52]]),
        (90, [[12, 40, 72, 76], [8, 16, 24, 32], [4, 20, 40, 60], [52, 56, 68, 72]]),
    ):
        held.clear()
        for first in range(begin, begin + 14):
            call = dict(
                q=torch.randn(4, 1, 1, 8, generator=make).to(dtype), k=k, v=v, blocks=torch.tensor(blocks)[:lists, None],
                counts=torch.full((lists, 1), 4), first=torch.tensor([first]), exact=torch.tensor([False]),
                block_tok=4, sink_tok=4, window_tok=16, scale=0.5, rotation=rotation,
            )  # fmt: skip
            wanted = attend_blocks(**call, impl="reference")
            for mine, theirs in zip(attend_blocks(**call, held=held, impl="vectorized"), wanted, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-2)
        size = k.element_size() * 2 * 8
        # sinks and the longest list with their values, for each of the heads that have one; a quarter more keys
        far, window = 2 * (4 + 4 * 4) * max(1, lists // 2), (16 + 16 // 4 if mode else 0)
        assert held.bytes == (far + window) * size


@pytest.mark.parametrize("order", [(2, 4, 2), (4, 2, 4), (1, 4, 1)])
def test_lists_of_other_heads_hold_other_rows(order):
    """One list of each key/value head, then of each query head, and back, in one memory."""
    make = torch.Generator().manual_seed(0)
    k, v, held = torch.randn(2, 120, 8, generator=make), torch.randn(2, 120, 8, generator=make), Held()
    blocks = torch.tensor([[8, 24], [4, 52], [12, 28], [32, 40]])[:, None]
    rotation = AttendRotation("streaming", brute.rope_table(200, 8), 64)
    for first, lists in enumerate(order, 80):
        held.clear()
        call = dict(
            q=torch.randn(4, 1, 1, 8, generator=make), k=k, v=v, blocks=blocks[:lists], counts=torch.full((lists, 1), 2),
            first=torch.tensor([first]), exact=torch.tensor([False]), block_tok=4, sink_tok=4, window_tok=16, scale=0.5, rotation=rotation,
        )  # fmt: skip
        for mine, theirs in zip(attend_blocks(**call, held=held, impl="vectorized"), attend_blocks(**call, impl="reference"), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_rows_that_are_held_are_not_read_again():
    make = torch.Generator().manual_seed(0)
    k, v, held = torch.randn(1, 60, 8, generator=make), torch.randn(1, 60, 8, generator=make), Held()
    call = dict(
        q=torch.randn(1, 1, 1, 8, generator=make), blocks=torch.tensor([[[8, 12]]]), counts=torch.tensor([[2]]), first=torch.tensor([50]),
        exact=torch.tensor([False]), block_tok=4, sink_tok=4, window_tok=16, scale=0.5, impl="vectorized",
    )  # fmt: skip
    wanted, _ = attend_blocks(k=k, v=v, held=held, **call)
    k[:, :30] = v[:, :30] = float("nan")
    again, _ = attend_blocks(k=k, v=v, held=held, **call)
    torch.testing.assert_close(again, wanted)


def test_a_window_is_made_once():
    """A step that follows the last one makes its own key alone, until the room is spent; any other makes the whole window."""
    made, held = [], Held()

    def make(origin, begin, end):
        made.append((origin, begin, end))
        return torch.arange(begin, end).view(1, -1, 1).float().expand(2, -1, 4)

    wanted = {10: (3, 3, 10), 11: (3, 10, 11), 12: (3, 11, 12), 13: (3, 12, 13), 14: (7, 7, 14), 15: (7, 14, 15)}
    for end, call in [*wanted.items(), (15, (8, 8, 15)), (16, (8, 15, 16)), (18, (11, 11, 18)), (5, (0, 0, 5))]:
        begin = max(0, end - 7)
        keys, origin = held.window(begin, end, 10, make)
        assert made.pop() == call and origin == call[0] and not made
        assert keys.shape == (2, end - begin, 4) and keys[0, :, 0].tolist() == list(range(begin, end))
    assert held.bytes == 2 * 10 * 4 * 4


@pytest.mark.parametrize("sinks", [0, 2])
def test_what_is_held_has_the_room_that_was_reserved(sinks):
    held, few, many = Held(), torch.ones(2, 3, 4), torch.ones(2, 6, 4)
    held.sinks = sinks
    held.reserve(0, few, room=4)
    held.grow(0, 3)
    with pytest.raises(ValueError, match="9 rows of a list are more than the 4 that were reserved"):
        held.grow(0, 6)
    held.clear()
    assert held.count(0) == sinks
    for rows in (many, torch.ones(1, 6, 4), torch.ones(2, 6, 4, dtype=torch.bfloat16)):  # longer, of one head, in another format
        held.reserve(0, rows, room=9)
        assert held.count(0) == 0
        for memory, number in zip(held.grow(0, 6), (1, 2), strict=True):
            memory.copy_(number * rows)
        assert [x.tolist() for x in held.rows(0, 6)] == [rows.tolist(), (2 * rows).tolist()] and held.count(0) == 6
        held.clear()
    where = [x.data_ptr() for x in held.rows(0, 1)]
    held.reserve(0, rows, room=5)
    assert held.count(0) == sinks and where == [x.data_ptr() for x in held.rows(0, 1)]  # the same memory again


def large(impl, dtype, **change):
    """A step with one query row, 6000 keys in reach, and what was changed."""
    k = torch.zeros(1, 6000, 8, dtype=dtype)
    call = dict(
        q=torch.ones(1, 1, 1, 8, dtype=dtype), k=k, v=torch.full_like(k, 20), blocks=torch.empty(1, 1, 0, dtype=torch.int64),
        counts=torch.zeros(1, 1, dtype=torch.int64), first=torch.tensor([5999]), exact=torch.tensor([False]), block_tok=4, sink_tok=4,
        window_tok=5900, scale=1.0,
    )  # fmt: skip
    return attend_blocks(**call | change, impl=impl)


@pytest.mark.parametrize("exact", [False, True])
def test_sums_of_half_precision_do_not_overflow(exact):
    out, _ = large("vectorized", torch.float16, softcap=50.0, exact=torch.tensor([exact]))
    torch.testing.assert_close(out, torch.full_like(out, 20), atol=0.05, rtol=0)


def test_logits_may_be_large():
    k = torch.zeros(1, 6000, 8)
    k[0, 5000:] = 30
    out, lse = large("vectorized", torch.float32, k=k, v=k)
    torch.testing.assert_close(out, torch.full_like(out, 30), atol=0, rtol=3e-5)  # a sum over a thousand
    assert lse.item() == pytest.approx(240 + np.log(1000), rel=1e-5)


@pytest.mark.parametrize("G", [1, 12])
def test_any_strides(G):
    """Keys, values and queries whose last dimension is not contiguous."""
    call = prefill(H=G, K=1, T=100, Q=16)
    expected = run("vectorized", call)
    rest = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in call.items() if name not in "qkv"}
    q, k, v = (torch.from_numpy(call[name]).float().transpose(-1, -2).contiguous().transpose(-1, -2) for name in "qkv")
    assert k.stride(-1) != 1
    compare(call, [x.numpy() for x in attend_blocks(q, k, v, **rest, impl="vectorized")], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_blocks_are_independent(impl):
    """The same block alone gives the same bits."""
    call = prefill(T=190)
    whole, lse = run(impl, call, "streaming", 32)
    for n in (0, 5, 8, 11):
        alone = {
            name: x[:, n : n + 1] if name in ("q", "blocks", "counts") else x[n : n + 1] if name in ("first", "exact") else x
            for name, x in call.items()
        }
        rows = valid_rows(alone)[0]
        for mine, theirs in zip(run(impl, alone, "streaming", 32), (whole, lse), strict=True):
            np.testing.assert_array_equal(mine[:, 0, rows], theirs[:, n, rows])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(impl, dtype):
    call = prefill(T=200)
    arguments = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in call.items()}
    arguments.update({name: arguments[name].to(dtype) for name in "qkv"})
    out, lse = attend_blocks(**arguments, rotation=AttendRotation("streaming", brute.rope_table(300, 32), 64), impl=impl)
    assert out.dtype == dtype and lse.dtype == torch.float32
    rounded = {**call, **{name: arguments[name].double().numpy() for name in "qkv"}}
    compare(call, (out.float().numpy(), lse.numpy()), brute.attend_blocks(**rounded, mode="streaming", rotary=32), atol=4e-2)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    """Views into a larger cache and transposed queries, as a model hands them over."""
    call = prefill(T=100, Q=16)
    expected = run(impl, call, "streaming", 32)
    cache = torch.full((2, 2, 160, 32), float("nan"))
    cache[0, :, :100], cache[1, :, :100] = torch.from_numpy(call["k"]), torch.from_numpy(call["v"])
    q = torch.from_numpy(call["q"]).float().permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    rest = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in call.items() if name not in "qkv"}
    rotation = AttendRotation("streaming", brute.rope_table(300, 32), 0)
    actual = attend_blocks(q, cache[0, :, :100], cache[1, :, :100], **rest, rotation=rotation, impl=impl)
    compare(call, [x.numpy() for x in actual], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.zeros(2, 50, 9)), "attend_blocks: k"),
        (dict(v=torch.zeros(2, 49, 8)), "attend_blocks: k"),
        (dict(q=torch.zeros(3, 2, 4, 8)), "attend_blocks: k"),
        (dict(blocks=torch.zeros(3, 2, 3, dtype=torch.int64), counts=torch.zeros(3, 2, dtype=torch.int64)), "attend_blocks: blocks"),
        (dict(blocks=torch.zeros(1, 1, 3, dtype=torch.int64)), "attend_blocks: blocks"),
        (dict(counts=torch.zeros(2, 2, dtype=torch.int64)), "attend_blocks: blocks"),
        (dict(first=torch.zeros(3, dtype=torch.int64)), "attend_blocks: first"),
        (dict(exact=torch.zeros(1, dtype=torch.bool)), "attend_blocks: first"),
        (dict(impl="fast"), "impl='fast' is unknown"),
        (dict(rotation=AttendRotation("sideways", brute.rope_table(80, 8), 64)), "attention rotation 'sideways' is unknown"),
    ],
)
def test_refusals(change, message):
    call = dict(q=torch.zeros(4, 2, 4, 8), k=torch.zeros(2, 50, 8), v=torch.zeros(2, 50, 8), blocks=torch.zeros(1, 2, 3, dtype=torch.int64), counts=torch.zeros(1, 2, dtype=torch.int64),
                first=torch.tensor([40, 44]), exact=torch.zeros(2, dtype=torch.bool), block_tok=8, sink_tok=0, window_tok=16, scale=1.0)  # fmt: skip
    attend_blocks(**call)
    with pytest.raises(ValueError, match=message):
        attend_blocks(**{**call, **change})
