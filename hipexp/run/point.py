"""One experiment point: samples through the model, into the ledger, to a summary; ``run_point`` is what the command line calls."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hipexp.config.check import OFFLOADING, check_layers, check_model
from hipexp.config.compiler import check_compiler
from hipexp.config.convert import to_plain
from hipexp.config.model import model_folder
from hipexp.config.offload import Room
from hipexp.config.processes import check_shared, started
from hipexp.config.schema import ConfigError, Experiment, Model, Offload, Track
from hipexp.report.tables import text_table
from hipexp.run import environment
from hipexp.run.identity import facts_of, fetching, key_of, key_without_data, model_revision, version_of
from hipexp.run.job import Job
from hipexp.run.ledger import Ledger, RunFailed, is_done, open_ledger, read_json, read_rows, run_folder
from hipexp.run.room import check_room, on_disk_tier, weights_bytes
from hipexp.run.strategy import describe
from hipexp.run.team import ALONE, Team, team_of
from hipexp.run.tokenizer_file import read_tokenizer
from hipexp.run.traffic import thrashing, traffic_table
from hipexp.suites import OWN
from hipexp.suites.sample import DataMissing, Item, LineEncoder, ProtocolCard, Sample, Suite
from hipexp.suites.scoring import score_rows, scores_behind
from hipexp.suites.scoring.statistics import describe as describe_scores
from hipexp.suites.scoring.statistics import paired_difference
from hipexp.track import Trackers, open_trackers

if TYPE_CHECKING:
    from hipexp.hf import Generation, Loaded
    from hipexp.hf.install import Installed

LOG = logging.getLogger("hipexp")
Load = Callable[[Model], "Loaded"]
Say = Callable[[str], None]
EXACT = "exact everywhere: nothing was pruned"
REQUESTS = "request s: median of a whole request, with the server's queue and the way there"
MEMORY = "peak MiB: memory above the loaded model"
COSTS = ("prefill s", "decode ms/step", "peak MiB")
SERVED_COSTS = ("request s",)
ONE_POINT = "torchrun --nproc-per-node 2 -m hipexp +pipeline=3stage model.tp_plan=auto"


def quiet(text: str) -> None:
    """Say nothing."""


def run_point(experiment: Experiment, overrides: Sequence[str] | None = None) -> Path:
    """Run one point, or take its stored result, and print what came out; returns the run folder.

    The last line on stdout is the folder, progress goes to stderr. ``overrides`` are those of the command line, for the hint
    how to get the dense result (without them there is none). Raises ``ConfigError`` and ``DataMissing`` for bad input, ``Interrupted``
    when stopped, ``RunFailed`` and whatever else went wrong after recording it in ``status.json``. Of processes that share the model the
    first does all that, and the others compute with it.
    """
    with team_of(experiment.model) as team:
        if not team.leads:
            follow(experiment, team)
            return folder_of(experiment)
        known = stored(experiment)
        folder = execute(experiment, say=print, team=team)
        if known:
            print(f"stored result of {folder}")
            print("\n".join(read_json(folder / "card.json").get("strategy", [])))
        print(report(experiment, folder, overrides))
        print(folder)
        return folder


def check_point(experiment: Experiment) -> None:
    """Refuse what can be without a model: a pipeline that breaks a rule in it, lengths too short, or beyond the limits of an offload.

    For a model on a hub the run does it, once the files it needs are here. Raises ``ConfigError``. Imports torch for methods with
    parameters of their own.
    """
    check_shared(experiment.model)
    check_compiler(experiment.model)
    check_method(experiment)
    if experiment.task.name == "recall":
        from hipexp.run import recall

        recall.check_budgets(experiment)
    if experiment.task.geometry is not None:
        return
    facts, folder = check_model(experiment), model_folder(experiment.model)
    check_method(experiment, facts.layers if facts else 0)
    if facts is not None and folder is not None and (folder / "tokenizer.json").is_file():
        suite = open_suite_for(experiment, read_tokenizer(folder / "tokenizer.json"), facts.trained_tok)
        if experiment.task.name != "recall":
            check_room(experiment, facts, suite, room=Room(None, None))


def prepare(experiment: Experiment) -> None:
    """Check a point that is to run. Where its data or its model are not here, that is its result: a failed run, in ``missing_folder``.

    The folder goes when they are here. Raises as ``check_point``, and ``DataMissing``.
    """
    try:
        check_point(experiment)
        check_weights(experiment)
        key_of(experiment)
    except DataMissing as error:
        if started().number == 0:
            with open_ledger(missing_folder(experiment), key_without_data(experiment)) as ledger:
                ledger.write("config.yaml", environment.to_yaml(resolved(experiment)))
                raise error
        raise
    if started().number == 0 and (place := missing_folder(experiment)).exists():
        shutil.rmtree(place, ignore_errors=True)


def check_weights(experiment: Experiment) -> None:
    """Refuse a model's folder without weights; those of a model on a hub, the run asks for. Raises ``DataMissing``."""
    model = experiment.model
    folder = model_folder(model) if model.base_url is None and experiment.task.geometry is None else None
    if folder is not None and not weights_bytes(model):
        raise DataMissing(f"model.path={model.path} holds no weights (as model.safetensors); put them there, or name another folder")


