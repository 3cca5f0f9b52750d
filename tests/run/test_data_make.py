"""``data make``: rows of generated tasks on disk, whole or not at all, and what is refused."""

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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data make needs a suite whose samples are generated"),
        (["longbench"], "data make needs a suite whose samples are generated"),
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
