"""What A-LLMRec sees of a snapshot: users' histories in the order of their events."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import allmrec_night
from schemas.table import table as schema
from tests import staged_night

DAY = date(2026, 3, 1)


@pytest.mark.parametrize(
    ("times", "places", "order", "expected"),
    [
        ([3, 1, 2, None], [1, 2, 3, 4], "event_time", [3, 1, 2, 0]),
        ([1, 1, 1, 1], [3, 1, None, 2], "event_time", [2, 1, 3, 0]),
        ([None] * 4, [3, 1, 4, 2], "seq", [1, 3, 0, 2]),
        ([None] * 4, [None] * 4, "item_id", [0, 1, 2, 3]),
    ],
)
def test_histories_are_in_the_order_of_events(
    tmp_path: Path, times: Any, places: Any, order: str, expected: list[int]
) -> None:
    run = staged_night.run_of(tmp_path, DAY)
    staged_night.snapshot(run, {("u", f"i{n}"): 1.0 for n in range(4)})
    pairs = run.staging("snapshot").read("training_interactions").sort_by("item_idx")
    for name, values in (("last_time", times), ("last_seq", places)):
        at = pairs.schema.get_field_index(name)
        pairs = pairs.set_column(
            at, name, pa.array(values, pa.int64()).cast(schema("training_interactions").column(name).arrow_type)
        )
    run.staging("snapshot").write("training_interactions", pairs.take(pa.array([2, 0, 3, 1])))
    found = allmrec_night.read(run.staging("snapshot"))
    assert (found.order, found.histories.items.tolist()) == (order, expected)
