"""What stage refresh says of vectors that are kept, of items that turned cold, and of pairs that are real and sampled."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np

from jobs import cf
from tests.staged_night import blocks, publish, run_of
from tests.test_refresh import BPR, DAY, NEXT, _by_id, _night, _reference


def test_a_vector_that_is_carried_over_keeps_the_count_that_it_was_published_with(tmp_path: Path) -> None:
    first = run_of(tmp_path, DAY, cf=BPR)
    _night(first, blocks(), {})
    publish(first)
    # New and bought by two users: folded in from these.
    bought = {**blocks(), ("u0-0", "fresh"): 1.0, ("u1-1", "fresh"): 1.0}
    second = run_of(tmp_path, NEXT, 2, cf=BPR)
    _, tables, _ = _night(second, bought, {})
    folded = _by_id(tables["item_embeddings"])["fresh"]
    assert (folded["source"], folded["interactions"]) == ("cf", 2)
    publish(second)
    # A third user does not move it until the next training.
    third = run_of(tmp_path, date(2026, 3, 3), 3, cf=BPR)
    _, tables, _ = _night(third, {**bought, ("u2-2", "fresh"): 1.0}, {})
    carried = _by_id(tables["item_embeddings"])["fresh"]
    assert (carried["source"], carried["interactions"]) == ("carried_over", 2)
    assert carried["updated_at"] == datetime(2026, 3, 2, tzinfo=UTC)
    np.testing.assert_array_equal(carried["embedding"], folded["embedding"])


def test_an_item_of_the_space_that_turned_cold_is_placed_by_its_sampled_users(tmp_path: Path) -> None:
    _night(run_of(tmp_path, DAY, cf=BPR), blocks(), {})
    few = {pair: weight for pair, weight in blocks().items() if pair[1] != "i0-0"}
    run = run_of(tmp_path, NEXT, 2, cf=BPR, refresh={"scale": 1.0})
    sampled = {"i0-0": [("u2-5", 0.4), ("u2-4", 0.1)]}
    facts, tables, space = _night(run, few, sampled, cold=("i0-0",))
    assert "i0-0" in space.item_ids
    assert facts["sources"] == {"cf": 17, "sampled": 1}
    turned = _by_id(tables["item_embeddings"])["i0-0"]
    assert (turned["source"], turned["interactions"]) == ("sampled", 0)
    assert turned["updated_at"] == datetime(2026, 3, 2, tzinfo=UTC)
    np.testing.assert_allclose(turned["embedding"], _reference(space, {"u2-5": 12.0, "u2-4": 3.0}), rtol=1e-5)


def test_retraining_counts_a_pair_that_is_real_and_sampled_once(tmp_path: Path) -> None:
    def items(name: str, sampled: list[str]) -> np.ndarray:
        refresh = {"method": "retrain", "by_probability": False}
        run = run_of(tmp_path / name, DAY, cf=BPR, refresh=refresh, snapshot={"warm_interactions": 2})
        pairs = {**blocks(), ("u0-1", "new"): 1.0}
        facts, _, _ = _night(run, pairs, {"new": [(user, 0.2) for user in sampled]}, cold=("new",))
        return cf.load_space(run, facts["space_version"]).items

    np.testing.assert_array_equal(items("both", ["u0-0", "u0-1", "u0-2"]), items("once", ["u0-0", "u0-2"]))
