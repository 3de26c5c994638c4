"""Alignment of embedding spaces."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group

from udfs.procrustes import align


@pytest.mark.parametrize("reflect", [False, True])
def test_a_known_rotation_or_reflection_is_recovered(reflect: bool) -> None:
    rng = np.random.default_rng(0)
    turn = ortho_group.rvs(8, random_state=1)
    if (np.linalg.det(turn) < 0) != reflect:
        turn[:, 0] *= -1
    new = rng.standard_normal((50, 8))
    rotation, residual = align([(new.astype(np.float32), (new @ turn).astype(np.float32))])
    np.testing.assert_allclose(rotation, turn, atol=1e-6)
    assert np.sign(np.linalg.det(rotation)) == (-1 if reflect else 1)
    assert residual < 1e-6


def test_the_residual_is_the_part_that_no_rotation_explains() -> None:
    rng = np.random.default_rng(0)
    new, noise = rng.standard_normal((2000, 4)), rng.standard_normal((2000, 4))
    turn = ortho_group.rvs(4, random_state=1)
    _, residual = align([(new, new @ turn + 0.5 * noise)])
    assert residual == pytest.approx(0.5 / np.sqrt(1.25), rel=0.05)
    rotation, unrelated = align([(new, noise)])
    assert 0.99 < unrelated < 1
    # What makes every vector of a space longer or shorter does not count.
    for scale in (0.2, 5.0):
        assert align([(scale * new, new @ turn + 0.5 * noise)])[1] == pytest.approx(residual)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(4), atol=1e-12)


def test_pieces_give_what_the_whole_gives() -> None:
    rng = np.random.default_rng(0)
    new, noise = rng.standard_normal((2, 1000, 6)).astype(np.float32)
    earlier = new + noise
    rotation, residual = align((new[at : at + 7], earlier[at : at + 7]) for at in range(0, 1001, 7))
    whole, _ = orthogonal_procrustes(new.astype(np.float64), earlier.astype(np.float64))
    np.testing.assert_allclose(rotation, whole, atol=1e-12)
    turned = (new @ whole).ravel()
    length = (turned @ earlier.ravel()) / (turned @ turned)
    expected = np.linalg.norm(length * turned - earlier.ravel()) / np.linalg.norm(earlier.astype(np.float64))
    assert residual == pytest.approx(expected, rel=1e-9)


def test_a_perfect_match_has_no_residual_and_no_length_has_none_to_tell() -> None:
    new = np.random.default_rng(0).standard_normal((100_000, 16)).astype(np.float32)
    assert 0 <= align([(new, new)])[1] < 1e-6
    assert np.isnan(align([(new, np.zeros_like(new))])[1])


def test_spaces_without_shared_rows_or_of_different_width_are_refused() -> None:
    for pieces in ([], [(np.zeros((0, 4)), np.zeros((0, 4)))]):
        with pytest.raises(ValueError, match="without a row"):
            align(pieces)
    with pytest.raises(ValueError, match=r"\(3, 4\) to \(3, 5\)"):
        align([(np.ones((3, 4)), np.ones((3, 5)))])
    with pytest.raises(ValueError, match=r"\(3, 5\) to \(3, 5\)"):
        align([(np.ones((3, 4)), np.ones((3, 4))), (np.ones((3, 5)), np.ones((3, 5)))])
