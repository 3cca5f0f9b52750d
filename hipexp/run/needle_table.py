"""``python -m hipexp table``: the measurements of the embedded model's card, with enough samples to believe them. Resumable."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hipexp.config.compose import compose
from hipexp.report.figures import HeatMap, draw_heat_maps
from hipexp.report.tables import duration, markdown_table
from hipexp.run import latency
from hipexp.run.ledger import read_rows, runs_root, write_text
from hipexp.run.point import folder_of, generate, open_suite_for, stored
from hipexp.run.several import Named, load_once, run_all, trained_length
from hipexp.suites.infbench import SUBTASKS

if TYPE_CHECKING:
    from hipexp.hf import Loaded
    from hipexp.run.point import Load

DIGITS, PAIRS = ("passkey", "number_string"), ("kv_retrieval",)
LATENCY_TOK = (65536, 131072, 262144)
STAGES = range(3)
NO_GROUP = ("+pipeline=3stage", "pipeline.layers.early.range=''")
EVERY_STEP = ("+pipeline=3stage", *(f"pipeline.stages.{i}.refresh_steps=1" for i in STAGES))
EXACT_SCORES = ("+pipeline=3stage", *(f"pipeline.stages.{i}.representative=exact" for i in STAGES))
HELDOUT = "task.wording=heldout"


@dataclass(frozen=True)
class Spec:
    """A run of the table: which subtasks at how many times the trained length, and what is special about it."""

    method: str
    times: int
    subtasks: tuple[str, ...]
    samples: int
    words: tuple[str, ...] = ()

    @property
    def wording(self) -> str:
        return "held out" if HELDOUT in self.words else "default"


HIP = ("+pipeline=3stage",)
SPECS = (
    Spec("dense", 1, DIGITS, 100),
    Spec("dense", 1, PAIRS, 50),
    Spec("3stage", 8, SUBTASKS, 40, HIP),
    Spec("dense", 8, SUBTASKS, 5),
    Spec("3stage", 32, ("passkey",), 15, HIP),
    Spec("3stage", 8, PAIRS, 40, EVERY_STEP),
    Spec("3stage", 8, PAIRS, 40, EXACT_SCORES),
    Spec("dense", 1, SUBTASKS, 20, (HELDOUT,)),
    Spec("3stage", 8, SUBTASKS, 20, (*HIP, HELDOUT)),
    Spec("3stage without its layer group", 8, SUBTASKS, 20, NO_GROUP),
    *(Spec("3stage", times, SUBTASKS, 20, HIP) for times in (1, 2, 4)),
    *(Spec("3stage without its layer group", times, SUBTASKS, 10, NO_GROUP) for times in (1, 2, 4)),
    *(Spec("dense", times, SUBTASKS, 10) for times in (2, 4)),
)
VARIANT = {EVERY_STEP: "3stage, refresh_steps=1", EXACT_SCORES: "3stage, representative=exact"}


def method_of(spec: Spec) -> str:
    """What the table calls a run."""
    return VARIANT.get(spec.words, spec.method)


def accuracy_points(overrides: Sequence[str]) -> dict[Spec, Named]:
    """Every accuracy run, most telling first."""
    trained_tok = trained_length(compose(["task=infbench", *overrides]).model)
    found = {}
    for spec in SPECS:
        words = [f"task.length_tok={spec.times * trained_tok}", f"task.samples={spec.samples}", f"task.subtasks=[{','.join(spec.subtasks)}]"]
        name = f"{method_of(spec)}, {' '.join(spec.subtasks)}, {spec.times} × the trained length, {spec.samples} samples, {spec.wording} wording"
        found[spec] = Named(name, compose(["task=infbench", *words, *spec.words, *overrides]))
    return found


def latency_point(overrides: Sequence[str]) -> Named:
    """The latency run: dense and 3stage at three lengths in one process."""
    lengths = ",".join(map(str, LATENCY_TOK))
    words = ["task=latency", f"task.lengths_tok=[{lengths}]", "task.decode_steps=48", *HIP]
    return Named(f"latency at {lengths} tokens", compose([*words, *overrides]))


Rates = dict[bool, tuple[float, float]]
"""By whether there is a pipeline: seconds of one sample are ``a · T + b · T²`` for ``T`` tokens."""


def probe(point: Named, dense: Named, loaded: Loaded, trained_tok: int) -> Rates:
    """Time one short and one longer sample of each kind on this machine."""
    return {pruned: fit(*(partial(seconds_of, one, loaded)(n * trained_tok) for n in (1, 3)), trained_tok) for pruned, one in ((True, point), (False, dense))}


def seconds_of(point: Named, loaded: Loaded, length_tok: int) -> float:
    """Seconds of one pass-key sample of ``length_tok`` tokens, answer included."""
    from hipexp import hf

    experiment = compose_like(point, length_tok)
    suite = open_suite_for(experiment)
    sample = suite.sample(suite.items()[0])
    with hf.install(loaded.model, experiment.pipeline):
        started = time.monotonic()
        generate(experiment, loaded, [sample], lambda tokens: None)
        return time.monotonic() - started
