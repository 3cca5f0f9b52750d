"""Runs official code in a process of its own.

``official_child.py <kind> <folder> <answers file>``: scores; rows as JSON on standard input. ``official_child.py <script> ...``: a generator.
What the files import and the comparison does not need is replaced by a stand-in: ``args`` (a command line), ``evaluate`` (its Rouge is
``rouge_score`` without stems, best reference of several), ``fuzzywuzzy`` (``difflib``, as it is without python-Levenshtein) and
``tenacity`` (for tokenizers behind a network).
"""

import ast
import importlib
import json
import runpy
import sys
import types
from difflib import SequenceMatcher
from pathlib import Path


def stand_in(name, **content):
    """A module that holds ``content`` alone."""
    sys.modules[name] = module = types.ModuleType(name)
    vars(module).update(content)


class Rouge:
    """The Rouge of ``evaluate`` for one prediction."""

    def compute(self, predictions, references, use_aggregator):
        from rouge_score.rouge_scorer import RougeScorer

        assert not use_aggregator and len(predictions) == 1
        scorer = RougeScorer(["rougeLsum"], use_stemmer=False)
        labels = references[0] if isinstance(references[0], list) else references
        return {"rougeLsum": [scorer.score_multi(labels, predictions[0])["rougeLsum"].fmeasure]}


def ratio(first, second):
    """``fuzzywuzzy.fuzz.ratio``."""
    if first == second:
        return 100
    return round(100 * SequenceMatcher(None, first, second).ratio()) if first and second else 0


def functions(path, *names):
    """Functions of a file that cannot be imported as a whole; they may use ``re`` and ``string``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    found = {"re": importlib.import_module("re"), "string": importlib.import_module("string")}
    exec(compile(tree, str(path), "exec"), found)
    return [found[name] for name in names]


def infbench(folder, rows):
    """Scores 0 to 1."""
    stand_in("args", parse_args=None)
    stand_in("evaluate", load=lambda _: Rouge())
    score = importlib.import_module("compute_scores").get_score_one
    return [tried(score, row["prediction"], row["label"], row["subtask"], "") for row in rows]


def longbench(folder, rows):
    """Scores 0 to 100 of single rows; of lists of rows with ``lengths`` by bucket."""
    stand_in("fuzzywuzzy", fuzz=types.SimpleNamespace(ratio=ratio))
    module = importlib.import_module("eval")

    def score(row):
        told = row["subtask"], row["predictions"], row["answers"]
        if "lengths" in row:
            return {name: float(value) for name, value in module.scorer_e(*told, row["lengths"], row["all_classes"]).items()}
        return module.scorer(*told, row["all_classes"])

    return [tried(score, row) for row in rows]


def longbench2(folder, rows):
    """Letters."""
    (answer,) = functions(folder / "pred.py", "extract_answer")
    return [tried(answer, row["prediction"].strip()) for row in rows]


def ruler(folder, rows):
    """Scores 0 to 100."""
    (clean,) = functions(folder / "scripts/eval/evaluate.py", "postprocess_pred")
    sys.path.insert(0, str(folder / "scripts/eval/synthetic"))
    tasks = importlib.import_module("constants").TASKS

    def score(row):
        return tasks[row["task"]]["metric_fn"]([clean(one, {}) for one in row["predictions"]], row["references"])

    return [tried(score, row) for row in rows]


def tried(function, *arguments):
    """What a call gives, or the error that it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(kind, folder, answers):
    """Score rows."""
    sys.path.insert(0, folder)
    Path(answers).write_text(json.dumps(globals()[kind](Path(folder), json.load(sys.stdin))))


def generate(*command):
    """Run a generator as if it had been called.

    It seeds before it loads its tokenizer, and what transformers imports then draws numbers in some versions: so that comes first.
    """
    nothing = dict.fromkeys(("stop_after_attempt", "wait_fixed", "wait_random"), lambda *_: 0)
    stand_in("tenacity", retry=lambda **_: lambda function: function, **nothing)
    path = next(word.partition("=")[2] for word in command if word.startswith("--tokenizer_path="))
    importlib.import_module("transformers").AutoTokenizer.from_pretrained(path)
    sys.argv, sys.path[0] = list(command), str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    (generate if sys.argv[1].endswith(".py") else main)(*sys.argv[1:])
