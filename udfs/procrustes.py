"""Alignment of an embedding space to an earlier one (orthogonal Procrustes, Schoenemann 1966)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import orthogonal_procrustes


def align(new: npt.NDArray[np.floating], earlier: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.float64], float]:
    """The orthogonal R (a rotation or a reflection) that brings `new` R nearest to `earlier`.

    R changes no inner product within the new space, so no score.

    Args:
        new, earlier: [n, d], rows of the same users and items in both spaces.

    Returns:
        R [d, d] float64, and the relative residual |new R - earlier| / |earlier| (Frobenius; 0 is a perfect match; nan if
        `earlier` has no length).

    Raises:
        ValueError: the shapes differ, or there is no row.
    """
    if new.shape != earlier.shape or not len(new):
        raise ValueError(
            f"cannot align {new.shape} to {earlier.shape}: expected the same rows and width, at least 1 row"
        )
    a, b = np.asarray(new, np.float64), np.asarray(earlier, np.float64)
    rotation, _ = orthogonal_procrustes(a, b)
    norm = np.linalg.norm(b)
    return rotation, float(np.linalg.norm(a @ rotation - b) / norm) if norm else float("nan")
