"""Replacement policies against plain statements of what they should hold, and against the best that can be done."""

from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import synthetic
from hipexp.cache.policies import POLICIES, Lfu, make_policy
from hipexp.config.schema import ConfigError

ONLINE = [name for name in POLICIES if name != "belady"]
LISTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), min_size=1, max_size=40)
CAPACITY = st.integers(4, 9)


def flat(lists):
    return [unit for units in lists for unit in units]


def run(name, capacity, lists):
    """What every list misses and evicts; checks on the way that the policy holds what it says."""
    policy, held, out = make_policy(name, capacity, flat(lists)), set(), []
    for units in lists:
        missing, evicted = policy.access(units)
        assert missing == [unit for unit in units if unit not in held]
        assert len(set(evicted)) == len(evicted) and set(evicted) <= held - set(units)
        held = (held - set(evicted)) | set(missing)
        assert len(policy) == len(held) <= capacity and all((unit in policy) == (unit in held) for unit in range(10))
        out.append((missing, evicted))
    return out


def misses(name, capacity, lists):
    return sum(len(missing) for missing, _ in run(name, capacity, lists))


class Plain:
    """A policy that looks through everything it holds for every victim."""

    def __init__(self, capacity, lists):
        self.capacity, self.future, self.held, self.now = capacity, flat(lists), [], 0

    def access(self, units):
        missing = [unit for unit in units if unit not in self.held]
        for unit in units:
            if unit in self.held:
                self.use(unit)
        evicted = []
        while len(self.held) + len(missing) > self.capacity:
            evicted.append(self.victim([unit for unit in self.held if unit not in units]))
            self.held.remove(evicted[-1])
        for unit in missing:
            self.held.append(unit)
            self.admit(unit)
        self.after(units)
        return missing, evicted

    def use(self, unit): ...
    def admit(self, unit): ...
    def after(self, units): ...


class PlainLru(Plain):
    def victim(self, free):
        return free[0]

    def after(self, units):
        self.held = [unit for unit in self.held if unit not in units] + list(units)


class PlainClock(Plain):
    """The held units stand in a ring with gaps; gaps are filled in the order in which they came about."""

    def __init__(self, *args):
        super().__init__(*args)
        self.ring, self.gaps, self.marked, self.hand = [None] * self.capacity, list(range(self.capacity)), set(), 0

    def use(self, unit):
        self.marked.add(unit)

    def admit(self, unit):
        self.ring[self.gaps.pop(0)] = unit
        self.marked.add(unit)

    def victim(self, free):
        while True:
            at, unit = self.hand % self.capacity, self.ring[self.hand % self.capacity]
            self.hand += 1
            if unit in free and unit not in self.marked:
                self.ring[at] = None
                self.gaps.append(at)
                return unit
            if unit in free:
                self.marked.remove(unit)


class PlainLfu(Plain):
    def __init__(self, *args):
        super().__init__(*args)
        self.counts, self.last, self.since = {}, {}, 0

    def use(self, unit):
        self.counts[unit] += 1
        self.tick(unit)

    def admit(self, unit):
        self.counts[unit] = 1
        self.tick(unit)

    def tick(self, unit):
        self.now += 1
        self.since += 1
        self.last[unit] = self.now

    def victim(self, free):
        return min(free, key=lambda unit: (self.counts[unit], self.last[unit]))

    def after(self, units):
        if self.since >= Lfu.AGE * self.capacity:
            self.since, self.counts = 0, {unit: count // 2 for unit, count in self.counts.items()}


class PlainBelady(Plain):
    def victim(self, free):
        def next_use(unit):
            later = self.future[self.now + len(self.asked) :]
            return later.index(unit) if unit in later else len(self.future)

        return min(free, key=lambda unit: (-next_use(unit), unit))

    def access(self, units):
        self.asked = units
        done = super().access(units)
        self.now += len(units)
        return done


PLAIN = {"lru": PlainLru, "clock": PlainClock, "lfu": PlainLfu, "belady": PlainBelady}


@pytest.mark.parametrize("name", POLICIES)
@given(lists=LISTS, capacity=CAPACITY)
def test_policies_do_what_their_plain_statement_does(name, lists, capacity):
    plain = PLAIN[name](capacity, lists)
    assert run(name, capacity, lists) == [plain.access(units) for units in lists]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("lists", [synthetic.drifting(200, 10, 4), synthetic.looping(200, 10, 3)], ids=["drifting", "looping"])
def test_they_still_do_after_many_lists(name, lists):
    plain = PLAIN[name](6, lists)
    assert run(name, 6, lists) == [plain.access(units) for units in lists]


def fewest_misses(capacity, lists):
    """By trying everything."""

    @cache
    def best(i, held):
        if i == len(lists):
            return 0
        units, missing = frozenset(lists[i]), len(set(lists[i]) - held)
        rest = held - units
        room = capacity - len(units)
        if len(rest) <= room:
            return missing + best(i + 1, held | units)
        return missing + min(best(i + 1, kept | units) for kept in subsets(rest, room))

    return best(0, frozenset())


def subsets(units, size):
    from itertools import combinations

    return map(frozenset, combinations(sorted(units), size))


@given(
    lists=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True), min_size=1, max_size=12), capacity=st.integers(3, 5)
)
def test_belady_is_the_best_there_is(lists, capacity):
    assert misses("belady", capacity, lists) == fewest_misses(capacity, lists)


