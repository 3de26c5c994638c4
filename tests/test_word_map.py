"""udfs/word_map.py: the ridge regression from words to vectors, against its closed form."""

from __future__ import annotations

import numpy as np
import pytest

from udfs import word_map
from udfs.tfidf import tfidf

TEXTS = ["red wine bottle", "white wine bottle", "garden hose", "green garden hose reel", "wine glass", "", "the"]


@pytest.mark.parametrize("ridge", [0.1, 1.0, 10.0])
def test_words_get_the_vectors_of_least_squares(ridge: float) -> None:
    targets = np.random.default_rng(0).normal(size=(len(TEXTS), 4)).astype(np.float32)
    found = word_map.fit(TEXTS, targets, ridge)
    assert found is not None
    rows = tfidf(TEXTS).toarray().astype(np.float64)
    expected = np.linalg.solve(rows.T @ rows + ridge * np.eye(rows.shape[1]), rows.T @ targets)
    np.testing.assert_allclose(found.vectors, expected, atol=3e-3)
    np.testing.assert_allclose(found(TEXTS), rows @ expected, atol=3e-3)
    assert found.words == sorted({word for text in TEXTS for word in text.split()} - {"the"})


def test_a_text_without_a_known_word_lies_nowhere() -> None:
    found = word_map.fit(TEXTS, np.ones((len(TEXTS), 2), np.float32), 1.0)
    assert found is not None
    placed = found(["sofa", "", "sofa WINE", "wine"])
    assert not placed[:2].any()
    np.testing.assert_allclose(placed[2], placed[3])
    assert placed[3].any()


def test_the_map_is_what_its_table_says() -> None:
    found = word_map.fit(TEXTS, np.random.default_rng(1).normal(size=(len(TEXTS), 3)).astype(np.float32), 1.0)
    assert found is not None
    again = word_map.from_table(word_map.to_table(found))
    assert found(TEXTS).tobytes() == again(TEXTS).tobytes()


def test_texts_without_any_word_have_no_map() -> None:
    assert word_map.fit(["", "the"], np.ones((2, 2), np.float32), 1.0) is None
