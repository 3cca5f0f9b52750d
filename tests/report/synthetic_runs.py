"""Run folders written by the project's own writers, from made-up samples: what a report reads, without running a model."""

import copy
import json
import random
from functools import cache
from pathlib import Path

from hipexp.config.compose import compose
from hipexp.config.convert import to_plain
from hipexp.config.runkey import run_key
from hipexp.run.environment import to_yaml, write_records
from hipexp.run.ledger import open_ledger
from hipexp.suites.sample import ProtocolCard

MODEL = {"revision": "abc", "dtype": "float32", "trained_tok": 6144, "n_layers": 5, "transformers": "5.17.0"}
ENV = {"device": "made-up device", "threads": 1, "packages": {"torch": "2.13.0", "triton": None, "transformers": "5.17.0"}}
EMPTY = {"averages": {}, "note": "", "exact": False, "latency": {}, "memory": {}, "traffic": {}, "recall": {}}


@cache
def composed(*words):
    """The experiment of a few words; composing takes longer than writing a run."""
    return compose(list(words))


def sample(subtask, number, score, length, depth=None, removed=0, decode_ms=10.0, traffic=None):
    """A line of ``samples.jsonl``."""
    row = {"subtask": subtask, "sample": number, "prediction": "x", "references": ["y"], "score": score, "status": "done"}
    row |= {
        "context_tok": length - 20,
        "new_tok": 5,
        "removed_tok": removed,
        "length_tok": length,
        "exact": False,
        "traffic": traffic or {},
    }
    return row | {"prefill_ms": length / 10, "decode_ms": decode_ms, "peak_bytes": 2**20} | ({} if depth is None else {"depth": depth})


def traffic_of(h2d_bytes):
    """The traffic of a sample: one layer, stage 0 in decode."""
    counts = {"hits": 30, "misses": 10, "h2d_bytes": h2d_bytes, "d2h_bytes": 2**20, "disk_read_bytes": 0, "disk_write_bytes": 0}
    return {"rows": [{"layer": 0, "phase": "decode", "by": "0", **counts, "stall_ms": 1.5, "uncached": 0}], "steps": 4}


def write_run(root: Path, words, rows, state="done", card=None, plain=None, status=None, **summary):
    """A run folder under ``root``: ``words`` as on the command line (or ``plain``, their configuration), its samples, and what is to differ."""
    experiment = composed(*words)
    config = plain or to_plain(experiment)
    task, pipeline = config["task"]["name"], config["pipeline"] and config["pipeline"]["name"]
    key = run_key(experiment, model_revision=json.dumps([config, card, rows], sort_keys=True, default=str), extra={})
    lengths = {row["subtask"]: row["length_tok"] for row in rows}
    counts = {name: sum(row["subtask"] == name for row in rows) for name in lengths}
    told = ProtocolCard(
        suite=task,
        protocol="hipexp",
        edition="made up",
        template=dict.fromkeys(lengths, "t"),
        wording="default",
        metric=dict.fromkeys(lengths, "exact"),
        scorer="made-up-1",
        length_tok=lengths,
        samples=counts,
        new_tok=dict.fromkeys(lengths, 5),
        data=f"generated, seeds /{next(iter(lengths.values()), 0)}",
        model=MODEL,
    ).to_dict()
    told |= {"strategy": []} | (card or {})
    folder = root / task / f"{config['model']['name']}_{pipeline or 'dense'}_{key[:10]}"
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open_ledger(folder, key) as ledger:
        head = {"run_key": key, "task": task, "model": config["model"]["name"], "pipeline": pipeline, "status": "done"}
        ledger.write("config.yaml", to_yaml(config))
        ledger.write("card.json", told)
        ledger.write("env.json", ENV)
        if state == "done":
            means = {name: sum(row["score"] or 0 for row in rows if row["subtask"] == name) / counts[name] for name in counts}
            scores = {name: {"metric": "exact", "score": mean, "n": counts[name]} for name, mean in means.items()}
            average = sum(means.values()) / len(means) if means else None
            write_records(folder, head, told, ledger.rows)
            ledger.write("summary.json", head | EMPTY | {"protocol": told["protocol"], "scores": scores, "average": average} | summary)
        ledger.status(state, **(status or {}))
    return folder


def passkeys(scores, length, **more):
    """Samples of a pass-key task at depths from 0 to 1."""
    last = max(len(scores) - 1, 1)
    return [sample("passkey", i, score, length, depth=i / last, **more) for i, score in enumerate(scores)]


DENSE = ["task=infbench", "task.subtasks=[passkey]", "task.samples=4"]
PRUNED = ["+pipeline=3stage", *DENSE]


