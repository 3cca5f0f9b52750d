"""What people get who install hipexp: the wheel and the source archive, and the package of operations by itself."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import hipexp
from pages import scripts

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def call(*words, cwd, **environment):
    """Standard output of a command that has to succeed, with nothing on Python's path but what the command brings."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HIPEXP_RUNS", "HIPEXP_CONF", "PYTEST_ADDOPTS")
    }
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300, cwd=cwd, env=clean | environment)
    assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "hipexp.__version__"}


def test_the_changelog_begins_with_this_version_and_goes_back_in_time():
    heads = re.findall(r"^## \[?(\S+?)\]? [–(-]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert heads[0] == hipexp.__version__
    assert heads == sorted(heads, key=lambda version: [int(part) for part in version.split(".")], reverse=True)


def test_every_extra_that_a_page_names_exists():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        (page.name, extra)
        for page in pages
        for found in re.findall(r"'\.\[([\w,]+)\]'", page.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert named and {extra for _, extra in named} <= extras, named


ALONE = """
import sys
class Nothing:  # but torch, what torch needs, and the operations
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hipexp", "transformers", "hydra", "omegaconf", "tokenizers", "pyarrow", "yaml", "matplotlib"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Nothing())
import torch
exec(open(sys.argv[1]).read())
print(sorted({name.split(".")[0] for name in sys.modules} & {"hipexp", "hipexp_kernels", "transformers"}))
"""


def test_the_operations_work_alone(tmp_path):
    """The folder of operations in an empty place, and the example of docs/library.md."""
    shutil.copytree(ROOT / "kernels" / "hipexp_kernels", tmp_path / "hipexp_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (example,) = (text for text in scripts(ROOT / "docs" / "library.md") if text.startswith("from hipexp_kernels "))
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    (tmp_path / "alone.py").write_text(ALONE, encoding="utf-8")
    said = call(sys.executable, "alone.py", "example.py", cwd=tmp_path).splitlines()
    assert said == ["torch.Size([8, 1, 1, 64])", "['hipexp_kernels']"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """``(wheel, source archive)``: the archive from a copy of the checkout, the wheel from the unpacked archive, without a network."""
    place = tmp_path_factory.mktemp("built")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if files.returncode:
        pytest.skip("the archive is made of what git knows, and this is no checkout")
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).exists():
            (place / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / "checkout" / name)
    call(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(place)!r})", cwd=place / "checkout")
    (source,) = place.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    call(*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", place, ".", cwd=unpacked)
    (wheel,) = place.glob("*.whl")
    return wheel, source


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """The folder of programs of an environment with the wheel, which sees the packages of this one but not its hipexp."""
    place = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    python = place / "bin" / "python"
    call(*PIP, "--python", python, "install", "--no-deps", "--no-index", archives[0], cwd=place)
    (own,) = (place / "lib").glob("python*/site-packages")
    others = [*site.getsitepackages(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    others = [path for path in others if path and not {ROOT, ROOT / "kernels"} & {Path(path).resolve()}]
    (own / "packages_of_the_tests.pth").write_text("\n".join(others) + "\n", encoding="utf-8")  # .pth files in those are not read
    return place / "bin"


@pytest.mark.slow
def test_wheel_and_archive_are_complete(archives):
    wheel, source = archives
    inside = set(zipfile.ZipFile(wheel).namelist())
    data = {f"hipexp/_conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    for folder, prefix in ((ROOT / "hipexp", "hipexp"), (ROOT / "kernels" / "hipexp_kernels", "hipexp_kernels")):
        files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        data |= {f"{prefix}/{path}" for path in files}
    assert data <= inside, sorted(data - inside)
    assert {name.split("/")[0] for name in inside} == {"hipexp", "hipexp_kernels", f"hipexp-{hipexp.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
        "docs/methods.md",
        "tests/kernels/brute.py",
        "conf/config.yaml",
    } <= names


WHERE = "import hipexp, hipexp_kernels, json, sys, importlib.metadata as m; print(json.dumps([hipexp.__file__, hipexp_kernels.__file__, sys.path, m.version('hipexp')]))"


@pytest.mark.slow
def test_an_installed_hipexp_works_in_an_empty_folder(installed, tmp_path):
    own, kernels, path, version = json.loads(call(installed / "python", "-c", WHERE, cwd=tmp_path))
    assert str(installed.parent) in own and str(installed.parent) in kernels and version == hipexp.__version__
    assert not {str(ROOT), str(ROOT / "kernels")} & set(path)

    def say(*words):
        return call(installed / "hipexp", *words, cwd=tmp_path, OMP_NUM_THREADS="1")

    assert say("--version") == f"{hipexp.__version__}\n" == call(installed / "python", "-m", "hipexp", "--version", cwd=tmp_path)
    assert "3stage_plus" in say("--help") and "complete " in say("completion", "bash")
    assert "known here" not in say("doctor")
    told = say("+pipeline=3stage", "task=passkey", "task.lengths_tok=[1024]", "task.depths=[0.5]", "task.samples=1")
    folder = told.splitlines()[-1]
    assert (
        folder.startswith("runs/passkey/needle_3stage_") and json.loads((tmp_path / folder / "summary.json").read_text())["average"] == 100
    )
    assert Path(folder).name in say("ls")
    assert (tmp_path / say("report").splitlines()[-1]).stat().st_size > 10_000
    assert "24 points, 0 of them done" in say("sweep", "quick", "--dry-run")
    table = say("sweep", "quick", "count=1", "task.length_tok=1024").splitlines()[-1].removeprefix("table: ")
    assert "1 of 1 points are done" in (tmp_path / table).read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
