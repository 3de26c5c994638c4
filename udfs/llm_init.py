"""LLMInit (Zhang et al. 2025, arXiv 2503.01814): text embeddings of the items as the start of a CF model.

A CF space is narrower than a language model's, so some of the text's dimensions are selected (or, beyond the paper, its
principal components are taken). Items begin there, a user begins at the mean of its items, and all are then trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse

from schemas.errors import ColdRefreshError
from udfs.vectors import Matrix

# Of the largest deviation: a dimension with less says nothing of the texts.
_LEAST = 1e-4

Select = Literal["random", "uniform", "variance", "pca", "full"]
Scale = Literal["raw", "unit_variance", "unit_norm"]


class LLMInitError(ColdRefreshError):
    """The start cannot be made: the message says which widths do not fit, or that there is no text."""


class NarrowTextsError(LLMInitError):
    """The space is wider than the text embeddings are."""


@dataclass(frozen=True)
class LLMInit:
    """How the start is made (section 3 of the paper, but for pca and the scales).

    select: random: dimensions drawn (with replacement as in the released code, if `replacement`); uniform: every
    floor(D / d)-th; variance: those that vary most over the most popular `popular_share` of the items, in ascending order;
    pca: the first d principal components; full: all of them.
    scale: raw; unit_variance: each dimension centred and divided by its standard deviation over the items; unit_norm: each
    vector divided by its length. The last two are then as large as the random start with `std` would be: raw magnitudes
    differ between encoders.
    """

    select: Select = "pca"
    replacement: bool = False
    popular_share: float = 0.2
    scale: Scale = "unit_variance"
    std: float = 0.1


@dataclass(frozen=True)
class TextMap:
    """From text embeddings to the start: x -> (x - mean) @ projection, then each row of length `length` unless that is 0.

    mean [D] float32, projection [D, d] float32.
    """

    mean: npt.NDArray[np.float32]
    projection: Matrix
    length: float

    def __call__(self, texts: Matrix) -> Matrix:
        """Of texts [n, D]: [n, d] float32."""
        vectors = (texts - self.mean) @ self.projection
        if self.length:
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors * (self.length / np.maximum(norms, np.finfo(np.float32).tiny))
        return vectors.astype(np.float32)

    def rotated(self, rotation: npt.NDArray[np.floating], factor: float = 1.0) -> TextMap:
        """With each vector multiplied by a rotation [d, d] and a factor."""
        scaled = 1.0 if self.length else factor
        return TextMap(self.mean, (self.projection @ rotation * scaled).astype(np.float32), self.length * factor)


def text_map(
    texts: Matrix, popularity: npt.NDArray[np.integer], dimension: int, options: LLMInit, seed: int
) -> TextMap:
    """Choose the map of the items' texts [n, D], whose numbers of training pairs are `popularity` [n].

    Raises:
        NarrowTextsError: the text is narrower than `dimension`.
        LLMInitError: no two items differ, or the text is wider than `dimension` and all of it is asked for.
    """
    n, width = texts.shape
    if not n or not np.ptp(texts, axis=0).any():
        raise LLMInitError(
            "LLMInit: no two items to train on have different texts, so there is nothing to start from: set cf.init=random"
        )
    if dimension > width or (options.select == "full" and dimension != width):
        wanted = f"cf.dimension={width}" if options.select == "full" else f"a cf.dimension of {width} at most"
        kind = NarrowTextsError if dimension > width else LLMInitError
        raise kind(
            f"LLMInit: cf.dimension is {dimension} and the text embeddings have {width} dimensions; "
            f"cf.llminit.select={options.select} needs {wanted}"
        )
    mean = np.zeros(width, np.float32)
    if options.select == "pca":
        mean = texts.mean(axis=0, dtype=np.float64).astype(np.float32)
        projection = _principal_axes(texts, dimension)
    else:
        projection = np.zeros((width, dimension), np.float32)
        projection[_selected(texts, popularity, dimension, options, seed), np.arange(dimension)] = 1.0
    if options.scale == "unit_variance":
        mean = texts.mean(axis=0, dtype=np.float64).astype(np.float32)
    if options.scale == "unit_variance" or options.select == "pca":
        deviation = ((texts - mean) @ projection).std(axis=0, dtype=np.float64)
        # Along the others the texts differ by rounding only (there are few of them), and new ones would be thrown anywhere.
        told = deviation > _LEAST * deviation.max()
        factor = options.std / np.maximum(deviation, 1e-30) if options.scale == "unit_variance" else 1.0
        projection = projection * np.where(told, factor, 0.0)
    length = options.std * dimension**0.5 if options.scale == "unit_norm" else 0.0
    return TextMap(mean, projection.astype(np.float32), length)


def _selected(
    texts: Matrix, popularity: npt.NDArray[np.integer], dimension: int, options: LLMInit, seed: int
) -> npt.NDArray[Any]:
    width = texts.shape[1]
    if options.select == "random":
        return np.random.default_rng(seed).choice(width, dimension, replace=options.replacement)
    if options.select == "uniform":
        return np.arange(dimension) * (width // dimension)
    if options.select == "variance":
        popular = np.argsort(-popularity, kind="stable")[: max(1, int(options.popular_share * len(texts)))]
        variance = texts[popular].var(axis=0, dtype=np.float64)
        return np.sort(np.argsort(-variance, kind="stable")[:dimension])
    return np.arange(width)


def _principal_axes(texts: Matrix, dimension: int) -> Matrix:
    """[D, d], by descending variance; each axis' largest entry is positive, so that they do not depend on the solver."""
    _, vectors = np.linalg.eigh(np.cov(texts.T.astype(np.float64)))
    axes = vectors[:, ::-1][:, :dimension]
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(dimension)])
    return (axes * signs).astype(np.float32)


def start(
    texts: Matrix,
    users: npt.NDArray[np.integer],
    items: npt.NDArray[np.integer],
    n_users: int,
    of_text: TextMap,
    std: float,
    seed: int,
) -> tuple[Matrix, Matrix]:
    """Users [n_users, d] and items [n_items, d] to begin with.

    Dimensions that no text moves, which are zero in a map of few texts, are drawn at random for items, with deviation `std`:
    zeros on both sides would stay.

    Args:
        texts: [n_items, D]; rows of NaN for items without a text, which begin at the mean of the others.
        users, items: the training pairs. A user without one begins at the mean of all items.
    """
    there = np.isfinite(texts).all(axis=1)
    found = np.zeros((len(texts), of_text.projection.shape[1]), np.float32)
    found[there] = of_text(texts[there])
    found[~there] = found[there].mean(axis=0)
    unmoved = ~of_text.projection.any(axis=0)
    found[:, unmoved] = np.random.default_rng(seed).normal(0.0, std, (len(found), int(unmoved.sum())))
    counts = np.bincount(users, minlength=n_users)[:, None]
    sums = sparse.csr_array((np.ones(len(users)), (users, items)), shape=(n_users, len(texts))) @ found
    return np.where(counts > 0, sums / np.maximum(counts, 1), found.mean(axis=0)).astype(np.float32), found
