"""``data make``: rows of generated tasks on disk, whole or not at all, and what is refused."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "suites"))
import ruler_data
from hipexp.cli import main
from hipexp.run import data_make
from hipexp.run.tokenizer_file import read_tokenizer

NEEDLE = Path(data_make.__file__).parents[1] / "needle" / "model"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_infbench(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = ["data", "make", "infbench", "subtask=math_find", "length_tok=1000", "samples=3", f"out={out}"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    made, tokenizer = rows(out), read_tokenizer(NEEDLE / "tokenizer.json")
    sizes = [len(tokenizer(f"{row['context']}\n{row['input']}", add_special_tokens=False).input_ids) for row in made]
    assert len(made) == 3 and all(980 < size <= 1000 for size in sizes)
    assert main([*words[:-1], f"out={tmp_path / 'again.jsonl'}", f"tokenizer={NEEDLE}"]) == 0
    assert rows(tmp_path / "again.jsonl") == made
    assert main([*words, "seed=7"]) == 0 and rows(out) != made
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["again.jsonl", "rows.jsonl"]


def test_ruler(tmp_path):
    pytest.importorskip("lm_eval")
    out, resources = tmp_path / "rows.jsonl", ruler_data.write_resources(tmp_path / "resources")
    assert main(["data", "make", "ruler", "subtask=qa_1", "length_tok=3000", "samples=2", f"resources={resources}", f"out={out}"]) == 0
    made = rows(out)
    assert [row["index"] for row in made] == [0, 1]
    assert all(row["length"] <= 3000 and row["outputs"][0] in row["input"] and row["answer_prefix"] for row in made)


def test_rows_that_are_made_of_stand_ins_say_so(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    out, resources = tmp_path / "rows.jsonl", ruler_data.write_resources(tmp_path / "resources")
    words = ["data", "make", "ruler", "length_tok=3000", "samples=1", f"resources={resources}", f"out={out}"]
    for subtask, read in (("qa_2", ["hotpotqa.json"]), ("vt", None)):
        assert main([*words, f"subtask={subtask}"]) == 0
        assert ("no official rows: hotpotqa.json, each a stand-in made by hipexp\n" in capsys.readouterr().out) == bool(read)
        assert [row.get("stand_ins") for row in rows(out)] == [read]


def test_rows_that_are_made_of_own_data_say_so_and_score_does(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    out, resources = tmp_path / "rows.jsonl", ruler_data.write_resources(tmp_path / "own" / "ruler")
    path = resources / "squad.json"
    path.write_text(path.read_text().replace("stand-in made by hipexp", "dev"))
    words = ["data", "make", "ruler", "length_tok=3000", "samples=1", f"resources={tmp_path / 'own'}", f"out={out}"]
    for subtask, read in (("qa_1", ["squad.json"]), ("vt", None)):
        assert main([*words, f"subtask={subtask}"]) == 0
        assert ("no official rows: squad.json, not known to be the published data\n" in capsys.readouterr().out) == bool(read)
        assert [(row.get("own_data"), row.get("stand_ins")) for row in rows(out)] == [(read, None)]
        (made,) = rows(out)
        out.write_text(json.dumps(made | {"subtask": subtask, "prediction": "", "references": made["outputs"]}))
        assert main(["score", "ruler", str(out)]) == 0
        assert json.loads(capsys.readouterr().out).get("own_data", "").startswith("no official score: ") == bool(read)


def test_stand_ins(tmp_path, capsys):
    folder = tmp_path / "made here"
    assert main(["data", "make", "stand-ins", f"out={folder}"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == str(folder) and out[-2].endswith(f"task=ruler 'task.data={folder}'")
    assert "no score on them is an official RULER score" in out[-3]
    table = {line.split()[0]: line.split()[-1] for line in out[2:-3]}
    found = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}
    assert table == found and len(found) == 8
    assert main(["data", "make", "stand-ins", f"out={folder}", "seed=7"]) == 0
    assert (folder / "squad.json").read_bytes() and hashlib.sha256((folder / "squad.json").read_bytes()).hexdigest() != found["squad.json"]


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_stand_ins_are_not_taken_for_published_data(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "runs"))
    (tmp_path / "data").mkdir()
    ruler_data.write_resources(tmp_path / "elsewhere", punkt=True).rename(tmp_path / "data" / "ruler")
    main(["data", command, "ruler"])
    states = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if " ruler " in line}
    for name in ("squad.json", "hotpotqa.json", "english_words.json", "PaulGrahamEssays.json", "punkt_tab/english/abbrev_types.txt"):
        assert " damaged " in states[name], name
    assert main(["task=ruler", "task.subtasks=[qa_1]", "task.samples=1"]) == 2
    assert "squad.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stand-ins"], "data make stand-ins needs out=<folder>"),
        (["stand-ins", "out=x", "samples=5"], "samples=5 is unknown"),
        (["stand-ins", "out=x", "seed=a"], "seed=a must be a whole number from 0 on"),
        ([], "data make needs a suite whose samples are generated, or stand-ins"),
        (["longbench"], "data make needs a suite whose samples are generated, or stand-ins"),
        (["infbench", "length_tok=5", "out=x"], "data make infbench needs subtask=..."),
        (["infbench", "subtask=passkey", "length=5", "out=x"], "length=5 is unknown; did you mean length_tok?"),
        (["infbench", "subtask=passkey", "length_tok=many", "out=x"], "length_tok=many must be a whole number from 1 on"),
        (["infbench", "subtask=passkey", "length_tok=500", "samples=0", "out=x"], "samples=0 must be a whole number from 1 on"),
        (["infbench", "subtask=code_debug", "length_tok=500", "out=x"], "'code_debug' is not generated"),
        (["infbench", "subtask=passkey", "length_tok=5", "out=x"], "length_tok=5 is too short for a row of passkey"),
        (["infbench", "subtask=passkey", "length_tok=500", "out=/nowhere/x"], "out=/nowhere/x must be a file in a folder that is there"),
        (
            ["infbench", "subtask=passkey", "length_tok=500", "out=x", "tokenizer=./nowhere"],
            "tokenizer=./nowhere is no folder here and no hub id",
        ),
    ],
)
def test_refusals(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "make", *words]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []
