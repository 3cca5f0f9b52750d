"""The families of models that are known to fit, each as a checkpoint small enough to make: its real classes, random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hipexp.hf.kinds import FULL, SLIDING

LINEAR = "linear_attention"
SIZES = dict(
    vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, pad_token_id=0, eos_token_id=None, bos_token_id=None, tie_word_embeddings=False,
)  # fmt: skip
WINDOW_TOK = 40
MIXED = {"layer_types": [SLIDING, FULL, SLIDING, FULL], "sliding_window": WINDOW_TOK, "head_dim": 16}


@dataclass(frozen=True)
class Family:
    """``config``: the name of the configuration's class; ``sizes``: what is said besides ``SIZES``. ``presets``: options of ``model=``.

    ``attention``: the implementation without hipexp, where torch's own does not do what the model needs.
    """

    config: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    presets: tuple[str, ...] = ()
    attention: str = "sdpa"


def rope(kind: str, **values: Any) -> dict[str, Any]:
    """RoPE of a type, as configurations have it."""
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **values}}


LLAMA3 = rope("llama3", factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0)
LONGROPE = {
    "original_max_position_embeddings": 64,
    **rope("longrope", short_factor=[1.0] * 6, long_factor=[2.0 + 0.5 * i for i in range(6)], original_max_position_embeddings=64),
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GATED = dict(
    layer_types=[LINEAR, FULL, LINEAR, FULL], head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
    linear_value_head_dim=16, shared_expert_intermediate_size=32, **MOE,
)  # fmt: skip
SHARED = dict(
    num_hidden_layers=6, layer_types=[FULL, SLIDING, FULL, SLIDING, FULL, SLIDING], num_kv_shared_layers=2, sliding_window=WINDOW_TOK,
    head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=1024, altup_num_inputs=2, laurel_rank=8,
    intermediate_size=[96] * 6, activation_sparsity_pattern=[0.0] * 6,
)  # fmt: skip
BY_KIND = {
    "rope_parameters": {
        FULL: {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
    }
}
FAMILIES = {
    "Llama 3": Family("LlamaConfig", {}, ("llama3_8b",)),
    "Llama 3.1, 3.2 (RoPE llama3)": Family("LlamaConfig", LLAMA3, ("llama31_8b", "llama31_70b", "llama32_1b", "llama32_3b")),
    "Llama (linear RoPE)": Family("LlamaConfig", rope("linear", factor=4.0)),
    "Llama (YaRN)": Family("LlamaConfig", rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "Mistral 0.2": Family("MistralConfig", {"sliding_window": None}, ("mistral_7b_v02",)),
    "Qwen 2.5 (biases)": Family("Qwen2Config", {}, ("qwen25_7b", "r1_qwen_14b")),
    "Qwen 2.5 (windows in late layers)": Family(
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": WINDOW_TOK, "max_window_layers": 2}
    ),
    "Qwen 3 (QK norm)": Family("Qwen3Config", {"head_dim": 20}, ("qwen3_8b",)),
    "Qwen 3 MoE": Family("Qwen3MoeConfig", {"head_dim": 16, **MOE}, ("qwen3_30b_a3b",)),
    "Qwen 3-Next (linear attention)": Family("Qwen3NextConfig", GATED),
    "Gemma": Family("GemmaConfig", {"head_dim": 24}),
    "Gemma 2 (windows, soft cap)": Family("Gemma2Config", {**MIXED, "attn_logit_softcapping": 5.0}, ("gemma2_9b",), "eager"),
    "Gemma 3 (windows)": Family("Gemma3TextConfig", {**MIXED, **BY_KIND}, ("gemma3_1b", "gemma3_12b")),
    "Gemma 3n (shared keys)": Family("Gemma3nTextConfig", SHARED),
    "EXAONE 4 (windows, full layers without RoPE)": Family("Exaone4Config", MIXED, ("exaone4_32b",)),
    "Phi-3, Phi-4-mini (longrope, partial RoPE)": Family(
        "Phi3Config", {"sliding_window": 262144, "partial_rotary_factor": 0.75, **LONGROPE}, ("phi3_mini_128k", "phi4_mini")
    ),
    "Phi-4": Family("Phi3Config", {"sliding_window": None}, ("phi4_14b",)),
    "OLMo 2": Family("Olmo2Config", {}),
    "OLMo 3 (windows)": Family("Olmo3Config", MIXED),
    "SmolLM 3 (layers without RoPE)": Family("SmolLM3Config", {"no_rope_layers": [1, 1, 1, 0]}),
    "Granite": Family("GraniteConfig", {"attention_multiplier": 0.3}),
    "StableLM (partial RoPE)": Family("StableLmConfig", {}),
}


def make(family: Family, seed: int = 0) -> PreTrainedModel:
    """A checkpoint of a family, in fp32. Weights are so large that attention is far from even."""
    torch.manual_seed(seed)
    config = getattr(transformers, family.config)(**{**SIZES, **family.sizes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=family.attention).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.15)
    return model
