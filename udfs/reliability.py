"""How far p(u | i) is what happens: the reliability curve of a distribution over users, and its calibration error.

Pairs (item, user) are put into bins by the predicted p(u | i), of equal width on a logarithmic axis. An item with n known users
has the observed share q_iu = 1 / n for each of them and 0 for everybody else; q is a distribution over users, as p is. If p is
calibrated, the mean of q in a bin is the mean of p in it (Guo et al. 2017, "On Calibration of Modern Neural Networks", for
classes), up to chance: bins of high p hold few pairs, and no share is above 1 / n. Users pass by in tiles: items x users never
exists as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from udfs.scorers import log_sum_exp

#: Bins a decade, and the decades below 1 that are told apart; the lowest bin also takes everything below it.
PER_DECADE, DECADES = 3, 9
BINS = PER_DECADE * DECADES
_TILE = 2_000_000  # pairs that exist at a time


@dataclass(frozen=True)
class Reliability:
    """A curve of BINS bins, from low to high probability.

    pairs [BINS] int64; predicted and observed [BINS] float64: sums of p and of q over a bin's pairs, each of which totals
    `items` over all bins; items: how many had a known user.
    """

    pairs: NDArray[np.int64]
    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    items: int

    @property
    def calibration_error(self) -> float:
        """Sum over bins of |predicted - observed| an item, in 0 .. 2: the expected calibration error times the users.

        The error of a mean pair is about 1 / users of this whatever the model does, and would tell nothing. NaN without items.
        """
        return float(np.abs(self.predicted - self.observed).sum() / self.items) if self.items else float("nan")

    @property
    def points(self) -> list[tuple[int, int, float, float]]:
        """(bin, pairs, mean p, mean q) of the bins that hold a pair."""
        full = np.flatnonzero(self.pairs)
        n = self.pairs[full]
        means = zip(full, n, self.predicted[full] / n, self.observed[full] / n, strict=True)
        return [(int(b), int(count), float(p), float(q)) for b, count, p, q in means]


def reliability(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    indptr: NDArray[np.integer],
    users: NDArray[np.integer],
    tile: int = _TILE,
) -> Reliability:
    """The curve of p(u | i) = softmax_u(q_i . z_u + b_u).

    Args:
        queries: [n, d] of the items; keys: [U, d] of all users that p is over; bias: [U].
        indptr, users: item i's known users are users[indptr[i]:indptr[i + 1]], rows of `keys`, each once. An item without
            any is left out.

    Raises:
        ValueError: a user is out of range, or a logit is not finite.
    """
    counts = np.diff(indptr)
    if len(users) and (users.min() < 0 or users.max() >= len(keys)):
        raise ValueError(f"reliability: users must lie in 0 .. {len(keys) - 1}")
    kept = np.flatnonzero(counts)
    pairs, predicted, observed = np.zeros(BINS, np.int64), np.zeros(BINS), np.zeros(BINS)
    item_step = max(1, min(len(kept), 1024))
    user_step = max(1, tile // item_step)
    for start in range(0, len(kept), item_step):
        items = kept[start : start + item_step]
        starts = range(0, len(keys), user_step)
        tiles = (_logits(queries[items], keys, bias, first, user_step) for first in starts)
        normaliser = log_sum_exp(tiles, len(items))
        true = np.concatenate([users[indptr[i] : indptr[i + 1]] for i in items])
        rows = np.repeat(np.arange(len(items)), counts[items])
        share = 1.0 / counts[items][rows]
        for first in starts:
            log_p = _logits(queries[items], keys, bias, first, user_step) - normaliser[:, None]
            bins = _bins(log_p)
            pairs += np.bincount(bins.ravel(), minlength=BINS)
            predicted += np.bincount(bins.ravel(), weights=np.exp(log_p).ravel(), minlength=BINS)
            here = (true >= first) & (true < first + user_step)
            hit = bins[rows[here], true[here] - first]
            observed += np.bincount(hit, weights=share[here], minlength=BINS)
    return Reliability(pairs, predicted, observed, len(kept))


def _logits(
    queries: NDArray[np.float32], keys: NDArray[np.float32], bias: NDArray[np.float32] | None, first: int, step: int
) -> NDArray[np.float64]:
    logits = (queries @ keys[first : first + step].T).astype(np.float64)
    if bias is not None:
        logits += bias[first : first + step]
    if not np.isfinite(logits).all():
        raise ValueError("a logit is not finite: so is something in the model or in a text embedding")
    return logits


def _bins(log_p: NDArray[np.float64]) -> NDArray[np.int64]:
    """The bin of each log probability."""
    at = np.floor(log_p * (PER_DECADE / np.log(10))).astype(np.int64) + BINS
    return np.clip(at, 0, BINS - 1)
