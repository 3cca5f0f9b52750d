"""What makes two runs the same run: the configuration, the model's content, the samples' words, and for times the machine."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, ENOMEM, ENOSPC
from functools import cache, lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hipexp.config.model import ModelFacts, facts_in, files_of, model_folder, read_config
from hipexp.config.processes import started
from hipexp.config.runkey import run_key
from hipexp.config.schema import Experiment, Model, Task
from hipexp.suites import filled, infbench, origins, rules_of
from hipexp.suites.sample import DataMissing
from hipexp.suites.scoring import open_rules

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
ASK_AGAIN_S = 60.0
_ABSENT: dict[tuple[str, str | None], tuple[float, DataMissing]] = {}


def key_of(experiment: Experiment) -> str:
    """The run key of an experiment. Needs no torch, except for ``task=latency``, whose result depends on the machine.

    Raises ``ConfigError`` for a model path that is nothing, ``DataMissing`` for a hub model that cannot be reached.
    """
    if experiment.task.geometry is not None:
        return _key_without_a_model(experiment)
    from hipexp.run import recall

    trained_tok = facts_of(experiment.model).trained_tok
    model = dataclasses.replace(experiment.model, dtype=dtype_of(experiment.model), trained_tok=trained_tok)
    task = recall.filled(experiment.task, trained_tok) if experiment.task.name == "recall" else filled(experiment.task, trained_tok)
    seed = 0 if rules_of(experiment.task, None) else experiment.seed  # published rows are drawn by nobody
    told = dataclasses.replace(experiment, model=model, task=task, seed=seed)
    return run_key(told, model_revision=model_revision(experiment.model), extra=data_identity(experiment))


def key_without_data(experiment: Experiment) -> str:
    """What a run goes by while nobody knows its run key, since its data or its model are not here: its configuration alone."""
    model, task = experiment.model, experiment.task
    return run_key(experiment, model_revision=f"missing {model.path} {model.revision}", extra={"data": task.data})


def _key_without_a_model(experiment: Experiment) -> str:
    """The run key of a task with a geometry: times depend on the machine, recall does not."""
    from hipexp.run import attention_point, recall

    timed = experiment.task.name == "latency"
    task = attention_point.filled(experiment.task) if timed else recall.filled(experiment.task, None)
    alone = dataclasses.replace(experiment, model=Model(path=""), task=task)
    return run_key(alone, model_revision="", extra={"machine": machine()} if timed else {"scorer": recall.SCORER})


def data_identity(experiment: Experiment) -> dict[str, Any]:
    """The words and the scorer of generated samples; for latency the words and the machine."""
    if experiment.task.name == "latency":
        model, spread = experiment.model, dict[str, Any]()
        if model.device_map:
            spread["device_map"] = model.device_map
        if not model.cuda_graphs:
            spread["cuda_graphs"] = False
        if model.tp_plan:
            spread["tp_processes"] = started().count
        return {"machine": machine() | spread, "template": infbench.template_id("passkey", "default")}
    from hipexp.run import recall

    if official := origins(experiment.task):
        return {"data": official, "scorer": scorer_of(experiment.task)}
    words = {name: infbench.template_id(name, experiment.task.wording) for name in infbench.SUBTASKS}
    return {"template": words, "scorer": recall.SCORER if experiment.task.name == "recall" else infbench.SCORER}


def scorer_of(task: Task) -> str:
    """The version of the official scorer of a task."""
    return str(open_rules(task.name).SCORER)


def machine() -> dict[str, Any]:
    """Device, threads, and the versions and sources that decide how fast something is. Imports torch."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    versions = {name: version_of(name) for name in ("torch", "triton", "transformers")}
    return {"device": device, "threads": torch.get_num_threads(), "sources": timed_sources(), **versions}


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cache
def timed_sources() -> str:
    """A hash of the sources whose speed a latency run measures: a faster kernel, ours or the one to beat, is another measurement."""
    hipexp, kernels = Path(__file__).parents[1], find_spec("hipexp_kernels")
    assert kernels is not None and kernels.origin is not None
    digest = hashlib.sha256((hipexp / "run" / "contestants.py").read_bytes())
    for folder in (*(hipexp / name for name in ("attention", "cache", "hf")), Path(kernels.origin).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def model_revision(model: Model) -> str:
    """What the weights are: a hash of the files of a local folder (README aside), or the commit of a hub model.

    Nobody knows a served model's. Its id, the server and what is read here stand for them: text that the server's template wraps, or the
    tokens of a prompt (whether these are sent as text or as numbers makes no difference).
    """
    if model.base_url is None:
        return files_revision(model)
    given = "chat" if model.prompt == "chat" else "completions"
    return f"{model.path} of {model.server or model.base_url.rstrip('/')}, {given}, tokenizer {files_revision(model, without=WEIGHTS)}"


def files_revision(model: Model, without: tuple[str, ...] = ()) -> str:
    """A hash of the files of a model's folder (README and endings ``without`` aside), or its commit on a hub."""
    folder = model_folder(model)
    if folder is None:
        return hub_config(model).parent.name
    if not folder.is_dir():
        return "missing"
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix not in (".md", *without))
    return _hash_files(str(folder), tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files))


