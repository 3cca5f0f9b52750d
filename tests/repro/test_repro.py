import csv
import io
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hipexp import cli
from hipexp.config.schema import ConfigError
from hipexp.repro import command, estimate, record, settings
from hipexp.repro.data import FULL, NEEDLE, QUICK, Cells, Claim, Published, Row, known, mistakes, read
from hipexp.repro.needs import plan_of, plan_text
from hipexp.repro.orderings import FAILS, HOLDS, Verdict
from hipexp.repro.page import Page, cell_table, differences, file_name, verdict_of
from hipexp.repro.points import cells, lines, points_of, stand_ins
from hipexp.repro.values import Value, derived
from hipexp.run.ledger import runs_root

TABLES = [f"table{number}" for number in range(1, 13)]
FIGURES = ["figure3", "figure4", "figure6a", "figure6b"]


@pytest.fixture
def overrides(fake, model_folder):
    return [f"model.path={model_folder}"]


def published(table, metric="", model=None):
    """Its numbers, by line and column."""
    return {
        (row.model, row.name, row.metric): {
            column: number for column, number in zip(table.columns, row.published, strict=True) if isinstance(number, int | float)
        }
        for row in table.rows
        if row.metric == metric or not metric
    }


def test_every_table_and_figure_is_there_and_contradicts_nothing():
    assert known() == [*TABLES, *FIGURES, "appendixF"]
    for name in known():
        table = read(name)
        assert list(mistakes(table)) == []
        if name != "appendixF":
            assert {NEEDLE, FULL} <= table.sizes.keys()
            assert table.orderings and table.protocol
            assert "embedded model trained" not in str(table)  # what holds of the model is told where it was run
            assert (QUICK in table.sizes) == (name in ("table2", "table4", "table6", "table8"))


def test_the_documented_number_of_orderings_is_how_many_there_are():
    many = sum(len(read(name).orderings) for name in known() if name != "figure4")
    assert f"There are {many} orderings" in (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "within"), [("table1", 0.075), ("table2", 0.021), ("table5", 0.0101), ("table8", 0.0101)])
def test_printed_means_are_those_of_the_printed_numbers(name, within):
    table = read(name)
    numbers = published(table)
    inputs = {line: {c: x for c, x in own.items() if c not in table.derived} for line, own in numbers.items()}
    computed = derived(table, inputs)
    checked = 0
    for line, own in numbers.items():
        for column in table.derived:
            if column in own and line[1] != "mean":
                assert computed[line][column] == pytest.approx(own[column], abs=within), (line, column)
                checked += 1
    assert checked >= len(table.derived) * 4


def test_both_ruler_tables_have_the_same_means():
    by_length, by_task = (published(read(name)) for name in ("table8", "table9"))
    for line, own in by_length.items():
        assert sum(by_task[line].values()) / 13 == pytest.approx(own["avg"], abs=0.05)


def test_the_columns_of_table_5_have_the_printed_means():
    table = read("table5")
    numbers = published(table)
    for column in table.columns[:3]:
        own = [numbers["", row.name, ""][column] for row in table.rows if row.name != "mean"]
        assert sum(own) / 4 == pytest.approx(numbers["", "mean", ""][column], abs=0.0051)


def test_headline_claims_follow_from_the_tables():
    decode, prefill = (published(read("table3"), metric) for metric in ("decode µs", "prefill ms"))
    dense, ours, extended = (
        decode["", name, "decode µs"]["T=1024K"] for name in ("FA2 (1M window)", "InfiniteHiP 3K", "InfiniteHiP 3K + extend")
    )
    assert (round(dense / ours, 2), round(dense / extended, 2)) == (19.85, 18.96)
    assert (
        round(prefill["", "FA2 (1M window)", "prefill ms"]["T=1024K"] / prefill["", "InfiniteHiP 3K", "prefill ms"]["T=1024K"], 2) == 20.29
    )
    speeds = published(read("table11"), "tokens/s")
    assert (
        round(
            speeds["", "InfiniteHiP 3K-flash (offload)", "tokens/s"]["1024K"]
            / speeds["", "SGLang runtime (estimated)", "tokens/s"]["1024K"],
            2,
        )
        == 3.21
    )
    runtime = published(read("table4"), "runtime µs")
    parts = published(read("table4"), "total µs")
    shares = {"nothing": 1, "stage 1": 1, "stages 1 and 2": 2, "everything": 28}  # of 32 steps of 3K-fast
    for column, number in runtime["", "InfiniteHiP 3K-fast", "runtime µs"].items():
        mean = sum(n * parts["", f"InfiniteHiP, {what} cached", "total µs"][column] for what, n in shares.items()) / 32
        assert mean == pytest.approx(number, abs=0.6)


def test_single_numbers_are_those_of_the_paper():
    table = read("table2")
    numbers = published(table)
    llama, mistral = "Llama-3-8B-Instruct", "Mistral-7B-Instruct-v0.2"
    assert [numbers[llama, "InfiniteHiP 3K", ""][c] for c in table.columns[:3]] == [99.83, 97.46, 9.6]
    assert [numbers[mistral, "InfLLM", ""][c] for c in table.columns[:3]] == [100, 96.1, 96.8]
    assert [row.published for row in read("table6").rows] == [[68.55], [74.23]]
    assert [row.published for row in read("figure6b").rows] == [[67.25], [70.31], [74.24]]
    assert next(row for row in read("figure3").rows if row.name == "InfiniteHiP").published[-1] == 63.8
    gemma = [row for row in read("table10").rows if row.model == "Gemma-2-9B" and row.metric == "En.MC acc"]
    assert [row.published for row in gemma] == [
        [42.36, 48.03, "OOL", "OOL", None, None, None, None],
        [37.55, 45.85, 55.46, 59.83, 61.57, 71.62, 73.8, 72.49],
    ]


def test_presets_have_the_printed_hyperparameters():
    found = settings.compared(read("appendixF"))
    assert len(found.rows) == 29
    assert {row[-1] for row in found.rows} == {settings.SAME}
    changed = read("appendixF")
    changed.settings[0].value = 128
    assert [row[-1] for row in settings.compared(changed).rows].count(settings.DIFFERS) == 1


def test_one_model_stands_beside_all_published_ones_or_each_is_run():
    table = read("table10")
    assert len(lines(table, table.sizes[NEEDLE])) == 8
    assert len(lines(table, table.sizes[FULL])) == 24
    found = cells(read("table6"), FULL, [])
    assert {cell.point.experiment.model.name for cell in found} == {"llama31_8b"}


def test_lengths_are_multiples_of_the_trained_length(overrides):
    found = cells(read("figure6b"), NEEDLE, overrides)
    assert {cell.run: cell.point.experiment.task.length_tok for cell in found} == {"2×": 1024, "4×": 2048}
    assert {cell.line[1]: cell.point.experiment.task.truncate_tok for cell in found}["FA2 (128K)"] == 512
    assert len(points_of(found)) == len(found) == 6
    assert len(points_of(cells(read("table6"), QUICK, overrides))) == 2


def test_a_row_of_a_table_wins_over_the_rest_at_full_size():
    found = cells(read("table2"), FULL, [])
    windows = {cell.line[0]: cell.point.experiment.pipeline.window_tok for cell in found if cell.line[1] == "StreamingLLM"}
    assert windows == {"Llama-3-8B-Instruct": 7936, "Mistral-7B-Instruct-v0.2": 32512}
    assert {cell.point.experiment.task.protocol for cell in found} == {"infllm"}


@pytest.mark.slow
def test_a_table_stands_beside_ours(overrides, fake, capsys):
    words = ["table2", "size=needle", "task.samples=1", *overrides]
    assert command.main(words) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("InfiniteHiP 3K ") and "R.KV" in line)
    assert line.split() == ["InfiniteHiP", "3K", "R.KV", "9.6", "60.8", "100.0", "100.0"]
    assert "values: NOT compared at this size" in text and "not comparable: model:" in text
    assert "samples of each subtask: 1" in text
    root, name = runs_root() / "repro", file_name("table2", NEEDLE, words[2:])
    assert name == file_name("table2", NEEDLE, words[:1:-1]) != file_name("table2", NEEDLE, overrides) != "table2_needle"
    assert text.splitlines()[-1] == str(root / f"{name}.html")
    page = (root / f"{name}.html").read_text()
    assert f"repro table2 size=needle task.samples=1 {overrides[0]}" in page
    assert "not a language model of 7B to 14B" in page and "96.8" in page
    (header, *rows) = csv.reader(io.StringIO((root / f"{name}_cells.csv").read_text()))
    assert header == ["row", "column", "published: Llama-3-8B-Instruct", "published: Mistral-7B-Instruct-v0.2", "hipexp 2×", "hipexp 4×"]
    assert len(rows) == 33
    calls = fake.calls
    assert command.main(words) == 0
    assert fake.calls == calls


