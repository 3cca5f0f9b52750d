"""The command line: Hydra's overrides, or a first word without ``=``, a sub-command.

Nothing heavy is imported before it is needed: help and a mistake in the configuration answer at once.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

from hipexp.config.schema import ConfigError, Experiment

# Name: (module:function taking the remaining words and returning an exit code, what it does).
COMMANDS = {
    "demo": ("hipexp.run.demo:main", "dense against 3stage on the embedded model: a table and a picture"),
    "ls": ("hipexp.report.listing:main", "the runs there are and how far they got"),
    "retry": ("hipexp.run.retry:main", "go on with runs that failed or were stopped; retry --dry-run lists them"),
    "compare": ("hipexp.report.compare:main", "two runs side by side: scores, paired differences, flipped answers, or times"),
    "report": ("hipexp.report.command:main", "all runs as one HTML file, with figures and tables; report out=<folder> runs=<folder>"),
    "models": ("hipexp.run.models_table:main", "every family of models that fits, tried on small checkpoints of its real classes"),
    "methods": ("hipexp.run.methods_table:main", "every method beside each other; methods --dry-run tells how long, fast=true is short"),
    "calibrate": (
        "hipexp.run.calibrate:main",
        "a pipeline whose layers have measured budgets and RoPE strategies: calibrate +pipeline=3stage",
    ),
    "table": ("hipexp.run.needle_table:main", "the long form of the demo; table --dry-run tells how long it takes here"),
    "data": ("hipexp.run.data:main", "data of the suites: data pull, verify, ls, make"),
    "score": ("hipexp.run.score:main", "official scores of predictions made elsewhere, as JSON"),
    "replay": ("hipexp.run.replay:main", "hits and traffic of caches of any size and policy in a recorded run; replay record records one"),
    "sweep": ("hipexp.run.sweep:main", "a wandb sweep file without wandb: sweep conf/sweep/budget.yaml [key=value …] [jobs=2] [--dry-run]"),
    "tune": (
        "hipexp.run.tune:main",
        "search for pipelines that no other beats: tune task=infbench objective=[score,bytes] max_bytes=3stage hours=1",
    ),
    "repro": ("hipexp.run.repro:main", "a published table beside ours, as in repro table2 size=needle task.samples=5"),
    "completion": ("hipexp.completion:main", "completion of this command line for a shell: source <(hipexp completion bash)"),
    "doctor": ("hipexp.doctor:main", "versions, device, what is missing; doctor +pipeline=3stage task=ruler: does that run fit?"),
}
DONE, FAILED, BAD_INPUT = 0, 1, 2
DRY, QUIET, JSON = "--dry-run", "--quiet", "--json"

HELP = """hipexp: experiments on long-context attention that prunes its keys in stages (InfiniteHiP).

usage:  python -m hipexp [group=option ...] [key=value ...]      one experiment point
        python -m hipexp -m group=option,option ... key=v,v ...   all combinations
        python -m hipexp <command> [...]

Without a pipeline attention is dense. The result goes into a folder under runs/, whose path is the last line
printed; the same command again returns the stored result, or continues where it was stopped.

groups (the first option is the default):
{groups}

keys: every field of the configuration, as in pipeline.stages.2.keep_tok=4096 task.samples=20 seed=1;
      --cfg job prints all of them with their values and runs nothing.

flags: --dry-run shows the configuration, what attention would do and what is left, and loads no weights; --quiet prints the
       run folder only, --json the summary as one line of JSON (everything else goes to stderr). All go with -m too.

examples:
  python -m hipexp +pipeline=3stage task=infbench
  python -m hipexp +pipeline=3stage task=passkey 'task.lengths_tok=[8192,65536]' task.samples=3
  python -m hipexp +pipeline=3stage pipeline.layers.early.range='' pipeline.stages.2.keep_tok=4096
  python -m hipexp +pipeline=my_pipeline.yaml task=infbench
  python -m hipexp -m +pipeline=dense,2stage,3stage task.length_tok=16384

commands:
{commands}

