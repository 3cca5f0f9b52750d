import ast
import csv
import html
import json
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hipexp import cli
from hipexp.config.compose import compose, read_line
from hipexp.config.convert import to_plain
from hipexp.config.schema import ConfigError
from hipexp.report import command
from hipexp.report.export import latex_text
from hipexp.report.gather import gather
from hipexp.report.naming import command_of, name_runs
from hipexp.report.paired import differences, pairs_of
from hipexp.report.parts import Link, Mark, Table
from hipexp.report.svg import front_of
from hipexp.suites.scoring.statistics import mean_interval
from synthetic_runs import DENSE, PRUNED, passkeys, sample, write_all, write_many, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A runs folder with everything, its run folders by name, and the folder of its report."""
    root = tmp_path_factory.mktemp("reported") / "runs"
    made = write_all(root)
    assert command.main([f"runs={root}"]) == 0
    return root, made, root / "report"


def rows_of(path):
    """A CSV file as one dictionary for each row."""
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_run(path):
    return {row["run"]: row for row in rows_of(path)}


class Tags(HTMLParser):
    """Every element of a page: its name and attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_last_line_is_the_path(capsys, monkeypatch, tmp_path):
    root = tmp_path / "runs"
    write_run(root, DENSE, passkeys([100], 6144))
    monkeypatch.setenv("HIPEXP_RUNS", str(root))
    assert cli.main(["report", f"out={tmp_path / 'out'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"1 runs under {root}, 1 of them finished and counted, 0 not", str(tmp_path / "out" / "report.html")]
    assert Path(lines[-1]).is_file()


def test_scores_against_brute_force(reported):
    _, made, out = reported
    board = by_run(out / "tables" / "leaderboard.csv")
    assert set(board) == {folder.name for name, folder in made.items() if name not in ("failed", "stopped", "latency", "recall")}
    for name in ("3stage", "less", "offload"):
        for length in (6144, 12288):
            ours, dense = (
                {
                    (row["subtask"], row["sample"]): row["score"]
                    for row in map(json.loads, (made[who] / "samples.jsonl").read_text().splitlines())
                }
                for who in (f"{name} {length}", f"dense {length}")
            )
            steps = [ours[key] - dense[key] for key in ours]
            row = board[made[f"{name} {length}"].name]
            assert float(row["score"]) == statistics.fmean(ours.values())
            assert float(row["difference"]) == statistics.fmean(steps)
            assert [float(row["from (95 %)"]), float(row["to (95 %)"])] == mean_interval(steps)
            assert (int(row["flipped: better"]), int(row["flipped: worse"])) == (sum(s > 0 for s in steps), sum(s < 0 for s in steps))
            assert float(row["dense, same samples"]) == statistics.fmean(dense.values())
            assert row["pairs"] == row["samples"] == "4"


def test_subtasks_have_numbers_of_their_own(tmp_path):
    rng = random.Random(1)
    words = ["task=infbench", "task.subtasks=[passkey,kv_retrieval]", "task.samples=20"]

    def samples():
        return [sample(name, i, rng.choice([0, 50, 100]), 6144) for name in ("passkey", "kv_retrieval") for i in range(20)]

    dense, ours = samples(), samples()
    rng.shuffle(ours)  # pairs are found by their numbers, not by their place
    write_run(tmp_path, words, dense)
    folder = write_run(tmp_path, ["+pipeline=3stage", *words], ours)
    gathered = gather(tmp_path)
    number = next(i for i, run in enumerate(gathered.runs) if run.folder == folder)
    found = differences(pairs_of(gathered), "run", "subtask", "length_tok")
    for name in ("passkey", "kv_retrieval"):
        theirs = {row["sample"]: row["score"] for row in dense if row["subtask"] == name}
        steps = [row["score"] - theirs[row["sample"]] for row in ours if row["subtask"] == name]
        told = found[number, name, 6144]
        assert (told["n"], told["difference"]) == (20, pytest.approx(statistics.fmean(steps)))
        assert told["interval"] == pytest.approx(mean_interval(steps, least=-100))
        assert (told["better"], told["worse"]) == (sum(s > 0 for s in steps), sum(s < 0 for s in steps))


@pytest.mark.parametrize(
    "changed",
    [
        {"card": {"protocol": "official"}},
        {"card": {"template": {"passkey": "other words"}}},
        {"card": {"data": "other data"}},
        {"card": {"truncation": {"rule": "middle", "removed_tok": {}}}},
        {"card": {"model": {"revision": "other weights", "dtype": "float32", "trained_tok": 6144}}},
        {"more": ["seed=7"]},
        {"more": ["task.data=elsewhere", "task=ruler"], "words": ["task.samples=4"]},
    ],
    ids=str,
)
def test_other_protocols_are_never_paired(tmp_path, changed):
    words = changed.get("words", DENSE)
    write_run(tmp_path, [*words, "task.length_tok=6144"], passkeys([0, 0, 0, 0], 6144))
    write_run(
        tmp_path,
        ["+pipeline=3stage", *words, *changed.get("more", []), "task.length_tok=6144"],
        passkeys([100] * 4, 6144),
        card=changed.get("card"),
    )
    assert pairs_of(gather(tmp_path)) == []


def test_prompts_of_other_lengths_are_no_pair(tmp_path):
    write_run(tmp_path, DENSE, passkeys([0, 0], 6144))
    write_run(tmp_path, PRUNED, [row | {"context_tok": 99} for row in passkeys([100, 100], 6144)])
    assert pairs_of(gather(tmp_path)) == []


def test_of_several_dense_runs_every_sample_counts_once(tmp_path):
    write_run(tmp_path, DENSE, passkeys([0, 0, 0], 6144))
    write_run(tmp_path, DENSE, passkeys([0, 0, 100], 6144))
    write_run(tmp_path, PRUNED, passkeys([100, 100, 100], 6144))
    (told,) = differences(pairs_of(gather(tmp_path)), "run").values()
    assert told["n"] == 3


def test_what_failed_or_is_not_finished_is_in_no_number(reported):
    _, made, out = reported
    excluded = by_run(out / "tables" / "excluded.csv")
    assert {made["failed"].name, made["stopped"].name} == set(excluded)
    failed, stopped = excluded[made["failed"].name], excluded[made["stopped"].name]
    assert (failed["state"], failed["why"]) == ("failed: out_of_memory", "no memory left; try a shorter length")
    assert (stopped["state"], stopped["finished samples"]) == ("stopped", "2")
    assert "+pipeline=3stage" in stopped["command that continues it"] and "seed=3" in stopped["command that continues it"]
    for path in (out / "tables").glob("*.csv"):
        if path.name != "excluded.csv":
            assert made["failed"].name not in path.read_text() and made["stopped"].name not in path.read_text()


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda folder: (folder / "records.parquet").unlink(), "no records.parquet"),
        (lambda folder: (folder / "records.parquet").write_bytes(b"PAR1"), "cannot be read"),
        (lambda folder: (folder / "config.yaml").write_text("a: ["), "config.yaml is damaged"),
        (lambda folder: (folder / "summary.json").write_text("{"), "missing or damaged"),
    ],
)
def test_damaged_runs_do_not_count_and_say_why(tmp_path, break_it, reason):
    write_run(tmp_path, DENSE, passkeys([0, 0], 6144))
    broken = write_run(tmp_path, PRUNED, passkeys([100, 100], 6144))
    break_it(broken)
    (run,) = (run for run in gather(tmp_path).runs if run.problem)
    assert run.folder == broken and reason in run.problem
    assert command.main([f"runs={tmp_path}"]) == 0
    assert broken.name not in (tmp_path / "report" / "tables" / "leaderboard.csv").read_text()


