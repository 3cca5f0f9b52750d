import copy
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from hipexp.config.schema import ConfigError
from hipexp.report import compare
from hipexp.report.runs import Run, find_run

sys.path.insert(0, str(Path(__file__).parent))
from folders import CARD, CONFIG, line, measurement, write

A = [100.0, 100.0, 0.0, 50.0]
B = [0.0, 100.0, 100.0, 50.0]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    return tmp_path


def rows(passkey, kv=()):
    return [line("passkey", i, x) for i, x in enumerate(passkey)] + [line("kv_retrieval", i, x) for i, x in enumerate(kv)]


def told(capsys, *words):
    assert compare.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def brute_interval(differences):
    """Every resample there is, each as likely as the others."""
    means = [sum(drawn) / len(drawn) for drawn in itertools.product(differences, repeat=len(differences))]
    return np.quantile(means, [0.025, 0.975])


def test_scores_and_paired_differences(root, capsys):
    write(root, "dense", rows(A, [100.0, 0.0]))
    write(root, "3stage", rows(B, [0.0, 0.0]), config={"pipeline": {"name": "3stage", "method": "hip"}})
    found = told(capsys, "dense", "3stage")
    passkey, kv, every = found["scores"]
    assert (passkey["name"], passkey["a"], passkey["b"], passkey["n"]) == ("passkey", 62.5, 62.5, 4)
    assert (passkey["difference"], passkey["better"], passkey["worse"]) == (0.0, 1, 1)
    assert np.abs(passkey["interval"] - brute_interval([b - a for a, b in zip(A, B, strict=True)])).max() <= 25
    assert (kv["difference"], kv["better"], kv["worse"], kv["interval"]) == (-50.0, 0, 1, [-100.0, 0.0])
    assert (every["name"], every["n"]) == ("all", 6)
    assert (every["a"], every["b"]) == (pytest.approx(350 / 6), pytest.approx(250 / 6))
    assert every["difference"] == pytest.approx((0 - 100 + 100 + 0 - 100 + 0) / 6)
    assert found["config"] == [{"key": "pipeline", "a": None, "b": {"name": "3stage", "method": "hip"}}]
    assert not found["refused"] and not found["left_out"] and not found["times"]


def test_the_interval_is_that_of_all_resamples(root, capsys):
    a, b = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0], [17.0, 11.0, 44.0, 60.0, 49.0, 91.0]
    write(root, "dense", rows(a))
    write(root, "3stage", rows(b))
    (passkey,) = told(capsys, "dense", "3stage")["scores"]
    assert passkey["interval"] == pytest.approx(brute_interval([y - x for x, y in zip(a, b, strict=True)]), abs=1.5)
    assert passkey["difference"] == pytest.approx(62 / 6)


def test_flipped_answers(root, capsys):
    write(root, "dense", rows(A))
    write(root, "3stage", rows(B))
    assert [(one["sample"], one["a_score"], one["b_score"]) for one in told(capsys, "dense", "3stage")["flipped"]] == [(0, 100, 0), (2, 0, 100)]
    assert compare.main(["dense", "3stage"]) == 0
    text = capsys.readouterr().out
    assert "2 answer(s) with another score" in text
    assert "  passkey 0: 100 → 0\n    right: 42\n    A:     it is 100.0\n    B:     it is 0.0\n" in text
    assert "passkey 1" not in text and "passkey 3" not in text


def test_the_list_of_flipped_answers_is_limited_unless_all_are_asked_for(root, capsys):
    write(root, "dense", rows([100.0] * 12))
    write(root, "3stage", rows([0.0] * 12))
    assert compare.main(["dense", "3stage"]) == 0
    assert "… and 2 more: all=true" in (text := capsys.readouterr().out) and "passkey 11" not in text
    assert compare.main(["dense", "3stage", "all=true"]) == 0
    assert "passkey 11: 100 → 0" in (text := capsys.readouterr().out) and "more: all" not in text


def test_what_has_no_partner_is_told_and_left_out(root, capsys):
    write(root, "dense", [*rows(A), line("only_a", 0, 100.0)])
    other = [*rows(B[:3]), line("passkey", 5, 0.0), line("passkey", 6, 0.0)]
    other[1]["context_tok"] = 601
    other[2]["references"] = ["43"]
    write(root, "3stage", other)
    found = told(capsys, "dense", "3stage")
    assert found["left_out"] == {
        "another sample under the same number: passkey": 2,
        "only in A: passkey": 1,
        "only in A: only_a": 1,
        "only in B: passkey": 2,
    }
    passkey = found["scores"][0]
    assert (passkey["n"], passkey["difference"], passkey["interval"]) == (1, -100.0, None)
    assert compare.main(["dense", "3stage"]) == 0
    assert "left out:\n  2 × another sample under the same number: passkey" in capsys.readouterr().out