environment: HIPEXP_RUNS (default runs), HIPEXP_DATA (official data; default ~/.cache/hipexp/data), HIPEXP_CONF (another folder of
configuration files): they move files only. OPENAI_API_KEY goes to the server of model=openai and is written nowhere.
exit code: 0 done, 2 bad configuration or input, 1 anything else."""


def main(argv: list[str] | None = None) -> int:
    """Run one command line (``sys.argv`` by default) and return its exit code. Mistakes of the user are one line on stderr."""
    words = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character gets '?'
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read stdout has seen enough; Python would complain again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt as error:
        return _complain(str(error) or "interrupted; the same command continues", FAILED)
    except Exception as error:
        return _explain(error)


def _dispatch(words: list[str]) -> int:
    if words and "=" not in words[0] and not words[0].startswith(("-", "+", "~")):
        return _run_command(words[0], words[1:])
    if {"-h", "--help"} & set(words):
        print(help_text())
        return DONE
    if "--version" in words:
        from hipexp import __version__

        print(__version__)
        return DONE
    return _run_overrides(words)


def help_text() -> str:
    """What ``--help`` prints; lists the files of ``conf/`` without reading them."""
    from hipexp.config.overrides import GROUPS, conf_dir, group_options

    defaults = {"model": "needle", "pipeline": "dense", "offload": "none", "task": "infbench", "track": "local"}
    options = group_options(conf_dir())
    ordered = {group: sorted(options[group], key=lambda name, group=group: (name != defaults[group], name)) for group in GROUPS}  # type: ignore[misc]
    groups = "\n".join(f"  {group + '=':<10} {', '.join(names)}" for group, names in ordered.items())
    commands = "\n".join(f"  {name:<10} {purpose}" for name, (_, purpose) in COMMANDS.items())
    return HELP.format(groups=groups, commands=commands)


def _run_command(name: str, words: list[str]) -> int:
    if name not in COMMANDS:
        from hipexp.config.convert import unknown

        raise unknown(f"command {name}", name, COMMANDS)
    _check_one_process(words, f"the command {name}")
    if {"-h", "--help"} & set(words):
        print(f"python -m hipexp {name}: {COMMANDS[name][1]}")
        return DONE
    module, _, function = COMMANDS[name][0].partition(":")
    return int(getattr(import_module(module), function)(words))


def _run_overrides(words: list[str]) -> int:
    from hipexp.config import compose

    flags = frozenset(words) & {DRY, QUIET, JSON}
    words = [word for word in words if word not in flags]
    line = compose.read_line(words)
    if line.show:
        print(compose.to_yaml(compose.compose_point(line.overrides)), end="")
        return DONE
    if line.sweep:
        return _run_sweep(line.overrides, flags)
    experiment = compose.compose_point(line.overrides)
    return _show_plans([("", experiment)], flags) if DRY in flags else _run_point(experiment, words, flags)


def _run_point(experiment: Experiment, words: list[str], flags: frozenset[str]) -> int:
    from hipexp.config.processes import started
    from hipexp.run.point import check_point, run_point

    check_point(experiment)
    with _aside(flags):
        folder = run_point(experiment, words)
    if started().number:
        return DONE
    if JSON in flags:
        from hipexp.run.ledger import read_json

        print(json.dumps(read_json(folder / "summary.json") | {"folder": str(folder)}, ensure_ascii=False), flush=True)
    elif QUIET in flags:
        print(folder, flush=True)
    return DONE


@contextmanager
def _aside(flags: frozenset[str]) -> Iterator[None]:
    """Keep what is said inside the block off stdout: with ``--quiet`` it goes nowhere (the run's log has it), with ``--json`` to stderr."""
    if QUIET in flags:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    elif JSON in flags:
        with redirect_stdout(sys.stderr):
            yield
    else:
        yield


def _show_plans(points: list[tuple[str, Experiment]], flags: frozenset[str]) -> int:
    """Print what points would do, each with its overrides (empty: the only one, shown with its configuration)."""
    from hipexp.config import compose
    from hipexp.run.plan import plan, sweep_text, text
    from hipexp.run.point import check_point

    told = []
    for words, experiment in points:
        check_point(experiment)
        with _aside(flags):
            told.append((words, plan(experiment)))
    if JSON in flags:
        for words, one in told:
            print(json.dumps(one | ({"overrides": words} if words else {}), ensure_ascii=False))
    elif QUIET in flags:
        print("\n".join(one["folder"] for _, one in told))
    elif len(told) == 1 and not told[0][0]:
        print(text(told[0][1], compose.to_yaml(points[0][1])))
    else:
        print(sweep_text(told))
    return DONE


def _run_sweep(overrides: list[str], flags: frozenset[str]) -> int:
    """Check all points, then run them through Hydra's launcher: a point that fails does not stop the others."""
    _check_one_process(overrides, "a sweep (-m)")
    from hipexp.config import compose
    from hipexp.config.overrides import is_hydra
    from hipexp.run.point import check_point

    points: list[Experiment] = []
    named: list[list[str]] = []
    if any(word.lstrip("+").startswith("hydra/sweeper=") for word in overrides):  # it chooses its points as it goes
        if DRY in flags:
            raise ConfigError("--dry-run cannot tell the points of a hydra/sweeper that chooses them as it goes; leave one of them out")
        compose.compose_point([word for word in overrides if is_hydra(word)])
    else:
        named = compose.sweep_points(overrides)
        points = [compose.compose_point(point) for point in named]
        for experiment in points:
            check_point(experiment)
    if DRY in flags:
        titles = [" ".join(word.lstrip("+") for word in words) or "defaults" for words in named]
        return _show_plans(list(zip(titles, points, strict=True)), flags)
    codes: list[int] = []

    def job(experiment: Experiment, words: list[str]) -> None:
        try:
            codes.append(_run_point(experiment, words, flags))
        except Exception as error:
            codes.append(_explain(error))

    with _launch_folder(overrides) as folder:
        compose.run_sweep(overrides, job, folder)
    if codes:
        return max(codes)
    from hipexp.run.point import stored  # the launcher ran the points in other processes: the run folders tell

    return DONE if all(map(stored, points)) else FAILED


@contextmanager
def _launch_folder(overrides: list[str]) -> Iterator[Path]:
    """Where a launcher keeps its notes: under the runs, which the machines of a cluster share, or, for Hydra's own, nowhere for long."""
    from hipexp.run.ledger import make_folder, runs_root

    chosen = [word.partition("=")[2] for word in overrides if word.lstrip("+").startswith("hydra/launcher=")]
    if chosen in ([], ["basic"]):
        with tempfile.TemporaryDirectory(prefix="hipexp-sweep-") as folder:
            yield Path(folder)
        return
    place = (runs_root() / "sweep" / f"launch_{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}").resolve()
    make_folder(place)
    print(f"notes and logs of the launcher {chosen[0]}: {place}", file=sys.stderr)
    yield place


def _check_one_process(words: list[str], what: str) -> None:
    """Refuse to split a model over processes where each of them would do everything; raises ConfigError."""
    for word in words:
        word = word.lstrip("+").replace("'", "")
        if word.startswith("model.tp_plan=") and word != "model.tp_plan=null":
            raise ConfigError(f"{word} is for one experiment point (torchrun … -m hipexp key=value …), not for {what}; leave it out")


def _explain(error: Exception) -> int:
    """Say what went wrong; only a defect of ours deserves a traceback. Returns the exit code."""
    kind = type(error).__name__
    if isinstance(error, ConfigError) or kind == "DataMissing":
        return _complain(str(error), BAD_INPUT)
    from hipexp.run.ledger import classify

    if classify(error) == "out_of_memory":
        first = str(error).strip().split("\n")[0]
        repair = (
            "try a shorter length, task.batch=1, or a smaller model.prefill_chunk_tok; doctor with the same words (without model.tp_plan) "
            "tells what would fit"
        )
        return _complain(f"out of memory ({first}); {repair}", FAILED)
    if kind != "RunFailed":
        traceback.print_exception(error)
    return _complain(str(error) if kind == "RunFailed" else f"{kind}: {error}", FAILED)


def _complain(message: str, code: int) -> int:
    from hipexp.config.processes import started

    mine = started()
    which = f" (process {mine.number} of {mine.count})" if mine.number else ""
    print(f"error{which}: " + " ".join(message.split()), file=sys.stderr)
    return code
