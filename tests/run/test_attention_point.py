"""``task=latency`` with a geometry: what is stored, resumed and told. No assertion about time."""

import pytest

from hipexp.config.compose import compose
from hipexp.run import attention_point
from hipexp.run.identity import key_of
from hipexp.run.ledger import read_json, read_rows
from hipexp.run.point import check_point, execute, folder_of, report

SMALL = [
    "task=latency", "task.geometry=4/2/16", "task.contexts_tok=[512,768]", "task.queries_tok=64", "task.decode_steps=5", "+pipeline=2stage",
    "pipeline.sink_tok=32", "pipeline.window_tok=64", "pipeline.layers.early.range=''",
    "pipeline.stages=[{chunk_tok:32,keep_tok:128,query_block_tok:32,query_stride_tok:4,refresh_steps:4},"
    "{chunk_tok:8,keep_tok:64,query_block_tok:32,query_stride_tok:1,refresh_steps:2}]",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    from hipexp.run import contestants, timing

    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(timing, "missing_compiler", lambda: "no C++ compiler")
    monkeypatch.setattr(timing, "CPU_BYTES", 1 << 20)
    monkeypatch.setattr(attention_point, "SLOWER", 1e9)
    real = contestants.decode_contestants
    monkeypatch.setattr(
        "hipexp.run.attention_latency.decode_contestants",
        lambda device: [
            c if c.name != "flex packed" else timing.Contestant(c.name, c.run, lambda: "no C++ compiler") for c in real(device)
        ],
    )


def test_rows_plot_and_table(tmp_path):
    one = compose([*SMALL, "task.repeats=2"])
    check_point(one)
    folder = execute(one)
    assert folder == folder_of(one) and folder.name.startswith("4-2-16_2stage_")
    lines = read_rows(folder)
    assert [(line["subtask"], line["sample"]) for line in lines] == [
        (f"{phase}@{n}", repeat) for n in (512, 768) for phase in ("decode", "prefill") for repeat in (0, 1)
    ]
    order = [[row["dense"] for row in line["rows"] if "note" not in row] for line in lines[:2]]
    assert order == [[True, True, True, False], [False, True, True, True]]
    summary = read_json(folder / "summary.json")
    wanted = {"phase", "context_tok", "impl", "mean_ms", "p10_ms", "p90_ms", "cached_ms", "worst_ms", "bytes", "of_limit"}
    rows = [row for row in summary["latency"]["rows"] if "note" not in row]
    assert all(wanted <= set(row) for row in rows)
    mine = [row for row in rows if row["impl"] == "2stage"]
    assert [(row["phase"], row["context_tok"]) for row in mine] == [(phase, n) for phase in ("decode", "prefill") for n in (512, 768)]
    assert all(row["speedup"] > 0 for row in mine) and 0 < summary["recall"]["512"]["recall"] < 1
    assert (folder / "latency.png").stat().st_size > 5000
    told = report(one, folder)
    assert "2stage" in told and "flex packed was left out: no C++ compiler" in told
    assert key_of(compose([*SMALL, "task.repeats=2", "model=needle", "task.geometry=4/2/16"])) == key_of(one)
    assert key_of(compose([*SMALL, "task.repeats=2", "task.layer=3"])) != key_of(one)


def test_a_run_goes_on_where_it_was_stopped():
    one = compose([*SMALL, "task.phases=[decode]"])
    folder = execute(one)
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text(lines[0])
    (folder / "status.json").unlink()
    execute(one)
    again = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    assert again[0] == lines[0] and len(again) == 2


def test_dense_alone():
    one = compose([*SMALL[:5], "task.phases=[prefill]"])
    rows = read_json(execute(one) / "summary.json")["latency"]["rows"]
    assert rows and all(row["dense"] for row in rows)


def test_counted_bytes():
    """Sinks, window and selection as keys and values of 2 heads of 16 in fp32; probes of both stages for 4 query heads."""
    from hipexp.attention.inputs import GEOMETRIES, Geometry, drifting
    from hipexp.attention.methods.hip import Hip
    from hipexp.run.attention_latency import decode_bytes, layer_attention

    pipeline, layer = compose(SMALL).pipeline, drifting(Geometry(4, 2, 16), 768)
    attention = layer_attention(pipeline, layer.geometry, layer.keys.device)
    key = 16 * 4
    first, second = (768 - 32 - 64) // 32 * 10 * 4 * key, 128 // 8 * 6 * 4 * key
    assert decode_bytes(attention, layer) == 2 * 2 * key * (32 + 64 + 64) + first // 4 + second // 2
    for representative, probes in (("descent", 16), ("grid", 16), ("exact", 256), ("bounds", 8)):
        plan = compose(["+pipeline=3stage", f"pipeline.stages.0.representative={representative}"]).pipeline.plan_alone(None)
        assert Hip(plan)._probes(plan.decode[0]) == probes
    assert GEOMETRIES["llama31_8b"] == Geometry(32, 8, 128)


def test_the_layer_decides_which_groups_apply():
    early, late = (attention_point.job(compose(["+pipeline=3stage", *SMALL[:2], f"task.layer={n}"])).card["strategy"] for n in (1, 31))
    assert "5376 tokens" in early[1] and "layer 1 (early)" in early[1]
    assert "3328 tokens" in late[1] and "layer 31" in late[1]


def test_what_is_far_behind_is_timed_once(monkeypatch):
    monkeypatch.setattr(attention_point, "SLOWER", 1.5)
    rows = [{"impl": name, "dense": name != "3stage", "mean_ms": ms} for name, ms in (("a", 9.0), ("b", 5.0), ("c", 7.5), ("3stage", 90.0))]
    line = {"subtask": "decode@512", "rows": [*rows, {"impl": "d", "dense": True, "note": "not here"}]}
    assert attention_point.too_slow(attention_point.Measurement(512, "decode", 1), [line]) == ["a"]
    assert attention_point.too_slow(attention_point.Measurement(768, "decode", 0), [line]) == []


def test_keys_are_summarized_before_the_clock_runs(monkeypatch):
    """Once for a layer in decode, once for a prompt in prefill, however many steps and rounds there are."""
    from hipexp.attention.inputs import Geometry, drifting
    from hipexp.cache import summaries
    from hipexp.run import attention_latency as alone

    calls, real = [], summaries.summarize
    monkeypatch.setattr(summaries, "summarize", lambda k, **kwargs: calls.append(k.shape[1]) or real(k, **kwargs))
    pipeline, layer = compose([*SMALL, "pipeline.stages.0.representative=bounds"]).pipeline, drifting(Geometry(4, 2, 16), 768)
    attention = alone.layer_attention(pipeline, layer.geometry, layer.keys.device)
    alone.decode_row(attention, [layer], 3, "small")
    assert calls == [736]
    alone.prefill_rows({"small": attention}, layer, 64, 3, skip=("matmuls in tiles",))
    assert calls == [736, 736]
    alone.prefill_rows({"one": attention, "other": attention}, layer, 64, 3, skip=("matmuls in tiles",))
    assert calls == [736] * 4
