"""``make check-official``: our scores and our RULER rows beside those of the official code, number by number.

The code is fetched at fixed commits into the data folder (its SHA-256 is recorded there and checked from then on) and run in processes of
its own, never imported here and never part of this repository. ``python tests/suites/official_code.py <folder>`` takes files that are there
already, under the names of ``FILES``, and leaves out the parts whose files are missing.
Rows are generated: predictions of pieces that the rules look at, RULER's sources in the official formats. The exit code is 1 if a number differs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from hipexp.run.tokenizer_file import read_tokenizer
from hipexp.suites.data import read_literals
from hipexp.suites.data.fetch import fetch
from hipexp.suites.data.registry import INFBENCH_CODE, LONGBENCH_CODE, LONGBENCH_E, RULER_CODE, DataFile, Source
from hipexp.suites.data.resolve import data_root, digest
from hipexp.suites.ruler import SUBTASKS, make_rows
from hipexp.suites.scoring import score_rows
from hipexp.suites.scoring.infbench import METRICS as INFBENCH
from hipexp.suites.scoring.infbench import score_infbench
from hipexp.suites.scoring.longbench import METRICS as LONGBENCH
from hipexp.suites.scoring.longbench import score_longbench
from hipexp.suites.scoring.longbench2 import answer_of
from hipexp.suites.scoring.ruler import METRICS as RULER
from hipexp.suites.scoring.ruler import score_ruler
from ruler_data import write_resources

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "hipexp/needle/model"  # whose tokenizer RULER's rows are made for
ROWS, SEED, SHOWN = 2000, 1, 5
RULER_LENGTHS = {8192: SUBTASKS, 2048: ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "fwe")}
LIMIT_S = 600  # of one official process
HUNDREDTH, TENTH = 0.0101, 0.101  # between two means that are rounded after sums in another order


@dataclass(frozen=True)
class CodeFile(DataFile):
    """A file of official code."""

    @property
    def command(self) -> str:
        return "make check-official"


def code(name: str, source: Source, path: str) -> CodeFile:
    return CodeFile("official", name, source, path, 10_000)


INFBENCH_OLD = replace(INFBENCH_CODE, revision="88b3daa6989da2fbe0077170d7a3c84c25d5ae58")
MINFERENCE_CODE = Source("github", "microsoft/MInference", "3581688fee729dec8460eb0ab0527f4918bbca90", "MIT")
GENERATORS = ("niah", "variable_tracking", "common_words_extraction", "freq_words_extraction", "qa", "constants")
RULER_FILES = (
    *("scripts/synthetic.yaml", "scripts/data/tokenizer.py", "scripts/data/manifest_utils.py"),
    *(f"scripts/data/synthetic/{name}.py" for name in GENERATORS),
    *("scripts/eval/evaluate.py", "scripts/eval/synthetic/constants.py"),
)
FILES = (
    code("infbench-2024-06/compute_scores.py", INFBENCH_OLD, "src/compute_scores.py"),
    code("infbench-2024-08/compute_scores.py", INFBENCH_CODE, "src/compute_scores.py"),
    code("infbench-minference/compute_scores.py", MINFERENCE_CODE, "experiments/infinite_bench/compute_scores.py"),
    code("longbench/metrics.py", LONGBENCH_CODE, "LongBench/metrics.py"),
    code("longbench/eval.py", LONGBENCH_CODE, "LongBench/eval.py"),
    code("longbench2/pred.py", LONGBENCH_CODE, "pred.py"),
    code("longbench2/result.py", LONGBENCH_CODE, "result.py"),
    *(code(f"ruler/{path}", RULER_CODE, path) for path in RULER_FILES),
)


@dataclass
class Comparison:
    """How many numbers (or rows) of a part were compared, and what differs; ``failed``: the official code raises, and ours gives 0."""

    part: str
    compared: int = 0
    failed: int = 0
    differences: list[str] = field(default_factory=list)

    def add(self, what, ours, theirs, within: float = 1e-9) -> None:
        """Compare two numbers, letters or rows, or nested ones by name. ``within``: how far numbers may lie apart."""
        if isinstance(theirs, dict) and isinstance(ours, dict) and "error" not in theirs:
            for name in sorted({*ours, *theirs}):
                self.add(f"{what} {name}", ours.get(name), theirs.get(name), within)
            return
        self.compared += 1
        if isinstance(theirs, dict) and "error" in theirs:
            self.failed += 1
            theirs = 0
        if not same(ours, theirs, within):
            self.differences.append(f"{what}: ours {ours!r:.200}, official {theirs!r:.200}")


def same(ours, theirs, within: float) -> bool:
    """Equal; numbers as nearly as that; not a number is like none at all."""
    if isinstance(theirs, float) and theirs != theirs:
        return ours is None
    numbers = isinstance(ours, int | float) and isinstance(theirs, int | float)
    return abs(ours - theirs) <= within if numbers else ours == theirs


def official(kind: str, folder: Path, rows: Sequence[dict]) -> list:
    """What the official code in ``folder`` says of rows, from a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        answers = Path(scratch) / "answers.json"
        command = [sys.executable, str(HERE / "official_child.py"), kind, str(folder), str(answers)]
        run(command, Path(scratch), text=json.dumps(rows))
        return json.loads(answers.read_text())


