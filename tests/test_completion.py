"""Completion of the command line: what may stand where, and that bash gets it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hipexp import cli
from hipexp.completion import candidates
from hipexp.config.overrides import conf_dir
from hipexp.config.schema import Pipeline
from hipexp.run.ledger import write_json

ROOT = Path(__file__).parents[1]
PRESETS = sorted(path.stem for path in (conf_dir() / "pipeline").glob("*.yaml"))


@pytest.mark.parametrize(
    "line, found",
    [
        ("hipexp com", ["compare", "completion"]),
        ("hipexp +pipeline=3stage_f", ["+pipeline=3stage_fast", "+pipeline=3stage_flash"]),
        ("hipexp -m pipeline=dense,5", ["pipeline=dense,5k"]),
        ("hipexp task.sa", ["task.samples="]),
        ("hipexp doctor task.sa", ["task.samples="]),
        ("hipexp ++pipeline.stages.1.ch", ["++pipeline.stages.1.chunk_tok="]),
        ("hipexp pipeline.st", ["pipeline.stages.", "pipeline.staggered_refresh="]),
        ("hipexp pipeline.stages.", [f"pipeline.stages.{i}." for i in range(4)]),
        ("hipexp pipeline.heads=", ["pipeline.heads=shared", "pipeline.heads=per_kv"]),
        ("hipexp pipeline.rope.prune=dyn", ["pipeline.rope.prune=dynamic"]),
        ("hipexp pipeline.late_refresh=t", ["pipeline.late_refresh=true"]),
        ("hipexp task=passkey se", ["seed="]),
        ("hipexp task=passkey com", []),
        ("hipexp tas", ["task=", "task."]),
        ("hipexp --d", ["--dry-run"]),
        ("hipexp ls st", ["state="]),
        ("hipexp ls state=d", ["state=done", "state=damaged"]),
        ("hipexp ls state=done,st", ["state=done,stopped"]),
        ("hipexp retry class=da", ["class=data_missing"]),
        ("hipexp ls task=pa", ["task=passkey"]),
        ("hipexp ls --", ["--quiet", "--json", "--help"]),
        ("hipexp sweep --", ["--dry-run", "--quiet", "--json", "--help"]),
        ("hipexp data --", ["--help"]),
        ("hipexp sweep conf/sweep/qu", ["conf/sweep/quick.yaml"]),
        ("hipexp sweep conf/sw", ["conf/sweep/"]),
        ("hipexp sweep conf/sweep/quick.yaml cou", ["count="]),
        ("hipexp sweep conf/sweep/quick.yaml task.sa", ["task.samples="]),
        ("hipexp report r", ["runs="]),
        ("hipexp report out=hipex", ["out=hipexp/"]),
        ("hipexp repro appe", ["appendixF"]),
        ("hipexp repro al", ["all"]),
        ("hipexp methods of=abl", ["of=ablation"]),
        ("hipexp data v", ["verify"]),
        ("hipexp -m hydra/l", ["hydra/launcher="]),
        ("hipexp hydra/l", []),
        ("hipexp completion f", ["fish"]),
        ("hipexp tune task=ruler obj", ["objective="]),
        ("hipexp tune task.sa", ["task.samples="]),
        ("hipexp nothing.at.all", []),
        ("hipexp nothing=", []),
    ],
)
def test_what_may_stand_there(line, found, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert candidates(line) == found


def test_all_presets_and_commands_are_offered():
    assert candidates("hipexp pipeline=") == [f"pipeline={name}" for name in sorted({*PRESETS, "dense"})]
    assert set(cli.COMMANDS) < set(candidates("hipexp "))


def test_every_key_that_is_offered_exists():
    offered = candidates("hipexp pipeline.")
    assert {word[len("pipeline.") :].rstrip("=.") for word in offered} == set(vars(Pipeline()))


def test_every_command_has_its_own_flags():
    for name, (_, _, flags) in cli.COMMANDS.items():
        assert [word for word in candidates(f"hipexp {name} --") if word != "--anyway"] == [*flags, "--help"]


def test_runs_are_offered_to_commands_about_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    for name in ("needle_dense_1", "needle_3stage_2"):
        (tmp_path / "infbench" / name).mkdir(parents=True)
        write_json(tmp_path / "infbench" / name / "status.json", {"state": "done"})
    assert candidates("hipexp compare infbench/needle_d") == ["infbench/needle_dense_1"]
    assert candidates("hipexp compare infbench/needle_dense_1 infbench/needle_3") == ["infbench/needle_3stage_2"]
    assert len(candidates("hipexp retry infbench/")) == 2 and candidates("hipexp retry --d") == ["--dry-run"]


def test_bash(tmp_path):
    python = f"PYTHONPATH={ROOT}:{ROOT / 'kernels'} {sys.executable} -m hipexp"
    script = f"""hipexp() {{ {python} "$@"; }}
source <(hipexp completion bash)
ask() {{ COMP_LINE="$1" COMP_POINT=${{#1}} _hipexp hipexp; printf '[%s]' "${{COMPREPLY[@]}}"; echo; }}
ask 'hipexp +pipeline=3stage_f'
ask 'hipexp task.sampl'
ask 'hipexp +pipeline=3stage task=infb'
complete -p hipexp"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=os.environ)
    # Of a word with = bash replaces only what is behind it; a whole word ends with a space.
    assert done.stdout.splitlines() == ["[3stage_fast][3stage_flash]", "[task.samples=]", "[infbench ]", "complete -o nospace -F _hipexp hipexp"], done.stderr


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish")
def test_fish(tmp_path):
    python = f"env PYTHONPATH={ROOT}:{ROOT / 'kernels'} {sys.executable} -m hipexp"
    script = f"""function hipexp; {python} $argv; end
hipexp completion fish | source
complete -C 'hipexp sweep conf/sweep/qu'
complete -C 'hipexp retry class=da'
complete -C 'hipexp +pipeline=3stage_f'"""
    done = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT, env=os.environ | {"HOME": str(tmp_path)})
    words = ["conf/sweep/quick.yaml", "class=data_missing", "+pipeline=3stage_fast", "+pipeline=3stage_flash"]
    assert done.stdout.split() == words, done.stderr


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_zsh(tmp_path):
    """What the function of zsh would add: ``compadd`` itself only works at a prompt."""
    python = f"PYTHONPATH={ROOT}:{ROOT / 'kernels'} {sys.executable} -m hipexp"
    script = f"""hipexp() {{ {python} "$@" }}
compdef() {{ }}
compadd() {{ print -l -- $found }}
source <(hipexp completion zsh)
words=(hipexp sweep conf/sweep/qu) CURRENT=3
_hipexp
words=(hipexp retry class=da) CURRENT=3
_hipexp"""
    done = subprocess.run(["zsh", "-f", "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT, env=os.environ)
    assert done.stdout.split() == ["conf/sweep/quick.yaml", "class=data_missing"], done.stderr


def test_it_is_fast_and_needs_nothing_heavy():
    code = "import sys; from hipexp.cli import main; main(['completion', 'words', 'hipexp pipeline.stages.0.']); heavy = {'torch', 'numpy', 'transformers', 'hydra'} & set(sys.modules); assert not heavy, heavy"
    start = time.process_time(), os.times().children_user
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "pipeline.stages.0.chunk_tok=" in done.stdout.splitlines() and os.times().children_user - start[1] < 2


@pytest.mark.parametrize("words, message", [([], "takes the name of a shell"), (["bsh"], "completion bsh is unknown; did you mean bash?")])
def test_wrong_words(capsys, words, message):
    assert cli.main(["completion", *words]) == 2
    assert message in capsys.readouterr().err
