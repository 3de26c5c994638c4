"""How vectors and FilterLLM's distribution score candidates: each is a Scorer of ranking_metrics."""

from __future__ import annotations

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
        normaliser = log_sum_exp(usable, keys[user_known], offsets[user_known])
    # The whole as one inner product: [z, b, 1] . [q, 1, -normaliser].
    users = np.column_stack([keys, offsets, np.ones(len(keys), np.float32)])
    items = np.column_stack([usable, np.ones(len(queries), np.float32), -normaliser])
    items[absent] = np.nan
    return dot_scorer(users, items, candidates, user_known)


def log_sum_exp(
    queries: NDArray[np.float32], keys: NDArray[np.float32], bias: NDArray[np.float32], tile: int = _TILE
) -> NDArray[np.float32]:
    """[m] log of the sum over users of exp(q . z_u + b_u), a tile of users at a time (exact, as the running maximum moves)."""
    top = np.full(len(queries), -np.inf)
    total = np.zeros(len(queries))
    step = max(1, tile // max(1, len(queries)))
    for start in range(0, len(keys), step):
        logits = queries @ keys[start : start + step].T + bias[start : start + step]
        moved = np.maximum(top, logits.max(axis=1))
        total = total * np.exp(top - moved) + np.exp(logits - moved[:, None]).sum(axis=1)
        top = moved
    with np.errstate(divide="ignore"):
        return (top + np.log(total)).astype(np.float32)
