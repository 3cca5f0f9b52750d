"""``make gpu``: latency of attention alone on a GPU, pipelines against every dense kernel of this machine, with recall.

Needs torch, Triton and PyYAML only. Writes ``attention.json`` and ``attention.md``; a part that fails is told and left out. Pipelines are
measured in a layer without overrides.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from hipexp.attention.inputs import GEOMETRIES, Inputs
from hipexp.config.convert import to_schema
from hipexp.config.overrides import conf_dir
from hipexp.config.schema import Pipeline
from hipexp.run import attention_latency as latency
from hipexp.run.contestants import describe_machine, memory_bandwidth, write_rows

K = 1024
PRESETS = ("3stage", "3stage_fast", "3stage_flash", "3stage_scan", "5k")
PREFILL_PRESETS = ("3stage", "3stage_scan")  # the others do in prefill what 3stage does, or keep more
N_LAYERS = 8  # their selected keys together exceed the L2 cache
PREFILL_TOK = 32 * K  # the last chunk of a prompt
SLOW = ("sdpa efficient packed", "sdpa cudnn packed", "matmuls packed")  # many times the fastest at every length measured so far


def preset(name: str) -> Pipeline:
    """A pipeline of ``conf/pipeline``, without Hydra."""
    return to_schema(yaml.safe_load((conf_dir() / "pipeline" / f"{name}.yaml").read_text(encoding="utf-8")), Pipeline)


class Report:
    """Rows as they are measured; what fails is told and left out. ``about``: the machine."""

    def __init__(self, out: Path, about: dict[str, Any]):
        self.out, self.about, self.rows, self.failed, self.begun = out, about, list[dict[str, Any]](), 0, time.monotonic()

    def add(self, what: str, measure: Callable[[], list[dict[str, Any]]]) -> None:
        """Measure and print; the rows so far are on disk after every part."""
        try:
            found = measure()
        except Exception:  # of any kind: the other parts are worth having
            traceback.print_exc()
            print(f"[{time.monotonic() - self.begun:4.0f} s] {what} failed and is left out", flush=True)
            self.failed += 1
            return
        self.rows = latency.with_speedup(self.rows + found)
        for row in found:
            told = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
            print(f"[{time.monotonic() - self.begun:4.0f} s]", " ".join(f"{key}={value}" for key, value in told.items()), flush=True)
        write_rows(self.out / "attention", self.rows, self.about)


def measure_decode(report: Report, layers: list[Inputs], presets: list[str], rounds: int, skip: tuple[str, ...]) -> None:
    """Dense contestants, then every preset, on the same keys."""
    report.add("dense decode", lambda: latency.dense_decode_rows(layers, rounds, skip))
    for name in presets:
        attention = latency.layer_attention(preset(name), layers[0].geometry, layers[0].keys.device)

        def measure(attention=attention, name=name) -> list[dict[str, Any]]:
            return [latency.decode_row(attention, layers, 2, name) | latency.recall_of(attention, layers[:2])]

        report.add(f"{name} decode", measure)


def measure_prefill(report: Report, layer: Inputs, skip: tuple[str, ...]) -> None:
    """The last chunk of a prompt: dense contestants and every one of ``PREFILL_PRESETS`` in turn."""
    pipelines = {name: latency.layer_attention(preset(name), layer.geometry, layer.keys.device) for name in PREFILL_PRESETS}
    report.add("prefill", lambda: latency.prefill_rows(pipelines, layer, PREFILL_TOK, 3, skip))


def main() -> int:
    """Measure at every length and write the report; 2 without a GPU, 1 if a part failed."""
    parser = argparse.ArgumentParser(description="Latency of attention alone on a GPU, against the dense kernels of this machine.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128 * K, 512 * K, 1024 * K], help="keys (default: %(default)s)")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama31_8b", help="heads and sizes (default: %(default)s)")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="pipelines in decode (default: %(default)s)")
    prefilled = f"the last {PREFILL_TOK} queries too, of {' and '.join(PREFILL_PRESETS)} (default: yes)"
    parser.add_argument("--prefill", action=argparse.BooleanOptionalAction, default=True, help=prefilled)
    parser.add_argument("--rounds", type=int, default=30, help="of dense decode (default: %(default)s)")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too: it compiles for every length")
    parser.add_argument("--all", action="store_true", help="the slow dense kernels too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU that torch can use; this measures one (`python -m hipexp task=latency` measures a CPU)", file=sys.stderr)
        return 2
    if short := [n for n in args.lengths if n < 2 * PREFILL_TOK or n % PREFILL_TOK]:
        print(f"error: --lengths {short[0]} must be a multiple of {PREFILL_TOK}, from {2 * PREFILL_TOK} on", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    skip = (*(() if args.all else SLOW), *(() if args.flex else ("flex packed", "flex, lower right")))
    about = describe_machine(device) | {"bandwidth_gb_s": memory_bandwidth(device), "geometry": args.geometry}
    report = Report(args.out, about)
    print(about, flush=True)
    with torch.inference_mode():
        for n_tok in args.lengths:
            layers = latency.make_layers(GEOMETRIES[args.geometry].as_dtype(torch.bfloat16), n_tok, N_LAYERS, device)
            measure_decode(report, layers, args.presets, args.rounds, skip)
            layers = layers[:1]
            if args.prefill:
                measure_prefill(report, layers[0], skip)
    print(f"{args.out / 'attention.md'}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