@pytest.mark.parametrize("score", ["NaN", "null", "Infinity", '"high"'])
def test_a_score_that_is_none_is_in_no_pair(root, capsys, score):
    write(root, "dense", rows(A))
    folder = write(root, "3stage", rows(B))
    path = folder / "samples.jsonl"
    path.write_text(path.read_text().replace('"score": 100.0', f'"score": {score}', 1))
    with pytest.raises(ConfigError, match="is damaged after 3 sample"):
        compare.main(["dense", "3stage"])
    found = told(capsys, "dense", "3stage", "--anyway")
    assert found["left_out"] == {"damaged, repeated, or without a finite score in B": 1, "only in A: passkey": 1}
    (passkey,) = found["scores"]
    assert (passkey["n"], passkey["b"], passkey["difference"]) == (3, None, pytest.approx(0.0))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("edition", "2024-08", r"edition differs \( and 2024-08\): another edition of the scorer"),
        ("template", {"passkey": "cc"}, r"template\.passkey differs \(aa and cc\): the prompts have other words"),
        ("scorer", "v2", r"scorer differs \(– and v2\): the same answer may get another score"),
        ("truncation", {"rule": "middle", "removed_tok": {}}, r"truncation\.rule differs \(none and middle\): prompts are cut otherwise"),
        ("model", {"revision": "r2", "dtype": "float32"}, r"model\.revision differs \(r1 and r2\): another model or tokenizer"),
    ],
)
def test_other_protocols_are_refused_with_the_reason(root, capsys, key, value, message):
    write(root, "dense", rows(A))
    write(root, "3stage", rows(B), card={key: value})
    with pytest.raises(ConfigError, match=r"--anyway.*\n.*" + message):
        compare.main(["dense", "3stage"])
    assert told(capsys, "dense", "3stage", "--anyway")["scores"][0]["n"] == 4
    assert compare.main(["dense", "3stage", "--anyway"]) == 0
    assert "not comparable, shown all the same:" in capsys.readouterr().out


def test_what_is_compared_is_no_difference_of_protocol(root):
    a = write(root, "dense", rows(A))
    card = {
        "strategy": ["attention: 3stage"],
        "samples": {"passkey": 2},
        "model": {"revision": "r1", "dtype": "bfloat16", "transformers": "5.20"},
        "template": {"passkey": "aa"},
        "truncation": {"rule": "none", "removed_tok": {"passkey": 7}},
    }
    b = write(root, "3stage", rows(B[:2]), card=card)
    assert compare.compare(Run(a), Run(b))["refused"] == []


def test_an_unfinished_run_is_refused(root, capsys):
    write(root, "dense", rows(A))
    write(root, "3stage", rows(B[:2]), state="failed", status={"class": "out_of_memory", "message": "9 GB"})
    with pytest.raises(ConfigError, match=r"3stage_\w+ is failed \(out_of_memory\) after 2 sample.*retry"):
        compare.main(["dense", "3stage"])
    (passkey,) = told(capsys, "dense", "3stage", "--anyway")["scores"]
    assert (passkey["a"], passkey["b"], passkey["n"]) == (62.5, None, 2)


def timing(phase, context, impl, ms, **more):
    return {"phase": phase, "context_tok": context, "impl": impl, "mean_ms": ms, "p10_ms": ms - 1, "p90_ms": ms + 1, "bytes": 1} | more


LATENCY = {"suite": "latency", "samples": {}, "template": {}, "metric": {}, "length_tok": {}}
TASK = {"task": {"name": "latency"}}


def test_times_of_equal_phase_and_length(root, capsys):
    lines = [measurement("dense@64", 0), measurement("pruned@64", 0)]
    a = [timing("decode", 64, "dense", 8.0), timing("decode", 64, "2stage", 4.0), timing("prefill", 64, "2stage", 90.0)]
    b = [timing("decode", 64, "dense", 8.0), timing("decode", 64, "3stage", 2.0), timing("decode", 128, "3stage", 3.0)]
    write(root, "two", lines, card=LATENCY, config=TASK, latency=a)
    write(root, "three", lines, card=LATENCY, config=TASK, latency=b)
    found = told(capsys, "two", "three")
    assert [(one["a_impl"], one["b_impl"], one["ratio"]) for one in found["times"]] == [("dense", "dense", 1.0), ("2stage", "3stage", 2.0)]
    assert set(found["left_out"]) == {"only in A: prefill at 64 tokens, pipeline", "only in B: decode at 128 tokens, pipeline"}
    assert found["scores"] == [] and found["flipped"] == []
    assert compare.main(["two", "three"]) == 0
    assert "3.0 to 5.0" in capsys.readouterr().out