@lru_cache(maxsize=32)
def _hash_files(folder: str, known_by: tuple[tuple[str, int, int], ...]) -> str:
    """SHA-256 over names and contents, first 16 hex digits; sizes and times only say when to read again."""
    digest = hashlib.sha256()
    for name, size, _ in known_by:
        digest.update(f"{name}\0{size}\0".encode())
        with open(os.path.join(folder, name), "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def dtype_of(model: Model) -> str:
    """The number format of the weights: the configured one, or for ``auto`` what ``config.json`` says; ``auto`` of a served model."""
    if model.dtype != "auto" or model.base_url is not None:
        return model.dtype
    path = config_path(model)
    config = read_config(path, model) if path.is_file() else {}
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def facts_of(model: Model) -> ModelFacts:
    """Layers and trained length of a model, wherever it is. Raises ``ConfigError``, ``DataMissing`` for a hub out of reach."""
    return facts_in(config_path(model), model)


def config_path(model: Model) -> Path:
    """Where the model's ``config.json`` is, or would be in a folder without one. Raises as ``key_of``."""
    folder = model_folder(model)
    return hub_config(model) if folder is None else folder / "config.json"


def hub_config(model: Model) -> Path:
    """The ``config.json`` of a hub model in the local cache, fetched if need be; its folder is named for the commit.

    One that is not here is not asked for again within ``ASK_AGAIN_S``: to be told that there is no network takes half a minute.
    """
    from huggingface_hub import hf_hub_download

    asked = files_of(model)[1], model.revision
    if asked in _ABSENT and time.monotonic() - _ABSENT[asked][0] < ASK_AGAIN_S:
        raise _ABSENT[asked][1]
    try:
        with fetching(model):
            return Path(hf_hub_download(asked[0], "config.json", revision=asked[1]))
    except DataMissing as error:
        _ABSENT[asked] = time.monotonic(), error
        raise


@contextmanager
def fetching(model: Model, kind: type[Exception] = Exception) -> Iterator[None]:
    """Errors of ``kind`` while a part of a hub model is asked for become ``DataMissing``: whatever was the matter, it is not here."""
    try:
        yield
    except kind as error:
        if model_folder(model) is not None or getattr(error, "errno", None) in (ENOSPC, ENOMEM, EACCES):
            raise
        key, path = files_of(model)
        fetch = f"hf download {path}" + (f" --revision {model.revision}" if model.revision else "")
        raise DataMissing(
            f"{key}={path} is not here, or not all of it, and could not be fetched ({error}); where there is a network: {fetch}"
        ) from error
