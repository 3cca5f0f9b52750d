"""Where Triton kernels are tested: on the GPU, or without one in Triton's interpreter (which multiplies bfloat16 wrongly).

Import this before anything that imports Triton.
"""

import os
from importlib.util import find_spec

import pytest
import torch

HAS_TRITON = find_spec("triton") is not None
ON_GPU = torch.cuda.is_available()


def _mend_interpreter():
    """Loop bounds computed in a kernel: numpy 2.4 no longer makes ints of arrays of one element, as Triton 3.6 asks it to."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope, *rest):
        patch(tensor, scope, *rest)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if HAS_TRITON and not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated
    _mend_interpreter()

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not (HAS_TRITON and ON_GPU), reason="needs a GPU and Triton")


def on_device(x):
    """A call's arguments, tensors among them moved to the device of the test."""
    if isinstance(x, dict):
        return {name: on_device(value) for name, value in x.items()}
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x
