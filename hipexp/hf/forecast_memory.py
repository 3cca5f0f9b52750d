"""How much memory a prompt and its answer will take, from a model's configuration: no weights, nothing computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from hipexp.attention import footprint
from hipexp.attention.footprint import Footprint, Shape
from hipexp.attention.reads import unit_tok_of
from hipexp.config.model import ModelFacts, head_sizes
from hipexp.config.offload import Sizes, check_sizes, needs, sizes
from hipexp.config.schema import Heads, LayerPlan, Offload, Pipeline
from hipexp.hf.kinds import LayerKind, layer_kinds
from hipexp.hf.skeleton import Pass, bytes_of, measure_pass

SLOT_BYTES, UNIT_BYTES = 17, 4  # of :class:`hipexp.cache.residency.Residency`: a slot, and an entry of its table
FIRST_ROWS = 4096  # of a table of angles (:class:`hipexp.attention.rope.RopeTables`)
_PASSED: WeakKeyDictionary[PreTrainedModel, dict[tuple[int, int, int], Pass]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Work:
    """What is to be done: ``batch`` prompts of ``prompt_tok`` tokens, read ``chunk_tok`` at a time, answered together by ``new_tok``."""

    prompt_tok: int
    new_tok: int
    chunk_tok: int
    batch: int = 1

    @property
    def ends(self) -> list[int]:
        """Where the parts of a prompt end."""
        return [*range(self.chunk_tok, self.prompt_tok, self.chunk_tok), self.prompt_tok]


@dataclass(frozen=True)
class Forecast:
    """Bytes. On a CPU (``gpu`` False) the device's are host memory, and so is all of the host's tier.

    ``weights``: parameters and buffers. ``kv``: keys and values on the device when the answer is done, ``summaries`` what a method notes of
    them. ``prefill`` and ``decode``: the most that reading a prompt, or a step of the answer, takes besides: activations, tables, and on a
    CPU memory that operations use again; of decode also what steps hold ready for the next. ``host``, ``disk``: the tiers of an offload.
    ``left_out``: in words, what is not counted.
    """

    weights: int
    kv: int
    summaries: int
    prefill: int
    decode: int
    host: int
    disk: int
    gpu: bool
    left_out: str = ""

    @property
    def prefill_peak(self) -> int:
        """The most above the loaded model while prompts are read."""
        return self.kv + self.summaries + self.prefill + self._with_host

    @property
    def decode_peak(self) -> int:
        """The same while answers are made."""
        return self.kv + self.summaries + self.decode + self._with_host

    @property
    def peak_bytes(self) -> int:
        """What :attr:`hipexp.hf.Generation.peak_bytes` will be: of the GPU, or of the process."""
        return max(self.prefill_peak, self.decode_peak)

    @property
    def device_bytes(self) -> int:
        """All that must fit the device, the model among it."""
        return self.weights + self.peak_bytes

    @property
    def _with_host(self) -> int:
        return 0 if self.gpu else self.host


def forecast(model: PreTrainedModel, pipeline: Pipeline | None, offload: Offload, work: Work, gpu: bool) -> Forecast:
    """What ``work`` takes on the model that ``model`` is the :func:`hipexp.hf.skeleton.skeleton` of.

    Keys and values of a layer that sees everything are ``2 · K · D · itemsize`` bytes a token, of a sliding window those of two windows or
    of a part of the prompt; of an offload what its tiers hold (:mod:`hipexp.config.offload`). Landmarks are two rows for each piece.
    Activations: what the model's own code holds in a pass over one part, watched on ``meta`` (:func:`measure_pass`), and where attention
    begins what that takes (:mod:`hipexp.attention.footprint`); the most over all parts and layers. Layers without RoPE count as if they
    had it. Other methods than ``hip`` and ``streaming`` count as dense, what they note of keys is ``left_out``. What an operation of
    torch allocates for itself, a device's context and code are not in it. Raises ConfigError as ``layer_kinds`` and ``check_sizes``.
    """
    return _Sum(model, pipeline, offload, work, gpu).total()


class _Sum:
    """Adds up one :class:`Forecast`."""

    def __init__(self, model: PreTrainedModel, pipeline: Pipeline | None, offload: Offload, work: Work, gpu: bool) -> None:
        self.model, self.offload, self.work, self.gpu = model, offload, work, gpu
        self.kinds = layer_kinds(model)
        config = model.config.get_text_config()
        self.hidden = config.hidden_size * model.dtype.itemsize
        kv_heads, head_dim = head_sizes(config.to_dict())
        self.facts = ModelFacts(len(self.kinds), 0, kv_heads, head_dim, model.dtype.itemsize)
        self.token = 2 * kv_heads * head_dim * model.dtype.itemsize
        known = pipeline is not None and pipeline.method in ("hip", "streaming")
        self.plans = self._plans(pipeline) if pipeline is not None and known else []
        self.left_out = "" if known or pipeline is None else f"what method {pipeline.method} notes of keys, and selects by"
        self.tiers = self._tiers()
        self.shape = Shape(
            config.num_attention_heads, kv_heads, head_dim, model.dtype.itemsize, _rotary(config, head_dim), triton=gpu,
            paged=self.tiers is not None, softcap=bool(getattr(config, "attn_logit_softcapping", None)),
        )  # fmt: skip

    def _plans(self, pipeline: Pipeline) -> list[LayerPlan]:
        return [plan for plan in pipeline.plan(len(self.kinds)) if not self.kinds[plan.layer].keeps]

    def _tiers(self) -> Sizes | None:
        if not self.offload.on or not self.plans:
            return None
        check_sizes(self.offload, self.plans, self.facts)
        return sizes(self.offload, self.plans, self.facts)

    @cached_property
    def full(self) -> list[LayerKind]:
        """Layers that keep keys and values of all tokens."""
        return [kind for kind in self.kinds if kind.attends and kind.window_tok is None]

    @cached_property
    def passed(self) -> dict[int, Pass]:
        """A pass of the model by the number of its tokens: a part of the prompt, what is left of it, and the step of a batch."""
        parts = {end - begin for begin, end in self._parts}
        return {n: self._pass(1, n, before_tok=self.work.prompt_tok - n) for n in parts}

    @property
    def _parts(self) -> list[tuple[int, int]]:
        """Where the parts of a prompt begin and end."""
        return list(zip([0, *self.work.ends[:-1]], self.work.ends, strict=True))

    def _pass(self, rows: int, n_tok: int, before_tok: int) -> Pass:
        known, key = _PASSED.setdefault(self.model, {}), (rows, n_tok, before_tok)
        if key not in known:
            known[key] = measure_pass(self.model, self.kinds, *key)
        return known[key]

    def total(self) -> Forecast:
        work, end = self.work, self.work.prompt_tok + self.work.new_tok
        scratch, peaks = Footprint(), []
        for begin, stop in self._parts:
            attention = self._prefill(stop - begin, stop)
            scratch.join(attention)
            caches = self._kept(stop, reading=True) + (work.batch - 1) * self._kept(work.prompt_tok, reading=True)
            passed = self.passed[stop - begin]
            beside = max(passed.beside, passed.at_attention + attention.transient)
            peaks.append(caches + beside + scratch.scratch_bytes + self._tables(stop) + self._reading(stop - begin))
        step = self._pass(work.batch, 1, before_tok=work.prompt_tok)
        attention = self._decode(end)
        scratch.join(attention)
        host, disk = (0, 0) if self.tiers is None else needs(self.tiers, end, work.batch)
        kv, summaries = work.batch * self._keys(end), work.batch * self._summaries(end)
        held = work.batch * sum(footprint.held_bytes(plan, self.shape, end) for plan in self.plans)
        steps = max(step.beside, step.at_attention + attention.transient) + scratch.scratch_bytes + self._tables(end) + held
        reading = max(peaks) - kv - summaries - (0 if self.gpu else host)
        return Forecast(bytes_of(self.model), kv, summaries, max(0, reading), steps, host, disk, self.gpu, self.left_out)

    @cached_property
    def by_layer(self) -> bool:
        """Whether the prompt is read layer by layer, as :meth:`hipexp.hf.install.Installed.reads_by_layer` says."""
        return self.tiers is not None and self.work.prompt_tok * self.tiers.token_bytes <= self.offload.prefill_bytes

    def _kept(self, n_tok: int, reading: bool) -> int:
        """Bytes in memory of one sequence's caches once ``n_tok`` tokens are read; layer by layer while the last one reads."""
        n_tok = self.work.prompt_tok if self.by_layer else n_tok
        host = 0 if self.tiers is None or self.gpu else needs(self.tiers, n_tok, 1)[0]
        return self._keys(n_tok, reading) + self._summaries(n_tok) + host

    def _keys(self, n_tok: int, reading: bool = False) -> int:
        """Of keys and values on the device. Of what is reserved a CPU has only what was written."""
        recent = max(passed.recent for passed in self.passed.values())
        if not reading:  # a decode step moves what a window sees into room for two of them
            recent = min(recent, sum(2 * (kind.window_tok - 1) * self.token for kind in self.kinds if kind.window_tok))
        if self.tiers is None:
            reserved = self.work.prompt_tok + self.work.new_tok if self.gpu else n_tok
            return recent + len(self.full) * self.token * reserved
        resident = len(self.full) - len(self.plans)
        return recent + resident * self.token * n_tok + sum(self._pool(plan, self.tiers, n_tok, reading) for plan in self.plans)

    def _pool(self, plan: LayerPlan, tiers: Sizes, n_tok: int, reading: bool) -> int:
        """What :class:`hipexp.cache.offloaded.OffloadedStore` has on the device between two parts: newest tokens, pool, and its table.

        Nothing is fetched while a prompt is read layer by layer.
        """
        newest = plan.window_tok + tiers.page_tok
        slots = tiers.device_tok - newest
        lists = self.shape.kv_heads if plan.heads is Heads.per_kv else 1
        units = 2 * lists * n_tok // unit_tok_of(plan)
        scales = 0 if self.offload.format != "fp8" else 2 * self.shape.kv_heads * 4 * (n_tok // tiers.page_tok)
        fetched = 0 if reading and self.by_layer else n_tok - newest
        used = slots if self.gpu else min(slots, max(plan.sink_tok, fetched))
        return (newest + used) * self.token + SLOT_BYTES * 2 * lists * slots // unit_tok_of(plan) + UNIT_BYTES * units + scales

    def _summaries(self, n_tok: int) -> int:
        """Landmarks ``[K, P, 2, D]``: two rows of keys for a piece."""
        pieces = sum(n for plan in self.plans for n in footprint.summary_pieces(plan, n_tok))
        return self.token * (pieces + pieces // 2 if self.gpu else pieces)  # room grows by half; a CPU has what was written

    def _tables(self, n_tok: int) -> int:
        """Angles in fp32, as cosine and sine, and on a CPU as a complex number; a table that was outgrown stays."""
        if not self.plans:
            return 0
        first = self.work.ends[0]
        least, most = (max(footprint.table_rows(plan, first, n) for plan in self.plans) for n in (first, n_tok))
        rows = [max(FIRST_ROWS, 1 << (least - 1).bit_length())]
        while rows[-1] < most:
            rows.append(2 * rows[-1])
        return sum(rows) * self.shape.rotary // 2 * (8 if self.gpu else 16)

    def _reading(self, n_queries: int) -> int:
        """What a prompt takes besides while it is read: its numbers; of an offload the part that is read or, layer by layer, all of it."""
        ids = 8 * self.work.prompt_tok
        if self.tiers is None:
            return ids
        n = self.work.prompt_tok
        if self.by_layer:  # the last layer gives hidden states back while it fills the host's tier
            given_back = 0 if self.gpu else min(n * self.hidden, needs(self.tiers, n, 1)[0] // self.tiers.layers)
            return ids + n * self.hidden - given_back + (n + self.work.new_tok) * self.token
        return ids + n_queries * self.token

    def _prefill(self, n_queries: int, n_keys: int) -> Footprint:
        if not self.plans:
            return footprint.dense(self.shape, n_queries, n_keys)
        shape = replace(self.shape, paged=self.shape.paged and not self.by_layer and n_keys > n_queries)  # the first part is at hand
        return self._most(lambda plan: footprint.prefill(plan, shape, n_queries, n_keys))

    def _decode(self, n_keys: int) -> Footprint:
        if not self.plans:
            return footprint.dense(self.shape, 1, n_keys)
        return self._most(lambda plan: footprint.decode(plan, self.shape, n_keys))

    def _most(self, of: Callable[[LayerPlan], Footprint]) -> Footprint:
        found = Footprint()
        for plan in {repr((p.stages, p.decode, p.sink_tok, p.window_tok, p.heads, p.attend)): p for p in self.plans}.values():
            found.join(of(plan))
        return found


def _rotary(config: object, head_dim: int) -> int:
    """Dimensions that RoPE turns."""
    told = getattr(config, "rope_parameters", None) or {}
    share = told.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(head_dim * share) // 2 * 2
