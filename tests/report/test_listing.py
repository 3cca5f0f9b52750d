import json
import sys
import time
from pathlib import Path

import pytest

from hipexp.config.schema import ConfigError
from hipexp.report import listing
from hipexp.run.ledger import read_json, write_json

sys.path.insert(0, str(Path(__file__).parent))
from folders import line, write


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    rows = [line("passkey", i, 50.0) for i in range(3)]
    write(tmp_path, "dense", rows)
    write(tmp_path, "3stage", rows[:2], state="failed", status={"class": "out_of_memory", "message": "cannot allocate\n9 GB", "of": 3})
    write(tmp_path, "5k", rows[:1], state="running", config={"task": {"name": "passkey"}}, status={"of": 8})
    write(tmp_path, "late", [], state="failed", status={"class": "data_missing", "message": "no rows"})
    return tmp_path


def listed(capsys, *words):
    assert listing.main([*words, "--json"]) == 0
    return {one["run"].split("_")[0]: one for one in json.loads(capsys.readouterr().out)}


def test_progress_and_what_went_wrong(runs, capsys):
    found = listed(capsys)
    assert {name: (one["samples"], one["of"], one["average"], one["class"]) for name, one in found.items()} == {
        "dense": (3, 3, 50.0, None),
        "3stage": (2, 3, None, "out_of_memory"),
        "5k": (1, 8, None, None),
        "late": (0, None, None, "data_missing"),
    }
    assert all(0 <= one["age_s"] < 100 for one in found.values())
    assert listing.main([]) == 0
    text = capsys.readouterr().out
    assert "failed: out_of_memory      2/3" in text and "cannot allocate 9 GB" in text
    assert text.splitlines()[-1].startswith("3 not done: `python -m hipexp retry`")


@pytest.mark.parametrize(
    "words, names",
    [
        (["state=failed"], {"3stage", "late"}),
        (["class=out_of_memory"], {"3stage"}),
        (["class=out_of_memory,data_missing"], {"3stage", "late"}),
        (["task=passkey"], {"5k"}),
        (["task=infbench", "state=done,stopped"], {"dense"}),
        (["state=running"], set()),
    ],
)
def test_filters(runs, capsys, words, names):
    assert set(listed(capsys, *words)) == names


def test_nothing_left_to_do_is_not_offered(runs, capsys):
    assert listing.main(["state=done"]) == 0
    assert "retry" not in capsys.readouterr().out
    assert listing.main(["task=ruler"]) == 0
    assert "no runs like that" in capsys.readouterr().out


def test_oldest_first(runs, capsys):
    path = next(runs.glob("infbench/late_*")) / "status.json"
    write_json(path, read_json(path) | {"updated": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - 4 * 86400))})
    found = listed(capsys)
    assert next(iter(found)) == "late" and abs(found["late"]["age_s"] - 4 * 86400) < 100
    assert listing.main([]) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith("4 d")


@pytest.mark.parametrize("word, message", [("state=lost", "state=lost must be one of"), ("class=oom", "class=oom must be one of"), ("seed=1", "ls takes no argument 'seed=1'")])
def test_wrong_filters(runs, word, message):
    with pytest.raises(ConfigError, match=message):
        listing.main([word])
