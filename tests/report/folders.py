"""Run folders for tests, made by the ledger that runs write with."""

from __future__ import annotations

import hashlib

import yaml

from hipexp.run.ledger import SCORED, TIMED, open_ledger

CARD = {
    "suite": "infbench",
    "protocol": "hipexp",
    "edition": "",
    "template": {"passkey": "aa", "kv_retrieval": "bb"},
    "metric": {"passkey": "first_number", "kv_retrieval": "value_among_words"},
    "samples": {"passkey": 4, "kv_retrieval": 2},
    "length_tok": {"passkey": 600, "kv_retrieval": 600},
    "truncation": {"rule": "none", "removed_tok": {"passkey": 0}},
    "model": {"revision": "r1", "dtype": "float32"},
    "strategy": ["attention: dense, every token"],
}
CONFIG = {
    "model": {"path": "m", "name": "fake"},
    "pipeline": None,
    "task": {"name": "infbench", "samples": 4},
    "track": {"name": "local"},
    "seed": 0,
}


def line(subtask, sample, score, **more):
    """A line of ``samples.jsonl`` that is whole."""
    base = {name: kinds[0]() for name, kinds in SCORED.items()} | {"references": ["42"], "prediction": f"it is {score}", "status": "done"}
    return base | {"subtask": subtask, "sample": sample, "score": score, "context_tok": 599, "length_tok": 600} | more


def measurement(subtask, repeat):
    """A line of a latency run."""
    base = {name: kinds[0]() for name, kinds in TIMED.items()}
    return base | {"subtask": subtask, "sample": repeat, "score": None, "steps_ms": [1.0], "status": "done"}


def write(root, name, rows, state="done", card=None, config=None, latency=None, env=None, scores=None, status=None):
    """A run ``<root>/<task>/<name>_<key>``; scores of the summary are plain means unless given."""
    card, config = CARD | (card or {}), CONFIG | (config or {})
    key = hashlib.sha256(name.encode()).hexdigest()
    folder = root / config["task"]["name"] / f"{name}_{key[:10]}"
    with open_ledger(folder, key) as book:
        book.status("running")
        book.write("config.yaml", yaml.safe_dump(config))
        book.write("card.json", card)
        book.write("env.json", env or {"device": "cpu a", "threads": 1, "packages": {"torch": "2.11"}})
        for row in rows:
            book.append(row)
        if state == "done":
            found = {} if scores is None else scores
            for subtask in dict.fromkeys(row["subtask"] for row in rows if scores is None and row["score"] is not None):
                mine = [row["score"] for row in rows if row["subtask"] == subtask]
                found[subtask] = {"metric": "m", "score": sum(mine) / len(mine), "n": len(mine), "interval": None}
            average = sum(cell["score"] for cell in found.values()) / len(found) if found else None
            result = {"run_key": key, "scores": found, "average": average, "protocol": card["protocol"], "note": "", "exact": False}
            book.write("summary.json", result | {"latency": {"rows": latency or []}})
        book.status(state, **(status or {}))
    return folder