def missing_folder(experiment: Experiment) -> Path:
    """The run folder of an experiment whose data or model are not here: what they are, which a run key holds, nobody knows."""
    return run_folder(experiment.task.name, model_name(experiment), pipeline_name(experiment), key_without_data(experiment))


def check_method(experiment: Experiment, n_layers: int = 0) -> None:
    """Refuse parameters that break a rule of the method; ``n_layers``: of the model, 0 where that is not known. Raises ``ConfigError``."""
    pipeline, task = experiment.pipeline, experiment.task
    if pipeline is None or pipeline.method in OFFLOADING:
        return
    from hipexp.attention.methods import check_alone, check_methods

    if task.geometry is None:
        check_methods(pipeline, n_layers, experiment.model.prefill_chunk_tok)
    else:
        check_methods(pipeline)
        check_alone(pipeline.plan_alone(task.layer))


def folder_of(experiment: Experiment) -> Path:
    """The run folder of an experiment, whether it exists or not."""
    return run_folder(experiment.task.name, model_name(experiment), pipeline_name(experiment), key_of(experiment))


def model_name(experiment: Experiment) -> str:
    """What to call the model; the geometry, where attention is alone."""
    return experiment.task.geometry or experiment.model.name or experiment.model.path


def pipeline_name(experiment: Experiment) -> str | None:
    """What to call the pipeline: the preset it came from, else its method; None for dense attention, ``served`` for a server's own."""
    if experiment.model.base_url is not None:
        return "served"
    return None if experiment.pipeline is None else experiment.pipeline.name or experiment.pipeline.method


def stored(experiment: Experiment) -> bool:
    """Whether the result of an experiment is there already."""
    return is_done(folder_of(experiment), key_of(experiment))


def execute(experiment: Experiment, load: Load | None = None, say: Say = quiet, team: Team = ALONE) -> Path:
    """Make sure that the result of a point exists and return its folder; a finished run costs nothing.

    ``load`` replaces the loading of the model, for callers that run several points on one. ``team``: the processes of which this is the
    first; the others :func:`follow`. Raises as ``run_point``.
    """
    key, folder = key_of(experiment), folder_of(experiment)
    if team is ALONE and experiment.model.tp_plan is not None:
        raise ConfigError(f"model.tp_plan={experiment.model.tp_plan} is for one point at a time, as in {ONE_POINT}; leave it out")
    if is_done(folder, key):
        team.share(None)
        if experiment.model.base_url is not None:
            from hipexp.run import served

            served.check_kind(read_json(folder / "card.json")["model"]["served"], experiment.model)
        _tell_sweep(experiment, folder, say)
        return folder
    with open_ledger(folder, key) as ledger:
        if not ledger.done:
            team.share((key, ledger.rows))
            with team.together():
                _run(experiment, ledger, load, say)
            return folder
    team.share(None)
    _tell_sweep(experiment, folder, say)  # another process finished it meanwhile
    return folder


