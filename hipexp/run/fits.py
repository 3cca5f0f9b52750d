"""``python -m hipexp doctor <overrides>``: whether a run fits this machine, told before anything loads, and what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hipexp.config.check import check_layers
from hipexp.config.compiler import check_compiler
from hipexp.config.compose import compose
from hipexp.config.model import read_config
from hipexp.config.offload import check_fits, room_for, show_bytes, sizes
from hipexp.config.schema import ConfigError, Experiment, Model
from hipexp.output import Flags, answer
from hipexp.report.tables import text_table
from hipexp.run.identity import config_path, facts_of
from hipexp.run.room import weights_bytes
from hipexp.suites import filled, lacking, lengths_of
from hipexp.suites.sample import DataMissing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hipexp.hf.forecast_memory import Forecast, Work

PLACES = ("device", "host", "disk")
LEAST_CHUNK_TOK, LEAST_HOST_TOK = 512, 4096  # what repairs go down to
DEVICE_TOK, HOST_TOK = 16384, "offload.host_tok"  # of the presets; the key of what host memory holds beside a disk
TIERS = ("device_tok", "device_bytes", "host_tok", "host_bytes", "disk_tok", "disk_bytes")


@dataclass(frozen=True)
class Verdict:
    """What an experiment needs of each of ``PLACES`` and what this machine has there, in bytes; None: nobody says.

    Without a GPU nothing is needed of the device: all is host memory.
    """

    experiment: Experiment
    work: Work
    forecast: Forecast
    needs: dict[str, int]
    has: dict[str, int | None]
    missing: tuple[str, ...] = ()  # data and packages that the task needs and that are not here, in words

    @property
    def fits(self) -> bool:
        return not self.short

    @property
    def short(self) -> list[str]:
        """The places that have too little room."""
        return [place for place in PLACES if (room := self.has[place]) is not None and self.needs[place] > max(0, room)]


def main(words: Sequence[str], flags: Flags) -> int:
    """Print what the point that ``words`` compose needs, what there is, and a change that makes it fit; 0 if it fits and can run, else 1.

    A model whose weights are not here yet can be asked about all the same.

    Raises ConfigError, also for a model that is served or a task without one, DataMissing for a ``config.json`` that is not here.
    """
    from hipexp.hf.skeleton import skeleton

    experiment = compose(words)
    model = experiment.model
    if model.base_url is not None or experiment.task.geometry is not None:
        what = f"model.base_url={model.base_url} is served elsewhere" if model.base_url else "a task with a geometry loads no model"
        raise ConfigError(f"doctor tells what a model takes here, and {what}; choose a model to load")
    check_compiler(model)
    made = skeleton(_config_path(model).parent, model.dtype)
    verdict = dataclasses.replace(judge(experiment, made), missing=tuple(lacking(experiment.task)))
    repair = None if verdict.fits else next(repairs(words, verdict, made), None)
    answer(flags, _text(verdict, repair), _plain(verdict, repair), "")
    return 0 if verdict.fits and not verdict.missing else 1


def judge(experiment: Experiment, model: PreTrainedModel) -> Verdict:
    """Whether an experiment on a skeleton of its model fits this machine. Raises ConfigError as a run does before it loads weights."""
    import torch

    from hipexp.hf.forecast_memory import forecast

    gpu = torch.cuda.is_available()
    work, facts, pipeline = work_of(experiment), facts_of(experiment.model), experiment.pipeline
    check_layers(experiment, facts)
    room = room_for(experiment.offload)
    if experiment.offload.on and pipeline is not None:
        nowhere = dataclasses.replace(room, host_bytes=None, disk_bytes=None)
        check_fits(experiment.offload, pipeline.plan(facts.layers), facts, work.prompt_tok + work.new_tok, work.batch, nowhere)
    found = forecast(model, pipeline, experiment.offload, work, gpu)
    if read_config(config_path(experiment.model), experiment.model).get("quantization_config") and weights_bytes(experiment.model):
        found = dataclasses.replace(found, weights=weights_bytes(experiment.model))  # smaller than the shapes say
    if not gpu:
        needs = _by_place(0, found.device_bytes, found.disk)
        return Verdict(experiment, work, found, needs, _by_place(None, room.host_bytes, room.disk_bytes))
    devices = range(torch.cuda.device_count()) if experiment.model.device_map else [torch.cuda.current_device()]
    free = sum(torch.cuda.mem_get_info(device)[0] for device in devices)
    needs = _by_place(found.device_bytes, max(found.host, found.weights), found.disk)  # weights pass through host memory
    return Verdict(experiment, work, found, needs, _by_place(free, room.host_bytes, room.disk_bytes))


def work_of(experiment: Experiment) -> Work:
    """The longest prompts of an experiment, and at the least one new token: what an answer takes besides is in a task's length.

    Rows that others published are as long as they are: the trained length stands for them, or ``task.truncate_tok``.
    """
    from hipexp.hf.forecast_memory import Work

    task, trained_tok = experiment.task, facts_of(experiment.model).trained_tok
    if task.name in ("passkey", "latency"):
        context = max(lengths_of(task, trained_tok).values())
    elif task.name == "recall":
        context = max(task.contexts_tok or [trained_tok])
    else:
        context = filled(task, trained_tok).length_tok or trained_tok
    context = min(context, task.truncate_tok or context)
    new_tok = task.decode_steps + 1 if task.name == "latency" else 1
    return Work(max(1, context - new_tok), new_tok, experiment.model.prefill_chunk_tok, task.batch)


def repairs(words: Sequence[str], verdict: Verdict, model: PreTrainedModel) -> Iterator[list[str]]:
    """Overrides that make a run fit, each tried as a whole, those that change least first: only a smaller format changes what comes out."""
    room = verdict.has["device" if verdict.forecast.gpu else "host"]
    if room is not None and verdict.forecast.weights > room:
        return
    for change in _changes(verdict.experiment):
        try:
            changed = judge(compose(_with(words, change)), model)
        except ConfigError:
            continue  # no change that a run would take
        if changed.fits:
            yield _widened(words, change, changed, model)


def _changes(experiment: Experiment) -> Iterator[list[str]]:
    """Changes to try, by how much they change: the parts of a prompt, prompts at once, where keys and values lie, how many are near."""
    smaller = [f"model.prefill_chunk_tok={n}" for n in _halves(experiment.model.prefill_chunk_tok, LEAST_CHUNK_TOK)]
    fewer = [f"task.batch={n}" for n in _halves(experiment.task.batch, 1)]
    for one in (*smaller, *fewer):
        yield [one]
    near = [[], *([f"offload.device_tok={n}"] for n in _halves(DEVICE_TOK, 1024))]
    moved = [["offload=host", *some] for some in near] if experiment.offload.disk_dir is None else []
    moved += [["offload=disk", f"{HOST_TOK}={LEAST_HOST_TOK}", *some] for some in near]
    for alone in ([], fewer[-1:]) if fewer else ([],):
        for change in moved:
            for part in ([], smaller[1:2], smaller[-1:]) if smaller else ([],):
                yield [*change, *alone, *part]
    for form in ("fp8", "int4"):
        for change in moved:
            yield [*change, f"offload.format={form}", *fewer[-1:], *smaller[-1:]]


def _widened(words: Sequence[str], change: list[str], verdict: Verdict, model: PreTrainedModel) -> list[str]:
    """A change with as much in host memory as there is room for, where it has the least that is tried."""
    one, room = verdict.experiment, verdict.has["host"]
    if f"{HOST_TOK}={LEAST_HOST_TOK}" not in change or room is None or one.pipeline is None:
        return change
    facts = facts_of(one.model)
    told = sizes(one.offload, one.pipeline.plan(facts.layers), facts)
    more = (room - verdict.needs["host"]) // (one.task.batch * told.bytes_of(told.page_tok)) * told.page_tok
    wider = [word.replace(f"{HOST_TOK}={LEAST_HOST_TOK}", f"{HOST_TOK}={(LEAST_HOST_TOK + more) // 4096 * 4096}") for word in change]
    return wider if judge(compose(_with(words, wider)), model).fits else change


def _halves(most: int, least: int) -> list[int]:
    """Half of ``most``, half of that, …, down to ``least``."""
    found = []
    while most // 2 >= least:
        most //= 2
        found.append(most)
    return found


def _with(words: Sequence[str], change: list[str]) -> list[str]:
    """``words`` with a change in place of what they say of the same keys; another offload brings sizes of its own."""
    keys = {_key(word) for word in change}
    if "offload" in keys:
        keys |= {f"offload.{tier}" for tier in TIERS}
    return [*(word for word in words if _key(word) not in keys), *change]


def _key(word: str) -> str:
    return word.lstrip("+-").partition("=")[0]


def _config_path(model: Model) -> Any:
    try:
        return config_path(model)
    except DataMissing as error:
        revision = f" --revision {model.revision}" if model.revision else ""
        raise DataMissing(
            f"model.path={model.path}: its config.json is not here and could not be fetched, and all sizes follow from it; where there is "
            f"a network `hf download {model.path} config.json{revision}` fetches it alone, or name a folder that has one with model.path"
        ) from error


def _by_place(*each: Any) -> dict[str, Any]:
    return dict(zip(PLACES, each, strict=True))


def _plain(verdict: Verdict, repair: list[str] | None) -> dict[str, Any]:
    found, one = verdict.forecast, verdict.experiment
    return {
        "model": one.model.name or one.model.path, "pipeline": one.pipeline and (one.pipeline.name or one.pipeline.method),
        "offload": one.offload.name, "device": "cuda" if found.gpu else "cpu", "work": dataclasses.asdict(verdict.work),
        "bytes": {
            item.name: getattr(found, item.name) for item in dataclasses.fields(found) if item.name not in ("gpu", "left_out")
        } | {"prefill_peak": found.prefill_peak, "decode_peak": found.decode_peak},
        "left_out": found.left_out, "needs": verdict.needs, "has": verdict.has, "fits": verdict.fits, "repair": repair,
        "missing": list(verdict.missing), "weights_here": bool(weights_bytes(one.model)),
    }  # fmt: skip


def _text(verdict: Verdict, repair: list[str] | None) -> str:
    found, work, plain = verdict.forecast, verdict.work, _plain(verdict, repair)
    prompts = "a prompt" if work.batch == 1 else f"{work.batch} prompts"
    near = "device" if found.gpu else "memory"
    rows = [
        ("weights", found.weights, None, None),
        ("keys and values", found.kv, found.host or None, found.disk or None),
        ("summaries", found.summaries, None, None),
        ("activations, prefill", found.prefill, None, None),
        ("activations, decode", found.decode, None, None),
        ("peak of prefill", found.weights + found.prefill_peak, None, None),
        ("peak of decode", found.weights + found.decode_peak, None, None),
    ]
    shown = [[name, *(None if size is None else show_bytes(size) for size in each)] for name, *each in rows]
    lines = [
        f"{plain['model']}, {plain['pipeline'] or 'dense'}, offload={plain['offload']}: {prompts} of {work.prompt_tok} tokens and "
        f"{work.new_tok} new, {work.chunk_tok} at a time",
        text_table(["", near, "host tier" if not found.gpu else "host", "disk"], shown),
    ]
    for place in PLACES if found.gpu else PLACES[1:]:
        if verdict.needs[place]:
            room = verdict.has[place]
            name = {"device": "GPU memory", "host": "host memory", "disk": "disk"}[place]
            can = "nobody says how much there is" if room is None else f"{show_bytes(max(0, room))} can be had"
            lines.append(f"{name}: {show_bytes(verdict.needs[place])} needed, {can}")
    if found.left_out:
        lines.append(f"not counted: {found.left_out}")
    if not plain["weights_here"]:
        lines.append("the model's weights are not here yet")
    lines += [f"missing: {one}" for one in verdict.missing]
    lines.append(("fits; it cannot run before that is here" if verdict.missing else "fits") if verdict.fits else _advice(verdict, repair))
    return "\n".join(lines)


def _advice(verdict: Verdict, repair: list[str] | None) -> str:
    if repair:
        rounds = ", which rounds keys and values" if any(word.startswith("offload.format=") for word in repair) else ""
        return f"does not fit; it would with {' '.join(repair)}{rounds}"
    weights, place = verdict.forecast.weights, "device" if verdict.forecast.gpu else "host"
    room = verdict.has[place]
    if room is not None and weights >= room:
        more = "in bfloat16 (model.dtype=bfloat16), " if verdict.experiment.model.dtype == "float32" else ""
        return (
            f"does not fit: the weights alone take {show_bytes(weights)}, and {show_bytes(max(0, room))} can be had; try a smaller model, "
            f"{more}more devices (model.device_map=auto), or more processes (torchrun, model.tp_plan=auto)"
        )
    more = "" if verdict.experiment.pipeline else " (offload needs a pipeline that reads few keys, as in +pipeline=3stage)"
    return f"does not fit, whatever is offloaded{more}; try a shorter context, or a smaller model"
