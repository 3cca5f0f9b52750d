import json

import pytest

from hipexp.config.schema import ConfigError
from hipexp.run.score import main

ROWS = [
    {"subtask": "code_debug", "prediction": "B", "references": ["run", "B"]},
    {"subtask": "passkey", "prediction": "It is 71432\u2028.", "references": ["71432"]},
    {"subtask": "math_calc", "prediction": "[1, 3]", "references": [3]},
]


@pytest.fixture
def predictions(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n", encoding="utf-8")
    return path


def scored(capsys, *words):
    assert main(list(map(str, words))) == 0
    return json.loads(capsys.readouterr().out)


def test_scores_are_printed_as_json(capsys, predictions):
    found = scored(capsys, "infbench", predictions)
    assert (found["suite"], found["edition"]) == ("infbench", "2024-06")
    assert {name: entry["score"] for name, entry in found["scores"].items()} == {"code_debug": 0.0, "passkey": 100.0, "math_calc": 0.0}
    assert scored(capsys, "infbench", predictions, "--json") == found


def test_edition_and_flag_reach_the_scorer(capsys, predictions):
    found = scored(capsys, "infbench", predictions, "edition=2024-08", "drop_first_number=true")
    assert {name: entry["score"] for name, entry in found["scores"].items()} == {"code_debug": 100.0, "passkey": 100.0, "math_calc": 100.0}
    assert scored(capsys, "infbench", predictions, "drop_first_number=false") == scored(capsys, "infbench", predictions)


def test_the_other_suites_are_there(capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"subtask": "vt@4096", "prediction": "ABC", "references": ["ABC", "DEF"]}')
    assert scored(capsys, "ruler", path)["averages"] == {"1_of_13_tasks@4096": 50.0}
    path.write_text('{"subtask": "lcc", "prediction": "\u4e00", "references": ["\u4e00"]}', encoding="utf-8")
    assert scored(capsys, "longbench", path)["scores"]["lcc"]["score"] == 100.0
    row = {"subtask": "longbench2", "prediction": "The correct answer is (A)", "references": ["A"], "difficulty": "hard", "length": "long"}
    path.write_text(json.dumps(row))
    assert scored(capsys, "longbench2", path)["scores"]["hard"]["score"] == 100.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"subtask": "passkey"', "line 2: not valid JSON"),
        (b"[1]", "line 2: must be a JSON object, not list"),
        (b'{"subtask": "passkey", "prediction": "\xff", "references": ["1"]}', "line 2: byte 38 is not UTF-8"),
        (b'{"subtask": "math_find", "prediction": "1", "references": [NaN]}', "line 2: .*NaN is no number of JSON"),
        (b'{"subtask": "math_find", "prediction": "1", "references": [1e999]}', "line 2: references holds inf"),
        (b'{"subtask": "passkey", "prediction": "1", "references": []}', "line 2: references is empty"),
        (b"[" * 100_000, "line 2: not valid JSON"),
    ],
)
def test_broken_lines_are_named_and_nothing_is_printed(capsys, predictions, line, message):
    first = predictions.read_bytes().split(b"\n")[0]
    predictions.write_bytes(first + b"\n" + line + b"\n")
    with pytest.raises(ConfigError, match=rf"{predictions.name}, {message}"):
        main(["infbench", str(predictions)])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs a suite and a file"),
        (["infbench"], "needs a suite and a file"),
        (["infbench", "{file}", "more.jsonl"], "takes no 'more.jsonl'"),
        (["infbench", "{file}", "sample=3"], "takes no 'sample=3'"),
        (["infbench", "{file}", "--quick"], "takes no '--quick'"),
        (["infbench", "{file}", "edition=2025"], "use 2024-06 or 2024-08"),
        (["infbench", "{file}", "drop_first_number=yes"], "must be true or false"),
        (["babilong", "{file}"], "use one of infbench"),
        (["infbench", "{file}.gz"], "cannot read .*No such file"),
        (["infbench", "."], "cannot read"),
    ],
)
def test_wrong_words_are_refused(predictions, words, message):
    with pytest.raises(ConfigError, match=message):
        main([word.format(file=predictions) for word in words])


def test_an_empty_file_has_no_score(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no rows to score"):
        main(["infbench", str(path)])
