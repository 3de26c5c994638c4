"""What tables that do not fit into Arrow's 32-bit offsets are read for: by the gates and by the scoring of cold items."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from jobs import filterllm_score, gates
from jobs.staging import Staging
from tests import gated_night as night
from udfs.ids import large


def test_the_gates_of_the_outputs_do_not_read_the_texts_of_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read = night.run_of(tmp_path), Staging.read
    night.stage(run)

    def without_texts(self: Staging, name: str, columns: list[str] | None = None) -> pa.Table:
        assert name != "items_labelled" or (columns is not None and "content" not in columns)
        return read(self, name, columns)

    monkeypatch.setattr(Staging, "read", without_texts)
    _, parameters = gates.output_views(run)
    assert parameters["items_to_embed"] == night.COLD + night.WARM


def test_scored_items_are_found_again_with_64_bit_offsets(tmp_path: Path) -> None:
    run = night.run_of(tmp_path)
    rows = [
        {"scoring_version": "v", "item_id": item, "text_sha256": f"sha-{item}", "user_id": user, "rank": rank}
        | {"probability": 0.5, "propensity": "top_k"}
        for item in ("b", "a")
        for rank, user in ((2, "x"), (1, "y"))
    ]
    # Two runs that scored at once.
    for app in ("one", "two"):
        run.lake.commit(filterllm_score.TABLE, pa.Table.from_pylist(rows), app=app)
    wanted = large(pa.table({"item_id": ["a", "b", "c"], "text_sha256": ["sha-a", "another", "sha-c"]}))
    found = filterllm_score._cached(run, "v", wanted)
    assert found.select(["item_id", "user_id", "rank"]).to_pylist() == [
        {"item_id": "a", "user_id": "y", "rank": 1},
        {"item_id": "a", "user_id": "x", "rank": 2},
    ]
    # 33 million of its hashes are 2 GiB.
    assert {found.schema.field(name).type for name in ("item_id", "text_sha256", "user_id")} == {pa.large_string()}
