"""RoPE tables with the rows that were asked for and no more: a position without a row is an error, not a spare row."""

import torch
from hipexp_kernels.rope import RopeTable

from hipexp.attention.rope import RopeTables


class ExactTables(RopeTables):
    def upto(self, rows):
        cos, sin = self.cos_sin(torch.arange(rows))
        return RopeTable(cos.float().contiguous(), sin.float().contiguous())
