"""What a run records of its surroundings: versions, machine, source revision; and the tidy table of its samples."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hipexp import __version__
from hipexp.config.schema import Model
from hipexp.run.identity import processor, version_of
from hipexp.run.ledger import replacing

LOG = logging.getLogger("hipexp")
PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "numpy", "hydra-core", "omegaconf", "pyarrow"),
    *("lm_eval", "jieba", "rouge", "rouge_score", "nltk", "wonderwords", "scipy"),
)


def describe_environment() -> dict[str, Any]:
    """Versions, device, threads and source revision, as plain data. Imports torch."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "hipexp": __version__,
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": device,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git": git_revision(Path(__file__).parent),
    }


def describe_run(model: Model) -> dict[str, Any]:
    """The surroundings of a run with a model: of a served one the device is its server's, which nobody knows here."""
    told = describe_environment()
    return told if model.base_url is None else told | {"device": f"not known: {model.path} at {model.base_url}"}


def git_revision(folder: Path) -> str | None:
    """The commit that ``folder`` is checked out at, with ``+`` if files differ from it; None outside a checkout.

    A folder of which a repository around it knows no file is not its checkout: packages may be installed inside one.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def to_yaml(data: dict[str, Any]) -> str:
    """``data`` as YAML, keys in their order."""
    import yaml

    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def write_records(folder: Path, head: dict[str, Any], card: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write ``records.parquet``: one tidy row per sample, the traffic of an offload added up, and in full as JSON.

    Left out, with a line in the log, where pyarrow is missing.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        LOG.warning("pyarrow is not installed: no records.parquet; samples.jsonl holds the same rows")
        return
    from hipexp.cache.traffic import summed

    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("run_key", "suite", "protocol", "model", "pipeline", "subtask")),
            ("sample", pa.int64()),
            ("metric", pa.string()),
            ("value", pa.float64()),
            *((name, pa.int64()) for name in ("length_tok", "context_tok", "new_tok", "removed_tok")),
            *((name, pa.float64()) for name in ("depth", "prefill_ms", "decode_ms")),
            ("peak_bytes", pa.int64()),
            *((name, pa.int64()) for name in ("hits", "misses", "h2d_bytes", "d2h_bytes")),
            ("stall_ms", pa.float64()),
            ("traffic", pa.string()),
            ("recall", pa.float64()),
            ("status", pa.string()),
        ]
    )
    same = {name: head[name] for name in ("run_key", "model", "pipeline")} | {name: card[name] for name in ("suite", "protocol")}

    def record(row: dict[str, Any]) -> dict[str, Any]:
        traffic = row.get("traffic", {})
        own = {"metric": card["metric"].get(row["subtask"], ""), "value": row["score"], "traffic": json.dumps(traffic)}
        counted = asdict(summed(traffic["rows"])[()]) if traffic.get("rows") else {}
        return {name: (counted | same | row | own).get(name) for name in schema.names}

    with replacing(folder / "records.parquet") as scratch:
        pq.write_table(pa.Table.from_pylist([record(row) for row in rows], schema=schema), scratch)
