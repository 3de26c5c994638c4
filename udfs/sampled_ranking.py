"""One true item among a few drawn ones: how SASRec's, NCF's and A-LLMRec's papers measure, and what stops a training early.

Among few candidates every model looks better than over all items (udfs/ranking_metrics.py ranks those).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from udfs.backbone import Backbone
from udfs.cf_inputs import CfError
from udfs.sequences import PADDING, Ints, Sequences, Split

# As SASRec's released code has them: items drawn beside the true one, and K of the NDCG.
_NEGATIVES, _K = 100, 10


def candidates(truth: Ints, known: Sequences, n_items: int, negatives: int, seed: int) -> Ints:
    """[n, 1 + negatives]: the true item of each row first, then different items drawn uniformly that are not in `known`.

    Raises:
        ValueError: a row has fewer than `negatives` items to draw from.
    """
    longest = int(known.lengths.max(initial=0))
    if n_items < 1 + negatives + longest:
        raise ValueError(f"{negatives} items that are not known cannot be drawn from {n_items}, of which {longest} are")
    rng = np.random.Generator(np.random.Philox(seed))
    # Sorted with one that no item has at the end: np.isin would sort, and hash, all of them in every round.
    taken = np.append(np.sort(known.rows * n_items + known.items), -1)
    found = np.concatenate([truth[:, None], rng.integers(0, n_items, (len(truth), negatives))], 1)
    row = np.broadcast_to(np.arange(len(truth))[:, None], found.shape)
    unchecked = np.ones(found.shape, np.bool_)
    unchecked[:, 0] = False
    while True:
        again = np.zeros(found.shape, np.bool_)
        asked = row[unchecked] * n_items + found[unchecked]
        again[unchecked] = taken[np.searchsorted(taken[:-1], asked)] == asked
        # Of equal items in a row all but the first are drawn again.
        order = np.argsort(found, axis=1, kind="stable")
        ascending = np.take_along_axis(found, order, 1)
        repeated = np.zeros(found.shape, np.bool_)
        repeated[:, 1:] = ascending[:, 1:] == ascending[:, :-1]
        np.put_along_axis(again, order, np.take_along_axis(again, order, 1) | repeated, 1)
        if not again.any():
            return found
        found[again] = rng.integers(0, n_items, int(again.sum()))
        unchecked = again


def ranks(scores: NDArray[np.float32]) -> Ints:
    """[n]: the place, 0 the best, of the first column of scores [n, C]; among equal scores it is the last.

    Raises:
        ValueError: a score is NaN, which would be above and below all others.
    """
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).any(1).sum())} of {len(scores)} rows have scores that are NaN")
    return (scores[:, 1:] >= scores[:, :1]).sum(1)


def ndcg(places: Ints, k: int) -> NDArray[np.float64]:
    """[n]: 1 / log2(2 + place) within the first k places, otherwise 0."""
    return np.where(places < k, 1.0 / np.log2(places + 2.0), 0.0)


def validation(backbone: Backbone, split: Split, seed: int, *, max_users: int = 10_000) -> Callable[[], float]:
    """A function that gives NDCG@10 of the validation items, each among 100 drawn ones (the same every time).

    Of at most max_users users, drawn from `seed`; 10,000 are what SASRec's released code takes. Of few items, fewer are
    drawn.

    Raises:
        CfError: no user has a validation item, or somebody knows every item.
    """
    users = np.flatnonzero(split.validation != PADDING)
    rng = np.random.Generator(np.random.Philox(seed))
    users = np.sort(rng.permutation(users)[:max_users])
    known, n_items = split.train.take(users), len(backbone.items)
    negatives = min(_NEGATIVES, n_items - 1 - int(known.lengths.max(initial=0)))
    if not len(users) or negatives < 1:
        raise CfError(
            f"nothing to validate on: {len(users)} users with three events or more, {n_items} items; train without "
            "validation, or on more data"
        )
    asked = candidates(split.validation[users], known, n_items, negatives, seed)
    return lambda: float(ndcg(ranks(backbone.score(users, known, asked)), _K).mean())
