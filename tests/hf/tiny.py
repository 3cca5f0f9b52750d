"""Models of real architectures with few layers and random weights."""

import torch
import transformers as tf


def tiny(config, attention="eager", **changes):
    """A model of two layers; ``config``: name of its class in transformers."""
    sizes = dict(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(getattr(tf, config)(**{**sizes, **changes}), attn_implementation=attention).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def rope(kind, **values):
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **values}}
