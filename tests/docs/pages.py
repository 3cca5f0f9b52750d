"""Pages of the documentation as data: their blocks of code, run as a reader would, and what they print beside what the page shows.

In a page, ``console`` blocks hold commands (``$ …``) and what they print; ``python`` and ``yaml`` blocks whose first line is ``# <name>`` are
files that the commands after them use, ``diff`` blocks change files. ``<!-- slow -->`` marks where `make test-all` begins, ``<!-- not run: why -->`` the block below it.
A line ``…`` stands for any number of lines. Times, memory and dates are not compared: neither columns of a table that hold them, nor
numbers with such a unit.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hipexp import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<note>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml))(?: .*)?\n")
HIPEXP = "python -m hipexp "
RULE = re.compile(r"─+(  ─+)*")
VOLATILE = re.compile(r"\b(s|ms|MiB|age|ms/step)$|^age")
MEASURED = re.compile(r"\b\d+(\.\d+)?(?= ?(s|ms|min|h|MiB|GiB|KB|MB|GB)\b)|\b\d{4}-\d\d-\d\d\b")
ANYTHING = "…"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the note above it, whether it lies behind ``<!-- slow -->``, where its text begins in the page."""

    language: str
    text: str
    note: str
    slow: bool
    start: int

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, if it is one."""
        found = FILE.match(self.text) if self.language in ("python", "yaml") else None
        return found[1] if found else None

    def commands(self) -> list[tuple[str, list[str]]]:
        """The commands of a console block, each with the lines that it prints."""
        found: list[tuple[str, list[str]]] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif found:
                found[-1][1].append(line)
        return found


def scripts(page: Path) -> list[str]:
    """The ``python`` blocks of a page that are no files: together a script, from top to bottom."""
    return [block.text for block in blocks(page) if block.language == "python" and not block.file]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    slow = text.find("<!-- slow -->")
    return [
        Block(one["language"], one["text"], one["note"] or "", 0 <= slow < one.start(), one.start("text")) for one in BLOCK.finditer(text)
    ]


def say(command: str) -> tuple[int, list[str]]:
    """Run a command in the working directory: its exit code and the lines that it prints, of stderr only what ``error:`` begins.

    Where the working directory has a copy of hipexp, that one is run, in a process of its own.
    """
    copied = Path("hipexp").is_dir()
    if command.startswith(HIPEXP) and not copied and not re.search(r"[|<>]", command):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main(shlex.split(command, comments=True)[3:])
        lines, errors = out.getvalue().splitlines(), err.getvalue().splitlines()
        return code, lines + [line for line in errors if line.startswith("error")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    source = Path.cwd() if copied else ROOT
    own = os.environ | {"PATH": path, "PYTHONPATH": os.pathsep.join([str(source), str(source / "kernels")])}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=own, timeout=600)
    return done.returncode, done.stdout.splitlines() + [line for line in done.stderr.splitlines() if line.startswith("error")]


def comparable(lines: list[str]) -> list[str]:
    """Lines without what differs from one machine, or one minute, to the next; rows of a table as their cells."""
    made, spans, volatile = [], [], set()
    for number, line in enumerate(lines):
        if number + 1 < len(lines) and RULE.fullmatch(lines[number + 1].strip()):
            spans = [found.span() for found in re.finditer("─+", lines[number + 1])]
            volatile = {i for i, (begin, end) in enumerate(spans) if VOLATILE.search(line[begin:end].strip())}
        elif spans and any(line[end:begin].strip() for (_, end), (begin, _) in pairwise(spans)):
            spans = []
        if not spans or not line.strip():
            spans = []
            made.append(MEASURED.sub("~", line.rstrip()))
        elif not RULE.fullmatch(line.strip()):
            made.append(" | ".join("~" if i in volatile else line[begin:end].strip() for i, (begin, end) in enumerate(spans)))
    return [line for line in made if line]


def same(shown: list[str], said: list[str]) -> bool:
    """Whether what was said is what a page shows, where ``…`` stands for any lines."""
    parts: list[list[str]] = [[]]
    for line in comparable(shown):
        if line.strip() == ANYTHING:
            parts.append([])
        else:
            parts[-1].append(line)
    left = comparable(said)
    if len(parts) == 1:
        return parts[0] == left
    first, *middle, last = parts
    if left[: len(first)] != first or (last and left[-len(last) :] != last):
        return False
    left = left[len(first) : len(left) - len(last)]
    for part in middle:
        places = [at for at in range(len(left) - len(part) + 1) if left[at : at + len(part)] == part]
        if not places:
            return False
        left = left[places[0] + len(part) :]
    return True


def run(page: Path, slow: bool, record: bool = False) -> list[str]:
    """Run the blocks of a page in the working directory; returns what differs.

    ``record`` writes what was said into the page, but not over ``…``; a command that fails without an ``error:`` is told, and nothing written.
    """
    wrong, told = [], page.read_text(encoding="utf-8")
    for block in blocks(page):
        if (block.slow and not slow) or block.note.startswith("not run"):
            continue
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "diff":
            subprocess.run(["git", "apply", "-C1", "-"], input=block.text, text=True, check=True)
        elif block.language == "console":
            lines = []
            for command, shown in block.commands():
                code, said = say(command)
                kept = record and ANYTHING not in shown
                fails = any(line.startswith("error") for line in (said if kept else shown))
                if bool(code) != fails or not (kept or same(shown, said)):
                    wrong.append(f"$ {command}\nexit code {code}\nshown:\n{chr(10).join(shown)}\nsaid:\n{chr(10).join(said)}\n")
                lines += [f"$ {command}", *(said if kept else shown)]
            told = told.replace(block.text, "\n".join(lines) + "\n")
    if record and not wrong:
        page.write_text(told, encoding="utf-8")
    return wrong