def test_records_with_less_than_the_run_finished_are_not_scored(tmp_path):
    import pyarrow.parquet as pq

    path = write_run(tmp_path, DENSE, passkeys([0, 100], 6144)) / "records.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    (run,) = gather(tmp_path).runs
    assert "1 finished samples of 2" in run.problem
    assert command.main([f"runs={tmp_path}"]) == 0  # a report without a single number is one


def test_cut_prompts_are_named(reported):
    _, made, out = reported
    row = by_run(out / "tables" / "leaderboard.csv")[made["cut"].name]
    assert (row["attention"], row["cut samples"], row["tokens cut off"]) == ("dense (prompts cut)", "4", "400")


def test_what_is_missing_comes_with_its_command(reported):
    page = html.unescape((reported[2] / "report.html").read_text())
    assert (
        "a dense run for quest: <code>python -m hipexp task=infbench 'task.subtasks=[passkey]' task.samples=4 task.length_tok=6144" in page
    )


def test_an_empty_section_says_how_to_fill_it(tmp_path):
    write_run(tmp_path, DENSE, passkeys([0, 0], 6144))
    command.main([f"runs={tmp_path}"])
    page = (tmp_path / "report" / "report.html").read_text()
    for words in ("task=latency", "task=recall", "offload=host", "task.length_tok=6144,12288"):
        assert words in page


