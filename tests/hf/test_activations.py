"""Queries and keys before rotation, of a model that reads densely."""

import torch

from hipexp.hf import activations


def test_they_are_the_projections_of_the_untouched_model(loaded, tokens):
    model, heard = loaded.model, {}
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(lambda _, __, out, at=(i, name): heard.setdefault(at, out[0]))
        for i, layer in enumerate(model.model.layers)
        for name in ("q_proj", "k_proj")
    ]
    with torch.inference_mode():
        model(torch.tensor([tokens[:300]]))
    for hook in hooks:
        hook.remove()
    found = activations(loaded, tokens[:300])
    assert set(found) == {0, 1, 2, 3}
    for i, (q, k) in found.items():
        torch.testing.assert_close(q.transpose(0, 1).flatten(1), heard[i, "q_proj"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(k.transpose(0, 1).flatten(1), heard[i, "k_proj"], atol=1e-4, rtol=1e-4)
