"""Combine attention over disjoint sets of keys into attention over their union."""

from __future__ import annotations

from torch import Tensor

from hipexp_kernels.dispatch import choose, lazy, require
from hipexp_kernels.merge_lse.reference import merge_lse as reference
from hipexp_kernels.merge_lse.vectorized import merge_lse as vectorized


def merge_lse(outs: list[Tensor], lses: list[Tensor], *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Return the output ``[..., D]`` and log-sum-exp ``[...]`` (fp32) over the union of the parts.

    ``outs[i]`` is the output over part ``i`` and ``lses[i]`` the log of its softmax denominator; ``-inf`` marks an
    empty part. Where every part is empty the output is 0. Raises ``ValueError`` on shapes that do not match.
    """
    require(len(outs) == len(lses) > 0, f"merge_lse needs as many lses as outs, and at least one; got {len(outs)} and {len(lses)}")
    for out, lse in zip(outs, lses, strict=True):
        require(
            out.shape == outs[0].shape and lse.shape == out.shape[:-1],
            f"merge_lse: out {tuple(out.shape)} does not go with lse {tuple(lse.shape)}",
        )
    run = choose(impl, {"reference": reference, "vectorized": vectorized, "triton": lazy("merge_lse")}, outs[0].device)
    return run(outs, lses)