@pytest.mark.parametrize(
    "words",
    [
        ["+pipeline=3stage", "task=passkey", "task.depths=[0,0.5]", "task.lengths_tok=[6144,8192]", "seed=3"],
        ["+pipeline=3stage", "pipeline.stages.2.keep_tok=1024", "task=infbench", "offload=host", "offload.device_tok=8192"],
        ["+pipeline=streaming", "model=hf", "model.path=hipexp/needle/model", "task=ruler", "task.data=stand-ins"],
        ["model=openai", "model.base_url=http://localhost:1/v1", "model.path=hipexp/needle/model", "task=infbench"],
    ],
)
def test_commands_make_the_configuration_that_they_are_of(words):
    plain = to_plain(compose(words))
    told = shlex.split(command_of(plain))
    assert told[:3] == ["python", "-m", "hipexp"]
    assert to_plain(compose(read_line(told[3:]).overrides)) == plain
    dense = to_plain(compose(shlex.split(command_of(plain, dense=True))[3:]))
    assert dense["pipeline"] is None and dense["task"] == plain["task"] and dense["seed"] == plain["seed"]


def test_a_pipeline_that_is_no_preset_has_no_command():
    plain = to_plain(compose(["+pipeline=3stage", "task=infbench"]))
    plain["pipeline"]["name"] = "of_my_own"
    assert command_of(plain) is None


def test_runs_of_one_preset_are_named_by_what_differs(reported):
    root, made, _ = reported
    gathered = gather(root)
    name_runs(gathered.runs)
    labels = {run.folder: run.label for run in gathered.runs}
    assert labels[made["3stage 6144"]] == "3stage"
    assert labels[made["less 6144"]] == "3stage, stages.2.keep_tok=1024"
    assert labels[made["offload 6144"]] == "3stage + host"


def test_names_do_not_depend_on_which_other_runs_there_are(tmp_path):
    words = ["+pipeline=3stage", "pipeline.stages.2.keep_tok=1024"]
    made = [write_run(tmp_path, [*words, *more], passkeys([100], 6144)) for more in ([], ["seed=1"])]
    alone = gather(tmp_path)
    name_runs(alone.runs)
    labels = {run.folder: run.label for run in alone.runs}
    assert labels[made[0]] == "3stage, stages.2.keep_tok=1024"
    assert labels[made[1]] == "3stage, stages.2.keep_tok=1024, seed=1"


