"""A trace of what a model's decode steps, and the blocks of its prefill, read of their keys and values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from hipexp.attention.reads import ReadRecorder, units_of
from hipexp.cache.traces import Header, TraceWriter
from hipexp.config.model import head_sizes
from hipexp.config.schema import Pipeline
from hipexp.hf.install import install
from hipexp.hf.load import Loaded
from hipexp.hf.loop import Generation, generate
from hipexp.hf.quantized import compute_dtype


def record(
    loaded: Loaded,
    pipeline: Pipeline,
    tokens: Sequence[int],
    path: Path,
    *,
    steps: int,
    phases: Collection[str],
    prefill_chunk_tok: int,
    about: dict[str, Any],
    progress: Callable[[int], None] | None = None,
) -> Generation:
    """Read a prompt, decode ``steps`` steps whatever the model says, and write a trace of ``phases`` to ``path``.

    ``pipeline`` has stages. ``about`` goes into the trace's header. Raises as ``generate``; then the trace has no end and is refused.
    """
    kv_heads, head_dim = head_sizes(loaded.model.config.get_text_config().to_dict())
    key_bytes = head_dim * compute_dtype(loaded.model).itemsize
    with install(loaded.model, pipeline, loaded.trained_tok) as installed:
        units = {i: units_of(layer.plan, kv_heads, key_bytes) for i, layer in installed.layers.items()}
        with TraceWriter(path, Header(units, about)) as writer:
            for i, layer in installed.layers.items():
                layer.listener = ReadRecorder(writer, layer.plan, units[i], phases)
            (made,) = generate(
                loaded, [list(tokens)], max_new_tok=steps + 1, prefill_chunk_tok=prefill_chunk_tok, progress=progress, installed=installed
            )  # the first new token needs no decode step
    return made
