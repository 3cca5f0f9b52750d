"""``doctor`` with the words of a run: what it needs, what there is, and what would make it fit."""

import json

import pytest
import torch
from transformers import LlamaConfig

from hipexp import cli
from hipexp.config.offload import Room
from hipexp.run import fits
from hipexp.suites.sample import DataMissing

MB = 1 << 20
LENGTH_TOK = 65536


@pytest.fixture
def folder(tmp_path):
    """A model's configuration without weights: 8 KiB of keys and values a token, 512 MiB for ``LENGTH_TOK``."""
    LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
        max_position_embeddings=8192,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    return tmp_path / "model"


@pytest.fixture
def words(folder):
    return ["model=hf", f"model.path={folder}", "task=latency", f"task.length_tok={LENGTH_TOK}", "task.decode_steps=15"]


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpu, host, disk)`` in MiB; a GPU of 0 is none."""

    def make(gpu, host, disk=0):
        monkeypatch.setattr(fits, "room_for", lambda offload: Room(host * MB, disk * MB if offload.disk_dir else None))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu > 0)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu * MB, gpu * MB))

    return make


def told(capsys, *words):
    code = cli.main(["doctor", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_data_and_packages_that_are_missing_are_told(words, machine, capsys, monkeypatch, tmp_path):
    machine(0, 4000)
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr("hipexp.suites.longbench.LongBench.packages", lambda self, subtask: ("rogue",))
    chosen = [*words[:2], "task=longbench", "task.truncate_tok=4096"]
    assert cli.main(["doctor", *chosen]) == 1
    out = capsys.readouterr().out
    assert "missing: the official suites need rogue, which is not installed" in out and "missing: longbench needs data.zip" in out
    assert out.splitlines()[-1] == "fits; it cannot run before that is here" and "weights are not here yet" in out
    code, report = told(capsys, *chosen)
    assert code == 1 and report["fits"] and len(report["missing"]) == 2 and not report["weights_here"]


def test_files_that_ruler_lacks_are_told(words, machine, capsys, monkeypatch, tmp_path):
    machine(0, 4000)
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path))
    chosen = [*words[:2], "task=ruler", "task.length_tok=4096", "seed=42"]
    code, report = told(capsys, *chosen, "task.subtasks=[niah_single_2]")
    assert (
        code == 1
        and report["fits"]
        and [one.split(": ")[0] for one in report["missing"]] == [f"{tmp_path}/ruler/PaulGrahamEssays.json is missing"]
    )
    assert told(capsys, *chosen, "task.subtasks=[niah_single_1]")[0] == 0


def test_a_run_that_fits(words, machine, capsys):
    machine(0, 4000)
    assert cli.main(["doctor", "+pipeline=3stage", *words]) == 0
    text = capsys.readouterr().out
    assert f"3stage, offload=none: a prompt of {LENGTH_TOK - 16} tokens and 16 new" in text
    assert text.rstrip().endswith("fits") and "keys and values" in text and "can be had" in text
    code, report = told(capsys, "+pipeline=3stage", *words)
    assert code == 0 and report["fits"] and report["repair"] is None
    assert report["bytes"]["kv"] == LENGTH_TOK * 4 * 2 * 4 * 64 * 4
    assert report["needs"]["host"] == report["bytes"]["weights"] + max(report["bytes"]["prefill_peak"], report["bytes"]["decode_peak"])


def test_a_gpu_that_is_too_small_is_told_to_offload_and_that_then_fits(words, machine, capsys):
    machine(400, 4000)
    code, report = told(capsys, "+pipeline=3stage", *words)
    assert code == 1 and not report["fits"] and report["repair"] == ["offload=host"]
    code, report = told(capsys, "+pipeline=3stage", *words, *report["repair"])
    assert code == 0 and report["needs"]["host"] == 512 * MB == report["bytes"]["host"]


def test_host_memory_that_is_too_small_as_well_is_helped_by_a_disk(words, machine, capsys):
    machine(400, 300, 4000)
    code, report = told(capsys, "+pipeline=3stage", *words)
    assert code == 1 and report["repair"][0] == "offload=disk" and report["repair"][1].startswith("offload.host_tok=")
    code, report = told(capsys, "+pipeline=3stage", *words, *report["repair"])
    assert code == 0 and 250 * MB < report["needs"]["host"] <= 300 * MB < report["needs"]["host"] + report["needs"]["disk"]


def test_smaller_parts_come_before_any_offload(words, machine, capsys):
    machine(0, 4000)
    _, report = told(capsys, "+pipeline=3stage", *words)
    machine(0, report["needs"]["host"] // MB - 5)
    code, report = told(capsys, "+pipeline=3stage", *words)
    assert code == 1 and report["repair"] == ["model.prefill_chunk_tok=4096"]


def test_nothing_helps_a_machine_without_room_for_weights_or_dense_attention(words, machine, capsys):
    machine(0, 1)
    assert cli.main(["doctor", "+pipeline=3stage", *words]) == 1
    assert "does not fit: the weights alone take" in capsys.readouterr().out
    machine(400, 4000)
    assert cli.main(["doctor", *words]) == 1
    assert "offload needs a pipeline" in capsys.readouterr().out


def test_what_has_no_model_here_is_refused(words, machine, capsys, monkeypatch):
    machine(0, 4000)
    assert cli.main(["doctor", "-m", "+pipeline=3stage", "task.length_tok=1,2"]) == 2
    assert cli.main(["doctor", "task=latency", "task.geometry=llama31_8b"]) == 2
    assert "loads no model" in capsys.readouterr().err

    def missing(model):
        raise DataMissing("no network")

    monkeypatch.setattr(fits, "config_path", missing)
    assert cli.main(["doctor", "model=llama31_8b", "+pipeline=3stage"]) == 2
    assert "hf download meta-llama/Llama-3.1-8B-Instruct config.json" in capsys.readouterr().err


def test_a_tier_that_a_run_would_refuse_is_refused_here(words, machine, capsys):
    machine(0, 4000)
    assert cli.main(["doctor", "+pipeline=3stage", "offload=host", "offload.host_tok=4096", *words]) == 2
    assert "offload.host_tok=4096 has room for 4096 tokens" in capsys.readouterr().err


def test_a_damaged_config_is_told(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type":')
    assert cli.main(["doctor", "model=hf", f"model.path={tmp_path}", "task.length_tok=4096"]) == 2
    assert "config.json" in capsys.readouterr().err
