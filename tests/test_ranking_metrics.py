"""udfs/ranking_metrics.py, udfs/floors.py and udfs/scorers.py against a plain float64 reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import sparse

from udfs import floors, scorers
from udfs.ranking_metrics import bootstrap, per_user, task, top_k
from udfs.tfidf import tfidf


def reference(scores, candidates, truth, known, ks):
    """Python loops over one user at a time; `scores` [U, I] float64. Returns metric -> {user: value}."""
    values = {}
    for user in sorted({u for u, i in truth if i in set(candidates)}):
        true = {i for u, i in truth if u == user and i in set(candidates)}
        masked = {i for u, i in known if u == user} - true
        allowed = [(position, i) for position, i in enumerate(candidates) if i not in masked]
        ranked = sorted(allowed, key=lambda pair: (-float(scores[user, pair[1]]), pair[0]))
        ranked = [i for _, i in ranked if scores[user, i] > -math.inf]
        for k in ks:
            hits = [1.0 if i in true else 0.0 for i in ranked[:k]]
            dcg = sum(h / math.log2(r + 2) for r, h in enumerate(hits))
            ideal = sum(1 / math.log2(r + 2) for r in range(min(k, len(true))))
            values.setdefault(f"ndcg@{k}", {})[user] = dcg / ideal
            values.setdefault(f"recall@{k}", {})[user] = sum(hits) / len(true)
            values.setdefault(f"hit@{k}", {})[user] = float(sum(hits) > 0)
    return values


def pairs_of(matrix):
    users, items = np.nonzero(matrix)
    return users.astype(np.int64), items.astype(np.int64)


@pytest.mark.parametrize("chunk_scores", [1, 90, 10**6])
@pytest.mark.parametrize("levels", [5, 10**6])  # five distinct scores: nearly everything is tied
def test_metrics_are_those_of_the_reference(chunk_scores, levels):
    rng = np.random.default_rng(3)
    users, items = 40, 60
    scores = (rng.integers(0, levels, (users, items)) / levels).astype(np.float32)
    scores[:, 7] = -np.inf
    candidates = rng.permutation(items)[:45].astype(np.int64)
    truth, known = rng.random((users, items)) < 0.06, rng.random((users, items)) < 0.2
    built = task(candidates, pairs_of(truth), pairs_of(known))
    found = per_user(lambda rows: scores[rows][:, candidates], built, (1, 5, 20, 100), chunk_scores)
    expected = reference(
        scores.astype(np.float64), candidates.tolist(), set(zip(*np.nonzero(truth), strict=True)),
        set(zip(*np.nonzero(known), strict=True)), (1, 5, 20, 100),
    )  # fmt: skip
    assert len(found) == 12
    assert len(built.users) < users  # somebody has no truth among the candidates, and takes no part
    for name, values in found.items():
        assert built.users.tolist() == list(expected[name])
        np.testing.assert_allclose(values, list(expected[name].values()), rtol=0, atol=1e-12, err_msg=name)


def test_a_case_worked_by_hand():
    # User 0: ranks 0 (masked), 1 (hit), 2, 3 (hit); two true items, so the ideal is 1 + 1/log2(3).
    built = task(np.arange(4), (np.array([0, 0]), np.array([1, 3])), (np.array([0]), np.array([0])))
    found = per_user(lambda rows: np.array([[0.9, 0.8, 0.7, 0.6]], np.float32), built, (2, 3))
    assert found["ndcg@3"][0] == pytest.approx((1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3)))
    assert found["ndcg@2"][0] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert (found["recall@2"][0], found["recall@3"][0], found["hit@2"][0]) == (0.5, 1.0, 1.0)


def test_users_are_limited_to_those_named():
    built = task(
        np.arange(3), (np.array([0, 1, 2]), np.array([0, 1, 2])), (np.array([]), np.array([])), np.array([2, 0])
    )
    assert built.users.tolist() == [0, 2]


def test_no_candidates_and_no_users():
    empty = (np.array([], np.int64), np.array([], np.int64))
    built = task(np.array([], np.int64), (np.array([0]), np.array([0])), empty)
    assert len(built.users) == 0
    assert per_user(lambda rows: np.zeros((len(rows), 0), np.float32), built, (20,))["ndcg@20"].shape == (0,)


def test_top_k_is_that_of_a_stable_sort():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (50, 33)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    for k in (1, 7, 33, 50):
        np.testing.assert_array_equal(top_k(scores, k), np.argsort(-scores, axis=1, kind="stable")[:, :k])
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        top_k(np.array([[np.nan, 1.0]], np.float32), 1)


def test_bootstrap_covers_the_mean_it_is_of_and_is_seeded():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        values = rng.exponential(2.0, (80, 1))
        low, high = bootstrap(values, 200, seed=trial)
        assert low[0] < values.mean() < high[0]
        covered += low[0] <= 2.0 <= high[0]
    assert 175 <= covered <= 198  # of 200 intervals of 95 %; percentile intervals are a little narrow on skewed data
    np.testing.assert_array_equal(bootstrap(values, 50, 9), bootstrap(values, 50, 9))
    assert bootstrap(values, 0, 9) is None
    assert bootstrap(values[:0], 50, 9) is None


def test_random_scores_are_uniform_and_belong_to_their_ids():
    users, items = [f"u{i}" for i in range(200)], [f"i{i}" for i in range(300)]
    user_hashes, item_hashes = floors.id_hashes(users, 7), floors.id_hashes(items, 7)
    candidates = np.arange(300)
    scores = floors.random_scorer(user_hashes, item_hashes, candidates)(np.arange(200))
    assert abs(scores.mean() - 0.5) < 0.01
    assert scores.min() >= 0
    assert scores.max() < 1
    assert abs(np.corrcoef(scores[0], scores[1])[0, 1]) < 0.25
    assert abs(np.corrcoef(scores[:, 0], scores[:, 1])[0, 1]) < 0.25
    few = floors.random_scorer(floors.id_hashes(["u5"], 7), floors.id_hashes(["i9", "i3"], 7), np.array([1, 0]))
    np.testing.assert_array_equal(few(np.array([0])), scores[5:6][:, [3, 9]])
    other = floors.random_scorer(floors.id_hashes(users, 8), floors.id_hashes(items, 8), candidates)(np.arange(200))
    assert not np.array_equal(other, scores)


def test_popularity_is_the_number_of_interactions():
    scores = floors.popularity_scorer(np.array([5, 0, 9]), np.array([2, 1]))(np.array([0, 1]))
    np.testing.assert_array_equal(scores, [[9, 0], [9, 0]])


def test_text_knn_is_what_the_nearest_texts_in_the_history_weigh(monkeypatch):
    monkeypatch.setattr(floors, "NEIGHBOURS", 2)
    monkeypatch.setattr(floors, "POWER", 1)
    # Item 3 is nobody's yet, item 4 has no text.
    rows = sparse.csr_array(np.array([[1, 0], [0.6, 0.8], [0, 1], [0.8, 0.6], [0, 0]], np.float32))
    history = sparse.csr_array(np.array([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool))
    neighbours = floors.text_neighbours(rows, np.array([2, 0, 4, 1]))
    scores = floors.text_knn_scorer(neighbours, history, np.array([3, 0, 4]))(np.array([0, 1, 2, 3]))
    # 3 is near 1 (.96) and 0 (.8), and 2 (.6) is one too many; 0 is near 1 (.6), and nothing else has its words but itself.
    root = math.sqrt(0.96 + 0.8)
    expected = [[0.8 / root, 0, 0], [0.96 / root, math.sqrt(0.6), 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores.dtype == np.float32


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("cosines", [1, 120, 4_000_000])
def test_text_neighbours_are_those_of_a_plain_search_in_pieces_of_any_size(cosines, power, monkeypatch):
    rng = np.random.default_rng(8)
    # Small whole numbers: many texts are the same, and many likenesses equal.
    rows = sparse.csr_array((rng.random((70, 9)) < 0.2) * rng.integers(1, 3, (70, 9)).astype(np.float32))
    known = rng.permutation(70)[:50]
    monkeypatch.setattr(floors, "NEIGHBOURS", 6)
    monkeypatch.setattr(floors, "POWER", power)
    whole = floors.text_neighbours(rows, known)
    monkeypatch.setattr(floors, "_COSINES", cosines)
    found = floors.text_neighbours(rows, known)
    assert (found != whole).nnz == 0
    dense, alike = rows.toarray(), (rows @ rows.T).toarray()
    assert len(np.unique(dense, axis=0)) < 60
    expected, cut_ties = np.zeros((70, 70)), 0
    for item in range(70):
        others = [k for k in known if k != item and alike[item, k] > 0]
        nearest = sorted(others, key=lambda k: -alike[item, k])  # stable: equal ones as they are in `known`
        cut_ties += len(nearest) > 6 and alike[item, nearest[5]] == alike[item, nearest[6]]
        weights = alike[item, nearest[:6]].astype(np.float64) ** power
        expected[item, nearest[:6]] = weights / np.sqrt(weights.sum())
    assert cut_ties > 20
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-6)
    assert found.dtype == np.float32


def test_without_texts_or_training_items_there_are_no_neighbours():
    assert floors.text_neighbours(tfidf([None, "the", ""]), np.array([0, 1])).nnz == 0
    nothing = floors.text_neighbours(tfidf(["red wine", "red wine"]), np.array([], np.int64))
    assert (nothing.shape, nothing.nnz) == ((2, 2), 0)


@pytest.mark.parametrize("dense", [1, 8_000_000])
def test_the_text_profile_is_the_cosine_to_the_mean_of_the_history(dense, monkeypatch):
    monkeypatch.setattr(floors, "_DENSE", dense)  # 1: user by user
    texts = ["red wine bottle", "white wine bottle", "garden hose", None, "the", "sparkling wine", "green hose reel"]
    rows = tfidf(texts)
    history = sparse.csr_array(np.array([[1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0]], bool))
    candidates = np.array([6, 5, 4])
    scores = floors.text_profile_scorer(rows, history, candidates)(np.array([0, 1, 2]))
    dense = rows.toarray().astype(np.float64)
    profile = dense[[0, 1]].mean(axis=0)
    cosine = dense[candidates] @ profile / np.linalg.norm(profile)
    np.testing.assert_allclose(scores[0], cosine, atol=1e-6)
    assert scores[0].argmax() == 1  # the wine
    assert scores[1].argmax() == 0  # the hose
    assert not scores[2].any()  # nothing is known of what this user likes
    assert not tfidf([None, ""]).toarray().any()


def test_dot_scores_are_minus_infinity_where_a_vector_is_missing():
    users = np.eye(2, dtype=np.float32)
    items = np.array([[1, 2], [np.nan, np.nan]], np.float32)
    scores = scorers.dot_scorer(users, items, np.array([4, 5]), np.array([True, False]))(np.array([0, 1]))
    np.testing.assert_array_equal(scores, [[1, -np.inf], [-np.inf, -np.inf]])


@pytest.mark.parametrize("normalize", [True, False])
def test_the_distribution_is_a_softmax_over_the_known_users(normalize):
    rng = np.random.default_rng(4)
    queries, keys = rng.normal(size=(6, 5)).astype(np.float32), rng.normal(size=(9, 5)).astype(np.float32)
    bias, known = rng.normal(size=9).astype(np.float32), np.array([1, 1, 0, 1, 1, 1, 0, 1, 1], bool)
    queries[4] = np.nan
    scores = scorers.distribution_scorer(queries, keys, bias, np.arange(6), known, normalize)(np.arange(9))
    logits = (queries.astype(np.float64) @ keys.T.astype(np.float64) + bias).T
    if normalize:
        logits -= np.log(np.exp(logits[known]).sum(axis=0))
        np.testing.assert_allclose(np.exp(scores[known][:, [0, 1, 2, 3, 5]]).sum(axis=0), 1, rtol=1e-5)
    keep = [0, 1, 2, 3, 5]
    np.testing.assert_allclose(scores[known][:, keep], logits[known][:, keep], rtol=1e-4, atol=1e-5)
    assert np.isneginf(scores[~known]).all()
    assert np.isneginf(scores[:, 4]).all()


def test_log_sum_exp_is_the_same_for_any_tile_and_does_not_overflow():
    rng = np.random.default_rng(5)
    queries, keys = 60 * rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(50, 3)).astype(np.float32)
    logits = queries @ keys.T
    exact = np.logaddexp.reduce(queries.astype(np.float64) @ keys.T.astype(np.float64), axis=1)
    for width in (1, 12, 50):
        tiles = (logits[:, start : start + width] for start in range(0, 50, width))
        np.testing.assert_allclose(scorers.log_sum_exp(tiles, 4), exact, rtol=1e-6)
    assert np.isneginf(scorers.log_sum_exp([], 4)).all()
