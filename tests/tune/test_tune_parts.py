"""The parts of ``tune`` that need neither Optuna nor a model: the space, objectives and fronts, what is hopeless."""

import dataclasses
import random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.config.check import check_experiment, check_layers
from hipexp.config.compose import compose
from hipexp.config.model import read_facts
from hipexp.config.overrides import conf_dir
from hipexp.config.schema import AttendRope, ConfigError, Rope
from hipexp.run.allocation import rules, yaml_of
from hipexp.run.budgets import divided
from hipexp.tune.objectives import OBJECTIVES, dominates, front, read_objectives
from hipexp.tune.recall import clearly_less
from hipexp.tune.search import hopeless
from hipexp.tune.space import read_space
from hipexp.tune.study import Point, mend

SPACE = read_space(None)
BASE = compose(["task=infbench"])
FACTS = read_facts(BASE.model)


def obeys(pipeline) -> bool:
    made = dataclasses.replace(BASE, pipeline=pipeline)
    try:
        check_experiment(made)
        check_layers(made, FACTS)
    except ConfigError:
        return False
    return True


def drawn(seed: int, divisor: int = 2):
    rng = random.Random(seed)
    return SPACE.draw(lambda name, options: rng.choice(options), divisor)


def test_most_draws_obey_the_rules():
    valid = [obeys(drawn(seed)) for seed in range(300)]
    assert sum(valid) > 0.65 * len(valid)


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3, 4, 8, 32]))
def test_what_is_drawn_can_be_divided(seed, divisor):
    """Otherwise it could not be judged on prompts of the trained length."""
    pipeline = drawn(seed, divisor)
    for stage, less in zip(pipeline.stages, divided(pipeline, divisor).stages, strict=True):
        assert less.keep_tok * divisor == stage.keep_tok >= stage.chunk_tok * divisor


@settings(max_examples=12)
@given(st.integers(0, 2**32))
def test_a_file_of_what_is_drawn_is_what_was_drawn(tmp_path_factory, seed):
    pipeline = drawn(seed)
    if not obeys(pipeline):
        return
    path = tmp_path_factory.mktemp("made") / "t0001.yaml"
    path.write_text(yaml_of(pipeline, ["a comment"]))
    assert rules(compose([f"+pipeline='{path}'", "task=infbench"]).pipeline, 5) == rules(pipeline, 5)


def test_every_value_of_the_space_is_drawn():
    seen: dict[str, set] = {}

    def pick(name, options):
        value = rng.choice(options)
        seen.setdefault(name, set()).add(value)
        return value

    rng = random.Random(0)
    for _ in range(2000):
        SPACE.draw(pick)
    assert seen["stages"] == set(SPACE.stages)
    assert seen["last.keep_tok"] == set(SPACE.last.keep_tok)
    assert seen["front2.representative"] == set(SPACE.front.representative)
    assert {name.split(".")[0] for name in seen} == {*(name.split(".")[0] for name, _ in SPACE.lines())} - {"front"} | {"front1", "front2"}


