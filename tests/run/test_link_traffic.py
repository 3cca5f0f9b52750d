"""``make link-table`` on a small model: what is counted, how it is scaled, and that a measurement is made once."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from hipexp.cache.traffic import Traffic
from hipexp.config.schema import LayerGroup, Offload, Pipeline, Representative, Stage, StageOverride, page_bytes
from hipexp.run import link_traffic
from hipexp.run.ledger import runs_root
from hipexp.run.link_traffic import K, Point, Shape

SHAPE = Shape(layers=2, heads=4, kv_heads=2)
STEPS = 65
SCAN = Point("3stage_scan", "fp8", 2 * K)
DESCENT = Point("3stage", "bf16", 2 * K)
POINTS = (
    *(Point(point.pipeline, point.format, n * K) for point in (SCAN, DESCENT) for n in (2, 4)),
    Point("3stage_scan", "bf16", 2 * K),
    Point("3stage_scan", "bf16", 2 * K, "layers, as set"),
    Point("3stage_scan", "bf16", 2 * K, "chunks"),
)


def small(point: Point) -> tuple[Pipeline, Offload]:
    """Presets of a point, a 16th as large, but for their schedule."""
    of_scan = [Representative.bounds, Representative.bounds, Representative.exact]
    scored = of_scan if point.pipeline == "3stage_scan" else [Representative.descent] * 3
    sizes = ((128, 1024, 4, 16), (32, 512, 4, 8), (8, 128, 1, 4))
    stages = [Stage(chunk, keep, 64, stride, refresh, how) for (chunk, keep, stride, refresh), how in zip(sizes, scored, strict=True)]
    early = LayerGroup("0", stages={"2": StageOverride(keep_tok=256)})
    return Pipeline(stages=stages, sink_tok=64, window_tok=256, layers={"early": early}), Offload(
        "host", device_tok=1024, format=point.format
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def _small(monkeypatch, folder):
    for name, value in (("configured", small), ("SHAPE", SHAPE), ("POINTS", POINTS), ("CHUNK_TOK", 512)):
        monkeypatch.setattr(link_traffic, name, value)
    monkeypatch.setenv("HIPEXP_RUNS", str(folder))


@pytest.fixture
def rows():
    """All measurements, made by the first test that asks for them."""
    assert link_traffic.main() == 0
    measured = link_traffic.read_measured(runs_root() / "link_traffic" / "measured.jsonl")
    assert [row["point"] for row in measured] == list(map(asdict, POINTS))
    return {Point(**row["point"]): row for row in measured}


def pages(point: Point, tokens: int) -> int:
    """Bytes of the pages of so many tokens, of all layers."""
    return tokens // 64 * 2 * SHAPE.layers * SHAPE.kv_heads * page_bytes(point.format, 64, SHAPE.head_dim, 4)


def unit(point: Point, head_dim: int = SHAPE.head_dim) -> int:
    """Bytes of the keys of 8 tokens, of all heads of a layer."""
    return SHAPE.kv_heads * page_bytes(point.format, 8, head_dim, 4)


def test_a_prompt_read_by_layer_writes_its_pages_and_fetches_nothing(rows):
    for point, row in rows.items():
        assert row["prefill"]["d2h_bytes"] == pages(point, point.context_tok)
        assert (row["prefill"]["h2d_bytes"] > 0) == (point.read == "chunks")
    by_chunk = rows[POINTS[-1]]["prefill"]
    assert len(by_chunk["chunks"]) == 4 and sum(by_chunk["chunks"]) == by_chunk["h2d_bytes"]


def test_steps_fetch_what_their_stages_ask_for(rows):
    """A reuse step fetches nothing; an append writes when it ends a page, once in 64 steps. Exact scores read no more than was kept."""
    for point, row in rows.items():
        if point.read == "chunks":
            assert row["steps"] == []
            continue
        assert [step["due"] for step in row["steps"]] == [0, 3, 3, 3, 2, 3, 3, 3, 1, 3, 3, 3, 2, 3, 3, 3] * 4 + [0]
        assert all(not step["h2d_bytes"] for step in row["steps"] if step["due"] == 3)
        written = {i: step["d2h_bytes"] for i, step in enumerate(row["steps"]) if step["d2h_bytes"]}
        assert list(written) == [63] and sum(written[63]["write"]) == pages(point, 64)
        first = row["steps"][0]["h2d_bytes"]
        assert ("0" in first) == (point.pipeline == "3stage") and "summarize" not in first
    exact = rows[SCAN]["steps"][0]["h2d_bytes"]
    assert set(exact) == {"2", "attend"}
    assert all(0.8 * 512 / 8 < n / unit(SCAN) <= 512 / 8 for n in exact["2"])
    for layer, kept in enumerate((256, 128)):
        assert 0.8 * kept / 8 < exact["attend"][layer] / unit(SCAN) <= kept / 8


def test_how_a_prompt_was_read_changes_no_amounts(rows):
    quick, as_set = (rows[Point("3stage_scan", "bf16", 2 * K, read)]["steps"][0]["h2d_bytes"] for read in ("layers", "layers, as set"))
    for by in ("2", "attend"):
        assert sum(quick[by]) == pytest.approx(sum(as_set[by]), rel=0.05)


def test_what_is_measured_is_not_measured_again(rows, monkeypatch, capsys):
    monkeypatch.setattr(link_traffic, "measure", None)
    capsys.readouterr()
    assert link_traffic.main() == 0
    text = capsys.readouterr().out
    assert "took" not in text and "1M prefill, bf16" in text and (runs_root() / "link_traffic" / "table.txt").read_text() in text + "\n"


def test_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "measured.jsonl"
    path.write_text('{"a": 1}\n{"b": ')
    assert link_traffic.read_measured(path) == [{"a": 1}]
    assert link_traffic.read_measured(tmp_path / "none") == []


def test_figures_are_scaled_by_bytes_of_units_and_first_stages_with_the_context(rows):
    scan, descent = (rows[Point(of.pipeline, of.format, 4 * K)] for of in (SCAN, DESCENT))
    counted = link_traffic.total(link_traffic.layer_bytes(scan, [0]), 2)
    expected = [size / unit(SCAN) * unit(SCAN, 128) for size in counted]
    assert link_traffic.scaled_layers(scan, [0]) == pytest.approx(expected)
    long = link_traffic.layer_bytes(descent, [0])
    others = link_traffic.total({by: of for by, of in long.items() if by != "0"}, 2)
    expected = [16 * (256 * a + b) for a, b in zip(long["0"], others, strict=True)]
    assert link_traffic.scaled_layers(descent, [0]) == pytest.approx(expected)
    written, fetched = link_traffic.scaled_prefill(descent)
    assert (written, fetched) == (1024 * K * 2 * 2 * 2 * 2 * 128, 0)
    by_chunk = rows[POINTS[-1]]
    told = by_chunk["prefill"]
    assert link_traffic.scaled_prefill(by_chunk)[1] == 16 * (told["h2d_bytes"] + told["chunks"][-1] * 2044)


def test_steps_are_told_apart(rows):
    kinds = link_traffic.kinds(rows[SCAN])
    assert kinds["full refresh, cold pool"] == [0] and kinds["full refresh, warm pool"] == [16, 32, 48, 64]
    assert kinds["from stage 1 on"] == [8, 24, 40, 56] and kinds["average of a period"] == list(range(1, 65))
    assert len(kinds["from stage 2 on"]) == 8 and len(kinds["reuse"]) == 48


def test_times_are_bytes_over_the_rate_of_a_link():
    assert link_traffic.predicted_ms(12.5e6) == {"PCIe 4 x16": pytest.approx(0.5), "PCIe 5 x16": pytest.approx(12.5 / 52)}


def test_bytes_that_are_no_whole_rows_are_refused():
    told = {"layer": 0, "phase": "decode", "by": "2", **vars(Traffic(misses=2, h2d_bytes=128))}
    cache = SimpleNamespace(traffic={"rows": [told]})
    assert link_traffic.counts(cache, 64)[0, "2"].misses == 2
    told["h2d_bytes"] = 127
    with pytest.raises(RuntimeError, match="127 bytes are no rows of 64 bytes"):
        link_traffic.counts(cache, 64)


def test_the_presets_are_those_of_the_configuration(monkeypatch):
    monkeypatch.undo()
    pipeline, offload = link_traffic.configured(Point("3stage_scan", "fp8", 32 * K))
    assert [stage.representative.value for stage in pipeline.stages] == ["bounds", "bounds", "exact"]
    assert offload.name == "host" and offload.format == "fp8" and offload.device_tok == 16384
    assert {point.context_tok for point in link_traffic.POINTS} == {32768, 65536, 131072}
    assert asdict(link_traffic.SHAPE) == {"layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 8}
    assert len(set(link_traffic.POINTS)) == 13
