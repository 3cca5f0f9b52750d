"""Bytes of tensors that are alive, by watching every operation: exact on any device, and on ``meta``, where nothing is computed."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import ref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside the context, ``live``: bytes of the tensors that were made in it and are not gone, ``peak``: the most there were.

    Views count with what they are views of, what was there before does not. What an operation allocates for itself and frees before it
    returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._see((args, kwargs), made=False)
        with self:
            out = function.decompose(*args, **kwargs)
        if out is NotImplemented:
            out = function(*args, **kwargs)
        self._see(out, made=True)
        return out

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def _see(self, values: Any, made: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    n = storage.nbytes() if made else 0
                    self._known[key] = ref(storage, partial(self._gone, key, n))
                    self.live += n
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int, n: int, _: Any) -> None:
        del self._known[key]
        self.live -= n
