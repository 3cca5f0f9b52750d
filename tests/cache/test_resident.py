"""The store that keeps everything on the device: what it holds, how it grows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hipexp.cache.resident import ResidentStore


def some(tokens, seed=0):
    return torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(seed))


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), reserved=st.integers(0, 100))
def test_it_holds_what_was_appended(sizes, reserved):
    store, parts = ResidentStore(), [some(n, seed) for seed, n in enumerate(sizes)]
    store.reserve(reserved, parts[0])
    for part in parts:
        store.append(part, -part)
    k, v = store.view()
    assert store.length == sum(sizes)
    assert torch.equal(k, torch.cat(parts, 1)) and torch.equal(v, -torch.cat(parts, 1))


def test_reserved_room_is_exact_and_used():
    store = ResidentStore()
    store.reserve(100, some(1))
    assert store.bytes == 2 * 2 * 100 * 8 * 4
    store.append(some(1), some(1))
    where = store.view()[0].data_ptr()
    for _ in range(99):
        store.append(some(1), some(1))
    assert store.view()[0].data_ptr() == where and store.bytes == 2 * 2 * 100 * 8 * 4


def test_it_moves_rarely_while_it_grows():
    store, places = ResidentStore(), []
    for _ in range(1000):
        store.append(some(1), some(1))
        places.append(store.bytes)
    assert len(set(places)) < 25


def test_an_empty_store_has_no_view():
    with pytest.raises(ValueError, match="the store is empty"):
        ResidentStore().view()


def test_a_store_of_inference_mode_stays_in_it():
    store = ResidentStore()
    with torch.inference_mode():
        store.append(some(2), some(2))
    with torch.no_grad(), pytest.raises(RuntimeError, match="keep one mode per cache"):
        store.append(some(1), some(1))
