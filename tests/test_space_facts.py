"""What the facts of a space promise to those who fold in, and which settings make another space."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import cf
from jobs.cf import Space
from jobs.run import Run, execute
from tests.staged_night import Pair, blocks, run_of, snapshot
from tests.test_refresh import BPR, DAY
from udfs.fold_in import to_csr

PAIRS = blocks()


def _trained(run: Run, pairs: dict[Pair, float]) -> tuple[dict[str, Any], Space]:
    snapshot(run, pairs)
    facts = execute(run, "cf", cf.run)
    return facts, cf.load_space(run, facts["space_version"])


def _folded(space: Space, side: str, weights: dict[Pair, float]) -> np.ndarray:
    """The space's items or users, folded in again from `weights`, their own pairs."""
    ids = {"users": space.user_ids, "items": space.item_ids}
    other = {"users": "items", "items": "users"}[side]
    users, items = zip(*weights, strict=True)
    named = {"users": users, "items": items}
    own, theirs = (np.array([ids[name].index(one) for one in named[name]]) for name in (side, other))
    csr = to_csr(own, theirs, np.array(list(weights.values())), len(ids[side]))
    return space.fold_in(getattr(space, other), csr, f"{side.removesuffix('s')}_scale")


def test_als_is_trained_on_the_weights_that_fold_ins_take(spark: Any, tmp_path: Path) -> None:
    """Spark solves users last: theirs is the very system that a fold-in solves."""
    facts, space = _trained(run_of(tmp_path, DAY, cf={"binary": False}), PAIRS)
    assert facts["model"] == "als"
    weights = {pair: float(np.log1p(weight)) for pair, weight in PAIRS.items()}
    np.testing.assert_allclose(_folded(space, "users", weights), space.users, rtol=1e-3, atol=1e-4)
    others = {pair: float(weight) for pair, weight in PAIRS.items()}
    assert not np.allclose(_folded(space, "users", others), space.users, rtol=1e-2)


def test_fold_ins_of_a_space_that_als_did_not_train_are_as_long_as_its_own_rows(tmp_path: Path) -> None:
    pairs = blocks(n_users=40, n_items=4)  # so that the two scales differ
    _, space = _trained(run_of(tmp_path, DAY, cf=BPR), pairs)
    ones = dict.fromkeys(pairs, 1.0)
    for side, trained in (("users", space.users), ("items", space.items)):
        lengths = np.linalg.norm(_folded(space, side, ones), axis=1)
        assert np.median(lengths) == pytest.approx(np.median(np.linalg.norm(trained, axis=1)), rel=1e-4), side
    assert abs(space.facts["user_scale"] / space.facts["item_scale"] - 1) > 0.005


@pytest.mark.parametrize(
    "changed",
    [
        {"snapshot": {"split": {"table": "split", "train": ["train"]}}},
        {"snapshot": {"window_days": 30}},
        {"snapshot": {"warm_interactions": 2}},
        {"inputs": {"interactions": {"table": "sales"}}},
        {"inputs": {"interactions": {"table": "interactions", "columns": {"weight": "amount"}}}},
    ],
)
def test_a_space_of_another_snapshot_or_input_is_not_used_again(changed: dict[str, Any], tmp_path: Path) -> None:
    first, space = _trained(run_of(tmp_path, DAY, cf=BPR), PAIRS)
    same, _ = _trained(run_of(tmp_path, DAY + timedelta(days=1), cf=BPR), PAIRS)
    assert (same["space_version"], same["trained"]) == (space.version, False)
    other, _ = _trained(run_of(tmp_path, DAY + timedelta(days=1), 2, cf=BPR, **changed), PAIRS)
    assert (first["trained"], other["trained"]) == (True, True)
    assert other["space_version"] != space.version