def follow(experiment: Experiment, team: Team) -> None:
    """Compute what the first process of ``team`` runs, if anything; what is written here goes into a scratch folder.

    Raises ``RunFailed`` if the run would be another one here, and what went wrong.
    """
    told = team.share()
    if told is None:
        return
    key, rows = told
    check_unchanged(experiment, key)
    with TemporaryDirectory(prefix="hipexp-process-") as folder, open_ledger(Path(folder), key) as ledger, team.together():
        for row in rows:
            ledger.append(row)
        _run(dataclasses.replace(experiment, track=Track()), ledger, None, quiet)


def _tell_sweep(experiment: Experiment, folder: Path, say: Say) -> None:
    """A sweep agent waits for numbers even when the ledger has had them all along."""
    if experiment.track.name == "local":
        return
    from hipexp.track.wandb import in_sweep

    if not in_sweep():
        say(f"wandb is told nothing: this result is stored already; to run it again for wandb, move {folder} away")
    else:
        summary = read_json(folder / "summary.json")
        with following(experiment, folder, summary["run_key"], read_json(folder / "card.json")) as trackers:
            trackers.finish(summary, sorted(folder.glob("*.png")))


def _run(experiment: Experiment, ledger: Ledger, load: Load | None, say: Say) -> None:
    ledger.status("running")
    ledger.write("config.yaml", environment.to_yaml(resolved(experiment)))
    if experiment.task.geometry is not None:
        from hipexp.run import attention_point, recall

        job = attention_point.job(experiment) if experiment.task.name == "latency" else recall.job(experiment, None)
    elif experiment.model.base_url is not None:
        from hipexp.run import served

        job = served.job(experiment, ledger)
    else:
        job = model_job(experiment, ledger, load)
    ledger.keep(job.points)
    ledger.status("running")  # now with the number of samples
    if ledger.dropped:
        say(f"{ledger.dropped} line(s) dropped that are damaged, repeated or of no sample of this run: what is missing is done again")
    say("\n".join(job.card["strategy"]))
    if ledger.rows:
        say(f"continuing after {len(ledger.rows)} finished sample(s)")
    ledger.write("card.json", job.card)
    ledger.write("env.json", environment.describe_run(experiment.model))
    head = head_of(experiment, ledger.key)
    with following(experiment, ledger.folder, ledger.key, job.card) as trackers:
        summary = head | job.measure(ledger, trackers)
        environment.write_records(ledger.folder, head, job.card, ledger.rows)
        ledger.write("summary.json", summary)
        ledger.status("done")
        trackers.finish(summary, sorted(ledger.folder.glob("*.png")))


def model_job(experiment: Experiment, ledger: Ledger, load: Load | None) -> Job:
    """The run of an experiment with a model, which is loaded here."""
    from hipexp.run import latency, recall

    facts = facts_of(experiment.model)
    check_layers(experiment, facts)
    check_method(experiment, facts.layers)
    if load is None:  # refuse what can be before any weights load
        suite = open_suite_for(experiment, load_tokenizer(experiment.model), facts.trained_tok)
        check_room(experiment, facts, suite, weights_bytes(experiment.model))
    loaded = (load or load_model)(experiment.model)
    check_unchanged(experiment, ledger.key)
    if experiment.task.name == "recall":
        return recall.job(experiment, loaded)
    suite = open_suite_for(experiment, loaded.tokenizer, loaded.trained_tok)
    if load is not None:
        check_room(experiment, facts, suite)
    strategy = describe(experiment.pipeline, loaded.n_layers, experiment.offload, loaded.own_layers, loaded.notes)
    card = card_of(experiment, suite.card() if suite else latency.card(experiment, loaded.n_layers), loaded) | {"strategy": strategy}
    if suite is None:
        points = [(one.subtask, one.repeat) for one in latency.points(experiment, loaded.trained_tok)]
        return Job(points, card, partial(latency.measure, experiment, loaded))

    def measure(ledger: Ledger, trackers: Trackers) -> dict[str, Any]:
        run_samples(experiment, suite, loaded, ledger, trackers)
        card["truncation"]["removed_tok"] = removed_tok(ledger.rows)
        ledger.write("card.json", card)
        return summarize(suite.card(), ledger.rows)

    return Job([(item.subtask, item.index) for item in suite.items()], card, measure)