def test_a_curve_over_length_is_one_whatever_hashes_are(tmp_path):
    """2 samples at 2048 tokens: one number begins the other, and both stand in the words on where the data are from."""
    for length in (2048, 4096):
        data = {"data": f"generated, seeds made-up/<subtask>/0/<sample>/{length}, depth by <sample> of 2"}
        write_run(tmp_path, DENSE, passkeys([100, 0], length), card=data)
    program = "import sys; from pathlib import Path; from hipexp.report.gather import *; "
    program += "print({family_id(run) for run in gather(Path(sys.argv[1])).runs})"
    families = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"PYTHONHASHSEED": str(seed)}, capture_output=True, text=True,
            check=True,
        ).stdout
        for seed in range(4)
    }  # fmt: skip
    [family] = families
    assert len(ast.literal_eval(family)) == 1


def test_the_front_against_brute_force():
    rng = random.Random(0)
    marks = [Mark(rng.randint(1, 9), rng.randint(0, 9), "") for _ in range(60)]
    front = front_of(marks)
    for mark in marks:
        beaten = any(other.x <= mark.x and other.y >= mark.y and (other.x < mark.x or other.y > mark.y) for other in marks)
        assert beaten != (mark in front)


def test_depths_latency_recall_and_traffic(reported):
    _, made, out = reported
    tables = out / "tables"
    cells = [row for path in tables.glob("depth_*.csv") for row in rows_of(path) if row["run"] == made["3stage 6144"].name]
    assert [(row["depth"], float(row["score"]), row["samples"]) for row in cells] == [
        ("0 %", 100, "1"), ("33.3 %", 0, "1"), ("66.7 %", 100, "1"), ("100 %", 100, "1"),
    ]  # fmt: skip
    times = {(row["attention"], row["phase"], row["tokens"]): float(row["mean ms"]) for row in rows_of(tables / "latency.csv")}
    assert times["dense", "decode", "6144"] == 61.44 and times["3stage", "prefill", "12288"] == 40.96
    assert [float(row["mass %"]) for row in rows_of(tables / "recall.csv")] == [100, 75, 50]
    moved = [row for path in tables.glob("traffic_*.csv") for row in rows_of(path)]
    assert {(row["tokens"], float(row["MiB fetched"]), row["samples"]) for row in moved} == {
        (str(length), length * 1000 / 2**20, "4") for length in (6144, 12288)
    }
    assert {float(row["hit %"]) for row in rows_of(tables / "traffic.csv")} == {75}


def test_every_figure_and_table_has_its_files(reported):
    out = reported[2]
    charts = {path.stem for path in (out / "tables").iterdir()} - {
        "leaderboard",
        "subtasks",
        "latency",
        "recall",
        "traffic",
        "excluded",
        "protocols",
    }
    assert {path.name for path in (out / "figures").iterdir()} == {f"{name}.{kind}" for name in charts for kind in ("png", "svg", "pdf")}
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert all(path.read_bytes().startswith(starts[path.suffix[1:]]) for path in (out / "figures").iterdir())
    assert {path.suffix for path in (out / "tables").iterdir()} == {".csv", ".tex"}


def test_latex_is_escaped():
    table = Table("t", "caption", ["a_b", "95 %"], [["x & y × 2", 1.25], [Link("run_1", "/x"), None]])
    assert latex_text(table).splitlines() == [
        "% caption", r"\begin{tabular}{lr}", r"\hline", r"a\_b & 95 \% \\", r"\hline",
        r"x \& y $\times$ 2 & 1.2 \\", r"run\_1 & -- \\", r"\hline", r"\end{tabular}",
    ]  # fmt: skip


def test_tables_are_whole():
    with pytest.raises(ValueError, match="1 cells under 2 names"):
        Table("t", "", ["a", "b"], [["x"]])


