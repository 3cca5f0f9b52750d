"""Pages that show commands with what they print: run, and compared. ``--record`` writes what is printed into them."""

import shutil
from pathlib import Path

import pytest

from pages import ROOT, blocks, comparable, run, same

TUTORIAL, EXTENDING = ROOT / "docs" / "tutorial.md", ROOT / "docs" / "extending.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, where runs/ will be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hipexp.run.environment.git_revision", lambda folder: None)  # somebody may work on the checkout meanwhile
    for name in ("HIPEXP_RUNS", "HIPEXP_CONF", "HIPEXP_DATA"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def checkout(folder):
    """A copy of what ``docs/extending.md`` changes, with the method of the tutorial beside it."""
    for name in ("hipexp", "kernels", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)  # how pytest is called
    (mine,) = [block for block in blocks(TUTORIAL) if block.file == "mileposts.py"]
    Path("mileposts.py").write_text(mine.text, encoding="utf-8")


def check(page, pytestconfig, slow=True):
    wrong = run(page, slow, pytestconfig.getoption("record"))
    assert not wrong, "\n".join(wrong)


def test_the_tutorial_begins(folder, pytestconfig):
    check(TUTORIAL, pytestconfig, slow=False)


@pytest.mark.slow
def test_the_readme(folder, pytestconfig):
    check(ROOT / "README.md", pytestconfig)


@pytest.mark.slow
def test_the_tutorial(folder, pytestconfig):
    check(TUTORIAL, pytestconfig)


@pytest.mark.slow
def test_what_extending_walks_through(checkout, pytestconfig):
    check(EXTENDING, pytestconfig)


TABLE = ["name  score  decode ms", "────  ─────  ─────────", "a     100.0        9.5", "took 3 s", "runs/a_12345"]


def test_what_is_compared_and_what_is_not():
    assert comparable(TABLE) == ["name | score | ~", "a | 100.0 | ~", "took ~ s", "runs/a_12345"]
    slower = ["name  score  decode ms", "────  ─────  ──────────", "a     100.0      1009.5", "took 44 s", "runs/a_12345"]
    assert same(TABLE, slower) and not same(TABLE, [line.replace("100.0", " 50.0") for line in slower])
    assert not same(TABLE, [*slower[:-1], "runs/a_54321"]) and not same(TABLE, slower[:-1])
    assert same(["…", "took 1 s", "…"], slower) and not same(["…", "took 1 s"], slower) and not same(["…", "gone", "…"], slower)
