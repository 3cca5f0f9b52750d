import io
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from hipexp.config.schema import ConfigError
from hipexp.run import data
from hipexp.suites.data import fetch as fetching
from hipexp.suites.data import registry
from hipexp.suites.data.resolve import find, folder_for, place_of, record_of
from hipexp.suites.sample import DataMissing

sys.path.insert(0, str(Path(__file__).parents[1] / "suites"))
from data_server import REVISION, DataServer, sha256_of, toy

ROWS, KEYS, PROMPTS = b'{"id": 1}\n' * 100, b'{"id": 2}\n' * 200, b"templates = {}\n"
ESSAYS = ["One  essay.", "Another\nessay é."]
PUNKT = {"punkt_tab/english/collocations.tab": b"a\tb\n", "punkt_tab/english/abbrev_types.txt": b"dr\n", "punkt_tab/README": b"!"}


def parquet():
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    into = io.BytesIO()
    parquet.write_table(pa.table({"title": ["a", "b"], "text": ESSAYS}), into)
    return into.getvalue()


def archive():
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w") as file:
        for name, content in PUNKT.items():
            file.writestr(name, content)
    return into.getvalue()


@pytest.fixture
def bodies():
    return {
        "prompt.py": PROMPTS,
        "passkey.jsonl": ROWS,
        "kv_retrieval.jsonl": KEYS,
        "essays.parquet": parquet(),
        "punkt_tab.zip": archive(),
    }


@pytest.fixture
def files(bodies):
    def entry(name, suite="infbench", **more):
        return replace(toy(bodies.get(name, b"?"), name=name, **more), suite=suite)

    ruler = {"suite": "ruler", "subtasks": ("niah_single_2",), "pinned": False}
    return (
        entry("prompt.py", prompts=True, subtasks=()),
        entry("passkey.jsonl"),
        entry("kv_retrieval.jsonl", pinned=False, subtasks=("kv_retrieval",)),
        entry("essays.parquet", **ruler),
        entry("PaulGrahamEssays.json", made_from="essays.parquet", **ruler),
        entry("punkt_tab.zip", **(ruler | {"pinned": True})),
        *(entry(name, made_from="punkt_tab.zip", **ruler) for name in PUNKT if "english" in name),
    )


@pytest.fixture
def server(monkeypatch, tmp_path, files, bodies):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    monkeypatch.setattr(registry, "FILES", files)
    with DataServer() as one:
        monkeypatch.setattr(registry, "HOSTS", one.hosts)
        for file in files:
            if not file.made_from:
                one.serve(file, bodies[file.name])
        yield one


def states(out):
    """The state of each file in a printed table."""
    rows = [line.replace(" *", "").split() for line in out.splitlines()]
    return {row[0]: state for row in rows for state in ("here", "missing", "damaged") if state in row and row[1] == "infbench"}


