"""Plain statement of the gather: one block of one head at a time."""

from torch import Tensor


def gather_kv(
    k_pages: Tensor, v_pages: Tensor, table: Tensor, starts: Tensor, counts: Tensor, out: tuple[Tensor, Tensor], *, block_tok: int
) -> None:
    page_tok = k_pages.shape[2]
    for pages, found in zip((k_pages, v_pages), out, strict=True):
        found.zero_()
        for head in range(len(found)):
            s = head if len(starts) > 1 else 0
            for m in range(min(int(counts[s]), starts.shape[1])):
                page, row = divmod(int(starts[s, m]), page_tok)
                found[head, m * block_tok : (m + 1) * block_tok] = pages[int(table[page]), head, row : row + block_tok]
