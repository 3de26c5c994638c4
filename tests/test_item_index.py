"""The index of more users than one array of Arrow's can hold the vectors of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import item_index
from tests.gated_night import RUN_DATE, run_of
from udfs.vectors import from_column, to_column


def test_the_sample_of_users_is_by_id_whatever_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_index, "_QUERIES", 5)
    rng = np.random.default_rng(0)
    vectors, order = rng.normal(size=(30, 3)).astype(np.float32), rng.permutation(30)
    ids = pa.array([f"u{n:02d}" for n in range(30)])
    sample = item_index._sample(pa.table({"user_id": ids, "embedding": to_column(vectors)}), 7)
    again = pa.table({"user_id": ids.take(pa.array(order)), "embedding": to_column(vectors[order])})
    np.testing.assert_array_equal(item_index._sample(again, 7), sample)
    picked = np.sort(np.random.Generator(np.random.Philox(7)).permutation(30)[:5])
    np.testing.assert_array_equal(sample, vectors[picked])


def test_the_vectors_of_users_may_be_more_than_an_array_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_index, "_QUERIES", 10)
    width = 1 << 16
    # Memory that nobody writes to takes none, and all parts are the same.
    part = to_column(np.zeros((1 << 12, width), np.float32)).chunk(0)
    users = pa.table(
        {"user_id": [str(n) for n in range(9 << 12)], "embedding": pa.chunked_array([part] * 9, part.type)}
    )
    vectors = np.eye(3, width, dtype=np.float32)
    items = pa.table({"item_id": ["b", "a", "c"], "embedding": to_column(vectors), "space_version": ["s1"] * 3})
    made = item_index.ready(run_of(tmp_path, run_date=RUN_DATE), items, users)
    assert (made.item_ids, made.facts["queries"]) == (["a", "b", "c"], 10)
    assert made.search(from_column(items["embedding"])[1], 1) == [("a", 1.0)]
