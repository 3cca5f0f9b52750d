"""Chunk scores: brute force, ties, limits, padding, needles."""

import importlib

import numpy as np
import pytest
import torch
from hipexp_kernels import score_chunks
from hipexp_kernels.rope import RopeTable, ScoreRotation
from hipexp_kernels.summarize import Summaries
from hypothesis import given
from hypothesis import strategies as st

import brute

IMPLS = ("reference", "vectorized")
HEADS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 4), (2, 4), (1, 8)]  # key/value heads, query heads of each
VECTORIZED = importlib.import_module("hipexp_kernels.score_chunks.vectorized")


@st.composite
def calls(draw, integers=False):
    """Arguments of a call, by name: heads, blocks, lists and limits of all kinds; garbage where nothing may be read."""
    (K, G), N, R = draw(st.sampled_from(HEADS)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    D, T, chunk = draw(st.sampled_from([4, 6, 16])), draw(st.integers(1, 90)), draw(st.sampled_from([1, 2, 4, 8, 16, 32]))
    C, S, shared = draw(st.integers(0, 6)), draw(st.sampled_from([1, K])), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    random = (lambda *shape: rng.integers(-2, 3, shape).astype(float)) if integers else (lambda *shape: rng.standard_normal(shape))
    limits = rng.integers(1, T + 1, N) if draw(st.booleans()) else rng.integers(1, 2 * T + 2, N)  # also beyond the last key
    if shared and S == 1:
        starts = np.sort(rng.choice(T + chunk, size=min(C, T), replace=False))[None, None]
        counts = rng.integers(0, starts.shape[-1] + 1, (S, N))
    else:
        starts = rng.integers(0, max(1, T - chunk // 2), (S, N, C))
        counts = rng.integers(0, C + 1, (S, N))
        starts = np.where(np.arange(C) < counts[..., None], starts, rng.choice([-1, -(2**40), 2**40]))
    return dict(
        q=random(K * G, N, R, D), k=random(K, T, D), starts=starts, counts=counts, limits=limits,
        chunk_tok=chunk, representative=draw(st.sampled_from(["descent", "grid", "exact"])),
    )  # fmt: skip


def run(impl, call, rotation=None):
    tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x for name, x in call.items()}
    for name in ("q", "k"):
        tensors[name] = tensors[name].float()
    return score_chunks(**tensors, rotation=rotation, impl=impl).numpy()


def compare(scores, expected, margins):
    assert scores.shape == expected.shape and scores.dtype == np.float32
    np.testing.assert_array_equal(np.isinf(scores), np.isinf(expected))
    clear = np.isfinite(expected) & (margins > 1e-3)  # rounding may turn a closer decision
    np.testing.assert_allclose(scores[clear], expected[clear], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@given(call=calls())
def test_raw_keys(impl, call):
    compare(run(impl, call), *brute.score_chunks(**call))


@pytest.mark.parametrize("impl", IMPLS)
@given(call=calls(integers=True))
def test_ties_of_whole_numbers_are_decided_alike(impl, call):
    np.testing.assert_array_equal(run(impl, call), brute.score_chunks(**call)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ScoreRotation.MODES)
@given(
    call=calls(), partial=st.booleans(), trained=st.sampled_from([8, 32, 64, 1000]), scan=st.integers(0, 9), seed=st.integers(0, 2**32 - 1)
)
def test_rotations(impl, mode, call, partial, trained, scan, seed):
    (_, n_blocks, rows, width), n_chunks = call["q"].shape, call["starts"].shape[-1]
    rotary = 2 * max(1, width // 4) if partial else width
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 200, n_blocks)
    last, position = first + 7, first[:, None] + rng.integers(0, 8, (n_blocks, rows))
    needed = {"relative": scan + 2, "infllm": scan + 1, "rank": n_chunks + scan + 1}.get(mode, 300)  # no row too many
    tensors = (torch.from_numpy(x) for x in (position, first, last))
    rotation = ScoreRotation(mode, brute.rope_table(needed, rotary), trained, scan, *tensors)
    expected = brute.score_chunks(**call, mode=mode, rotary=rotary, trained=trained, scan=scan, position=position, first=first, last=last)
    compare(run(impl, call, rotation), *expected)


@st.composite
def bounds_calls(draw):
    """Arguments of a call with ``bounds``: whole chunks one after the other, some of them past a limit; landmarks of each; its rotation."""
    (K, G), N, R = draw(st.sampled_from(HEADS)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    D, C, chunk = draw(st.sampled_from([4, 6, 16])), draw(st.integers(0, 6)), draw(st.sampled_from([1, 2, 8, 16]))
    piece, begin, spare = chunk >> draw(st.integers(0, chunk.bit_length() - 1)), draw(st.integers(0, 9)), draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k = rng.standard_normal((K, begin + (C + spare) * chunk, D))
    landmarks = np.array([[brute.landmarks(k[g, t : t + piece]) for t in range(begin, k.shape[1], piece)] for g in range(K)])
    landmarks = landmarks.reshape(K, -1, 2, D)
    call = dict(
        q=rng.standard_normal((K * G, N, R, D)), k=k, starts=begin + chunk * np.arange(C)[None, None], counts=rng.integers(0, C + 1, (1, N)),
        limits=begin + chunk * rng.integers(0, C + 2, N), chunk_tok=chunk, representative="bounds",
    )  # fmt: skip
    mode, rotary = draw(st.sampled_from([None, *ScoreRotation.ONE_ANGLE_A_CHUNK])), draw(st.sampled_from([2, D // 2 * 2]))
    first = rng.integers(0, 200, N)
    where = dict(scan=draw(st.integers(0, 9)), position=first[:, None] + np.arange(R), first=first, last=first + 7)
    return call, landmarks, piece, mode and dict(mode=mode, rotary=rotary, trained=64, **where)


def rotation_of(mode, rotary, trained, scan, position, first, last):
    return ScoreRotation(mode, brute.rope_table(300, rotary), trained, scan, *map(torch.from_numpy, (position, first, last)))


@pytest.mark.parametrize("impl", IMPLS)
@given(case=bounds_calls())
def test_bounds(impl, case):
    call, landmarks, piece, turn = case
    summaries = Summaries(torch.from_numpy(landmarks).float(), piece)
    scores = run(impl, call | dict(summaries=summaries), turn and rotation_of(**turn))
    by_chunk = landmarks.reshape(len(landmarks), -1, 2 * call["chunk_tok"] // piece, landmarks.shape[-1])
    compare(scores, *brute.score_chunks(**call, **(turn or {}), landmarks=by_chunk))


@pytest.mark.parametrize("impl", IMPLS)
@given(case=bounds_calls(), data=st.data())
def test_bounds_of_listed_chunks(impl, case, data):
    """Some of the chunks, out of a later stage's list."""
    call, landmarks, piece, turn = case
    C, begin = call["starts"].shape[2], call["k"].shape[1] - landmarks.shape[1] * piece
    some = sorted(data.draw(st.sets(st.integers(0, C - 1)))) if C else []
    call |= dict(starts=call["starts"][:, :, some], counts=np.minimum(call["counts"], len(some)))
    summaries = Summaries(torch.from_numpy(landmarks).float(), piece, begin)
    scores = run(impl, call | dict(summaries=summaries), turn and rotation_of(**turn))
    by_chunk = landmarks.reshape(len(landmarks), -1, 2 * call["chunk_tok"] // piece, landmarks.shape[-1])[:, some]
    compare(scores, *brute.score_chunks(**call, **(turn or {}), landmarks=by_chunk))


@given(case=bounds_calls(), size=st.integers(1, 2000))
def test_bounds_in_any_cut(case, size):
    call, landmarks, piece, turn = case
    call, turn = call | dict(summaries=Summaries(torch.from_numpy(landmarks).float(), piece)), turn and rotation_of(**turn)
    whole = run("vectorized", call, turn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VECTORIZED, "FLOATS", size)
        np.testing.assert_allclose(run("vectorized", call, turn), whole, rtol=1e-5, atol=1e-6)


@given(call=calls(), size=st.integers(1, 2000), mode=st.sampled_from([None, "relative", "rank", "native", "dynamic"]))
def test_any_cut_into_groups_of_blocks(call, size, mode):
    """However few products are in flight at a time, the scores stay."""
    first = torch.arange(len(call["limits"])) * 30
    position = first[:, None] + torch.arange(call["q"].shape[2])
    rotation = mode and ScoreRotation(mode, brute.rope_table(130, 4), 32, 5, position, first, first + 7)
    whole = run("vectorized", call, rotation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VECTORIZED, "FLOATS", size)
        np.testing.assert_allclose(run("vectorized", call, rotation), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("D", [32, 64, 80, 128])
@pytest.mark.parametrize("representative", ["descent", "grid", "exact"])
def test_head_dimensions(D, representative):
    rng = np.random.default_rng(D)
    q = rng.standard_normal((4, 3, 5, D))
    call = dict(q=q, k=rng.standard_normal((2, 500, D)), starts=np.arange(16, 470, 32)[None, None], counts=np.array([[15, 3, 0]]),
                limits=np.array([500, 110, 20]), chunk_tok=32, representative=representative)  # fmt: skip
    for impl in IMPLS:
        compare(run(impl, call), *brute.score_chunks(**call))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scored_in_fp32(impl, dtype):
    torch.manual_seed(0)
    q, k = torch.randn(4, 2, 3, 16).to(dtype), torch.randn(2, 100, 16).to(dtype)
    rest = (torch.arange(0, 96, 8)[None, None], torch.tensor([[12, 7]]), torch.tensor([100, 50]))
    half = score_chunks(q, k, *rest, chunk_tok=8, impl=impl)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, score_chunks(q.float(), k.float(), *rest, chunk_tok=8, impl=impl))


def one_head(products, chunk_tok, limit=None, representative="descent", impl="reference"):
    """Scores of consecutive chunks when token ``i`` has the product ``products[i]`` with the only query."""
    k = torch.tensor(products, dtype=torch.float32)[None, :, None]
    starts = torch.arange(0, len(products), chunk_tok)[None, None]
    counts = torch.tensor([[starts.shape[-1]]])
    q = torch.ones(1, 1, 1, 1)
    return score_chunks(
        q, k, starts, counts, torch.tensor([limit or len(products)]), chunk_tok=chunk_tok, representative=representative, impl=impl
    )[0, 0].tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_probes_go_right_and_the_best_probe_counts(impl):
    # probes 2 and 6 tie: right; then 5 and 7: left; then 4 and 5. The tens on the left are never seen.
    assert one_head([10, 10, 1, 10, 3, 9, 1, 8], 8, impl=impl) == [9.0]
    # the first probe is the best of the path: it counts, though the path ends elsewhere
    assert one_head([0, 0, 0, 0, 2, 1, 7, 1], 8, impl=impl) == [7.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_are_cut_at_the_limit(impl):
    assert one_head([1, 2, 3, 9, 9, 9, 9, 9], 4, limit=3, impl=impl) == [3.0, float("-inf")]
    assert one_head([1, 2, 3, 9, 9, 9, 9, 9], 4, limit=3, representative="exact", impl=impl) == [3.0, float("-inf")]
    assert one_head([5], 4, impl=impl) == [5.0]  # fewer tokens than a chunk
    assert one_head([1, 2, 9, 3, 4, 5], 4, limit=100, representative="exact", impl=impl) == [9.0, 5.0]  # a limit beyond the last key
    assert one_head([5, 6, 4], 1, impl=impl) == [5.0, 6.0, 4.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_one_token_is_a_right_half(impl):
    cos = torch.tensor([[1.0], [3.0], [2.0]])  # a right probe looks from position 1, a left one from 2
    at = torch.zeros(1, 1, dtype=torch.int64)
    rotation = ScoreRotation("relative", RopeTable(cos, torch.zeros(3, 1)), 64, 1, at, at[0], at[0])
    q, k = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.tensor([1.0, 0.0]).expand(1, 4, 2)
    for chunk_tok, limit in ((1, 1), (8, 1)):
        for representative in ("descent", "exact"):
            score = score_chunks(q, k, at[None], at + 1, torch.tensor([limit]), chunk_tok=chunk_tok, representative=representative,
                                 rotation=rotation, impl=impl)  # fmt: skip
            assert score.item() == 3


@pytest.mark.parametrize("impl", IMPLS)
def test_every_head_walks_by_itself_and_the_best_counts(impl):
    """Two heads on one key/value head: what is on one path only is found by its head."""
    k = torch.tensor([[9.0, 0], [0, 0], [2, 1], [0, 0], [0, 0], [0, 0], [1, 2], [0, 5]])[None]
    q = torch.eye(2).view(2, 1, 1, 2)
    rest = (torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64), torch.tensor([8]))
    assert score_chunks(q[:1], k, *rest, chunk_tok=8, impl=impl).tolist() == [[[2.0]]]  # left at 2, then 1 and 3: zeros
    assert score_chunks(q[1:], k, *rest, chunk_tok=8, impl=impl).tolist() == [[[5.0]]]
    assert score_chunks(q, k, *rest, chunk_tok=8, impl=impl).tolist() == [[[5.0]]]


@pytest.mark.parametrize("impl", IMPLS)
@given(call=calls(), lowest=st.integers(0, 5))
def test_keys_outside_the_candidates_are_not_read(impl, call, lowest):
    """NaN wherever no candidate lies."""
    candidate = np.zeros((len(call["k"]), call["k"].shape[1]), bool)
    for s, n in np.ndindex(call["counts"].shape):
        for start in call["starts"][s, n % call["starts"].shape[1], : call["counts"][s, n]]:
            candidate[s if len(call["starts"]) > 1 else slice(None), start : min(start + call["chunk_tok"], call["limits"][n])] = True
    clean = run(impl, call)
    call["k"] = np.where(candidate[..., None], call["k"], np.nan)
    np.testing.assert_array_equal(run(impl, call), clean)


@pytest.mark.parametrize("impl", IMPLS)
def test_smooth_bump_is_found_by_descent(impl):
    """A bump one chunk wide, at every place: its chunk wins, with a score near the peak."""
    chunk, T = 32, 512
    for peak in range(1, T, 7):
        products = 10 * np.exp(-(((np.arange(T) - peak) / 16) ** 2))
        scores = one_head(products, chunk, impl=impl)
        assert max(range(len(scores)), key=scores.__getitem__) == peak // chunk
        assert max(scores) == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_isolated_spike_is_found_by_exact(impl):
    for peak in (0, 1, 30, 31, 32, 63):
        products = np.zeros(64)
        products[peak] = 1
        scores = one_head(products, 16, representative="exact", impl=impl)
        assert scores == [float(c == peak // 16) for c in range(4)]


BOUNDS = dict(representative="bounds", starts=torch.zeros(1, 1, 5, dtype=torch.int64), summaries=Summaries(torch.zeros(2, 10, 2, 8), 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.zeros(2, 50, 9)), "score_chunks: k"),
        (dict(k=torch.zeros(3, 50, 8)), "score_chunks: k"),
        (dict(k=torch.zeros(50, 8)), "score_chunks: k"),
        (dict(starts=torch.zeros(4, 2, 5, dtype=torch.int64)), "starts"),
        (dict(starts=torch.zeros(1, 3, 5, dtype=torch.int64)), "starts"),
        (dict(counts=torch.zeros(1, 3, dtype=torch.int64)), "counts"),
        (dict(limits=torch.zeros(3, dtype=torch.int64)), "limits"),
        (dict(representative="nearest"), "representative='nearest' is unknown; use descent or grid or exact or bounds"),
        (dict(representative="bounds"), "representative='bounds' needs summaries"),
        (BOUNDS | dict(starts=torch.zeros(1, 2, 5, dtype=torch.int64)), "needs starts .1, 1, C."),
        (BOUNDS | dict(chunk_tok=2), "pieces of 4 tokens do not make up chunks of 2"),
        (BOUNDS | dict(chunk_tok=16), "summaries .2, 10, 2, 8. do not go with k .2, 50, 8. and 5 chunks of 4 pieces"),
        (
            BOUNDS | dict(rotation=ScoreRotation("native", brute.rope_table(60, 8), 64, 0, *torch.zeros(3, 2))),
            "does not go with score rotation 'native', which turns the tokens of a chunk by different angles; use relative, infllm, rank",
        ),
        (dict(impl="triton9"), "impl='triton9' is unknown"),
        (dict(chunk_tok=0), "chunk_tok=0 must be a power of two"),
        (dict(chunk_tok=12), "chunk_tok=12 must be a power of two"),
        (
            dict(rotation=ScoreRotation("sideways", brute.rope_table(60, 8), 64, 0, torch.zeros(2, 3), torch.zeros(2), torch.zeros(2))),
            "score rotation 'sideways' is unknown; use relative, infllm",
        ),
    ],
)
def test_refusals(change, message):
    call = dict(q=torch.zeros(4, 2, 3, 8), k=torch.zeros(2, 50, 8), starts=torch.zeros(1, 2, 5, dtype=torch.int64),
                counts=torch.ones(1, 2, dtype=torch.int64), limits=torch.full((2,), 50), chunk_tok=8)  # fmt: skip
    score_chunks(**call)
    with pytest.raises(ValueError, match=message):
        score_chunks(**{**call, **change})
