"""What an offloaded run says of its traffic: a table, and a word where the device is too small for what is read again and again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hipexp.config.offload import show_bytes
from hipexp.config.schema import Experiment
from hipexp.report.tables import text_table
from hipexp.run.strategy import refresh_pattern

WORDS = (
    "hit %: of the chunks asked for, those on the device. stage, attend: who asked; write: what is new. MiB and ms: of all samples and\n"
    "layers; stall: waiting for what was fetched"
)


def traffic_table(traffic: dict[str, Any]) -> str:
    """What crossed the link, by phase and reader, over all samples and layers; empty where all keys and values stay on the device."""
    if not traffic:
        return ""
    moved = {"MiB fetched": "h2d_bytes", "of them from disk": "disk_read_bytes", "MiB written": "d2h_bytes"}
    moved |= {"of them to disk": "disk_write_bytes"}
    moved = {title: name for title, name in moved.items() if "disk" not in title or any(row[name] for row in traffic["by"])}
    table = []
    for row in traffic["by"]:
        reader = f"stage {row['by']}" if row["by"].isdecimal() else row["by"]
        hit = None if row["hit_ratio"] is None else 100 * row["hit_ratio"]
        table.append([row["phase"], reader, hit, *(row[name] / 2**20 for name in moved.values()), row["stall_ms"]])
    return "\n".join([text_table(["phase", "by", "hit %", *moved, "stall ms"], table, left=2), WORDS, _taken(traffic)])


def _taken(traffic: dict[str, Any]) -> str:
    tiers = {"in host memory (on a CPU part of peak MiB)": traffic["host_bytes"], "on disk": traffic["disk_bytes"]}
    return "off the device, for a sample: " + " and ".join(f"{show_bytes(size)} {where}" for where, size in tiers.items() if size)


def thrashing(experiment: Experiment, rows: Iterable[dict[str, Any]], n_layers: int) -> str:
    """A word on a device too small for what is read again and again; empty if it is not. ``rows`` are those of ``samples.jsonl``.

    The hits of decode are judged over answers that last a whole refresh period: in a shorter one most of what is missing is missing for the
    first time, which a larger device would not change.
    """
    from hipexp.cache.traffic import summarize

    period, samples = refresh_pattern(experiment.pipeline, n_layers)[0], [row["traffic"] for row in rows if row["traffic"]]
    judged, every = summarize(sample for sample in samples if sample["steps"] >= period), summarize(samples)
    hit = judged["decode"]["hit_ratio"] if judged else None
    uncached = sum(every[phase]["uncached"] for phase in ("prefill", "decode")) if every else 0
    told = [f"{100 - 100 * hit:.0f} % of what decode asked for had to be fetched"] if hit is not None and hit < 0.5 else []
    told += [f"{uncached} time(s) more was asked for at once than the device holds, and what was missing was not kept"] if uncached else []
    key = "device_tok" if experiment.offload.device_bytes is None else "device_bytes"
    return f"still right, but slow: {' and '.join(told)}; raise offload.{key}={getattr(experiment.offload, key)}" if told else ""
