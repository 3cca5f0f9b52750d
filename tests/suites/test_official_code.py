"""What ``make check-official`` compares with, tried on small files in place of the official ones: equality, differences, failures, gaps."""

import subprocess
import sys
from pathlib import Path

import pytest

import official_code
from hipexp.suites.data.registry import file_named
from hipexp.suites.sample import DataMissing

pytest.importorskip("lm_eval")
HERE = Path(__file__).parent
SCORER = """
from args import parse_args
import evaluate
from hipexp.suites.scoring.infbench import score_infbench
ROUGE = evaluate.load("rouge")

def get_score_one(pred, label, task_name, model_name):
    if task_name == "longbook_sum_eng":
        return ROUGE.compute(predictions=[pred], references=[label], use_aggregator=False)["rougeLsum"][0]
    {change}
    return score_infbench(task_name, pred, label if isinstance(label, list) else [label], "2024-06") / 100
"""
GENERATOR = """
import argparse, json
from pathlib import Path
import manifest, tokenizer_of
from tenacity import retry, wait_fixed, wait_random, stop_after_attempt

@retry(wait=wait_fixed(60) + wait_random(0, 10), stop=stop_after_attempt(3))
def unused(): pass

parser = argparse.ArgumentParser()
for name in ("save_dir", "save_name", "subset", "tokenizer_path", "tokenizer_type", "template", {more}):
    parser.add_argument("--" + name, required=True)
for name in ("max_seq_length", "tokens_to_generate", "num_samples", "random_seed"):
    parser.add_argument("--" + name, type=int, required=True)
args = parser.parse_args()
assert args.template.endswith(" are") and args.tokens_to_generate == 30
here = Path(__file__).parent
assert sorted(path.name for path in (here / "json").iterdir()) >= ["PaulGrahamEssays.json", "english_words.json"]
from hipexp.run.tokenizer_file import read_tokenizer
from hipexp.suites.ruler import make_rows
count = read_tokenizer(Path(args.tokenizer_path) / "tokenizer.json")
rows = make_rows(args.save_name, args.max_seq_length, args.num_samples, args.random_seed, lambda text: len(count(text, add_special_tokens=False).input_ids), here / "json")
rows[1]["outputs"] = {outputs}
path = Path(args.save_dir) / args.save_name / (args.subset + ".jsonl")
path.parent.mkdir(parents=True)
path.write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(official_code, "ROWS", 40)


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    "change", ["", "if task_name == 'passkey': return 0.25", "if task_name == 'math_find': raise ValueError('no number')"]
)
def test_each_score_is_compared_and_a_failure_counts_as_0(tmp_path, change):
    write(tmp_path, "infbench-2024-06/compute_scores.py", SCORER.format(change=change))
    found = official_code.check_infbench("2024-06", tmp_path)
    assert found.compared == 12 * 40 and found.part == "∞Bench 2024-06"
    assert found.failed == (40 if "raise" in change else 0)
    assert bool(found.differences) == bool(change)
    assert all(line.startswith("passkey" if "passkey" in change else "math_find") for line in found.differences)
    if "passkey" in change:
        assert len(found.differences) == 40 and "ours 0.0, official 0.25" in " ".join(found.differences)


def test_official_code_never_runs_in_this_process(tmp_path):
    write(tmp_path, "infbench-2024-06/compute_scores.py", "import os\nos._exit(3)\n")
    with pytest.raises(RuntimeError, match="official_child"):
        official_code.check_infbench("2024-06", tmp_path)
    assert "compute_scores" not in sys.modules and "evaluate" not in official_code.__dict__


def test_longbench_rows_means_and_buckets(tmp_path):
    """A scorer of single rows that is ours, and means with one fault: the third bucket begins at 9000 words."""
    write(
        tmp_path,
        "longbench/eval.py",
        """
from fuzzywuzzy import fuzz
import metrics
assert fuzz.ratio("abcd", "abce") == 75 and fuzz.ratio("", "") == 100 and fuzz.ratio("", "a") == 0

