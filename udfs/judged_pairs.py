"""Which titles of a user a judge reads, and which pairs it is fitted to.

A user's items are in CSR form, in the order in which the user chose them where that is known: the last are the most recent.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def recent(indptr: Ints, indices: Ints, length: int) -> list[Ints]:
    """The last `length` items of each user, the most recent last."""
    ends = pairwise(indptr)
    return [indices[max(start, stop - length) : stop] for start, stop in ends]


@dataclass(frozen=True)
class Pairs:
    """n labelled pairs: histories [u] of item numbers; users [n], rows of them; items [n]; labels [n] float32, 1 or 0."""

    histories: list[Ints]
    users: Ints
    items: Ints
    labels: NDArray[np.float32]


def training_pairs(
    indptr: Ints, indices: Ints, n_items: int, *, users: int, per_user: int, length: int, seed: int
) -> Pairs:
    """Pairs to fit a judge to: of `users` users with two items or more, drawn without replacement (all, if fewer).

    A user gives up to `per_user` of its items, half of them at most, as positives, and as many random items that it did not
    choose; its history is the last `length` of its other items.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    able = np.flatnonzero(np.diff(indptr) >= 2)
    histories: list[Ints] = []
    rows, items, labels = [], [], []
    for user in rng.choice(able, min(users, len(able)), replace=False):
        own = indices[indptr[user] : indptr[user + 1]]
        count = min(per_user, len(own) // 2)
        chosen = np.zeros(len(own), np.bool_)
        chosen[rng.choice(len(own), count, replace=False)] = True
        # Enough draws that `count` of them are new to the user unless it has nearly every item.
        others = rng.choice(n_items, min(n_items, count + len(own)), replace=False)
        others = others[~np.isin(others, own)][:count]
        rows.append(np.full(count + len(others), len(histories)))
        items.append(np.concatenate([own[chosen], others]))
        labels.append(np.repeat(np.array([1, 0], np.float32), [count, len(others)]))
        histories.append(own[~chosen][-length:])
    if not histories:
        raise ValueError("a judge is fitted to users with two items or more, there are none")
    return Pairs(histories, np.concatenate(rows), np.concatenate(items), np.concatenate(labels))
