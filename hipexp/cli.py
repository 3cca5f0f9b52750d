"""The command line: Hydra's overrides, or a first word without ``=``, a sub-command.

Nothing heavy is imported before it is needed: help and a mistake in the configuration answer at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from io import TextIOWrapper

from hipexp.config.schema import ConfigError, Experiment
from hipexp.output import DRY, JSON, QUIET, Flags, aside, split_flags, to_json

# Packages that hipexp always needs, by the names they are imported by.
NEEDED = ("hydra", "omegaconf", "yaml", "torch", "numpy", "transformers", "pyarrow", "duckdb", "matplotlib", "tqdm")
# Name: (module:function taking the remaining words and returning an exit code, what it does, its flags).
SAY, ALL = (QUIET, JSON), (DRY, QUIET, JSON)
COMMANDS = {
    "demo": ("hipexp.run.demo:main", "dense against 3stage on the embedded model: a table and a picture", SAY),
    "ls": ("hipexp.report.listing:main", "the runs there are and how far they got", SAY),
    "retry": ("hipexp.run.retry:main", "go on with runs that failed or were stopped", ALL),
    "compare": (
        "hipexp.report.compare:main",
        "two runs beside each other, scores or times, with paired differences: compare A B",
        SAY,
    ),
    "report": ("hipexp.report.command:main", "all runs as one HTML file, with figures and tables; report out=<folder> runs=<folder>", SAY),
    "models": ("hipexp.run.models_table:main", "every family of models that fits, tried on small checkpoints of its real classes", SAY),
    "methods": ("hipexp.run.methods_table:main", "every method beside each other; fast=true is short", ALL),
    "calibrate": (
        "hipexp.run.calibrate:main",
        "a pipeline whose layers have measured budgets and RoPE strategies: calibrate +pipeline=3stage",
        SAY,
    ),
    "table": ("hipexp.run.needle_table:main", "the long form of the demo", ALL),
    "data": ("hipexp.run.data:main", "data of the suites: data pull longbench, data verify, data ls, data make stand-ins out=<folder>", ()),
    "score": ("hipexp.run.score:main", "official scores of predictions made elsewhere, as JSON: score longbench predictions.jsonl", ()),
    "replay": (
        "hipexp.run.replay:main",
        "hits and traffic of caches of any size and policy in a recorded run; replay record records one",
        (JSON,),
    ),
    "sweep": ("hipexp.run.sweep:main", "a wandb sweep file, also one of your own, without wandb: sweep budget [key=value …] [jobs=2]", ALL),
    "tune": (
        "hipexp.tune.command:main",
        "search for pipelines that no other beats: tune task=infbench objective=[score,bytes] max_bytes=3stage hours=1",
        ALL,
    ),
    "repro": (
        "hipexp.repro.command:main",
        "tables and figures of the paper beside ours: repro (which there are), repro table2 size=needle, repro all size=needle",
        ALL,
    ),
    "completion": ("hipexp.completion:main", "completion of this command line for a shell: source <(hipexp completion bash)", ()),
    "doctor": ("hipexp.doctor:main", "versions, device, what is missing; doctor +pipeline=3stage task=ruler: does that run fit?", SAY),
}
DONE, FAILED, BAD_INPUT = 0, 1, 2

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

flags: --dry-run shows the configuration, what attention would do and what is left, and loads no weights (but methods and
       table, which time the model to say how long they take); --quiet prints the run folder only, --json the summary as
       one line of JSON (everything else goes to stderr). All go with -m too, and with the commands whose --help names them.

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
    commands = "\n".join(f"  {name:<10} {purpose}" for name, (_, purpose, _) in COMMANDS.items())
    return HELP.format(groups=groups, commands=commands)


def _run_command(name: str, words: list[str]) -> int:
    if name not in COMMANDS:
        from hipexp.config.convert import unknown

        raise unknown(f"command {name}", name, COMMANDS)
    _check_one_process(words, f"the command {name}")
    place, purpose, flags = COMMANDS[name]
    takes = ", ".join(flags) or "no flags"
    if {"-h", "--help"} & set(words):
        from hipexp.completion import OF_POINTS, OWN

        own = [word for word in OWN.get(name, {}) if word]
        own += ["groups and keys as of a run"] * (name in OF_POINTS)
        print("\n".join([f"python -m hipexp {name}: {purpose}", *([f"words: {', '.join(own)}"] if own else []), f"flags: {takes}"]))
        return DONE
    for word in words:
        if word in ALL and word not in flags:
            raise ConfigError(f"{name} takes no {word}; it takes {takes}")
    _check_words(name, words)
    module, _, function = place.partition(":")
    return int(getattr(import_module(module), function)(words))


def _check_words(command: str, words: list[str]) -> None:
    """Refuse a word that neither the command nor a run knows, with a guess among both; raises ConfigError."""
    from hipexp.completion import OF_POINTS, OWN
    from hipexp.config.overrides import GROUPS

    if command in OF_POINTS:
        known = [*(word.removesuffix("=") for word in OWN.get(command, {}) if word.endswith("=")), *GROUPS, "seed"]
        for word in words:
            key, equals, _ = word.partition("=")
            if equals and key.isidentifier() and key not in known:
                from hipexp.config.convert import unknown

                raise unknown(key, key, known)


def _run_overrides(words: list[str]) -> int:
    from hipexp.config import compose

    flags, words = split_flags(words)
    line = compose.read_line(words)
    if line.show:
        print(compose.to_yaml(compose.compose_point(line.overrides)), end="")
        return DONE
    if line.sweep:
        return _run_sweep(line.overrides, flags)
    experiment = compose.compose_point(line.overrides)
    if DRY not in flags:
        return _run_point(experiment, words, flags)
    from hipexp.run.plan import checked_plan, show

    show([("", checked_plan(experiment, flags))], flags, compose.to_yaml(experiment))
    return DONE


def _run_point(experiment: Experiment, words: list[str], flags: Flags, tells: bool = True) -> int:
    """Run a point; ``tells``: with ``--json`` or ``--quiet`` it says itself what came out."""
    from hipexp.config.processes import started
    from hipexp.run.point import prepare, run_point

    prepare(experiment)
    with aside(flags):
        folder = run_point(experiment, words)
    if started().number or not tells:
        return DONE
    if JSON in flags:
        from hipexp.run.ledger import read_json

        print(to_json(read_json(folder / "summary.json") | {"folder": str(folder)}), flush=True)
    elif QUIET in flags:
        print(folder, flush=True)
    return DONE


def _run_sweep(overrides: list[str], flags: Flags) -> int:
    """The points of a sweep through Hydra's launcher, or with ``--dry-run`` what they would do."""
    _check_one_process(overrides, "a sweep (-m)")
    from hipexp.run import multirun

    if DRY in flags:
        return multirun.show_plans(overrides, flags)
    return multirun.run_sweep(overrides, flags, _run_point, _explain)


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
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in NEEDED:
        return _complain(f"{error.name} is not installed, and hipexp needs it; run: python -m pip install hipexp", FAILED)
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
