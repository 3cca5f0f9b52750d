import json

import pyarrow.parquet as pq
import pytest

from hipexp.config.compose import compose
from hipexp.config.schema import Pipeline
from hipexp.run.ledger import read_json, read_rows
from hipexp.run.point import execute, report, run_point
from hipexp.run.traffic import thrashing, traffic_table


def test_traffic_is_in_every_record(fake, offloaded, capsys):
    folder = run_point(offloaded())
    text = capsys.readouterr().out
    rows, traffic = read_rows(folder), read_json(folder / "summary.json")["traffic"]
    assert set(traffic) == {"rows", "by", "prefill", "decode", "host_bytes", "disk_bytes"}
    steps = sum(row["traffic"]["steps"] for row in rows)
    assert traffic["decode"]["steps"] == steps > 0
    assert [(row["phase"], row["by"]) for row in traffic["by"]] == [
        (p, by) for p in ("prefill", "decode") for by in ("0", "attend", "write")
    ]
    assert len(traffic["rows"]) == 2 * len(traffic["by"])
    one = next(row for row in traffic["rows"] if (row["layer"], row["phase"], row["by"]) == (1, "prefill", "0"))
    assert (one["hits"], one["misses"], one["h2d_bytes"], one["stall_ms"]) == (8, 24, 24 << 20, 12.0)
    assert (traffic["prefill"]["hits"], traffic["prefill"]["hit_ratio"], traffic["prefill"]["d2h_bytes"]) == (32, 0.25, 16 << 20)
    assert (traffic["decode"]["h2d_bytes_per_step"], traffic["decode"]["d2h_bytes_per_step"]) == (12 << 20, 2 << 20)
    table = pq.read_table(folder / "records.parquet").to_pylist()
    first = rows[0]["traffic"]["steps"] + 1  # and once in prefill
    assert {name: table[0][name] for name in ("hits", "misses", "h2d_bytes", "d2h_bytes", "stall_ms")} == {
        "hits": 4 * first,
        "misses": 12 * first,
        "h2d_bytes": 12 * first << 20,
        "d2h_bytes": 2 * first << 20,
        "stall_ms": 6.0 * first,
    }
    assert json.loads(table[0]["traffic"]) == rows[0]["traffic"]
    assert "keys and values: all in host memory, in the model's own format; on the device 16384 tokens a layer, clock decides which" in text
    assert ["prefill", "stage", "0", "25.0", "48.0", "0.0", "24.0"] in [line.split() for line in text.splitlines()]
    assert ["prefill", "write", "–", "0.0", "16.0", "0.0"] in [line.split() for line in text.splitlines()]
    assert "still right, but slow: 75 % of what decode asked for had to be fetched; raise offload.device_tok=16384" in text
    run_point(offloaded())
    assert "all in host memory" in capsys.readouterr().out


def test_without_offload_there_is_no_traffic(fake, experiment):
    folder = execute(experiment(Pipeline("streaming", "streaming")))
    assert read_json(folder / "summary.json")["traffic"] == {}
    assert all(row["traffic"] == {} for row in read_rows(folder))
    assert pq.read_table(folder / "records.parquet").to_pylist()[0]["hits"] is None
    assert "fetched" not in report(experiment(Pipeline("streaming", "streaming")), folder)


def test_bytes_of_the_disk_have_columns_where_there_are_any():
    moved = {"h2d_bytes": 4 << 20, "disk_read_bytes": 1 << 20, "d2h_bytes": 2 << 20, "disk_write_bytes": 0, "stall_ms": 500.0}
    row = {"phase": "decode", "by": "1", "hit_ratio": 0.5, **moved}
    write = row | {"by": "write", "hit_ratio": None, "disk_read_bytes": 0, "disk_write_bytes": 3 << 19}
    lines = traffic_table({"by": [row, write], "host_bytes": 5 << 20, "disk_bytes": 3 << 20}).splitlines()
    assert lines[0].split("  ")[-5:] == ["MiB fetched", "of them from disk", "MiB written", "of them to disk", "stall ms"]
    assert lines[2].split() == ["decode", "stage", "1", "50.0", "4.0", "1.0", "2.0", "0.0", "500.0"]
    assert lines[3].split() == ["decode", "write", "–", "4.0", "0.0", "2.0", "1.5", "500.0"]
    assert lines[-1] == "off the device, for a sample: 5 MiB in host memory (on a CPU part of peak MiB) and 3 MiB on disk"
    assert "disk" not in traffic_table({"by": [row | {"disk_read_bytes": 0}], "host_bytes": 5 << 20, "disk_bytes": 0})


def sample(steps, hits, misses, uncached=0, phase="decode"):
    """A line of ``samples.jsonl`` as far as it matters here."""
    counts = {
        "hits": hits,
        "misses": misses,
        "uncached": uncached,
        "h2d_bytes": 0,
        "d2h_bytes": 0,
        "disk_read_bytes": 0,
        "disk_write_bytes": 0,
    }
    return {"traffic": {"rows": [{"layer": 0, "phase": phase, "by": "attend", "stall_ms": 0.0, **counts}], "steps": steps}}


PRUNED = compose(["+pipeline=3stage", "offload=host"])  # of five layers, the slowest stage is refreshed every 16 steps
TOLD = "still right, but slow: {}; raise offload.device_tok=16384"
IN_PARTS = "2 time(s) more was asked for at once than the device holds, and what was missing was not kept"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], ""),
        ([{"traffic": {}}], ""),
        ([sample(16, 49, 51)], "51 % of what decode asked for had to be fetched"),
        ([sample(16, 50, 50)], ""),
        ([sample(15, 0, 100)], ""),  # of a short answer everything is missing for the first time
        ([sample(15, 0, 100), sample(16, 50, 50)], ""),
        ([sample(15, 1000, 0), sample(16, 49, 51)], "51 % of what decode asked for had to be fetched"),
        ([sample(64, 0, 100, phase="prefill")], ""),  # a prompt is read once
        ([sample(16, 0, 0)], ""),
        ([sample(3, 9, 1, uncached=1), sample(3, 9, 1, uncached=1, phase="prefill")], IN_PARTS),
        ([sample(16, 0, 100, uncached=2)], f"100 % of what decode asked for had to be fetched and {IN_PARTS}"),
    ],
)
def test_a_device_is_too_small_where_long_answers_miss_or_requests_do_not_fit(rows, told):
    assert thrashing(PRUNED, rows, 5) == (TOLD.format(told) if told else "")


def test_it_names_the_size_that_was_given():
    in_bytes = compose(["+pipeline=3stage", "offload=host", "offload.device_tok=null", "offload.device_bytes=700000000"])
    assert thrashing(in_bytes, [sample(16, 1, 9)], 5).endswith("raise offload.device_bytes=700000000")
