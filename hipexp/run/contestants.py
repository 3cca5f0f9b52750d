"""Dense attention as fast as this machine can do it: what every speed figure of attention alone is measured against.

A contestant does one layer of one sequence: decode takes ``q`` ``[H, D]``, prefill ``q`` ``[H, Q, D]`` (the last ``Q`` of ``T`` tokens,
``Q = T`` for a whole prompt), both ``k``, ``v`` ``[K, T, D]``, rotated already; it returns the shape of ``q``. None of them
materialises a mask or copies keys per query head, except those of the newest ``Q`` tokens. The denominator of a speedup is the
fastest of them: ``fastest(time_alternating(...))``. Other libraries take part where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from hipexp_kernels import attend_blocks, merge_lse
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hipexp.run.timing import Contestant, missing, missing_compiler

FLEX_BLOCK_TOK = 128
TILE_LOGITS = 1 << 24  # logits of a tile of the matmul prefill: 64 MiB in fp32

# -- decode ------------------------------------------------------------------------------------------------------------------------


def decode_contestants(device: torch.device) -> list[Contestant]:
    """Attention of one query ``[H, D]`` over all keys.

    A key/value head's query heads are rows of one product, so keys are read once; ``enable_gqa`` does that on a GPU only.
    """
    common = [Contestant("matmuls packed", _decode_matmuls), Contestant("flex packed", _decode_flex, missing_compiler)]
    if device.type == "cpu":
        return [Contestant("sdpa packed", _decode_sdpa), Contestant("matmuls, keys first", _decode_keys_first), *common]
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    return [
        *(Contestant(f"sdpa {name} packed", partial(_decode_sdpa, backend=backend)) for name, backend in backends.items()),
        Contestant("sdpa flash gqa", _decode_flash_gqa),
        *common,
        Contestant("flash_attn", _decode_flash_attn, partial(missing, "flash_attn")),
        Contestant("flashinfer", _decode_flashinfer, partial(missing, "flashinfer")),
        Contestant("attend_blocks triton", _decode_own),
    ]


def packed(q: Tensor, k: Tensor) -> Tensor:
    """Queries ``[H, ..., D]`` as rows ``[K, rows, D]`` of their key/value heads."""
    return q.reshape(k.shape[0], -1, q.shape[-1])


def _decode_sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None) -> Tensor:
    rows = packed(q, k)[None]
    if backend is None:
        return F.scaled_dot_product_attention(rows, k[None], v[None])[0].view(q.shape)
    with sdpa_kernel(backend):  # refuses, rather than falling back
        return F.scaled_dot_product_attention(rows, k[None], v[None])[0].reshape(q.shape)


def _decode_flash_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q[None, :, None], k[None], v[None], enable_gqa=True)[0, :, 0]


def _decode_matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = (packed(q, k) * q.shape[-1] ** -0.5) @ k.mT
    return (torch.softmax(logits, -1, dtype=torch.float32).to(v.dtype) @ v).view(q.shape)


def _decode_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with keys as the left factor, which on some processors comes through memory twice as fast, and one copy of the logits."""
    logits = (k @ (packed(q, k) * q.shape[-1] ** -0.5).mT).mT.contiguous()
    return (torch.softmax(logits, -1, dtype=torch.float32).to(v.dtype) @ v).view(q.shape)


def _decode_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled_flex()(packed(q, k)[None], k[None], v[None])[0].reshape(q.shape)


def _decode_flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_with_kvcache  # splits the keys over programs, as its other functions do not

    return flash_attn_with_kvcache(q[None, None], k.transpose(0, 1)[None], v.transpose(0, 1)[None])[0, 0]


def _decode_flashinfer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flashinfer import single_decode_with_kv_cache

    return single_decode_with_kv_cache(q, k, v, kv_layout="HND", use_tensor_cores=True)


def _decode_own(q: Tensor, k: Tensor, v: Tensor, impl: str = "triton") -> Tensor:
    """Our kernel with nothing pruned: an endless window, by which it also decides over how many programs keys are split."""
    out, _ = attend_blocks(
        q.view(len(q), 1, 1, -1), k, v, *_nothing_selected(k.shape[1], q.device),
        block_tok=16, sink_tok=0, window_tok=1 << 30, scale=q.shape[-1] ** -0.5, impl=impl,
    )  # fmt: skip
    return out.view(q.shape)


@cache
def _nothing_selected(n_tok: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``blocks``, ``counts``, ``first`` and ``exact`` of the last query; made once, as a model's layers share them."""
    blocks, counts = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((1, 1, 0), (1, 1)))
    return blocks, counts, torch.full((1,), n_tok - 1, device=device), torch.ones(1, dtype=torch.bool, device=device)


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled for the exact shapes it meets; with ``fullgraph`` it fails rather than running uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 256  # lengths times geometries of a process
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


