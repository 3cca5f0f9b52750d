"""``tune`` with a model that knows every answer, and recall that is a number: what is drawn, told, resumed and written."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
import yaml

import hipexp
from hipexp.config.compose import compose
from hipexp.config.overrides import conf_dir
from hipexp.config.schema import ConfigError, Pipeline, Representative, Stage
from hipexp.run.allocation import rules
from hipexp.run.budgets import divided
from hipexp.run.ledger import RunFailed, is_done, read_json
from hipexp.run.point import folder_of
from hipexp.run.several import load_once
from hipexp.tune import command, launch
from hipexp.tune.final import SLACK, Final, Result
from hipexp.tune.launch import Launch
from hipexp.tune.objectives import dominates, front, read_objectives
from hipexp.tune.recall import Recorded
from hipexp.tune.report import verdicts
from hipexp.tune.search import Search
from hipexp.tune.study import Point, open_study

pytest.importorskip("optuna", reason="optuna is not installed: pip install '.[tune]'")
MODEL = Path(hipexp.__file__).parent / "needle" / "model"
ROOT = Path(__file__).parents[2]
SEARCH = ["task=infbench", "task.subtasks=[passkey]", "task.length_tok=1024", "task.samples=2", "held_out=3", "hours=0.2", "name=found"]


def held(pipeline) -> list[float]:
    """What a pipeline seems to hold: more with more tokens, by chance in part."""
    share = min(1.0, (pipeline.stages[-1].keep_tok + pipeline.window_tok) / 4096)
    lot = random.Random(repr(pipeline))
    return [round(share * (0.9 + 0.1 * lot.random()), 5) for _ in range(4)]


def said(*words: str) -> list[str]:
    """Words of which the last of a name counts: none may be said twice."""
    return list({word.split("=")[0]: word for word in words}.values())


@pytest.fixture
def search(fake, model_folder, monkeypatch, capsys):
    """``search("trials=20")`` runs the command and returns what it found, and its output."""
    monkeypatch.setattr(Recorded, "of", lambda self, pipeline: held(pipeline))
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no test pulls the plug
    drawn = command.picture
    monkeypatch.setattr(command, "picture", lambda *args: run.draws and drawn(*args))

    def run(*words):
        assert command.main(said(f"model.path={model_folder}", *SEARCH, *words)) == 0
        told = capsys.readouterr()
        return read_json(Path(told.out.splitlines()[-1]) / "result.json"), told

    run.fake, run.model, run.draws = fake, model_folder, False
    return run


def journal(folder: Path) -> list[tuple]:
    """What was drawn and what became of it, in order."""
    with open_study(folder, read_objectives("[score,bytes]"), "tpe", 0) as study:
        trials = study.inner.get_trials()
        points = study.points()
    return [(trial.params, trial.values, point.kind, point.why, point.scores) for trial, point in zip(trials, points, strict=True)]


def folder_of_search() -> Path:
    return Path(os.environ["HIPEXP_RUNS"]) / "tune" / "found"


def test_the_front_runs_as_it_is_written(search):
    search.draws = True
    found, told = search("trials=30")
    assert found["points"]["measured"] >= 2
    assert len(found["best"]) > 1, "what reads least, and others that hold more"
    best = found["best"][-1]
    assert best["search"]["bytes"] == min(one["search"]["bytes"] for one in found["best"])
    text = Path(best["file"]).read_text()
    command = text.splitlines()[0].removeprefix("# python -m hipexp ")
    experiment = compose([word.strip("'") for word in command.split(" ")])
    assert folder_of(experiment).is_dir() and is_done(folder_of(experiment), read_json(folder_of(experiment) / "status.json")["run_key"])
    assert "score, held out: 100.0 (29 to 100) of 3 prompts; 3stage: 100.0 (29 to 100)" in text
    assert f"{best['search']['bytes'] / 1e6:.3f} MB" in text
    assert "dominates 3stage on 3 held-out prompts, by means: score 100.0 to 100.0 (paired: +0.0" in told.out
    assert found["baseline"]["held_out"] == {"score": 100.0, "bytes": found["baseline"]["search"]["bytes"], "scores": {"0": [100.0] * 3}}
    svg = (folder_of_search() / "front.svg").read_text()
    assert all(name in svg for name in ("<!-- measured -->", "<!-- handed over, held out -->", "<!-- 3stage, held out -->"))
    assert matplotlib.image.imread(folder_of_search() / "front.png").std() > 0
    assert (folder_of_search() / "table.txt").read_text().strip() in told.out


def test_the_front_is_what_no_measured_point_beats(search):
    found, _ = search("trials=40", "objective=[recall,bytes]", "checked=1")
    objectives = read_objectives("[recall,bytes]")
    with open_study(folder_of_search(), objectives, "tpe", 0) as study:
        points = [point for point in study.points() if point.kind == "measured"]
    best = {points[i].number for i in front([point.values(objectives) for point in points], objectives)}
    assert {one["point"] for one in found["best"]} == best and len(best) > 1
    for one in found["best"]:
        made = compose([f"+pipeline='{one['file']}'", "task=infbench"]).pipeline
        assert rules(made, 5) == rules(next(point.pipeline for point in points if point.number == one["point"]), 5)
        assert one["held_out"]["recall"], "also where more are found than checked="
    assert search.fake.calls == 0, "nobody asked for answers"


def test_what_is_hopeless_is_not_asked_of_the_model(search):
    search("trials=30")
    drawn = journal(folder_of_search())
    kinds = {kind for _, _, kind, _, _ in drawn}
    assert {"measured", "invalid", "recall"} <= kinds
    for _, values, kind, why, scores in drawn:
        assert (kind == "measured") == bool(values) or kind == "repeated"
        assert scores == {} or kind in ("measured", "repeated")
        assert why or kind == "measured"


def test_no_point_reads_more_than_it_may(search):
    found, _ = search("trials=25", "max_bytes=5e6")
    assert found["points"]["bytes"] > 0
    assert all(one["search"]["bytes"] <= 5e6 for one in found["best"])


def test_a_point_that_none_beats_is_asked_more(search):
    search("trials=30", "batch=1")
    asked = [(values, scores) for _, values, kind, _, scores in journal(folder_of_search()) if kind == "measured"]
    objectives = read_objectives("[score,bytes]")
    for number, (values, scores) in enumerate(asked):
        beaten = any(dominates(other, values, objectives) for other, _ in asked[:number])
        assert {rung: len(of) for rung, of in scores.items()} == ({"0": 2} if beaten else {"0": 2, "1": 4})
    assert len({tuple(scores) for _, scores in asked}) == 2, "both happen"


def test_the_same_command_asks_nothing_again(search):
    found, _ = search("trials=10")
    calls = search.fake.calls
    again, told = search("trials=10")
    assert again == found and search.fake.calls == calls
    assert "10 points drawn" in told.err
    more, _ = search("trials=16")
    assert sum(more["points"].values()) == 16 and search.fake.calls > calls


def test_the_seed_decides_what_is_drawn(search, tmp_path, monkeypatch):
    runs = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / place))
        search("trials=25", f"seed={seed}")
        runs.append(journal(folder_of_search()))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("stop", [3, 7])
def test_a_search_that_was_stopped_goes_on_as_if_it_was_not(search, tmp_path, monkeypatch, stop):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "whole"))
    whole, _ = search("trials=25", "batch=4")
    expected = journal(folder_of_search())
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "stopped"))
    execute, calls = launch.run_each, []

    def stopping(points, **more):
        calls.append(points)
        if len(calls) == stop:
            raise KeyboardInterrupt
        execute(points, **more)

    monkeypatch.setattr(launch, "run_each", stopping)
    with pytest.raises(KeyboardInterrupt):
        search("trials=25", "batch=4")
    assert None in [kind for _, _, kind, _, _ in journal(folder_of_search())], "points were being asked"
    found, _ = search("trials=25", "batch=4")
    assert journal(folder_of_search()) == expected
    assert [one["point"] for one in found["best"]] == [one["point"] for one in whole["best"]]


def test_a_run_that_fails_is_no_point_of_the_front(search, monkeypatch):
    """And neither ends the search nor is asked again by it; the same command, later, does."""
    search.fake.fail = None
    execute, calls = launch.run_each, []

    def failing(points, **more):
        calls.append(points)
        search.fake.fail = MemoryError("no room") if len(calls) == 3 else None
        execute(points, **more)

    monkeypatch.setattr(launch, "run_each", failing)
    found, told = search("trials=30")
    assert found["points"]["failed"] == 1
    (why,) = [why for _, _, kind, why, _ in journal(folder_of_search()) if kind == "failed"]
    assert why.startswith("out_of_memory") and "log.txt" in why
    assert "1 failed" in told.out
    again, told = search("trials=30")
    assert "failed" not in again["points"] and again["points"]["measured"] > found["points"]["measured"]
    assert sum(again["points"].values()) == 30


def test_points_that_were_late_are_asked_when_there_is_more_time(search, monkeypatch):
    """They are not lost, and neither are those that are drawn the same."""
    over, asked = Search.over, []
    monkeypatch.setattr(Search, "over", lambda self: (bool(asked) and self.study.points()[-1].asked) or over(self))
    run = Launch.run

    def counting(self, prompts, pipelines):
        if "3stage" not in pipelines:
            asked.append(pipelines)
        return run(self, prompts, pipelines)

    monkeypatch.setattr(Launch, "run", counting)
    found, told = search("trials=30", "batch=4")
    waiting = found["points"]["waiting"]
    assert waiting >= 2 and f"{waiting} waiting for the model" in told.out
    monkeypatch.setattr(Search, "over", over)
    again, told = search("trials=30", "batch=4")
    assert f"{waiting} waiting for the model" in told.err
    assert "waiting" not in again["points"] and sum(again["points"].values()) == 30
    monkeypatch.setenv("HIPEXP_RUNS", os.environ["HIPEXP_RUNS"] + "-whole")
    expected, _ = search("trials=30", "batch=4")
    assert again["points"] == expected["points"], "as if there had been time from the start"


def test_a_batch_is_measured_when_half_of_the_time_went_into_drawing_it(search, monkeypatch):
    sizes, measure = [], Search.measure

    def noted(self, batch):
        sizes.append(len(batch))
        measure(self, batch)

    monkeypatch.setattr(Search, "measure", noted)
    monkeypatch.setattr(Search, "_urgent", lambda self, half: not any(point.kind == "measured" for point in self.study.points()))
    search("trials=30", "batch=4")
    assert sizes[0] == 1 and max(sizes[1:]) > 1


def test_a_baseline_that_fails_is_told(search):
    search.fake.fail = MemoryError("no room")
    with pytest.raises(RunFailed, match="baseline=3stage cannot be compared with"):
        search("trials=5")


def result_of(number: int, read: float, search: float, held_out: list[float] | None, why: str = "") -> Result:
    """A point that had ``search`` of the search's prompts; ``held_out`` None: it was not asked others."""
    checked = None if held_out is None else Point(number, bytes=read, scores={"0": held_out} if held_out else {})
    return Result(f"t{number}", Point(number, bytes=read, scores={"0": [search] * 4}), checked, why=why)


