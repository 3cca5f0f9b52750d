"""What can go wrong where keys and values are off the device: told as a result, and the same command continues.

The embedded model, three samples; the second one meets the fault.
"""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch

import hipexp
from hipexp.cache import pool, tiers
from hipexp.config.compose import compose
from hipexp.run.ledger import Interrupted, RunFailed, read_json, read_rows
from hipexp.run.point import execute, folder_of
from hipexp.run.several import load_once

MODEL = Path(hipexp.__file__).parent / "needle" / "model"
pytestmark = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="the embedded model is not trained yet: make needle")
WORDS = [
    "+pipeline=2stage",
    "pipeline.stages=[{chunk_tok:32,keep_tok:256,query_block_tok:64,query_stride_tok:4,refresh_steps:8},"
    "{chunk_tok:8,keep_tok:128,query_block_tok:32,refresh_steps:4}]",
    "pipeline.sink_tok=32",
    "pipeline.window_tok=64",
    "task=passkey",
    "task.lengths_tok=[900]",
    "task.depths=[0.5]",
    "task.samples=3",
    "model.prefill_chunk_tok=256",
    "offload=disk",
    "offload.device_tok=512",
    "offload.host_tok=256",
]
load = load_once()


def answers(folder):
    return [(row["sample"], row["prediction"], row["score"]) for row in read_rows(folder)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The answers of a run that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIPEXP_RUNS", str(tmp_path_factory.mktemp("whole")))
        return answers(execute(compose([*WORDS, f"offload.disk_dir={tmp_path_factory.mktemp('disk')}"]), load))


def too_large(*_, **__):
    """More than any machine has: what torch's allocator says then."""
    return torch.empty(1 << 60, dtype=torch.uint8)


def refuse(number):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


def cut(file, more):
    """Somebody empties the file of a layer before it grows."""
    os.ftruncate(file.fileno(), 0)
    return RESERVE(file, more)


RESERVE, ALLOCATE = tiers.DiskFile.reserve, tiers.allocate
REPAIR = "set offload.disk_dir to a folder with more room, or choose a smaller offload.format; finished samples are kept"
FAULTS = {
    "no host memory": (
        (tiers, "allocate", lambda shape, dtype, pin=False: ALLOCATE((1 << 60,), dtype, pin)),
        *(MemoryError, "out_of_memory", r"the host tier could not get \d+ bytes .* make offload.host_tok smaller and give an offload.disk_dir"),
    ),
    "no memory on the device": ((pool, "Residency", too_large), RuntimeError, "out_of_memory", "allocate"),
    "full disk": ((os, "posix_fallocate", refuse(errno.ENOSPC)), RunFailed, "error", f"could not take .*No space left on device; .*{REPAIR}"),
    "quota": ((os, "posix_fallocate", refuse(errno.EDQUOT)), RunFailed, "error", f"could not take .*quota exceeded; .*{REPAIR}"),
    "cut file": ((tiers.DiskFile, "reserve", cut), RunFailed, "error", "was cut to 0 of .* run again, and leave the files .*; finished samples"),
    "stopped": ((tiers.Tiers, "write", lambda *_: signal.raise_signal(signal.SIGTERM)), Interrupted, "interrupted", "the same command continues"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_result_and_the_run_continues(fault, expected, monkeypatch, tmp_path):
    (owner, name, broken), error, kind, message = FAULTS[fault]
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "runs"))
    (disk := tmp_path / "disk").mkdir()
    one = compose([*WORDS, f"offload.disk_dir={disk}"])
    folder, whole = folder_of(one), getattr(owner, name)

    def call(*given, **named):
        meets_it = read_rows(folder) and (name != "reserve" or given[0].bytes > 0)  # an empty file cannot be cut
        return (broken if meets_it else whole)(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(error, match=message):
        patch.setattr(owner, name, call)
        execute(one, load)
    status, first = read_json(folder / "status.json"), read_rows(folder)
    assert (status["state"], status["class"], status["finished"], len(first)) == ("failed", kind, 1, 1)
    assert kind != "out_of_memory" or status["message"].endswith(
        "; try a shorter length, task.batch=1, or a smaller model.prefill_chunk_tok"
    )
    assert not any(str(disk) in os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    assert execute(one, load) == folder
    assert read_json(folder / "status.json")["state"] == "done"
    assert read_rows(folder)[:1] == first
    assert answers(folder) == expected
    assert read_json(folder / "summary.json")["traffic"]["decode"]["misses"] > 0
