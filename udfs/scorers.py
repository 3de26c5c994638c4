"""How vectors and FilterLLM's distribution score candidates: each is a Scorer of ranking_metrics."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from udfs.ranking_metrics import Ints, Scorer

_TILE = 4_000_000  # logits that exist at a time


def dot_scorer(
    users: NDArray[np.float32], items: NDArray[np.float32], candidates: Ints, user_known: NDArray[np.bool_]
) -> Scorer:
    """Inner products of user [U, d] and item vectors [m, d] (one a candidate, NaN rows where there is none).

    Users whose `user_known` [U] is False, and candidates without a vector, score -inf.
    """
    absent = np.asarray(np.isnan(items).any(axis=1))
    vectors = np.where(absent[:, None], 0, items).astype(np.float32)
    if len(vectors) != len(candidates):
        raise ValueError(f"{len(vectors)} item vectors for {len(candidates)} candidates")

    def scores(chunk: Ints) -> NDArray[np.float32]:
        found = users[chunk] @ vectors.T
        found[:, absent] = -np.inf
        found[~user_known[chunk]] = -np.inf
        return found

    return scores


def distribution_scorer(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    candidates: Ints,
    user_known: NDArray[np.bool_],
    normalize: bool = True,
) -> Scorer:
    """log p(u | c_i) = q_i . z_u + b_u - logsumexp over the known users; FilterLLM (arXiv 2502.16924).

    Ranking items for a user, the normaliser matters: without it an item with large logits for everybody comes first.

    Args:
        queries: [m, d], one a candidate, NaN rows where there is no text (they score -inf).
        keys: [U, d] user vocabulary in the order of the users; bias: [U].
        user_known: [U], False for users outside the vocabulary: they are in no sum and score -inf.
        normalize: False ranks by the logit.
    """
    absent = np.asarray(np.isnan(queries).any(axis=1))
    usable = np.where(absent[:, None], 0, queries).astype(np.float32)
    offsets = np.zeros(len(keys), np.float32) if bias is None else bias
    normaliser = np.zeros(len(queries), np.float32)
    if normalize:
        known, more = keys[user_known], offsets[user_known]
        step = max(1, _TILE // max(1, len(usable)))
        tiles = (usable @ known[s : s + step].T + more[s : s + step] for s in range(0, len(known), step))
        normaliser = log_sum_exp(tiles, len(usable)).astype(np.float32)
    # The whole as one inner product: [z, b, 1] . [q, 1, -normaliser].
    users = np.column_stack([keys, offsets, np.ones(len(keys), np.float32)])
    items = np.column_stack([usable, np.ones(len(queries), np.float32), -normaliser])
    items[absent] = np.nan
    return dot_scorer(users, items, candidates, user_known)


def log_sum_exp(tiles: Iterable[NDArray[np.floating]], rows: int) -> NDArray[np.float64]:
    """[rows]: the log of the sum of exp over what `tiles` [rows, one user or more] hold one beside the other; -inf of none.

    It is float64: a float32 normaliser would shift every probability of an item by up to 1e-6 of it.
    """
    total = np.full(rows, -np.inf)
    for tile in tiles:
        logits = tile.astype(np.float64, copy=False)
        peak = logits.max(axis=1)
        total = np.logaddexp(total, peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1)))
    return total
