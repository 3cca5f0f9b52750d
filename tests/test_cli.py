"""The command line: who answers, how fast, and with which exit code."""

import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hipexp import cli
from hipexp.doctor import PACKAGES
from hipexp.run.ledger import RunFailed
from hipexp.suites.sample import DataMissing

ROOT = Path(__file__).parents[1]
NO_TORCH = "import sys; from hipexp.cli import main; code = main(sys.argv[1:]); heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"


def start(*words, cwd=ROOT):
    """The command line in a process of its own, which fails if torch was imported."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.run([sys.executable, "-c", NO_TORCH, *words], capture_output=True, text=True, timeout=60, cwd=cwd, env=environment)


@pytest.fixture
def points(monkeypatch, tmp_path):
    """Experiments that were run, where running does nothing; the working directory is empty and there is a model."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"num_hidden_layers": 5, "max_position_embeddings": 6144}))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"none")
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hipexp.run.point.run_point", lambda experiment, overrides=None: seen.append((experiment, list(overrides))))
    return seen


MODEL = ["model=hf", "model.path=model"]


def raising(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("hipexp.run.point.run_point", fail)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["task=passkey", "--help"]])
def test_help_needs_no_torch(words):
    done = start(*words)
    assert done.returncode == 0, done.stderr
    for part in ("python -m hipexp +pipeline=3stage task=infbench", "3stage_flash", "commands:", "repro", "exit code: 0 done, 2 bad"):
        assert part in done.stdout


def test_a_mistake_is_one_line_and_needs_no_torch():
    done = start("+pipeline=3stage", "pipeline.stages.1.chunk_tok=48")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: pipeline.stages[1].chunk_tok=48 must divide stages[0].chunk_tok=256; try 32 or 64\n"


