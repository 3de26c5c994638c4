"""LLMInit: which dimensions are taken, how large the start is, where users and items without a text begin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from udfs.llm_init import LLMInit, LLMInitError, NarrowTextsError, start, text_map

N, WIDTH = 50, 12


def _texts() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((N, WIDTH)) * np.linspace(1, 3, WIDTH) + 0.5).astype(np.float32)


POPULARITY = np.arange(N)[::-1].copy()


def _columns(options: LLMInit, dimension: int, seed: int = 0, texts: np.ndarray | None = None) -> list[int]:
    """Which dimensions of the text the start's are."""
    raw = replace(options, scale="raw")
    found = text_map(_texts() if texts is None else texts, POPULARITY, dimension, raw, seed)
    assert not found.mean.any()
    assert set(np.unique(found.projection)) <= {0.0, 1.0}
    return found.projection.argmax(axis=0).tolist()


def test_dimensions_are_selected_as_the_paper_says() -> None:
    assert _columns(LLMInit("uniform"), 5) == [0, 2, 4, 6, 8]
    assert _columns(LLMInit("full"), WIDTH) == list(range(WIDTH))
    texts = _texts()
    texts[:10] *= np.where(np.isin(np.arange(WIDTH), [1, 4, 6]), 10, 1)  # they vary among the most popular fifth only
    assert _columns(LLMInit("variance"), 3, texts=texts) == [1, 4, 6]
    variance = texts.var(axis=0)
    assert _columns(LLMInit("variance", popular_share=1.0), 3, texts=texts) == sorted(
        np.argsort(-variance)[:3].tolist()
    )

    drawn = [_columns(LLMInit("random"), 8, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 8
    assert len(set(_columns(LLMInit("random", replacement=True), WIDTH, 1))) < WIDTH


def test_principal_components_keep_what_selection_loses() -> None:
    rng = np.random.default_rng(1)
    plane = rng.standard_normal((N, 3)) @ rng.standard_normal((3, WIDTH)) + 7
    texts = plane.astype(np.float32)
    found = text_map(texts, POPULARITY, 3, LLMInit("pca", scale="raw"), 0)(texts)
    distances = lambda x: np.linalg.norm(x[:, None] - x, axis=2)  # noqa: E731
    np.testing.assert_allclose(distances(found), distances(texts), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-4)
    assert (np.diff(found.var(axis=0)) < 0).all()


@pytest.mark.parametrize("select", ["variance", "pca"])
def test_scales_make_encoders_of_other_magnitudes_alike(select: str) -> None:
    texts = _texts()
    for magnitude in (1.0, 100.0):
        of = {
            scale: text_map(texts * magnitude, POPULARITY, 4, LLMInit(select, scale=scale, std=0.2), 0)(
                texts * magnitude
            )  # type: ignore[arg-type]
            for scale in ("raw", "unit_variance", "unit_norm")
        }
        np.testing.assert_allclose(of["unit_variance"].std(axis=0), 0.2, rtol=1e-3)
        np.testing.assert_allclose(of["unit_variance"].mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(of["unit_norm"], axis=1), 0.4, rtol=1e-4)
        cosine = (of["unit_norm"] * of["raw"]).sum(1) / np.linalg.norm(of["raw"], axis=1) / 0.4
        np.testing.assert_allclose(cosine, 1, rtol=1e-4)
        if select == "variance":
            np.testing.assert_array_equal(of["raw"], (texts * magnitude)[:, _columns(LLMInit("variance"), 4)])


def test_users_begin_at_the_mean_of_their_items() -> None:
    texts = _texts()[:4]
    texts[2] = np.nan
    of_text = text_map(texts[[0, 1, 3]], np.ones(3, int), 5, LLMInit("uniform", scale="raw"), 0)
    users, items = start(texts, np.array([0, 0, 2]), np.array([0, 3, 2]), 3, of_text, 0.1, 0)
    own = texts[:, [0, 2, 4, 6, 8]]
    np.testing.assert_array_equal(items[[0, 1, 3]], own[[0, 1, 3]])
    np.testing.assert_allclose(items[2], own[[0, 1, 3]].mean(axis=0), rtol=1e-6)  # no text
    np.testing.assert_allclose(users[0], (own[0] + own[3]) / 2, rtol=1e-6)
    np.testing.assert_allclose(users[1], items.mean(axis=0), rtol=1e-5)  # no pair
    np.testing.assert_array_equal(users[2], items[2])
    assert users.dtype == items.dtype == np.float32


def test_widths_that_do_not_fit_and_no_text_are_errors() -> None:
    with pytest.raises(NarrowTextsError, match=r"cf.dimension is 13 and the text embeddings have 12 .* of 12 at most"):
        text_map(_texts(), POPULARITY, 13, LLMInit(), 0)
    with pytest.raises(LLMInitError, match=r"needs cf\.dimension=12"):
        text_map(_texts(), POPULARITY, 4, LLMInit("full"), 0)
    with pytest.raises(LLMInitError, match="nothing to start from"):
        text_map(_texts()[:0], POPULARITY[:0], 4, LLMInit(), 0)
    with pytest.raises(LLMInitError, match="nothing to start from"):
        text_map(_texts()[[1, 1, 1]], POPULARITY[:3], 4, LLMInit(), 0)


@pytest.mark.parametrize("scale", ["unit_variance", "raw", "unit_norm"])
def test_few_different_texts_throw_no_new_one_far_away(scale: Any) -> None:
    texts, few = _texts(), np.tile(_texts()[:3], (10, 1))
    of_text = text_map(few, np.ones(len(few), int), 6, LLMInit("pca", scale=scale, std=0.1), 0)
    assert np.count_nonzero(of_text.projection.any(axis=0)) == 2  # three points lie in a plane
    assert np.linalg.norm(of_text(texts), axis=1).max() < 5 * np.linalg.norm(of_text(few), axis=1).max()
    pair = np.arange(len(few))
    users, items = start(few, pair, pair, len(few), of_text, 0.1, 0)
    np.testing.assert_array_equal(items[:, :2], of_text(few)[:, :2])
    assert 0.05 < items[:, 2:].std() < 0.2  # dimensions that no text moves are there to be learnt
    np.testing.assert_allclose(users, items, rtol=1e-5)