def test_only_held_out_answers_of_both_sides_make_a_verdict(search):
    """Not the scores that chose a point, neither of one that was not asked others nor of one whose last check failed."""
    aim = command.read_words([f"model.path={search.model}", *SEARCH]).aim
    base, good = result_of(0, 33e6, 75.0, [90.0] * 20), result_of(1, 9e6, 75.0, [100.0] * 20)
    unasked, failed = result_of(2, 8e6, 100.0, None), result_of(3, 7e6, 100.0, [], "out_of_memory: no room")
    told = verdicts(aim, [base, good, unasked, failed])
    assert [line.split()[:2] for line in told] == [["t1", "dominates"], ["t3:", "the"]]
    assert told[1] == "t3: the last check failed: out_of_memory: no room"
    assert verdicts(aim, [base, unasked]) == ["no point was compared with t0 on prompts that did not choose it"]
    assert verdicts(aim, [result_of(0, 33e6, 75.0, []), good]) == ["no point was compared with t0 on prompts that did not choose it"]
    assert verdicts(aim, [base, result_of(4, 9e6, 100.0, [50.0] * 20)]) == ["no point dominates t0 on the prompts that did not choose it"]


@pytest.mark.parametrize("baseline", ["3stage", "streaming", "ntk", "dense"])
def test_a_baseline_whose_recall_cannot_be_told_is_compared_by_scores(search, monkeypatch, baseline):
    """3stage cannot keep a third of its budgets in whole chunks, the others have none; scores need no recall of theirs."""

    def of(self, pipeline):
        divided(pipeline, self.divisor)
        return held(pipeline)

    monkeypatch.setattr(Recorded, "of", of)
    order = command.read_words([f"model.path={search.model}", *SEARCH])
    words = [f"baseline={baseline}", f"task.length_tok={3 * order.aim.facts.trained_tok}"]
    assert command.read_words(said(f"model.path={search.model}", *SEARCH, *words)).aim.divisor == 3
    found, _ = search(*words, "trials=6")
    assert found["baseline"]["name"] == baseline and found["baseline"]["held_out"]["score"] == 100.0
    asked = said(f"model.path={search.model}", *SEARCH, *words, "objective=[recall,bytes]")
    with pytest.raises(ConfigError, match=f"objective=recall: .*baseline={baseline}") as caught:
        command.read_words(asked)
    assert "task.divisors" not in str(caught.value)


