import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from hipexp.config.compose import compose
from hipexp.config.schema import ConfigError
from hipexp.run import point
from hipexp.run.identity import key_of, model_revision
from hipexp.run.ledger import RunFailed, is_done, parse_rows, read_json, read_rows
from hipexp.run.point import EXACT, check_point, execute, folder_of, load_model, report, row_of, run_point, stored
from hipexp.run.several import load_once
from hipexp.run.tokenizer_file import read_tokenizer

STREAMING = compose(["+pipeline=streaming", "task=infbench"]).pipeline


def test_a_run_folder_holds_everything_it_promises(fake, experiment, capsys):
    folder = run_point(experiment())
    assert folder.parent.name == "infbench"
    assert folder.name.startswith("fake_dense_")
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    rows = read_rows(folder)
    wanted = {
        "subtask",
        "sample",
        "prediction",
        "references",
        "score",
        "context_tok",
        "new_tok",
        "removed_tok",
        "prefill_ms",
        "decode_ms",
        "status",
    }
    assert all(wanted <= set(row) for row in rows)
    assert [(row["subtask"], row["sample"]) for row in rows] == [(name, i) for name in ("passkey", "kv_retrieval") for i in range(4)]
    summary = read_json(folder / "summary.json")
    assert summary["scores"]["kv_retrieval"] == {"metric": "value_among_words", "score": 100.0, "n": 4, "interval": [39.76, 100.0]}
    assert (summary["average"], summary["pipeline"], summary["model"], summary["status"]) == (100.0, None, "fake", "done")
    assert {"run_key", "task", "latency", "memory", "traffic", "recall"} <= set(summary)
    assert folder.name.endswith(summary["run_key"][:10])
    assert read_json(folder / "status.json")["state"] == "done"
    card = read_json(folder / "card.json")
    assert card["protocol"] == "hipexp"
    assert "not an official" in card["note"]
    assert card["truncation"]["removed_tok"] == {"passkey": 0, "kv_retrieval": 0}
    assert yaml.safe_load((folder / "config.yaml").read_text())["task"]["samples"] == 4
    assert read_json(folder / "env.json") == {}
    table = pq.read_table(folder / "records.parquet")
    assert table.num_rows == len(rows)
    assert {"run_key", "suite", "subtask", "sample", "metric", "value", "recall", "status"} <= set(table.column_names)
    assert (folder / "log.txt").read_text()


def test_a_finished_run_costs_nothing_and_says_the_same(fake, experiment, capsys):
    run_point(experiment())
    first, calls = capsys.readouterr().out, fake.calls
    run_point(experiment())
    again = capsys.readouterr().out
    assert fake.calls == calls
    assert "stored result" in again
    assert first.splitlines()[-4:] == again.splitlines()[-4:]


@pytest.mark.parametrize("damage", [lambda text: "", lambda text: text.replace("score", "sc\0re", 1), lambda text: text.split("\n", 1)[1]])
def test_a_finished_run_with_damaged_samples_is_not_done(fake, experiment, damage):
    folder = execute(experiment())
    before, path = read_json(folder / "summary.json"), folder / "samples.jsonl"
    path.write_text(damage(path.read_text()))
    assert not stored(experiment())
    execute(experiment())
    assert (len(read_rows(folder)), stored(experiment())) == (8, True)
    assert read_json(folder / "summary.json")["scores"] == before["scores"]


def test_finished_samples_are_never_done_again(fake, experiment, monkeypatch):
    one = experiment()
    fake.fail = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        execute(one)
    fake.fail = None
    folder = execute(one)
    whole, calls = read_rows(folder), fake.calls
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    (folder / "status.json").unlink()
    said = []
    execute(one, say=said.append)
    assert fake.calls - calls == len(lines) - 3
    assert any("damaged" in text for text in said)
    assert read_rows(folder) == whole


def test_a_sample_that_fails_is_an_error_not_a_score(fake, experiment):
    fake.fail = FloatingPointError("the model's logits are not finite")
    with pytest.raises(FloatingPointError):
        execute(experiment())
    folder = folder_of(experiment())
    status = read_json(folder / "status.json")
    assert (status["state"], status["class"]) == ("failed", "error")
    assert "not finite" in status["message"]
    assert read_rows(folder) == []
    assert not (folder / "summary.json").exists()


def test_official_subtasks_and_short_lengths_are_refused(fake, experiment):
    with pytest.raises(ConfigError, match="data pull infbench subtask=code_run"):
        execute(experiment(subtasks=["code_run"]))
    with pytest.raises(ConfigError, match="use at least"):
        execute(experiment(length_tok=40))
    assert read_json(folder_of(experiment(length_tok=40)) / "status.json")["class"] == "bad_config"


def test_a_grid_names_the_length_that_is_too_short(fake, experiment):
    with pytest.raises(ConfigError, match=r"^task\.lengths_tok\[1\]=40 is too short for passkey"):
        execute(experiment(name="passkey", lengths_tok=[600, 40]))