def check_unchanged(experiment: Experiment, run_key: str) -> None:
    """Raise ``RunFailed`` if the experiment has got another key: what was loaded may not be the model that the key stands for."""
    if key_of(experiment) != run_key:
        raise RunFailed(f"the files of model.path={experiment.model.path} changed while it was loaded; the same command runs the new ones")


def load_model(model: Model) -> Loaded:
    """The model of a configuration, ready to generate. Raises ``ConfigError``, ``DataMissing`` for a hub model that is not all here."""
    from hipexp import hf

    with fetching(model, OSError):
        return hf.load(model)


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of a configuration's model, without its weights. Raises as ``load_model``."""
    from hipexp import hf

    with fetching(model, OSError):
        return hf.load_tokenizer(model)


def open_suite_for(experiment: Experiment, tokenizer: Any, trained_tok: int) -> Suite | None:
    """The suite of an experiment, for the tokenizer and the trained length of its model; None for latency.

    Raises ``ConfigError`` for a length that is too short for a sample's frame.
    """
    from hipexp.run import latency, recall
    from hipexp.suites import open_suite

    if experiment.task.name == "latency":
        latency.check_lengths(experiment, LineEncoder(tokenizer), trained_tok)
        return None
    if experiment.task.name == "recall":
        recall.check_lengths(experiment, LineEncoder(tokenizer), trained_tok)
        return None
    return open_suite(experiment.task, tokenizer, trained_tok, experiment.seed)


@contextmanager
def following(experiment: Experiment, folder: Path, run_key: str, card: dict[str, Any]) -> Iterator[Trackers]:
    """The trackers of a run, started; told to finish early if an error leaves the block."""
    trackers = open_trackers(experiment.track)
    config = resolved(experiment) | {"run_key": run_key}
    try:
        trackers.start(folder, config, card)
    except Exception as error:
        repair = "log in, or use track.mode=offline or track=local; nothing was run yet that is lost"
        raise RunFailed(f"track={experiment.track.name} could not start ({type(error).__name__}: {error}); {repair}") from error
    try:
        yield trackers
    except BaseException:
        trackers.finish(None, [])
        raise


def resolved(experiment: Experiment) -> dict[str, Any]:
    """The configuration as plain data. The schema has no field for a secret: wandb takes its own from its own settings."""
    return to_plain(experiment)


def card_of(experiment: Experiment, card: ProtocolCard, loaded: Loaded) -> dict[str, Any]:
    """The protocol card with what only the loaded model can say."""
    model = {
        "revision": model_revision(experiment.model),
        "dtype": loaded.dtype,
        "trained_tok": loaded.trained_tok,
        "n_layers": loaded.n_layers,
        "transformers": version_of("transformers"),
    }
    if experiment.model.tp_plan is not None:
        model["tp_processes"] = started().count
    return dataclasses.replace(card, model=model).to_dict()


def head_of(experiment: Experiment, run_key: str) -> dict[str, Any]:
    """What every summary begins with."""
    names = {"task": experiment.task.name, "model": model_name(experiment)}
    return {"run_key": run_key, **names, "pipeline": pipeline_name(experiment), "status": "done"}


def run_samples(experiment: Experiment, suite: Suite, loaded: Loaded, ledger: Ledger, trackers: Trackers) -> None:
    """Do every sample that is not in the ledger yet, ``task.batch`` at a time."""
    from hipexp import hf

    todo = [item for item in suite.items() if not ledger.has(item.subtask, item.index)]
    with (
        hf.install(loaded.model, experiment.pipeline, loaded.trained_tok, offload=experiment.offload) as installed,
        token_bar(sum(item.length_tok for item in todo)) as bar,
    ):
        for batch in batches(todo, experiment.task.batch):
            bar.set_description(f"{experiment.task.name} {batch[0].subtask} {batch[0].index}")
            samples = [suite.sample(item) for item in batch]
            with on_disk_tier():
                answers = answer(experiment, loaded, samples, bar.update, installed)
            for sample, made in zip(samples, answers, strict=True):
                ledger.append(row_of(suite, sample, made, loaded))
                trackers.log(ledger.rows[-1], mean_scores(ledger.rows))
            bar.advance_to(sum(item.length_tok for item in batch))