def test_a_figure_is_drawn(overrides, fake):
    assert command.main(["figure3", "size=needle", "task.samples=2", *overrides]) == 0
    page = runs_root() / "repro" / file_name("figure3", NEEDLE, ["task.samples=2", *overrides])
    for name in ("published", "ours"):
        assert page.with_name(f"{page.name}_{name}.png").stat().st_size > 10_000
        assert page.with_name(f"{page.name}_{name}.svg").exists()
    assert page.with_name(f"{page.name}.html").read_text().count("<figure") == 2


def test_pass_keys_are_told_by_depth(overrides, fake, capsys):
    assert command.main(["table7", "size=needle", *overrides]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("depth 40 to 20 %") and "T=488K" in line)
    assert line.split() == ["depth", "40", "to", "20", "%", "T=488K", "100", "100.0"]


def test_stand_ins_are_made_once_and_only_where_they_are_read(overrides, fake):
    command.make_stand_ins(points_of(cells(read("table6"), NEEDLE, overrides)))
    assert not stand_ins().exists()
    points = points_of(cells(read("table8"), NEEDLE, overrides))
    assert {point.experiment.task.data for point in points} == {str(stand_ins())}
    command.make_stand_ins(points)
    (first, *_) = files = [path for path in stand_ins().rglob("*") if path.is_file()]
    made = first.stat().st_mtime_ns
    command.make_stand_ins(points)
    assert len(files) > 3 and first.stat().st_mtime_ns == made


def test_what_is_stored_is_shown_without_running(overrides, fake, capsys):
    assert command.main(["table6", "size=needle", "stored=true", *overrides]) == 0
    assert fake.calls == 0
    assert "4 of 4 runs are not there yet" in capsys.readouterr().out


def test_an_ordering_that_does_not_hold_is_an_exit_code(overrides, monkeypatch, capsys):
    claim = read("table6").orderings[0]
    monkeypatch.setattr(command, "judge_all", lambda table, size, values, found: [Verdict(claim, "", FAILS, "as it happens")])
    assert command.main(["table6", "size=needle", "task.samples=1", *overrides]) == 1
    assert "orderings: 1 does not hold" in capsys.readouterr().out


@pytest.mark.slow
def test_all_goes_on_after_a_failure_and_writes_an_index(overrides, monkeypatch, capsys):
    monkeypatch.setattr(command, "known", lambda: ["table5", "table6", "appendixF"])
    real = command.reproduce

    def reproduce(table, asked, load):
        if table.id == "table5":
            raise ConfigError("no such thing")
        return real(table, asked, load)

    monkeypatch.setattr(command, "reproduce", reproduce)
    assert command.main(["all", "size=needle", "task.samples=1", *overrides]) == 1
    text = capsys.readouterr().out
    assert "bad_config: no such thing" in text and "all as printed" in text
    words = ["task.samples=1", *overrides]
    index = (runs_root() / "repro" / f"{file_name('index', NEEDLE, words)}.html").read_text()
    assert f'href="{file_name("table6", NEEDLE, words)}.html"' in index and "no such thing" in index
    assert text.splitlines()[-1].endswith(f"{file_name('index', NEEDLE, words)}.html")


def test_the_list_names_all_and_a_dry_run_says_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert command.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in known())
    told = plan_text(plan_of(read("table6"), FULL, []))
    assert "hf download meta-llama/Llama-3.1-8B-Instruct" in told and "longbook_choice_eng" in told
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path))
    told = plan_text(plan_of(read("table8"), FULL, []))
    assert f"- ruler: {tmp_path}/ruler/PaulGrahamEssays.json is missing" in told and "python -m hipexp data pull ruler" in told


@pytest.mark.parametrize(
    "words",
    [
        ["size=needle"],
        ["jobs=2"],
        ["table99"],
        ["../model/needle"],
        ["table2", "size=huge"],
        ["table1", "size=quick"],
        ["all", "size=quick"],
        ["appendixF", "size=nonsense"],
        ["table6", "size=needle", "size=full"],
        ["all", "size=needle", "task.samples=0"],
        ["figure6a", "size=needle", "seed=5"],
        ["table6", "size=needle", "jobs=1", "jobs=2"],
    ],
)
def test_repro_says_what_it_needs(overrides, words):
    with pytest.raises(ConfigError):
        command.main(words + overrides)


