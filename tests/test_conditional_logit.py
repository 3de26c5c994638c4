"""The weights of several scores of the same candidates, where what was chosen is drawn from known weights."""

from __future__ import annotations

import numpy as np
import pytest

from udfs.conditional_logit import fit


def _chosen(weights: list[float], n: int, candidates: int, scale: float = 1.0, seed: int = 3) -> list[np.ndarray]:
    """Scores [n, C] of users who chose by these weights; the chosen candidate first."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, candidates, len(weights))) * scale
    odds = x @ np.array(weights) + rng.gumbel(size=(n, candidates))
    order = np.argsort(-odds, axis=1)
    x = np.take_along_axis(x, order[:, :, None], 1)
    return [x[:, :, f] for f in range(len(weights))]


def test_the_weights_that_users_chose_by_are_found() -> None:
    found = fit(_chosen([1.5, 0.5, 0.0], 8000, 10))
    assert found == pytest.approx([1.5, 0.5, 0.0], abs=0.06)


def test_a_weight_goes_with_its_score_whatever_its_unit() -> None:
    scores = _chosen([1.0, 0.5], 2000, 8)
    plain, other = fit(scores), fit([100 * scores[0] + 7, 0.01 * scores[1]])
    assert other == pytest.approx([plain[0] / 100, plain[1] * 100], rel=1e-3)


def test_a_score_that_misleads_or_says_nothing_counts_nothing() -> None:
    good, bad = _chosen([1.0, -1.0], 2000, 8)
    found = fit([good, bad, np.ones_like(good)])
    assert found[0] > 0.4
    assert found[1:] == pytest.approx([0.0, 0.0])


def test_users_who_always_chose_the_best_make_no_weight_infinite() -> None:
    scores = -np.sort(-np.random.default_rng(1).normal(size=(50, 6)), axis=1)
    assert 1 < fit([scores])[0] < 100


def test_users_may_have_fewer_candidates() -> None:
    scores = _chosen([1.0, 0.5], 3000, 6)
    whole = fit(scores)
    # Padding that is no candidate changes nothing.
    assert fit([np.pad(s, ((0, 0), (0, 3)), constant_values=np.nan) for s in scores]) == pytest.approx(whole, rel=1e-4)
    few = [np.where(np.arange(6) < 4, s, np.nan) for s in scores]
    assert np.isfinite(fit(few)).all()


@pytest.mark.parametrize("scores", [[], [np.zeros((0, 5))]])
def test_without_users_or_scores_there_are_no_weights(scores: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="weights need"):
        fit(scores)
