"""The probes of a GPU run do what they say, with little to do in Triton's interpreter, and compile for a GPU. No test looks at a time."""

import os
import subprocess
import sys

import pytest
import torch

import triton_device

pytestmark = triton_device.needs_triton

SMALL = {
    "link": (1 << 20,),
    "pinned_gathers": (1 << 22, 1 << 14),
    "launches": (),
    "grid_barrier": (),
    "cached_reads": (1 << 16, 3),
    "selections": (),
}
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hipexp.run import probes
options = {"_add_one_chained": {"launch_pdl": True}, "_barriers": {"launch_cooperative_grid": True}}
types = {"x": "*fp32", "out": "*fp32", "arrived": "*i32", "n": "i32", "rounds": "i32"}
constants = {"LIMIT": 16384, "TILE": 1024}
for name in ("_add_one", "_add_one_chained", "_barriers", "_read"):
    kernel = getattr(probes, name)
    own = {key: value for key, value in constants.items() if key in kernel.arg_names}
    source = ASTSource(kernel, {key: types.get(key, "constexpr") for key in kernel.arg_names}, own)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options.get(name, {}))
    print(name, "griddepcontrol.wait" in compiled.asm["ptx"], compiled.metadata.launch_cooperative_grid)
"""


@pytest.mark.parametrize("name", SMALL)
def test_every_probe_runs(name, monkeypatch):
    from hipexp.run import probes

    monkeypatch.setattr(probes, "REPEATS", 1)
    assert {probe.__name__ for probe in probes.PROBES} == set(SMALL)
    rows = getattr(probes, name)(triton_device.DEVICE, *SMALL[name])
    assert rows and all(set(row) == {"what", "value", "unit"} for row in rows)
    assert all(row["value"] > 0 for row in rows if row["unit"] != "us")  # differences of times on a busy machine may be anything
    assert len({row["what"] for row in rows}) == len(rows)


def test_a_chain_that_loses_launches_is_no_result(monkeypatch):
    from hipexp.run import probes

    monkeypatch.setattr(probes, "captured", lambda call, device: lambda: None)
    with pytest.raises(RuntimeError, match="100 launches in a chain added 0"):
        probes.launches(triton_device.DEVICE)


def test_a_graph_that_does_nothing_is_seen(monkeypatch):
    from hipexp.run import probes

    monkeypatch.setattr(probes, "REPEATS", 1)
    monkeypatch.setattr(probes, "captured", lambda call, device: lambda: None)
    assert probes.pinned_gathers(triton_device.DEVICE, *SMALL["pinned_gathers"])[-1]["value"] is False


def test_a_barrier_that_failed_once_is_seen(monkeypatch):
    from hipexp.run import probes

    class Failing:
        def __getitem__(self, grid):
            return lambda arrived, n, **_: arrived[1].fill_(1) if n > 1 else None

    monkeypatch.setattr(probes, "_barriers", Failing())
    with pytest.raises(RuntimeError, match="a program waited in vain"):
        probes.grid_barrier(triton_device.DEVICE)


def test_they_compile_for_a_gpu():
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["_add_one False False", "_add_one_chained True False", "_barriers False True", "_read False False"]


@pytest.mark.skipif(triton_device.ON_GPU, reason="a GPU runs both programs at once, so that the barrier is full")
def test_a_barrier_that_is_never_full_ends():
    """With two programs, of which the interpreter runs one after the other."""
    from hipexp.run import probes

    arrived = torch.zeros(2, dtype=torch.int32)
    probes._barriers[(2,)](arrived, 2, LIMIT=5)
    assert arrived.tolist() == [4, 1]
