"""udfs/blend.py: how much of each vector, and how long, on items whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from udfs.blend import Blend, measured

RNG = np.random.default_rng(0)
TRAINED = RNG.normal(size=(200, 6)).astype(np.float32)
GRAM = np.eye(6)
ONCE = np.ones(len(TRAINED), np.int64)


def _length(vectors: np.ndarray) -> float:
    return float(np.median(np.linalg.norm(vectors, axis=1)))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_two_halves_of_the_truth_get_their_shares(share: float) -> None:
    """The vectors see different numbers of the truth, the words' ones at a fraction of their length."""
    seen = np.array([1, 1, 1, 0, 0, 0], np.float32)
    folded, worded = TRAINED * seen, TRAINED * (1 - seen) * (1 - share) / share
    found = measured(TRAINED, folded, 0.01 * worded, GRAM, ONCE)
    # Both are made equally long first: what least squares add of each is then as their lengths are.
    expected = _length(worded * share / (1 - share)) / (_length(folded) + _length(worded * share / (1 - share)))
    assert found.words == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(found(folded, 0.01 * worded), TRAINED, rtol=0.15, atol=1e-3)


def test_the_blend_is_as_long_as_the_trained_vectors() -> None:
    folded = 0.1 * (TRAINED + RNG.normal(size=TRAINED.shape)).astype(np.float32)
    worded = 0.02 * (TRAINED + RNG.normal(size=TRAINED.shape)).astype(np.float32)
    found = measured(TRAINED, folded, worded, GRAM, ONCE)
    assert 0.4 < found.words < 0.6
    assert _length(found(folded, worded)) == pytest.approx(_length(TRAINED), rel=1e-5)
    assert found.scale * _length(folded) == pytest.approx(_length(TRAINED), rel=1e-5)
    alone = np.zeros_like(worded)
    np.testing.assert_allclose(found(folded, alone), found.scale * folded, rtol=1e-6)
    given = measured(TRAINED, folded, worded, GRAM, ONCE, scale=3.0, words=0.1)
    assert (given.scale, given.words) == (3.0, 0.1)
    assert _length(given(folded, worded)) == pytest.approx(3 * _length(folded), rel=1e-5)


def test_words_that_say_nothing_are_left_out() -> None:
    noise = RNG.normal(size=TRAINED.shape).astype(np.float32)
    assert measured(TRAINED, TRAINED, noise, GRAM, ONCE).words < 0.05
    assert measured(TRAINED, TRAINED, -TRAINED + 0.1 * noise, GRAM, ONCE).words == 0
    assert measured(TRAINED, noise, TRAINED, GRAM, ONCE).words > 0.95
    for nothing in (None, np.zeros_like(noise)):
        assert measured(TRAINED, TRAINED / 2, nothing, GRAM, ONCE) == Blend(scale=2.0, folded=2.0)


def test_what_the_users_do_not_see_does_not_count() -> None:
    """Vectors are compared by the scores that they give: a direction that no user has is free."""
    gram = np.diag([1.0, 1, 1, 1, 1, 0])
    far = TRAINED.copy()
    far[:, 5] += 1
    assert measured(TRAINED, far, RNG.normal(size=TRAINED.shape).astype(np.float32), gram, ONCE).words < 0.05


def test_an_item_counts_by_its_interactions() -> None:
    """The users see the first half of the items right, the words the second."""
    first = np.arange(len(TRAINED))[:, None] < len(TRAINED) // 2
    noise = RNG.normal(size=TRAINED.shape).astype(np.float32)
    folded, worded = np.where(first, TRAINED, noise), np.where(first, noise, TRAINED)
    often = np.where(first[:, 0], 20, 1)
    shares = [measured(TRAINED, folded, worded, GRAM, counts).words for counts in (often, ONCE, 21 - often)]
    assert shares[0] < 0.1
    assert 0.4 < shares[1] < 0.6
    assert shares[2] > 0.9


def test_items_without_a_known_word_say_nothing_of_words() -> None:
    known = np.arange(len(TRAINED))[:, None] % 3 == 0  # a third of them, so that the median length of all would be 0
    folded = 0.1 * (TRAINED + RNG.normal(size=TRAINED.shape)).astype(np.float32)
    worded = 0.02 * (TRAINED + RNG.normal(size=TRAINED.shape)).astype(np.float32)
    found = measured(TRAINED, folded, np.where(known, worded, 0), GRAM, ONCE)
    rows = known[:, 0]
    whole = np.float32(found.scale) * folded
    alone = measured(TRAINED[rows], folded[rows], worded[rows], GRAM, ONCE[rows], scale=found.scale)
    assert found == alone
    assert _length(found(folded, worded)[rows]) == pytest.approx(_length(whole[rows]), rel=1e-5)
