"""How keys and values are stored off the device: a row of bytes for each token of a head, and for ``fp8`` a scale for each page.

Each format says how far off its numbers are at most, before they are rounded to the model's own number format. Numbers
that a format cannot hold, infinity and NaN among them, are refused when they are packed, never stored as something else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hipexp.config.schema import FORMATS, INT4_GROUP, ConfigError

E4M3_MAX = 448.0  # the largest number of float8_e4m3fn
SMALLEST = torch.finfo(torch.float32).tiny


class Format(ABC):
    """Packs pages ``[.., page_tok, D]`` of ``dtype`` into rows of bytes, and unpacks any tokens of them, on the device where they are.

    ``row_bytes``: of a token of one head. ``page_scales``: whether pages have a float32 scale besides. ``lossless``: what is unpacked
    equals what was packed, bit for bit.
    """

    row_bytes: int
    page_scales = False
    lossless = False

    def __init__(self, dtype: torch.dtype, page_tok: int, head_dim: int) -> None:
        self.dtype, self.page_tok, self.head_dim = dtype, page_tok, head_dim

    @abstractmethod
    def pack(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows uint8 ``[.., page_tok, row_bytes]`` and scales float32 ``[..]`` of pages ``[.., page_tok, D]``.

        Raises FloatingPointError for numbers that the format cannot hold.
        """

    @abstractmethod
    def unpack(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        """Numbers ``[.., n, D]`` in ``dtype``, of rows ``[.., n, row_bytes]`` and the scales ``[..]`` of their pages."""

    def _finite(self, x: Tensor) -> Tensor:
        """In ``dtype``; what rounding brought above its largest number becomes that number."""
        most = torch.finfo(self.dtype).max
        return x.clamp_(-most, most).to(self.dtype)


class Plain(Format):
    """``auto`` and ``bf16``: numbers as they are, or rounded to bfloat16. NaN and infinity come back as they were."""

    def __init__(self, dtype: torch.dtype, page_tok: int, head_dim: int, stored: torch.dtype) -> None:
        super().__init__(dtype, page_tok, head_dim)
        self.stored, self.row_bytes, self.lossless = stored, head_dim * stored.itemsize, stored == dtype

    def pack(self, x: Tensor) -> tuple[Tensor, None]:
        stored = x.to(self.stored).contiguous()
        if not self.lossless:
            infinite = stored.to(self.dtype).isinf()
            if infinite.any() and (infinite & x.isfinite()).any():
                raise _refusal("bf16", "finite numbers that bfloat16 rounds to infinity")
        return stored.view(torch.uint8), None

    def unpack(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        return rows.view(self.stored).to(self.dtype)


class Fp8(Format):
    """float8 e4m3, with one scale for a page of one head's keys or values: its largest magnitude over 448.

    Off by at most a 16th of the number, or 2^-10 scales (half the least step of e4m3) if that is more: a 16th of the page's largest
    magnitude. Packing what was unpacked in float32 gives the same rows, and scales that differ in their last bit at most.
    """

    page_scales = True

    def __init__(self, dtype: torch.dtype, page_tok: int, head_dim: int) -> None:
        super().__init__(dtype, page_tok, head_dim)
        self.row_bytes = head_dim

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float().contiguous()
        scales = (_magnitude(x, (-2, -1), "fp8") / E4M3_MAX).clamp_(min=SMALLEST)
        codes = (x / scales[..., None, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8), scales

    def unpack(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        assert scales is not None
        # Sign, exponent and fraction moved to their places in a float16 are a 256th of the number; torch converts that ten times faster.
        halves = rows.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
        return self._finite(halves.float().mul_(256 * scales[..., None, None]))


class Int8(Format):
    """Whole numbers from -127 to 127, and behind those of a token their float16 scale: its largest magnitude over 127, rounded up.

    Off by at most half a scale: less than a 253rd of the token's largest magnitude, and 2^-25, since scales are multiples of 2^-24.
    Magnitudes may be up to 127 * 65504. Packing what was unpacked in float32 gives the same rows where scales are normal numbers.
    """

    def __init__(self, dtype: torch.dtype, page_tok: int, head_dim: int) -> None:
        super().__init__(dtype, page_tok, head_dim)
        self.row_bytes = head_dim + 2

    def pack(self, x: Tensor) -> tuple[Tensor, None]:
        x = x.float().contiguous()
        scales = _half_above(_magnitude(x, (-1,), "int8")[..., None] / 127, "int8")
        codes = (x / _divisor(scales)).round_().clamp_(-127, 127).to(torch.int8)
        return torch.cat((codes.view(torch.uint8), scales.view(torch.uint8)), -1), None

    def unpack(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        codes, behind = rows.view(torch.int8)[..., : self.head_dim], rows[..., self.head_dim :]
        return self._finite(codes.float().mul_(behind.view(torch.float16).float()))


class Int4(Format):
    """Whole numbers from 0 to 15, two a byte, and behind those of a token the float16 scales and least values of groups of ``INT4_GROUP``.

    The least value is rounded down, and the scale, a 15th of what lies between it and the largest, up. Off by at most half a scale: less
    than a 29th of what lies between a group's least and largest number, and 2^-14 of its largest magnitude, and 2^-24. Least values and
    scales must be within 65504. The first half of a token's numbers is in the low bits of the bytes.
    """

    def __init__(self, dtype: torch.dtype, page_tok: int, head_dim: int) -> None:
        super().__init__(dtype, page_tok, head_dim)
        self.groups = -(-head_dim // INT4_GROUP)
        self.row_bytes = head_dim // 2 + 4 * self.groups

    def pack(self, x: Tensor) -> tuple[Tensor, None]:
        x = self._grouped(x.float().contiguous())
        lowest, highest = x.amin(-1), x.amax(-1)
        _demand_finite(torch.stack((lowest, highest)), "int4")
        least = _half_above(-lowest, "int4").neg_()
        scales = _half_above((highest - least.float()) / 15, "int4")
        codes = ((x - least.float()[..., None]) / _divisor(scales)[..., None]).round_().clamp_(0, 15).to(torch.uint8)
        low, high = codes.flatten(-2)[..., : self.head_dim].chunk(2, -1)
        return torch.cat((high << 4 | low, scales.view(torch.uint8), least.view(torch.uint8)), -1), None

    def unpack(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        pairs, behind = rows[..., : self.head_dim // 2].contiguous(), rows[..., self.head_dim // 2 :]
        codes = torch.cat((pairs & 15, pairs >> 4), -1).float()
        ends = behind.view(torch.float16).float().unflatten(-1, (2, self.groups)).repeat_interleave(INT4_GROUP, -1)
        steps, least = ends[..., : self.head_dim].unbind(-2)
        return self._finite(codes.mul_(steps).add_(least))

    def _grouped(self, x: Tensor) -> Tensor:
        """``[.., D]`` as ``[.., groups, INT4_GROUP]``; the last group is filled up with its last number, which moves neither end."""
        missing = self.groups * INT4_GROUP - self.head_dim
        if missing:
            x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), -1)
        return x.unflatten(-1, (self.groups, INT4_GROUP))


def _refusal(name: str, what: str) -> FloatingPointError:
    return FloatingPointError(f"offload.format={name} cannot hold keys or values with {what}; choose offload.format=auto")


def _demand_finite(ends: Tensor, name: str) -> None:
    if not ends.isfinite().all():
        raise _refusal(name, "NaN or infinity")


def _magnitude(x: Tensor, dims: tuple[int, ...], name: str) -> Tensor:
    """The largest magnitude over ``dims``. Raises FloatingPointError for NaN and infinity, which no maximum hides."""
    largest = x.abs().amax(dims)
    _demand_finite(largest, name)
    return largest


def _half_above(x: Tensor, name: str) -> Tensor:
    """The least float16 that is not below float32 ``x``. Raises FloatingPointError beyond the largest float16."""
    near = x.half()
    bits = near.view(torch.int16)
    above = torch.where(near.float() < x, bits + torch.where(bits < 0, -1, 1).to(torch.int16), bits).view(torch.float16)
    if above.isinf().any():
        raise _refusal(name, "numbers whose scale or least value is beyond 65504, the largest of float16")
    return above


def _divisor(scales: Tensor) -> Tensor:
    """Scales to divide by. What has the scale 0 is 0, and 0 / 0 would be NaN, which is no whole number."""
    return torch.where(scales > 0, scales.float(), 1.0)


def make_format(name: str, dtype: torch.dtype, page_tok: int, head_dim: int) -> Format:
    """The format ``name`` for pages of ``page_tok`` tokens of a model whose numbers are ``dtype``.

    Raises ConfigError for another name, ValueError for a ``head_dim`` that int4 cannot pack.
    """
    if name == "int4" and head_dim % 4:
        raise ValueError(f"head_dim={head_dim} must be a multiple of 4")
    if name in ("auto", "bf16"):
        return Plain(dtype, page_tok, head_dim, dtype if name == "auto" else torch.bfloat16)
    kinds: dict[str, type[Fp8 | Int8 | Int4]] = {"fp8": Fp8, "int8": Int8, "int4": Int4}
    if name not in kinds:
        raise ConfigError(f"offload.format={name} is unknown; use one of {', '.join(FORMATS)}")
    return kinds[name](dtype, page_tok, head_dim)
