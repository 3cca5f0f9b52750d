"""Batches of training prompts: padded, and with the queries that ask for needles."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from hipexp.needle.corpus import PromptMaker
from hipexp.needle.locality import Asking
from hipexp.needle.phases import Step
from hipexp.needle.segments import Prompt
from hipexp.needle.tokenizer import train_tokenizer

FIRST_WEIGHT = 3.0  # of a token that tells the needles apart: the first of a value, of a name in an answer, the comma between them
OTHERS = 5  # most tokens that are right at one position
LOCALITY_FROM_TOK = 192  # in shorter prompts there is no room between sinks and window
ASKING_ROWS, ASKING_BLOCKS, BLOCK_TOK, BLOCK_ROWS = 24, 4, 64, 16  # per prompt; a block is a 24th of a short prompt
AHEAD = 4  # batches that a process makes ahead
ALIVE_EVERY_S = 1  # how often a process looks whether the training goes on

tokenizer = cache(train_tokenizer)


class Batch(NamedTuple):
    """Right-padded ids and loss weights ``[B, T]``, further right tokens (``others`` [N, 2 + OTHERS]: sequence, position, tokens or -1),
    and the queries that ask, one by one (``single``) and in ``blocks``: None if no needle is far enough."""

    ids: torch.Tensor
    weight: torch.Tensor
    others: torch.Tensor
    single: Asking | None
    blocks: Asking | None

    def each(self, change: Callable) -> Batch:
        """The same with each tensor changed."""
        return Batch(*(Asking(*map(change, part)) if isinstance(part, Asking) else part if part is None else change(part) for part in self))

    def to(self, device: str | torch.device) -> Batch:
        """The same on another device."""
        return self.each(lambda tensor: tensor.to(device))


def make_batch(step: Step) -> Batch:
    """The batch of a step."""
    maker = PromptMaker(lambda text: tokenizer().encode(text, add_special_tokens=False), step.mixture, step.number, FIRST_WEIGHT)
    prompts = [maker.prompt(step.length) for _ in range(step.sequences)]
    return collate(prompts, step.length, random.Random(f"needle-rows/{step.number}"))


def batches(steps: list[Step], workers: int) -> Iterator[tuple[Step, Batch]]:
    """Each step with its batch, made by ``workers`` processes a few steps ahead; the same without any."""
    ahead = AHEAD if workers else None
    loader = DataLoader(
        steps,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_arrays,
        prefetch_factor=ahead,
        worker_init_fn=partial(_serve, os.getpid()),
        multiprocessing_context="fork" if workers else None,
    )
    for step, arrays in zip(steps, loader, strict=True):
        yield step, arrays.each(torch.from_numpy)


def _serve(parent: int, _: int) -> None:
    """Make this process live as long as its parent, and leave to that one what a terminal or a batch system tells all of them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: else it waits for ever to write into a pipe that only its siblings hold open."""
    while os.getppid() == parent:
        time.sleep(ALIVE_EVERY_S)
    os._exit(1)


def _as_arrays(step: Step) -> Batch:
    """Arrays are passed on by copying: tensors would need shared memory, of which some machines have little."""
    return make_batch(step).each(torch.Tensor.numpy)


def collate(prompts: list[Prompt], length: int, rng: random.Random) -> Batch:
    """Prompts of at most ``length`` tokens as one batch."""
    B, T = len(prompts), length
    others = [[b, at, *also[:OTHERS], *[-1] * (OTHERS - len(also))] for b, p in enumerate(prompts) for at, also in p.others.items()]
    ids, weight = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T)
    size, sink, window = min(BLOCK_TOK, T // 24), min(256, T // 8), min(1024, T // 4)
    single, blocks = (
        Asking(torch.zeros(B, n, s, dtype=torch.long), torch.zeros(B, n, T), torch.zeros(B, n, T, dtype=torch.bool))
        for n, s in ((ASKING_ROWS, 1), (ASKING_BLOCKS, min(size, BLOCK_ROWS)))
    )
    for b, (tokens, weights, links, _) in enumerate(prompts):
        ids[b, : len(tokens)] = torch.tensor(tokens)
        weight[b, : len(tokens)] = torch.tensor(weights)
        links = [link for link in links if link.needle_from >= sink]
        asking_rows = ((link, row) for link in links for row in range(link.asking_from, link.asking_to))
        rows = [row for link, row in asking_rows if link.needle_to <= row // size * size - window]
        rng.shuffle(rows)
        firsts = list(dict.fromkeys(row // size * size for row in rows))
        for asking, starts, span in ((single, rows, 1), (blocks, firsts, size)):
            for n, start in enumerate(starts[: asking.rows.shape[1]]):
                asking.rows[b, n] = torch.linspace(start, min(start + span, len(tokens)) - 1, asking.rows.shape[2]).long()
                asking.allowed[b, n, sink : start - window] = True
                for asking_from, asking_to, lo, hi, after in links:
                    if asking_from < start + span and asking_to > start and hi <= start - window:
                        end = min(hi + after, start - window)
                        told = torch.cat([torch.ones(hi - lo), 1 - torch.arange(1, end - hi + 1) / max(after, 1)])
                        asking.target[b, n, lo:end] = asking.target[b, n, lo:end].maximum(told)
                asking.target[b, n] /= asking.target[b, n].sum()
    asking = (single, blocks) if T >= LOCALITY_FROM_TOK and single.target.any() else (None, None)
    return Batch(ids, weight, torch.tensor(others, dtype=torch.long).view(-1, 2 + OTHERS), *asking)
