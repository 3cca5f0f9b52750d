"""Refuse an experiment that cannot be right, before anything loads.

``check_experiment`` needs the configuration only, ``check_model`` adds what depends on the model: its layers and its
trained length, read from ``config.json`` without loading it. Every message names key, value, rule and repair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from hipexp.config.model import ModelFacts, read_facts
from hipexp.config.offload import POLICIES, check_chunks, check_folder, check_sizes, page_tok_of
from hipexp.config.overrides import DENSE
from hipexp.config.schema import (
    FORMATS,
    ConfigError,
    Experiment,
    LayerPlan,
    Model,
    Offload,
    Pipeline,
    PruneRope,
    Representative,
    Stage,
    Task,
    Track,
    range_parts,
    read_geometry,
)
from hipexp.config.wandb_key import has_wandb_key

METHODS = tuple(sorted(path.stem for path in (Path(__file__).parents[1] / "attention" / "methods").glob("[a-z]*.py")))
OFFLOADING = ("hip", "streaming")  # methods that read keys only where they say so, and have no parameters in ``params``
DTYPES = ("auto", "float32", "float16", "bfloat16")
SAMPLED = ("samples", "length_tok", "truncate_tok", "protocol", "wording", "batch")
ALONE = ("dtype", "contexts_tok", "phases", "queries_tok", "layer")  # of latency, with a geometry only
WITH_A_MODEL = ("length_tok", "lengths_tok", "dense_max_tok")  # of latency, without one only
PHASES, CONTEXT_TOK, LEAST_CONTEXT_TOK, MOST_LAYERS = ("decode", "prefill"), 131_072, 64, 1024
# The fields of ``Task`` that each task uses; a value for another one would be ignored and still change the run key.
TASKS = {
    "infbench": ("subtasks", "edition", "data", *SAMPLED),
    "ruler": ("subtasks", "samples", "length_tok", "protocol", "batch", "data"),
    "longbench": ("subtasks", "samples", "truncate_tok", "protocol", "batch", "data"),
    "longbench2": ("samples", "truncate_tok", "protocol", "batch", "data"),
    "passkey": ("lengths_tok", "depths", *SAMPLED),
    "latency": ("length_tok", "lengths_tok", "decode_steps", "repeats", "dense_max_tok", "geometry", *ALONE, "protocol"),
    "recall": ("subtasks", "samples", "geometry", "dtype", "contexts_tok", "layer", "divisors", "phases", "wording", "protocol"),
}
TEXTS = ("drifting", "isolated_needles", "near_equal_needles")  # of recall with a geometry
OFFICIAL = ("ruler", "longbench", "longbench2")  # tasks with the official prompts only
PROTOCOLS = {"infbench": ("hipexp", "completion", "chat", "infllm", "minference"), **dict.fromkeys(OFFICIAL, ("official",))}
MOST = 2**31  # of anything counted, tokens above all
MOST_BYTES = 2**50
TRACKERS = ("local", "wandb")
BY_TRUE_POSITION = (PruneRope.dynamic, PruneRope.self_extend, PruneRope.native)
PROMPTS = ("auto", "tokens", "text", "chat")
SERVED = ("tokenizer", "prompt", "server", "concurrent", "timeout_s")  # fields of ``Model`` that a loaded one does not use
LOADED = ("dtype", "device_map", "tp_plan", "cuda_graphs", "compile", "prefill_chunk_tok")  # and a served one
TRACK_MODES = ("offline", "online", "auto", "disabled")

Key = Callable[[int, str], str]  # (stage number, field) -> the key that set it


def check_experiment(experiment: Experiment) -> None:
    """Refuse what is wrong whatever the model; raises ConfigError."""
    _check_offload(experiment.offload)
    _one_of("track", experiment.track.name, TRACKERS)
    _one_of("track.mode", experiment.track.mode, TRACK_MODES)
    _check_track(experiment.track)
    _at_least("seed", experiment.seed, 0, most=math.inf)
    _check_model_fields(experiment.model)
    _check_task(experiment.task)
    if experiment.model.base_url is not None:
        _check_served(experiment)
    if experiment.model.tp_plan is not None:
        _check_split(experiment)
    if experiment.offload.on:
        _check_offloaded(experiment)
    if experiment.pipeline is None and experiment.task.dense_max_tok is not None:
        raise ConfigError(
            f"task.dense_max_tok={experiment.task.dense_max_tok} leaves dense out beyond a length, and without a pipeline there is nothing "
            "else to time; choose a pipeline, or leave it out"
        )
    if experiment.task.name == "recall" and experiment.pipeline is None:
        raise ConfigError("task=recall measures what a pipeline selects; choose one, as in +pipeline=3stage")
    if experiment.pipeline is not None:
        _check_pipeline(experiment.pipeline, experiment.model)
        _check_prefill_alone(experiment.task, experiment.pipeline)
        _check_decode_alone(experiment.task, experiment.pipeline)


def check_model(experiment: Experiment) -> ModelFacts | None:
    """Refuse what is wrong for this model, reading its ``config.json``; None if it is on a hub.

    Raises ConfigError, also where the folder holds no model. A run calls ``check_layers`` once a hub's ``config.json`` is here.
    """
    facts = read_facts(experiment.model)
    if facts is not None:
        check_layers(experiment, facts)
    return facts


def check_layers(experiment: Experiment, facts: ModelFacts) -> None:
    """Refuse a pipeline that breaks a rule in a layer of a model with these facts, or an offload too small for it; raises ConfigError."""
    if experiment.pipeline is None:
        return
    plans = experiment.pipeline.plan(facts.layers)
    for plan in plans:
        _check_plan(experiment.pipeline, plan, experiment.model)
    if experiment.offload.on:
        check_sizes(experiment.offload, plans, facts)
        check_chunks(experiment.offload, page_tok_of(plans), experiment.model.prefill_chunk_tok)


def _check_pipeline(pipeline: Pipeline, model: Model) -> None:
    """Refuse a pipeline that breaks a rule by itself or under one of its layer groups."""
    if not pipeline.method.endswith(".py"):  # a file of the user's own
        _one_of("pipeline.method", pipeline.method, METHODS)
    if pipeline.name == DENSE:
        raise ConfigError(f"pipeline.name={DENSE} is what attention without a pipeline is called; choose another name")
    _check_stage_count(pipeline)
    _check_plan(pipeline, pipeline.plan_layer(0, []), model)
    for name, group in pipeline.layers.items():
        if not name.isidentifier():
            raise ConfigError(f"pipeline.layers has a group {name!r}; its name must be letters, digits and '_', not beginning with a digit")
        if range_parts(group.range, f"pipeline.layers.{name}.range"):
            _check_plan(pipeline, pipeline.plan_layer(0, [name]), model)


def _check_offload(offload: Offload) -> None:
    """Refuse sizes, formats and policies that are none, and any of them where nothing leaves the device."""
    if not offload.on:
        for item in fields(offload):
            value = getattr(offload, item.name)
            if item.name != "name" and value != item.default:
                raise ConfigError(f"offload.{item.name}={value} is for keys and values off the device; add offload=host, or leave it out")
        return
    _one_of("offload.format", offload.format, FORMATS)
    if offload.policy == "belady":
        raise ConfigError(f"offload.policy=belady has to know the future, and is for replay only; use {' or '.join(POLICIES)}")
    _one_of("offload.policy", offload.policy, POLICIES)
    _at_least("offload.prefill_bytes", offload.prefill_bytes, 0, most=MOST_BYTES)
    for tier in ("device", "host", "disk"):
        _check_tier(tier, getattr(offload, f"{tier}_tok"), getattr(offload, f"{tier}_bytes"))
    if offload.device_tok is None and offload.device_bytes is None:
        raise ConfigError("offload.device_tok is not set and must be a whole number: tokens of a layer that stay on the device; try 16384")
    limited = [f"offload.{name}" for name in ("disk_tok", "disk_bytes") if getattr(offload, name) is not None]
    if offload.disk_dir is None:
        if limited:
            raise ConfigError(f"{limited[0]} is for a disk tier; name its folder, as in offload.disk_dir=., or leave it out")
        return
    if offload.host_tok is None and offload.host_bytes is None:
        raise ConfigError(
            f"offload.disk_dir={offload.disk_dir} is for what host memory does not hold, and without a size of its own that holds "
            "everything; set offload.host_tok, as in offload=disk, or leave it out"
        )
    check_folder(offload)


def _check_tier(tier: str, tokens: int | None, size: int | None) -> None:
    if tokens is not None and size is not None:
        raise ConfigError(f"offload.{tier}_tok={tokens} must not stand beside offload.{tier}_bytes={size}; set one of them to null")
    if tokens is not None:
        _at_least(f"offload.{tier}_tok", tokens, 1)
    if size is not None:
        _at_least(f"offload.{tier}_bytes", size, 1, most=MOST_BYTES)


def _check_offloaded(experiment: Experiment) -> None:
    """Refuse to take from the device what everything is read of, or what a task measures there."""
    name, task = f"offload={experiment.offload.name}", experiment.task
    if task.name == "recall":
        if experiment.offload.format == "auto":
            raise ConfigError(
                f"{name} changes nothing that task=recall measures, unless offload.format does; choose bf16, fp8, int8 or int4, or use "
                "offload=none"
            )
        return
    if task.geometry is not None:
        raise ConfigError(f"{name} is for a model, and task.geometry={task.geometry} is attention alone, on the device; use offload=none")
    if experiment.pipeline is None:
        raise ConfigError(
            f"{name} must have a pipeline: without one attention is dense, and every step would read all keys and values over the link; "
            "choose one, as in +pipeline=3stage, or use offload=none"
        )
    if experiment.pipeline.method not in OFFLOADING:
        raise ConfigError(
            f"{name} must have a pipeline that reads few keys, and pipeline.method={experiment.pipeline.method} looks at all of them; "
            f"choose one with pipeline.method={' or '.join(OFFLOADING)}, or use offload=none"
        )


def _check_split(experiment: Experiment) -> None:
    """Refuse to split a model over processes where it is spread otherwise, or where one process has to have all heads."""
    model, task = experiment.model, experiment.task
    name = f"model.tp_plan={model.tp_plan}"
    _one_of("model.tp_plan", str(model.tp_plan), ("auto",))
    if model.device_map is not None:
        raise ConfigError(f"{name} must not stand beside model.device_map={model.device_map}: each puts weights elsewhere; leave one out")
    if task.geometry is not None:
        raise ConfigError(f"{name} is for a model, and task.geometry={task.geometry} is attention alone, in one process; leave it out")
    if task.name == "recall":
        raise ConfigError(
            f"{name} must not stand beside task=recall, which measures all heads, and each process would have some; leave it out, or use "
            "model.device_map=auto"
        )


def _check_track(track: Track) -> None:
    """Refuse wandb where it is not installed, or online without a key. wandb's own folder of that name is no package."""
    if track.name != "wandb":
        return
    spec = find_spec("wandb")
    if spec is None or spec.origin is None:
        raise ConfigError("track=wandb needs the package wandb, which is not installed here; `pip install wandb`, or use track=local")
    if track.mode == "online" and not has_wandb_key():
        raise ConfigError("track.mode=online needs an API key of wandb; `wandb login`, set WANDB_API_KEY, or use track.mode=offline")