def test_a_limit_of_what_dense_attention_reads(search):
    order = command.read_words([f"model.path={search.model}", *SEARCH, "max_bytes=dense", "baseline=dense"])
    assert order.aim.max_bytes == order.aim.bytes_of(None)[1] > 0
    assert "dense reads" in command.plan_text(order)


@pytest.mark.parametrize("whose", ["points", "baseline"])
def test_a_last_check_that_fails_is_told(search, monkeypatch, whose):
    run = Launch.run

    def failing(self, prompts, pipelines):
        ran = run(self, prompts, pipelines)
        return {
            name: "out_of_memory: no room" if prompts.samples == 3 and (name == "3stage") == (whose == "baseline") else told
            for name, told in ran.items()
        }

    monkeypatch.setattr(Launch, "run", failing)
    if whose == "baseline":
        with pytest.raises(RunFailed, match="baseline=3stage cannot be compared with"):
            search("trials=8")
        return
    found, told = search("trials=8")
    assert "the last check failed: out_of_memory: no room" in told.out and "dominates 3stage" not in told.out
    assert found["best"][0]["failed"] == "out_of_memory: no room"
    assert "# the check on held-out prompts failed: out_of_memory" in Path(found["best"][0]["file"]).read_text()


@pytest.mark.slow
def test_points_go_through_a_launcher_of_hydra(search, tmp_path, monkeypatch):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "here"))
    here, _ = search("trials=12", "batch=4")
    expected = journal(folder_of_search())
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "launched"))
    launched, _ = search("trials=12", "batch=4", "hydra/launcher=basic")
    assert journal(folder_of_search()) == expected
    assert [one["search"] for one in launched["best"]] == [one["search"] for one in here["best"]]


