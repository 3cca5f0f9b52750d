"""Structured keys, values and queries of one attention layer, of any length, for measurements without a model.

Random keys hide what pruning lives on, zeros hide what it costs. These keys have what those of a trained model have: neighbours point
the same way for some tens of tokens, a few tokens are liked by every query, the first ones (the sink) most of all, and the queries of
successive decode steps differ little. Everything is drawn from a seed; the same seed on another kind of device gives other numbers.

Keys and queries are raw: the pipeline rotates them by positions of its own. Their meaning lies in the half of the dimensions that RoPE
turns slowest (Hugging Face's order: dimension ``i`` pairs with ``i + D/2``), so turning by a thousand positions leaves most of it.

What ``drifting`` is, by exact softmax under ``1/sqrt(D)`` without rotation (tests/attention/test_inputs.py measures it):

* the sink holds about ``SINK_SHARE`` of the mass at any length, up to half below 8K tokens, where the text has few segments;
* of the rest, 1 % of the tokens hold about 70 %, 2 % 80 % and 5 % 90 %, less by a tenth below 8K;
* the best 2 % of two successive steps are mostly the same tokens, those of distant steps mostly not.

There is no extra liking for the newest tokens: a window holds no more than its share, so recall is not flattered by it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hipexp.config.schema import GEOMETRIES as SIZES

SINK_TOK = 4
SINK_SHARE = 0.3  # of all mass
HITTER_EVERY_TOK = 512  # one token in so many is liked by all queries
HITTER_LOGIT = 5.0  # by so much, so that together they hold about a fifth of the mass outside the sink
SEGMENT_TOK = (16, 64)  # shortest and longest run of tokens that point the same way
TOPIC_SEGMENTS = 16  # after so many segments the text turns to something unrelated
SEGMENT_LIKENESS = 0.5  # correlation of successive segments of a topic
TOKEN_LIKENESS = 0.8  # correlation of two tokens of a segment
KEY_SPREAD = 1.5  # standard deviation of a meaningful dimension of a key; the others have 1
QUERY_NOISE = 0.5  # the same of a query's other dimensions
NEEDLE_LENGTH = 2.0  # of a needle's key, in lengths of the meaningful part of others
CHUNK_TOK = 4096  # tokens generated at a time, which bounds the extra memory


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Heads and sizes of one layer, and the ``dtype`` of its tensors."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        """What logits are multiplied by."""
        return self.head_dim**-0.5

    def slow(self, device: torch.device) -> Tensor:
        """The ``D/2`` dimensions that RoPE turns slowest."""
        quarter, half = self.head_dim // 4, self.head_dim // 2
        first = torch.arange(quarter, half, device=device)
        return torch.cat([first, first + half])

    def as_dtype(self, dtype: torch.dtype) -> Geometry:
        """The same layer in another ``dtype``."""
        return dataclasses.replace(self, dtype=dtype)


GEOMETRIES = {name: Geometry(*sizes) for name, sizes in SIZES.items()}


class Queries:
    """Queries that wander: each step keeps ``likeness`` of the last one. Half of what heads of a key/value head want is shared.

    All of them like ``liked`` ``[K, D/2]`` (unit vectors), with a strength that makes the length of a key along it its logit. The rest
    gives logits of standard deviation ``spread``. ``sought`` ``[n, K, D/2]`` is added, one of the ``n`` at a time, the next one after
    ``hold_steps``; key/value heads are one apart.
    """

    def __init__(self, geometry: Geometry, liked: Tensor, sought: Tensor, spread: float, likeness: float, hold_steps: int, seed: int):
        self.geometry, self.sought, self.spread = geometry, sought, spread
        self.likeness, self.hold_steps, self.seed = likeness, hold_steps, seed
        self.liked = liked.repeat_interleave(geometry.heads // geometry.kv_heads, 0)
        self._generator = torch.Generator(liked.device).manual_seed(seed)
        self._walk: list[Tensor] = []

    def step(self, step: int) -> Tensor:
        """The queries ``[H, D]`` of a decode step, counted from 0; the same ones whenever it is asked for."""
        while len(self._walk) <= step:
            self._walk.append(self._next(self._walk[-1] if self._walk else None, 1, self._generator))
        return self._from_walk(self._walk[step], step)[:, 0]

    def prefill(self, n_queries: int) -> Tensor:
        """Queries ``[H, Q, D]`` of the last ``n_queries`` tokens, in runs of 256 that wander as decode steps do."""
        run = 256
        generator = torch.Generator(self.liked.device).manual_seed(self.seed + 1)
        n_runs = -(-n_queries // run)
        shape = (self.geometry.heads, n_runs, run, self.geometry.head_dim)
        out = torch.empty(shape, dtype=self.geometry.dtype, device=self.liked.device)
        walk = None
        for i in range(run):
            walk = self._next(walk, n_runs, generator)
            out[:, :, i] = self._from_walk(walk, i)
        return out.flatten(1, 2)[:, :n_queries]

    def _next(self, last: Tensor | None, n: int, generator: torch.Generator) -> Tensor:
        """The next step of ``n`` walks ``[H, n, D]``, every dimension of variance 1."""
        H, K, D = self.geometry.heads, self.geometry.kv_heads, self.geometry.head_dim
        shared, own = (torch.randn(heads, n, D, generator=generator, device=generator.device) for heads in (K, H))
        new = (shared.repeat_interleave(H // K, 0) + own) * math.sqrt(0.5)
        return new if last is None else self.likeness * last + math.sqrt(1 - self.likeness**2) * new

    def _from_walk(self, walk: Tensor, step: int) -> Tensor:
        """The queries ``[H, n, D]`` of a step of the walks."""
        slow, root = self.geometry.slow(walk.device), math.sqrt(self.geometry.head_dim)
        wanted = _unit(_without(walk[..., slow], self.liked[:, None])) * (self.spread * root / KEY_SPREAD)
        wanted = wanted + self.liked[:, None] * root + self._sought_at(step)
        out = walk * QUERY_NOISE
        out[..., slow] = wanted
        return out.to(self.geometry.dtype)

    def _sought_at(self, step: int) -> Tensor | float:
        """What is looked for in a step, ``[H, 1, D/2]``."""
        if not len(self.sought):
            return 0.0
        head = torch.arange(self.geometry.kv_heads, device=self.sought.device)
        now = self.sought[(step // self.hold_steps + head) % len(self.sought), head]
        return now.repeat_interleave(self.geometry.heads // self.geometry.kv_heads, 0)[:, None]


@dataclasses.dataclass
class Inputs:
    """One layer: raw ``keys`` and ``values`` ``[K, T, D]``, its queries, and the positions that were ``planted`` (hitters or needles)."""

    geometry: Geometry
    keys: Tensor
    values: Tensor
    planted: Tensor
    asked: Queries

    def queries(self, step: int) -> Tensor:
        """The queries ``[H, D]`` of a decode step. Some twenty small operations: draw them before the clock runs."""
        return self.asked.step(step)

    def prefill_queries(self, n_queries: int) -> Tensor:
        """Queries ``[H, Q, D]`` of the last ``n_queries`` tokens."""
        return self.asked.prefill(n_queries)


def drifting(
    geometry: Geometry, n_tok: int, *, seed: int = 0, device: str | torch.device = "cpu", spread: float = 3.0, likeness: float = 0.98
) -> Inputs:  # fmt: skip
    """A drifting text with a sink and heavy hitters, which are ``planted``. ``spread``: standard deviation of logits, 2 is flat, 4 sharp.

    ``likeness``: correlation of the queries of successive steps.
    """
    none = torch.empty(0, geometry.kv_heads, geometry.head_dim // 2)
    return _inputs(geometry, n_tok, none, seed, device, spread, likeness, hold_steps=1)


def isolated_needles(
    geometry: Geometry, n_tok: int, *, n_needles: int = 8, hold_steps: int = 16, seed: int = 0, device: str | torch.device = "cpu"
) -> Inputs:  # fmt: skip
    """Single tokens anywhere in a flatter text, unlike their neighbours; the query looks for one of them for ``hold_steps`` steps.

    It holds about half of the mass outside the sink. A search that trusts neighbours to be alike misses it.
    """
    directions = _directions(geometry, n_needles, 0.0, seed)
    return _inputs(geometry, n_tok, directions, seed, device, spread=2.0, likeness=0.98, hold_steps=hold_steps)


def near_equal_needles(
    geometry: Geometry, n_tok: int, *, n_needles: int = 8, similarity: float = 0.9, hold_steps: int = 16, seed: int = 0,
    device: str | torch.device = "cpu",
) -> Inputs:  # fmt: skip
    """Needles whose keys are ``similarity`` (cosine) to each other: the one looked for is barely ahead of the others."""
    directions = _directions(geometry, n_needles, similarity, seed)
    return _inputs(geometry, n_tok, directions, seed, device, spread=2.0, likeness=0.98, hold_steps=hold_steps)


GENERATORS: dict[str, Callable[..., Inputs]] = {
    "drifting": drifting,
    "isolated_needles": isolated_needles,
    "near_equal_needles": near_equal_needles,
}


def _directions(geometry: Geometry, n: int, similarity: float, seed: int) -> Tensor:
    """Unit vectors ``[n, K, D/2]`` whose cosine to each other is about ``similarity``."""
    generator = torch.Generator().manual_seed(seed + 2)
    shape = (geometry.kv_heads, geometry.head_dim // 2)
    common, own = _unit(torch.randn(shape, generator=generator)), _unit(torch.randn(n, *shape, generator=generator))
    return _unit(math.sqrt(similarity) * common + math.sqrt(1 - similarity) * _without(own, common))


def _inputs(
    geometry: Geometry, n_tok: int, needles: Tensor, seed: int, device: str | torch.device, spread: float, likeness: float, hold_steps: int
) -> Inputs:  # fmt: skip
    generator = torch.Generator(device).manual_seed(seed)
    liked = _unit(torch.randn(geometry.kv_heads, geometry.head_dim // 2, generator=generator, device=generator.device))
    needles = _unit(_without(needles.to(generator.device), liked))
    keys, values = _text(geometry, n_tok, liked, generator)
    rest = _expected_mass(n_tok, spread)
    hitters = _places(n_tok, -(-n_tok // HITTER_EVERY_TOK), generator)
    slow = geometry.slow(keys.device)
    keys[:, hitters[:, None], slow] += (HITTER_LOGIT * liked[:, None]).to(keys.dtype)
    sought = needles
    if len(needles):
        planted = _places(n_tok, len(needles), generator)
        length = NEEDLE_LENGTH * KEY_SPREAD * math.sqrt(geometry.head_dim // 2)
        keys[:, planted[:, None], slow] = (needles * length).transpose(0, 1).to(keys.dtype)
        rest += (KEY_SPREAD / length * rest) ** 2 / 2  # the other keys have a part along the needle as well
        sought = needles * (rest * math.sqrt(geometry.head_dim) / length)
        rest += math.log(2)
    sink = rest + math.log(SINK_SHARE / (1 - SINK_SHARE) / SINK_TOK)
    keys[:, :SINK_TOK, slow] = (sink * liked[:, None]).to(keys.dtype)
    asked = Queries(geometry, liked, sought, spread, likeness, hold_steps, seed + 3)
    return Inputs(geometry, keys, values, planted if len(needles) else hitters, asked)


def _expected_mass(n_tok: int, spread: float) -> float:
    """Log of the expected sum of ``exp(logit)`` over a text without sink and needles: normal logits, and the hitters."""
    return math.log(n_tok) + spread**2 / 2 + math.log1p(math.exp(HITTER_LOGIT) / HITTER_EVERY_TOK)


def _text(geometry: Geometry, n_tok: int, liked: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values ``[K, T, D]`` of a text of topics, segments and tokens; no key has a part along ``liked``."""
    K, D, device = geometry.kv_heads, geometry.head_dim, generator.device
    keys, values = (torch.empty(K, n_tok, D, dtype=geometry.dtype, device=device) for _ in range(2))
    lengths = torch.randint(SEGMENT_TOK[0], SEGMENT_TOK[1] + 1, (n_tok // SEGMENT_TOK[0] + 1,), generator=generator, device=device)
    segment = torch.repeat_interleave(lengths)[:n_tok]
    meaning = _meanings(int(segment[-1]) + 1, K, D // 2, generator)
    spoken = torch.randn(K, D // 2, D, generator=generator, device=device) / math.sqrt(D)  # half of a value's variance: its segment's
    slow = geometry.slow(device)
    for begin in range(0, n_tok, CHUNK_TOK):
        part = slice(begin, begin + CHUNK_TOK)
        common = meaning[:, segment[part]]
        noise = torch.randn(K, common.shape[1], D, generator=generator, device=device)
        values[:, part] = math.sqrt(0.5) * torch.randn(noise.shape, generator=generator, device=device) + common @ spoken
        own = math.sqrt(TOKEN_LIKENESS) * common + math.sqrt(1 - TOKEN_LIKENESS) * noise[..., slow]
        noise[..., slow] = KEY_SPREAD * _without(own, liked[:, None])
        keys[:, part] = noise
    return keys, values


def _meanings(n_segments: int, kv_heads: int, dims: int, generator: torch.Generator) -> Tensor:
    """What each segment is about, ``[K, n_segments, dims]`` of variance 1: a walk within a topic, all topics at a time."""
    n_topics = -(-n_segments // TOPIC_SEGMENTS)
    walk = torch.randn(kv_heads, n_topics, TOPIC_SEGMENTS, dims, generator=generator, device=generator.device)
    for i in range(1, TOPIC_SEGMENTS):
        walk[:, :, i] = SEGMENT_LIKENESS * walk[:, :, i - 1] + math.sqrt(1 - SEGMENT_LIKENESS**2) * walk[:, :, i]
    return walk.flatten(1, 2)[:, :n_segments]


def _places(n_tok: int, n: int, generator: torch.Generator) -> Tensor:
    """``n`` positions outside the sink, ascending. Raises ``ValueError`` if there are fewer."""
    if n_tok < SINK_TOK + n:
        raise ValueError(f"{n_tok} tokens have no room for {n} planted ones beside a sink of {SINK_TOK}")
    return torch.randperm(n_tok - SINK_TOK, generator=generator, device=generator.device)[:n].sort().values + SINK_TOK


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _without(x: Tensor, direction: Tensor) -> Tensor:
    """``x`` without its part along the unit vector ``direction``."""
    return x - (x * direction).sum(-1, keepdim=True) * direction
