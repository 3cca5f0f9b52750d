"""``index_select``, which copies runs on all threads, where the pages are."""

import torch
from torch import Tensor


def gather_kv(pages: Tensor, blocks: Tensor, out: Tensor) -> None:
    if pages.device == out.device:
        torch.index_select(pages, 0, blocks, out=out)
    else:
        out.copy_(pages.index_select(0, blocks.to(pages.device)))