def each(dataset, predictions, answers, all_classes):
    return [metrics.score_longbench(dataset, one, references, all_classes) for one, references in zip(predictions, answers)]

def scorer(*told):
    scores = each(*told)
    return round(sum(scores) / len(scores), 2)

def scorer_e(dataset, predictions, answers, lengths, all_classes):
    scores, found = each(dataset, predictions, answers, all_classes), {}
    for name, low, high in (("0-4k", 0, 4000), ("4-8k", 4000, 8000), ("8k+", 9000, 10**9), ("none", 1, 0)):
        mine = [score for score, length in zip(scores, lengths) if low <= length < high]
        found[name] = round(sum(mine) / len(mine), 2) if mine else float("nan")
    return found
""",
    )
    write(tmp_path, "longbench/metrics.py", "from hipexp.suites.scoring.longbench import score_longbench\n")
    found = official_code.check_longbench(tmp_path)
    assert found.compared == 21 * 41 + 13 * 4
    assert found.differences and all(" 8k+: ours" in line for line in found.differences)


def test_longbench2_letters_and_means(tmp_path):
    write(
        tmp_path,
        "longbench2/pred.py",
        'raise SystemExit("cannot be imported")\n\n\ndef extract_answer(response):\n    found = re.search("correct answer is .?([A-D])", response)\n    return found and found[1]\n',
    )
    groups = "Overall\\tEasy\\tHard\\tShort\\tMedium\\tLong"
    write(
        tmp_path,
        "longbench2/result.py",
        f"""
import json
rows = [json.loads(line) for line in open("results/model.jsonl")]
def mean(rows): return str(round(100 * sum(row["judge"] for row in rows) / len(rows), 1))
values = [mean(rows)] + [mean([row for row in rows if name in (row["difficulty"], row["length"])]) for name in ("easy", "hard", "short", "medium")]
open("result.txt", "w").write("Model\\t{groups}\\n" + "\\t".join(["model", *values, "99.9"]))
""",
    )
    found = official_code.check_longbench2(tmp_path)
    assert found.compared == 10 * 40 + 6
    assert [line for line in found.differences if line.startswith("mean")] == [found.differences[-1]]
    assert found.differences[-1].startswith("mean of Long: ours") and "official 99.9" in found.differences[-1]


def test_ruler_scores(tmp_path):
    write_settings(tmp_path)
    write(
        tmp_path,
        "ruler/scripts/eval/evaluate.py",
        'parser.parse_args()\n\n\ndef postprocess_pred(text, config):\n    return re.sub(r"[\\x00-\\x1f]", "\\n", text.strip()).strip()\n',
    )
    write(
        tmp_path,
        "ruler/scripts/eval/synthetic/constants.py",
        """
def share(predictions, references):
    each = [sum(one.lower() in text.lower() for one in mine) / len(mine) for text, mine in zip(predictions, references)]
    return round(100 * sum(each) / len(each), 2)