def test_another_search_of_the_same_name_is_refused(search):
    search("trials=3", "objective=[recall,bytes]")
    with pytest.raises(ConfigError, match="name=found is another search"):
        search("trials=3")


@pytest.mark.parametrize(
    ("name", "damaged"), [("journal.log", b'{"op_code": 4, "work\n{}\n'), ("study.json", b'{"search": 5}'), ("journal.log", b"{}\n")]
)
def test_a_damaged_study_is_told_with_its_repair(search, name, damaged):
    search("trials=3", "objective=[recall,bytes]")
    path = folder_of_search() / name
    path.write_bytes(path.read_bytes() + damaged if name == "journal.log" else damaged)
    with pytest.raises(ConfigError, match=f"{name} is damaged.*move the folder away, or give another name="):
        search("trials=4", "objective=[recall,bytes]")


def test_for_scripts(search, capsys):
    words = [f"model.path={search.model}", *SEARCH, "trials=12", "objective=[recall,bytes]"]
    assert command.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["objectives"] == ["recall", "bytes"]
    assert command.main([*words, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.out.strip() == found["folder"] and quiet.err == ""


def test_a_dry_run_leaves_nothing(search, capsys):
    assert command.main([f"model.path={search.model}", *SEARCH, "--dry-run", "max_bytes=3stage"]) == 0
    out = capsys.readouterr().out
    assert "last.chunk_tok          4, 8, 16, 32, 64" in out
    assert "then: 2 prompts for a point that is left, 4 more for one that none beats" in out
    assert "in the end: 3 other prompts for 3stage and each of up to 5 of the front" in out
    assert not folder_of_search().exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+pipeline=3stage"], "cannot be said in `tune`"),
        (["objective=[speed]"], "objective=speed is unknown"),
        (["task=longbench"], "tune needs prompts to search by and others to check by"),
        (["task=infbench", "task.protocol=chat"], "tune needs prompts to search by and others to check by"),
        (["trials=0"], "trials=0 must be a whole number from 1"),
        (["hours=soon"], "hours=soon must be a number of hours"),
        (["sampler=grid"], "sampler=grid is unknown; use tpe or random"),
        (["max_bytes=-1"], "max_bytes=-1 must be a number above 0"),
        (["max_bytes=3stages"], "did you mean 3stage?"),
        (["max_bytes=inf"], "max_bytes=inf must be a number above 0"),
        (["hydra/launcher=nothere"], "nothere"),
        (["jobs=2", "jobs=3"], "jobs= is said 2 times"),
        (["max_bytes=33"], "max_bytes=33 is a number of bytes, and the smallest sinks and window alone are"),
        (["trials=3", "trials=5"], "trials= is said twice, in trials=3 and trials=5"),
        (["task=infbench", "seed=1", "+seed=2"], "seed= is said twice"),
        (["name=1st"], "name=1st must be a letter"),
        (["space=nowhere.yaml"], "space=nowhere.yaml is no search space"),
        (["task.length_tok=20"], "20"),
    ],
)
def test_mistakes_are_refused_before_anything_begins(search, words, said):
    with pytest.raises(ConfigError) as caught:
        command.main(words)
    assert said in str(caught.value)
    assert not folder_of_search().parent.exists()


