"""Stage refresh by `refresh.method: retrain`: CF on the union of real and sampled pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import cf
from jobs.run import execute
from tests.staged_night import blocks, run_of, snapshot
from tests.test_refresh import BPR, DAY, NEXT, SAMPLED, _by_id, _night


@pytest.mark.parametrize("model", ["als", "bpr"])
def test_retraining_on_the_union_makes_a_space_of_its_own(model: str, spark: Any, tmp_path: Path) -> None:
    settings = BPR if model == "bpr" else {}
    run = run_of(tmp_path, DAY, cf=settings, refresh={"method": "retrain"}, snapshot={"warm_interactions": 2})
    pairs = {**blocks(), ("u0-1", "new-0"): 3.0}  # real and sampled: one pair
    facts, tables, space = _night(run, pairs, SAMPLED, cold=("new-0", "new-1"))
    items = _by_id(tables["item_embeddings"])
    assert facts["space_version"] != space.version
    assert (facts["aligned_to"], facts["sources"]) == (space.version, {"cf": 18, "sampled": 2})
    assert 0 < facts["residual"] < 0.9
    union = cf.load_space(run, facts["space_version"])
    for table, ids, matrix in (
        ("item_embeddings", union.item_ids, union.items),
        ("user_embeddings", union.user_ids, union.users),
    ):
        rows = _by_id(tables[table])
        assert list(rows) == ids
        assert all(rows[name]["embedding"].tobytes() == v.tobytes() for name, v in zip(ids, matrix, strict=True))
    assert (items["new-0"]["interactions"], items["new-1"]["interactions"]) == (1, 0)
    scores = {u: float(v @ items["new-0"]["embedding"]) for u, v in zip(union.user_ids, union.users, strict=True)}
    own, other = ([scores[f"u{b}-{i}"] for i in range(8)] for b in (0, 2))
    assert np.mean(own) > np.mean(other)
    # The next night's stage cf takes up the night's space, not this one.
    following = run_of(tmp_path, NEXT, 2, cf=settings, snapshot={"warm_interactions": 2})
    snapshot(following, pairs, ("new-0", "new-1"))
    assert execute(following, "cf", cf.run)["space_version"] == space.version


def test_retraining_counts_sampled_users_as_the_settings_say(tmp_path: Path) -> None:
    def items(name: str, sampled: dict[str, list[tuple[str, float]]], **refresh: Any) -> np.ndarray:
        run = run_of(tmp_path / name, DAY, cf=BPR, refresh={"method": "retrain", **refresh})
        facts, _, _ = _night(run, blocks(), sampled, cold=tuple(SAMPLED))
        return cf.load_space(run, facts["space_version"]).items

    alike = {name: [(user, 0.2) for user, _ in users] for name, users in SAMPLED.items()}
    np.testing.assert_array_equal(
        items("first", SAMPLED, users=1), items("alone", {name: users[:1] for name, users in SAMPLED.items()})
    )
    counted = items("counted", SAMPLED, by_probability=False)
    np.testing.assert_array_equal(counted, items("alike", alike))
    assert not np.array_equal(counted, items("weighed", SAMPLED))
