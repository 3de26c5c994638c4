"""Closed-form fold-in: against the formula written out, and against Spark's ALS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from udfs import fold_in as module
from udfs.cf_inputs import CfParams
from udfs.cf_model import fit
from udfs.fold_in import FoldInError, fold_in, gram, norm_scale, to_csr


def _rows(n: int, users: int, seed: int = 0, longest: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, longest, n)
    indices = np.concatenate([rng.choice(users, c, replace=False) for c in counts])
    return np.concatenate([[0], np.cumsum(counts)]), indices, rng.random(len(indices)) + 0.1


def _written_out(vectors: np.ndarray, pairs: Any, alpha: float, regularization: float) -> np.ndarray:
    indptr, indices, weights = pairs
    y = vectors.astype(np.float64)
    found = np.zeros((len(indptr) - 1, y.shape[1]))
    for row in range(len(found)):
        mine = slice(indptr[row], indptr[row + 1])
        confidence = np.zeros(len(y))
        confidence[indices[mine]] = alpha * weights[mine]
        prefer = np.zeros(len(y))
        prefer[indices[mine]] = 1
        if prefer.any():
            left = y.T @ np.diag(1 + confidence) @ y + regularization * prefer.sum() * np.eye(y.shape[1])
            found[row] = np.linalg.solve(left, y.T @ np.diag(1 + confidence) @ prefer)
    return found


def test_it_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32)
    pairs = _rows(50, 40)
    expected = _written_out(vectors, pairs, 40.0, 0.05)
    found = fold_in(vectors, *pairs, alpha=40.0, regularization=0.05)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)
    empty = np.diff(pairs[0]) == 0
    assert empty.any()
    assert not found[empty].any()
    # In many small steps, rows longer than a step among them: the same.
    monkeypatch.setattr(module, "_BUDGET", 100)
    small = fold_in(vectors, *pairs, alpha=40.0, regularization=0.05)
    np.testing.assert_allclose(small, expected, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(gram(vectors), vectors.astype(np.float64).T @ vectors.astype(np.float64), rtol=1e-12)


def test_a_rotation_of_the_space_rotates_what_is_folded_in() -> None:
    rng = np.random.default_rng(2)
    vectors, turn = rng.standard_normal((40, 6)), np.linalg.qr(rng.standard_normal((6, 6)))[0]
    pairs = _rows(20, 40, seed=3)
    one = fold_in(vectors, *pairs, alpha=5.0, regularization=0.1)
    other = fold_in(vectors @ turn, *pairs, alpha=5.0, regularization=0.1)
    np.testing.assert_allclose(other, one @ turn, atol=1e-5)


def test_what_cannot_be_solved_is_said() -> None:
    flat = np.ones((4, 3), np.float32)
    pairs = (np.array([0, 1]), np.array([2]), np.array([1.0]))
    with pytest.raises(FoldInError, match="1 of 1 systems of 3 equations are singular"):
        fold_in(flat, *pairs, alpha=1.0, regularization=0.0)
    with pytest.raises(ValueError, match="indices must lie in 0"):
        fold_in(flat, np.array([0, 1]), np.array([4]), np.array([1.0]), alpha=1.0, regularization=0.1)


def test_to_csr_orders_pairs() -> None:
    indptr, indices, weights = to_csr(np.array([2, 0, 2]), np.array([9, 4, 3]), np.array([0.1, 0.2, 0.3]), 4)
    assert indptr.tolist() == [0, 1, 1, 3, 3]
    assert indices.tolist() == [4, 3, 9]
    assert weights.tolist() == [0.2, 0.3, 0.1]


def test_in_a_space_of_spark_als_own_pairs_give_back_the_trained_vector(spark: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    taste = rng.standard_normal((120, 3)) @ rng.standard_normal((3, 80))
    users, items = np.nonzero(taste + rng.standard_normal(taste.shape) > 1.5)
    weights = rng.integers(1, 4, len(users)).astype(float)
    table = pa.table({"user_idx": users.astype(np.int32), "item_idx": items.astype(np.int32), "weight": weights})
    params = CfParams(dimension=8, epochs=25, alpha=10.0, regularization=0.05, blocks=1, checkpoint_dir=str(tmp_path))
    y, x = fit("als", spark.createDataFrame(table), 120, 80, params, seed=1)

    cosine = lambda a, b: (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))  # noqa: E731
    by_item = fold_in(y, *to_csr(items, users, weights, 80), alpha=10.0, regularization=0.05)
    trained = np.flatnonzero(x.any(1))
    assert cosine(by_item[trained], x[trained]).min() > 0.99
    # Spark solves users last: for them the system is the very same one, lengths included.
    by_user = fold_in(x, *to_csr(users, items, weights, 120), alpha=10.0, regularization=0.05)
    np.testing.assert_allclose(by_user, y, rtol=1e-3, atol=1e-4)


def test_scale_makes_the_median_fold_in_as_long_as_the_median_trained_row() -> None:
    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((40, 6)).astype(np.float32)
    pairs = _rows(31, 40, seed=3)
    plain = fold_in(vectors, *pairs, alpha=5.0, regularization=0.1)
    # Trained rows that point elsewhere, one of them absurdly long: neither moves the median length.
    trained = 2.5 * plain @ np.linalg.qr(rng.standard_normal((6, 6)))[0]
    trained[np.linalg.norm(plain, axis=1).argmax()] *= 100
    scale = norm_scale(trained, plain)
    assert scale == pytest.approx(2.5, rel=1e-5)
    scaled = fold_in(vectors, *pairs, alpha=5.0, regularization=0.1, scale=scale)
    np.testing.assert_allclose(scaled, 2.5 * plain, rtol=1e-5)
    assert norm_scale(trained, np.zeros_like(plain)) == 1.0


def test_a_share_of_a_pair_is_that_part_of_one() -> None:
    """Two halves of a pair are the pair; a row of all shares 3 is the row with each pair three times."""
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(9, 4)).astype(np.float32)
    options = {"alpha": 7.0, "regularization": 0.1}
    whole = fold_in(vectors, np.array([0, 2]), np.array([1, 4]), np.array([1.0, 2.0]), **options)
    halves = fold_in(
        vectors,
        np.array([0, 4]),
        np.array([1, 1, 4, 4]),
        np.array([1.0, 1.0, 2.0, 2.0]),
        shares=np.full(4, 0.5),
        **options,
    )
    np.testing.assert_allclose(halves, whole, atol=1e-6)
    thrice = fold_in(vectors, np.array([0, 3]), np.array([6, 6, 6]), np.ones(3), **options)
    shared = fold_in(vectors, np.array([0, 1]), np.array([6]), np.ones(1), shares=np.array([3.0]), **options)
    np.testing.assert_allclose(shared, thrice, atol=1e-6)
