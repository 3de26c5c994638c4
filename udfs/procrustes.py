"""Alignment of an embedding space to an earlier one (orthogonal Procrustes, Schoenemann 1966)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy.linalg import svd


def align(
    pieces: Iterable[tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]],
) -> tuple[npt.NDArray[np.float64], float]:
    """The orthogonal R (a rotation or a reflection) that brings the new space nearest to the earlier one.

    R changes no inner product within the new space, so no score.

    Args:
        pieces: (new, earlier) [n, d], rows of the same users and items in both spaces; one after another is in memory, in
            float64.

    Returns:
        R [d, d] float64, and the residual that neither R nor a change of scale explains: the least |s new R - earlier| / |earlier|
        of all s (Frobenius, over all pieces). 0 is a perfect match, of which rounding leaves some 1e-8; 1 is nothing in common;
        nan if a space has no length.

    Raises:
        ValueError: the shapes differ, there is no row, or a number is not finite.
    """
    # tr(R' new' earlier) is the sum of the singular values, and s = that / |new|^2 leaves |earlier|^2 - (s |new|)^2. Other settings
    # may make all vectors of a space longer, which moves none of them against another.
    cross: npt.NDArray[np.float64] | None = None
    of_new = of_earlier = 0.0
    for new, earlier in pieces:
        if new.shape != earlier.shape or (cross is not None and cross.shape[0] != new.shape[1]):
            raise ValueError(f"cannot align {new.shape} to {earlier.shape}: expected the same rows and width")
        a, b = np.asarray(new, np.float64), np.asarray(earlier, np.float64)
        if len(a):
            cross = a.T @ b + (0 if cross is None else cross)
            of_new, of_earlier = of_new + float(np.vdot(a, a)), of_earlier + float(np.vdot(b, b))
    if cross is None:
        raise ValueError("cannot align without a row that both spaces have")
    left, singular, right = svd(cross)
    lengths = np.sqrt(of_new) * np.sqrt(of_earlier)
    explained = float(singular.sum()) / lengths if lengths else float("nan")
    return left @ right, float(np.sqrt(np.maximum(1 - explained**2, 0.0)))
