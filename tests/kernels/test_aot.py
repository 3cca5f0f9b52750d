"""Every kernel compiles for GPUs that are not here, and needs no more there than is on record."""

import os
import subprocess
import sys

import pytest

from triton_device import needs_triton

pytestmark = needs_triton
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
}  # kernels are decorated for one or the other


def compiled(*words):
    done = subprocess.run([sys.executable, "-m", "hipexp_kernels.aot", *words], env=ENVIRONMENT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_common_geometries(target):
    code, table, said = compiled("--common", target)
    assert code == 0, said
    assert table.count("| bf16 d64 G4 | ") == table.count("| bf16 d128 G4 | ") - 7 - 6 == 6 + 2 + 19 + 1 + 1
    # keep_top is the same for both, and one of them stands for paged keys


@pytest.mark.slow
def test_all():
    code, _, said = compiled()
    assert code == 0, said


def test_what_is_worse_is_said():
    from hipexp_kernels import aot

    table = {("bf16 d64 G4", "merge_lse"): {"sm_90": aot.Needs(100, 0, 1000), "sm_80": aot.Needs(90, 8, 0)}}
    assert aot.recorded(aot.rendered(table)) == (aot.triton.__version__, table)
    assert aot.faults(table, table) == []
    worse = {("bf16 d64 G4", "merge_lse"): {"sm_90": aot.Needs(111, 4, 1100), "sm_80": aot.Needs(99, 9, 1), "gfx942": aot.Needs(1, 0, 0)}}
    rare = {("fp32 d128 G4", "merge_lse"): {"sm_90": aot.Needs(100, 8, 1000)}}
    assert aot.faults(rare, rare) == aot.spills(rare) == aot.spills(table) == []
    assert aot.too_large(worse) == []
    large = {("fp32 d128 G4", "merge_lse"): {"sm_89": aot.Needs(1, 0, (99 << 10) + 1), "sm_90": aot.Needs(1, 0, (99 << 10) + 1)}}
    assert aot.too_large(large) == ["fp32 d128 G4, merge_lse, sm_89: 101377 bytes of shared memory, of 101376"]
    assert aot.spills(worse) == ["bf16 d64 G4, merge_lse, sm_90: 4 bytes of registers are spilled"]
    assert aot.faults(worse, table) == [
        "bf16 d64 G4, merge_lse, sm_90: registers were 100, are 111",
        "bf16 d64 G4, merge_lse, sm_90: spilled were 0, are 4",
        "bf16 d64 G4, merge_lse, sm_80: spilled were 8, are 9",
        "bf16 d64 G4, merge_lse, sm_80: shared were 0, are 1",
        "bf16 d64 G4, merge_lse, gfx942: not on record; run `python -m hipexp_kernels.aot --record`",
    ]
