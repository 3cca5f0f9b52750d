"""All three suites end to end through the command line, on small data in the official schemas, with the embedded model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "suites"))
import official_data
from hipexp.cli import main

pytest.importorskip("lm_eval")
CASES = {
    "longbench": (["task=longbench", "task.subtasks=[qasper,samsum,lcc]"], {"qasper", "samsum", "lcc"}),
    "longbench_e": (["task=longbench", "task.subtasks=[qasper_e]"], {"qasper_e@0-4k", "qasper_e@4-8k", "qasper_e@8k+"}),
    "longbench2": (["task=longbench2"], {"overall", "easy", "hard", "short", "medium", "long"}),
    "infbench": (["task=infbench", "task.protocol=completion", "task.subtasks=[passkey,code_debug]"], {"passkey", "code_debug"}),
    "ruler": (["task=ruler", "task.subtasks=[vt]", "task.length_tok=1024", "task.samples=2"], {"vt"}),
}


SLOW = ("longbench_e", "longbench2", "infbench")  # of what the others try as well


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return official_data.write_all(tmp_path_factory.mktemp("official"))


def hipexp(*words, runs):
    env = os.environ | {"HIPEXP_RUNS": str(runs), "HIPEXP_DATA": str(runs / "nothing"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "hipexp", *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_a_run_and_its_predictions_scored_again(name, data, tmp_path):
    words, subtasks = CASES[name]
    words = [*words, "model.prefill_chunk_tok=1024"] + ([] if "task=ruler" in words else [f"task.data={data}"])
    folder = Path(hipexp("+pipeline=3stage", *words, runs=tmp_path).splitlines()[-1])
    summary, card = (json.loads((folder / file).read_text()) for file in ("summary.json", "card.json"))
    assert subtasks <= set(summary["scores"]) and summary["protocol"] in ("official", "completion")
    assert card["data"] and card["scorer"] and card["edition"] and all(len(digest) == 12 for digest in card["template"].values())
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert rows and all(row["status"] == "done" and row["removed_tok"] == 0 for row in rows)
    if name != "ruler":  # its rows carry no length of their own
        suite = name.removesuffix("_e")
        again = json.loads(hipexp("score", suite, str(folder / "samples.jsonl"), runs=tmp_path))
        assert again["scores"] == summary["scores"] and again["averages"] == summary["averages"]
    assert "stored result" in hipexp("+pipeline=3stage", *words, runs=tmp_path)


def test_prompts_that_are_cut_are_recorded(data, tmp_path):
    words = ["task=longbench", "task.subtasks=[qasper]", f"task.data={data}", "task.truncate_tok=80"]
    folder = Path(hipexp(*words, runs=tmp_path).splitlines()[-1])
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert all(row["removed_tok"] > 60 and 75 < row["context_tok"] < 85 for row in rows)
    card = json.loads((folder / "card.json").read_text())
    assert card["truncation"]["removed_tok"] == {"qasper": sum(row["removed_tok"] for row in rows)}


@pytest.mark.slow
def test_ruler_on_stand_ins_is_no_official_score(tmp_path):
    """As a user would: one command makes the files, another runs on them, without a network."""
    assert main(["data", "make", "stand-ins", f"out={tmp_path / 'made'}"]) == 0
    words = ["task=ruler", "task.subtasks=[vt,qa_1]", "task.length_tok=3000", "task.samples=1", f"task.data={tmp_path / 'made'}"]
    out = hipexp("+pipeline=3stage", *words, runs=tmp_path)
    assert out.count("stand-in, 2025") == 3 and "official, 2025" not in out
    assert "no official RULER score (qa_1): squad.json, each a stand-in made by hipexp" in out
    folder = Path(out.splitlines()[-1])
    summary, card = (json.loads((folder / file).read_text()) for file in ("summary.json", "card.json"))
    assert summary["protocol"] == card["protocol"] == "stand-in" and "squad.json, each a stand-in" in summary["note"]
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row.get("stand_ins") for row in rows] == [None, ["squad.json"]]
