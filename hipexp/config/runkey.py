"""The run key: which stored result answers an experiment."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hipexp.config.convert import to_plain
from hipexp.config.schema import Experiment, Offload

# Raise it whenever the same experiment can get another score: stored results are then no longer taken for an answer.
RESULT_VERSION = 3
# Where the model came from and how it is asked; what it is, is said by ``model_revision``.
MODEL_SOURCE = (
    *("path", "name", "revision", "device_map", "tp_plan", "cuda_graphs"),
    *("base_url", "tokenizer", "prompt", "server", "concurrent", "timeout_s"),
)


def run_key(experiment: Experiment, *, model_revision: str, extra: dict[str, Any]) -> str:
    """SHA-256, in hex, of every field that decides the result.

    What the configuration leaves open (``auto``, None) is to be filled in before. ``model_revision`` identifies the weights: the commit
    on a hub, or a hash of the files of a local folder. ``extra`` holds what else decides, as JSON can write it: the data's revision, and
    for the latency task device, threads and the versions of torch and Triton. Trackers, paths and the names of presets do not count.
    Raises ValueError for a number that is not finite, TypeError for what JSON cannot write.
    """
    fields = key_fields(experiment) | {"model_revision": model_revision, "extra": extra, "result_version": RESULT_VERSION}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def key_fields(experiment: Experiment) -> dict[str, Any]:
    """The fields of an experiment that decide its result, as plain data."""
    fields = to_plain(experiment)
    del fields["track"], fields["task"]["data"]  # a path; what the data are is in ``extra``
    fields["offload"] = offload_fields(experiment.offload)
    if experiment.task.name == "recall" and experiment.offload.on:  # where keys lie is nothing to it
        fields["offload"] = {"format": experiment.offload.format}
    for name in (*MODEL_SOURCE, *["compile"] * (not experiment.model.compile)):
        del fields["model"][name]
    if experiment.pipeline is not None:
        del fields["pipeline"]["name"]
        for part in (fields["pipeline"], *fields["pipeline"]["layers"].values()):  # as keys were before there was a choice
            for name in ("late_refresh", "params", "staggered_refresh"):
                if not part.get(name):
                    part.pop(name, None)
            stages = part["stages"].values() if isinstance(part["stages"], dict) else [*part["stages"], *(part["decode"] or [])]
            for stage in stages:
                if stage["piece_tok"] is None:
                    del stage["piece_tok"]
        if experiment.pipeline.method.endswith(".py"):
            fields["pipeline"]["method"] = hashlib.sha256(Path(experiment.pipeline.method).read_bytes()).hexdigest()
        # A list, since the order of groups decides which one wins; an empty range switches a group off.
        fields["pipeline"]["layers"] = [(name, group) for name, group in fields["pipeline"]["layers"].items() if group["range"]]
    return fields


def offload_fields(offload: Offload) -> dict[str, Any]:
    """The fields of an offload that decide scores, traffic or times; where the disk tier lies is a path."""
    if not offload.on:
        return {"name": offload.name}
    fields = to_plain(offload) | {"disk": offload.disk_dir is not None}
    del fields["name"], fields["disk_dir"]
    return fields