def test_full_size_is_refused_where_weights_are_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    monkeypatch.setattr("hipexp.run.identity.hub_config", lambda model: (_ for _ in ()).throw(missing(model)))
    assert cli.main(["repro", "table6"]) == 2
    assert "meta-llama/Llama-3.1-8B-Instruct is not here" in capsys.readouterr().err


def test_a_run_that_methods_share_is_named_after_all_of_them(overrides):
    names = [point.name for point in points_of(cells(read("table4"), NEEDLE, overrides))]
    assert names == ["FA2 and 3K-fast, T=256K", "3K-flash, T=256K", "FA2 and 3K-fast, T=512K", "3K-flash, T=512K"]


def test_a_full_page_is_of_real_models_and_compares_complete_runs():
    table = read("table6")
    values = {("", row.name, ""): 50 for row in table.rows}
    ours = {(line, "", "En.MC"): Value(number) for line, number in values.items()}

    def page(overrides):
        return Page(table, FULL, table.sizes[FULL], ours, [], (), overrides)

    assert "verdict" in cell_table(page([])).header and "verdict" not in cell_table(page(["task.samples=5"])).header
    assert ("values", "NOT compared with task.samples=5; the orderings are.") in differences(page(["task.samples=5"]))
    assert "verdict" not in cell_table(page(["model=needle"])).header and "verdict" in cell_table(page(["track.mode=offline"])).header
    assert not any("embedded" in line for _, line in differences(page([])))


def test_models_whose_code_is_not_run_are_quoted():
    table = read("table10")
    assert {cell.line[0] for cell in cells(table, FULL, [])} == {"Gemma-2-9B"}
    assert {cell.line[1] for cell in cells(table, NEEDLE, [])} == {"FA2", "InfiniteHiP"}
    assert {row.model for row in table.rows} == {"EXAONE-3.0-7.8B", "EXAONE-3.5-7.8B", "Gemma-2-9B"}


def test_tolerances_can_be_met():
    """Where the possible values of a score lie further apart than its tolerance reaches, no outcome could be within it."""
    table = read("table7")
    depths, samples = 5, cells(table, FULL, [])[0].point.experiment.task.samples
    for row in table.rows:
        of = samples * (depths if row.metric.startswith(("all", "dense")) else 1)
        allowed = table.tolerance.get(row.metric, table.tolerance.get("all"))
        for number in row.published if allowed else ():
            assert number is None or any(abs(100 * hits / of - number) <= allowed["points"] for hits in range(of + 1)), (row.name, number)
    assert "all depths" in table.tolerance and not any(read(name).tolerance for name in ("table4", "table11", "table12"))


def missing(model):
    from hipexp.suites.sample import DataMissing

    return DataMissing(f"model.path={model.path} is not here")


def test_mistakes_are_named():
    table = Published("t", "s", "u", "a", columns=["x"], rows=[Row("r", [1, 2]), Row("q", [1], method="none")])
    assert "; ".join(mistakes(table)) == "row  r  has 2 numbers under 1 columns; row q: method none is not among methods"


@pytest.mark.parametrize(
    ("column", "published", "ours", "verdict"),
    [
        ("En.MC", 50, 52, "within ±3: +2.0"),
        ("En.MC", 50, 40, "outside ±3: -10.0"),
        ("En.MC", "OOL", 40, "not compared"),
        ("En.MC", None, 40, "not compared"),
    ],
)
def test_a_cell_of_the_full_size_is_within_its_tolerance_or_not(column, published, ours, verdict):
    assert verdict_of(read("table6"), ("", "x", ""), column, published, [Value(ours)]) == verdict


def test_of_several_lengths_the_mean_is_compared_once_all_are_there():
    line = ("", "InfiniteHiP 3K", "")
    assert verdict_of(read("table9"), line, "NIAH_S1", 95.8, [Value(100.0), Value(90.0)]) == "within ±3: -0.8"
    assert verdict_of(read("table9"), line, "NIAH_S1", 95.8, [Value(100.0), None]) == "not compared"


def test_times_are_compared_in_percent():
    line = ("", "x", "decode µs")
    assert verdict_of(read("table3"), line, "T=32K", 100, [Value(120.0)]) == "within ±25 %: +20 %"
    assert verdict_of(read("table3"), line, "T=32K", 100, [Value(40.0)]) == "outside ±25 %: -60 %"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TABLES, *FIGURES])