def test_the_page_needs_nothing_else_and_is_accessible(reported):
    text = (reported[2] / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!#|\.\./)|@import|url\(|https?://""", text)
    found = Tags(text).found
    ids = [attrs["id"] for _, attrs in found if "id" in attrs]
    assert len(ids) == len(set(ids))
    images = [attrs for tag, attrs in found if tag == "svg" and "aria-hidden" not in attrs]
    assert images and all(attrs["role"] == "img" and {attrs["aria-labelledby"], attrs["aria-describedby"]} <= set(ids) for attrs in images)
    assert text.count("<desc ") == len(images)
    assert text.count("<figure") == text.count("the numbers of this picture")  # a table beside each
    heads = [attrs for tag, attrs in found if tag == "th" and attrs.get("scope") == "col"]
    assert len(heads) == text.count('<button type="button">') and all(attrs["aria-sort"] == "none" for attrs in heads)
    assert ("html", {"lang": "en"}) in found and "prefers-color-scheme: dark" in text
    links = [attrs["href"] for tag, attrs in found if tag == "a" and attrs["href"].startswith("../")]
    assert links and all((reported[2] / link).is_dir() for link in links)


def test_names_from_outside_cannot_become_markup(tmp_path):
    words = [*DENSE, "task.length_tok=6144"]
    write_run(tmp_path, words, passkeys([0, 0], 6144), card={"note": "<script>alert(1)</script>", "protocol": '"><img src=x>'})
    command.main([f"runs={tmp_path}"])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script>alert" not in page and "<img" not in page and "&lt;script&gt;alert" in page


def test_an_empty_folder_and_wrong_words(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"runs=.* must be a folder with runs .* has none; make one with `python -m hipexp"):
        command.main([f"runs={tmp_path}"])
    for word in ("verbose", "out=", "format=pdf"):
        with pytest.raises(ConfigError, match="only out=<folder>, runs=<folder>"):
            command.main([word])
    assert cli.main(["report", f"runs={tmp_path}"]) == 2
    assert "has none" in capsys.readouterr().err


def chromium(*words, budget_ms=4000):
    """Run Chromium without a window; its standard output. ``budget_ms``: of virtual time, which is no measure; None: real time."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += [] if budget_ms is None else [f"--virtual-time-budget={budget_ms}"]
    return subprocess.run([CHROMIUM, *flags, *words], capture_output=True, text=True, timeout=120, check=True).stdout


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")


def shown(dom, table):
    """The rows of a table in a page that ran, in their order, without those that are hidden: the texts of their cells."""
    body = re.search(rf'<table id="table-{table}".*?<tbody>(.*?)</tbody>', dom, re.DOTALL)[1]
    rows = re.findall(r"<tr([^>]*)>(.*?)</tr>", body, re.DOTALL)
    return [
        [html.unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for a, row in rows
        if "hidden" not in a
    ]


@needs_chromium
@pytest.mark.slow
def test_sorting_and_filtering_in_a_browser(reported):
    address = (reported[2] / "report.html").as_uri()
    plain = shown(chromium("--dump-dom", address), "leaderboard")
    assert len(plain) == 10
    dom = chromium("--dump-dom", f"{address}#sort=leaderboard:2:ascending")
    scores = [float(row[2]) for row in shown(dom, "leaderboard")]
    assert scores == sorted(scores) and 'aria-sort="ascending"' in dom
    down = shown(chromium("--dump-dom", f"{address}#sort=leaderboard:4:descending"), "leaderboard")
    numbers = [float(row[4]) for row in down if re.fullmatch(r"-?[\d.]+", row[4])]
    assert numbers == sorted(numbers, reverse=True) and len(numbers) == 6
    dom = chromium("--dump-dom", f"{address}#protocol=official")
    assert [row[0] for row in shown(dom, "leaderboard")] == ["quest"] and "1 of 10 runs with scores" in dom
    assert {row[0] for row in shown(chromium("--dump-dom", f"{address}#q=keep_tok%3D1024+12%2C288"), "leaderboard")} == {
        "3stage, stages.2.keep_tok=1024"
    }


@needs_chromium
@pytest.mark.slow
def test_headers_are_buttons_that_take_the_focus_and_search_answers(reported, tmp_path):
    keys = """<script>
      const head = document.querySelectorAll("#table-leaderboard thead button")[2];
      head.focus();
      document.activeElement.click();  // what Enter and Space do to a button that has the focus
      form.elements.q.value = "3stage";
      form.elements.q.dispatchEvent(new Event("input", { bubbles: true }));
      document.title = location.hash;
    </script>"""
    path = tmp_path / "report.html"
    path.write_text((reported[2] / "report.html").read_text().replace("</body>", f"{keys}</body>"))
    dom = chromium("--dump-dom", path.as_uri())
    rows = shown(dom, "leaderboard")
    scores = [float(row[2]) for row in rows]
    assert len(rows) == 6 and scores == sorted(scores, reverse=True)
    assert "6 of 10 runs with scores" in dom and "<title>#q=3stage&amp;sort=leaderboard%3A2%3Adescending</title>" in dom


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("wide", [390, 1280])
def test_a_page_fits_its_window(reported, tmp_path, wide):
    told = "<script>parent.postMessage(`${document.documentElement.scrollWidth} of ${innerWidth}`, '*')</script>"
    page = (reported[2] / "report.html").read_text().replace("</body>", f"{told}</body>")
    (tmp_path / "page.html").write_text(page)
    # A frame, since a window of Chromium has a least width of its own.
    listen = "<script>onmessage = (event) => { document.title = event.data; };</script>"
    path = tmp_path / "frame.html"
    path.write_text(f'{listen}<iframe src="page.html" width="{wide}" height="900" style="border: 0"></iframe>')
    dom = chromium("--window-size=1400,1000", "--dump-dom", path.as_uri())
    needed, window = map(int, re.search(r"<title>(\d+) of (\d+)", dom).groups())
    assert window == wide
    assert needed <= window  # nothing but tables, in their frames, scrolls sideways


PICTURES = {"report": (1000, 1150, ""), "report_curves": (1000, 900, "length"), "report_phone": (500, 900, "")}


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_the_docs(reported, tmp_path, request, name):
    """With ``--pictures docs`` those that docs/report.md shows are made anew."""
    wide, high, section = PICTURES[name]
    path = Path(request.config.getoption("--pictures") or tmp_path).resolve() / f"{name}.png"
    page = (reported[2] / "report.html").read_text().replace(str(reported[0]), "runs")
    if section:  # its head and this section alone
        page = page.replace("</head>", f"<style>main > section:not(#{section}) {{ display: none; }}</style></head>")
    (tmp_path / "page.html").write_text(page)
    chromium(f"--window-size={wide},{high}", f"--screenshot={path}", (tmp_path / "page.html").as_uri())
    assert 20_000 < path.stat().st_size < 200_000


@needs_chromium
@pytest.mark.slow
def test_five_hundred_runs_open(tmp_path):
    root = tmp_path / "runs"
    write_many(root, 500)
    begun = time.perf_counter()
    assert command.main([f"runs={root}"]) == 0
    print(f"{time.perf_counter() - begun:.0f} s to write the report")
    path = root / "report" / "report.html"
    assert path.stat().st_size < 8_000_000
    # Milliseconds from the start of loading until the page is sorted, filtered, laid out and painted for the first time.
    told = "requestAnimationFrame(() => requestAnimationFrame(() => { document.title = `${performance.now()} ms`; }))"
    path.write_text(path.read_text().replace("</body>", f"<script>{told}</script></body>"))
    times = []
    for _ in range(3):
        dom = chromium("--dump-dom", f"{path.as_uri()}#sort=leaderboard:2:ascending&q=quest", budget_ms=None)
        times.append(float(re.search(r"<title>([\d.]+) ms", dom)[1]))
    print(f"{min(times):.0f} to {max(times):.0f} ms to open it")
    assert min(times) < 3000
    rows = shown(dom, "leaderboard")
    scores = [float(row[2]) for row in rows]
    assert rows and scores == sorted(scores) and all(row[0].startswith("quest") for row in rows)