def test_the_configuration_is_shown_without_torch(tmp_path):
    done = start("+pipeline=3stage", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "keep_tok: 32768" in done.stdout and list(tmp_path.iterdir()) == []


def test_the_module_can_be_started():
    done = subprocess.run([sys.executable, "-m", "hipexp", "--version"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "0.1.0\n")


def test_a_point_is_checked_and_run(points):
    words = ["+pipeline=3stage", *MODEL, "task.samples=2.0"]
    assert cli.main(words) == 0
    [(experiment, overrides)] = points
    assert (experiment.pipeline.name, experiment.task.samples, overrides) == ("3stage", 2, words)


def test_layers_are_checked_before_a_point_runs(points, capsys):
    assert cli.main(["+pipeline=3stage", *MODEL, "pipeline.layers.early.range=7-9"]) == 2
    assert "selects no layer: the model has layers 0 to 4" in capsys.readouterr().err and not points


@pytest.mark.parametrize(
    "error, code, message",
    [
        (DataMissing("no such data; fetch it"), 2, "error: no such data; fetch it\n"),
        (RunFailed("disk full"), 1, "error: disk full\n"),
        (
            MemoryError("cannot allocate 9 GB\nat allocator.cpp"),
            1,
            "error: out of memory (cannot allocate 9 GB); try a shorter length, task.batch=1, or a smaller model.prefill_chunk_tok; doctor with the same words (without model.tp_plan) tells what would fit\n",
        ),
        (KeyboardInterrupt(), 1, "error: interrupted; the same command continues\n"),
    ],
)
def test_failures_are_one_line(points, monkeypatch, capsys, error, code, message):
    raising(monkeypatch, error)
    assert cli.main(MODEL) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("words", [["demo"], ["repro", "table2"], ["table"], ["calibrate"]])
def test_what_runs_many_points_does_not_pass_over_cfg(points, capsys, words):
    assert cli.main([*words, "--cfg", "job"]) == 2
    assert "--cfg shows one point and runs nothing" in capsys.readouterr().err


def test_a_defect_shows_its_traceback(points, monkeypatch, capsys):
    raising(monkeypatch, ZeroDivisionError("division by zero"))
    assert cli.main(MODEL) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: ZeroDivisionError: division by zero\n")


def test_a_sweep_runs_all_points_and_leaves_nothing_behind(points, tmp_path):
    argv = list(sys.argv)
    assert cli.main(["-m", "pipeline=None,2stage", "seed=0,1.0", *MODEL]) == 0
    assert [(e.pipeline and e.pipeline.name, e.seed) for e, _ in points] == [(None, 0), (None, 1), ("2stage", 0), ("2stage", 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and sys.argv == argv


def test_a_sweep_leaves_the_log_of_its_runs_alone(points):
    log = logging.getLogger("hipexp")
    log.disabled = False
    assert cli.main(["-m", "seed=0,1", *MODEL]) == 0
    assert not log.disabled


def test_a_sweep_goes_on_after_a_failure(points, monkeypatch, capsys):
    def run(experiment, overrides):
        points.append(experiment.seed)
        if experiment.seed == 1:
            raise DataMissing("not here")

    monkeypatch.setattr("hipexp.run.point.run_point", run)
    assert cli.main(["--multirun", "seed=0,1,2", *MODEL]) == 2
    assert points == [0, 1, 2] and "error: not here" in capsys.readouterr().err


def test_a_mistake_in_one_point_is_told_first_and_the_others_run(points, capsys):
    assert cli.main(["-m", "+pipeline=3stage", "pipeline.stages.2.keep_tok=100,2048", *MODEL]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("refused: pipeline=3stage pipeline.stages.2.keep_tok=100 ") and "pipeline.stages[2].keep_tok=100" in said.err
    assert [one.pipeline.stages[2].keep_tok for one, _ in points] == [2048]
    assert "refused: bad_config" in said.out


def test_a_mistake_in_every_point_of_a_sweep_is_one_line(points, capsys):
    assert cli.main(["-m", "+pipeline=3stage", "pipeline.stages.2.keep_tok=100,101", *MODEL]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: pipeline.stages[2].keep_tok=100") and said.err.count("\n") == 1 and said.out == "" and not points


@pytest.mark.parametrize("word", ["hydra/sweeper=nope", "hydra/launcher=nope"])
def test_an_unknown_part_of_hydra_is_one_line(points, capsys, word):
    assert cli.main(["-m", word, "seed=0,1", *MODEL]) == 2
    assert capsys.readouterr().err == f"error: In 'hydra/config': Could not find '{word.replace('=', '/')}'\n" and not points


@pytest.mark.parametrize(
    ("words", "what"),
    [(["-m", "model.tp_plan=auto", "seed=0,1"], "a sweep (-m)"), (["methods", "model.tp_plan=auto"], "the command methods")],
)
def test_a_model_is_split_over_processes_for_one_point_only(words, what, capsys):
    assert cli.main(words) == 2
    said = f"error: model.tp_plan=auto is for one experiment point (torchrun … -m hipexp key=value …), not for {what}; leave it out\n"
    assert capsys.readouterr().err == said


def test_a_model_is_not_split_over_one_process(capsys):
    assert cli.main(["model.tp_plan=auto", "task=passkey", "task.lengths_tok=[512]"]) == 2
    assert "there must be two or more, but this is the only one; start them with `torchrun" in capsys.readouterr().err


def test_a_pattern_in_a_sweep(points):
    assert cli.main(["-m", "pipeline=glob(3stage_*)", *MODEL]) == 0
    assert [experiment.pipeline.name for experiment, _ in points] == [
        "3stage_fast",
        "3stage_flash",
        "3stage_long",
        "3stage_plus",
        "3stage_scan",
    ]


def test_a_terminal_without_a_character_gets_another(tmp_path):
    script = "import sys; from hipexp import cli; cli.COMMANDS['ls'] = ('show:main', '', ()); sys.exit(cli.main(['ls']))"
    (tmp_path / "show.py").write_text("def main(words):\n    print('256→8')\n    return 0\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "256?8\n", "")


def test_a_reader_that_has_seen_enough_is_no_defect():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "hipexp", "--help"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_commands_get_their_words(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("hipexp.report.listing.main", lambda words: seen.append(words) or 7)
    assert cli.main(["ls", "--json"]) == 7
    assert seen == [["--json"]]
    assert cli.main(["ls", "--help"]) == 0 and "flags: --quiet, --json" in capsys.readouterr().out
    assert cli.main(["tune", "--help"]) == 0
    assert "words: " in (told := capsys.readouterr().out) and "max_bytes=, " in told and "groups and keys as of a run\n" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tune", "hour=1"], "hour is unknown; did you mean hours? known here: space, sampler"),
        (["repro", "table2", "siz=needle"], "siz is unknown; did you mean size? known here: jobs, size, stored, model"),
        (["demo", "sed=1"], "sed is unknown; did you mean seed? known here: model, pipeline"),
    ],
)
def test_a_word_that_neither_a_command_nor_a_run_knows(capsys, words, told):
    assert cli.main(words) == 2
    assert told in capsys.readouterr().err


def test_an_unknown_command_names_the_others(capsys):
    assert cli.main(["repor"]) == 2
    assert "command repor is unknown; did you mean report? known here: demo, ls" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_and_has_help(name, capsys):
    module, _, function = cli.COMMANDS[name][0].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))
    assert cli.main([name, "--help"]) == 0
    assert name in capsys.readouterr().out


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "device:" in text
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {one["state"] for one in report["packages"]} <= {"ok", "missing", "untested"}
    assert cli.main(["doctor", "--loud"]) == 2


def test_doctor_knows_every_package_that_a_run_may_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(one for name, each in extras.items() if name != "dev" for one in each)]
    assert {re.split(r"[=<>;]", one)[0].strip().lower() for one in needed} == {name.lower() for name in PACKAGES}


@pytest.mark.parametrize(
    ("name", "flag"), [(name, flag) for name, (_, _, flags) in cli.COMMANDS.items() for flag in cli.ALL if flag not in flags]
)
def test_a_flag_that_a_command_does_not_have_is_refused(capsys, name, flag):
    assert cli.main([name, flag]) == 2
    assert f"{name} takes no {flag}" in capsys.readouterr().err


def test_doctor_sees_a_package_that_hides_another(tmp_path, monkeypatch, capsys):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["doctor"]) == 1
    assert "hides the package `kernels`" in capsys.readouterr().out


def test_what_hipexp_needs_and_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run_overrides", lambda words: __import__("hydra_that_nobody_has"))
    assert cli.main(["task=passkey"]) == 1 and "Traceback" in capsys.readouterr().err, "of ours: a defect"
    monkeypatch.setattr(cli, "NEEDED", ("hydra_that_nobody_has",))
    assert cli.main(["task=passkey"]) == 1
    assert capsys.readouterr().err == (
        "error: hydra_that_nobody_has is not installed, and hipexp needs it; run: python -m pip install hipexp\n"
    )
