"""The vocabulary of an experiment: ordinary dataclasses that nothing mutates after composition.

Units are suffixes (``_tok`` tokens, ``_steps`` decode steps). Only the standard library is imported here, so that
every part of hipexp, also where Hydra is missing, can build a configuration by hand. The cross-field rules are in
``hipexp.config.check``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class ConfigError(ValueError):
    """A mistake in what the user asked for. The message names the key, its value, the rule and the repair."""


class Representative(str, Enum):
    """How one number is found for a chunk of keys."""

    descent = "descent"  # binary descent, two probes per level (InfiniteHiP)
    grid = "grid"  # best of as many evenly spaced keys
    exact = "exact"  # best of all keys of the chunk
    bounds = "bounds"  # best of two landmarks for every ``piece_tok`` keys; summarized once


class PruneRope(str, Enum):
    """Positions that queries and keys get while chunks are scored."""

    relative = "relative"
    chunk_indexed = "chunk_indexed"
    infllm = "infllm"
    dynamic = "dynamic"
    self_extend = "self_extend"
    native = "native"
    none = "none"


class AttendRope(str, Enum):
    """Positions that queries and keys get in the final attention."""

    streaming = "streaming"
    infllm = "infllm"
    dynamic = "dynamic"
    native = "native"


class Heads(str, Enum):
    """Who shares a selection: all heads of a layer, or the query heads of one key/value head."""

    shared = "shared"
    per_kv = "per_kv"


@dataclass
class Stage:
    """One pruning stage: cut the candidates into chunks, score them, keep the best.

    ``chunk_tok``        tokens per chunk (the paper's c_i)
    ``keep_tok``         tokens kept after the stage (the paper's K_i)
    ``query_block_tok``  neighbouring queries that share one selection
    ``query_stride_tok`` neighbouring queries averaged into one before scoring
    ``refresh_steps``    decode steps between two runs of the stage
    ``representative``   how a chunk is scored
    ``rope``             positions while scoring; None takes ``Rope.prune``
    ``piece_tok``        of ``bounds``: keys that have two landmarks; None is 64, or the smallest chunk that is scored so
    """

    chunk_tok: int
    keep_tok: int
    query_block_tok: int = 64
    query_stride_tok: int = 1
    refresh_steps: int = 1
    representative: Representative = Representative.descent
    rope: PruneRope | None = None
    piece_tok: int | None = None


@dataclass
class StageOverride:
    """What a layer group changes in one stage; None leaves a field as it is."""

    chunk_tok: int | None = None
    keep_tok: int | None = None
    query_block_tok: int | None = None
    query_stride_tok: int | None = None
    refresh_steps: int | None = None
    representative: Representative | None = None
    rope: PruneRope | None = None
    piece_tok: int | None = None


@dataclass
class Rope:
    """RoPE strategy of a pipeline: while pruning and in the final attention."""

    prune: PruneRope = PruneRope.relative
    attend: AttendRope = AttendRope.streaming


@dataclass
class RopeOverride:
    """What a layer group changes in the RoPE strategy; None leaves it as it is."""

    prune: PruneRope | None = None
    attend: AttendRope | None = None


@dataclass
class LayerGroup:
    """A named set of layers and what is different there.

    ``range``   layers as in ``"0-2"``, ``"0,3,31"``, ``"3-"`` (to the last) or ``"-1"`` (from the end); empty switches the group off
    ``stages``  overrides by stage number (``"2"``); they apply in decode too, unless the pipeline has its own decode stages
    ``params``  parameters of the method that are different there
    """

    range: str
    rope: RopeOverride = field(default_factory=RopeOverride)
    stages: dict[str, StageOverride] = field(default_factory=dict)
    window_tok: int | None = None
    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class LayerPlan:
    """What one layer does, with every override applied; ``rope`` of each stage is set. Its refreshes are ``shift_steps`` early."""

    layer: int
    stages: list[Stage]
    decode: list[Stage]
    sink_tok: int
    window_tok: int
    heads: Heads
    attend: AttendRope
    groups: list[str]
    late_refresh: bool = False
    method: str = "hip"
    params: dict[str, Any] = field(default_factory=dict)
    prune: PruneRope = PruneRope.relative
    shift_steps: int = 0


@dataclass
class Pipeline:
    """An attention pipeline.

    ``name``    preset it came from, for people only
    ``method``  ``hip`` (prune in stages), another one of ``hipexp.attention.methods``, or the path of a file like those there, ``….py``
    ``params``  parameters of a method without stages, as its file names them; what is left out is as there
    ``decode``  other stages for decode; None uses ``stages``
    ``layers``  named groups of overrides; a later group wins over an earlier one
    ``late_refresh``  a selection that a decode step makes is used from the next step on, so that nobody has to wait for what it misses
    ``staggered_refresh``  every layer refreshes a decode step before the layer in front of it, so that they do not all do it in one step
    """

    name: str = ""
    method: str = "hip"
    stages: list[Stage] = field(default_factory=list)
    decode: list[Stage] | None = None
    sink_tok: int = 256
    window_tok: int = 1024
    heads: Heads = Heads.shared
    rope: Rope = field(default_factory=Rope)
    layers: dict[str, LayerGroup] = field(default_factory=dict)
    late_refresh: bool = False
    params: dict[str, Any] = field(default_factory=dict)
    staggered_refresh: bool = False

    def plan(self, n_layers: int) -> list[LayerPlan]:
        """Resolve the pipeline for a model of ``n_layers`` layers: one plan per layer.

        Groups are applied in order, so a later one wins; inside a group a stage's own ``rope`` wins over the group's
        ``rope.prune``, which wins over everything the pipeline says. Raises ConfigError for a range that is malformed
        or selects no layer of this model, and for an override of a stage that does not exist.
        """
        selected = {name: select_layers(group.range, n_layers, f"pipeline.layers.{name}.range") for name, group in self.layers.items()}
        return [self.plan_layer(layer, [n for n, chosen in selected.items() if layer in chosen]) for layer in range(n_layers)]

    def plan_alone(self, layer: int | None) -> LayerPlan:
        """The plan of a layer without a model: of a ``layer`` of 32 or more, or of the last one as if no group applied to it."""
        return self.plan_layer(ALONE, []) if layer is None else self.plan(max(32, layer + 1))[layer]

    def plan_layer(self, layer: int, groups: list[str]) -> LayerPlan:
        """The plan of one layer to which ``groups`` apply, in this order."""
        stages = [_with_rope(stage, self.rope.prune) for stage in self.stages]
        decode = stages if self.decode is None else [_with_rope(stage, self.rope.prune) for stage in self.decode]
        window_tok, attend, prune, params = self.window_tok, self.rope.attend, self.rope.prune, self.params
        for name in groups:
            group = self.layers[name]
            stages = _override(stages, group, f"pipeline.layers.{name}.stages")
            decode = stages if self.decode is None else [_change(stage, rope=group.rope.prune) for stage in decode]
            window_tok = window_tok if group.window_tok is None else group.window_tok
            attend, prune, params = group.rope.attend or attend, group.rope.prune or prune, params | group.params
        return LayerPlan(
            layer,
            stages,
            list(decode),
            self.sink_tok,
            window_tok,
            self.heads,
            attend,
            groups,
            self.late_refresh,
            self.method,
            params,
            prune,
            layer if self.staggered_refresh else 0,
        )


@dataclass
class Offload:
    """Where keys and values live: named ``none``, all on the device; else all of them off it, and there only what is needed soon.

    Sizes are in tokens, of one layer of a sequence, or in bytes, of all its layers; at most one of the two for a tier.

    ``name``          ``none``, or the preset it came from
    ``device_*``      on the device, in the model's own format: sinks, window, and a pool for what stages and attention read besides
    ``host_*``        in host memory; None: everything. Without a disk tier a limit of what a context may take
    ``disk_*``        in a file, what host memory does not hold; None: as much as there is
    ``disk_dir``      folder of that file; None: no disk tier
    ``format``        of keys and values off the device: ``auto`` (the model's own), ``bf16``, ``fp8``, ``int8`` or ``int4``
    ``policy``        which units make room for others: ``lru``, ``clock`` or ``lfu``
    ``prefetch``      decode: a thread reads what the next layer will probably ask for while this one computes
    ``prefill_bytes`` prompts whose keys and values of one layer take no more are read layer by layer: they cross the link once
    """

    name: str = "none"
    device_tok: int | None = None
    device_bytes: int | None = None
    host_tok: int | None = None
    host_bytes: int | None = None
    disk_tok: int | None = None
    disk_bytes: int | None = None
    disk_dir: str | None = None
    format: str = "auto"
    policy: str = "clock"
    prefetch: bool = False
    prefill_bytes: int = 0

    @property
    def on(self) -> bool:
        """Whether keys and values leave the device."""
        return self.name != "none"


ALONE = 31  # the layer that is measured without a model, behind those that methods keep dense
FORMATS = ("auto", "bf16", "fp8", "int8", "int4")  # of keys and values off the device
PAGE_TOK = 64  # tokens of a page off the device, or those of a chunk of the last stage if they are more
INT4_GROUP = 32  # numbers that share a scale and a least value


def page_bytes(format: str, page_tok: int, head_dim: int, itemsize: int) -> int:
    """Bytes of a page off the device, of one head's keys or values; ``itemsize``: bytes of a number in the model's own format.

    ``fp8`` has a scale for the page, which stays on the device; ``int8`` one of 2 bytes for every token; ``int4`` a scale and a least value
    of 2 bytes each for every ``INT4_GROUP`` numbers of a token.
    """
    groups = -(-head_dim // INT4_GROUP)
    row = {"auto": head_dim * itemsize, "bf16": 2 * head_dim, "fp8": head_dim, "int8": head_dim + 2, "int4": head_dim // 2 + 4 * groups}
    return page_tok * row[format]


@dataclass
class Model:
    """A model to load, or with a ``base_url`` one that a server runs.

    ``path``              ``hipexp/…`` for a folder inside this package, a local folder, or a hub id such as ``org/model``;
                          of a served model its id there
    ``revision``          commit, tag or branch of a hub id
    ``dtype``             ``float32``, ``float16``, ``bfloat16`` or ``auto``
    ``device_map``        how accelerate spreads the weights: ``auto``, ``balanced``, ``sequential``, or a device such as ``cuda:1``;
                          None: the GPU if there is one
    ``tp_plan``           ``auto``: each process that torchrun started has a part of every layer, as transformers plans it for the class;
                          None: one process has the model
    ``cuda_graphs``       on a GPU, decode steps are recorded and replayed where that is possible
    ``compile``           torch compiles every norm and MLP, which are many small operations otherwise; they then round in other places
    ``prefill_chunk_tok`` tokens given to the model at once during prefill
    ``trained_tok``       trained length; None takes ``max_position_embeddings`` from the model's ``config.json``
    ``base_url``          of an OpenAI-compatible server, as in ``http://localhost:8000/v1``; None loads the model here. The rest is for it:
    ``tokenizer``         the served model's, as ``path`` of a loaded model; None is ``path``
    ``prompt``            ``tokens`` or ``text`` of a completion, ``auto`` (tokens where the server takes them), or ``chat``
    ``server``            what runs the model, in your words, part of the run key; None is ``base_url``
    ``concurrent``        requests at once
    ``timeout_s``         longest wait for an answer
    """

    path: str
    name: str = ""
    revision: str | None = None
    dtype: str = "auto"
    device_map: str | None = None
    tp_plan: str | None = None
    cuda_graphs: bool = True
    compile: bool = False
    prefill_chunk_tok: int = 8192
    trained_tok: int | None = None
    base_url: str | None = None
    tokenizer: str | None = None
    prompt: str = "auto"
    server: str | None = None
    concurrent: int = 1
    timeout_s: int = 1800


@dataclass
class Task:
    """What is measured.

    ``subtasks``     None runs all that the model can do
    ``samples``      samples per subtask (in a grid: per cell)
    ``length_tok``   prompt length; None is twice the trained length, or leaves it to ``lengths_tok``
    ``truncate_tok`` longest prompt given to the model, the middle of a longer one is cut out; None cuts nothing
    ``lengths_tok``  prompt lengths of a grid or of a latency table; None leaves the choice to the task
    ``depths``       needle depths of a grid, 0.0 (start) to 1.0 (end); None leaves the choice to the task
    ``decode_steps`` decode steps timed by the latency task
    ``repeats``      rounds of the latency task
    ``dense_max_tok`` longest prompt that the latency task also times dense; None has no limit
    ``geometry``     latency or recall of attention alone, without a model: a name of ``GEOMETRIES``, or ``heads/key-value heads/dimension``
    ``dtype``        its number format; ``auto`` is bfloat16 on a GPU, float32 on a CPU
    ``contexts_tok`` its numbers of keys; None is 131072. Recall with a model: lengths of prompts; None is the trained length
    ``phases``       ``decode`` and ``prefill`` (of the last ``queries_tok`` queries); None is both; recall: one, or ``prefill``
    ``divisors``     of the recall task: every stage keeps so many times less; None is 1, 4 and 8
    ``layer``        the layer whose groups apply, in a model of 32 or more; None is a layer without any
    ``protocol``     whose prompts: ``hipexp`` are our own words, never an official score; ``official``, or of ∞Bench one of several
    ``edition``      of the official scorer of ∞Bench: ``2024-06``, which published scores were made with, or ``2024-08``; ``minference``
                     for that protocol; None is the protocol's usual one
    ``data``         folder with official data; None is ``$HIPEXP_DATA``, else the folder that ``python -m hipexp data pull`` fills
    ``wording``      ``default``, or ``heldout``: a noise text and a wording that the embedded model never saw in training
    ``batch``        samples per forward pass
    """

    name: str = ""
    subtasks: list[str] | None = None
    samples: int = 5
    length_tok: int | None = None
    truncate_tok: int | None = None
    lengths_tok: list[int] | None = None
    depths: list[float] | None = None
    decode_steps: int = 48
    repeats: int = 1
    dense_max_tok: int | None = None
    geometry: str | None = None
    dtype: str = "auto"
    contexts_tok: list[int] | None = None
    phases: list[str] | None = None
    queries_tok: int = 1024
    layer: int | None = None
    divisors: list[int] | None = None
    protocol: str = "hipexp"
    edition: str | None = None
    data: str | None = None
    wording: str = "default"
    batch: int = 1


@dataclass
class Track:
    """Who is told about a run besides its folder: nobody (``local``) or ``wandb``.

    ``mode`` ``auto``: online where wandb has an API key, else offline.
    """

    name: str = "local"
    project: str = "hipexp"
    entity: str | None = None
    mode: str = "offline"


@dataclass
class Experiment:
    """One experiment point. ``pipeline`` None is dense attention. ``hipexp.config.runkey.run_key`` gives its key."""

    model: Model
    task: Task
    pipeline: Pipeline | None = None
    offload: Offload = field(default_factory=Offload)
    track: Track = field(default_factory=Track)
    seed: int = 0


# Query heads, key/value heads and head dimension of known models.
GEOMETRIES = {
    "llama31_8b": (32, 8, 128),
    "llama32_1b": (32, 8, 64),
    "qwen25_7b": (28, 4, 128),
    "qwen3_8b": (32, 8, 128),
    "needle": (4, 2, 64),
}


def read_geometry(text: str, key: str = "task.geometry") -> tuple[int, int, int]:
    """Query heads, key/value heads and head dimension, from a name or ``32/8/128``. Raises ConfigError, naming ``key``."""
    if text in GEOMETRIES:
        return GEOMETRIES[text]
    found = re.fullmatch(r"(\d+)/(\d+)/(\d+)", text)
    if not found:
        raise ConfigError(
            f"{key}={text} is unknown; use {', '.join(GEOMETRIES)}, or query heads, key/value heads and head dimension as in 32/8/128"
        )
    heads, kv_heads, dim = map(int, found.groups())
    if not kv_heads or heads % kv_heads or not heads:
        raise ConfigError(f"{key}={text} must have a multiple of its {kv_heads} key/value heads as query heads; try 32/8/{dim or 128}")
    if dim % 4 or not dim:
        raise ConfigError(f"{key}={text} must have a head dimension that is a multiple of 4; try {heads}/{kv_heads}/{dim // 4 * 4 or 128}")
    return heads, kv_heads, dim


_RANGE = re.compile(r"(-?\d+)(?:(-)(-?\d+)?)?")


def spans(layers: Sequence[int]) -> str:
    """Ascending layers as a range that :func:`select_layers` reads, such as ``0-2,5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def select_layers(text: str, n_layers: int, key: str = "range") -> set[int]:
    """Layers named by a range such as ``"0-2"``, ``"0,3,31"``, ``"3-"``, ``"-1"`` or ``"-2--1"``; empty text selects none.

    Negative numbers count from the end. Numbers beyond the model are left out as long as some layer remains, so that
    a preset for 32 layers serves a small model too. Raises ConfigError, naming ``key``, for anything else.
    """
    layers: set[int] = set()
    for part in range_parts(text, key):
        first, last = _bounds(part, n_layers)
        if last < first:
            raise ConfigError(f"{key}={text!r} runs backwards in {part[0]!r} for a model of {n_layers} layers; swap the two numbers")
        layers.update(layer for layer in range(first, last + 1) if 0 <= layer < n_layers)
    if text.strip() and not layers:
        there = f"the model has layers 0 to {n_layers - 1}"
        raise ConfigError(f"{key}={text!r} selects no layer: {there}; change the range, or empty it to switch the group off")
    return layers


def range_parts(text: str, key: str = "range") -> list[re.Match[str]]:
    """The parts of a layer range, or ConfigError if one of them is malformed; needs no model."""
    parts = [_RANGE.fullmatch(part.strip()) for part in text.split(",")] if text.strip() else []
    if None in parts:
        raise ConfigError(f"{key}={text!r} must list layers; write it like '0-2', '0,3,31', '3-' or '-1', or '' for none")
    return [part for part in parts if part is not None]


def _bounds(match: re.Match[str], n_layers: int) -> tuple[int, int]:
    first = int(match[1])
    last = first if match[2] is None else int(match[3]) if match[3] else n_layers - 1
    first, last = (number + n_layers if number < 0 else number for number in (first, last))
    return first, max(first, last) if match[3] is None else last


def _with_rope(stage: Stage, prune: PruneRope) -> Stage:
    return dataclasses.replace(stage, rope=stage.rope or prune)


def _change(stage: Stage, **values: Any) -> Stage:
    return dataclasses.replace(stage, **{name: value for name, value in values.items() if value is not None})


def _override(stages: list[Stage], group: LayerGroup, key: str) -> list[Stage]:
    """A copy of ``stages`` with a group's overrides applied: the group's RoPE first, then what it says of single stages."""
    changed = [_change(stage, rope=group.rope.prune) for stage in stages]
    for number, override in group.stages.items():
        if not (number.isdecimal() and int(number) < len(stages)):
            there = f"stages are numbered 0 to {len(stages) - 1}" if stages else "this pipeline has no stages"
            raise ConfigError(f"{key}.{number} names a missing stage: {there}; correct it, or switch the group off by an empty range")
        changed[int(number)] = _change(changed[int(number)], **vars(override))
    return changed
