"""Blocks are rows of one matrix, which ``index_select`` gathers on all threads."""

import torch
from torch import Tensor


def gather_kv(
    k_pages: Tensor, v_pages: Tensor, table: Tensor, starts: Tensor, counts: Tensor, out: tuple[Tensor, Tensor], *, block_tok: int
) -> None:
    (P, K, page_tok, D), M = k_pages.shape, starts.shape[1]
    missing = torch.arange(M, device=starts.device) >= counts[:, None]
    start = starts.long().masked_fill(missing, 0)
    page, block = table.long()[start // page_tok], start % page_tok // block_tok
    head = torch.arange(K, device=starts.device)[:, None]
    for pages, found in zip((k_pages, v_pages), out, strict=True):
        per_page, per_head = (stride // (block_tok * D) if n > 1 else 0 for n, stride in zip((P, K), pages.stride(), strict=False))
        n_rows = (P - 1) * per_page + (K - 1) * per_head + page_tok // block_tok
        rows = pages.detach().as_strided((n_rows, block_tok * D), (block_tok * D, 1))
        found = found.view(K * M, block_tok * D)
        torch.index_select(rows, 0, (page * per_page + head * per_head + block).flatten(), out=found)
        found[missing.expand(K, M).flatten()] = 0
