"""Users who are drawn, not the K best: in which order they are handed on, and what makes another draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import filterllm_score
from tests.staged_night import run_of
from tests.test_refresh import DAY
from udfs.scorer_actor import Sampling, Scorer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_drawn_users_are_handed_on_with_the_most_probable_first() -> None:
    rng = np.random.default_rng(0)
    keys, queries = (rng.normal(size=(n, 4)).astype(np.float32) for n in (60, 8))
    sampling = Sampling(k=12, draw="sampled", temperature=5.0, user_tile=16, seed=3)
    users, probabilities = Scorer(keys, None, np.ones(60, np.bool_), sampling, "cpu").work(
        ([f"item-{n}" for n in range(8)], queries)
    )
    assert users.shape == probabilities.shape == (8, 12)
    assert (np.diff(probabilities, axis=1) <= 0).all()
    logits = queries.astype(float) @ keys.T.astype(float)
    dense = np.exp(logits - np.logaddexp.reduce(logits, axis=1)[:, None])
    np.testing.assert_allclose(probabilities, np.take_along_axis(dense, users, axis=1), rtol=1e-5)
    # They are drawn: the K best would be others.
    assert probabilities.sum() < 0.9 * np.sort(dense, axis=1)[:, -12:].sum()


def test_what_decides_a_draw_is_in_its_version_and_what_does_not_is_not(tmp_path: Path) -> None:
    users = pa.array(["a", "b"])

    def version(number: int = 1, **changes: Any) -> str:
        seed = changes.pop("seed", 7)
        run = run_of(tmp_path, DAY, number, seed=seed, sampling={"draw": "sampled", **changes})
        return filterllm_score._scoring_version(run, "model", users)

    others = [version(temperature=2.0), version(k=3), version(draw="top_k"), version(seed=8)]
    assert len({version(), *others}) == 5
    assert {version(2, shard_items=3), version(user_tile=64)} == {version()}