def test_the_layers_of_a_hub_model_are_checked_once_its_config_is_here(fake, experiment, model_folder, monkeypatch):
    monkeypatch.setattr("hipexp.run.identity.hub_config", lambda model: model_folder / "config.json")
    one = experiment(compose(["+pipeline=3stage", "pipeline.layers.early.range=7-9"]).pipeline)
    one.model.path = "org/model"
    monkeypatch.setattr("hipexp.run.point.load_model", lambda model: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="selects no layer: the model has layers 0 to 4"):
        execute(one)


def test_strange_lines_count_for_nothing(fake, experiment):
    folder = execute(experiment())
    summary, rows = read_json(folder / "summary.json"), read_rows(folder)
    strange = [rows[0], {**rows[0], "sample": 99, "score": 0.0}, {**rows[0], "subtask": "other"}, {"subtask": "passkey", "sample": 0}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *strange]))
    (folder / "status.json").unlink()
    calls, said = fake.calls, []
    execute(experiment(), say=said.append)
    assert any("4 line(s) dropped" in text for text in said)
    assert (fake.calls, read_rows(folder), read_json(folder / "summary.json")) == (calls, rows, summary)


def test_a_result_is_found_under_another_name(fake, experiment):
    folder, renamed = execute(experiment()), experiment()
    renamed.model.name = "mine"
    assert (execute(renamed), stored(renamed)) == (folder, True)


def test_the_dense_result_stands_beside_or_the_command_for_it(fake, experiment):
    execute(experiment(STREAMING))
    words = ["+pipeline=streaming", "task=infbench", "pipeline.sink_tok=256", "task.samples=4"]
    text = report(experiment(STREAMING), folder_of(experiment(STREAMING)), words)
    command = next(line for line in text.splitlines() if "dense on" in line)
    assert command.endswith("python -m hipexp task=infbench task.samples=4")
    assert compose(shlex.split(command.split("hipexp ")[1])) == dataclasses.replace(compose(words), pipeline=None)
    assert "dense on" not in report(experiment(STREAMING), folder_of(experiment(STREAMING)))
    assert EXACT in text
    execute(experiment())
    text = report(experiment(STREAMING), folder_of(experiment(STREAMING)))
    assert "+0/−0" in text
    assert "dense on the same samples" not in text
    assert EXACT not in report(experiment(), folder_of(experiment()))


def test_protocol_is_named_beside_every_score(fake, experiment):
    execute(experiment())
    scores = [line for line in report(experiment(), folder_of(experiment())).splitlines() if line.startswith(("passkey", "kv_retrieval"))]
    assert len(scores) == 2
    assert all(" hipexp " in line for line in scores)


def test_the_resolved_strategy_is_printed(fake, experiment, capsys):
    pipeline = compose(["+pipeline=3stage", "task=infbench"]).pipeline
    run_point(experiment(pipeline, samples=1, subtasks=["passkey"]))
    text = capsys.readouterr().out
    assert "layers 0-2 (early): sink 256, window 1024, attends to at most 5376 tokens" in text
    assert "layers 3-4: sink 256, window 1024, attends to at most 3328 tokens" in text
    assert "stage 0: 256→32768 by descent, chunk_indexed RoPE, refresh 16" in text
    run_point(experiment(pipeline, samples=1, subtasks=["passkey"]))
    assert "layers 0-2 (early)" in capsys.readouterr().out


def test_the_dense_result_of_an_offloaded_point_is_that_of_a_resident_one(fake, experiment, offloaded):
    execute(experiment())
    folder = execute(offloaded())
    assert "+0/−0" in report(offloaded(), folder)


def test_truncation_is_counted(fake, experiment):
    one = experiment(subtasks=["kv_retrieval"], length_tok=4000, truncate_tok=3000, samples=1)
    folder = execute(one)
    removed = read_rows(folder)[0]["removed_tok"]
    assert removed > 0
    card = read_json(folder / "card.json")["truncation"]
    assert card["removed_tok"] == {"kv_retrieval": removed}
    assert "middle" in card["rule"]


def test_a_grid_is_scored_by_length_and_knows_its_depths(fake, experiment):
    folder = execute(experiment(name="passkey", lengths_tok=[300, 600], depths=[0.0, 1.0], samples=2))
    assert list(read_json(folder / "summary.json")["scores"]) == ["passkey@300", "passkey@600"]
    assert [row["depth"] for row in read_rows(folder)] == [0.0, 0.0, 1.0, 1.0] * 2


def test_batches_give_the_same_rows(fake, experiment):
    alone, together = execute(experiment()), execute(experiment(batch=3))
    assert alone != together
    assert read_rows(alone) == read_rows(together)


