"""``make link-table``: what offload moves over the link, counted by the store itself in the real loops, and scaled to 1M tokens.

A random model with the layers and heads of Llama-3.1-8B and small heads reads prompts and decodes on the CPU. What is counted scales by
rules: a unit or page of a larger head has more bytes, by the format; pages written grow with the context, as do the keys that a first
stage probes, and the rest stays, which the measured lengths must show. Every measurement is a line of ``measured.jsonl`` and done once:
interrupt it as you like. Delete the file to measure again after the store has changed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hipexp.cache.traffic import Traffic, summed
from hipexp.config.compose import compose
from hipexp.config.schema import Offload, Pipeline, Representative, page_bytes
from hipexp.hf import install
from hipexp.hf.cache import SequenceCache
from hipexp.hf.loop import Generation, decode, prefill, prefill_layer_major
from hipexp.report.tables import duration, text_table
from hipexp.run.ledger import locked, make_folder, runs_root, stoppable, write_text
from hipexp.run.point import token_bar

K = 1024
LONG_TOK, LONG_DIM = 1024 * K, 128  # what figures are scaled to
CHUNK_TOK = 8 * K
STEPS = 65  # four periods of the presets and the first step of a fifth; one of them ends a page
READS = {
    "layers": "layer by layer; few keys attended to",
    "layers, as set": "layer by layer",
    "chunks": "chunk by chunk",
}
LINKS = {"PCIe 4 x16": 25e9, "PCIe 5 x16": 52e9}  # bytes a second, assumed to be reached
PUBLISHED_MS = 47  # of a layer, full refresh at 1M with keys and values off the device (InfiniteHiP, table 4; RTX 4090)
REFERENCE_TB = 2.2  # of a 1M prefill that reads the prefix back for every chunk of 32K, by calculation
AIM_TB, AIM_MB = 0.15, 12.6


@dataclass(frozen=True)
class Shape:
    """A model, as far as traffic depends on it."""

    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 8


@dataclass(frozen=True)
class Point:
    """A measurement: a preset, a format of the host tier, a prompt of ``context_tok`` tokens, and how it is ``read`` (one of ``READS``)."""

    pipeline: str
    format: str
    context_tok: int
    read: str = "layers"

    def __str__(self) -> str:
        return f"{self.pipeline}, {self.format}, {self.context_tok} tokens, {READS[self.read]}"


SHAPE = Shape()
PIPELINES = ("3stage_scan", "3stage")
POINTS = (
    *(Point(name, format, 32 * K) for name in PIPELINES for format in ("fp8", "bf16")),
    *(Point(name, "fp8", n * K) for n in (64, 128) for name in PIPELINES),
    *(Point(name, "bf16", 128 * K) for name in PIPELINES),  # bytes of other lengths lie on the line, as those of fp8 show
    Point("3stage_scan", "bf16", 32 * K, "layers, as set"),
    *(Point(name, "bf16", 32 * K, "chunks") for name in PIPELINES),
)


def configured(point: Point) -> tuple[Pipeline, Offload]:
    """The presets of a point."""
    made = compose(["task=passkey", f"+pipeline={point.pipeline}", "offload=host", f"offload.format={point.format}"])
    assert made.pipeline is not None
    return made.pipeline, made.offload


def make_model(shape: Shape, seed: int = 0) -> PreTrainedModel:
    """A random Llama in float32, small where traffic does not see it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=shape.heads * shape.head_dim, intermediate_size=64, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, max_position_embeddings=128 * K,
        initializer_range=0.15, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_prompt(n_tok: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    return torch.randint(0, 256, (n_tok,), generator=torch.Generator().manual_seed(seed)).tolist()


def quick(pipeline: Pipeline) -> Pipeline:
    """A pipeline to read a prompt with that keeps up the same landmarks, and whose queries attend to few keys."""
    scored = [stage for stage in pipeline.stages if stage.representative is Representative.bounds]
    stages = [replace(stage, keep_tok=stage.chunk_tok, query_stride_tok=stage.query_block_tok) for stage in scored]
    method, window_tok = pipeline.method if stages else "streaming", 2 * pipeline.stages[0].chunk_tok
    return Pipeline("quick", method, stages, sink_tok=pipeline.sink_tok, window_tok=window_tok, heads=pipeline.heads)


@torch.inference_mode()
def measure(model: PreTrainedModel, shape: Shape, point: Point, steps: int) -> dict[str, Any]:
    """Read a prompt and decode ``steps`` steps (none behind a prompt read chunk by chunk, as the pool would not be cold).

    Returns the ``point``, ``unit_tok`` and ``page_tok``; bytes each way in ``prefill``, with what each chunk fetched where chunks follow
    each other; and for each of ``steps`` the first stage that was due and bytes each way by layer, of what was fetched also by reader.
    """
    pipeline, offload = configured(point)
    by_chunk, started = point.read == "chunks", time.monotonic()
    with install(model, pipeline, offload=offload) as installed:
        cache = SequenceCache(shape.layers, point.context_tok + steps, decoding=False, new_store=installed.new_sequence())
    told = next(iter(installed.placements.values()))
    try:
        with install(model, quick(pipeline) if point.read == "layers" else pipeline):
            last, fetched = read_prompt(model, cache, point, by_chunk)
        row_bytes = page_bytes(point.format, 1, shape.head_dim, model.dtype.itemsize)
        prefill_traffic = counts(cache, row_bytes)
        with install(model, pipeline) as installed:
            schedule = [stage.refresh_steps for stage in installed.layers[0].plan.decode]
            decoded = list(decode_steps(model, cache, last, schedule, 0 if by_chunk else steps, row_bytes))
    finally:
        cache.close()
    both = {name: sum(getattr(traffic, name) for traffic in prefill_traffic.values()) for name in ("h2d_bytes", "d2h_bytes")}
    return {
        "shape": asdict(shape), "point": asdict(point), "unit_tok": told.unit_tok, "page_tok": told.page_tok, "device_tok": told.device_tok,
        "schedule": schedule, "prefill": both | {"chunks": fetched}, "steps": decoded, "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def read_prompt(model: PreTrainedModel, cache: SequenceCache, point: Point, by_chunk: bool) -> tuple[int, list[int]]:
    """The first new token, and, ``by_chunk``, bytes fetched for every chunk."""
    fetched: list[int] = []

    with token_bar(point.context_tok) as bar:

        def passed(tokens: int) -> None:
            bar.update(tokens)
            if by_chunk:
                fetched.append(sum(row["h2d_bytes"] for row in cache.traffic["rows"]) - sum(fetched))

        read = prefill if by_chunk else prefill_layer_major
        return read(model, cache, make_prompt(point.context_tok), CHUNK_TOK, passed), fetched


def decode_steps(
    model: PreTrainedModel, cache: SequenceCache, first: int, schedule: Sequence[int], steps: int, row_bytes: int
) -> Iterator[dict[str, Any]]:
    """What each step moved: ``due``, the first stage that ran (their number if none did); bytes by layer."""
    last, layers = [first], range(len(cache.layers))
    before = counts(cache, row_bytes)
    for step in range(steps):
        decode(model, [cache], last, [Generation()], 2, set())  # the first of the two new tokens is there
        now = counts(cache, row_bytes)
        moved: dict[str, dict[str, list[int]]] = {"h2d_bytes": {}, "d2h_bytes": {}}
        for name, by_reader in moved.items():
            for by in sorted({by for _, by in now}):
                of = [getattr(now.get((i, by), Traffic()), name) - getattr(before.get((i, by), Traffic()), name) for i in layers]
                if any(of):
                    by_reader[by] = of
        yield {"due": first_due(step, schedule), **moved}
        before = now


def counts(cache: SequenceCache, row_bytes: int) -> dict[tuple[int, str], Traffic]:
    """What the stores counted so far, by layer and reader.

    Raises RuntimeError if bytes fetched are no whole rows, of one token and head: they would not scale as rows do.
    """
    found = summed(cache.traffic["rows"], "layer", "by")
    for (layer, by), traffic in found.items():
        if traffic.h2d_bytes % row_bytes:
            raise RuntimeError(f"layer {layer}, {by}: {traffic.h2d_bytes} bytes are no rows of {row_bytes} bytes")
    return found


def first_due(step: int, schedule: Sequence[int]) -> int:
    """The first stage that runs in a decode step, with those behind it; how many there are if none does."""
    return next((i for i, refresh_steps in enumerate(schedule) if step % refresh_steps == 0), len(schedule))


# --- scaled


def factor(row: dict[str, Any], tokens: int) -> float:
    """How many times the bytes so many ``tokens`` have with heads of ``LONG_DIM``, in the row's format."""
    large, small = (page_bytes(row["point"]["format"], tokens, dim, 2) for dim in (LONG_DIM, row["shape"]["head_dim"]))
    return large / small


def layer_bytes(row: dict[str, Any], steps: Sequence[int]) -> dict[str, list[float]]:
    """Bytes fetched in each layer, by reader, on average over ``steps``."""
    chosen = [row["steps"][step]["h2d_bytes"] for step in steps]
    none = [0] * row["shape"]["layers"]
    readers = sorted({by for one in chosen for by in one})
    return {by: [statistics.fmean(of) for of in zip(*(one.get(by, none) for one in chosen), strict=True)] for by in readers}


def total(by_reader: dict[str, list[float]], layers: int) -> list[float]:
    """Bytes of each layer, all readers together."""
    return [sum(of) for of in zip(*by_reader.values(), strict=True)] if by_reader else [0.0] * layers


def scaled_layers(row: dict[str, Any], steps: Sequence[int]) -> list[float]:
    """Bytes fetched in each layer at ``LONG_TOK`` tokens and ``LONG_DIM``.

    What the first stage reads, if it reads keys, grows as its candidates do, with the context; the rest stays.
    """
    found = layer_bytes(row, steps)
    if "0" in found:
        found["0"] = [size * LONG_TOK / row["point"]["context_tok"] for size in found["0"]]
    return [size * factor(row, row["unit_tok"]) for size in total(found, row["shape"]["layers"])]


def kinds(row: dict[str, Any]) -> dict[str, list[int]]:
    """Steps by what they run; the first one apart, as nothing is in its pool, and whole periods after it."""
    schedule, found = row["schedule"], {"full refresh, cold pool": [0]}
    for due in range(len(schedule) + 1):
        name = "full refresh, warm pool" if due == 0 else "reuse" if due == len(schedule) else f"from stage {due} on"
        found[name] = [i for i, step in enumerate(row["steps"]) if i and step["due"] == due]
    period = max(schedule)
    found["average of a period"] = list(range(1, 1 + (len(row["steps"]) - 1) // period * period))
    return {name: steps for name, steps in found.items() if steps}


def predicted_ms(size: float) -> dict[str, float]:
    """Milliseconds that so many bytes take on each of ``LINKS``, if it reaches the assumed rate."""
    return {name: size / rate * 1e3 for name, rate in LINKS.items()}


# --- tables


Groups = dict[tuple[str, str, str], list[dict[str, Any]]]


def grouped(rows: Sequence[dict[str, Any]]) -> Groups:
    """Rows of the same preset, way of reading and format, by length."""
    found: Groups = {}
    for row in sorted(rows, key=lambda row: row["point"]["context_tok"]):
        found.setdefault((row["point"]["pipeline"], row["point"]["read"], row["point"]["format"]), []).append(row)
    return found


def scaled_prefill(row: dict[str, Any]) -> tuple[float, float]:
    """Bytes written and fetched by a prefill of ``LONG_TOK`` tokens with ``LONG_DIM``; fetched at least, if every chunk is as the last."""
    told, tokens = row["prefill"], row["point"]["context_tok"]
    more = told["chunks"][-1] * (LONG_TOK - tokens) / CHUNK_TOK if told["chunks"] else 0
    return told["d2h_bytes"] * LONG_TOK / tokens * factor(row, row["page_tok"]), (told["h2d_bytes"] + more) * factor(row, row["unit_tok"])


def prefill_table(groups: Groups) -> str:
    """Bytes of prefills, all layers together, as counted; those of the longest scaled."""
    lines: list[list[Any]] = []
    for (pipeline, read, format), rows in groups.items():
        for row in rows:
            tokens, told = row["point"]["context_tok"], row["prefill"]
            each = [told["d2h_bytes"], told["h2d_bytes"]]
            large = each[0] * factor(row, row["page_tok"]) + each[1] * factor(row, row["unit_tok"])
            shown = [f"{size / 1e6:.1f}" for size in each] + [f"{size / tokens:.0f}" for size in each]
            lines.append([pipeline, READS[read], format, f"{tokens:,}", *shown, f"{large / 1e12:.4f}"])
        written, fetched = scaled_prefill(rows[-1])
        least = "≥ " if rows[-1]["prefill"]["chunks"] else ""
        lines.append([pipeline, READS[read], format, f"{LONG_TOK:,}", *["scaled"] * 4, f"{least}{(written + fetched) / 1e12:.3f}"])
    header = ["pipeline", "prompt read", "format", "tokens", "written MB", "fetched MB", "B/token", "B/token", f"TB, d = {LONG_DIM}"]
    return text_table(header, lines, left=3)


def steps_table(groups: Groups) -> str:
    """Bytes fetched by decode steps for a layer, as counted at every length, then scaled with the times predicted of them."""
    lengths = sorted({row["point"]["context_tok"] for rows in groups.values() for row in rows})
    lines: list[list[Any]] = []
    for (pipeline, read, format), rows in groups.items():
        for name, steps in kinds(rows[-1]).items():
            by_length = {row["point"]["context_tok"]: total(layer_bytes(row, steps), row["shape"]["layers"]) for row in rows}
            cells = [f"{statistics.fmean(by_length[n]) / K:.1f} / {max(by_length[n]) / K:.1f}" if n in by_length else None for n in lengths]
            scaled = scaled_layers(rows[-1], steps)
            lines.append([pipeline + (", as set" if read != "layers" else ""), format, name, *cells, *scaled_cells(scaled)])
    header = ["pipeline", "format", "step", *(f"{n // K}K: KiB" for n in lengths), "1M, d = 128: MB", *(f"{name}, ms" for name in LINKS)]
    return text_table(header, lines, left=3)


def scaled_cells(layers: list[float]) -> list[str]:
    """Mean and worst layer in MB, and predicted milliseconds of the worst one."""
    return [f"{statistics.fmean(layers) / 1e6:.2f} / {max(layers) / 1e6:.2f}", *(f"{ms:.2f}" for ms in predicted_ms(max(layers)).values())]


def claims_table(groups: Groups) -> str:
    """What the project promises, beside what was measured and scaled; nothing for what is not measured yet."""
    lines: list[list[str]] = []
    prefills = {format: rows for (pipeline, read, format), rows in groups.items() if (pipeline, read) == ("3stage_scan", "layers")}
    if "bf16" in prefills:
        size = sum(scaled_prefill(prefills["bf16"][-1])) / 1e12
        reached = verdict(size <= AIM_TB)
        lines.append(["1M prefill, bf16, layer by layer", f"≤ {AIM_TB} TB", f"{size:.3f} TB", f"{REFERENCE_TB} TB", reached])
    if len(prefills.get("fp8", [])) > 1:
        rows = prefills["fp8"]
        steps = kinds(rows[-1])
        full = scaled_layers(rows[-1], steps["full refresh, cold pool"])
        times = ", ".join(f"{ms:.2f} ms on {name}" for name, ms in predicted_ms(max(full)).items())
        for what, size in (("mean layer", statistics.fmean(full)), ("worst layer", max(full))):
            shown = f"{size / 1e6:.2f} MB"
            lines.append([f"full refresh at 1M, fp8, {what}", f"≤ {AIM_MB} MB", shown, "–", verdict(round(size / 1e6, 1) <= AIM_MB)])
        lines.append(["  predicted, worst layer", "–", times, f"{PUBLISHED_MS} ms", "–"])
        reused = max(max(total(layer_bytes(row, [i]), row["shape"]["layers"])) for row in rows for i in kinds(row).get("reuse", []))
        lines.append(["fetched by a reuse step, at most", "0 bytes", f"{reused:.0f} bytes", "–", verdict(reused == 0)])
        lines.append(["  written by a step that ends a page", "–", f"{page_written(rows[-1]) / 1e6:.3f} MB a layer", "–", "–"])
    return text_table(["3stage_scan", "aim", "here", "reference", "reached"], lines, left=1)


def page_written(row: dict[str, Any]) -> float:
    """Bytes that the append of a token writes in a layer when it ends a page, with ``LONG_DIM``; all other steps write nothing."""
    written = [sum(of[0] for of in step["d2h_bytes"].values()) for step in row["steps"]]
    return max(written, default=0) * factor(row, row["page_tok"])


def verdict(reached: bool) -> str:
    """A word for whether an aim is reached."""
    return "yes" if reached else "no"


def caption(row: dict[str, Any]) -> str:
    """How the figures were come by."""
    shape, period, on_device = row["shape"], max(row["schedule"]), row["device_tok"]
    links = ", ".join(f"{name} at {rate / 1e9:.0f} GB/s" for name, rate in LINKS.items())
    return f"""Counted by the offload store in the prefill and decode loops of a random float32 Llama on the CPU: {shape["layers"]} layers,
{shape["heads"]} heads, {shape["kv_heads"]} key/value heads, head dimension {shape["head_dim"]}; room for {on_device} tokens of a layer on
the device; bytes in the format of the host tier. MB: 10^6 bytes, KiB: 1024. Prefill: all layers of one sequence.
Steps: mean / worst layer. Cold pool: the first step after a prefill layer by layer, nothing was fetched before. A period: {period}
steps, of which one is a full refresh.
"few keys attended to": to save time the prompt is read with the preset's landmarks, if it has any, and next to no attention; a page
is written once whatever is attended to, and decode steps run as the preset says. The others are read as the preset says.
Scaled to d = {LONG_DIM}: rows of a token and head, each with its bytes in that format.
Scaled to {LONG_TOK:,} tokens: a prefill layer by layer by its bytes per token. Steps: as at the longest length, but for a first stage
that probes keys, whose bytes grow as the context does (from 64K to 128K they do not: what is larger than the pool is fetched by rows and
not by units, which are fewer bytes). Chunk by chunk: as if every chunk fetched what the last one did, which is the least, as later ones
choose among more.
Weights and tokens are random, so what a warm pool saves is not what it saves on text; a cold one does not depend on them.
Times are predicted, not measured: bytes of the worst layer over assumed rates ({links}).
{PUBLISHED_MS} ms a layer are published for a full refresh at 1M with offload (InfiniteHiP, table 4; RTX 4090, PCIe 4 x8);
{REFERENCE_TB} TB are calculated, for a prefill that reads the prefix back for every chunk of 32K tokens."""


def report(rows: Sequence[dict[str, Any]]) -> str:
    """All tables of what is measured so far."""
    groups = grouped(rows)
    decoded = {key: found for key, found in groups.items() if found[-1]["steps"]}
    tables = [claims_table(groups), prefill_table(groups), steps_table(decoded)]
    return "\n\n".join([*tables, caption(rows[0])])


# --- the command


def read_measured(path: Path) -> list[dict[str, Any]]:
    """The whole lines of ``path``; a torn one, of a process that was stopped, is measured again."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def store(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write all rows anew, in one step."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def main() -> int:
    """Measure what is missing and print the tables."""
    folder = runs_root() / "link_traffic"
    make_folder(folder)
    path, shape = folder / "measured.jsonl", asdict(SHAPE)
    with stoppable(), locked(folder / ".lock"):
        rows = [row for row in read_measured(path) if row["shape"] == shape]
        missing = [point for point in POINTS if not any(row["point"] == asdict(point) for row in rows)]
        model = make_model(SHAPE) if missing else None
        for i, point in enumerate(missing, 1):
            print(f"[{i}/{len(missing)}] {point}", flush=True)
            assert model is not None
            rows.append(measure(model, SHAPE, point, STEPS))
            store(path, rows)
            print(f"  took {duration(rows[-1]['seconds'])}", flush=True)
        text = report([row for row in rows if Point(**row["point"]) in POINTS])
        write_text(folder / "table.txt", text + "\n")
    print(f"{text}\n\ntable: {folder / 'table.txt'}; measurements: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
