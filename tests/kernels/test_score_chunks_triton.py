"""Triton's chunk scores against the reference: heads, rows, modes, cut chunks, lists of all kinds, padding, NaN."""

import dataclasses

import pytest
import torch
from hipexp_kernels import score_chunks, summarize
from hipexp_kernels.rope import ScoreRotation
from hipexp_kernels.summarize import Summaries

import brute
from triton_device import DEVICE, DTYPES, needs_triton, on_device

pytestmark = needs_triton

MODES = (None, *ScoreRotation.MODES)
FAR = 2**40  # no such token: what a list holds past its count


def make(K=2, G=2, N=2, R=1, D=32, T=90, C=5, chunk=8, S=1, shared=False, representative="descent", whole=False, seed=0):
    """Arguments of a call: chunks in order, garbage past the counts, limits that cut some of them short.

    ``whole``: products are whole numbers, so that no rounding turns a decision and ties are common.
    """
    make = torch.Generator().manual_seed(seed)
    random = (lambda *shape: torch.randint(-2, 3, shape, generator=make).float()) if whole else (lambda *s: torch.randn(s, generator=make))
    starts = torch.randint(0, max(1, T - chunk // 2), (1 if shared else S, 1 if shared else N, C), generator=make).sort(-1).values
    counts = torch.randint(0, C + 1, (S, N), generator=make)
    counts.view(-1)[0] = C
    if not shared:
        starts = torch.where(torch.arange(C) < counts[..., None], starts, torch.tensor([-1, FAR, -FAR])[torch.arange(C) % 3])
    limits = torch.randint(T // 2, T + 9, (N,), generator=make)
    return dict(
        q=random(K * G, N, R, D),
        k=random(K, T, D),
        starts=starts,
        counts=counts,
        limits=limits,
        chunk_tok=chunk,
        representative=representative,
    )


def rotation(call, mode, rotary=None, trained=64, scan_window=20, seed=1):
    if mode is None:
        return None
    _, N, R, D = call["q"].shape
    first = torch.randint(40, 250, (N,), generator=torch.Generator().manual_seed(seed))
    position = first[:, None] + 2 * torch.arange(R)
    return ScoreRotation(mode, brute.rope_table(400, rotary or D), trained, scan_window, position, first, first + 2 * R + 1)


def moved(call, turn):
    if turn is not None:
        table = type(turn.table)(on_device(turn.table.cos), on_device(turn.table.sin))
        turn = type(turn)(
            turn.mode, table, turn.trained_tok, turn.scan_window_tok, *(on_device(x) for x in (turn.position, turn.first, turn.last))
        )
    return on_device(call), turn


def compare(call, turn=None, tolerance=2e-5, share=1.0):
    """``share``: how many of the scores must agree (rounding may turn decisions between probes that are nearly equal)."""
    expected = score_chunks(**call, rotation=turn, impl="reference")
    on, turn = moved(call, turn)
    if "summaries" in on:
        on["summaries"] = dataclasses.replace(on["summaries"], rows=on_device(on["summaries"].rows))
    scores = score_chunks(**on, rotation=turn, impl="triton").cpu()
    assert scores.shape == expected.shape and scores.dtype == torch.float32
    assert torch.equal(scores == -torch.inf, expected == -torch.inf)
    close = torch.isclose(scores, expected, atol=tolerance, rtol=tolerance)
    assert close.float().mean() >= share, (scores - expected)[~close]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("representative", ["descent", "grid", "exact"])
def test_modes(mode, rows, representative):
    for trained in (16, 1000):
        call = make(R=rows, D=32, representative=representative)
        compare(call, rotation(call, mode, trained=trained))


@pytest.mark.parametrize("mode", [None, "relative", "dynamic"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("representative", ["descent", "exact"])
def test_part_of_the_dimensions_rotated(mode, rows, representative):
    call = make(R=rows, D=40, N=1, representative=representative)
    compare(call, rotation(call, mode, rotary=16))


@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("rows", [1, 5])
def test_head_dimensions(D, rows):
    for representative in ("descent", "exact"):
        call = make(D=D, R=rows, N=1, K=1, representative=representative)
        compare(call, rotation(call, "native"), tolerance=1e-4)


@pytest.mark.parametrize("G", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("rows", [1, 4])
def test_groups_of_heads(G, rows):
    for representative in ("descent", "exact"):
        call = make(G=G, R=rows, N=1, K=2, S=2, C=3, representative=representative)
        compare(call, rotation(call, "rank"))


@pytest.mark.parametrize("chunk", [1, 2, 8, 32, 256])
@pytest.mark.parametrize("rows", [1, 2])
def test_sizes_of_chunks(chunk, rows):
    """Longer than the keys, cut by a limit, of one token; ties."""
    for T in (9, 300):
        for representative in ("descent", "grid", "exact"):
            sizes = dict(chunk=chunk, R=rows, T=T, K=1, C=3, seed=chunk + T, representative=representative)
            compare(make(**sizes, whole=True), tolerance=0)
            call = make(**sizes)
            compare(call, rotation(call, "relative"))


@pytest.mark.device
@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("lists", [dict(S=1), dict(S=2), dict(shared=True)])
def test_lists(rows, lists):
    for C in (1, 6, 40):
        call = make(R=rows, C=C, G=2, chunk=2, **lists)
        compare(call, rotation(call, "rank"))


@pytest.mark.parametrize("rows", [1, 2])
def test_more_rows_than_one_product_takes(rows):
    call = make(R=70 * rows, G=4, N=1, K=1, representative="exact")
    compare(call)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("representative", ["descent", "exact"])
def test_capacity_and_empty_lists(rows, representative):
    call = make(C=150, R=rows, K=1, chunk=4, representative=representative)
    call["counts"][:] = torch.tensor([[3, 0]])
    call["starts"][..., 3:] = FAR
    compare(call)
    none = score_chunks(**on_device(call | dict(starts=call["starts"][..., :0], counts=call["counts"] * 0)), impl="triton")
    assert none.shape == (1, 2, 0)


@pytest.mark.device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
def test_dtypes(dtype, rows):
    for mode in ("relative", "native"):
        call = make(R=rows, C=20)
        call["k"] = call["k"].to(dtype)
        if rows == 1:  # in fp32 whatever the keys are
            compare(call, rotation(call, mode))
        else:
            precision = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
            compare(call, rotation(call, mode), tolerance=precision, share=0.9)
        call["q"] = call["q"].to(dtype)
        compare(call, rotation(call, mode), tolerance=1e-1, share=0.8)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("representative", ["descent", "exact"])
def test_keys_outside_the_candidates_are_not_read_and_keys_that_are_nan_surface(rows, representative):
    call = make(R=rows, K=1, N=1, C=4, T=100, representative=representative)
    call |= dict(starts=torch.tensor([[[8, 32, 56, 80]]]), counts=torch.tensor([[3]]), limits=torch.tensor([60]))
    clean = score_chunks(**on_device(call), impl="triton")
    candidate = torch.zeros(100, dtype=torch.bool)
    for start in (8, 32, 56):
        candidate[start : min(start + 8, 60)] = True
    call["k"][:, ~candidate] = torch.nan
    assert torch.equal(score_chunks(**on_device(call), impl="triton"), clean)
    call["k"][:, 32:40] = torch.nan
    broken = score_chunks(**on_device(call), impl="triton")
    assert broken.isnan().tolist() == [[[False, True, False, False]]]


@pytest.mark.device
@pytest.mark.parametrize("rows", [1, 2])
def test_keys_with_room_to_grow(rows):
    """A view of a longer buffer, heads far apart, as a cache hands it out."""
    call = make(R=rows)
    K, T, D = call["k"].shape
    buffer = torch.full((K, T + 50, D), torch.nan, device=DEVICE)
    buffer[:, :T] = on_device(call["k"])
    expected = score_chunks(**call, impl="reference")
    scores = score_chunks(**on_device(call) | dict(k=buffer[:, :T]), impl="triton")
    torch.testing.assert_close(scores.cpu(), expected, atol=2e-5, rtol=1e-5)


def test_odd_head_dimensions():
    for D in (1, 7):
        compare(make(D=D, whole=True), tolerance=0)
        compare(make(D=D, R=2, whole=True), tolerance=0)


@pytest.mark.parametrize("mode", [None, *ScoreRotation.ONE_ANGLE_A_CHUNK])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("sizes", [(256, 64), (8, 8), pytest.param((64, 1), marks=pytest.mark.slow), (1, 1)])
def test_bounds(mode, rows, sizes):
    """Landmarks of many and few pieces a chunk, chunks past limits and counts, pieces that no chunk has yet."""
    chunk, piece = sizes
    for K, G, D, C in ((2, 2, 32, 5), (1, 4, 80, 40), (2, 16, 64, 3)):
        call = make(K=K, G=G, R=rows, D=D, C=C, chunk=chunk, T=16 + (C + 1) * chunk, representative="bounds")
        call["starts"] = 16 + chunk * torch.arange(C)[None, None]
        rows_of = summarize(call["k"][:, 16:], piece_tok=piece, impl="reference")
        compare(call | dict(summaries=Summaries(rows_of, piece)), rotation(call, mode))


@pytest.mark.parametrize("mode", [None, *ScoreRotation.ONE_ANGLE_A_CHUNK])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("lists", [1, 2])
@pytest.mark.parametrize("sizes", [(32, 32), (32, 8), (1, 1)])
def test_bounds_of_listed_chunks(mode, rows, lists, sizes):
    """Chunks of a later stage: another list for every block and key/value head, some places in it empty."""
    chunk, piece = sizes
    n_chunks, C, rng = 40, 13, torch.Generator().manual_seed(rows)
    call = make(K=2, G=4, D=48, C=C, R=rows, N=3, chunk=chunk, T=16 + n_chunks * chunk, representative="bounds")
    of_pieces = torch.arange(0, n_chunks * chunk - chunk + 1, piece)  # chunks need not lie on a grid of their own
    drawn = torch.stack([torch.randperm(len(of_pieces), generator=rng)[:C].sort().values for _ in range(lists * 3)]).view(lists, 3, C)
    call["counts"] = torch.randint(0, C + 1, (lists, 3), generator=rng)
    call["starts"] = (16 + of_pieces[drawn]).masked_fill(torch.arange(C) >= call["counts"][..., None], -1)
    ends = [16 + n * chunk for n in (30, n_chunks, 5)]
    call["limits"] = torch.tensor(ends)
    crosses = (call["starts"] < call["limits"][:, None]) & (call["starts"] + chunk > call["limits"][:, None])
    call["starts"] = call["starts"].masked_fill(crosses, 16)  # none is cut short
    landmarks = Summaries(summarize(call["k"][:, 16:], piece_tok=piece, impl="reference"), piece, 16)
    turn = rotation(call, mode)
    compare(call | dict(summaries=landmarks), turn)
    wanted, got = (score_chunks(**call, summaries=landmarks, rotation=turn, impl=impl) for impl in ("reference", "vectorized"))
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.device
def test_bounds_in_half_precision():
    call = make(R=4, D=64, C=8, T=2100, chunk=256, representative="bounds")
    call["starts"] = 256 * torch.arange(8)[None, None]
    for dtype in DTYPES:
        k = call["k"].to(dtype)
        summaries = Summaries(summarize(k, piece_tok=64, impl="reference"), 64)
        precision = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
        compare(call | dict(k=k, summaries=summaries), rotation(call, "relative"), tolerance=precision)


def test_bounds_reads_landmarks_alone():
    call = make(R=2, D=32, N=1, C=3, T=100, chunk=16, representative="bounds")
    call |= dict(starts=8 + 16 * torch.arange(3)[None, None], counts=torch.tensor([[2]]), limits=torch.tensor([90]))
    rows = summarize(call["k"][:, 8:], piece_tok=8, impl="reference")
    compare(call | dict(k=torch.full_like(call["k"], torch.nan), summaries=Summaries(rows, 8)))
    rows[:, 3] = torch.nan
    broken = score_chunks(**on_device(call) | dict(summaries=Summaries(on_device(rows), 8)), impl="triton")
    assert broken.isnan().tolist() == [[[False, True, False]]] * 2


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("representative", ["exact", "grid", "bounds"])
def test_a_scan_of_several_tiles_passes_and_programs(monkeypatch, representative, hopper):
    """Three tiles to a program, whose last one has none left to do; heads and rows in several passes; a key that is NaN; cut chunks."""
    from hipexp_kernels.score_chunks import triton as kernels

    few = dict(keys=16, tiles=3, columns=16)
    for name in ("SCAN", "SCAN_BEFORE_HOPPER", "ONE_ROW_OF_KEYS", "ONE_ROW_OF_LANDMARKS"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name) | few)
    monkeypatch.setattr(kernels, "gpu", lambda device: (1, hopper))
    monkeypatch.setattr(kernels, "PROGRAMS_PER_SM", 1)
    for rows, chunk, C in ((1, 8, 13), (9, 8, 13), (9, 2, 50)):
        call = make(K=2, G=4, N=2, R=rows, T=140, C=C, chunk=chunk, shared=True, representative=representative)
        call["counts"] = torch.tensor([[C, C // 2]])
        call["k"][1, 9] = float("nan")
        if representative == "bounds":
            call["starts"], call["limits"] = 7 + chunk * torch.arange(C)[None, None], torch.tensor([7 + chunk * C, 7 + chunk * (C // 2)])
            call["summaries"] = Summaries(summarize(call["k"][:, 7 : 7 + chunk * C], piece_tok=2), 2)
        else:
            call["starts"][0, 0, 0] = 9 - chunk // 2
        turn = rotation(call, "relative")
        wanted = score_chunks(**call, rotation=turn, impl="vectorized")
        on, turn = moved(call, turn)
        if representative == "bounds":
            on["summaries"] = Summaries(on_device(on["summaries"].rows), 2)
        got = score_chunks(**on, rotation=turn, impl="triton").cpu()
        assert wanted.isnan().any() and torch.equal(got.isnan(), wanted.isnan())
        assert torch.allclose(got, wanted, atol=2e-5, equal_nan=True)


def test_sizes_of_tiles_are_powers_of_two():
    from hipexp_kernels.score_chunks import triton as kernels

    for dim, rotary in ((32, 32), (80, 80), (96, 96), (128, 64), (160, 80), (192, 96), (224, 128), (256, 128), (256, 256)):
        for representative, chunk, landmarks in (("descent", 32, 0), ("exact", 8, 0), ("grid", 256, 0), ("bounds", 256, 8)):
            for mode, rows, group, itemsize, hopper in (
                ("relative", 1, 4, 2, True),
                ("rank", 16, 3, 4, True),
                ("relative", 64, 16, 2, False),
            ):
                _, _, sizes, _ = kernels.launch(mode, rows, group, dim, rotary, chunk, representative, landmarks, False, itemsize, hopper)
                for name in {"TILE", "TOGETHER", "COLUMNS"} & set(sizes):
                    assert sizes[name] & (sizes[name] - 1) == 0, (dim, rotary, representative, name, sizes[name])