def child(model_folder: Path, runs: Path, seconds: float) -> subprocess.Popen:
    script = Path(__file__).parent / "fake_hf.py"
    env = os.environ | {"HIPEXP_RUNS": str(runs), "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, str(script), str(model_folder), str(seconds)]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_samples(runs: Path, count: int) -> Path:
    for _ in range(600):
        files = list(runs.glob("infbench/*/samples.jsonl"))
        if files and len(parse_rows(files[0].read_bytes())[0]) >= count:
            return files[0].parent
        time.sleep(0.05)
    raise AssertionError("the run makes no progress")


@pytest.mark.parametrize(("stop", "state"), [(signal.SIGKILL, "running"), (signal.SIGTERM, "failed")])
def test_a_stopped_run_continues_to_the_same_result(model_folder, tmp_path, stop, state):
    whole = tmp_path / "whole"
    expected, stopped = child(model_folder, whole, 0.0), child(model_folder, tmp_path / "runs", 0.3)
    folder = wait_for_samples(tmp_path / "runs", 2)
    stopped.send_signal(stop)
    stopped.communicate()
    assert expected.wait() == 0
    assert stopped.returncode != 0
    before = (folder / "samples.jsonl").read_bytes()
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == state
    assert status.get("class") == (None if state == "running" else "interrupted")
    last = child(model_folder, tmp_path / "runs", 0.0)
    out, _ = last.communicate()
    assert last.returncode == 0
    assert "continuing after" in out
    assert (folder / "samples.jsonl").read_bytes().startswith(before)
    for name in ("samples.jsonl", "summary.json", "card.json"):
        assert (folder / name).read_bytes() == (whole / folder.parent.name / folder.name / name).read_bytes()


def test_two_processes_share_one_run(model_folder, tmp_path):
    runs = tmp_path / "runs"
    first, second = (child(model_folder, runs, 0.1) for _ in range(2))
    texts = [process.communicate()[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert len({text.splitlines()[-1] for text in texts}) == 1
    (folder,) = runs.glob("infbench/*")
    rows, damaged = parse_rows((folder / "samples.jsonl").read_bytes())
    assert (len({(row["subtask"], row["sample"]) for row in rows}), len(rows), damaged) == (8, 8, 0)


def test_stored_knows_only_finished_runs(fake, experiment):
    assert not stored(experiment())
    execute(experiment())
    assert stored(experiment())
    assert not stored(experiment(samples=5))


def test_weights_that_are_replaced_between_points_are_loaded_anew(fake, experiment, model_folder):
    load = load_once()
    first, second = experiment(), experiment(samples=3)
    old = read_json(execute(first, load) / "card.json")
    before = load(first.model)
    (model_folder / "weights.bin").write_text("new")
    assert load(second.model) is not before
    card = read_json(execute(second, load) / "card.json")
    assert card["model"]["revision"] == model_revision(second.model) != old["model"]["revision"]


def test_weights_that_are_replaced_while_they_load_give_no_result(fake, experiment, model_folder):
    def load(model):
        (model_folder / "weights.bin").write_text("new")
        return load_model(model)

    with pytest.raises(RunFailed, match="changed while it was loaded; the same command runs the new ones"):
        execute(experiment(), load)
    assert not stored(experiment())


def test_weights_that_are_replaced_later_do_not_matter_to_a_loaded_model(fake, experiment, model_folder, monkeypatch):
    def then_replace(*given):
        (model_folder / "weights.bin").write_text("new")
        return row_of(*given)

    monkeypatch.setattr(point, "row_of", then_replace)
    key, folder = key_of(experiment()), run_point(experiment())
    assert is_done(folder, key)
    assert not stored(experiment())


def test_short_lengths_are_refused_without_torch_and_leave_no_folder(tmp_path):
    words = ["+pipeline=3stage", "task.length_tok=11"]
    code = f"import sys; sys.modules['torch'] = None; from hipexp.cli import main; sys.exit(main({words}))"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"HIPEXP_RUNS": str(tmp_path)})
    assert made.returncode == 2, made.stderr
    assert "task.length_tok=11 is too short for kv_retrieval" in made.stderr
    assert not list(tmp_path.iterdir())
    least = int(made.stderr.split()[-1])
    check_point(compose([f"task.length_tok={least}"]))
    with pytest.raises(ConfigError, match="use at least"):
        check_point(compose([f"task.length_tok={least - 1}"]))
    with pytest.raises(ConfigError, match=r"task\.lengths_tok\[1\]=11 is too short for passkey"):
        check_point(compose(["task=passkey", "task.lengths_tok=[4096,11]"]))


def test_a_tokenizer_file_counts_what_there_is(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(9)
    tokenizer.save(str(path))
    assert [len(read_tokenizer(path)(text).input_ids) for text in ("a", "a " * 20)] == [1, 20]
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json must be a tokenizer that can be read"):
        read_tokenizer(path)


def test_processes_that_would_all_do_the_same_are_refused(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"torchrun started 2 processes, and without model\.tp_plan=auto each would do the whole run"):
        check_point(compose(["task=infbench"]))
