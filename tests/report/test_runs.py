import subprocess
import sys
import types
from pathlib import Path

import pyarrow as pa
import pytest

import hipexp
from hipexp.config.schema import ConfigError
from hipexp.report import runs as module
from hipexp.report.runs import load_runs
from pages import scripts

sys.path.insert(0, str(Path(__file__).parent))
from folders import line, write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    write(tmp_path, "dense", [line("passkey", 0, 100.0), line("passkey", 1, 0.0, depth=0.5)])
    write(tmp_path, "3stage", [line("passkey", 0, 100.0)], config={"pipeline": {"name": "3stage", "method": "hip"}, "seed": 3})
    write(tmp_path, "x<y", [line("passkey", 0, 100.0)], state="failed", status={"class": "error"}, config={"model": {"path": "m", "name": "x<y"}})
    return tmp_path


def names(**filters):
    return {run.folder.name.rsplit("_", 1)[0] for run in load_runs(**filters)}


def test_what_a_run_holds(root):
    (run,) = load_runs(pipeline="dense", state="done")
    assert (run.config["task"]["name"], run.card["protocol"], run.summary["average"], run.state, run.failure) == ("infbench", "hipexp", 50.0, "done", None)
    assert [row["score"] for row in run.samples()] == [100.0, 0.0] and run.environment["threads"] == 1
    (broken,) = load_runs(state="failed")
    assert broken.summary == {} and len(broken.samples()) == 1 and broken.failure == "error"
    assert repr(broken).startswith("<Run infbench/x<y_") and repr(broken).endswith(": failed>")


def test_filters(root):
    assert names() == {"dense", "3stage", "x<y"}
    assert names(pipeline="3stage") == {"3stage"} and names(pipeline=["3stage", "dense"], state="done") == {"dense", "3stage"}
    assert names(seed=3) == {"3stage"} and names(model="x<y") == {"x<y"} and names(**{"class": "error"}) == {"x<y"}
    assert names(folder=root / "nowhere") == set() and names(folder=str(root), task="infbench") == names()
    with pytest.raises(ConfigError, match="colour=red is no filter of runs; use task"):
        load_runs(colour="red")
    with pytest.raises(ConfigError, match="state=lost must be one of"):
        load_runs(state="lost")


def test_tables(root, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    found = load_runs()
    table = found.frame()
    assert isinstance(table, pa.Table) and table.num_rows == 3
    assert dict(zip(table["pipeline"].to_pylist(), table["average"].to_pylist(), strict=True))["3stage"] == 100.0
    assert sorted(table["average"].to_pylist(), key=str) == [100.0, 50.0, None]
    samples = found.samples()
    assert samples.num_rows == 4 and sorted(samples["depth"].to_pylist(), key=str) == [0.5, None, None, None]
    assert "references" not in samples.column_names
    assert load_runs(pipeline="dense", state="done")[0].frame()["score"].to_pylist() == [100.0, 0.0]
    assert load_runs(root / "nowhere").frame().num_rows == 0
    with pytest.raises(ConfigError, match="pandas, which is not installed"):
        found.to_pandas()


def test_columns_of_mixed_types_are_columns_all_the_same(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    table = module.table_of([{"a": 1, "b": "x"}, {"a": 1.5, "b": 2}, {"b": None}])
    assert table.to_pydict() == {"a": [1.0, 1.5, None], "b": ["x", "2", None]}


def test_pandas_is_taken_where_it_is(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda columns: ("frame", columns)))
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    kind, columns = load_runs(seed=3).to_pandas()
    assert kind == "frame" and columns["average"] == [100.0] and columns["state"] == ["done"]


def test_a_notebook_shows_a_table(root):
    shown = load_runs()._repr_html_()
    assert shown.count("<tr>") == 4 and "<td>3stage</td>" in shown and "<td>x&lt;y</td>" in shown and "x<y" not in shown


def test_a_damaged_configuration_does_not_hide_the_other_runs(root, caplog):
    (run,) = load_runs(seed=3)
    (run.folder / "config.yaml").write_text("a: [")
    assert len(load_runs()) == 3 and names(seed=3) == set()
    assert "config.yaml is damaged" in caplog.text


def test_the_page_about_stored_runs(root, capsys):
    (code,) = (text for text in scripts(ROOT / "docs" / "library.md") if text.startswith("runs = "))
    scope = {"hipexp": hipexp}
    exec(compile(code, "library.md", "exec"), scope)
    assert sorted(capsys.readouterr().out.splitlines()) == ["0 hipexp 50.0 2", "3 hipexp 100.0 1"]
    assert len(scope["table"]) == 2 and len(scope["rows"]) == 3


def test_no_torch_is_needed():
    code = "import sys, hipexp; hipexp.load_runs('nowhere'); assert not {'torch', 'transformers', 'numpy', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
