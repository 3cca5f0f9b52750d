"""Offload: its presets, what is refused before anything loads, and whether a context fits."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hipexp.config.check import check_layers, check_model
from hipexp.config.compose import compose
from hipexp.config.model import ModelFacts
from hipexp.config.offload import Room, available_bytes, check_fits, needs, room_for, show_bytes, sizes
from hipexp.config.schema import ConfigError, Offload, page_bytes
from hipexp.run.strategy import describe

HOST, DISK = ["+pipeline=3stage", "offload=host"], ["+pipeline=3stage", "offload=disk"]
FACTS = ModelFacts(5, 6144, kv_heads=2, head_dim=64, itemsize=4)
TOKEN = 2 * 2 * 64 * 4  # bytes of keys and values of all heads
SERVED = ["model=openai", "model.path=m", "model.base_url=http://localhost:8000/v1"]
NEEDED = "sinks, a window of 1024, the 4096 tokens that layer 0 keeps and a page"

CASES = {
    "policy": ([*HOST, "offload.policy=mru"], "offload.policy=mru is unknown; use lru or clock or lfu"),
    "a policy of replay": (
        [*HOST, "offload.policy=belady"],
        "offload.policy=belady has to know the future, and is for replay only; use lru or clock or lfu",
    ),
    "format": ([*HOST, "offload.format=fp4"], "offload.format=fp4 is unknown; use auto or bf16 or fp8 or int8 or int4"),
    "a field without offload": (
        ["+pipeline=3stage", "offload.device_tok=8192"],
        "offload.device_tok=8192 is for keys and values off the device; add offload=host, or leave it out",
    ),
    "a format without offload": (["offload=none", "offload.format=fp8"], "offload.format=fp8 is for keys and values off the device"),
    "two sizes of a tier": (
        [*HOST, "offload.device_bytes=64000000"],
        "offload.device_tok=16384 must not stand beside offload.device_bytes=64000000; set one of them to null",
    ),
    "two sizes of the disk": (
        [*DISK, "offload.disk_tok=1000", "offload.disk_bytes=5000"],
        "offload.disk_tok=1000 must not stand beside offload.disk_bytes=5000",
    ),
    "no size": ([*HOST, "offload.device_tok=null"], "offload.device_tok is not set and must be a whole number: tokens of a layer"),
    "none at all": (["+pipeline=3stage", "offload.name=host"], "offload.device_tok is not set"),
    "no truth": ([*HOST, "offload.prefetch=maybe"], "offload.prefetch=maybe must be true or false, as in offload.prefetch=true"),
    "an empty device": ([*HOST, "offload.device_tok=0"], "offload.device_tok=0 must be at least 1"),
    "an empty host": ([*HOST, "offload.host_bytes=-5"], "offload.host_bytes=-5 must be at least 1"),
    "an empty disk": ([*DISK, "offload.disk_tok=0"], "offload.disk_tok=0 must be at least 1"),
    "a negative budget": ([*HOST, "offload.prefill_bytes=-1"], "offload.prefill_bytes=-1 must be at least 0"),
    "a disk without a folder": (
        [*HOST, "offload.disk_tok=1000000"],
        "offload.disk_tok is for a disk tier; name its folder, as in offload.disk_dir=., or leave it out",
    ),
    "a disk behind everything": (
        [*HOST, "offload.disk_dir=."],
        "offload.disk_dir=. is for what host memory does not hold, and without a size of its own that holds everything; set offload.host_tok",
    ),
    "a folder that is not there": ([*DISK, "offload.disk_dir=no/where"], "offload.disk_dir=no/where must be a folder that exists"),
    "dense attention": (
        ["offload=host"],
        "offload=host must have a pipeline: without one attention is dense, and every step would read all keys and values over the link",
    ),
    "a served model": ([*SERVED, "offload=host"], "offload=host moves a model's keys and values, and a server's are its own"),
    "recall": ([*HOST, "task=recall"], "offload=host changes nothing that task=recall measures, unless offload.format does"),
    "attention alone": (
        [*HOST, "task=latency", "task.geometry=llama31_8b"],
        "offload=host is for a model, and task.geometry=llama31_8b is attention alone, on the device; use offload=none",
    ),
}
TOO_SMALL = {
    "tokens": (["offload.device_tok=5439"], f"offload.device_tok=5439 must hold {NEEDED}: at least 5440; raise it"),
    "bytes": (
        ["offload.device_tok=null", f"offload.device_bytes={5440 * TOKEN * 5 - 1}"],
        f"offload.device_bytes=27852799 must hold {NEEDED}: at least 5440 tokens in each of 5 layers, which are 27852800 bytes",
    ),
    "stages of decode": (
        ["+pipeline=3k_5k", "pipeline.layers.early.range=''", "offload.device_tok=5000"],
        "the 4096 tokens that layer 0 keeps and a page: at least 5440",
    ),
    "a window": (["+pipeline=16k_shallow"], "a window of 131072, the 16384 tokens that layer 0 keeps and a page: at least 147776"),
    "parts of pages": (
        [
            "offload.format=fp8",
            "pipeline.stages.2.query_block_tok=16",
            "pipeline.stages.1.query_block_tok=16",
            "pipeline.stages.0.query_block_tok=16",
            "model.prefill_chunk_tok=8208",
        ],
        "model.prefill_chunk_tok=8208 must be whole pages of 64 tokens with offload.format=fp8, which rounds a page at a time; try 8192",
    ),
    "no stages": (
        ["+pipeline=streaming", "offload.device_tok=1344"],
        "offload.device_tok=1344 must hold sinks, a window of 1024 tokens (layer 0), a page and a token: at least 1345",
    ),
    "a large chunk": (
        ["+pipeline=1stage", "pipeline.stages.0.chunk_tok=256", "pipeline.layers.early.range=''", "offload.device_tok=3583"],
        "the 2048 tokens that layer 0 keeps and a page: at least 3584",
    ),
    "a page of host memory": (["offload.host_tok=63"], "offload.host_tok=63 must hold a page of every layer, 64 tokens; raise it"),
    "bytes of a page": (
        [f"offload.host_bytes={64 * TOKEN * 5 - 1}"],
        f"offload.host_bytes=327679 must hold a page of every layer, {64 * TOKEN * 5} bytes; raise it",
    ),
}


def composed(words):
    """An experiment with ``3stage`` and ``offload=host``, unless ``words`` say otherwise."""
    base = [word for word in HOST if not any(other.startswith(word.split("=")[0] + "=") for other in words)]
    return compose([*base, *words])


def plans_of(experiment, layers=5):
    return experiment.pipeline.plan(layers)


@pytest.mark.parametrize("argv, message", CASES.values(), ids=CASES)
def test_refused(argv, message):
    with pytest.raises(ConfigError) as caught:
        compose(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words, message", TOO_SMALL.values(), ids=TOO_SMALL)
def test_a_tier_that_is_too_small_is_refused(words, message):
    with pytest.raises(ConfigError) as caught:
        check_layers(composed(words), FACTS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["offload.device_tok=5440"],
        ["offload.device_tok=null", f"offload.device_bytes={5440 * TOKEN * 5}"],
        ["+pipeline=streaming", "offload.device_tok=1345"],
        ["offload.format=fp8", "model.prefill_chunk_tok=128"],
        ["offload.host_tok=64"],
        [f"offload.host_bytes={64 * TOKEN * 5}"],
    ],
)
def test_the_smallest_tiers_pass(words):
    check_layers(composed(words), FACTS)


def test_every_field_is_set_from_the_command_line(tmp_path):
    words = ["offload.device_tok=8192.0", "offload.policy=lru", "offload.format=fp8"]
    assert compose([*HOST, *words]).offload == Offload("host", device_tok=8192, policy="lru", format="fp8")
    words = ["offload.device_tok=null", "offload.device_bytes=64e6", "offload.host_tok=null", "offload.host_bytes=2e9"]
    more = ["offload.disk_bytes=1e12", f"offload.disk_dir={tmp_path}", "offload.prefill_bytes=1e9"]
    assert compose([*DISK, *words, *more]).offload == Offload(
        "disk",
        device_bytes=64_000_000,
        host_bytes=2_000_000_000,
        disk_bytes=10**12,
        disk_dir=str(tmp_path),
        prefill_bytes=10**9,
    )
    assert compose(["offload=none", "+pipeline=3stage"]).offload == Offload()


@pytest.mark.parametrize("name", ["1stage", "2stage", "3k_5k", "3stage", "3stage_fast", "3stage_flash", "3stage_scan", "5k", "streaming"])
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_the_defaults_are_large_enough_for_the_presets(name, offload):
    check_model(compose([f"+pipeline={name}", f"offload={offload}"]))


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr("hipexp.config.offload.os.access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"offload\.disk_dir=.* must be a folder that can be written to"):
        compose([*DISK, f"offload.disk_dir={tmp_path}"])


def test_the_model_has_to_say_how_large_its_heads_are(model_path):
    with pytest.raises(ConfigError, match=r"offload=host has to know how large keys and values are.* must give num_attention_heads"):
        check_model(compose([*HOST, *model_path]))


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({"num_attention_heads": 8, "hidden_size": 512}, (8, 64, 4)),
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512, "dtype": "bfloat16"}, (2, 64, 2)),
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "torch_dtype": "float16"}, (2, 128, 2)),
    ],
)
def test_the_size_of_heads_comes_from_the_model(tmp_path, config, facts):
    base = {"num_hidden_layers": 5, "max_position_embeddings": 6144}
    words = ["model=hf", f"model.path={tmp_path}"]
    for told in (base | config, {"text_config": base | config}, {"text_config": base | config | {"dtype": None}, **config}):
        (tmp_path / "config.json").write_text(json.dumps(told))
        assert check_model(compose(words)) == ModelFacts(5, 6144, *facts)
    assert check_model(compose([*words, "model.dtype=bfloat16"])).itemsize == 2


def test_sizes_in_bytes_are_shared_by_the_layers():
    experiment = compose([*DISK, "offload.device_tok=null", f"offload.device_bytes={5 * TOKEN * 10_000 + 3}", "offload.format=int8"])
    told = sizes(experiment.offload, plans_of(experiment), FACTS)
    assert (told.device_tok, told.host_tok, told.disk_tok, told.page_tok) == (10_000, 262_144, None, 64)
    assert (told.token_bytes, told.page_bytes) == (TOKEN, 2 * 2 * 64 * 66)
    page = 5 * 2 * 2 * page_bytes("int8", 64, 64, 4)
    limited = replace(experiment.offload, host_tok=None, host_bytes=3 * page - 1, disk_bytes=7 * page)
    told = sizes(limited, plans_of(experiment), FACTS)
    assert (told.host_tok, told.disk_tok) == (2 * 64, 7 * 64)
    assert sizes(Offload("host", device_tok=9000), plans_of(experiment), FACTS).disk_tok == 0


def fits(words, context_tok, rows=1, host=None, disk=None):
    experiment = compose(words)
    check_fits(experiment.offload, plans_of(experiment), FACTS, context_tok, rows, Room(host, disk))


MILLION = 1 << 20
ALL = MILLION * TOKEN * 5  # bytes of a million tokens


def test_what_fits_to_the_last_byte_is_not_refused():
    fits(HOST, MILLION, host=ALL)
    fits(HOST, MILLION, rows=2, host=2 * ALL)
    fits([*HOST, f"offload.host_tok={MILLION}"], MILLION)
    fits(DISK, MILLION, host=ALL // 4, disk=ALL * 3 // 4)
    fits([*DISK, f"offload.disk_tok={MILLION - 262144}"], MILLION)
    fits(HOST, MILLION)  # nobody knows what there is
    fits(DISK, 262144, host=ALL // 4, disk=0)


NO_ROOM = {
    "host memory": (
        (HOST, MILLION, 1, ALL - 1, None),
        "offload=host: a context of 1048576 tokens must fit, and 5 layers would take 5.0 GiB of host memory (offload.format=auto), where "
        "5.0 GiB can be had; try offload.format=bf16 or a disk tier (offload=disk) or a context of at most 1048512 tokens",
    ),
    "only int4 is small enough": ((HOST, MILLION, 1, ALL // 5, None), "try offload.format=int4 or a disk tier"),
    "no format is": (
        (HOST, MILLION, 1, ALL // 100, None),
        "where 51 MiB can be had; try a disk tier (offload=disk) or a context of at most",
    ),
    "nothing is left": ((HOST, MILLION, 1, -5, None), "where 0 bytes can be had; try a disk tier (offload=disk) or a smaller model"),
    "several at once": (
        ([*HOST, "task.batch=2"], MILLION, 2, ALL, None),
        "offload=host: 2 contexts (task.batch) of 1048576 tokens must fit, and 5 layers would take 10.0 GiB of host memory",
    ),
    "too large a share in memory": (
        (DISK, MILLION, 1, 2**30, 2**40),
        "try offload.format=bf16 or a smaller offload.host_tok or a context of",
    ),
    "disk": (
        (DISK, MILLION, 1, ALL, ALL // 2),
        "5 layers would take 3.8 GiB of disk in offload.disk_dir=. (offload.format=auto), where 2.5 GiB can be had; try offload.format=bf16 "
        "or a folder on a larger disk or a context of at most 786432 tokens",
    ),
    "a limit": (
        ([*HOST, "offload.host_tok=262144"], MILLION, 1, None, None),
        "offload=host: a context of 1048576 tokens must fit, but offload.host_tok=262144 has room for 262144 tokens and there is no disk "
        "tier; raise it, add one with offload.disk_dir=<folder>, or use offload.host_tok=null",
    ),
    "a limit in bytes": (
        ([*HOST, f"offload.host_bytes={ALL // 4}"], MILLION, 1, None, None),
        f"offload.host_bytes={ALL // 4} has room for 262144 tokens and there is no disk tier",
    ),
    "limits of both": (
        ([*DISK, "offload.disk_tok=524288"], MILLION, 1, None, None),
        "offload.host_tok=262144 has room for 262144 tokens and offload.disk_tok=524288 for 524288; raise one of them, or use "
        "offload.disk_tok=null",
    ),
}


@pytest.mark.parametrize("case, message", NO_ROOM.values(), ids=NO_ROOM)
def test_a_context_that_fits_in_no_tier_is_refused(case, message):
    with pytest.raises(ConfigError) as caught:
        fits(*case)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_pages_are_counted():
    experiment = compose(DISK)
    told = sizes(replace(experiment.offload, host_tok=128), plans_of(experiment), FACTS)
    assert needs(told, 129, 3) == (3 * 128 * TOKEN * 5, 3 * 64 * TOKEN * 5)
    assert needs(told, 65, 1) == (128 * TOKEN * 5, 0)


def test_available_memory_is_the_least_that_the_system_names(tmp_path):
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    assert available_bytes(meminfo, group) is None
    meminfo.write_text("MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\nHugePages_Total:       0\n")
    assert available_bytes(meminfo, group) == 8_000_000 * 1024
    group.mkdir()
    for name, text in {"max": "max\n", "current": "5000000\n", "stat": "anon 4000000\ninactive_file 1000000\n"}.items():
        (group / f"memory.{name}").write_text(text)
    assert available_bytes(meminfo, group) == 8_000_000 * 1024
    (group / "memory.max").write_text("6000000\n")
    assert available_bytes(meminfo, group) == 2_000_000
    meminfo.write_text("MemTotal:       16000000 kB\n")
    assert available_bytes(meminfo, group) is None


def test_a_tenth_of_the_memory_is_left_and_what_is_promised(monkeypatch, tmp_path):
    monkeypatch.setattr("hipexp.config.offload.available_bytes", lambda: 1000)
    assert room_for(Offload("host"), 200) == Room(700, None)
    disk = room_for(Offload("disk", disk_dir=str(tmp_path)))
    assert disk.host_bytes == 900 and disk.disk_bytes is not None
    monkeypatch.setattr("hipexp.config.offload.available_bytes", lambda: None)
    assert room_for(Offload("host"), 200) == Room(None, None)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_this_machine_says_what_it_has():
    assert 0 < available_bytes() < 1 << 50


def test_bytes_in_words():
    assert [show_bytes(size) for size in (0, 1023, 2048, 3 << 20, 5 << 30)] == ["0 bytes", "1023 bytes", "2 KiB", "3 MiB", "5.0 GiB"]


def test_the_strategy_says_where_keys_and_values_are():
    def told(*words):
        experiment = compose(["+pipeline=streaming", *words])
        return describe(experiment.pipeline, 5, experiment.offload)

    assert len(told("offload=none")) == 2
    assert told("offload=host")[2:] == [
        "keys and values: all in host memory, in the model's own format; on the device 16384 tokens a layer, clock decides which"
    ]
    words = ["offload.device_tok=null", "offload.device_bytes=67108864", "offload.format=fp8", "offload.policy=lru"]
    assert told("offload=disk", *words, "offload.prefill_bytes=1073741824")[2:] == [
        "keys and values: 262144 tokens a layer in host memory, the rest on disk (as much as there is), in fp8; on the device 64 MiB for all "
        "layers, lru decides which; prompts of up to 1.0 GiB a layer are read layer by layer"
    ]


@pytest.mark.parametrize(("word", "value"), [("true", True), ("True", True), ("1", True), ("false", False), ("False", False), ("0", False)])
def test_truth_is_understood_as_sweep_agents_print_it(word, value):
    assert compose([*HOST, f"offload.prefetch={word}", f"pipeline.late_refresh={word}"]).offload.prefetch is value
    assert compose([*HOST, f"pipeline.late_refresh={word}"]).pipeline.late_refresh is value


def test_int4_wants_groups_of_four(tmp_path):
    with pytest.raises(ConfigError, match="its dimension must be a multiple of 4, and this model's is 6; use int8"):
        check_layers(composed(["offload.format=int4"]), replace(FACTS, head_dim=6))
    check_layers(composed([]), replace(FACTS, head_dim=6))


def test_a_disk_of_which_nothing_is_needed_may_be_full(tmp_path):
    one = compose([*DISK, f"offload.disk_dir={tmp_path}"])
    check_fits(one.offload, plans_of(one), FACTS, 262144, 1, Room(1 << 40, 0))
    with pytest.raises(ConfigError, match=r"disk in offload\.disk_dir="):
        check_fits(one.offload, plans_of(one), FACTS, 262144 + 1, 1, Room(1 << 40, 0))


def test_of_a_small_disk_a_tenth_is_spared(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=200_000_000))
    assert room_for(compose([*DISK, f"offload.disk_dir={tmp_path}"]).offload).disk_bytes == 180_000_000
