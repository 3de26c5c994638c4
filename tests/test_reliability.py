"""udfs/reliability.py against a dense float64 computation, and on distributions whose calibration is known."""

from __future__ import annotations

import numpy as np
import pytest

from udfs.reliability import BINS, PER_DECADE, reliability


def model(n, users, d=6, seed=0, spread=1.5):
    rng = np.random.default_rng(seed)
    queries = (spread * rng.normal(size=(n, d))).astype(np.float32)
    keys = rng.normal(size=(users, d)).astype(np.float32)
    return queries, keys, rng.normal(size=users).astype(np.float32)


def softmax(queries, keys, bias):
    logits = queries.astype(np.float64) @ keys.astype(np.float64).T + (0 if bias is None else bias.astype(np.float64))
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def csr(sets):
    return np.concatenate([[0], np.cumsum([len(s) for s in sets])]), np.array([u for s in sets for u in s], np.int64)


def drawn(p, rng, low=1, high=6):
    """Users of each item, drawn from p; distinct, as a truth's are. The first item has none."""
    n_of = rng.integers(low, high, len(p))
    return [[]] + [
        sorted(rng.choice(p.shape[1], n, replace=False, p=row)) for n, row in zip(n_of[1:], p[1:], strict=True)
    ]


@pytest.mark.parametrize("tile", [100, 7_000, 10**9])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_dense_computation_in_float64(tile, with_bias):
    queries, keys, bias = model(40, 333)
    bias = bias if with_bias else None
    p = softmax(queries, keys, bias)
    sets = drawn(p, np.random.default_rng(1))
    found = reliability(queries, keys, bias, *csr(sets), tile=tile)
    q = np.zeros_like(p)
    for row, one in enumerate(sets):
        q[row, one] = 1 / max(1, len(one))
    p, q = p[1:], q[1:]
    edges = 10.0 ** (np.arange(-BINS, 1) / PER_DECADE)
    bins = np.clip(np.digitize(p, edges) - 1, 0, BINS - 1)
    assert found.items == 39
    np.testing.assert_array_equal(found.pairs, np.bincount(bins.ravel(), minlength=BINS))
    np.testing.assert_allclose(found.predicted, [p[bins == b].sum() for b in range(BINS)], rtol=1e-5)
    np.testing.assert_allclose(found.observed, [q[bins == b].sum() for b in range(BINS)], rtol=1e-12, atol=1e-12)
    error = sum(abs(p[bins == b].sum() - q[bins == b].sum()) for b in range(BINS)) / 39
    assert found.calibration_error == pytest.approx(error, rel=1e-4)
    assert [point[0] for point in found.points] == sorted(set(bins.ravel()))


def test_users_drawn_from_p_lie_on_the_diagonal_and_sharper_ones_do_not():
    queries, keys, bias = model(6000, 200, seed=3)
    p = softmax(queries, keys, bias)
    rng = np.random.default_rng(4)
    # One user an item: drawing several without replacement would already flatten what is observed.
    users = (p.cumsum(1) > rng.random(len(p))[:, None]).argmax(1)
    indptr = np.arange(len(p) + 1)
    found = reliability(queries, keys, bias, indptr, users)
    assert found.predicted.sum() == pytest.approx(6000)
    assert found.observed.sum() == pytest.approx(6000)
    several = [point for point in found.points if found.observed[point[0]] >= 100]
    assert len(several) >= 5
    for _, pairs, mean_p, mean_q in several:
        deviation = np.sqrt(mean_p * (1 - mean_p) / pairs)
        assert abs(mean_p - mean_q) < 4 * deviation
    assert found.calibration_error < 0.05
    overconfident = reliability(2 * queries, keys, 2 * bias, indptr, users)
    assert overconfident.calibration_error > 0.3
    high = [q < 0.8 * p for b, _, p, q in overconfident.points if p > 0.3]
    assert high
    assert all(high)


def test_probabilities_below_the_lowest_bin_and_of_one_are_counted():
    queries = np.array([[60.0], [60.0]], np.float32)
    keys = np.array([[1.0], [0.0]], np.float32)
    found = reliability(queries, keys, None, *csr([[0], [1]]))
    assert (found.pairs[0], found.pairs[-1]) == (2, 2)
    assert found.calibration_error == pytest.approx(1.0)


def test_nothing_known_and_what_cannot_be():
    queries, keys, bias = model(3, 5)
    found = reliability(queries, keys, bias, *csr([[], [], []]))
    assert (found.items, found.points) == (0, [])
    assert np.isnan(found.calibration_error)
    with pytest.raises(ValueError, match=r"0 \.\. 4"):
        reliability(queries, keys, bias, *csr([[5], [], []]))
    with pytest.raises(ValueError, match="not finite"):
        reliability(queries * np.nan, keys, bias, *csr([[1], [], []]))
