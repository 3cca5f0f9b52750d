"""Lists of units as decode steps ask for them, without a model."""

import random


def drifting(n_lists, n_units, size, share=0.2, seed=0):
    """Ascending lists of ``size`` units, of which every list gives up a ``share``, for others that are the likelier the smaller they are."""
    rng = random.Random(seed)
    held, lists = set(rng.sample(range(n_units), size)), []
    for _ in range(n_lists):
        held -= set(rng.sample(sorted(held), round(share * size)))
        while len(held) < size:
            held.add(min(int(rng.paretovariate(0.5)) - 1, rng.randrange(n_units)))
        lists.append(sorted(held))
    return lists


def looping(n_lists, n_units, size):
    """Lists that go round through all units: the worst there is for the least recently used."""
    return [sorted((begin * size + i) % n_units for i in range(size)) for begin in range(n_lists)]
