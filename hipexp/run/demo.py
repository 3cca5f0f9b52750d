"""``python -m hipexp demo``: dense attention against ``3stage`` on the embedded model, ending with a table and a picture."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from hipexp.config.compose import compose
from hipexp.output import answer, aside, split_flags
from hipexp.report.figures import Axis, HeatMap, draw_heat_maps
from hipexp.report.tables import duration, text_table
from hipexp.run.ledger import runs_root, write_text
from hipexp.run.point import MEMORY, costs
from hipexp.run.several import Named, compose_named, model_line, refuse_own, resident, run_all, told, trained_length

METHODS = ("dense", "3stage")
TIMES = (1, 2, 4, 8)
DENSE_TIMES = 4  # beyond, dense takes minutes on two cores; `python -m hipexp table` has it
RETRIEVAL_TIMES = (1, 4)
DEPTHS = (0.1, 0.5, 0.9)  # at 0 and 1 the needle lies in the sinks and in the window: no pruning is needed to find it


def points(overrides: list[str]) -> dict[tuple[str, int, str], Named]:
    """Every run of the demo by method, multiple of the trained length and task, cheap ones first."""
    trained_tok = trained_length(compose(["task=passkey", *resident(overrides)]).model)
    found = {}
    for times in TIMES:
        for method in METHODS:
            if method == "dense" and times > DENSE_TIMES:
                continue
            length, chosen = times * trained_tok, [] if method == "dense" else [f"+pipeline={method}"]
            tasks = {"passkey": [f"task.lengths_tok=[{length}]", f"task.depths=[{','.join(map(str, DEPTHS))}]", "task.samples=1"]}
            if times in RETRIEVAL_TIMES:
                tasks["infbench"] = [f"task.length_tok={length}", "task.subtasks=[number_string,kv_retrieval]", "task.samples=2"]
            for task, words in tasks.items():
                name = f"{method}, {task}, {times} × the trained length ({length} tokens)"
                found[method, times, task] = compose_named(name, [f"task={task}", *words, *chosen], overrides)
    return found


def table(runs: dict[tuple[str, int, str], Named], trained_tok: int) -> str:
    """Score, times and memory per length and method."""
    header = ["context", "× trained", "attention", "passkey", "number_string", "kv_retrieval", "prefill s", "decode ms/step", "peak MiB"]
    lines = []
    for times in TIMES:
        for method in METHODS:
            rows = [row for (m, t, _), run in runs.items() if (m, t) == (method, times) for row in run.rows()]
            lines.append([times * trained_tok, f"{times}×", method, *(cells(rows) if rows else ["not run"] + [None] * 5)])
    return text_table(header, lines, left=0)


def cells(rows: list[dict[str, Any]]) -> list[Any]:
    """The mean score of each subtask, then the medians of the times and the largest memory."""
    scores = []
    for name in ("passkey", "number_string", "kv_retrieval"):
        mine = [row["score"] for row in rows if row["subtask"].startswith(name)]
        scores.append(statistics.fmean(mine) if mine else None)
    return scores + costs(rows)


def picture(path: Path, runs: dict[tuple[str, int, str], Named], trained_tok: int) -> None:
    """Depth × length heat maps of the pass keys, dense and 3stage."""
    maps = []
    for method in METHODS:
        scores: dict[tuple[str, str], float] = {}
        for times in TIMES:
            if (method, times, "passkey") in runs:
                for row in runs[method, times, "passkey"].rows():
                    scores[f"{row['depth']:.0%}", label(times, trained_tok)] = row["score"]
        maps.append(HeatMap(method, scores))
    draw_heat_maps(
        path,
        f"Pass key found? Trained on {trained_tok} tokens, asked at up to {TIMES[-1]} times that",
        maps,
        Axis("depth of the pass key", [f"{depth:.0%}" for depth in DEPTHS]),
        Axis("context, in tokens", [label(times, trained_tok) for times in TIMES]),
        note=f"One sample per cell, score 0 to 100, hipexp's own prompts. Dense is run to {DENSE_TIMES} times the trained length only.",
    )


def label(times: int, trained_tok: int) -> str:
    """A column of the picture."""
    return f"{times * trained_tok:,}\n({times}×)"


def main(argv: list[str]) -> int:
    """Run the demo; ``argv`` are overrides for every point, such as ``model=...``. A second call only shows the results."""
    started = time.monotonic()
    flags, words = split_flags(argv)
    refuse_own("demo", words)
    runs = points(words)
    model = next(iter(runs.values())).experiment.model
    trained_tok = trained_length(model)
    with aside(flags):
        run_all(list(runs.values()))
    folder = runs_root() / "demo"
    text = "\n".join(
        [
            table(runs, trained_tok),
            f"{MEMORY}; {model_line(model)}.",
            "Scores 0 to 100: protocol hipexp (own prompts, generated samples), not official ∞Bench.",
            f"Dense is run to {DENSE_TIMES} times the trained length only; `python -m hipexp table` goes on.",
        ]
    )
    files = {"table": folder / "table.txt", "picture": folder / "passkey.png"}
    picture(files["picture"], runs, trained_tok)
    write_text(files["table"], text + "\n")
    text += f"\ntook {duration(time.monotonic() - started)}; every run is under {runs_root()}/ (`python -m hipexp ls`)"
    text += f"\ntable:   {files['table']}\npicture: {files['picture']}"
    answer(flags, text, told(runs.values(), **files), str(files["table"]))
    return 0