@pytest.mark.parametrize("size", [NEEDLE, FULL])
def test_every_table_and_figure_says_what_it_would_run(name, size):
    told = plan_text(plan_of(read(name), size, [])).splitlines()
    assert told[0].startswith(f"{name}: ") and f"size={size}" in told[0]
    runs = [line for line in told if line.split()[:1] and line.split()[0].isdecimal()]
    assert len(runs) == len(points_of(cells(read(name), size, []))) > 0
    assert any("GPU hours" in line for line in told) == (size == FULL)


@pytest.mark.slow
def test_tables_2_4_6_and_8_run_in_five_minutes(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    began = time.process_time()  # of this process alone, whatever else the machine does
    for name in ("table2", "table4", "table6", "table8"):
        assert command.main([name, "size=quick"]) == 0
    assert time.process_time() - began < 300
    text = capsys.readouterr().out
    assert "not there yet" not in text
    counted = [line for line in text.splitlines() if line.startswith("orderings: ")]
    assert len(counted) == 4 and FAILS not in "".join(counted) and f"1 {HOLDS}" in counted[1]  # what is counted holds


def test_estimates_follow_the_formula():
    (point, *_) = points_of(cells(read("table6"), FULL, []))
    task = point.experiment.task
    assert list(estimate.prompts(point.experiment)) == [(229, 184_400)] and task.truncate_tok == 307_200
    assert estimate.attention_ms(131_072, "dense") == 97.7 and estimate.attention_ms(65_536, "dense") == 48.85
    assert estimate.attention_ms(2_097_152, "stages") == pytest.approx(69.2 + (69.2 - 48.8) * 2)
    one = estimate.prompt_s(32_768, "dense", estimate.USUAL)
    assert one == pytest.approx(2 * 8e9 * 32_768 / 4e14 + 32 * 97.7 / 4 / 1000)
    assert estimate.prompt_s(65_536, "dense", estimate.USUAL) == pytest.approx(2 * 8e9 * 65_536 / 4e14 + 32 * (97.7 / 4 + 97.7 / 2) / 1000)
    seconds = 229 * (estimate.prompt_s(184_400, "stages", estimate.USUAL) + 32 * 0.0070)
    assert estimate.hours(point.experiment) == pytest.approx(seconds / 3600)
    assert estimate.memory_gb(point.experiment) == pytest.approx((16e9 + 131_072 * 307_200) / 1e9), "a text as long as the cut"


@pytest.mark.slow
def test_what_did_not_fit_is_not_run_at_full_size_and_offload_needs_no_room():
    table = read("table11")
    by_name = {(cell.line[1], cell.column): cell.point for cell in cells(table, FULL, []) if cell.line[2] == "tokens/s"}
    assert {column for name, column in by_name if name == "SGLang runtime (FlashInfer)"} == {"64K", "96K", "128K", "192K"}

    def room(how, column):
        return estimate.memory_gb(by_name[f"InfiniteHiP 3K-fast{how}", column].experiment)

    assert room("", "192K") == room(" (offload)", "192K") == pytest.approx(16 + 131_072 * 196_608 / 1e9)  # dense is timed beside it
    assert room(" (offload)", "1024K") == pytest.approx(16 + 131_072 * 32_768 / 1e9)


def test_the_page_of_the_documentation_is_made_of_what_is_stored(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    monkeypatch.setattr(record, "known", lambda: ["table4", "table6", "appendixF"])
    with pytest.raises(ConfigError, match="run: make repro-all SIZE=needle"):
        record.text()
    with pytest.raises(ConfigError, match="takes the folder of the documentation"):
        record.main([str(tmp_path)])
    table, claim = read("table6"), Claim("a above | b", "1 to 0", Cells("a"), Cells("b"))
    values = {(("", row.name, ""), "2×", "En.MC"): Value(12.5, (0.0, 25.0)) for row in table.rows}
    made = Page(table, NEEDLE, table.sizes[NEEDLE], values, [Verdict(claim, "", "holds", "seen")])
    monkeypatch.setattr(record, "page_of", lambda table, asked, found: made if table.id == "table6" else replace(made, values={}))
    (tmp_path / "reproduce.md").touch()
    assert record.main([str(tmp_path)]) == 0
    text = (tmp_path / "reproduced.md").read_text()
    assert "| holds | a above \\| b | 1 to 0 | seen |" in text and "12.5 (0 to 25)" in text and "| as printed |" in text
    assert text.count("\n## ") == 2, "that table and the printed hyperparameters"
    assert capsys.readouterr().out.strip() == str(tmp_path / "reproduced.md")