def test_times_of_other_machines_are_refused(root, capsys):
    lines, row = [measurement("dense@64", 0)], timing("decode", 64, "dense", 8.0)
    write(root, "here", lines, card=LATENCY, config=TASK, latency=[row])
    write(root, "there", lines, card=LATENCY, config=TASK, latency=[row], env={"device": "cpu b", "threads": 1})
    with pytest.raises(ConfigError, match=r"machine\.device differs \(cpu a and cpu b\)"):
        compare.main(["here", "there"])
    assert told(capsys, "here", "there", "--anyway")["times"][0]["ratio"] == 1.0


def test_scores_do_not_need_the_same_machine(root):
    a, b = write(root, "here", rows(A)), write(root, "there", rows(B), env={"device": "cpu b", "threads": 2})
    found = compare.compare(Run(a), Run(b))
    assert found["refused"] == [] and [one["key"] for one in found["machine"]] == ["machine.device", "machine.threads"]


def test_scores_beside_times_have_nothing_in_common(root):
    write(root, "dense", rows(A))
    write(root, "times", [measurement("dense@64", 0)], card=LATENCY, config=TASK)
    with pytest.raises(ConfigError, match="nothing in common"):
        compare.main(["dense", "times", "--anyway"])


def test_only_the_keys_that_differ_are_shown(root, capsys):
    stages = [{"chunk_tok": 256, "keep_tok": 4096}, {"chunk_tok": 32, "keep_tok": 2048}]
    other = copy.deepcopy(stages)
    other[1]["keep_tok"] = 1024
    for name, one in (("a", stages), ("b", other)):
        write(root, name, rows(A), config={"pipeline": {"name": "2stage", "stages": one}, "track": {"name": name}})
    assert told(capsys, "infbench/a", "infbench/b")["config"] == [{"key": "pipeline.stages.1.keep_tok", "a": 2048, "b": 1024}]


def test_official_scores_are_compared_by_the_groups_of_their_scorer(root, capsys):
    card = {"suite": "longbench2", "protocol": "official", "template": {}, "metric": {}, "samples": {"longbench2": 2}}
    config = CONFIG | {"task": {"name": "longbench2"}}
    for name, found in (("a", (100.0, 0.0)), ("b", (100.0, 100.0))):
        lines = [line("longbench2", i, x, difficulty=["easy", "hard"][i], length="short") for i, x in enumerate(found)]
        write(root, name, lines, card=CARD | card, config=config, scores={"hard": {"metric": "m", "score": found[1], "n": 1, "interval": None}})
    by_name = {row["name"]: row for row in told(capsys, "longbench2/a", "longbench2/b")["scores"]}
    assert (by_name["hard"]["n"], by_name["hard"]["difference"]) == (1, 100.0)
    assert (by_name["easy"]["n"], by_name["easy"]["difference"]) == (1, 0.0)


@pytest.mark.parametrize(
    "words, message",
    [
        (["dense"], "compare takes two runs, not dense"),
        (["dense", "dense", "x"], "compare takes two runs"),
        (["dense", "--loud"], "not dense --loud"),
        (["dense", "dense", "all=yes"], "compare takes two runs"),
        (["dense", "nothing"], "nothing is no run folder, and no run under"),
        (["den", "d"], r"d begins the names of 2 runs: infbench/d\w+, infbench/d\w+; give more"),
    ],
)
def test_wrong_words(root, words, message):
    write(root, "dense", rows(A))
    write(root, "dance", rows(A))
    with pytest.raises(ConfigError, match=message):
        compare.main(words)


def test_a_run_without_a_card_means_nothing(root):
    folder = write(root, "dense", rows(A))
    (folder / "card.json").unlink()
    with pytest.raises(ConfigError, match=r"has no protocol card"):
        compare.main(["dense", "dense"])


def test_runs_are_found_by_folder_name_and_key(root):
    folder = write(root, "dense", rows(A))
    write(root, "dense_more", rows(A))
    key = folder.name.rsplit("_", 1)[-1]
    assert {find_run(word).folder for word in (str(folder), f"infbench/{folder.name}", folder.name, key, key[:6])} == {folder}
