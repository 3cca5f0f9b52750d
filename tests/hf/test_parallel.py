"""A model split over two processes on the CPU answers as the whole one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from hipexp.attention.methods import method_class
from hipexp.config.check import METHODS as KNOWN
from hipexp.config.compose import compose
from hipexp.config.processes import started
from hipexp.config.schema import ConfigError, Model
from hipexp.hf import load
from hipexp.hf.families import FAMILIES
from hipexp.hf.parallel import check_heads
from hipexp.run.identity import key_of
from hipexp.run.ledger import is_done, read_json, read_rows
from hipexp.run.models_table import checkpoint
from split import METHODS, MODELS, everything, through_the_library

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RUN = ["-m", "hipexp", "+pipeline=3stage", "model.tp_plan=auto", "task=passkey", "task.lengths_tok=[800]", "task.depths=[0.5]"]
SMALL = [f"pipeline.stages.{i}.keep_tok={n}" for i, n in enumerate((256, 128, 64))] + [
    "pipeline.window_tok=256",
    "pipeline.layers.early.range=''",
]


def torchrun(*words, **more):
    """Two processes, one thread each; what they printed."""
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"} | more
    )
    return subprocess.run([*TORCHRUN, *map(str, words)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("split")
    for name, family in MODELS.items():
        checkpoint(family, made / name)
    return made


@pytest.fixture(scope="module")
def told(folder):
    """What both processes found."""
    done = torchrun(Path(__file__).with_name("split.py"), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"told-{i}.json").read_text()) for i in range(2)]


def test_answers_are_those_of_the_whole_model(told, folder):
    whole = json.loads(json.dumps(everything(folder)))
    assert told[0]["answers"].keys() == whole.keys()
    wrong = [name for name, answer in whole.items() if not told[0]["answers"][name] == told[1]["answers"][name] == answer]
    assert not wrong
    seen = [name for name, (_, pruned) in whole.items() if not pruned]
    assert not seen, "a pipeline that prunes nothing shows nothing"


def test_the_library_on_a_model_that_the_user_split(told, folder):
    assert told[0]["library"] == told[1]["library"] == through_the_library(folder)


def test_processes_decide_together(told):
    first, second = (one["agreed"] for one in told)
    for found in (first, second):
        assert found["tokens"] == [0, 5]
        assert "is not supported: on 48 tokens" in found["check"]
        assert "does not say that it works with some of the heads, and this model is split over 2 processes" in found["own method"]


def test_every_method_is_tried():
    assert {*METHODS, "hip"} == set(KNOWN) and all(method_class(name).splits for name in KNOWN)


def test_what_cannot_be_split_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"model\.tp_plan=auto splits a model over processes, .* start them with `torchrun --nproc-per-node 2"
    ):
        load(Model(path=str(folder / "grouped"), tp_plan="auto"))
    with pytest.raises(ConfigError, match=r"3 processes must each have .* 6 heads and 2 .* use 2 \(torchrun --nproc-per-node 2\)"):
        check_heads(LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2), 3)
    with pytest.raises(ConfigError, match=r"2 divides not both; use model\.device_map=auto instead"):
        check_heads(LlamaConfig(num_attention_heads=4, num_key_value_heads=1), 2)
    pretend(monkeypatch)
    with pytest.raises(ConfigError, match=r"and for 'stablelm' .* it has none; use model\.device_map=auto"):
        load(Model(path=str(checkpoint(FAMILIES["StableLM (partial RoPE)"], tmp_path / "model")), tp_plan="auto"))


def test_how_many_processes_is_no_other_result_but_another_time(monkeypatch):
    words, timed = ["task=passkey", "task.lengths_tok=[300]"], ["task=latency", "task.lengths_tok=[300]"]
    alone = key_of(compose(words)), key_of(compose(timed))
    pretend(monkeypatch, number=1)
    assert started().count == 2
    assert key_of(compose([*words, "model.tp_plan=auto"])) == alone[0]
    other = key_of(compose([*timed, "model.tp_plan=auto"]))
    pretend(monkeypatch, number=0)
    assert alone[1] != other == key_of(compose([*timed, "model.tp_plan=auto"]))


def pretend(monkeypatch, number=0):
    """As if torchrun had started two processes."""
    told = {"RANK": number, "WORLD_SIZE": 2, "LOCAL_RANK": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.slow
def test_a_run_of_two_processes_leaves_one_folder(tmp_path):
    done = torchrun(*RUN, *SMALL, "task.samples=2", HIPEXP_RUNS=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = tmp_path.glob("*/*")
    assert done.stdout.splitlines()[-1] == str(folder) and done.stdout.count(str(folder)) == 1
    assert is_done(folder, read_json(folder / "status.json")["run_key"])
    card = read_json(folder / "card.json")
    assert card["model"]["tp_processes"] == 2 and "tensor parallel over 2 processes, each with 2 of 4 heads" in "\n".join(card["strategy"])
    assert [row["exact"] for row in read_rows(folder)] == [False, False]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run_which_goes_on_later(tmp_path):
    (tmp_path / "fail.py").write_text(FAILING)
    words = [*RUN[2:], *SMALL, "task.samples=3"]
    done = torchrun(tmp_path / "fail.py", *words, HIPEXP_RUNS=str(tmp_path / "runs"))
    assert done.returncode == 1 and "error (process 1 of 2): no more of this" in done.stderr
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert read_json(folder / "status.json")["state"] == "failed" and len(read_rows(folder)) == 1
    done = torchrun("-m", "hipexp", *words, HIPEXP_RUNS=str(tmp_path / "runs"))
    assert done.returncode == 0 and "continuing after 1 finished sample(s)" in done.stdout
    assert is_done(folder, read_json(folder / "status.json")["run_key"]) and len(read_rows(folder)) == 3


FAILING = """
import os, sys
from hipexp import cli, hf
from hipexp.run.ledger import RunFailed

generate, calls = hf.generate, []

def second_fails(*args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 1:
        raise RunFailed("no more of this")
    return generate(*args, **kwargs)

hf.generate = second_fails
sys.exit(cli.main())
"""
