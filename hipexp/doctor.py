"""``python -m hipexp doctor``: what is installed, what is missing and for what, and what stands in the way.

With the overrides of a run it tells whether that fits this machine (:mod:`hipexp.run.fits`).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from hipexp import __version__
from hipexp.config.schema import ConfigError
from hipexp.output import answer, split_flags

# Package: (import name, tested versions as (at least, below), needed for; "" for everything).
PACKAGES: dict[str, tuple[str, tuple[str, str], str]] = {
    "torch": ("torch", ("2.11", "3"), ""),
    "numpy": ("numpy", ("2", "3"), ""),
    "transformers": ("transformers", ("5.16", "6"), ""),
    "hydra-core": ("hydra", ("1.3.8", "1.5"), ""),
    "omegaconf": ("omegaconf", ("2.3", "3"), ""),
    "PyYAML": ("yaml", ("6", "7"), ""),
    "tqdm": ("tqdm", ("4.66", "5"), ""),
    "pyarrow": ("pyarrow", ("17", "100"), "records.parquet"),
    "duckdb": ("duckdb", ("1.4", "3"), "report"),
    "matplotlib": ("matplotlib", ("3.9", "4"), "pictures"),
    "triton": ("triton", ("3.6", "4"), "fast kernels on a GPU"),
    "wandb": ("wandb", ("0.24", "1"), "track=wandb and wandb's sweeps"),
    "optuna": ("optuna", ("5", "6"), "tune"),
    "hydra-joblib-launcher": ("hydra_plugins.hydra_joblib_launcher", ("1.2", "2"), "hydra/launcher=joblib"),
    "hydra-submitit-launcher": ("hydra_plugins.hydra_submitit_launcher", ("1.2", "2"), "hydra/launcher=submitit_slurm"),
    "submitit": ("submitit", ("1.5.4", "2"), "hydra/launcher=submitit_slurm"),
    "lm_eval": ("lm_eval", ("0.4.13", "0.4.14"), "official suites"),
    "jieba": ("jieba", ("0.42.1", "0.42.2"), "official scores of LongBench and ∞Bench"),
    "rouge": ("rouge", ("1.0.1", "1.0.2"), "official scores of LongBench and ∞Bench"),
    "rouge_score": ("rouge_score", ("0.1.2", "0.1.3"), "official scores of LongBench and ∞Bench"),
    "nltk": ("nltk", ("3.9.1", "4"), "official suites"),
    "wonderwords": ("wonderwords", ("3.0.1", "3.0.2"), "RULER"),
    "scipy": ("scipy", ("1", "2"), "RULER"),
}


def main(argv: list[str]) -> int:
    """Print the report; 0 if everything that is always needed is there, else 1.

    ``argv`` may hold overrides: then the report is on that run, and 0 means that it fits and that nothing it needs is missing.
    """
    flags, words = split_flags(argv)
    if any("=" in word for word in words):
        from hipexp.run.fits import main as tell

        return tell(words, flags)
    if words:
        raise ConfigError(f"doctor takes no argument {words[0]!r}; only --json, and overrides as in model=llama31_8b +pipeline=3stage")
    packages = [examine(name) for name in PACKAGES]
    report = {"hipexp": __version__, "python": platform.python_version(), "packages": packages, "device": device(), "kernels": shadowed()}
    answer(flags, _text(report), report, "")
    broken = [one for one in packages if one["state"] == "missing" and not one["for"]]
    return 1 if broken or report["kernels"] else 0


def examine(name: str) -> dict[str, Any]:
    """Version of a package and its state: ``ok``, ``missing`` or ``untested`` (outside the versions we know)."""
    module, (least, below), purpose = PACKAGES[name]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    state = "missing" if version is None or importlib.util.find_spec(module) is None else "ok"
    if version is not None and not _numbers(least) <= _numbers(version) < _numbers(below):
        state = "untested"
    return {"name": name, "version": version, "state": state, "tested": f">={least},<{below}", "for": purpose}


def device() -> str:
    """The GPU that would be used, or the processor with its number of threads."""
    if importlib.util.find_spec("torch") is None:
        return "unknown without torch"
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} ({torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB)"
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def shadowed() -> str | None:
    """Where a package ``kernels`` of somebody else hides the one transformers looks for; None if nothing does.

    ``kernels`` is the import name of a client that transformers tries to load. Our folder of that name has no
    ``__init__.py``, so that it hides nothing.
    """
    for folder in map(Path, sys.path):
        package = folder / "kernels" / "__init__.py"
        if package.is_file() and not list(folder.glob("kernels-*.dist-info")):
            return str(package)
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: ``2.13.0+cpu`` is (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _text(report: dict[str, Any]) -> str:
    lines = [f"hipexp {report['hipexp']}, Python {report['python']} on {platform.platform()}", f"device: {report['device']}", ""]
    for one in report["packages"]:
        note = {
            "ok": "",
            "missing": f"missing, needed for {one['for'] or 'everything'}",
            "untested": f"untested, known are {one['tested']}",
        }
        lines.append(f"  {one['name']:<24} {one['version'] or '-':<14} {note[one['state']]}".rstrip())
    if report["kernels"]:
        lines += ["", f"{report['kernels']} hides the package `kernels` that transformers looks for: rename that folder or leave it"]
    return "\n".join(lines)