def test_without_optuna_the_command_says_what_to_install(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'hipexp\[tune\]'"):
        search("trials=3")


def test_processes_share_a_study_and_take_over_what_is_left(tmp_path):
    objectives = read_objectives("[score,bytes]")
    with open_study(tmp_path, objectives, "tpe", 0) as other:
        with open_study(tmp_path, objectives, "tpe", 0) as mine:
            gone = mine.next(3)
            assert other.next(3).number == gone.number + 1, "what another process works on is left to it"
            assert other.in_work() == 2
        assert other.next(3).number == gone.number, "until that is gone"
        assert other.next(3).number == 2 and other.next(3) is None


def test_a_process_goes_on_behind_a_line_that_another_did_not_finish(tmp_path):
    objectives = read_objectives("[score,bytes]")
    with open_study(tmp_path, objectives, "random", 0) as mine:
        for torn in (b'{"op_code": 4, "worker_id": "x", "study_i', b"{"):
            with open(tmp_path / "journal.log", "ab") as journal:
                journal.write(torn)  # and was killed
            trial = mine.next(5)
            mine.tell(trial, Point(trial.number, kind="invalid"))
        assert [point.kind for point in mine.points()] == ["invalid"] * 2
    with open_study(tmp_path, objectives, "random", 0) as again:
        assert len(again.points()) == 2


def test_a_search_that_ends_by_an_error_leaves_no_owner(tmp_path):
    with pytest.raises(RunFailed), open_study(tmp_path, read_objectives("[score,bytes]"), "random", 0) as mine:
        assert (tmp_path / "owners" / mine.owner).is_dir()
        raise RunFailed("nothing was measured")
    assert list((tmp_path / "owners").iterdir()) == []


def test_time_is_kept_back_for_the_last_check(search):
    """Five points and the baseline, 3 prompts each, and the 4 of the baseline's that are missing, of 2 s; then by what is measured."""
    order = command.read_words([f"model.path={search.model}", *SEARCH])
    final = Final(order.aim, Launch((), 1, folder_of_search(), load_once()), None, "3stage", order.held_out, 5, lambda point: Path())
    base = Point(-1, prefill_ms={"0": [2000.0, 2000.0]})
    assert final.expected_s(base, []) == pytest.approx(SLACK * 2 * (6 * 3 + 4))
    quick = Point(0, scores={"0": [100.0]}, bytes=1e6, prefill_ms={"0": [100.0]}, kind="measured")
    base.prefill_ms["1"] = [2000.0] * 4
    assert final.expected_s(base, [quick]) == pytest.approx(SLACK * (3 * 0.1 + 3 * 2))


def test_points_of_more_recall_that_beat_the_baseline_are_checked_too(search):
    """Of points with all answers right, beside that which reads least: more recall counts, where few prompts tell nothing."""
    order = command.read_words([f"model.path={search.model}", *SEARCH])
    base = Point(-1, scores={"0": [75.0]}, bytes=9e6, recall=[0.8])
    given = (
        (0, 100.0, 2e6, 0.5),
        (1, 100.0, 4e6, 0.6),
        (2, 100.0, 5e6, 0.55),
        (3, 100.0, 8e6, 0.9),
        (4, 100.0, 9.5e6, 0.95),
        (5, 50.0, 1e6, 0.3),
    )
    points = [Point(n, scores={"0": [score]}, bytes=read, recall=[held], kind="measured") for n, score, read, held in given]
    best = [points[0], points[5]]
    for most, expected in ((1, [3]), (2, [3, 0]), (3, [3, 1, 0]), (4, [3, 1, 0, 5]), (9, [3, 1, 0, 5])):
        final = Final(order.aim, Launch((), 1, folder_of_search(), load_once()), None, "3stage", order.held_out, most, lambda point: Path())
        assert [point.number for point in final.chosen(base, best, points)] == expected


def test_a_space_that_is_exhausted_ends_the_search(search, tmp_path):
    made = yaml.safe_load((conf_dir() / "tune" / "default.yaml").read_text())
    few = {name: values[:1] for name, values in made.items() if isinstance(values, list)} | {"window_tok": [256, 512]}
    few |= {part: {name: values[:1] for name, values in made[part].items()} for part in ("last", "front")}
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(few))
    found, _ = search(f"space={path}", "objective=[recall,bytes]")
    assert found["points"]["measured"] + found["points"].get("recall", 0) == 2, "both there are"
    assert found["points"]["repeated"] >= 50