def answer(
    experiment: Experiment, loaded: Loaded, samples: list[Sample], progress: Callable[[int], None], installed: Installed
) -> list[Generation]:
    """Greedy answers to ``samples``, as a batch; each has its own limit of new tokens, the batch runs to the largest."""
    from hipexp import hf

    answers = hf.generate(
        loaded,
        [sample.tokens for sample in samples],
        max_new_tok=max(sample.max_new_tok for sample in samples),
        prefill_chunk_tok=experiment.model.prefill_chunk_tok,
        stop_ids=(stops := hf.end_tokens(loaded.model, loaded.tokenizer) | (line_end(loaded) if samples[0].one_line else set())),
        not_first=stops if samples[0].one_line else (),
        progress=progress,
        installed=installed,
        graphs=experiment.model.cuda_graphs,
    )
    for sample, made in zip(samples, answers, strict=True):
        del made.tokens[sample.max_new_tok :]
    return answers


def line_end(loaded: Loaded) -> set[int]:
    """The token that ends a line."""
    return {loaded.tokenizer("\n", add_special_tokens=False).input_ids[-1]}


def batches(items: list[Item], size: int) -> Iterator[list[Item]]:
    """Neighbours of the same subtask, at most ``size`` together."""
    batch: list[Item] = []
    for item in items:
        if batch and (len(batch) >= size or batch[0].subtask != item.subtask):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def scored(suite: Suite, sample: Sample, prediction: str) -> dict[str, Any]:
    """What a line of ``samples.jsonl`` says of a sample and its answer, whoever gave it."""
    return {
        "subtask": sample.subtask,
        "sample": sample.index,
        "prediction": prediction,
        "references": sample.references,
        "score": suite.score(sample, prediction),
        "removed_tok": sample.removed_tok,
        "status": "done",
        "length_tok": sample.length_tok,
    }


def row_of(suite: Suite, sample: Sample, made: Generation, loaded: Loaded) -> dict[str, Any]:
    """The line of ``samples.jsonl`` of a finished sample; scores are 0 to 100, ``decode_ms`` is the mean of a step."""
    prediction = loaded.tokenizer.decode(made.tokens, skip_special_tokens=True)
    return scored(suite, sample, prediction) | {
        "context_tok": len(sample.tokens),
        "new_tok": len(made.tokens),
        "prefill_ms": round(made.prefill_ms, 3),
        "decode_ms": round(statistics.fmean(made.decode_ms), 3) if made.decode_ms else None,
        "peak_bytes": made.peak_bytes,
        "exact": made.exact,
        "traffic": made.traffic and made.traffic | {"steps": len(made.decode_ms)},
        **sample.meta,
    }


