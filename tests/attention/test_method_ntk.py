"""Dynamic NTK against a plain statement (YaRN, arXiv 2309.00071, section 3), one query at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import brute
from hipexp.attention import LayerAttention
from watched import SCALE, WIDTHS, Layer, plan, softmax, texts

BASE, FACTOR = 10_000.0, 1.1  # an attention factor, as YaRN's tables have one


def power(half):
    """What RoPE was made with: powers of a base."""
    return BASE ** -(np.arange(half) / half)


def bent(half):
    """As llama3 scales: fast angles as they are, slow ones an eighth."""
    return np.where(np.arange(half) < half / 2, 1, 1 / 8) * power(half)


def length(p, trained):
    """How long the text counts for the query at ``p``: blocks of 256 from the trained length on."""
    return trained if p < trained else trained + 256 * ((p - trained) // 256 + 1)


def bent_by(x, at, angles):
    return brute.turned(x, FACTOR * np.exp(1j * np.asarray(at)[..., None] * angles))


def attend(query, keys, values, p, angles, softcap):
    """The output of the query at ``p`` over all ``keys`` up to it, with angles of a token made for this length."""
    x = bent_by(keys[: p + 1], np.arange(p + 1), angles) @ bent_by(query, p, angles) * SCALE
    return softmax(x, softcap) @ values[: p + 1]


@pytest.mark.parametrize("made", [power, bent])
@given(
    data=st.data(), text=texts(20, 700, widths=[(D, rotary) for D, rotary in WIDTHS if rotary > 2], trained=(7, 100, 256, 300, 4096)),
    softcap=st.sampled_from([None, 2.0]),
)  # fmt: skip
@settings(max_examples=15)
def test_angles_shrink_with_the_length(made, data, text, softcap):
    trained, rotary, half, T = text.trained, text.rotary, text.rotary // 2, text.q.shape[1]
    angles = made(half)

    def cos_sin(positions):
        angle = torch.from_numpy(positions.numpy()[:, None] * angles)
        return (FACTOR * angle.cos()).float(), (FACTOR * angle.sin()).float()

    one = Layer(plan("ntk"), text, softcap, cos_sin=cos_sin).read_all()
    assert one.attention.pruned_blocks == max(0, T - trained)
    drawn = data.draw(st.sets(st.integers(0, T - 1), max_size=8))
    for p in drawn | {i for i in (0, trained - 1, trained, trained + 255, trained + 256, *range(text.prompt, T)) if i < T}:
        stretch = length(p, trained) / trained
        slowed = [angle / stretch ** (i / (half - 1)) for i, angle in enumerate(angles)]  # the first as it is, the last by all of it
        if made is power:  # the same by the formula: another base
            base = BASE * stretch ** (rotary / (rotary - 2))
            np.testing.assert_allclose(slowed, base ** (-2 * np.arange(half) / rotary))
        for h in range(len(text.q)):
            k, v = text.k[h // text.group], text.v[h // text.group]
            np.testing.assert_allclose(one.out[h, p], attend(text.q[h, p], k, v, p, np.array(slowed), softcap), atol=3e-5)


def test_a_layer_without_rope_is_dense():
    q, k, v = (torch.randn(n, 300, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
    plain = LayerAttention(plan("ntk"), None, SCALE)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), is_causal=True, scale=SCALE
    )
    torch.testing.assert_close(plain(q, k, v, 0), dense, atol=1e-5, rtol=0)
