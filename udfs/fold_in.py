"""A vector for a row that training did not see, in closed form: one step of implicit ALS with the other side fixed.

For an item with users u and weights w_u, given the user vectors Y (Hu et al. 2008, equation 5, with the confidence and the
ridge as Spark's ALS has them: confidence 1 + alpha w, ridge times the row's number n of pairs):

    e = (Y'Y + alpha sum_u w_u y_u y_u' + regularization n I)^-1 sum_u (1 + alpha w_u) y_u

A pair that is only probable may count as a part of one (`shares`): each of its terms, and its one in n, times that part.
It is symmetric: give it item vectors, and it folds in users. In a space that ALS trained, a row's own pairs give back its
trained vector. BPR and LightGCN minimise something else: there the same formula gives a direction of the space, and `scale`
brings it to the length that the space's own vectors have (`norm_scale`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from schemas.errors import ColdRefreshError
from udfs.vectors import Matrix

# float64 numbers that one step works on: 256 MB.
_BUDGET = 1 << 25


class FoldInError(ColdRefreshError):
    """A row's linear system cannot be solved."""


def gram(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Y'Y [d, d] in float64, of `vectors` [n, d], without a float64 copy of them all."""
    width = vectors.shape[1]
    step = max(1, _BUDGET // max(width, 1))
    total = np.zeros((width, width))
    for start in range(0, len(vectors), step):
        part = vectors[start : start + step].astype(np.float64)
        total += part.T @ part
    return total


def fold_in(
    vectors: npt.NDArray[np.floating],
    indptr: npt.NDArray[np.integer],
    indices: npt.NDArray[np.integer],
    weights: npt.NDArray[np.floating],
    *,
    alpha: float,
    regularization: float,
    scale: float = 1.0,
    gram_of_all: npt.NDArray[np.float64] | None = None,
    shares: npt.NDArray[np.floating] | None = None,
) -> Matrix:
    """Fold in n rows, each given by its pairs in CSR form. A row's vector depends on its own pairs alone.

    Args:
        vectors: [U, d], the fixed side.
        indptr: [n + 1]; row r's pairs are indptr[r] .. indptr[r + 1] - 1.
        indices: [pairs], rows of `vectors`.
        weights: [pairs], above 0.
        alpha, regularization: of the space (its facts hold them).
        scale: every result is multiplied by it.
        shares: [pairs], above 0: as how many pairs each counts; 1 by default.
        gram_of_all: Y'Y if it is not that of `vectors` (such as when they hold rows that are folded in themselves).

    Returns:
        [n, d] float32, computed in float64; a row without pairs is zero.

    Raises:
        FoldInError: a system is singular (a regularization of 0 or near it).
        ValueError: an index or a weight is out of its range.
    """
    n, width = len(indptr) - 1, vectors.shape[1]
    if len(indices) and (indices.min() < 0 or indices.max() >= len(vectors) or not (weights > 0).all()):
        raise ValueError(f"fold-in: indices must lie in 0 .. {len(vectors) - 1} and weights above 0")
    shares = np.ones(len(indices)) if shares is None else shares
    base = torch.from_numpy(gram(vectors) if gram_of_all is None else gram_of_all)
    counts = np.diff(indptr)
    result = np.zeros((n, width), np.float32)
    # Rows of like length together, so that little is padded.
    order = np.argsort(counts, kind="stable")
    order = order[counts[order] > 0]
    start = 0
    while start < len(order):
        rows = order[start : start + max(1, _BUDGET // (width * width))]
        # As many rows as the budget takes when padded to the longest of them (lengths ascend); always one.
        fits = counts[rows] * np.arange(1, len(rows) + 1) * width <= _BUDGET
        rows = rows[: max(1, int(fits.sum()))]
        start += len(rows)
        result[rows] = scale * _solve(
            vectors, base, indptr[rows], counts[rows], indices, weights, shares, alpha, regularization
        )
    return result


def _solve(
    vectors: np.ndarray,
    base: torch.Tensor,
    first: np.ndarray,
    counts: np.ndarray,
    indices: np.ndarray,
    weights: np.ndarray,
    shares: np.ndarray,
    alpha: float,
    regularization: float,
) -> np.ndarray:
    """The solutions [b, d] float64 of rows that begin at `first` [b] and have `counts` [b] pairs."""
    width, longest = vectors.shape[1], int(counts.max())
    left = base.repeat(len(counts), 1, 1)
    total = torch.zeros(len(counts), dtype=torch.float64)
    right = torch.zeros((len(counts), width), dtype=torch.float64)
    step = max(1, _BUDGET // (len(counts) * width))
    for begin in range(0, longest, step):  # more than one step only for a row that is longer than the budget
        offset = np.arange(begin, min(begin + step, longest))
        there = offset < counts[:, None]
        place = np.where(there, first[:, None] + offset, first[:, None])
        share = torch.from_numpy(np.where(there, shares[place].astype(np.float64), 0.0))
        confidence = share * torch.from_numpy(alpha * weights[place].astype(np.float64))
        y = torch.from_numpy(vectors[indices[place]].astype(np.float64))
        left += (y * confidence[:, :, None]).mT @ y
        right += ((share + confidence)[:, None, :] @ y)[:, 0]
        total += share.sum(1)
    left += regularization * total[:, None, None] * torch.eye(width, dtype=torch.float64)
    factor, info = torch.linalg.cholesky_ex(left)
    if int(info.count_nonzero()):
        raise FoldInError(
            f"fold-in: {int(info.count_nonzero())} of {len(counts)} systems of {width} equations are singular with "
            f"cf.regularization {regularization}; raise it"
        )
    return torch.cholesky_solve(right[:, :, None], factor)[:, :, 0].numpy()


def norm_scale(trained: npt.NDArray[np.floating], folded: npt.NDArray[np.floating]) -> float:
    """What to multiply fold-ins by in this space: median norm of trained rows over that of the same rows folded in."""
    median = float(np.median(np.linalg.norm(folded, axis=1)))
    return float(np.median(np.linalg.norm(trained, axis=1))) / median if median > 0 else 1.0


def to_csr(
    rows: npt.NDArray[np.integer], columns: npt.NDArray[np.integer], values: npt.NDArray[np.floating], n: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Pairs in any order as (indptr [n + 1], indices, weights), each row's in ascending order of its columns."""
    order = np.lexsort((columns, rows))
    indptr = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=n), out=indptr[1:])
    return indptr, columns[order].astype(np.int64), values[order].astype(np.float64)