def test_the_size_of_a_space_is_the_number_of_its_draws(tmp_path):
    """Counted one by one, on a space small enough for that."""
    made = yaml.safe_load((conf_dir() / "tune" / "default.yaml").read_text())
    few = {name: values[:1] for name, values in made.items() if isinstance(values, list)}
    few |= {"stages": [1, 2], "early_layers": [0, 1], "early_rope": ["relative", "none"], "heads": ["shared", "per_kv"]}
    few |= {part: {name: values[:1] for name, values in made[part].items()} for part in ("last", "front")}
    few["last"]["keep_tok"], few["front"]["chunk_times"] = [128, 256], [2, 4]
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(few))
    space, found = read_space(path), set()
    for seed in range(3000):
        rng = random.Random(seed)
        found.add(repr(space.draw(lambda name, options, rng=rng: rng.choice(options))))
    assert len(found) == space.size == 2 * 3 * (2 + 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"windows": [1]}, "windows is unknown"),
        ({"heads": ["both"]}, "heads=both is unknown"),
        ({"sink_tok": []}, "must be a list of one value or more"),
        ({"sink_tok": [64, 64]}, "names a value twice"),
        ({"stages": [0, 1]}, "must hold whole numbers from 1, and 0 is none"),
        ({"staggered_refresh": [1]}, "must hold true or false, and 1 is none"),
        ({"last": {"chunk_tok": [8]}}, "last.keep_tok is missing"),
    ],
)
def test_a_space_that_is_none_is_refused(tmp_path, change, words):
    made = yaml.safe_load((conf_dir() / "tune" / "default.yaml").read_text()) | change
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(made))
    with pytest.raises(ConfigError) as caught:
        read_space(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_beats(points):
    """Against the definition, written another way: turned so that more is better, everything else is worse somewhere or equal."""
    objectives = [OBJECTIVES["score"], OBJECTIVES["bytes"], OBJECTIVES["recall"]]
    turned = [(a, -b, c) for a, b, c in points]
    expected = [
        i for i, one in enumerate(turned) if all(other == one or any(x < y for x, y in zip(other, one, strict=True)) for other in turned)
    ]
    assert front(points, objectives) == expected


def test_directions_are_known_by_name():
    score_bytes = read_objectives("[score,bytes]")
    assert [one.direction for one in score_bytes] == ["maximize", "minimize"]
    assert dominates([50, 1e6], [50, 2e6], score_bytes) and not dominates([50, 1e6], [50, 1e6], score_bytes)
    assert not dominates([60, 2e6], [50, 1e6], score_bytes)


@pytest.mark.parametrize(
    ("text", "words"), [("[score,byte]", "did you mean bytes?"), ("[]", "objective='' is unknown"), ("score,score", "names one twice")]
)
def test_objectives_that_are_none_are_refused(text, words):
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        read_objectives(text)


def test_clearly_less_is_more_than_chance():
    assert clearly_less([0.5, 0.6, 0.7], [0.55, 0.66, 0.74], 0.02)
    assert not clearly_less([0.5, 0.6, 0.7], [0.51, 0.61, 0.71], 0.02), "within the margin"
    assert not clearly_less([0.5, 0.6, 0.7], [0.9, 0.5, 0.6], 0.02), "three blocks that disagree tell nothing"


def known(number, recall, read, score=None, attend=AttendRope.streaming):
    pipeline = dataclasses.replace(drawn(number), rope=Rope(attend=attend))
    scores, kind = ({}, "recall") if score is None else ({"0": [score] * 4}, "measured")
    return Point(number, pipeline, bytes=read, recall=[recall, recall + 0.1], scores=scores, kind=kind)


SCORE_BYTES = read_objectives("[score,bytes]")


def test_a_point_that_holds_less_for_as_much_is_hopeless():
    point = known(9, 0.5, 2e6)
    assert hopeless(point, [known(1, 0.6, 1e6)], SCORE_BYTES)[0] == "recall"
    assert hopeless(point, [known(1, 0.6, 2e6)], SCORE_BYTES) is not None
    assert hopeless(point, [known(1, 0.6, 3e6), known(2, 0.51, 1e6)], SCORE_BYTES) is None
    assert hopeless(point, [known(1, 0.6, 1e6, attend=AttendRope.infllm)], SCORE_BYTES) is None, "recall does not see positions"


@pytest.mark.parametrize("text", ["[score,prefill_ms]", "[score,bytes,decode_ms]", "[score]"])
def test_bytes_make_no_point_hopeless_where_others_are_what_counts(text):
    """What reads more may still be the quicker one."""
    assert hopeless(known(9, 0.5, 2e6), [known(1, 0.6, 1e6)], read_objectives(text)) is None


def test_attended_bytes_are_compared_where_they_count():
    point, other = known(9, 0.5, 2e6), known(1, 0.6, 3e6)
    point.attended_bytes, other.attended_bytes = 2e5, 1e5
    assert hopeless(point, [other], read_objectives("[score,attended_bytes]"))[0] == "recall"
    assert hopeless(point, [other], read_objectives("[score,bytes,attended_bytes]")) is None


def test_a_point_that_holds_less_than_one_without_an_answer_is_hopeless():
    point = known(9, 0.5, 2e6)
    for objectives in (SCORE_BYTES, read_objectives("[score,prefill_ms]")):
        assert "point 1 has 0.650 and answered nothing" in hopeless(point, [known(1, 0.6, 3e6, score=0.0)], objectives)[1]
        assert hopeless(point, [known(1, 0.6, 3e6, score=25.0)], objectives) is None
    assert hopeless(point, [known(1, 0.6, 3e6, score=0.0, attend=AttendRope.infllm)], SCORE_BYTES) is None, "positions may be why"


def test_a_torn_line_of_a_journal_goes(tmp_path):
    path = tmp_path / "journal.log"
    for data, left in ((b"", b""), (b'{"a":1}\n', b'{"a":1}\n'), (b'{"a":1}\n{"b"', b'{"a":1}\n'), (b'{"b"', b"")):
        path.write_bytes(data)
        mend(path)
        assert path.read_bytes() == left