def run(command: list[str], folder: Path, text: str = "", **environment: str) -> None:
    """Run a process in a folder, offline. Raises ``RuntimeError`` with the end of what it said if it fails."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""} | environment
    done = subprocess.run(command, cwd=folder, env=os.environ | quiet, input=text, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:300]} failed:\n{done.stderr[-2000:]}")


# Generated predictions


PIECES = (
    *("A", "B", "C", "D", "E", "I", "J", "BC", "BD", ".", ",", ":", "`", "'", '"', "-", "*", "(", ")", "{", "}", "?", "!", "#", "//", "\n", "\n\n", "\t"),
    *("answer is:", "answer is", "answer:", "option is", "is:", "correct option is:", "Option", "option", "The", "To", "</s>", "the", "a", "an"),
    *("The correct answer is (B)", "The correct answer is ", "(C)", "3", "-3", "3.0", "3.7", "42", "0", "007", "Paragraph 3", "段落3"),
    *("Paragraph", "北京", "大学", "灯塔", "。", "“", "house", "old", "x = 1", "return", "City", "Country", "Mountain", "\x00", "٧"),
)  # fmt: skip
WORDS = "old house lamp river stone the a window City 3 run parse_header".split()
CLASSES = ["City", "Country", "Mountain", "City of the old", "Other location"]


def prediction(rng: random.Random, labels: Sequence[str]) -> str:
    """Pieces that some rule looks at, and parts of the labels, in any order."""
    mine = [*labels, *(label.lower() for label in labels), *(label[: len(label) // 2] for label in labels), *(word for label in labels for word in label.split())]  # fmt: skip
    pieces = [rng.choice(mine if rng.random() < 0.4 else PIECES) for _ in range(rng.randint(0, 9))]
    return "".join(piece + rng.choice(("", " ", " ", "\n")) for piece in pieces)


def phrase(rng: random.Random, least: int = 1, most: int = 6) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def infbench_label(subtask: str, rng: random.Random) -> list:
    """A label in the form that the official scorer compares with."""
    digits = {"passkey": 5, "number_string": 10}
    if subtask in digits:
        return ["".join(rng.choice("0123456789") for _ in range(digits[subtask]))]
    if subtask in ("longbook_choice_eng", "code_debug"):
        return [rng.choice(("Under the bridge", "Because he fell", "B side", "parse_header", "run")), rng.choice("ABCD")]
    if subtask in ("code_run", "math_find"):
        return [rng.choice((3, 42, -3, 0)) if subtask == "code_run" or rng.random() < 0.7 else rng.choice((3.0, 3.7, 42.5))]
    if subtask == "math_calc":
        return [rng.choice((3, 42, 0, 7)) for _ in range(rng.randint(1, 5))]
    if subtask == "longdialogue_qa_eng":
        return [phrase(rng, 1, 2).upper() for _ in range(rng.randint(1, 3))]
    if subtask == "kv_retrieval":
        return ["cb59052b-9128"]
    texts = (
        ("北京大学", "老灯塔", "北京 大学。", "lamp")
        if subtask == "longbook_qa_chn"
        else (phrase(rng, 1, 9), phrase(rng) + "\n" + phrase(rng))
    )
    return [rng.choice(texts) for _ in range(rng.randint(1, 3))]


def check_infbench(edition: str, folder: Path) -> Comparison:
    """Each row of each task; a label of ``kv_retrieval`` is a text, as in the published predictions."""
    found, rng = Comparison(f"∞Bench {edition}"), random.Random(SEED)
    rows = []
    for subtask in INFBENCH:
        for _ in range(ROWS):
            label = infbench_label(subtask, rng)
            said = prediction(rng, [str(one) for one in label])
            rows.append({"subtask": subtask, "prediction": said, "label": label[0] if subtask == "kv_retrieval" else label})
    for row, theirs in zip(rows, official("infbench", folder / f"infbench-{edition}", rows), strict=True):
        label = [row["label"]] if row["subtask"] == "kv_retrieval" else row["label"]
        ours = score_infbench(row["subtask"], row["prediction"], label, edition) / 100
        found.add(f"{row['subtask']}, {row['prediction']!r}, {label!r}", ours, theirs)
    return found


def longbench_answers(subtask: str, rng: random.Random) -> list[str]:
    metric = LONGBENCH[subtask]
    fixed = {"count": "3", "paragraph": "Paragraph 3", "paragraph_zh": "段落3"}
    if metric in fixed:
        return [fixed[metric]]
    if metric == "class":
        return [rng.choice(CLASSES)]
    chinese = ("北京大学", "老灯塔 lamp", "在北京的大学。")
    return [
        rng.choice((*chinese, phrase(rng)) if metric.endswith("_zh") else (phrase(rng), phrase(rng, 3, 12)))
        for _ in range(rng.randint(1, 3))
    ]


def check_longbench(folder: Path) -> Comparison:
    """Each row of each task, the mean of each task, and of the 13 of LongBench-E by length, as the official script rounds them."""
    found, rng = Comparison("LongBench and LongBench-E"), random.Random(SEED)
    asked, ours = [], []
    for subtask in LONGBENCH:
        answers = [longbench_answers(subtask, rng) for _ in range(ROWS)]
        said = [prediction(rng, one) for one in answers]
        lengths = [rng.randrange(12_000) for _ in answers]
        for text, references in zip(said, answers, strict=True):
            asked.append({"subtask": subtask, "predictions": [text], "answers": [references], "all_classes": CLASSES})
            ours.append(round(score_longbench(subtask, text, references, CLASSES), 2))
        whole = {"subtask": subtask, "predictions": said, "answers": answers, "all_classes": CLASSES}
        rows = [
            {"subtask": subtask, "prediction": text, "references": references, "all_classes": CLASSES, "length": length}
            for text, references, length in zip(said, answers, lengths, strict=True)
        ]
        asked.append(whole)
        ours.append(score_rows("longbench", rows)["scores"][subtask]["score"])
        if subtask in LONGBENCH_E:
            asked.append(whole | {"lengths": lengths})
            scores = score_rows("longbench", [row | {"subtask": f"{subtask}_e"} for row in rows])["scores"]
            ours.append({name.partition("@")[2]: entry["score"] for name, entry in scores.items()})
    for row, mine, theirs in zip(asked, ours, official("longbench", folder / "longbench", asked), strict=True):
        within = HUNDREDTH if len(row["predictions"]) > 1 else 1e-9
        found.add(f"{row['subtask']}, {row['predictions'][:2]!r:.300}, {row['answers'][:2]!r:.300}", mine, theirs, within)
    return found


def check_longbench2(folder: Path) -> Comparison:
    """The letter of each output, and the six means of the official script."""
    found, rng = Comparison("LongBench v2"), random.Random(SEED)
    rows = []
    for number in range(10 * ROWS):
        said, letter = prediction(rng, ["The correct answer is (A)", "The correct answer is *D*"]), rng.choice("ABCD")
        where = {"difficulty": ("easy", "hard")[number % 2], "length": ("short", "medium", "long")[number % 3]}
        rows.append({"subtask": "longbench2", "prediction": said, "references": [letter]} | where)
    for row, theirs in zip(rows, official("longbench2", folder / "longbench2", rows), strict=True):
        found.add(f"{row['prediction']!r}", answer_of(row["prediction"]), theirs)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "results").mkdir()
        told = [{**row, "pred": (pred := answer_of(row["prediction"])), "judge": pred == row["references"][0]} for row in rows]
        (scratch / "results" / "model.jsonl").write_text("\n".join(map(json.dumps, told)))
        run([sys.executable, str(folder / "longbench2" / "result.py")], scratch)
        head, values = (line.split("\t")[1:] for line in (scratch / "result.txt").read_text().splitlines())
    scores = score_rows("longbench2", rows)["scores"]
    for group, theirs in zip(head, values, strict=True):
        found.add(f"mean of {group}", scores[group.lower()]["score"], float(theirs), TENTH)
    return found


def ruler_settings(folder: Path) -> dict[str, dict]:
    """The official settings by task: the kind of task, its arguments, its template and its limit of new tokens."""
    kinds = read_literals(folder / "scripts/data/synthetic/constants.py", "TASKS")["TASKS"]
    return {name: one | kinds[one["task"]] for name, one in yaml.safe_load((folder / "scripts/synthetic.yaml").read_text()).items()}


def check_ruler_scores(folder: Path) -> Comparison:
    """Each row of each task, and the mean of each task."""
    found, rng, settings = Comparison("RULER, scores"), random.Random(SEED), ruler_settings(folder / "ruler")
    asked, ours = [], []
    for subtask in RULER:
        rows = []
        for number in range(ROWS):
            references = [phrase(rng, 1, 2) for _ in range(rng.randint(1, 5))]
            rows.append({"subtask": subtask, "prediction": prediction(rng, references), "references": references, "sample": number})
        for group in ([row] for row in rows):
            asked.append((subtask, group))
            ours.append(round(score_ruler(subtask, group[0]["prediction"], group[0]["references"]), 2))
        asked.append((subtask, rows))
        ours.append(score_rows("ruler", rows)["scores"][subtask]["score"])
    told = [
        {
            "task": settings[subtask]["task"],
            "predictions": [row["prediction"] for row in rows],
            "references": [row["references"] for row in rows],
        }
        for subtask, rows in asked
    ]
    for (subtask, rows), mine, theirs in zip(asked, ours, official("ruler", folder / "ruler", told), strict=True):
        found.add(f"{subtask}, {rows[0]['prediction']!r}, {rows[0]['references']!r}", mine, theirs, HUNDREDTH if len(rows) > 1 else 1e-9)
    return found


def check_ruler_rows(folder: Path, lengths: dict[int, Sequence[str]] = RULER_LENGTHS, samples: int = 3) -> Comparison:
    """Every field of every row, for the tokenizer of the embedded model, from sources in the official formats that are made here."""
    found, settings = Comparison("RULER, rows"), ruler_settings(folder / "ruler")
    tokenizer = read_tokenizer(MODEL / "tokenizer.json")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        sources = write_resources(scratch / "sources", punkt=True)
        scripts = shutil.copytree(folder / "ruler" / "scripts", scratch / "scripts")
        shutil.copytree(sources, scripts / "data/synthetic/json")
        shutil.copytree(sources / "punkt_tab", scratch / "nltk/tokenizers/punkt_tab")
        for length_tok, subtasks in lengths.items():
            for subtask in subtasks:
                run(command_of(subtask, settings[subtask], length_tok, samples, scratch), scratch, NLTK_DATA=str(scratch / "nltk"))
                lines = (scratch / "rows" / subtask / "validation.jsonl").read_text().splitlines()
                ours = make_rows(
                    subtask, length_tok, samples, 42, lambda text: len(tokenizer(text, add_special_tokens=False).input_ids), sources
                )
                for number, (mine, theirs) in enumerate(zip(ours, map(json.loads, lines), strict=True)):
                    found.add(f"{subtask} at {length_tok}, row {number}", mine, theirs)
    return found


def command_of(subtask: str, settings: dict, length_tok: int, samples: int, scratch: Path) -> list[str]:
    """The call of a generator as the official ``prepare.py`` makes it, with the template for base models."""
    told = {"save_dir": scratch / "rows", "save_name": subtask, "subset": "validation", "tokenizer_path": MODEL, "tokenizer_type": "hf"}
    told |= {"max_seq_length": length_tok, "tokens_to_generate": settings["tokens_to_generate"], "num_samples": samples, "random_seed": 42}
    told |= settings["args"] | {"template": settings["template"] + settings.get("answer_prefix", "")}
    script = scratch / "scripts/data/synthetic" / f"{settings['task']}.py"
    return [sys.executable, str(HERE / "official_child.py"), str(script), *(f"--{key}={value}" for key, value in told.items())]


# Part: the files that it needs begin with the first word.
PARTS: tuple[tuple[str, Callable[[Path], Comparison]], ...] = (
    ("infbench-2024-06", lambda folder: check_infbench("2024-06", folder)),
    ("infbench-2024-08", lambda folder: check_infbench("2024-08", folder)),
    ("infbench-minference", lambda folder: check_infbench("minference", folder)),
    ("longbench/", check_longbench),
    ("longbench2", check_longbench2),
    ("ruler", check_ruler_scores),
    ("ruler", check_ruler_rows),
)


def main(words: Sequence[str]) -> int:
    """Compare all parts whose files are there; 1 if anything differs or no part is there."""
    folder = Path(words[0]).absolute() if words else data_root() / "official"
    if not words:
        for file in FILES:
            fetch(file, data_root())
    compared, differ = 0, 0
    for start, check in PARTS:
        needed = [file for file in FILES if file.name.startswith(start)]
        if missing := [file.name for file in needed if not (folder / file.name).is_file()]:
            print(f"{start.strip('/')}: left out, {', '.join(missing)} not in {folder}")
            continue
        found = check(folder)
        compared, differ = compared + found.compared, differ + len(found.differences)
        print(
            f"{found.part}: {found.compared} compared, {len(found.differences)} differ, in {found.failed} the official code fails",
            flush=True,
        )
        for line in found.differences[:SHOWN]:
            print(f"  {line}")
    for file in FILES:
        if (folder / file.name).is_file():
            print(f"{file.name} {file.source.name}@{file.source.revision[:12]} sha256 {digest(folder / file.name)}")
    return int(differ > 0 or compared == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
