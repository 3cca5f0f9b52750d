"""Plain statement of the gather: one run at a time."""

from torch import Tensor


def gather_kv(pages: Tensor, blocks: Tensor, out: Tensor) -> None:
    for i, block in enumerate(blocks.tolist()):
        out[i] = pages[block]
