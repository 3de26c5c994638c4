"""Which titles of a user a judge reads, and which pairs it is fitted to.

A user's items are in CSR form, in the order in which the user chose them where that is known: the last are the most recent.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from udfs.vectors import Matrix

Ints = NDArray[np.int64]


def recent(indptr: Ints, indices: Ints, length: int) -> list[Ints]:
    """The last `length` items of each user, the most recent last."""
    ends = pairwise(indptr)
    return [indices[max(start, stop - length) : stop] for start, stop in ends]


def closest(
    indptr: Ints, indices: Ints, length: int, users: Ints, items: Ints, states: Matrix, item_states: Matrix
) -> list[Ints]:
    """The `length` items of each pair's user that are closest to the pair's item by cosine, the closest last.

    Histories differ from pair to pair, so no two pairs share a prefix. Equal cosines: the later item is closer.

    Args:
        users, items: [n], rows of the CSR and of `item_states`.
        states: [I, width] of the items in `indices`; item_states: [m, width].
    """
    rows = states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-12)
    found = []
    for user, item in zip(users, items, strict=True):
        own = indices[indptr[user] : indptr[user + 1]]
        found.append(own[np.argsort(rows[own] @ item_states[item], kind="stable")[-length:]])
    return found


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
