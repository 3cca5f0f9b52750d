"""The report of a GPU run, on a CPU with little to do: parts, what fails, what the time does not allow. No test looks at a time."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from hipexp.attention.inputs import Geometry
from hipexp.run import attention_latency as latency
from hipexp.run import gpu
from hipexp.run.gpu import NATIVE, PRESETS, Report, preset

GEOMETRY, CPU = Geometry(4, 2, 16), torch.device("cpu")
SKIP = ("matmuls in tiles", *gpu.FLEX)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_without_hydra(name):
    plan = latency.layer_attention(preset(name), GEOMETRY, CPU).plan
    assert (plan.attend.value == "native") == name.endswith(NATIVE) == (plan.stages[0].rope.value == "native")
    assert [stage.keep_tok for stage in plan.stages][-1] == (4096 if name == "5k" else 2048)
    assert plan.groups == []


def test_parts_of_a_report(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PREFILL_TOK", 128)
    report = Report(tmp_path / "new", limit_s=1e9)
    report.about["device"] = "cpu"
    report.probe("a rate", lambda: [{"what": "copied", "value": 12.345678, "unit": "GB/s"}])
    layers = latency.make_layers(GEOMETRY, 4096, 2, CPU)
    gpu.measure_decode(report, layers, ["3stage"], 2, SKIP)
    gpu.measure_prefill(report, layers[0], ["3stage", f"3stage{NATIVE}"], SKIP)
    gpu.measure_offload(report, layers[0], ["3stage"], 3584)
    assert not report.left_out
    rows = {(row["phase"], row["impl"]): row for row in report.rows if "note" not in row}
    for key in (("decode", "3stage"), ("prefill", "3stage"), ("prefill", f"3stage{NATIVE}"), ("selected", "attend_blocks")):
        assert rows[key]["speedup"] > 0 and rows[key]["context_tok"] == 4096
    assert 0 < rows["decode", "3stage"]["recall"] <= 1
    assert rows["offload", "3stage"]["device_tok"] == 3584 and rows["offload", "3stage"]["steps"] == 32
    written = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert written == {"about": report.about, "probes": report.probes, "rows": report.rows, "left_out": []}
    text = (tmp_path / "new" / "gpu.md").read_text()
    assert "* device: cpu" in text and "| copied | 12.35 | GB/s |" in text and "| selected | 4096 |" in text


def test_what_fails_or_comes_too_late_is_told(tmp_path, capsys):
    report = Report(tmp_path, limit_s=1e9)
    report.add("first", lambda: [{"phase": "decode", "context_tok": 8, "dense": True, "impl": "a", "mean_ms": 2.0}])
    report.add("second", lambda: [][1])
    report.limit_s = -1
    report.add("third", lambda: pytest.fail("not to be begun"))
    assert report.left_out == ["second: failed: IndexError", "third: not begun within -1 s (--seconds)"]
    assert [row["impl"] for row in report.rows] == ["a"] and report.failed and report.late
    assert gpu.made(report, GEOMETRY, 512, CPU) == []
    assert "* left out: third: not begun" in (tmp_path / "gpu.md").read_text()
    assert "second is left out: failed: IndexError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "passed", "told"), [("pass", True, "1 passed"), ("assert 0", False, "1 failed"), ("os._exit(3)", False, "")]
)
def test_the_tests_on_this_gpu(body, passed, told, monkeypatch, tmp_path):
    """By a real pytest, in a checkout of its own."""
    (tmp_path / "hipexp" / "run").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text((Path(gpu.__file__).parents[2] / "pyproject.toml").read_text())
    text = f"import os, pytest\n@pytest.mark.gpu\ndef test_a():\n    {body}\ndef test_b():\n    assert 0\n"
    (tmp_path / "tests" / "test_x.py").write_text(text)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "hipexp" / "run" / "gpu.py"))
    ended, said = gpu.run_tests()
    assert ended is passed and told in said


def test_tests_that_cannot_run(monkeypatch):
    def late(command, timeout, **_):
        assert any(path.endswith("test_attend_blocks_triton.py") for path in command)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", late)
    assert gpu.run_tests(5) == (False, "not finished in 5 s")
    monkeypatch.setattr(gpu, "missing", lambda package: f"{package} is not installed")
    assert gpu.run_tests() == (True, "not run: pytest is not installed, hypothesis is not installed")


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert gpu.main() == 2
    assert capsys.readouterr().err.startswith("error: no GPU")
