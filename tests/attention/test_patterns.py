"""Diagonal and vertical shares, against sums over keys by hand and on attention that is known to be one or the other."""

import pytest
import torch

from hipexp.attention.patterns import pattern_mass

SINK, WINDOW = 3, 5


def by_hand(logits, folds):
    """The three sums, key by key."""
    masses = []
    for x in logits:
        weights = torch.softmax(x.double(), -1)
        masses.append([{t: float(row[t]) for t in range(SINK, x.shape[1] - WINDOW)} for row in weights])
    sums = [0.0, 0.0, 0.0]
    for r, heads in enumerate(masses):
        others = [s for s in range(len(masses)) if folds[s] != folds[r]]
        for h, p in enumerate(heads):
            total = sum(p.values())
            even = sum(min(x, total / len(p)) for x in p.values())
            sums[2] += total - even
            for which in (0, 1):

                def place(s, t, which=which):
                    return t if which else logits[s].shape[1] - 1 - t

                profile = {}
                for s in others:
                    for t, x in masses[s][h].items():
                        profile.setdefault(place(s, t), []).append(x)
                profile = {at: sum(xs) / len(xs) for at, xs in profile.items()}
                usual = sorted(profile.values())[(len(profile) - 1) // 2]
                guess = {t: profile.get(place(r, t), usual) for t in p}
                sums[which] += sum(min(x, total * guess[t] / sum(guess.values())) for t, x in p.items()) - even
    return sums


def test_against_sums_over_keys():
    torch.manual_seed(0)
    logits = [2 * torch.randn(3, n) for n in (20, 24, 31, 40)]
    folds = [0, 1, 0, 1]
    assert pattern_mass(logits, folds, SINK, WINDOW) == pytest.approx(by_hand(logits, folds), rel=1e-4)


def shares(place):
    """The shares of attention that looks at one key, at ``place(n)`` for a query that sees ``n`` keys."""
    logits = []
    for n in (200, 217, 240, 263):
        x = torch.zeros(2, n)
        x[:, place(n)] = 12.0
        logits.append(x)
    diagonal, vertical, left = pattern_mass(logits, [0, 1, 0, 1], SINK, WINDOW)
    return diagonal / left, vertical / left


def test_what_looks_at_one_distance_is_diagonal():
    diagonal, vertical = shares(lambda n: n - 1 - 50)
    assert diagonal > 0.99 and vertical < 0


def test_what_looks_at_one_key_is_vertical():
    diagonal, vertical = shares(lambda n: 42)
    assert vertical > 0.99 and diagonal < 0


def test_where_nothing_lies_outside_there_is_nothing():
    assert pattern_mass([torch.zeros(2, 8), torch.zeros(2, 6)], [0, 1], SINK, WINDOW) == (0.0, 0.0, 0.0)
