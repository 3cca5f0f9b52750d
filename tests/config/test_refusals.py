"""Every mistake is refused with key, value, rule and repair."""

import dataclasses
import json
import shutil
import sys

import pytest

from hipexp.config.check import TASKS, check_experiment, check_layers, check_model
from hipexp.config.compose import compose, conf_dir
from hipexp.config.model import ModelFacts
from hipexp.config.schema import ConfigError, Experiment, Model, Task, Track

S3 = "+pipeline=3stage"
CASES = {
    "chunk divides the previous": (
        [S3, "pipeline.stages.1.chunk_tok=48"],
        "pipeline.stages[1].chunk_tok=48 must divide stages[0].chunk_tok=256; try 32 or 64",
    ),
    "chunk is a power of two": (
        [S3, "pipeline.stages.0.chunk_tok=48"],
        "pipeline.stages[0].chunk_tok=48 must be a power of two; try 32 or 64",
    ),
    "dense alone cannot be left out": (
        ["task=latency", "task.dense_max_tok=300"],
        "task.dense_max_tok=300 leaves dense out beyond a length, and without a pipeline there is nothing else to time; choose a pipeline",
    ),
    "a plan that there is not": (["model.tp_plan=colwise"], "model.tp_plan=colwise is unknown; use auto"),
    "two ways to place weights": (
        ["model.tp_plan=auto", "model.device_map=auto"],
        "model.tp_plan=auto must not stand beside model.device_map=auto: each puts weights elsewhere; leave one out",
    ),
    "some of the heads measured": (
        [S3, "model.tp_plan=auto", "task=recall"],
        "model.tp_plan=auto must not stand beside task=recall, which measures all heads, and each process would have some; leave it out, or use "
        "model.device_map=auto",
    ),
    "attention alone over processes": (
        ["model.tp_plan=auto", "task=latency", "task.geometry=llama31_8b"],
        "model.tp_plan=auto is for a model, and task.geometry=llama31_8b is attention alone, in one process; leave it out",
    ),
    "chunk is positive": ([S3, "pipeline.stages.0.chunk_tok=0"], "pipeline.stages[0].chunk_tok=0 must be at least 1; try 1"),
    "a block that leaves its window behind": (
        [S3, "pipeline.stages.0.query_block_tok=1024"],
        "pipeline.stages[0].query_block_tok=1024 must be at most 320, which is stages[0].chunk_tok=256 (and less than window_tok=1024) more "
        "than stages[2].query_block_tok=64: else tokens leave the window before they can be selected; try 256",
    ),
    "a refresh that lets tokens pass": (
        [S3, "pipeline.stages.0.refresh_steps=512"],
        "pipeline.stages[0].refresh_steps=512 must be at most stages[0].chunk_tok=256: else tokens leave the window before they can be "
        "selected; try 256",
    ),
    "a refresh in decode that lets tokens pass": (
        ["+pipeline=3stage_flash", "pipeline.stages.0.chunk_tok=64"],
        "stages[0].refresh_steps=96 must be at most stages[0].chunk_tok=64: else tokens leave the window before they can be selected; try 48",
    ),
    "a range is text": (
        [S3, "pipeline.layers={late: {range: [3,4], window_tok: 512}}"],
        "pipeline.layers.late.range=[3, 4] must be text, as in pipeline.layers.late.range='3,4'",
    ),
    "a group's fields at once": (
        ["pipeline={window_tok: 512}"],
        "give fields one by one, as in pipeline.name=…",
    ),
    "sizes have a ceiling": ([S3, "pipeline.sink_tok=1e12"], "pipeline.sink_tok=1000000000000 must be at most 2147483648"),
    "keep is a multiple of its chunk": (
        [S3, "pipeline.stages.2.keep_tok=100"],
        "pipeline.stages[2].keep_tok=100 must be a multiple of stages[2].chunk_tok=8; try 96 or 104",
    ),
    "keep does not grow": (
        [S3, "pipeline.stages.2.keep_tok=16384"],
        "pipeline.stages[2].keep_tok=16384 must be at most stages[1].keep_tok=8192; try 8192",
    ),
    "refresh is a multiple of the next": (
        [S3, "pipeline.stages.0.refresh_steps=12"],
        "pipeline.stages[0].refresh_steps=12 must be a multiple of stages[1].refresh_steps=8; try 8 or 16",
    ),
    "query block divides the previous": (
        [S3, "pipeline.stages.1.query_block_tok=48"],
        "pipeline.stages[1].query_block_tok=48 must divide stages[0].query_block_tok=64; try 32 or 64",
    ),
    "query block is positive": ([S3, "pipeline.stages.0.query_block_tok=0"], "pipeline.stages[0].query_block_tok=0 must be at least 1"),
    "stride divides its block": (
        [S3, "pipeline.stages.0.query_stride_tok=5"],
        "pipeline.stages[0].query_stride_tok=5 must divide stages[0].query_block_tok=64; try 4 or 8",
    ),
    "window holds the first chunk": (
        [S3, "pipeline.window_tok=128"],
        "pipeline.window_tok=128 must be at least stages[0].chunk_tok=256; try 256",
    ),
    "sink is a multiple of the last chunk": (
        [S3, "pipeline.sink_tok=100"],
        "pipeline.sink_tok=100 must be a multiple of stages[2].chunk_tok=8; try 96 or 104",
    ),
    "sink is not negative": ([S3, "pipeline.sink_tok=-8"], "pipeline.sink_tok=-8 must be at least 0"),
    "a group's window": (
        [S3, "pipeline.layers.early.window_tok=128"],
        "pipeline.layers.early.window_tok=128 must be at least stages[0].chunk_tok=256; try 256",
    ),
    "a group's stage": (
        [S3, "pipeline.layers.early.stages.2.keep_tok=4100"],
        "pipeline.layers.early.stages.2.keep_tok=4100 must be a multiple of stages[2].chunk_tok=8; try 4096 or 4104",
    ),
    "a group's stage against the one before": (
        [S3, "pipeline.layers.early.stages.1.keep_tok=2048"],
        "pipeline.layers.early.stages.2.keep_tok=4096 must be at most layers.early.stages.1.keep_tok=2048; try 2048",
    ),
    "a group's missing stage": (
        [S3, "pipeline.layers.early.stages.3.keep_tok=2048"],
        "pipeline.layers.early.stages.3 names a missing stage: stages are numbered 0 to 2",
    ),
    "a group's range": (
        [S3, "pipeline.layers.early.range=first"],
        "pipeline.layers.early.range='first' must list layers; write it like '0-2'",
    ),
    "a group without range": ([S3, "pipeline.layers.late.window_tok=2048"], "pipeline.layers.late.range is not set and must be text"),
    "a group's name": ([S3, "pipeline.layers.3rd={range: '3'}"], "pipeline.layers.3rd names '3rd', which must be letters"),
    "a group's number": ([S3, "pipeline.layers.3={range: '3'}"], "pipeline.layers has a group '3'; its name must be letters"),
    "a decode stage": (
        ["+pipeline=3k_5k", "pipeline.decode.1.chunk_tok=24"],
        "pipeline.decode[1].chunk_tok=24 must divide decode[0].chunk_tok=64; try 16 or 32",
    ),
    "decode that is not there": (
        [S3, "pipeline.decode.0.keep_tok=64"],
        "pipeline.decode is not set, so that pipeline.decode.0 does not exist",
    ),
    "a stage that is not there": (
        [S3, "pipeline.stages.3.keep_tok=64"],
        "pipeline.stages.3.keep_tok=64: there is no entry with this number",
    ),
    "hip without stages": ([S3, "pipeline.stages=[]"], "pipeline.stages=[] must hold a stage or more for pipeline.method=hip"),
    "hip without decode stages": ([S3, "pipeline.decode=[]"], "pipeline.decode=[] must hold a stage or more for pipeline.method=hip"),
    "streaming with stages": (
        [S3, "pipeline.method=streaming"],
        "pipeline.method=streaming must have no stages, but there are 3; try pipeline.method=hip",
    ),
    "an unknown method": ([S3, "pipeline.method=snap"], "pipeline.method=snap is unknown; use h2o or hip or "),
    "an unknown representative": (
        [S3, "pipeline.stages.0.representative=bound"],
        "pipeline.stages.0.representative=bound is unknown; did you mean bounds?",
    ),
    "bounds at true positions": (
        [S3, "pipeline.stages.0.representative=bounds", "pipeline.rope.prune=native"],
        "pipeline.stages[0].representative=bounds must not stand beside pruning at true positions, here native: the keys of a chunk have to "
        "be rotated alike; try pipeline.rope.prune=relative, chunk_indexed or infllm",
    ),
    "bounds without room": (
        [S3, "pipeline.stages.0.representative=bounds", "pipeline.window_tok=448"],
        "pipeline.window_tok=448 must be at least 512, twice stages[0].chunk_tok, for stages[0].representative=bounds: else chunks would end "
        "behind the query; try 512",
    ),
    "bounds without room, in a later stage": (
        [S3, "pipeline.stages.1.representative=bounds", "pipeline.window_tok=448"],
        "pipeline.window_tok=448 must be at least 512, twice stages[0].chunk_tok, for stages[1].representative=bounds: else chunks would end "
        "behind the query; try 512",
    ),
    "pieces of keys that are no part of a chunk": (
        ["+pipeline=3stage_scan", "pipeline.stages.1.piece_tok=48"],
        "pipeline.stages[1].piece_tok=48 must divide stages[1].chunk_tok=32; try 32",
    ),
    "pieces where keys are probed": (
        ["+pipeline=3stage_scan", "pipeline.stages.2.piece_tok=8"],
        "pipeline.stages[2].piece_tok=8 is for stages[2].representative=bounds, here it is exact; leave it out",
    ),
    "refreshes where there are no stages": (
        ["+pipeline=quest", "pipeline.staggered_refresh=true"],
        "pipeline.staggered_refresh=true is for pipeline.method=hip; quest has no stages to refresh; leave it out",
    ),
    "an unknown RoPE": ([S3, "pipeline.rope.prune=relatve"], "pipeline.rope.prune=relatve is unknown; did you mean relative?"),
    "prefill in query blocks": (
        [S3, "model.prefill_chunk_tok=1000"],
        "model.prefill_chunk_tok=1000 must be a multiple of pipeline.stages[0].query_block_tok=64; try 960 or 1024",
    ),
    "samples": (["task.samples=0"], "task.samples=0 must be at least 1; try 1"),
    "batch": (["task.batch=0"], "task.batch=0 must be at least 1; try 1"),
    "decode steps": (["task=latency", "task.decode_steps=0"], "task.decode_steps=0 must be at least 1; try 1"),
    "length": (["task.length_tok=-5"], "task.length_tok=-5 must be at least 1"),
    "lengths": (
        ["task=passkey", "task.lengths_tok=[0]"],
        "task.lengths_tok=[0] must hold lengths from 1 to 2147483648 tokens; try [8192,16384]",
    ),
    "a geometry that is none": (
        ["task=latency", "task.geometry=llama"],
        "task.geometry=llama is unknown; use llama31_8b, llama32_1b, qwen25_7b, qwen3_8b, needle, or query heads, key/value heads and head "
        "dimension as in 32/8/128",
    ),
    "heads that cannot be grouped": (
        ["task=latency", "task.geometry=30/8/128"],
        "task.geometry=30/8/128 must have a multiple of its 8 key/value heads as query heads; try 32/8/128",
    ),
    "a dimension that cannot be rotated in pairs": (
        ["task=latency", "task.geometry=32/8/90"],
        "task.geometry=32/8/90 must have a head dimension that is a multiple of 4; try 32/8/88",
    ),
    "lengths of prompts without a model": (
        ["task=latency", "task.geometry=needle", "task.lengths_tok=[8192]"],
        "task.lengths_tok=[8192] is for latency with a model; leave it out, or task.geometry (whose lengths are task.contexts_tok)",
    ),
    "keys without a geometry": (
        ["task=latency", "task.contexts_tok=[8192]"],
        "task.contexts_tok=[8192] is for attention alone; name a task.geometry, or leave it out",
    ),
    "fewer keys than queries": (
        ["task=latency", "task.geometry=needle", "task.contexts_tok=[512]"],
        "task.contexts_tok=[512] must hold numbers of keys from 1024 to 2147483648",
    ),
    "a prefill that begins inside a query block": (
        [S3, "task=latency", "task.geometry=needle", "task.contexts_tok=[10000]"],
        "task.contexts_tok[0]=10000 less task.queries_tok=1024 must be a multiple of pipeline.stages[0].query_block_tok=64; make both multiples of 64",
    ),
    "a phase": (["task=latency", "task.geometry=needle", "task.phases=[decod]"], "task.phases=decod is unknown; use decode or prefill"),
    "no lengths": (["task=passkey", "task.lengths_tok=[]"], "task.lengths_tok=[] must hold a value or more; leave it out"),
    "no subtasks": (["task.subtasks=[]"], "task.subtasks=[] must hold a value or more; leave it out to let the task choose"),
    "a length twice": (
        ["task=passkey", "task.lengths_tok=[8192,16384,8192]"],
        "task.lengths_tok=[8192, 16384, 8192] must not hold 8192 twice, which would count it twice; leave one of them out",
    ),
    "a depth twice": (["task=passkey", "task.depths=[0.5,0,0.50]"], "task.depths=[0.5, 0.0, 0.5] must not hold 0.5 twice"),
    "one length and several": (
        ["task=latency", "task.length_tok=8192", "task.lengths_tok=[16384]"],
        "task.length_tok=8192 must not stand beside task.lengths_tok=[16384]; leave one out",
    ),
    "a field of another task": (
        ["task=passkey", "task.decode_steps=20"],
        "task.decode_steps=20 is for task=latency; leave it out for task=passkey",
    ),
    "a grid for infbench": (
        ["task.lengths_tok=[8192]"],
        "task.lengths_tok=[8192] is for task=passkey or latency; leave it out for task=infbench",
    ),
    "samples of latency": (
        ["task=latency", "task.samples=3"],
        "task.samples=3 is for task=infbench or ruler or longbench or longbench2 or passkey",
    ),
    "a prefill chunk for a group": (
        [S3, "pipeline.layers.early.stages.0.query_block_tok=128", "model.prefill_chunk_tok=64"],
        "model.prefill_chunk_tok=64 must be a multiple of pipeline.layers.early.stages.0.query_block_tok=128; try 128",
    ),
    "groups that are nothing": (
        [S3, "pipeline.layers={}"],
        "pipeline.layers={} would change nothing; remove a layer group by its name, as in ~pipeline.layers.early",
    ),
    "a group that is nothing": (
        [S3, "pipeline.layers.early=None"],
        "pipeline.layers.early=None would change nothing; remove a layer group",
    ),
    "a removal of nothing": ([S3, "~pipeline.layers.nope"], "'pipeline.layers.nope' does not exist; --cfg job shows what there is"),
    "an empty number": ([S3, "pipeline.stages.2.keep_tok="], "keep_tok= must be a whole number, as in pipeline.stages.2.keep_tok=1024"),
    "Hydra's own settings": (["hydra/launcher=joblib"], "hydra/launcher=joblib is about how a sweep is run; add -m, or leave it out"),
    "several points shown": (["--cfg", "job", "-m"], "--cfg job shows one point, and -m asks for several; leave one of them out"),
    "online without a key": (["track=wandb", "track.mode=online"], "track.mode=online needs an API key of wandb; `wandb login`"),
    "depths": (["task=passkey", "task.depths=[50]"], "task.depths=[50.0] must hold depths from 0 to 1; try [0,0.5,1]"),
    "an unknown subtask": (["task.subtasks=[passkeys]"], "unknown subtask 'passkeys'; known: passkey, number_string, kv_retrieval"),
    "subtasks of a task without": (
        ["task=passkey", "task.subtasks=[kv_retrieval]"],
        "task.subtasks=['kv_retrieval'] is for task=infbench or ruler or longbench or recall; leave it out for task=passkey",
    ),
    "official data": (["task.subtasks=[code_debug]"], "needs official data"),
    "protocol": (["task.protocol=official"], "task.protocol=official is unknown; use hipexp"),
    "dtype": (["model.dtype=fp32"], "model.dtype=fp32 is unknown; use auto or float32 or float16 or bfloat16"),
    "no model": (["model=hf"], "model.path is not set and must be text; give it, as in model.path=…"),
    "offload": (["offload=hots"], "offload=hots is unknown; did you mean host? known here: disk, host, none"),
    "tracker": (["track=mlflow"], "track=mlflow is unknown; known here: local, wandb"),
    "tracker mode": (["track=wandb", "track.mode=offlin"], "track.mode=offlin is unknown; use offline or online or auto or disabled"),
    "seed": (["seed=-1"], "seed=-1 must be at least 0"),
    "an interpolation into nothing": (["seed=${sead}"], "sead"),
}


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    """Nobody is logged in to wandb."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("argv, message", CASES.values(), ids=CASES)
def test_refused(argv, message):
    with pytest.raises(ConfigError) as caught:
        compose(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_that_selects_no_layer_of_the_model():
    experiment = compose([S3, "pipeline.layers.early.range='7-9'"])
    check_layers(experiment, ModelFacts(32, 8192))
    with pytest.raises(
        ConfigError, match=r"pipeline\.layers\.early\.range='7-9' selects no layer: the model has layers 0 to 4; change the range"
    ):
        check_layers(experiment, ModelFacts(5, 8192))


def test_two_groups_that_are_good_alone_and_bad_together():
    first = "pipeline.layers.early={range: '0-2', stages: {1: {keep_tok: 4096}}}"
    second = "pipeline.layers.some={range: '2-3', stages: {2: {keep_tok: 8192}}}"
    experiment = compose([S3, first, second])
    with pytest.raises(
        ConfigError, match=r"pipeline\.layers\.some\.stages\.2\.keep_tok=8192 must be at most layers\.early\.stages\.1\.keep_tok=4096"
    ):
        check_layers(experiment, ModelFacts(5, 8192))


def test_facts_come_from_the_model_folder(model_path):
    assert check_model(compose([S3, *model_path])) == ModelFacts(5, 6144)
    assert check_model(compose([S3, *model_path, "model.trained_tok=4096"])) == ModelFacts(5, 4096)


def test_a_model_on_a_hub_is_checked_later():
    assert check_model(compose(["model=hf", "model.path=org/model"])) is None


def test_a_path_that_is_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path=.*/nowhere is no folder here and no hub id like 'org/model'"):
        check_model(compose(["model=hf", f"model.path={tmp_path}/nowhere"]))


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match=r"must hold a model, but .* has no readable config\.json; check the path"):
        check_model(compose(["model=hf", f"model.path={tmp_path}"]))


def test_a_model_without_trained_length(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    with pytest.raises(ConfigError, match=r"set model\.trained_tok"):
        check_model(compose(["model=hf", f"model.path={tmp_path}"]))
    assert check_model(compose(["model=hf", f"model.path={tmp_path}", "model.trained_tok=4096"])) == ModelFacts(2, 4096)


def test_a_group_that_is_switched_off_does_not_decide_the_prefill_chunk():
    off = ["pipeline.layers.early.range=''", "pipeline.layers.early.stages.0.query_block_tok=128"]
    assert compose([S3, *off, "model.prefill_chunk_tok=64"]).model.prefill_chunk_tok == 64


@pytest.mark.parametrize("text", ["[]", "7", "{", ""])
def test_a_model_whose_config_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"has no readable config\.json; check the path"):
        check_model(compose(["model=hf", f"model.path={tmp_path}"]))


def test_every_field_of_a_task_is_used_by_some_task():
    names = {item.name for item in dataclasses.fields(Task)} - {"name"}
    assert names == set().union(*TASKS.values())


def test_a_key_of_wandb_may_lie_in_netrc(tmp_path, monkeypatch):
    online = ["track=wandb", "track.mode=online"]
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    (tmp_path / ".netrc").write_text("machine elsewhere.example\n  login user\n  password secret\n")
    with pytest.raises(ConfigError, match="needs an API key"):
        compose(online)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert compose(online).track.mode == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    with pytest.raises(ConfigError, match="needs an API key"):
        compose(online)
    (tmp_path / ".netrc").write_text("machine wandb.example:8080\n  login user\n  password secret\n")
    assert compose(online).track.mode == "online"
    monkeypatch.delenv("WANDB_BASE_URL")
    with pytest.raises(ConfigError, match="needs an API key"):
        compose(online)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example:8080\n")
    assert compose(online).track.mode == "online"


@pytest.mark.parametrize("folder", [False, True])
def test_wandb_must_be_installed(monkeypatch, tmp_path, folder):
    """A run of wandb leaves a folder ``wandb``, which Python would take for a package."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if folder:
        (tmp_path / "wandb").mkdir()
    with pytest.raises(ConfigError, match="track=wandb needs the package wandb, which is not installed here; `pip install wandb`"):
        check_experiment(Experiment(Model("org/model"), Task("infbench"), track=Track("wandb")))


def test_a_configuration_file_that_is_no_yaml(monkeypatch, tmp_path):
    shutil.copytree(conf_dir(), tmp_path / "conf")
    (tmp_path / "conf" / "pipeline" / "mine.yaml").write_text("method: hip\nstages: [{chunk_tok: 8\n")
    monkeypatch.setenv("HIPEXP_CONF", str(tmp_path / "conf"))
    with pytest.raises(ConfigError, match=r"pipeline/mine\.yaml line 3 is no YAML: expected .*; mend it"):
        compose(["+pipeline=mine"])
