"""Residency of whole lists against the plain policies, access by access."""

import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import synthetic
from hipexp.cache.policies import make_policy
from hipexp.cache.residency import Residency
from hipexp.config.schema import ConfigError

NAMES = ("lru", "clock", "lfu")
every_policy = pytest.mark.parametrize("name", NAMES)


def ints(units, device="cpu"):
    return torch.tensor(list(units), dtype=torch.int64, device=device)


class Both:
    """A residency beside the plain policy, which is given every list ascending and without repetitions."""

    def __init__(self, name, capacity, device="cpu"):
        self.mine, self.plain = Residency(capacity, name, device), make_policy(name, capacity)
        self.lies_in = {}  # slots, as whoever copies knows them

    def access(self, units):
        wanted, held = sorted(set(units)), len(self.plain)
        missing, evicted = self.plain.access(wanted)
        got = self.mine.access(ints(units, self.mine.table.device))
        assert got.missing.tolist() == missing and got.hits == len(wanted) - len(missing)
        assert sorted(got.evicted.tolist()) == sorted(evicted) and len(self.mine) == held + len(missing) - len(evicted)
        for unit in got.evicted.tolist():
            del self.lies_in[unit]
        self.lies_in |= zip(missing, got.slots.tolist(), strict=True)
        self.check()

    def check(self):
        table = self.mine.table.tolist()
        assert {unit: slot for unit, slot in enumerate(table) if slot >= 0} == self.lies_in
        assert len(self.lies_in) == len(self.plain) and all(unit in self.plain for unit in self.lies_in)
        slots = set(self.lies_in.values())
        assert len(slots) == len(self.lies_in) and slots <= set(range(self.mine.capacity))


@st.composite
def runs(draw):
    """A capacity and lists that fit, with repetitions, of few units or of many."""
    capacity, n_units = draw(st.integers(1, 12)), draw(st.sampled_from([6, 14, 41]))
    units = st.sets(st.integers(0, n_units - 1), max_size=capacity)
    one = units.flatmap(lambda chosen: st.lists(st.sampled_from(sorted(chosen)), max_size=2 * capacity) if chosen else st.just([]))
    return capacity, draw(st.lists(one, max_size=60))


@every_policy
@given(run=runs())
@settings(max_examples=150)
@example(run=(1, [[0], [1], [1], [0]]))
@example(run=(3, [[0], [1], [2], [0, 3], [4], [1, 0], [5, 6, 7], [6], [0]]))
@example(run=(2, [[0, 1], [0], [0], [1], [2], [], [0]] * 4))  # lfu ages
def test_it_fetches_and_evicts_what_the_plain_policy_does(name, run):
    capacity, lists = run
    both = Both(name, capacity)
    for units in lists:
        both.access(units)


@every_policy
@pytest.mark.parametrize("largest", [400, 60])
def test_it_does_so_at_length(name, largest):
    """Zipf-like units that are asked for in drifting numbers; the hand's windows are shorter than the pool, and longer."""
    rng, both = random.Random(largest), Both(name, 500)
    for _ in range(300):
        both.access([min(int(rng.paretovariate(0.3)) - 1, rng.randrange(20000)) for _ in range(rng.randint(1, largest))])


@every_policy
def test_lists_that_drift_and_loop(name):
    both = Both(name, 40)
    for units in [*synthetic.drifting(120, 200, 30), *synthetic.looping(60, 100, 25)]:
        both.access(units)


@every_policy
def test_ages_and_times_are_equal_after_thousands_of_lists(name):
    """One unit each, so that nothing but the order of uses tells equal counts apart."""
    rng, both = random.Random(0), Both(name, 7)
    for _ in range(3000):
        both.access([rng.randrange(rng.choice([8, 30]))])


@every_policy
def test_what_is_refused_changes_nothing(name):
    both = Both(name, 3)
    for units in ([0, 1, 2], [1], [3]):
        both.access(units)
    for wrong, message in (
        (ints([0, 1, 2, 3, 0]), r"4 different units .* capacity=3; read the list in parts, or make the pool larger"),
        (ints([5, 6, 7, 8]), "4 different units"),
        (ints([1, -4]), r"unit -4 is not in 0 \.\.\. 2\*\*31 - 1"),
        (ints([1, 2**31]), "unit 2147483648 is not in"),
        (ints([1]).int(), r"torch.int32 \[1\] and must be int64 \[n\]"),
        (ints([1, 2]).view(1, 2), r"torch.int64 \[1, 2\] and must be"),
        (torch.tensor([]), "torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            both.mine.access(wrong)
        both.check()
    for units in ([4], [2, 5], [0], [1, 3, 1, 3, 1, 3, 1], [6, 7], [8]):
        both.access(units)


def test_no_pool_and_no_such_policy():
    for capacity in (0, 2**31):
        with pytest.raises(ValueError, match=f"capacity={capacity} must be at least 1 unit and below"):
            Residency(capacity, "lru")
    for policy in ("belady", "fifo"):
        with pytest.raises(ConfigError, match=f"policy '{policy}' .*; use one of lru, clock, lfu"):
            Residency(4, policy)


@every_policy
def test_forgotten_is_as_new(name):
    lists = [[0, 1, 2, 3], [1, 3], [4, 5], [1], [6, 0], [7], [2, 2, 9]]
    both = Both(name, 4)
    for units in lists:
        both.access(units)
    mine = both.mine
    mine.forget()
    assert len(mine) == 0 and (mine.table == -1).all() and mine.table.numel() >= 10
    both = Both(name, 4)
    both.mine = mine
    for units in lists:
        both.access(units)


def test_the_table_grows_rarely():
    mine, tables = Residency(2, "clock"), set()
    for unit in range(3000):
        mine.access(ints([unit]))
        tables.add(mine.table.numel())
    assert mine.table.dtype == torch.int32 and len(tables) < 25 and max(tables) < 1.5 * 3000


@every_policy
def test_either_mode_goes_on_where_the_other_stopped(name):
    both = Both(name, 5)
    for number, units in enumerate(synthetic.drifting(40, 60, 4)):
        with torch.inference_mode(number % 3 < 2):
            both.access(units)
            if number == 20:
                both.mine.forget()
                both = Both(name, 5)
    with torch.inference_mode():
        both = Both(name, 5)
        both.access([1])
    both.access([2, 900])


def test_the_hand_looks_at_few_slots(monkeypatch):
    """In a pool of 100,000 that was used once, a hundred victims cost what lies before them, wherever the hand stands."""
    mine, looked = Residency(100_000, "clock"), []
    mine.access(torch.arange(100_000))
    mine.access(ints([100_000]))  # the hand goes round once
    nonzero = torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: looked.append(x.numel()) or nonzero(x))
    for begin in range(100_001, 110_001, 100):
        mine.access(torch.arange(begin, begin + 100))
    assert len(looked) <= 100 and sum(looked) <= 100 * 500
    looked.clear()
    mine.access(torch.arange(100_000, 105_000))
    assert sum(looked) == 0


def test_the_hand_looks_at_little_more_than_it_passes(monkeypatch):
    """One victim in a pool of which all is used: all slots are seen once, a few twice, in few windows."""
    mine, looked = Residency(100_000, "clock"), []
    mine.access(torch.arange(100_000))
    nonzero = torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: looked.append(x.numel()) or nonzero(x))
    assert mine.access(ints([100_000])).evicted.tolist() == [0]
    assert sum(looked) <= 2 * 100_000 and len(looked) <= 13


@every_policy
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_device(name):
    both = Both(name, 40, "cuda")
    for units in synthetic.drifting(120, 200, 30):
        both.access(units)
