"""Quantised checkpoints: transformers loads them, with packages of its own choice; what hipexp has to know of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from hipexp.config.schema import ConfigError

# What transformers 5.16 to 5.24 asks for, by its `quantizers/quantizer_*.py`: named where loading fails, never checked before.
PACKAGES = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto-round",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "eetq": ("kernels",),
    "fp8": ("kernels",),
    "gptq": ("optimum", "gptqmodel"),
    "hqq": ("hqq",),
    "mxfp4": ("kernels",),
    "mxfp8": ("kernels",),
    "quanto": ("optimum-quanto",),
    "quark": ("amd-quark",),
    "spqr": ("spqr_quant",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are stored: ``method`` as transformers calls it, ``bits`` of a weight (None: not said)."""

    method: str
    bits: int | None = None

    def __str__(self) -> str:
        return self.method if self.bits is None else f"{self.method}, {self.bits} bits"

    @property
    def missing(self) -> list[str]:
        """The packages that transformers needs for it and that are not installed."""
        return [name for name in ("accelerate", *PACKAGES.get(self.method, ())) if not _installed(name)]

    def refusal(self, path: str, why: str) -> ConfigError:
        """What to tell of a checkpoint at ``path`` that cannot be loaded, and ``why`` by transformers' own words."""
        names = " ".join(self.missing)
        repair = f"missing: {', '.join(self.missing)}; install with `pip install {names}`, or take" if names else "take"
        return ConfigError(
            f"model.path={path} has quantised weights ({self}), which transformers cannot load here: {why.rstrip('.')}; {repair} the "
            "checkpoint that is not quantised"
        )


def quantization_of(config: PretrainedConfig, path: str) -> Quantization | None:
    """How the weights of the checkpoint at ``path`` are stored; None: as they are computed with.

    Raises ConfigError for a method that transformers does not know, under which it would go on without the stored weights.
    """
    told = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    if told is None:
        return None
    told = told if isinstance(told, dict) else told.to_dict()
    loads = [bits for bits in (4, 8) if told.get(f"load_in_{bits}bit")]
    method = "bitsandbytes" if loads else str(told.get("quant_method"))
    found = Quantization(method, loads[0] if loads else _bits(told))
    if method == "None" or not AutoHfQuantizer.supports_quant_method(told):
        known = f"none that transformers {transformers.__version__} knows"
        raise found.refusal(path, f"quantization_config.quant_method={told.get('quant_method')} in its config.json is {known}")
    return found


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether a model computes with quantised weights; no longer, if transformers dequantised them while it loaded."""
    return bool(getattr(model, "is_quantized", False))


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The number format of activations, so of keys and values: that of the first weights that are not stored in a byte or less."""
    return next(weight.dtype for weight in model.parameters() if weight.is_floating_point() and weight.dtype.itemsize > 1)


def _bits(told: dict[str, Any]) -> int | None:
    """Bits of a weight, where a method says them: gptq, awq, auto-round; hqq; compressed-tensors if all its groups have the same."""
    groups = [group.get("weights") or {} for group in (told.get("config_groups") or {}).values() if isinstance(group, dict)]
    hqq = (told.get("quant_config") or {}).get("weight_quant_params") or {}
    found = {told.get("bits"), told.get("w_bit"), hqq.get("nbits"), *(group.get("num_bits") for group in groups)} - {None}
    return found.pop() if len(found) == 1 else None


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
