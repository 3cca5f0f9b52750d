"""Models of real architectures with two layers and random weights."""

from hipexp.hf.families import Family, make


def tiny(config, attention="eager", **changes):
    """``config``: name of its class in transformers."""
    return make(Family(config, {"vocab_size": 256, "num_hidden_layers": 2, **changes}, (), attention))