# -- prefill -----------------------------------------------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def prefill_contestants(device: torch.device) -> list[Contestant]:
    """Causal attention of the last ``Q`` queries ``[H, Q, D]``: query ``r`` stands at position ``T - Q + r``."""
    if device.type == "cpu":
        return [
            Contestant("flash, prefix + diagonal", partial(_prefill_in_two, _flash_cpu)),
            Contestant("matmuls in tiles", _prefill_matmuls),
        ]
    return [
        Contestant("flash, lower right", _prefill_flash),
        Contestant("flash, prefix + diagonal", partial(_prefill_in_two, _flash)),
        Contestant("cudnn, prefix + diagonal", partial(_prefill_in_two, _cudnn)),
        Contestant("flex, lower right", _prefill_flex),
        Contestant("flash_attn", _prefill_flash_attn, partial(missing, "flash_attn")),
        Contestant("flashinfer", _prefill_flashinfer, partial(missing, "flashinfer")),
    ]


def _prefill_in_two(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Everything before the first query without a mask, the rest as a square, joined by log-sum-exp.

    For kernels whose ``is_causal`` means the upper left corner, or that refuse it when there are more keys than queries.
    """
    H, Q, _ = q.shape
    K, T, _ = k.shape
    own_k, own_v = (x[:, T - Q :].repeat_interleave(H // K, 0) for x in (k, v))
    own, own_lse = attend(q, own_k, own_v, True)
    if T == Q:
        return own
    far, far_lse = attend(packed(q, k), k[:, : T - Q], v[:, : T - Q], False)
    return merge_lse([far.reshape(q.shape), own], [far_lse.reshape(H, Q), own_lse])[0]


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], is_causal=causal)
    return out[0], lse[0].float()


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q[None], k[None], v[None], is_causal=causal)
    return out[0], lse[0]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q[None], k[None], v[None], None, True, is_causal=causal)
    return out[0], lse.reshape(q.shape[:2])  # torch 2.9 gave it a last dimension of 1


def _prefill_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One call. ``is_causal`` of this operator means the lower right corner; ``causal_lower_right`` of torch ends up here too.

    But that one, where flash attention cannot run, materialises a mask of ``Q * T`` for the math path. This one raises.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention(q[None], k[None], v[None], is_causal=True)[0][0]


def _prefill_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask's block table, which all layers of a model share, is made once for its shape and not timed."""
    mask = lower_right(q.shape[1], k.shape[1], q.device)
    return compiled_flex()(q[None], k[None], v[None], block_mask=mask, enable_gqa=True)[0]


@cache
def lower_right(n_queries: int, n_tok: int, device: torch.device) -> Any:
    """The causal ``BlockMask`` of the last ``n_queries`` of ``n_tok`` tokens, counted out: torch would evaluate all ``Q * T`` entries."""
    from torch.nn.attention.flex_attention import BlockMask

    size, offset = FLEX_BLOCK_TOK, n_tok - n_queries
    begin = torch.arange(0, n_queries, size, device=device)
    block = torch.arange(-(-n_tok // size), device=device)
    last = (begin + size).clamp(max=n_queries) - 1 + offset  # newest key that a row of the block sees
    full = (begin + offset + 1) // size  # blocks that its first row sees to their end
    partial_blocks = (full[:, None] + block).clamp(max=len(block) - 1)
    every = block.expand(len(begin), -1)
    counts = [x.to(torch.int32)[None, None] for x in (last // size + 1 - full, full)]
    lists = [x.to(torch.int32).contiguous()[None, None] for x in (partial_blocks, every)]

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + offset

    return BlockMask.from_kv_blocks(
        counts[0], lists[0], counts[1], lists[1], BLOCK_SIZE=size, mask_mod=sees, seq_lengths=(n_queries, n_tok)
    )  # fmt: skip


def _prefill_flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # whose ``causal`` means the lower right corner, from version 2.1 on

    return flash_attn_func(*(x.transpose(0, 1)[None] for x in (q, k, v)), causal=True)[0].transpose(0, 1)


def _prefill_flashinfer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flashinfer import single_prefill_with_kv_cache

    return single_prefill_with_kv_cache(q.transpose(0, 1).contiguous(), k, v, causal=True, kv_layout="HND").transpose(0, 1)


def _prefill_matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As many queries at a time as keep the logits in bounds; later queries of a tile are masked in its last columns."""
    H, Q, D = q.shape
    T = k.shape[1]
    step, out = max(1, TILE_LOGITS // (H * T)), torch.empty_like(q)
    for begin in range(0, Q, step):
        tile = q[:, begin : begin + step]
        n = tile.shape[1]
        seen = T - Q + begin + n
        logits = ((packed(tile, k) * D**-0.5) @ k[:, :seen].mT).view(H, n, seen)
        logits[:, :, seen - n :].masked_fill_(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
        weight = torch.softmax(logits, -1, dtype=torch.float32).to(v.dtype)
        out[:, begin : begin + n] = (packed(weight, k) @ v[:, :seen]).view(tile.shape)
    return out
