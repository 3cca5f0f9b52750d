import pytest

from hipexp.config.schema import ConfigError
from hipexp.suites.scoring import SUITES, sample_scores, score_rows
from hipexp.suites.scoring.statistics import paired_difference


def row(subtask="passkey", prediction="71432", references=("71432",), **more):
    return {"subtask": subtask, "prediction": prediction, "references": list(references), **more}


def test_every_subtask_gets_metric_score_n_and_interval():
    rows = [row(), row(prediction="1"), row("kv_retrieval", "a b", ["b"]), row(), row()]
    scored = score_rows("infbench", rows)
    assert (scored["suite"], scored["edition"], scored["averages"]) == ("infbench", "2024-06", {})
    assert "88b3daa" in scored["scorer"] and "hipexp-2" in scored["scorer"]
    passkey = dict(scored["scores"]["passkey"])
    low, high = passkey.pop("interval")
    assert passkey == {"metric": "first_number", "score": 75.0, "n": 4}
    assert 0 <= low < 75 < high <= 100
    assert scored["scores"]["kv_retrieval"] == {"metric": "value_among_words", "score": 100.0, "n": 1, "interval": None}
    assert score_rows("infbench", rows) == scored


def test_rows_made_of_stand_ins_are_no_official_score():
    plain = {"subtask": "vt", "prediction": "AAAAA", "references": ["AAAAA"]}
    assert "stand_ins" not in score_rows("ruler", [plain])
    scored = score_rows("ruler", [plain, plain | {"stand_ins": ["PaulGrahamEssays.json"]}])
    assert scored["scores"]["vt"]["score"] == 100
    assert scored["stand_ins"] == "no official score: the text of some rows comes from PaulGrahamEssays.json, made by hipexp"
    assert "own_data" not in scored
    scored = score_rows("ruler", [plain | {"own_data": ["squad.json", "hotpotqa.json"]}, plain | {"own_data": ["squad.json"]}])
    told = "no official score: the text of some rows comes from hotpotqa.json, squad.json, not known to be the published data"
    assert scored["own_data"] == told and "stand_ins" not in scored


@pytest.mark.parametrize("key", ["stand_ins", "own_data"])
@pytest.mark.parametrize("value", [True, 1, None, [1, "a"], [["x"]], "squad.json", {"squad.json": 1}])
def test_sources_of_rows_are_lists_of_texts(key, value):
    plain = {"subtask": "vt", "prediction": "AAAAA", "references": ["AAAAA"]}
    with pytest.raises(ConfigError, match=rf"^out.jsonl, line 7: {key} must be a list of texts, not .*; leave it out"):
        score_rows("ruler", [plain, plain | {key: value, "file": "out.jsonl", "line": 7}])
    assert key not in score_rows("ruler", [plain | {key: []}])


def test_single_scores_keep_the_order_of_rows_for_pairs():
    ours = sample_scores("infbench", [row(), row(prediction="1"), row()])
    theirs = sample_scores("infbench", [row(prediction="1"), row(prediction="1"), row()])
    assert ours == {"passkey": [100.0, 0.0, 100.0]}
    assert paired_difference(ours["passkey"], theirs["passkey"])["mean"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prediction": "x", "references": ["x"]}, "has no subtask"),
        ({"subtask": "vt", "references": ["x"]}, "has no prediction"),
        ({"subtask": "vt", "prediction": "x"}, "has no references"),
        ({"subtask": "vt", "prediction": None, "references": ["x"]}, "prediction must be a text, not None"),
        ({"subtask": 3, "prediction": "x", "references": ["x"]}, "subtask must be a text, not 3"),
        ({"subtask": "vt", "prediction": "x", "references": "x"}, "references must be a list, not 'x'"),
        ({"subtask": "vt", "prediction": "x", "references": []}, "references is empty"),
        ({"subtask": "nonsense", "prediction": "x", "references": ["x"]}, "subtask='nonsense'"),
        (["vt"], "must be an object"),
    ],
)
def test_bad_rows_are_named_and_nothing_is_scored(suite, bad, message):
    with pytest.raises(ConfigError, match=message) as error:
        score_rows(suite, [bad])
    assert str(error.value).startswith("rows, line 1: ")
    if isinstance(bad, dict):
        with pytest.raises(ConfigError, match=r"^out.jsonl, line 7: .*" + message):
            score_rows(suite, [bad | {"file": "out.jsonl", "line": 7}])


def test_a_bad_row_behind_good_ones_is_found_before_scoring():
    with pytest.raises(ConfigError, match="rows, line 3: references is empty"):
        score_rows("infbench", [row(), row(), row(references=())])


def test_a_sample_is_not_counted_twice():
    with pytest.raises(ConfigError, match="line 3: sample 0 of passkey is there already, in rows, line 1"):
        score_rows("infbench", [row(sample=0), row(sample=1), row(sample=0)])
    rows = [row("vt", sample=0, length=4096), row("vt", sample=0, length=8192), row("cwe", sample=0, length=4096)]
    assert len(score_rows("ruler", rows)["scores"]) == 3


def test_no_rows_give_no_scores():
    with pytest.raises(ConfigError, match="no rows to score"):
        score_rows("infbench", [])


def test_unknown_suites_editions_and_flags_are_refused():
    with pytest.raises(ConfigError, match="use one of infbench, longbench, longbench2, ruler"):
        score_rows("babilong", [row()])
    with pytest.raises(ConfigError, match="edition='2023' is no edition of the scorer of infbench; use 2024-06 or 2024-08 or minference"):
        score_rows("infbench", [row()], "2023")
    with pytest.raises(ConfigError, match="of ruler; use 2026-07"):
        score_rows("ruler", [row("vt")], "2024-06")
    with pytest.raises(ConfigError, match="not of ruler"):
        score_rows("ruler", [row("vt")], drop_first_number=True)
