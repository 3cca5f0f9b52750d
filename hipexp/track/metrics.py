"""The numbers of a summary by the names that sweeps optimise, with wandb and without."""

from __future__ import annotations

from typing import Any

from hipexp.suites import OWN


def metrics_of(summary: dict[str, Any]) -> dict[str, Any]:
    """``average``, ``score/…``, ``average/<group>``, ``running/…``, ``latency.…`` and ``memory.…``, ``mean_ms/…`` and ``traffic/…``.

    ``mean_ms/<phase>/<context_tok>/<impl>`` is a row of ``latency.rows``; ``traffic/<phase>/<name>`` is what an offload moved and had to
    wait for, empty where everything stayed on the device. ``running/average`` and ``running/<subtask>`` are the means that grow with the
    samples, at their end (those of subtasks under our own protocol: official scorers group and round otherwise). Scores are 0 to 100. None
    for what was not measured.
    """
    found = {"average": summary.get("average")}
    if found["average"] is not None:
        found["running/average"] = found["average"]
        if summary["protocol"] == OWN:
            found |= {f"running/{name}": cell["score"] for name, cell in summary["scores"].items()}
    found |= {f"score/{name}": cell["score"] for name, cell in summary["scores"].items()}
    found |= {f"average/{name}": value for name, value in summary.get("averages", {}).items()}
    for part in ("latency", "memory"):
        found |= {f"{part}.{name}": value for name, value in summary[part].items() if not isinstance(value, (dict, list))}
    for row in summary["latency"].get("rows", []):
        found[f"mean_ms/{row['phase']}/{row['context_tok']}/{row['impl']}"] = row.get("mean_ms")
    totals = ((phase, summary["traffic"].get(phase, {})) for phase in ("prefill", "decode"))
    return found | {f"traffic/{phase}/{name}": value for phase, moved in totals for name, value in moved.items()}