def mean_scores(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Mean score of each subtask, in the order of first appearance."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["subtask"], []).append(row["score"])
    return {name: statistics.fmean(values) for name, values in scores.items()}


def removed_tok(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Tokens that truncation removed, per subtask."""
    removed: dict[str, int] = {}
    for row in rows:
        removed[row["subtask"]] = removed.get(row["subtask"], 0) + row["removed_tok"]
    return removed


def summarize(card: ProtocolCard, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The scores, times and memory of a finished run; ``average`` is the plain mean of the subtasks.

    Each score has its 95 % interval over samples. Under an official protocol scores are as the official scorer groups and rounds them, and
    ``averages`` those means it prints of which all tasks are there. ``traffic`` is that of ``hipexp.cache.traffic.summarize``: ``{}`` where
    all keys and values stay on the device, else rows by layer, phase and reader, the same over all layers, and totals of each phase.
    """
    from hipexp.cache import traffic

    prefill, decode = ([row[name] for row in rows if row[name] is not None] for name in ("prefill_ms", "decode_ms"))
    return {
        **scores_of(card, rows),
        "protocol": card.protocol,
        "edition": card.edition,
        "note": card.note,
        "exact": None if any(row["exact"] is None for row in rows) else all(row["exact"] for row in rows),
        "latency": {
            "prefill_ms": round(statistics.median(prefill), 3) if prefill else None,
            "decode_ms": round(statistics.median(decode), 3) if decode else None,
        },
        "memory": {"peak_bytes": max((row["peak_bytes"] for row in rows if row["peak_bytes"] is not None), default=None)},
        "traffic": traffic.summarize(row["traffic"] for row in rows),
        "recall": {},
    }


def scores_of(card: ProtocolCard, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``scores``, ``average`` and ``averages`` of a summary."""
    average = round(statistics.fmean(mean_scores(rows).values()), 2)
    if card.protocol != OWN:
        official = score_rows(card.suite, rows, card.edition if card.suite == "infbench" else None)
        return {"scores": official["scores"], "average": average, "averages": official["averages"]}
    found = {}
    for name, metric in card.metric.items():
        told = describe_scores([row["score"] for row in rows if row["subtask"] == name])
        interval = told["interval"] and [round(bound, 2) for bound in told["interval"]]
        found[name] = {"metric": metric, "score": round(told["score"], 2), "n": told["n"], "interval": interval}
    return {"scores": found, "average": average, "averages": {}}


class TokenBar:
    """A progress bar over prompt tokens that cannot drift: ``advance_to`` corrects it after every batch."""

    def __init__(self, bar: Any):
        self._bar, self._reached = bar, 0

    def set_description(self, text: str) -> None:
        self._bar.set_description(text)

    def update(self, tokens: int) -> None:
        """``tokens`` more are done."""
        self._bar.update(tokens)

    def advance_to(self, tokens: int) -> None:
        """The batch is done: it stood for ``tokens`` tokens in the total."""
        self._reached += tokens
        self._bar.update(self._reached - self._bar.n)


@contextmanager
def token_bar(total: int) -> Iterator[TokenBar]:
    """A progress bar on stderr; where that is no terminal, a line every ten seconds. Of several processes the first has one."""
    from tqdm import tqdm

    every, leads = 0.2 if sys.stderr.isatty() else 10.0, total > 0 and started().number == 0
    with tqdm(total=total, unit="tok", unit_scale=True, file=sys.stderr, mininterval=every, leave=False, disable=not leads) as bar:
        yield TokenBar(bar)


def report(experiment: Experiment, folder: Path, overrides: Sequence[str] | None = None) -> str:
    """What the finished run in ``folder`` says on the terminal: its scores with the protocol beside each, and the dense ones."""
    summary = read_json(folder / "summary.json")
    if experiment.task.name == "recall":
        from hipexp.run import recall

        return recall.table(summary)
    if experiment.task.geometry is not None:
        from hipexp.run import attention_point

        return attention_point.table(summary["latency"]["rows"])
    exact = EXACT if summary["exact"] and experiment.pipeline is not None else ""
    rows, n_layers = read_rows(folder), read_json(folder / "card.json")["model"].get("n_layers", 0)  # a server does not tell them
    slow = thrashing(experiment, rows, n_layers)
    if experiment.task.name == "latency":
        from hipexp.run import latency

        few = latency.too_few_steps(experiment, n_layers)
        return "\n".join(filter(None, [latency.table(summary["latency"]["rows"]), few, exact, slow]))
    dense = None if experiment.pipeline is None else dataclasses.replace(experiment, pipeline=None, offload=Offload())
    dense_rows = read_rows(folder_of(dense)) if dense and stored(dense) else None
    cost = MEMORY if experiment.model.base_url is None else REQUESTS
    lines = [score_table(summary, rows, dense_rows), cost, summary["note"], exact, traffic_table(summary["traffic"]), slow]
    if dense and dense_rows is None and overrides is not None:
        lines.append(f"dense on the same samples: {dense_command(overrides)}")
    return "\n".join(filter(None, lines))


def score_table(summary: dict[str, Any], rows: list[dict[str, Any]], dense_rows: list[dict[str, Any]] | None) -> str:
    """Scores, times and memory per subtask; with ``dense_rows`` also the dense score and how many answers changed."""
    price, names = (request_s, SERVED_COSTS) if "request_ms" in rows[0] else (costs, COSTS)
    header = ["subtask", "protocol", "samples", "score", "95 %", "dense", "difference", "better/worse", *names]
    ours, theirs, table = grouped(summary, rows), grouped(summary, dense_rows or []), []
    by_key = {(row["subtask"], row["sample"]): row for row in rows}
    protocol = summary["protocol"] if summary["protocol"] == OWN else f"{summary['protocol']}, {summary['edition']}"
    for name, cell in summary["scores"].items():
        mine, dense = ours[name], theirs.get(name, {})
        pairs = [(score, dense[key]) for key, score in mine.items() if key in dense]
        cells = [name, protocol, cell["n"], cell["score"], span(cell.get("interval"))]
        table.append([*cells, *against(pairs), *price([by_key[key] for key in mine])])
    if not dense_rows:
        header, table = drop_columns(header, table, ("dense", "difference", "better/worse"))
    means = [[name, protocol, None, value, *[None] * (len(header) - 4)] for name, value in summary.get("averages", {}).items()]
    return text_table(header, table + means, left=2)


def grouped(summary: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, dict[tuple[str, int], float]]:
    """Scores of single samples (by subtask and number) behind each score of a summary: of a subtask, or of a group of its samples."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for row in rows:
        for name, score in scores_behind(summary["protocol"], summary["task"], row).items():
            found.setdefault(name, {})[row["subtask"], row["sample"]] = score
    return found


def span(interval: list[float] | None) -> str | None:
    """An interval as text."""
    return None if interval is None else f"{interval[0]:.0f}–{interval[1]:.0f}"


def against(pairs: list[tuple[float, float]]) -> list[Any]:
    """Of ``(score, dense score)`` pairs: the dense mean, the paired difference with its 95 % interval, how many became better and worse."""
    if not pairs:
        return [None, None, None]
    better, worse = (sum(sign * (score - dense) > 0 for score, dense in pairs) for sign in (1, -1))
    told = paired_difference([score for score, _ in pairs], [dense for _, dense in pairs])
    around = "" if told["interval"] is None else f" ({told['interval'][0]:+.0f} to {told['interval'][1]:+.0f})"
    return [statistics.fmean(dense for _, dense in pairs), f"{told['mean']:+.1f}{around}", f"+{better}/−{worse}"]


def costs(rows: list[dict[str, Any]]) -> list[Any]:
    """Median prefill seconds, median milliseconds of a decode step, and the largest memory in MiB above the loaded model."""
    decode = [row["decode_ms"] for row in rows if row["decode_ms"] is not None]
    prefill = statistics.median(row["prefill_ms"] for row in rows) / 1000
    return [prefill, statistics.median(decode) if decode else None, max(row["peak_bytes"] for row in rows) / 2**20]


def request_s(rows: list[dict[str, Any]]) -> list[Any]:
    """Median seconds of a request to a server."""
    return [statistics.median(row["request_ms"] for row in rows) / 1000]


def drop_columns(header: list[str], rows: list[list[Any]], names: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """A table without the columns ``names``."""
    keep = [i for i, name in enumerate(header) if name not in names]
    return [header[i] for i in keep], [[row[i] for i in keep] for row in rows]


def dense_command(overrides: Sequence[str]) -> str:
    """The command that runs the same samples with dense attention."""
    kept = [word for word in overrides if not word.lstrip("+~-").startswith(("pipeline=", "pipeline.", "track", "offload"))]
    count = started().count
    start = ["python"] if count == 1 else ["torchrun", "--nproc-per-node", str(count)]
    return shlex.join([*start, "-m", "hipexp", *kept])
