"""A folder of small data in the official schemas, with prompts in our own words in files of the official form."""

import json
import random
from pathlib import Path

from hipexp.suites.data.registry import LONGBENCH, LONGBENCH_E
from hipexp.suites.infbench_official import SUBTASKS as INFBENCH
from hipexp.suites.infbench_rows import MAKERS, make_rows

WORDS = "river stone bridge lamp garden paper letter window winter market silver road morning kitchen engine island".split()
CLASSES = ["Weather", "Sports", "Politics"]


def text(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


def longbench_row(task, rng, length):
    answer = {"passage_count": "3", "passage_retrieval_en": "Paragraph 2", "passage_retrieval_zh": "段落2"}.get(
        task, f"the {rng.choice(WORDS)}"
    )
    classes = CLASSES if task in ("trec", "lsht") else None
    return {
        "input": f"Where is the {rng.choice(WORDS)}?",
        "context": text(rng, length // 20),
        "answers": [rng.choice(CLASSES)] if classes else [answer],
        "length": length,
        "dataset": task,
        "language": "en",
        "all_classes": classes,
        "_id": f"{rng.getrandbits(64):016x}",
    }


def write_rows(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_longbench(folder: Path):
    rng = random.Random(1)
    for task in LONGBENCH:
        write_rows(folder / "data" / f"{task}.jsonl", [longbench_row(task, rng, 2000) for _ in range(3)])
    for task in LONGBENCH_E:
        rows = [longbench_row(task, rng, length) for length in (1000, 5000, 12000)]
        write_rows(folder / "data" / f"{task}_e.jsonl", rows)
    prompts = dict.fromkeys(LONGBENCH, "Read this.\n\n{context}\n\nNow answer: {input}\nAnswer:")
    (folder / "dataset2prompt.json").write_text(json.dumps(prompts))
    (folder / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(LONGBENCH, 8)))


def write_longbench2(folder: Path):
    rng = random.Random(2)
    rows = [
        {
            "_id": str(i),
            "domain": "x",
            "difficulty": ("easy", "hard")[i % 2],
            "length": ("short", "medium", "long")[i % 3],
            "question": " Which one? ",
            **{f"choice_{letter}": rng.choice(WORDS) for letter in "ABCD"},
            "answer": rng.choice("ABCD"),
            "context": text(rng, 60),
        }
        for i in range(6)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps(rows))
    prompt = "Text: $DOC$\nQuestion: $Q$\n(A) $C_A$ (B) $C_B$ (C) $C_C$ (D) $C_D$\nSay which."
    (folder / "0shot.txt").write_text(prompt)


def infbench_row(task, number, rng):
    options = [f"{name}_{number}" for name in rng.sample(WORDS, 4)]
    answer = [options[rng.randrange(4)]] if task in ("longbook_choice_eng", "code_debug") else [rng.choice(WORDS)]
    return {"id": number, "context": text(rng, 80), "input": "Which one?", "answer": answer, "options": options}


def write_infbench(folder: Path):
    rng = random.Random(3)
    for task in INFBENCH:
        made = (
            make_rows(task, 400, 3, 0, lambda words: len(words) // 4) if task in MAKERS else (infbench_row(task, i, rng) for i in range(3))
        )
        write_rows(folder / f"{task}.jsonl", made)
    asks = {
        **dict.fromkeys(INFBENCH, "{context}\n{input}\nIt is"),
        "code_run": "{context}\n{func} gives for {func_call}:",
        "math_find": "{prefix}\n{context}\n{input}",
        "longbook_choice_eng": "{context}\n{question}\n{OPTION_A} {OPTION_B} {OPTION_C} {OPTION_D}",
    }
    lines = [f"{name} = {asks!r}" for name in ("gpt4_templates", "yarn_mistral_templates", "claude2_templates")]
    (folder / "prompt.py").write_text("\n".join(lines) + "\n")
    (folder / "infllm").mkdir(exist_ok=True)
    (folder / "infllm" / "dataset2prompt.json").write_text(json.dumps(asks | {"kv_retrieval": "{context}\nWhat belongs to {key}?"}))
    (folder / "infllm" / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(INFBENCH, 9)))


def write_all(folder: Path) -> Path:
    """All suites under one folder, as ``task.data`` takes it."""
    write_longbench(folder / "longbench")
    write_longbench2(folder / "longbench2")
    write_infbench(folder / "infbench")
    return folder