def write_all(root: Path):
    """A run of every kind that the report has a section for; returns the folders by name."""
    made = {}
    for length, dense, ours in ((6144, [100, 100, 100, 0], [100, 0, 100, 100]), (12288, [0, 100, 0, 0], [100, 100, 0, 100])):
        words = f"task.length_tok={length}"
        made[f"dense {length}"] = write_run(root, [*DENSE, words], passkeys(dense, length, decode_ms=12.0))
        made[f"3stage {length}"] = write_run(root, [*PRUNED, words], passkeys(ours, length))
        less = [*PRUNED, words, "pipeline.stages.2.keep_tok=1024"]
        made[f"less {length}"] = write_run(root, less, passkeys([0, 0, 100, 0], length, decode_ms=7.0))
        rows = [row | {"traffic": traffic_of(length * 1000)} for row in passkeys(ours, length, decode_ms=15.0)]
        read = {"phase": "decode", "by": "0", "hit_ratio": 0.75, "h2d_bytes": length * 4000, "disk_read_bytes": 0, "d2h_bytes": 2**22}
        moved = {"rows": [], "by": [read | {"stall_ms": 6.0}]}
        made[f"offload {length}"] = write_run(root, [*PRUNED, words, "offload=host"], rows, traffic=moved)
    made["other protocol"] = write_run(
        root, ["+pipeline=quest", *DENSE, "task.length_tok=6144"], passkeys([100] * 4, 6144), card={"protocol": "official"}
    )
    cut = {"truncation": {"rule": "middle", "removed_tok": {"passkey": 400}}}
    made["cut"] = write_run(root, [*DENSE, "task.length_tok=24576"], passkeys([100, 0, 0, 0], 24576, removed=100), card=cut)
    failed = {"class": "out_of_memory", "message": "no memory left; try a shorter length"}
    made["failed"] = write_run(root, [*PRUNED, "task.length_tok=99328"], passkeys([100], 99328), "failed", status=failed)
    made["stopped"] = write_run(root, [*PRUNED, "task.length_tok=49152", "seed=3"], passkeys([100, 100], 49152), "running")
    times = [
        {"phase": phase, "context_tok": length, "impl": impl, "mean_ms": length / (100 if impl == "dense" else 300), "p10_ms": 1.0,
         "p90_ms": 2.0, "cached_ms": None, "worst_ms": 3.0, "bytes": 1, "speedup": 1.0 if impl == "dense" else 3.0}
        for phase in ("prefill", "decode") for length in (6144, 12288) for impl in ("dense", "3stage")
    ]  # fmt: skip
    timed = sample("dense@6144", 0, None, 6144) | {"impl": "dense", "steps_ms": [1.0]}
    made["latency"] = write_run(
        root,
        ["+pipeline=3stage", "task=latency", "task.lengths_tok=[6144,12288]"],
        [timed],
        scores={},
        average=None,
        latency={"rows": times},
    )
    stages = [
        {"mass": {"mean": 1 - i / 4, "p5": 0.5}, "oracle_ratio": {"mean": 0.9, "p5": 0.5}, "top": {"mean": 0.8, "p5": 0.5}}
        for i in range(3)
    ]
    made["recall"] = write_run(
        root,
        ["+pipeline=3stage", "task=recall"],
        [sample("passkey@6144/1", 0, 50.0, 6144)],
        recall={"passkey@6144/1": {"fixed": {"mean": 0.3, "p5": 0.1}, "stages": stages, "layers": {}}},
    )
    return made


def write_many(root: Path, n_runs):
    """A sweep of ``n_runs`` runs: seven methods at four lengths, five samples of three subtasks each, with some that failed."""
    rng, subtasks = random.Random(0), ("passkey", "number_string", "kv_retrieval")
    methods = ("", "3stage", "2stage", "3stage_scan", "quest", "streaming", "5k")
    for number in range(n_runs):
        method, length = methods[number % len(methods)], 6144 << (number // len(methods)) % 4
        words = [*([f"+pipeline={method}"] if method else []), "task=infbench"]
        plain = copy.deepcopy(to_plain(composed(*words)))
        plain["task"]["length_tok"], plain["seed"] = length, number // 28 % 6
        if method.startswith("3stage"):
            plain["pipeline"]["stages"][2]["keep_tok"] = 512 << number % 4
        times = {"decode_ms": rng.uniform(5, 50)}
        rows = [sample(name, i, rng.choice((0, 100)), length, depth=i / 4, **times) for name in subtasks for i in range(5)]
        write_run(root, words, rows, state="failed" if number % 50 == 49 else "done", plain=plain)
