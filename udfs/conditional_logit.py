"""How much each of several scores of the same candidates counts: the conditional logit model (McFadden 1974).

P(j is chosen among a user's candidates) = exp(w . x_j) / sum_k exp(w . x_k). Weighed so, the scores add up to log odds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
# Of a Gaussian around 0, in squares of (weight x the score's spread among a user's candidates): n users who always chose the
# best would make weights infinite.
_PRIOR = 1.0


def fit(scores: list[npt.NDArray[np.floating]]) -> Floats:
    """The weights [F], none below 0, under which what the users chose is likeliest.

    Args:
        scores: F arrays [n, C]: of each of n users the chosen candidate first, then the others; NaN in all of them where a
            user has fewer candidates.

    Raises:
        ValueError: there is no user, or no score.
    """
    from scipy.optimize import minimize

    if not scores or not len(scores[0]):
        raise ValueError("weights need a score and a user who chose")
    x = np.stack(scores, axis=2).astype(np.float64)
    there: npt.NDArray[np.bool_] = np.logical_not(np.isnan(x).any(axis=2))
    counts = there.sum(1)
    x = np.where(there[:, :, None], x, 0.0)
    x = np.where(there[:, :, None], x - x.sum(1, keepdims=True) / counts[:, None, None], 0.0)
    spread = np.sqrt((x**2).sum(1) / counts[:, None]).mean(0)
    # A score that is the same for all candidates says nothing.
    spread = np.where(spread > 0, spread, 1.0)
    x /= spread

    def loss(weights: Floats) -> tuple[float, Floats]:
        odds = np.where(there, x @ weights, -np.inf)
        most = odds.max(1, keepdims=True)
        likely = np.exp(odds - most)
        total = likely.sum(1, keepdims=True)
        value = (most + np.log(total))[:, 0].sum() - odds[:, 0].sum() + _PRIOR / 2 * weights @ weights
        slope = np.einsum("nc,ncf->f", likely / total, x) - x[:, 0].sum(0) + _PRIOR * weights
        return float(value), slope

    start = np.zeros(x.shape[2])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0.0, None)] * len(start))
    return np.asarray(found.x / spread, np.float64)