def _check_model_fields(model: Model) -> None:
    _one_of("model.dtype", model.dtype, DTYPES)
    _at_least("model.prefill_chunk_tok", model.prefill_chunk_tok, 1)
    if model.trained_tok is not None:
        _at_least("model.trained_tok", model.trained_tok, 1)
    _one_of("model.prompt", model.prompt, PROMPTS)
    _at_least("model.concurrent", model.concurrent, 1, most=1024)
    _at_least("model.timeout_s", model.timeout_s, 1, most=MOST // 1000)
    if model.base_url is not None:
        _check_url(model.base_url)
        if not model.path.strip():
            raise ConfigError("model.path= must be the model's id at model.base_url, and is empty; see what the server lists under /models")
    whose = "a model that is loaded here, and a server has chosen" if model.base_url is not None else "a served model (model=openai)"
    for item in fields(model):
        value = getattr(model, item.name)
        if item.name in (SERVED if model.base_url is None else LOADED) and value != item.default:
            raise ConfigError(f"model.{item.name}={value} is for {whose}; leave it out")


def _check_url(text: str) -> None:
    """Refuse what is no address of a server. The message shows no credentials: everything else of it is written into run folders."""
    try:
        url = urlsplit(text)
        whole = text.startswith(("http://", "https://")) and bool(url.hostname) and url.port != 0
        (url.hostname or "").encode("idna")  # no part of a name is empty or longer than 63 characters
    except ValueError:
        raise ConfigError("model.base_url has a host or a port that is none; write it like http://localhost:8000/v1") from None
    if "@" in url.netloc or url.query or url.fragment:
        raise ConfigError(
            "model.base_url must not hold a user, a password or a query, since it is written into run folders; "
            "put the key into OPENAI_API_KEY"
        )
    if not text.isascii():
        raise ConfigError(
            f"model.base_url={text} must be ASCII, as addresses are sent; write other letters of a host as xn--…, of a path as %…"
        )
    if not whole or not text.isprintable() or " " in text:
        raise ConfigError(f"model.base_url={text} is no address of a server; write it like http://localhost:8000/v1")
    for end in ("/chat/completions", "/completions"):
        if url.path.rstrip("/").endswith(end):
            raise ConfigError(f"model.base_url={text} must end before {end}, which is added here; use {text.rstrip('/').removesuffix(end)}")


def _check_served(experiment: Experiment) -> None:
    """Refuse what cannot be asked of a server: another attention, and what is measured inside of a model."""
    task, repair = experiment.task, "load the model here for that, as in model=hf model.path=…"
    if experiment.pipeline is not None:
        name = experiment.pipeline.name or experiment.pipeline.method
        raise ConfigError(f"pipeline={name} changes the attention of a model, and a server's cannot be changed from here; {repair}")
    if experiment.offload.on:
        raise ConfigError(f"offload={experiment.offload.name} moves a model's keys and values, and a server's are its own; {repair}")
    if task.name in ("latency", "recall"):
        raise ConfigError(
            f"task={task.name} measures inside of a model, and a served one (model.base_url) shows only its answers; {repair}"
        )
    if task.batch != 1:
        raise ConfigError(f"task.batch={task.batch} is for a model that is loaded here; for several requests at once use model.concurrent")


def _check_task(task: Task) -> None:
    _one_of("task", task.name, TASKS)
    _one_of("task.protocol", task.protocol, PROTOCOLS.get(task.name, ("hipexp",)))
    for name in ("samples", "decode_steps", "repeats", "batch"):
        _at_least(f"task.{name}", getattr(task, name), 1)
    for name in ("length_tok", "truncate_tok", "dense_max_tok"):
        if getattr(task, name) is not None:
            _at_least(f"task.{name}", getattr(task, name), 1)
    for name in ("subtasks", "lengths_tok", "depths", "contexts_tok", "phases", "divisors"):
        if getattr(task, name) is not None:
            _check_list(f"task.{name}", getattr(task, name))
    if task.lengths_tok is not None:
        in_range = f"hold lengths from 1 to {MOST} tokens; try [8192,16384]"
        _all("task.lengths_tok", task.lengths_tok, lambda length: 1 <= length <= MOST, in_range)
    if task.depths is not None:
        _all("task.depths", task.depths, lambda depth: 0 <= depth <= 1, "hold depths from 0 to 1; try [0,0.5,1]")
    _check_used(task)
    if task.name == "latency":
        _check_attention_alone(task)
    elif task.name == "recall":
        _check_recall(task)
    else:
        from hipexp.suites import check_task

        check_task(task)


def _check_attention_alone(task: Task) -> None:
    """Latency without a model: its fields, and none of the others."""
    if task.geometry is None:
        _refuse_set(task, ALONE, "is for attention alone; name a task.geometry, or leave it out")
        return
    read_geometry(task.geometry)
    _refuse_set(task, WITH_A_MODEL, "is for latency with a model; leave it out, or task.geometry (whose lengths are task.contexts_tok)")
    _one_of("task.dtype", task.dtype, DTYPES)
    _at_least("task.queries_tok", task.queries_tok, 1)
    if task.layer is not None:
        _check_layer(task.layer)
    for phase in task.phases or PHASES:
        _one_of("task.phases", phase, PHASES)
    least = max(LEAST_CONTEXT_TOK, task.queries_tok if "prefill" in (task.phases or PHASES) else 0)
    in_range = f"hold numbers of keys from {least} to {MOST}"
    _all("task.contexts_tok", task.contexts_tok or [CONTEXT_TOK], lambda n: least <= n <= MOST, in_range)


def _check_recall(task: Task) -> None:
    from hipexp.suites import infbench

    _all("task.divisors", task.divisors or [1], lambda n: n >= 1, "hold whole numbers from 1; try [1,4,8]")
    in_range = f"hold numbers of tokens from {LEAST_CONTEXT_TOK} to {MOST}"
    _all("task.contexts_tok", task.contexts_tok or [CONTEXT_TOK], lambda n: LEAST_CONTEXT_TOK <= n <= MOST, in_range)
    infbench.check_wording(task.wording)
    if task.phases is not None and (len(task.phases) != 1 or task.phases[0] not in PHASES):
        raise ConfigError(f"task.phases={task.phases} must name one of {', '.join(PHASES)} for task=recall; try [decode]")
    if task.geometry is None:
        _refuse_set(task, ("dtype", "layer"), "is for keys without a model; name a task.geometry, or leave it out")
        infbench.check_subtasks(task.subtasks or [])
        return
    read_geometry(task.geometry)
    _refuse_set(task, ("wording",), "is for prompts of a model; leave it out, or task.geometry")
    _one_of("task.dtype", task.dtype, DTYPES)
    if task.layer is not None:
        _check_layer(task.layer)
    for text in task.subtasks or TEXTS:
        _one_of("task.subtasks", text, TEXTS)


def _check_layer(layer: int) -> None:
    if not 0 <= layer < MOST_LAYERS:
        raise ConfigError(f"task.layer={layer} must be a layer from 0 to {MOST_LAYERS - 1}; try 0")


def _check_prefill_alone(task: Task, pipeline: Pipeline) -> None:
    """The last queries of a prompt begin where a query block does."""
    if task.name != "latency" or task.geometry is None or "prefill" not in (task.phases or PHASES) or not pipeline.stages:
        return
    block = pipeline.stages[0].query_block_tok
    for number, context in enumerate(task.contexts_tok or [CONTEXT_TOK]):
        if (context - task.queries_tok) % block:
            raise ConfigError(
                f"task.contexts_tok[{number}]={context} less task.queries_tok={task.queries_tok} must be a multiple of "
                f"pipeline.stages[0].query_block_tok={block}; make both multiples of {block}"
            )


def _check_decode_alone(task: Task, pipeline: Pipeline) -> None:
    """There are as many tokens as steps, which are whole refresh periods."""
    if task.name != "latency" or task.geometry is None or "decode" not in (task.phases or PHASES):
        return
    period = math.lcm(*(stage.refresh_steps for stage in pipeline.decode or pipeline.stages)) if pipeline.stages else 1
    steps = -(-task.decode_steps // period) * period
    in_range = f"hold at least as many keys as there are decode steps, {steps} in whole refresh periods"
    _all("task.contexts_tok", task.contexts_tok or [CONTEXT_TOK], lambda n: n >= steps, in_range)


def _refuse_set(task: Task, names: tuple[str, ...], words: str) -> None:
    for item in fields(task):
        value = getattr(task, item.name)
        if item.name in names and value != item.default:
            raise ConfigError(f"task.{item.name}={value} {words}")


def _check_list(key: str, values: list) -> None:
    if not values:
        raise ConfigError(f"{key}=[] must hold a value or more; leave it out to let the task choose")
    again = [value for number, value in enumerate(values) if value in values[:number]]
    if again:
        raise ConfigError(f"{key}={values} must not hold {again[0]} twice, which would count it twice; leave one of them out")


def _check_used(task: Task) -> None:
    for item in fields(task):
        value = getattr(task, item.name)
        if item.name not in ("name", *TASKS[task.name]) and value != item.default:
            users = " or ".join(name for name, used in TASKS.items() if item.name in used)
            raise ConfigError(f"task.{item.name}={value} is for task={users}; leave it out for task={task.name}")
    if task.length_tok is not None and task.lengths_tok is not None:
        raise ConfigError(f"task.length_tok={task.length_tok} must not stand beside task.lengths_tok={task.lengths_tok}; leave one out")


def _check_stage_count(pipeline: Pipeline) -> None:
    stages, decode = len(pipeline.stages), pipeline.decode
    if pipeline.method != "hip" and (stages or decode):
        count = stages or len(decode or [])
        raise ConfigError(f"pipeline.method={pipeline.method} must have no stages, but there are {count}; try pipeline.method=hip")
    for name in ("late_refresh", "staggered_refresh"):
        if pipeline.method != "hip" and getattr(pipeline, name):
            raise ConfigError(f"pipeline.{name}=true is for pipeline.method=hip; {pipeline.method} has no stages to refresh; leave it out")
    if pipeline.method in OFFLOADING and (pipeline.params or any(group.params for group in pipeline.layers.values())):
        raise ConfigError(
            f"pipeline.params must be empty for pipeline.method={pipeline.method}, which has no such parameters; leave it out"
        )
    if pipeline.method == "hip" and (not stages or decode == []):
        key = "pipeline.decode" if stages else "pipeline.stages"
        raise ConfigError(f"{key}=[] must hold a stage or more for pipeline.method=hip; for sink and window only use +pipeline=streaming")


def _check_plan(pipeline: Pipeline, plan: LayerPlan, model: Model) -> None:
    _at_least("pipeline.sink_tok", plan.sink_tok, 0)
    window_key = _window_key(pipeline, plan)
    _at_least(window_key, plan.window_tok, 1)
    of_prompt = _stage_key(pipeline, plan)

    def of_decode(number: int, name: str) -> str:
        return of_prompt(number, name) if pipeline.decode is None else f"pipeline.decode[{number}].{name}"

    for stages, key, decode in ((plan.stages, of_prompt, False), (plan.decode, of_decode, True)):
        _check_stages(stages, key)
        _check_borders(stages, key, plan, window_key, decode)
        _check_bounds(stages, key, plan, window_key)
    for number, stage in enumerate(plan.stages):
        if model.prefill_chunk_tok % stage.query_block_tok:
            raise ConfigError(
                f"model.prefill_chunk_tok={model.prefill_chunk_tok} must be a multiple of "
                f"{_stage_key(pipeline, plan)(number, 'query_block_tok')}={stage.query_block_tok}; "
                f"try {_multiples(model.prefill_chunk_tok, stage.query_block_tok)}"
            )


def _check_borders(stages: list[Stage], key: Key, plan: LayerPlan, window_key: str, decode: bool) -> None:
    if not stages:
        return
    first, last = stages[0].chunk_tok, stages[-1].chunk_tok
    if plan.window_tok < first:
        raise ConfigError(f"{window_key}={plan.window_tok} must be at least {_short(key(0, 'chunk_tok'))}={first}; try {first}")
    if plan.sink_tok % last:
        rule = f"must be a multiple of {_short(key(len(stages) - 1, 'chunk_tok'))}={last}"
        raise ConfigError(f"pipeline.sink_tok={plan.sink_tok} {rule}; try {_multiples(plan.sink_tok, last)}")
    # The first candidates reach one chunk into the attention window. Where the window moves on by more before they are drawn again,
    # there would be tokens that are neither in it nor could have been selected.
    block, finest = stages[0].query_block_tok, stages[-1].query_block_tok
    most = finest + min(first, plan.window_tok - 1)
    if not decode and block > most:
        raise ConfigError(
            f"{key(0, 'query_block_tok')}={block} must be at most {most}, which is {_short(key(0, 'chunk_tok'))}={first} (and less than "
            f"{_short(window_key)}={plan.window_tok}) more than {_short(key(len(stages) - 1, 'query_block_tok'))}={finest}: "
            f"else tokens leave the window before they can be selected; "
            f"try {_repair(max(n for n in range(finest, most + 1, finest) if block % n == 0), [s.query_block_tok for s in stages[1:]])}"
        )
    if decode and stages[0].refresh_steps > first:
        raise ConfigError(
            f"{key(0, 'refresh_steps')}={stages[0].refresh_steps} must be at most {_short(key(0, 'chunk_tok'))}={first}: "
            f"else tokens leave the window before they can be selected; try {_repair(first, [s.refresh_steps for s in stages[1:]])}"
        )


def _repair(most: int, later: list[int]) -> str:
    """The largest value up to ``most`` that is a multiple of the next stage's, or a word that those have to be smaller too."""
    fits = most // later[0] * later[0] if later else most
    return str(fits) if fits else f"{most}, and as much at most in the stages after it"


def _check_stages(stages: list[Stage], key: Key) -> None:
    for number, stage in enumerate(stages):
        for name in ("chunk_tok", "keep_tok", "query_block_tok", "query_stride_tok", "refresh_steps"):
            _at_least(key(number, name), getattr(stage, name), 1)
        if number:
            _check_pair(stages[number - 1], stage, number, key)
        _check_stage(stage, number, key)


def _check_bounds(stages: list[Stage], key: Key, plan: LayerPlan, window_key: str) -> None:
    """Summaries serve stages whose chunks are whole, where all keys of a chunk are rotated alike."""
    longest = stages[0].chunk_tok if stages else 0
    for number, stage in enumerate(stages):
        if stage.representative is not Representative.bounds:
            if stage.piece_tok is not None:
                raise ConfigError(
                    f"{key(number, 'piece_tok')}={stage.piece_tok} is for {_short(key(number, 'representative'))}=bounds, here it is "
                    f"{stage.representative.value}; leave it out"
                )
            continue
        if stage.piece_tok is not None and (stage.piece_tok < 1 or stage.chunk_tok % stage.piece_tok):
            raise ConfigError(
                f"{key(number, 'piece_tok')}={stage.piece_tok} must divide {_short(key(number, 'chunk_tok'))}={stage.chunk_tok}; "
                f"try {_divisors(stage.chunk_tok, stage.piece_tok)}"
            )
        if stage.rope in BY_TRUE_POSITION:
            raise ConfigError(
                f"{key(number, 'representative')}=bounds must not stand beside pruning at true positions, here {stage.rope.value}: "
                f"the keys of a chunk have to be rotated alike; try pipeline.rope.prune=relative, chunk_indexed or infllm"
            )
        if plan.window_tok < 2 * longest:
            raise ConfigError(
                f"{window_key}={plan.window_tok} must be at least {2 * longest}, twice {_short(key(0, 'chunk_tok'))}, for "
                f"{_short(key(number, 'representative'))}=bounds: else chunks would end behind the query; try {2 * longest}"
            )


def _check_stage(stage: Stage, number: int, key: Key) -> None:
    def refuse(name: str, rule: str, repair: str) -> None:
        raise ConfigError(f"{key(number, name)}={getattr(stage, name)} must {rule}; try {repair}")

    chunk, keep, block = stage.chunk_tok, stage.keep_tok, stage.query_block_tok
    if chunk & (chunk - 1):
        lower = 1 << (chunk.bit_length() - 1)
        refuse("chunk_tok", "be a power of two", f"{lower} or {2 * lower}")
    if keep % chunk:
        refuse("keep_tok", f"be a multiple of {_short(key(number, 'chunk_tok'))}={chunk}", _multiples(keep, chunk))
    if block % stage.query_stride_tok:
        repair = _divisors(block, stage.query_stride_tok)
        refuse("query_stride_tok", f"divide {_short(key(number, 'query_block_tok'))}={block}", repair)


def _check_pair(before: Stage, stage: Stage, number: int, key: Key) -> None:
    def refuse(name: str, rule: str, repair: str) -> None:
        value, other = getattr(stage, name), getattr(before, name)
        raise ConfigError(f"{key(number, name)}={value} must {rule} {_short(key(number - 1, name))}={other}; try {repair}")

    if before.chunk_tok % stage.chunk_tok:
        refuse("chunk_tok", "divide", _divisors(before.chunk_tok, stage.chunk_tok))
    if stage.keep_tok > before.keep_tok:
        refuse("keep_tok", "be at most", str(before.keep_tok))
    if before.query_block_tok % stage.query_block_tok:
        refuse("query_block_tok", "divide", _divisors(before.query_block_tok, stage.query_block_tok))
    if before.refresh_steps % stage.refresh_steps:
        earlier, later = key(number - 1, "refresh_steps"), key(number, "refresh_steps")
        raise ConfigError(
            f"{earlier}={before.refresh_steps} must be a multiple of {_short(later)}={stage.refresh_steps}; "
            f"try {_multiples(before.refresh_steps, stage.refresh_steps)}"
        )


def _multiples(near: int, of: int) -> str:
    """The multiples of ``of`` next to ``near``, as in ``256 or 288``."""
    return " or ".join(str(n) for n in (near // of * of, -(-near // of) * of) if n)


def _divisors(number: int, near: int) -> str:
    """The divisors of ``number`` next to ``near``, as in ``32 or 64``."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below, above = [n for n in divisors if n < near], [n for n in divisors if n > near]
    return " or ".join(str(n) for n in below[-1:] + above[:1])


def _stage_key(pipeline: Pipeline, plan: LayerPlan) -> Key:
    """Names the key that set a stage's field in this layer: the last group that overrides it, else the stage itself."""

    def key(number: int, name: str) -> str:
        for group in reversed(plan.groups):
            override = pipeline.layers[group].stages.get(str(number))
            if override is not None and getattr(override, name) is not None:
                return f"pipeline.layers.{group}.stages.{number}.{name}"
        return f"pipeline.stages[{number}].{name}"

    return key


def _window_key(pipeline: Pipeline, plan: LayerPlan) -> str:
    groups = [name for name in plan.groups if pipeline.layers[name].window_tok is not None]
    return f"pipeline.layers.{groups[-1]}.window_tok" if groups else "pipeline.window_tok"


def _short(key: str) -> str:
    return key.removeprefix("pipeline.")


def _at_least(key: str, value: int, least: int, most: float = MOST) -> None:
    if value < least:
        raise ConfigError(f"{key}={value} must be at least {least}; try {max(least, 1)}")
    if value > most:
        raise ConfigError(f"{key}={value} must be at most {most}, as much as fits nowhere; try {1 << 20}")


def _one_of(key: str, value: str, known: Iterable[str]) -> None:
    known = tuple(known)
    if value not in known:
        raise ConfigError(f"{key}={value or repr(value)} is unknown; use {' or '.join(known)}")


def _all(key: str, values: list, rule: Callable[[float], bool], words: str) -> None:
    if not all(map(rule, values)):
        raise ConfigError(f"{key}={values} must {words}")
