"""Every command line that a page quotes is one: the sub-command or target exists, the words compose."""

import re
import shlex
from pathlib import Path

import pytest

from hipexp import cli
from hipexp.completion import FILTERS, OWN
from hipexp.config import compose
from hipexp.config.schema import ConfigError
from hipexp.repro import command as repro
from hipexp.run.methods_table import read_comparison
from hipexp.run.sweep_file import read_sweep
from hipexp.tune import command as tune
from pages import PAGES, ROOT, blocks

QUOTED = re.compile(r"^(?: {4}|\$ )?((?:python -m hipexp|make) [^\n]*)$(?:\n(error:))?|`((?:python -m hipexp|make) [^`\n]+)`", re.M)
OPEN = re.compile(r"…|\.\.\.|<|\bFILE\b| A B\b|\$\(|\bruns/|\\$")  # a place that the reader fills
TARGETS = set(re.findall(r"^([a-z0-9%-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def quoted() -> list[tuple[str, bool]]:
    """Commands without the remark behind two blanks or more, and whether they are shown to be refused.

    Those of ``extending.md`` are about a hipexp that has been extended: they are run.
    """
    found = {}
    for page in PAGES:
        if page.name != "extending.md":
            for line, error, inline in QUOTED.findall(page.read_text(encoding="utf-8")):
                command = re.split(r" {2,}| # ", line or inline)[0].strip()
                if not OPEN.search(command):
                    found[command] = bool(error)
    return list(found.items())


QUOTES = quoted()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that pages show, and those that they take for granted."""
    place = tmp_path_factory.mktemp("pages")
    for page in PAGES:
        for block in blocks(page):
            if block.file and "/" not in block.file:
                (place / block.file).write_text(block.text, encoding="utf-8")
    (place / "my_pipeline.yaml").write_text((ROOT / "conf" / "pipeline" / "2stage.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (place / "conf").symlink_to(ROOT / "conf")
    return place


def check(words: list[str]) -> None:
    """Refuse what the command line would refuse before it loads anything."""
    flags = {cli.DRY, cli.QUIET, cli.JSON, "--help", "--version"}
    rest = [word for word in words if word not in flags]
    if rest and "=" not in rest[0] and not rest[0].startswith(("-", "+", "~")):
        assert rest[0] in cli.COMMANDS, f"there is no command {rest[0]}"
        cli._check_words(rest[0], rest[1:])
        if rest[0] == "repro" and rest[1:]:
            repro.read_arguments(rest[1:])
        elif rest[0] == "tune":
            tune.read_words(rest[1:])
        elif rest[0] == "doctor" and rest[1:]:
            compose.compose(rest[1:])
        elif rest[0] in ("data", "score", "completion") and len(rest) > 1:
            assert rest[1] in OWN[rest[0]][""], f"{rest[0]} has no {rest[1]}"
        elif rest[0] in ("ls", "retry"):
            assert all(word.split("=")[0] + "=" in FILTERS for word in rest[1:] if "=" in word), f"{rest[0]} chooses by {FILTERS}"
        elif rest[0] == "sweep":
            (file,) = (word for word in rest[1:] if "=" not in word)
            read_sweep(Path(file)).choices(
                [word for word in rest[1:] if not re.match(r"jobs=|count=|sweep_seed=", word) and word != file], 1, 0
            )
        elif named := [word[3:] for word in rest if word.startswith("of=")]:
            read_comparison(named[0], fast=False)
        return
    line = compose.read_line(rest)
    for words in compose.sweep_points(line.overrides) if line.sweep else [line.overrides]:
        compose.compose_point(words)


@pytest.mark.parametrize(
    "command",
    ["repro table99", "repro table2 size=bogus", "tune task=infbench objektive=[score]", "doctor +pipeline=nosuch", "retry stat=failed",
     "data push", "score nosuch file", "+pipeline=3stages"],
)  # fmt: skip
def test_what_is_no_command_is_refused(command):
    with pytest.raises((ConfigError, AssertionError)):
        check(shlex.split(command))


def test_there_are_many():
    assert len(QUOTES) > 60 and sum(refused for _, refused in QUOTES) >= 1


@pytest.mark.parametrize(("command", "refused"), QUOTES, ids=[command[:100] for command, _ in QUOTES])
def test_a_quoted_command_is_one(command, refused, folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = shlex.split(command.replace("/ssd", str(folder)))
    if words[0] == "make":
        names = [word for word in words[1:] if "=" not in word]
        assert all(name in TARGETS or any("%" in rule and name.startswith(rule[:-1]) for rule in TARGETS) for name in names)
    elif refused:
        with pytest.raises(ConfigError):
            check(words[3:])
    else:
        check(words[3:])
