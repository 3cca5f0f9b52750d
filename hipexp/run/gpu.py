"""``make gpu``: what this GPU can do, and latency of attention alone on it, pipelines against every dense kernel there is, with recall.

Needs torch, Triton and PyYAML only. First the tests marked ``gpu`` or ``device`` (where pytest is installed), then probes of the machine,
then for every length decode, attention to what a decode step selects, and prefill; for the longest one also decode with the cache in host
memory. Writes ``gpu.json`` and ``gpu.md``; a part that fails, or that the time does not allow, is told and left out. Pipelines are measured
in a layer without overrides.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from hipexp.attention.inputs import GEOMETRIES, Geometry, Inputs
from hipexp.config.convert import to_schema
from hipexp.config.overrides import conf_dir
from hipexp.config.schema import AttendRope, Offload, Pipeline, PruneRope, Rope
from hipexp.report.tables import markdown_table
from hipexp.run import attention_latency as latency
from hipexp.run.offload_latency import offload_row
from hipexp.run.selected import selected_rows
from hipexp.run.timing import describe_machine, memory_bandwidth, missing

K = 1024
NATIVE = " (native RoPE)"  # behind the name of a preset: with true positions, which lead no further than a model was trained
PRESETS = ("3stage", "3stage_fast", "3stage_flash", "3stage_scan", "4stage_scan", "3stage_plus", "5k", f"3stage{NATIVE}")
# the others do in prefill what 3stage does, or keep more
PREFILL_PRESETS = ("3stage", "3stage_scan", "4stage_scan", "3stage_plus", f"3stage{NATIVE}")
OFFLOAD_PRESETS = ("3stage", "3stage_scan", "3stage_plus")
SELECTED_BY = "3stage"  # whose selection the others attend to
MARKED = re.compile(r"pytest\.mark\.(gpu|device)\b")
N_LAYERS = 8  # their selected keys together exceed the L2 cache
PREFILL_TOK = 32 * K  # the last chunk of a prompt
FLEX = ("flex packed", "flex, lower right", "flex, our mask")
SLOW = ("sdpa efficient packed", "sdpa cudnn packed", "matmuls packed")  # many times the fastest at every length measured so far


def known_presets() -> list[str]:
    """Names of the pipelines of ``conf/pipeline``."""
    return sorted(path.stem for path in (conf_dir() / "pipeline").glob("*.yaml"))


def preset(name: str) -> Pipeline:
    """A pipeline of ``conf/pipeline``, without Hydra."""
    stem = name.removesuffix(NATIVE)
    found = to_schema(yaml.safe_load((conf_dir() / "pipeline" / f"{stem}.yaml").read_text(encoding="utf-8")), Pipeline)
    return found if stem == name else dataclasses.replace(found, rope=Rope(prune=PruneRope.native, attend=AttendRope.native), layers={})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table: a column for every key, numbers with four digits; nothing without rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return markdown_table(names, [[shown(row.get(name)) for name in names] for row in rows]) if rows else ""


def shown(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


class Report:
    """Rows as they are measured; what fails is told and left out, and so is what would begin after ``limit_s``. ``about``: the machine."""

    def __init__(self, out: Path, limit_s: float):
        self.out, self.limit_s, self.begun = out, limit_s, time.monotonic()
        self.about: dict[str, Any] = {}
        self.probes: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.failed = False

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() - self.begun > self.limit_s

    def measured(self, what: str, measure: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """What was measured, after printing it; nothing if it failed, or if the time is over."""
        if self.late:
            return self._leave_out(what, f"not begun within {self.limit_s:.0f} s (--seconds)")
        try:
            found = measure()
        except Exception as error:  # of any kind: the other parts are worth having
            traceback.print_exc()
            self.failed = True
            return self._leave_out(what, f"failed: {type(error).__name__}")
        for row in found:
            self.say(" ".join(f"{key}={shown(value)}" for key, value in row.items()))
        return found

    def probe(self, what: str, measure: Callable[[], list[dict[str, Any]]]) -> None:
        """Measure something of the machine."""
        self.probes += self.measured(what, measure)
        self.write()

    def add(self, what: str, measure: Callable[[], list[dict[str, Any]]]) -> None:
        """Measure a latency; all that was measured so far is on disk after every part."""
        self.rows = latency.with_speedup(self.rows + self.measured(what, measure))
        self.write()

    def write(self) -> None:
        """``gpu.json``, and ``gpu.md``: the machine, what it can do, latencies, what is missing."""
        self.out.mkdir(parents=True, exist_ok=True)
        everything = {"about": self.about, "probes": self.probes, "rows": self.rows, "left_out": self.left_out}
        (self.out / "gpu.json").write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        machine = "\n".join(f"* {name}: {value}" for name, value in self.about.items())
        parts = [machine, table(self.probes), table(self.rows), "\n".join(f"* left out: {what}" for what in self.left_out)]
        (self.out / "gpu.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")

    def _leave_out(self, what: str, why: str) -> list[dict[str, Any]]:
        self.left_out.append(f"{what}: {why}")
        self.say(f"{what} is left out: {why}")
        return []

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:4.0f} s] {text}", flush=True)


def run_tests(limit_s: float = 200) -> tuple[bool, str]:
    """Whether the tests marked ``gpu`` or ``device`` passed, if they can be run here, and how they ended, or why they were not run.

    Several at a time where pytest-xdist is installed: most of their time goes into compiling kernels.
    """
    root = Path(__file__).parents[2]
    marked = [str(path) for path in sorted((root / "tests").rglob("test_*.py")) if MARKED.search(path.read_text(encoding="utf-8"))]
    if reasons := [reason for reason in (missing("pytest"), missing("hypothesis"), None if marked else "no tests are here") if reason]:
        return True, f"not run: {', '.join(reasons)}"
    several = [] if missing("xdist") else ["-n", str(min(8, os.cpu_count() or 1))]
    command = [sys.executable, "-m", "pytest", "-m", "gpu or device", *several, *marked]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return False, f"not finished in {limit_s:.0f} s"
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", flush=True)
    return not done.returncode, (done.stdout.strip() or done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]


def made(report: Report, geometry: Geometry, n_tok: int, device: torch.device) -> list[Inputs]:
    """The layers of a length; none if the time is over or there is no room for them."""
    layers: list[Inputs] = []

    def make() -> list[dict[str, Any]]:
        layers.extend(latency.make_layers(geometry, n_tok, N_LAYERS, device))
        return []

    report.measured(f"everything at {n_tok}", make)
    return layers


def measure_decode(report: Report, layers: list[Inputs], presets: list[str], rounds: int, skip: tuple[str, ...]) -> None:
    """Dense contestants, then every preset, on the same keys; then attention alone to what a step selects."""
    at = f"at {layers[0].keys.shape[1]}"
    report.add(f"dense decode {at}", lambda: latency.dense_decode_rows(layers, rounds, skip))
    for name in presets:
        attention = latency.layer_attention(preset(name), layers[0].geometry, layers[0].keys.device)

        def measure(attention=attention, name=name) -> list[dict[str, Any]]:
            return [latency.decode_row(attention, layers, 2, name) | latency.recall_of(attention, layers[:2])]

        report.add(f"{name} decode {at}", measure)
    attention = latency.layer_attention(preset(SELECTED_BY), layers[0].geometry, layers[0].keys.device)
    report.add(f"attention to a selection {at}", lambda: selected_rows(attention, layers, rounds, skip))


def measure_prefill(report: Report, layer: Inputs, presets: list[str], skip: tuple[str, ...]) -> None:
    """The last chunk of a prompt: dense contestants and every one of ``presets`` in turn."""
    pipelines = {name: latency.layer_attention(preset(name), layer.geometry, layer.keys.device) for name in presets}
    report.add(f"prefill at {layer.keys.shape[1]}", lambda: latency.prefill_rows(pipelines, layer, PREFILL_TOK, 3, skip))


def measure_offload(report: Report, layer: Inputs, presets: list[str], device_tok: int) -> None:
    """Decode steps of every preset with all but ``device_tok`` tokens in host memory, beside the same ones without offload."""
    for name in presets:
        attention = latency.layer_attention(preset(name), layer.geometry, layer.keys.device)

        def measure(attention=attention, name=name) -> list[dict[str, Any]]:
            return [offload_row(attention, layer, 2, name, device_tok)]

        report.add(f"{name} offloaded at {layer.keys.shape[1]}", measure)


def main() -> int:
    """Measure at every length and write the report; 2 without a GPU, 1 if a test or a part failed."""
    parser = argparse.ArgumentParser(description="What this GPU can do, and latency of attention alone on it, against its dense kernels.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128 * K, 512 * K, 1024 * K], help="keys (default: %(default)s)")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama31_8b", help="heads and sizes (default: %(default)s)")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="pipelines in decode (default: %(default)s)")
    parser.add_argument("--prefill", nargs="*", default=list(PREFILL_PRESETS), help="pipelines in prefill (default: %(default)s)")
    parser.add_argument("--offload", nargs="*", default=list(OFFLOAD_PRESETS), help="pipelines with offload (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="of dense decode (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=400, help="no part begins later (default: %(default)s)")
    parser.add_argument("--tests", action=argparse.BooleanOptionalAction, default=True, help="the tests on this GPU too (default: yes)")
    parser.add_argument("--probes", action=argparse.BooleanOptionalAction, default=True, help="probes of the machine too (default: yes)")
    parser.add_argument("--flex", action="store_true", help="FlexAttention at every length (compiled each time), not at the shortest only")
    parser.add_argument("--all", action="store_true", help="the slow dense kernels too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU that torch can use; this measures one (`python -m hipexp task=latency` measures a CPU)", file=sys.stderr)
        return 2
    if short := [n for n in args.lengths if n < 2 * PREFILL_TOK or n % PREFILL_TOK]:
        print(f"error: --lengths {short[0]} must be a multiple of {PREFILL_TOK}, from {2 * PREFILL_TOK} on", file=sys.stderr)
        return 2
    if unknown := [name for name in [*args.presets, *args.prefill, *args.offload] if name.removesuffix(NATIVE) not in known_presets()]:
        print(f"error: preset {unknown[0]!r} is unknown; use {', '.join(known_presets())}, or one of them and {NATIVE!r}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    report = Report(args.out, args.seconds)
    report.about |= describe_machine(device) | {"bandwidth_gb_s": memory_bandwidth(device), "geometry": args.geometry}
    report.say(str(report.about))
    passed, report.about["tests"] = run_tests() if args.tests else (True, "not asked for")
    report.say(f"tests: {report.about['tests']}")
    if args.probes:
        from hipexp.run.probes import PROBES

        for probe in PROBES:
            report.probe(probe.__name__.replace("_", " "), partial(probe, device))
    device_tok = to_schema(yaml.safe_load((conf_dir() / "offload" / "host.yaml").read_text(encoding="utf-8")), Offload).device_tok or 0
    with torch.inference_mode():
        for number, n_tok in enumerate(sorted(args.lengths)):
            skip = (*(() if args.all else SLOW), *(() if args.flex or number == 0 else FLEX))
            layers = made(report, GEOMETRIES[args.geometry].as_dtype(torch.bfloat16), n_tok, device)
            if layers:
                measure_decode(report, layers, args.presets, args.rounds, skip)
                del layers[1:]
            if layers and args.prefill:
                measure_prefill(report, layers[0], args.prefill, skip)
            if layers and n_tok == max(args.lengths):
                measure_offload(report, layers[0], args.offload, device_tok)
    print(f"{args.out / 'gpu.md'}")
    return int(report.failed or not passed)


if __name__ == "__main__":
    sys.exit(main())