def test_pull_fetches_a_suite_and_says_what_it_trusts(server, tmp_path, capsys):
    assert data.main(["pull", "infbench"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(tmp_path / "data")
    row = {line.split()[0]: line for line in out.splitlines()}
    assert sha256_of(ROWS) in row["infbench/passkey.jsonl"]
    assert not row["infbench/passkey.jsonl"].endswith("*")
    assert row["infbench/kv_retrieval.jsonl"].endswith(f"{sha256_of(KEYS)} *")
    assert data.UNPUBLISHED in out
    assert find("infbench", "kv_retrieval.jsonl").path.read_bytes() == KEYS
    assert len(server.asked) == 3
    assert data.main(["pull", "infbench"]) == 0
    assert len(server.asked) == 3


@pytest.mark.parametrize("words", [["subtask=passkey"], ["subtask=[passkey]"], ["subtask=passkey,"], ["infbench", "subtask=passkey"]])
def test_subtasks_take_their_files_alone(server, capsys, words):
    assert data.main(["pull", *(words if "infbench" in words else ["infbench", *words])]) == 0
    out = capsys.readouterr().out
    assert [path for path, _ in server.asked] == ["/prompt.py", "/passkey.jsonl"]
    assert data.UNPUBLISHED not in out


def test_subtasks_of_several_suites(server, capsys):
    assert data.main(["pull", "infbench", "ruler", "subtask=passkey"]) == 0
    assert [path for path, _ in server.asked] == ["/prompt.py", "/passkey.jsonl"]
    assert data.main(["pull", "ruler", "infbench", "subtask=vt", "subtask=kv_retrieval"]) == 0
    assert [path for path, _ in server.asked] == ["/prompt.py", "/passkey.jsonl", "/kv_retrieval.jsonl"]


def test_pull_makes_what_is_made_from_downloads(server, tmp_path, capsys):
    assert data.main(["pull", "ruler"]) == 0
    folder = folder_for("ruler", ["niah_single_2"])
    assert json.loads((folder / "PaulGrahamEssays.json").read_text(encoding="utf-8")) == {"text": " ".join(ESSAYS)}
    assert (folder / "punkt_tab" / "english" / "collocations.tab").read_bytes() == b"a\tb\n"
    assert not (folder / "punkt_tab" / "README").exists()
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert not rows["ruler/punkt_tab/english/collocations.tab"].endswith("*")
    assert rows["ruler/PaulGrahamEssays.json"].endswith("*")
    assert data.main(["verify", "ruler"]) == 0
    (folder / "PaulGrahamEssays.json").write_text("{}")
    assert data.main(["verify", "ruler"]) == 1
    assert data.main(["pull", "ruler"]) == 0
    assert data.main(["verify"]) == 0


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_states_are_told_with_where_files_are_or_come_from(server, tmp_path, capsys, command):
    data.main(["pull", "infbench", "subtask=passkey"])
    capsys.readouterr()
    assert data.main([command, "infbench"]) == 0
    out = capsys.readouterr().out
    assert states(out) == {"prompt.py": "here", "passkey.jsonl": "here", "kv_retrieval.jsonl": "missing"}
    row = {line.split()[0]: line for line in out.splitlines()}
    assert row["passkey.jsonl"].endswith(str(tmp_path / "data" / "infbench" / "passkey.jsonl"))
    assert row["kv_retrieval.jsonl"].endswith(f"somebody/data@{REVISION[:12]}")


def test_what_somebody_changed_is_damaged(server, files, tmp_path, capsys):
    data.main(["pull", "infbench"])
    capsys.readouterr()
    assert data.main(["verify", "infbench"]) == 0
    path = place_of(files[1], tmp_path / "data")
    path.write_bytes(ROWS.replace(b"1", b"7"))
    assert data.main(["ls", "infbench"]) == 0
    assert "damaged" not in capsys.readouterr().out
    assert data.main(["verify", "infbench"]) == 1
    out = capsys.readouterr().out
    assert sha256_of(ROWS) in out
    assert "run: python -m hipexp data pull infbench subtask=passkey" in out
    assert data.main(["verify", "infbench", "subtask=kv_retrieval"]) == 0
    path.write_bytes(ROWS[:-1])
    assert data.main(["ls", "infbench"]) == 0
    assert "has 999 bytes instead of 1000" in capsys.readouterr().out
    assert data.main(["pull", "infbench", "subtask=passkey"]) == 0
    assert path.read_bytes() == ROWS


def test_a_file_nobody_recorded_is_damaged_until_it_is_fetched(server, files, tmp_path, capsys):
    path = place_of(files[2], tmp_path / "data")
    path.parent.mkdir(parents=True)
    path.write_bytes(KEYS)
    assert data.main(["verify"]) == 1
    assert "has no record of its download" in capsys.readouterr().out
    assert data.main(["pull", "infbench", "subtask=kv_retrieval"]) == 0
    assert record_of(path).is_file()
    assert data.main(["verify"]) == 0


def test_nothing_here_is_nothing_damaged(server, capsys):
    assert data.main(["verify"]) == 0
    assert data.main(["ls"]) == 0
    assert "damaged" not in capsys.readouterr().out


def test_a_failed_pull_keeps_what_it_has(server, files, tmp_path):
    server.files["/passkey.jsonl"].status = [404]
    with pytest.raises(DataMissing, match="the server answers 404"):
        data.main(["pull", "infbench"])
    assert place_of(files[0], tmp_path / "data").is_file()
    assert data.main(["pull", "infbench"]) == 0
    assert [path for path, _ in server.asked].count("/prompt.py") == 1


def test_a_folder_that_takes_nothing_is_said_when_making(server, files, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(data, "write_whole", full)
    with pytest.raises(DataMissing, match=r"PaulGrahamEssays\.json .*No space left on device"):
        data.main(["pull", "ruler"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "data needs a command; data pull <suite>"),
        (["puul"], "data puul is unknown; data pull <suite>"),
        (["pull"], "data pull needs a suite: infbench ("),
        (["pull", "infbnch"], "did you mean infbench?"),
        (["ls", "latency"], "suite latency is unknown"),
        (["pull", "infbench", "subtask=passky"], "did you mean passkey?"),
        (["pull", "infbench", "subtask=qasper"], "subtask qasper is unknown"),
        (["pull", "infbench", "subtask="], "subtask= names nothing"),
        (["verify", "samples=3"], "samples= is unknown"),
    ],
)
def test_mistakes_are_refused(server, words, said):
    with pytest.raises(ConfigError) as caught:
        data.main(words)
    assert said in str(caught.value)
    assert server.asked == []


def test_progress_goes_to_stderr(server, capfd):
    data.main(["pull", "infbench", "subtask=passkey"])
    out, err = capfd.readouterr()
    assert "passkey.jsonl" in err
    assert "B/s" not in out


def test_commands_load_nothing_heavy():
    heavy = "torch transformers datasets huggingface_hub lm_eval pyarrow hydra".split()
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy})); from hipexp.run.data import main; sys.exit(main(['ls']))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
