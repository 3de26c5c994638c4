"""How a cold item's two vectors become one: that folded in from its sampled users, and that of its text's words.

Both are much shorter than the vectors that CF trains for items (a prediction is the nearer to the mean the less is known), and
too short a vector ranks below the warm items. So lengths and shares are measured on items whose trained vectors are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from udfs.fold_in import norm_scale
from udfs.vectors import Matrix


@dataclass(frozen=True)
class Blend:
    """scale: what a folded vector is multiplied by where it stands alone. words: the share of the words' vector beside it,
    both taken as long as CF makes vectors; folded, worded: what this comes to, as factors of the two.
    """

    scale: float = 1.0
    words: float = 0.0
    folded: float = 1.0
    worded: float = 0.0

    def __call__(self, folded: Matrix, worded: Matrix) -> Matrix:
        """[n, d] float32 of both [n, d]; a row of `worded` that is zero is none."""
        both = worded.any(axis=1, keepdims=True)
        scale = np.where(both, self.folded, self.scale).astype(np.float32)
        return (scale * folded + np.float32(self.worded) * worded).astype(np.float32)


def measured(
    trained: Matrix,
    folded: Matrix,
    worded: Matrix | None,
    gram: npt.NDArray[np.floating],
    interactions: npt.NDArray[np.integer],
    scale: float | None = None,
    words: float | None = None,
) -> Blend:
    """The blend that suits items whose `trained` vectors [n, d] are known and whose other vectors were made without them.

    Args:
        folded, worded: [n, d]; None for no words.
        gram: Y'Y [d, d] of the users' vectors: two vectors are as far from each other as the scores that users give them.
        interactions: [n], of each item: as often it counts, as it does when users' lists are judged.
        scale: given instead of measured; measured, folded vectors get the median length of the trained ones.
        words: given instead of measured; measured, it is what least squares give the two, of equal length, against the
            trained vectors.
    """
    scale = norm_scale(trained, folded) if scale is None else scale
    if worded is None or not worded.any():
        return Blend(scale, folded=scale)
    # Items without a known word say nothing of words, and would make their median length 0.
    there = worded.any(axis=1)
    trained, whole, worded, interactions = trained[there], scale * folded[there], worded[there], interactions[there]
    as_long = norm_scale(whole, worded)
    if words is None:
        words = _share(trained, whole, as_long * worded, gram, interactions)
    # Two vectors that point apart are shorter together.
    longer = norm_scale(whole, (1 - words) * whole + words * as_long * worded)
    return Blend(scale, words, longer * (1 - words) * scale, longer * words * as_long)


def _share(
    target: Matrix,
    first: Matrix,
    second: Matrix,
    gram: npt.NDArray[np.floating],
    weights: npt.NDArray[np.integer],
) -> float:
    """b / (a + b) of the a, b >= 0 that bring a * first + b * second nearest to the target, each row by its weight."""
    from scipy.optimize import nnls

    columns = np.stack([first, second]).astype(np.float64)
    weighed = columns * weights[:, None]
    left = np.einsum("ind,de,jne->ij", weighed, gram, columns, optimize=True)
    right = np.einsum("ind,de,ne->i", weighed, gram, target.astype(np.float64), optimize=True)
    root = np.linalg.cholesky(left + 1e-12 * np.trace(left) * np.eye(2))
    a, b = nnls(root.T, np.linalg.solve(root, right))[0]
    return float(b / (a + b)) if a + b > 0 else 0.0
