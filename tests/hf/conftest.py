"""A tiny random Llama: real classes, no weights to download."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hipexp.config.schema import LayerGroup, Pipeline, PruneRope, Representative, RopeOverride, Stage
from hipexp.hf import Loaded


@pytest.fixture(scope="session")
def loaded():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=512, initializer_range=0.15, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return Loaded(LlamaForCausalLM(config).eval(), None, 512, 4, "float32")


@pytest.fixture
def pipeline():
    stages = [Stage(64, 512, 64, 4, 16), Stage(16, 256, 64, 4, 8), Stage(8, 128, 64, 1, 4)]
    early = LayerGroup("0-1", rope=RopeOverride(prune=PruneRope.chunk_indexed))
    return Pipeline(stages=stages, sink_tok=16, window_tok=128, layers={"early": early})


@pytest.fixture(params=list(Representative))
def any_pipeline(request, pipeline):
    """``pipeline`` with its first stage scored in every way."""
    pipeline.stages[0].representative = request.param
    return pipeline


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(3, 256, (1400,), generator=torch.Generator().manual_seed(1)).tolist()
