"""Recall, NDCG and hit rate at K over the full ranking, with bootstrap intervals over users.

No candidate is sampled. Users are ranked a chunk at a time, so users x items never exists as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Ints = NDArray[np.int64]
#: Users [b] -> their scores of a task's candidates [b, m] float32; -inf where the system knows nothing of a pair.
Scorer = Callable[[Ints], NDArray[np.float32]]

#: Scores that exist at a time; each costs about 20 bytes with what the ranking needs beside it.
CHUNK_SCORES = 4_000_000
_LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Task:
    """Who ranks what: `users` [n] rank `candidates` [m] (indices, no duplicates); both matrices are [n, m] of bool.

    `truth` holds at least one candidate for each user; `masked` are the candidates that a user is not asked about.
    Equal scores are ranked in the order of `candidates`.
    """

    users: Ints
    candidates: Ints
    truth: sparse.csr_array
    masked: sparse.csr_array


def task(candidates: Ints, truth: tuple[Ints, Ints], known: tuple[Ints, Ints], among: Ints | None = None) -> Task:
    """The task of (user, item) pairs.

    Args:
        candidates: [m] items, in the order that breaks ties.
        truth: users and items of the test pairs; pairs of other items than the candidates are left out.
        known: users and items of the pairs to mask; a pair that is in `truth` too stays a candidate.
        among: the users who may take part; by default all who have a test pair.
    """
    users = np.unique(truth[0][np.isin(truth[1], candidates)])
    if among is not None:
        users = users[np.isin(users, among)]
    true = _matrix(truth, users, candidates)
    masked = _matrix(known, users, candidates)
    masked = sparse.csr_array(masked > true)
    return Task(users, np.asarray(candidates, np.int64), true, masked)


def _matrix(pairs: tuple[Ints, Ints], users: Ints, candidates: Ints) -> sparse.csr_array:
    """[users, candidates] of bool, True at `pairs`; pairs outside are left out."""
    row, row_found = _positions(pairs[0], users)
    column, column_found = _positions(pairs[1], candidates)
    keep = row_found & column_found
    row, column = row[keep], column[keep]
    matrix = sparse.csr_array((np.ones(len(row), np.bool_), (row, column)), shape=(len(users), len(candidates)))
    matrix.sum_duplicates()
    return matrix


def _positions(values: Ints, within: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Where each value is in `within`, and whether it is there at all."""
    if not len(within):
        return np.zeros(len(values), np.int64), np.zeros(len(values), np.bool_)
    order = np.argsort(within, kind="stable")
    at = order[np.minimum(np.searchsorted(within, values, sorter=order), len(within) - 1)]
    return at, within[at] == values


def top_k(scores: NDArray[np.float32], k: int) -> Ints:
    """Columns [b, min(k, m)] of the largest scores of each row, best first; equal scores by column.

    Raises:
        ValueError: a score is NaN.
    """
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN")
    rows, width = scores.shape
    k = min(k, width)
    if k == 0 or rows == 0:
        return np.zeros((rows, k), np.int64)
    kth = np.partition(scores, width - k, axis=1)[:, width - k, None]
    keep = scores >= kth
    tied = np.flatnonzero(keep.sum(axis=1) > k)
    if len(tied):
        above = scores[tied] > kth[tied]
        equal = scores[tied] == kth[tied]
        room = k - above.sum(axis=1, keepdims=True)
        keep[tied] = above | (equal & (np.cumsum(equal, axis=1, dtype=np.int32) <= room))
    columns = np.nonzero(keep)[1].reshape(rows, k)  # ascending within a row: the stable sort keeps that among equals
    order = np.argsort(-np.take_along_axis(scores, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def per_user(scorer: Scorer, task: Task, ks: Sequence[int], chunk_scores: int = CHUNK_SCORES) -> dict[str, np.ndarray]:
    """Metric name ("ndcg@20", "recall@20", "hit@20") -> value of each user of `task`, [n] float64.

    Recall is over all of a user's test items; NDCG's ideal is over min(K, test items). A pair that scores -inf is
    never a hit.

    Raises:
        ValueError: a score is NaN, or the scores have another shape than [users, candidates].
    """
    users, width = len(task.users), len(task.candidates)
    top = min(max(ks), width)
    hits = np.zeros((users, top), np.bool_)
    chunk = max(1, chunk_scores // max(1, width))
    for start in range(0, users if width else 0, chunk):
        rows = slice(start, min(start + chunk, users))
        scores = np.array(scorer(task.users[rows]), np.float32)
        if scores.shape != (rows.stop - rows.start, width):
            raise ValueError(
                f"the scorer gave {scores.shape} for {rows.stop - rows.start} users and {width} candidates"
            )
        masked = task.masked[rows].tocoo()
        scores[masked.row, masked.col] = -np.inf
        best = top_k(scores, top)
        found = np.take_along_axis(task.truth[rows].toarray(), best, axis=1)
        hits[rows] = found & (np.take_along_axis(scores, best, axis=1) > -np.inf)
    true = np.diff(task.truth.indptr).astype(np.int64)
    discount = 1.0 / np.log2(np.arange(2, max(ks) + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discount)])
    values: dict[str, Any] = {}
    for k in ks:
        first = hits[:, :k]
        gain = first.astype(np.float64) @ discount[: first.shape[1]]
        values[f"ndcg@{k}"] = np.divide(gain, ideal[np.minimum(k, true)])
        values[f"recall@{k}"] = np.asarray(first.sum(axis=1) / true)
        values[f"hit@{k}"] = first.any(axis=1).astype(np.float64)
    return values


def bootstrap(
    values: NDArray[np.float64], draws: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """95 % interval, by percentiles, of the mean of each column of `values` [n, q] over users drawn with replacement.

    Returns (low, high), each [q]; None without draws or users. The same seed draws the same users, so systems over the same
    users are compared on the same draws.
    """
    users = len(values)
    if draws == 0 or users == 0:
        return None
    generator = np.random.Generator(np.random.Philox(seed))
    means = np.stack([values[generator.integers(0, users, users)].mean(axis=0) for _ in range(draws)])
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high
