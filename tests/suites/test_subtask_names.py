"""The names of subtasks stand where each thing about them is said; they must be the same everywhere."""

from hipexp.suites import infbench, infbench_official, infbench_rows, longbench, ruler
from hipexp.suites.data import registry
from hipexp.suites.scoring import infbench as infbench_scores
from hipexp.suites.scoring import longbench as longbench_scores
from hipexp.suites.scoring import longbench2 as longbench2_scores
from hipexp.suites.scoring import ruler as ruler_scores


def test_of_infbench():
    names = set(registry.SUBTASKS["infbench"])
    assert names == set(infbench_scores.METRICS) == set(infbench_official.SUBTASKS) == set(infbench_official.MINFERENCE_NEW_TOK)
    assert names == {*infbench.SUBTASKS, *infbench.OFFICIAL_ONLY} and len(infbench.SUBTASKS) + len(infbench.OFFICIAL_ONLY) == 12
    assert set(infbench.KINDS) == set(infbench.SUBTASKS) < set(infbench_rows.MAKERS) < names
    assert names > {*infbench_scores.LETTERS, *infbench_official.USE_LM_EVAL, *registry.INFBENCH_SHA256}
    assert all(names >= set(listed) for listed in infbench_scores.LISTS.values())
    assert set(infbench_official.TEMPLATES) < set(infbench_official.PROTOCOLS) == set(infbench_official.NOTES)


def test_of_longbench():
    names = set(longbench_scores.METRICS)
    assert registry.SUBTASKS["longbench"] == (*registry.LONGBENCH, *(f"{name}_e" for name in registry.LONGBENCH_E))
    assert names == set(registry.LONGBENCH) == {name for listed in longbench_scores.CATEGORIES.values() for name in listed}
    assert set(longbench_scores.IN_E) == set(registry.LONGBENCH_E) < names
    assert names > {*longbench.PLAIN, longbench.ONE_LINE, *longbench_scores.FIRST_LINE, *longbench_scores.CHINESE}
    assert set(longbench_scores.FUNCTIONS) | {"edit_similarity"} == set(longbench_scores.METRICS.values())
    assert registry.SUBTASKS["longbench2"] == (longbench2_scores.SUBTASK,)


def test_of_ruler():
    assert registry.SUBTASKS["ruler"] == ruler.SUBTASKS == tuple(ruler.TASKS)
    assert set(ruler.SUBTASKS) == set(ruler_scores.METRICS)
    assert set(registry.ESSAY_TASKS) == {name for name, task in ruler.TASKS.items() if "essays" in task.needs}
    for file in registry.FILES:
        if file.suite == "ruler" and file.subtasks and file.name in ("squad.json", "hotpotqa.json"):
            assert file.subtasks == tuple(name for name, task in ruler.TASKS.items() if file.name.removesuffix(".json") in task.needs)
