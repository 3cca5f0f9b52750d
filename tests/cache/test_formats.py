"""Formats off the device: sizes, how near numbers stay, what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hipexp.cache.formats import make_format
from hipexp.config.schema import INT4_GROUP, ConfigError, page_bytes

NAMES = ("auto", "bf16", "fp8", "int8", "int4")
LOSSY = ("fp8", "int8", "int4")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (1e-8, 1e-3, 1.0, 1e4)


def numbers(shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def there_and_back(name, x):
    form = make_format(name, x.dtype, *x.shape[-2:])
    return form.unpack(*form.pack(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [4, 8, 64, 80, 96, 128])
def test_pages_take_the_bytes_that_the_plan_counts(name, dtype, dim):
    form = make_format(name, dtype, 64, dim)
    rows, scales = form.pack(numbers((3, 2, 64, dim), dtype))
    assert rows.shape == (3, 2, 64, form.row_bytes) and rows.dtype == torch.uint8 and rows.is_contiguous()
    assert rows.numel() == 6 * page_bytes(name, 64, dim, dtype.itemsize)
    assert form.page_scales == (scales is not None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_and_what_is_bf16_already_come_back_bit_for_bit(dtype):
    x = numbers((2, 64, 8), dtype)
    x[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert make_format("auto", dtype, 64, 8).lossless
    assert torch.equal(there_and_back("auto", x).view(bits), x.view(bits))
    assert make_format("bf16", dtype, 64, 8).lossless == (dtype == torch.bfloat16)
    assert torch.equal(there_and_back("bf16", x).view(bits), x.bfloat16().to(dtype).view(bits))


@given(
    dim=st.sampled_from([4, 8, 64, 80, 96]),
    scale=st.sampled_from(SCALES),
    seed=st.integers(0, 99),
    offset=st.sampled_from([0.0, 3.0, -50.0]),
)
def test_lossy_formats_are_as_near_as_they_say(dim, scale, seed, offset):
    x = numbers((3, 16, dim), seed=seed, scale=scale) + offset * min(scale, 100)  # least values within float16
    x[0, 3] = 0
    off = {name: (there_and_back(name, x) - x).abs() for name in LOSSY}
    rounding = x.abs().max() * 2**-23  # of float32, in the sum or product
    amax = x.abs().amax((-2, -1), keepdim=True)
    assert (off["fp8"] <= torch.maximum(x.abs() / 16, amax / 448 * 2**-10) + rounding).all()
    assert (off["int8"] <= x.abs().amax(-1, keepdim=True) / 253 + 2**-25 + rounding).all()
    for first in range(0, dim, INT4_GROUP):
        group, wrong = x[..., first : first + INT4_GROUP], off["int4"][..., first : first + INT4_GROUP]
        spread, largest = group.amax(-1) - group.amin(-1), group.abs().amax(-1)
        assert (wrong.amax(-1) <= spread / 29 + largest * 2**-14 + 2**-24 + rounding).all()


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_formats_add_only_their_own_rounding(name, dtype):
    x = numbers((2, 64, 80), dtype)
    assert torch.equal(there_and_back(name, x), there_and_back(name, x.float()).to(dtype))


@pytest.mark.parametrize("name", LOSSY)
def test_the_largest_numbers_stay_finite(name):
    x = numbers((2, 64, 64), torch.float16).sign() * torch.finfo(torch.float16).max
    assert there_and_back(name, x).isfinite().all()
    assert there_and_back("fp8", numbers((2, 64, 64)).sign() * torch.finfo(torch.float32).max).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_becomes_finite(name, wrong):
    x = numbers((2, 64, 80))
    x[1, 63, 79] = wrong
    if name in LOSSY:
        with pytest.raises(FloatingPointError, match=f"offload.format={name} cannot hold keys or values with NaN or infinity"):
            there_and_back(name, x)
    else:
        assert not there_and_back(name, x)[1, 63, 79].isfinite()
        assert there_and_back(name, x).isfinite().sum() == x.numel() - 1


def test_finite_numbers_that_bf16_would_make_infinite_are_refused():
    for x in (torch.full((1, 4, 4), 3.4e38), torch.full((1, 4, 4), 65504.0, dtype=torch.float16)):
        with pytest.raises(FloatingPointError, match="finite numbers that bfloat16 rounds to infinity"):
            there_and_back("bf16", x)


def test_rows_beyond_the_scales_of_float16():
    large = numbers((1, 4, 64)).sign() * 6e4 * 4
    upwards = torch.linspace(-6e4, 6e4 * 3, 32).expand(1, 4, 32)
    assert torch.equal(there_and_back("fp8", large), large)
    assert (there_and_back("int8", large) - large).abs().max() <= 6e4 * 4 / 253
    assert (there_and_back("int4", upwards) - upwards).abs().max() <= 6e4 * 4 / 29
    with pytest.raises(FloatingPointError, match=r"offload.format=int4 cannot hold .* beyond 65504"):
        there_and_back("int4", large)
    with pytest.raises(FloatingPointError, match=r"offload.format=int8 cannot hold .* beyond 65504"):
        there_and_back("int8", large * 40)


@pytest.mark.parametrize("name", LOSSY)
def test_zero_stays_zero_and_numbers_too_small_for_scales_nearly_so(name):
    zeros = torch.zeros(2, 8, 80)
    assert there_and_back(name, zeros).eq(0).all()
    assert make_format(name, zeros.dtype, 8, 80).pack(zeros)[0].eq(0).all()
    for tiny in (1e-8, 1e-30, 1e-44):
        assert (there_and_back(name, torch.full((2, 8, 80), tiny)) - tiny).abs().max() <= (tiny / 16 + 2**-135 if name == "fp8" else 2**-24)


@given(dim=st.sampled_from([8, 64, 80]), seed=st.integers(0, 99))
def test_packing_again_changes_nothing(dim, seed):
    x = numbers((2, 16, dim), seed=seed)
    for name in ("fp8", "int8"):
        form = make_format(name, x.dtype, 16, dim)
        rows, scales = form.pack(x)
        again, new_scales = form.pack(form.unpack(rows, scales))
        assert torch.equal(rows, again)
        if scales is not None:
            assert (scales - new_scales).abs().max() <= scales.max() * 2**-23


@pytest.mark.parametrize("name", NAMES)
def test_any_tokens_of_a_page_unpack_alone_and_pages_need_not_be_contiguous(name):
    x = numbers((2, 3, 16, 80)).transpose(0, 1)
    form = make_format(name, x.dtype, 16, 80)
    rows, scales = form.pack(x)
    packed, other = form.pack(x.contiguous())
    assert rows.is_contiguous() and torch.equal(rows, packed) and (scales is None or torch.equal(scales, other))
    assert torch.equal(form.unpack(rows[..., 5:9, :].contiguous(), scales), form.unpack(rows, scales)[..., 5:9, :])


def test_int4_bytes_of_a_known_row():
    row = torch.tensor([[[0.0, 1, 2, 15]]])
    rows, _ = make_format("int4", row.dtype, 1, 4).pack(row)
    assert rows.flatten().tolist() == [0x20, 0xF1, 0x00, 0x3C, 0, 0]  # scale 1.0, least value 0.0


def test_other_names_and_odd_dimensions_are_refused():
    with pytest.raises(ConfigError, match=r"offload.format=fp4 is unknown; use one of auto, bf16, fp8, int8, int4"):
        make_format("fp4", torch.float32, 64, 64)
    with pytest.raises(ValueError, match="head_dim=6 must be a multiple of 4"):
        make_format("int4", torch.float32, 64, 6)
