"""The only importer of transformers: loading, installing a pipeline into a model, generating with it."""

from hipexp.hf.activations import activations
from hipexp.hf.install import install
from hipexp.hf.load import Loaded, end_tokens, load, load_tokenizer
from hipexp.hf.loop import Generation, generate
from hipexp.hf.sampling import Sampling

__all__ = ["Generation", "Loaded", "Sampling", "activations", "end_tokens", "generate", "install", "load", "load_tokenizer"]
