"""Decode steps that are recorded once and replayed: as CUDA graphs on a GPU, else by a recorder of what a graph would hold."""

import dataclasses
from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hipexp.config.schema import Heads, LayerGroup, Pipeline, Representative, Stage, StageOverride
from hipexp.hf import generate, install
from hipexp.hf.cache import SequenceCache
from hipexp.hf.graphs import GraphedSteps, record_cuda, steps_until_recorded
from hipexp.hf.loop import prefill
from hipexp.hf.sampling import Sampling
from triton_device import DEVICE, ON_GPU

KERNELS = ("attend_blocks", "keep_top", "score_chunks", "summarize")
NO_WORK = ("empty", "new_empty", "detach", "alias")
WAITS = ("item", "_local_scalar_dense", "nonzero", "lift_fresh", "unique", "masked_select", "_to_copy")  # for the device, or brings things there


class Recorder(TorchDispatchMode):
    """What a CUDA graph would hold: every operation with the memory it read and wrote; one of hipexp's kernels counts as one."""

    def __init__(self):
        super().__init__()
        self.calls, self.inside = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        out = func(*args, **kwargs)
        if self.inside or func.is_view or name.startswith(NO_WORK):
            return out
        if name.startswith(WAITS) or not isinstance(out, (torch.Tensor, tuple, list)):
            raise RuntimeError(f"{name} cannot be recorded")
        return self.keep(func, args, kwargs, out)

    def keep(self, call, args, kwargs, out):
        """Note a call, to be made again with what it put out where that is now."""

        def again():
            found = call(*args, **kwargs)
            for old, new in zip(*((x if isinstance(x, (tuple, list)) else [x]) for x in (out, found)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.calls.append(again)
        return out


class Record:
    """Records and replays on a CPU, and counts both."""

    def __init__(self, monkeypatch):
        self.now, self.graphs, self.replays = None, 0, 0
        for op in KERNELS:
            monkeypatch.setattr(import_module(f"hipexp_kernels.{op}"), "choose", lambda _, known, device=None: self.kernel(known["vectorized"]))

    def kernel(self, run):
        """One of ours, which on a CPU may look at numbers; on a GPU its like would not."""

        def called(*args, **kwargs):
            if "held" in kwargs:
                kwargs["held"] = None
            if self.now is None:
                return run(*args, **kwargs)
            self.now.inside = True
            out = run(*args, **kwargs)
            self.now.inside = False
            return self.now.keep(run, args, kwargs, out)

        return called

    def __call__(self, run):
        self.now = recorder = Recorder()
        try:
            with recorder:
                out = run()
        finally:
            self.now = None
        self.graphs += 1

        def replay():
            self.replays += 1
            for call in recorder.calls:
                call()

        return out, replay


@pytest.fixture
def record(monkeypatch):
    return record_cuda if ON_GPU else Record(monkeypatch)


@pytest.fixture
def model(loaded):
    """The tiny model where Triton runs."""
    yield dataclasses.replace(loaded, model=loaded.model.to(DEVICE))
    loaded.model.cpu()


@pytest.fixture
def by_graphs(monkeypatch, record):
    """``run(…, graphs)``: generate with graphs or without; room behind the tokens so far holds numbers that nobody may use."""
    from hipexp.cache.resident import ResidentStore

    of, reserve = GraphedSteps.of, ResidentStore.reserve

    def ruined(self, tokens, like):
        reserve(self, tokens, like)
        for room in self.room:
            room[:, self.length :] = float("nan")

    monkeypatch.setattr(ResidentStore, "reserve", ruined)
    monkeypatch.setattr(GraphedSteps, "of", lambda model, installed, caches: of(model, installed, caches, record))

    def run(model, pipeline, prompts, graphs, n=40, **more):
        with install(model.model, pipeline) as installed:
            made = generate(model, prompts, max_new_tok=n, prefill_chunk_tok=512, installed=installed, graphs=graphs, **more)
            return [(one.tokens, one.exact) for one in made], installed.pruned_blocks

    return run


def plus(pipeline):
    """As ``3stage_plus`` does it: landmarks, a list for each head, layers that refresh in turns."""
    first, second, third = pipeline.stages
    stages = [
        dataclasses.replace(first, representative=Representative.bounds, refresh_steps=8),
        dataclasses.replace(second, representative=Representative.bounds, refresh_steps=4),
        dataclasses.replace(third, representative=Representative.exact, refresh_steps=2),
    ]
    return dataclasses.replace(pipeline, stages=stages, heads=Heads.per_kv, staggered_refresh=True)


def scan(pipeline):
    """As ``4stage_scan`` does it: two levels of landmarks."""
    first = Stage(128, 1024, 64, 4, 16, representative=Representative.bounds, piece_tok=128)
    second = dataclasses.replace(pipeline.stages[0], representative=Representative.bounds, piece_tok=32)
    return dataclasses.replace(pipeline, stages=[first, second, *pipeline.stages[1:]], window_tok=256)


def streaming(pipeline):
    return Pipeline(method="streaming", stages=[], sink_tok=16, window_tok=128, layers={})


@pytest.mark.device
@pytest.mark.parametrize("change", [lambda p: p, plus, scan, streaming], ids=["3stage", "3stage_plus", "4stage_scan", "streaming"])
def test_graphs_give_the_same_tokens(model, pipeline, tokens, by_graphs, record, change):
    """Lists that stay and lists made anew, landmarks of pieces that are completed meanwhile, keys written where the device says."""
    prompts = [tokens[:700]]
    expected = by_graphs(model, change(pipeline), prompts, False, n=60)
    assert by_graphs(model, change(pipeline), prompts, True, n=60) == expected
    if not ON_GPU:
        assert record.replays > 20 and record.graphs > 0


@pytest.mark.device
def test_sequences_of_a_batch_have_graphs_together(model, pipeline, tokens, by_graphs, record):
    """Until one of them stops: then the others have graphs of their own. Chosen by chance, each has its own luck."""
    prompts, sampling = [tokens[:700], tokens[3:1000]], [Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, seed=2)]
    first = by_graphs(model, plus(pipeline), prompts, False, n=1, sampling=sampling)[0][0][0][0]
    more = dict(n=90, sampling=sampling, ended=lambda made: len(made) == 45 and made[0] == first)
    expected = by_graphs(model, plus(pipeline), prompts, False, **more)
    assert [len(made) for made, _ in expected[0]] == [45, 90]
    assert by_graphs(model, plus(pipeline), prompts, True, **more) == expected
    if not ON_GPU:
        assert record.replays > 20


@pytest.mark.device
@pytest.mark.parametrize("length", [253, 254, 255])
def test_lists_that_outgrow_their_place_are_not_read_any_more(model, pipeline, tokens, by_graphs, record, length):
    """Some layers are pruned before others, so before graphs begin: their lists become longer once they are made for all the room there is."""
    stages = [Stage(64, 4096, 64, 4, 64), Stage(16, 1024, 64, 4, 8), Stage(8, 64, 64, 1, 4)]
    early = LayerGroup("0-1", stages={"2": StageOverride(keep_tok=128)})
    pipeline = dataclasses.replace(pipeline, stages=stages, layers={"early": early})
    expected = by_graphs(model, pipeline, [tokens[:length]], False, n=140)
    assert by_graphs(model, pipeline, [tokens[:length]], True, n=140) == expected
    if not ON_GPU:
        assert record.replays > 20


@pytest.mark.device
def test_a_sequence_is_recorded_once_it_is_pruned(model, pipeline, tokens, by_graphs, record):
    expected = by_graphs(model, pipeline, [tokens[:260]], False)
    assert by_graphs(model, pipeline, [tokens[:260]], True) == expected
    assert not expected[0][0][1]
    if not ON_GPU:
        graphs = record.graphs
        assert graphs > 0
        assert by_graphs(model, pipeline, [tokens[:100]], True)[0][0][1]
        assert record.graphs == graphs


def test_a_step_that_cannot_be_recorded_runs_as_it_is(loaded, pipeline, tokens, by_graphs, record, monkeypatch, caplog):
    expected = by_graphs(loaded, pipeline, [tokens[:700]], False)
    monkeypatch.setattr(loaded.model.model.norm, "forward", lambda x, forward=loaded.model.model.norm.forward: forward(x) + float(x[0, 0, 0] * 0))
    found = by_graphs(loaded, pipeline, [tokens[:700]], True)
    assert found == expected and caplog.text.count("without CUDA graphs: item") == 1


def test_a_short_answer_pays_for_no_graph(loaded, pipeline, tokens, by_graphs, record):
    by_graphs(loaded, pipeline, [tokens[:700]], True, n=16)
    assert record.graphs == 0


@pytest.mark.parametrize("refresh", [(2, 2, 2), (8, 4, 2), (16, 8, 4), (24, 4, 2)])
def test_all_is_recorded_behind_the_steps_that_are_not_timed(loaded, pipeline, tokens, by_graphs, record, refresh):
    stages = [dataclasses.replace(stage, refresh_steps=steps) for stage, steps in zip(pipeline.stages, refresh, strict=True)]
    pipeline = dataclasses.replace(pipeline, stages=stages, staggered_refresh=True)
    warm = steps_until_recorded(refresh[0])
    assert warm % refresh[0] == 0
    by_graphs(loaded, pipeline, [tokens[:700]], True, n=warm + 1)
    graphs = record.graphs
    by_graphs(loaded, pipeline, [tokens[:700]], True, n=warm + 1 + 2 * refresh[0])
    assert record.graphs == 2 * graphs > 0


def test_a_token_past_the_room_is_refused(loaded, pipeline, tokens, record):
    with install(loaded.model, pipeline) as installed, torch.inference_mode():
        cache = SequenceCache(4, 700, decoding=False, new_store=installed.new_sequence())
        prefill(loaded.model, cache, tokens[:699], 512)
        steps = GraphedSteps.of(loaded.model, installed, [cache], record)
        steps.logits([1])
        with pytest.raises(ValueError, match="a token at position 700 is past the room of 700 tokens"):
            steps.logits([1])


def test_without_a_gpu_nothing_is_recorded(loaded, pipeline):
    with install(loaded.model, pipeline) as installed:
        assert GraphedSteps.of(loaded.model, installed, []) is None
        assert GraphedSteps.of(loaded.model, None, []) is None


@torch.inference_mode()
def test_tokens_per_second_of_a_whole_model(record, monkeypatch, loaded, pipeline):
    """The measurement runs here too, with a recorder in place of a GPU; no time is looked at."""
    from hipexp.run import decode_speed

    of = GraphedSteps.of
    monkeypatch.setattr(decode_speed, "record_cuda", record)
    monkeypatch.setattr(GraphedSteps, "of", lambda model, installed, caches: of(model, installed, caches, record))
    cache = decode_speed.filled(loaded.model, 1000, 1000 + 100)
    made = {"dense": decode_speed.dense_row(loaded.model, cache), "3stage": decode_speed.pipeline_row(loaded.model, cache, pipeline, 1)}
    assert made["3stage"]["steps"] == 16 and cache.get_seq_length() == 1000
    assert all(0 < row["p10_ms"] <= row["worst_ms"] and row["tokens_per_s"] == 1e3 / row["mean_ms"] for row in made.values())
    if not ON_GPU:
        assert record.replays >= 16  # all that are timed
        assert decode_speed.main([]) == 2


@pytest.mark.parametrize("change", [lambda p: p, plus], ids=["3stage", "3stage_plus"])
def test_what_cannot_be_recorded_goes_on_when_a_sequence_of_the_batch_stops(loaded, pipeline, tokens, by_graphs, monkeypatch, change):
    """Where its steps are is what the device reads, and landmarks have room for all that comes: so it is to stay."""
    prompts, sampling = [tokens[:700], tokens[3:1000]], [Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, seed=2)]
    first = by_graphs(loaded, change(pipeline), prompts, False, n=1, sampling=sampling)[0][0][0][0]
    more = dict(n=90, sampling=sampling, ended=lambda made: len(made) == 45 and made[0] == first)
    expected = by_graphs(loaded, change(pipeline), prompts, False, **more)
    assert [len(made) for made, _ in expected[0]] == [45, 90]
    norm = loaded.model.model.norm
    monkeypatch.setattr(norm, "forward", lambda x, forward=norm.forward: forward(x) + float(x[0, 0, 0] * 0))
    assert by_graphs(loaded, change(pipeline), prompts, True, **more) == expected
