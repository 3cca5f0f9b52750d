"""What commands print with ``--json`` and ``--quiet``: one thing on stdout, which scripts can read."""

import json
from pathlib import Path

import pytest

from hipexp import cli
from hipexp.output import to_json
from hipexp.run.ledger import read_json
from hipexp.run.point import execute, folder_of


@pytest.fixture
def runs(fake, experiment):
    """The folders of a run that is done and of one that failed."""
    done, failed = experiment(), experiment(samples=1)
    execute(done)
    fake.fail = MemoryError("9 GB")
    with pytest.raises(MemoryError):
        execute(failed)
    fake.fail = None
    return folder_of(done), folder_of(failed)


def said(capsys, *words, code=0):
    """What a command line prints on stdout; with ``--quiet`` it prints nothing on stderr."""
    assert cli.main([*map(str, words)]) == code
    told = capsys.readouterr()
    assert "--quiet" not in words or told.err == ""
    return json.loads(told.out, parse_constant=pytest.fail) if "--json" in words else told.out.splitlines()


def test_what_is_no_number_is_null():
    assert json.loads(to_json({"a": [float("nan"), (1.5, float("inf"))], "b": None})) == {"a": [None, [1.5, None]], "b": None}


def test_ls(runs, capsys):
    summary = read_json(runs[0] / "summary.json")
    (runs[0] / "summary.json").write_text(json.dumps(summary | {"average": float("nan")}))
    assert {one["folder"]: one["average"] for one in said(capsys, "ls", "--json")} == {str(runs[0]): None, str(runs[1]): None}
    assert said(capsys, "ls", "state=failed", "--quiet") == [str(runs[1])]
    assert said(capsys, "ls", "state=running", "--quiet") == [] and said(capsys, "ls", "state=running", "--json") == []


def test_retry(runs, fake, capsys):
    (told,) = said(capsys, "retry", "--dry-run", "--json")
    assert (told["folder"], told["before"], told["state"]) == (str(runs[1]), "failed: out_of_memory", "failed")
    fake.fail = MemoryError("9 GB")
    (told,) = said(capsys, "retry", "--json", code=1)
    assert (told["class"], told["message"]) == ("out_of_memory", "9 GB")
    fake.fail = None
    assert said(capsys, "retry", "--quiet") == [str(runs[1])]
    assert said(capsys, "retry", "--json") == []


def test_report(runs, capsys, tmp_path):
    told = said(capsys, "report", f"out={tmp_path / 'out'}", "--json")
    assert told == {"report": str(tmp_path / "out" / "report.html"), "runs": 2, "counted": 1} and Path(told["report"]).is_file()
    assert said(capsys, "report", f"out={tmp_path / 'out'}", "--quiet") == [told["report"]]


def test_a_table_of_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    [told] = said(capsys, "repro", "table2", "size=needle", "--dry-run", "--json")
    assert told["id"] == "table2" and len(told["runs"]) > 3 and list(tmp_path.iterdir()) == []
    assert told["runs"][0]["task"] == "infbench"
    assert said(capsys, "repro", "table2", "size=needle", "--dry-run")[1].split() == ["run", "model", "task", "tokens", "samples"]


def test_doctor(capsys):
    assert {one["name"] for one in said(capsys, "doctor", "--json")["packages"]} > {"torch", "duckdb"}
    assert said(capsys, "doctor", "--quiet") == []