TASKS = {"any": {"metric_fn": share}}
""",
    )
    found = official_code.check_ruler_scores(tmp_path)
    assert found.compared == 13 * 41
    assert found.differences and all(line.startswith("qa_") for line in found.differences)  # which need any of the references


def write_settings(folder):
    names = "\n".join(f"{name}:\n  task: any\n  args:\n    size: 4\n" for name in official_code.SUBTASKS)
    write(folder, "ruler/scripts/synthetic.yaml", names)
    told = {"any": {"tokens_to_generate": 30, "template": "What are", "answer_prefix": " they are"}}
    write(folder, "ruler/scripts/data/synthetic/constants.py", f"TASKS = {told!r}\n")


@pytest.mark.parametrize("outputs", [pytest.param('rows[1]["outputs"]', marks=pytest.mark.slow), '["other"]'])
def test_ruler_rows_are_compared_field_by_field(tmp_path, outputs):
    write_settings(tmp_path)
    write(tmp_path, "ruler/scripts/data/synthetic/any.py", GENERATOR.format(more='"size"', outputs=outputs))
    for name in ("manifest", "tokenizer_of"):
        write(tmp_path, f"ruler/scripts/data/synthetic/{name}.py", "")
    found = official_code.check_ruler_rows(tmp_path, {3000: ("vt",)}, samples=2)
    assert found.compared == 2 * 6
    assert [line.partition(":")[0] for line in found.differences] == ([] if outputs.startswith("rows") else ["vt at 3000, row 1 outputs"])


def test_parts_without_their_files_are_left_out_and_nothing_at_all_is_an_error(tmp_path, capsys):
    write(tmp_path, "infbench-2024-06/compute_scores.py", SCORER.format(change=""))
    assert official_code.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (
        "∞Bench 2024-06: 480 compared, 0 differ" in said and "longbench: left out, longbench/metrics.py, longbench/eval.py not in" in said
    )
    assert "infbench-2024-06/compute_scores.py OpenBMB/InfiniteBench@88b3daa6989d sha256 " in said
    write(tmp_path, "infbench-2024-06/compute_scores.py", SCORER.format(change="return 0.5"))
    assert official_code.main([str(tmp_path)]) == 1
    assert "  passkey, " in capsys.readouterr().out
    assert official_code.main([str(tmp_path / "nothing")]) == 1


def test_code_is_fetched_at_fixed_commits_into_the_data_folder(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path))
    monkeypatch.setattr(official_code, "fetch", lambda file, root: fetched.append((file.url, root / file.suite / file.name)))
    monkeypatch.setattr(official_code, "PARTS", ())
    assert official_code.main([]) == 1
    assert len(fetched) == len({url for url, _ in fetched}) == len({path for _, path in fetched}) == len(official_code.FILES)
    assert all(url.startswith("https://raw.githubusercontent.com/") for url, _ in fetched)
    url, path = fetched[0]
    assert url.endswith("/OpenBMB/InfiniteBench/88b3daa6989da2fbe0077170d7a3c84c25d5ae58/src/compute_scores.py")
    assert path == tmp_path / "official" / "infbench-2024-06" / "compute_scores.py"


def test_what_cannot_be_fetched_is_said_with_the_command(tmp_path, monkeypatch):
    from hipexp.suites.data import registry

    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path))
    monkeypatch.setitem(registry.HOSTS, "github", "http://127.0.0.1:9/{path}")
    with pytest.raises(DataMissing, match=r"official needs infbench-2024-06/compute_scores.py .*; run: make check-official"):
        official_code.main([])


def test_what_is_the_same():
    def same(ours, theirs, within=1e-9):
        return official_code.same(ours, theirs, within)

    assert same(0.1 + 0.2, 0.3) and not same(0.3, 0.30001)
    assert same(35.88, 35.87, official_code.HUNDREDTH) and not same(35.89, 35.87, official_code.HUNDREDTH)
    assert same(None, float("nan")) and not same(0.0, float("nan"))
    assert same("A", "A") and not same(None, "A") and same(None, None)


def test_every_part_has_files_and_every_file_a_part():
    starts = tuple(start for start, _ in official_code.PARTS)
    assert all(file.name.startswith(starts) for file in official_code.FILES)
    assert all(any(file.name.startswith(start) for file in official_code.FILES) for start in starts)


def test_templates_and_settings_are_pinned_as_for_runs():
    """Files that runs read as data are the same revision here."""
    revision = {file.name: file.source.revision for file in official_code.FILES}
    for name, path in (("constants.py", "scripts/data/synthetic/constants.py"), ("synthetic.yaml", "scripts/synthetic.yaml")):
        assert revision[f"ruler/{path}"] == file_named("ruler", name).source.revision


def test_the_makefile_calls_it():
    told = subprocess.run(["make", "-n", "check-official"], cwd=HERE.parents[1], capture_output=True, text=True, check=True).stdout
    assert "tests/suites/official_code.py" in told
