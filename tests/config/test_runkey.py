"""The run key changes with what decides a result, and with nothing else."""

import pytest

from hipexp.config import runkey
from hipexp.config.compose import compose
from hipexp.config.runkey import key_fields, run_key

BASE = ["+pipeline=3stage", "task=passkey"]


def key(*words, revision="abc", **extra):
    return run_key(compose([*BASE, *words]), model_revision=revision, extra=extra)


@pytest.mark.parametrize(
    "word",
    [
        "pipeline.stages.0.keep_tok=16384",
        "pipeline.layers.early.range='0-1'",
        "pipeline.rope.attend=native",
        "pipeline.heads=per_kv",
        "task.samples=2",
        "task.lengths_tok=[4096]",
        "task.wording=heldout",
        "seed=1",
        "model.dtype=bfloat16",
        "model.trained_tok=4096",
        "model.compile=true",
    ],
)
def test_what_decides_a_result_changes_the_key(word):
    assert key(word) != key()


@pytest.mark.parametrize(
    "word",
    [
        "track=wandb",
        "track.project=other",
        "model.path=other/place",
        "model.name=other",
        "model.revision=v2",
        "pipeline.name=other",
        "pipeline.sink_tok=256",
    ],
)
def test_trackers_paths_and_names_do_not(word):
    assert key(word) == key()


def test_the_same_pipeline_by_another_name_has_the_same_key():
    words = ["pipeline.stages.0.refresh_steps=16", "pipeline.stages.1.refresh_steps=8", "pipeline.stages.2.refresh_steps=4"]
    fast = compose(["+pipeline=3stage_fast", "task=passkey", *words])
    assert run_key(fast, model_revision="abc", extra={}) == key()


def test_weights_extras_and_the_version_count(monkeypatch):
    keys = {key(), key(revision="def"), key(threads=2), key(threads=4)}
    monkeypatch.setattr(runkey, "RESULT_VERSION", runkey.RESULT_VERSION + 1)
    assert len(keys | {key()}) == 5


def test_without_offload_the_key_is_as_before_there_was_one():
    assert key_fields(compose(BASE))["offload"] == {"name": "none"}


@pytest.mark.parametrize("word", ["device_tok=8192", "policy=lru", "format=fp8", "host_tok=65536", "prefill_bytes=1000"])
def test_what_decides_scores_or_traffic_of_an_offload_changes_the_key(word):
    assert len({key(), key("offload=host"), key("offload=host", f"offload.{word}")}) == 3


def test_where_the_disk_tier_lies_and_the_name_of_a_preset_do_not(tmp_path):
    disk = key("offload=disk")
    assert key("offload=disk", f"offload.disk_dir={tmp_path}") == disk
    assert key("offload=disk", "offload.name=mine") == disk
    assert key("offload=disk", "offload.disk_dir=null") != disk


def test_pieces_of_their_own_size_change_the_key_and_without_them_it_is_as_before():
    for fields in (key_fields(compose(BASE)), key_fields(compose(["+pipeline=3k_5k"]))):
        pipeline = fields["pipeline"]
        assert not any("piece_tok" in stage for stage in (*pipeline["stages"], *(pipeline["decode"] or [])))
        assert not any("piece_tok" in stage for _, group in pipeline["layers"] for stage in group["stages"].values())
    with_one = [f"pipeline.{where}.0.piece_tok={size}" for where in ("stages", "layers.early.stages") for size in (32, 128)]
    by_landmarks = "pipeline.stages.0.representative=bounds"
    assert len({key(by_landmarks), *(key(by_landmarks, word) for word in with_one)}) == 5


def test_staggered_refreshes_change_the_key_and_without_them_it_is_as_before():
    assert "staggered_refresh" not in key_fields(compose(BASE))["pipeline"]
    assert key("pipeline.staggered_refresh=true") != key() == key("pipeline.staggered_refresh=false")


def test_the_order_of_groups_counts():
    groups = ["pipeline.layers.a={range: '3', window_tok: 2048}", "pipeline.layers.b={range: '3', window_tok: 4096}"]
    assert key(*groups) != key(*reversed(groups))


def test_the_key_is_a_hash_that_stays():
    first = key(threads=2, device="cpu")
    assert first == key(device="cpu", threads=2) and len(first) == 64 and int(first, 16)


def test_what_is_not_a_number_is_refused():
    with pytest.raises(ValueError):
        key(score=float("nan"))


def test_of_an_offload_recall_depends_on_the_format_only():
    def key_of(*words):
        return run_key(compose(["+pipeline=3stage", "task=recall", "offload=host", *words]), model_revision="abc", extra={})

    first = key_of("offload.format=fp8")
    assert first == key_of("offload.format=fp8", "offload.device_tok=8192", "offload.policy=lru")
    assert first != key_of("offload.format=int4")