@pytest.mark.parametrize("name", ONLINE)
@given(lists=LISTS, capacity=CAPACITY)
def test_no_policy_misses_less_often_than_belady(name, lists, capacity):
    assert misses("belady", capacity, lists) <= misses(name, capacity, lists)


@given(lists=LISTS, capacity=CAPACITY, more=st.integers(1, 4))
@example(lists=[[0], [1, 2], [3, 4], [0, 1, 2], [5, 6, 7], [0]], capacity=4, more=1)  # 0 is missing in the smaller only, then first in both
def test_a_larger_lru_cache_holds_what_a_smaller_one_holds(lists, capacity, more):
    small, large = make_policy("lru", capacity), make_policy("lru", capacity + more)
    for units in lists:
        assert set(large.access(units).missing) <= set(small.access(units).missing)
        assert all(unit in large for unit in range(10) if unit in small)


@pytest.mark.parametrize("name", POLICIES)
@given(units=st.lists(st.integers(0, 3), max_size=30))
def test_of_one_unit(name, units):
    seen = run(name, 1, [[unit] for unit in units])
    changes = [i for i, unit in enumerate(units) if i == 0 or unit != units[i - 1]]
    assert [i for i, (missing, _) in enumerate(seen) if missing] == changes


@pytest.mark.parametrize("name", POLICIES)
@given(lists=LISTS)
def test_where_everything_fits_every_unit_is_missed_once(name, lists):
    seen = run(name, 10, lists)
    assert sorted(unit for missing, _ in seen for unit in missing) == sorted(set(flat(lists)))
    assert not any(evicted for _, evicted in seen)


def test_frequent_units_survive_a_scan_under_lfu_only():
    lists = [[0, 1]] * 5 + [[2, 3], [4, 5]] + [[0, 1]]
    last = {name: run(name, 4, lists)[-1][0] for name in ONLINE}
    assert last == {"lru": [0, 1], "clock": [0, 1], "lfu": []}


def test_what_was_frequent_long_ago_goes(monkeypatch):
    lists = [[0]] * 100 + [[1, 2], [3, 4]] * 80
    assert any(0 in evicted for _, evicted in run("lfu", 4, lists))
    monkeypatch.setattr(Lfu, "AGE", 10**9)
    assert not any(0 in evicted for _, evicted in run("lfu", 4, lists))


def test_a_used_unit_gets_a_second_chance():
    assert [evicted for _, evicted in run("clock", 3, [[0], [1], [2], [3], [1], [4]])] == [[], [], [], [0], [], [2]]


@pytest.mark.parametrize("name", POLICIES)
def test_refusals(name):
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        make_policy(name, 0, [])
    with pytest.raises(ValueError, match="3 units are asked for at once, and capacity=2; read the list in parts"):
        make_policy(name, 2, [0, 1, 2]).access([0, 1, 2])


def test_names():
    with pytest.raises(ConfigError, match="policy 'mru' is unknown; use one of lru, clock, lfu, belady"):
        make_policy("mru", 1)
    with pytest.raises(ConfigError, match="has to know the future"):
        make_policy("belady", 1)


def test_belady_notices_another_future():
    policy = make_policy("belady", 2, [0, 1, 2])
    policy.access([0, 1])
    with pytest.raises(ValueError, match="another future: what is asked for from place 2 on"):
        policy.access([3])