@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="the embedded model is not trained yet: make needle")
@pytest.mark.slow
def test_recall_is_what_is_still_seen(tmp_path, monkeypatch):
    """All of it where all is kept, more with a larger window, and the same of attention that was recorded before."""
    from hipexp import hf

    experiment = compose(["task=infbench", "task.subtasks=[passkey]"])
    recorded = Recorded(experiment, tmp_path, load_once(), 640, 2)

    def made(keep_tok: int, window_tok: int) -> Pipeline:
        return Pipeline(method="hip", sink_tok=64, window_tok=window_tok, stages=[Stage(16, keep_tok, representative=Representative.exact)])

    few, more, wide, everything = (recorded.of(made(*sizes)) for sizes in ((64, 64), (256, 64), (64, 256), (2048, 64)))
    assert len(few) == 9 and all(0 <= one <= 1 for one in few)
    assert everything == [1.0] * 9
    assert all(a < b for a, b in zip(few, more, strict=True)) and all(a < b for a, b in zip(few, wide, strict=True))
    monkeypatch.setattr(hf, "activations", lambda *_: pytest.fail("it is recorded"))
    assert Recorded(experiment, tmp_path, recorded.load, 640, 2).of(made(64, 64)) == few


def test_values_of_objectives_come_from_what_was_found():
    point = Point(3, scores={"0": [100.0, 0.0], "1": [100.0, 100.0]}, decode_ms={"0": [2.0], "1": [4.0]}, bytes=5e6)
    assert point.values(read_objectives("[score,decode_ms,bytes]")) == [75.0, 3.0, 5e6]
    assert not point.is_known(read_objectives("[recall]")) and dataclasses.replace(point, recall=[0.5, 0.7]).value("recall") == 0.6


def start(runs: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"HIPEXP_RUNS": str(runs), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [
        "tune",
        "task=passkey",
        "task.lengths_tok=[2048]",
        "task.depths=[0.5]",
        "task.samples=1",
        "held_out=2",
        "checked=1",
        "trials=14",
        "name=found",
    ]
    return subprocess.Popen([sys.executable, "-m", "hipexp", *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="the embedded model is not trained yet: make needle")
def test_the_embedded_model_is_tuned_killed_and_tuned_on(tmp_path, monkeypatch):
    """Its own attention is recorded, its answers count; kill -9 in between changes nothing."""
    found = []
    for name in ("killed", "whole"):
        monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / name))
        if name == "killed":
            first = start(tmp_path / name)
            while len(list(tmp_path.glob("killed/tune/found/trials/*.yaml"))) < 2:
                assert first.poll() is None, "it ended too soon to be killed"
                time.sleep(0.05)
            first.send_signal(signal.SIGKILL)
            first.wait()
        run = start(tmp_path / name)
        out, _ = run.communicate()
        assert run.returncode == 0
        found.append([(params, kind, scores) for params, _, kind, _, scores in journal(folder_of_search())])
        result = read_json(Path(out.splitlines()[-1]) / "result.json")
        assert result["best"] and 0 < result["baseline"]["search"]["score"] <= 100
    assert found[0] == found[1] and len(found[0]) == 14
    assert {kind for _, kind, _ in found[0]} >= {"measured", "recall"}
