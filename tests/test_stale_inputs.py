"""A feed that is dead: its newest event is told, and a night is refused that is staler than gates.stale_days."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import gates, snapshot
from jobs.expectations import GateError, evaluate
from jobs.run import Run
from jobs.staging import Staging
from tests import gated_night as night

RULE = "the newest event is not staler than gates.stale_days allows"


def _staged(folder: Path, micros: list[int | None], **limits: Any) -> tuple[Run, Staging]:
    """A snapshot whose pairs have these last times in turn, in microseconds since 1970; `limits`: settings of gates."""
    run, tables = night.run_of(folder, gates=limits), night.snapshot_tables()
    out, pairs = run.staging("snapshot"), tables["training_interactions"]
    at = pairs.schema.get_field_index("last_time")
    when = pa.array((micros * pairs.num_rows)[: pairs.num_rows], pa.timestamp("us", tz="UTC"))
    tables["training_interactions"] = pairs.set_column(at, "last_time", when)
    for name, table in tables.items():
        out.write(name, table)
    return run, out


@pytest.mark.parametrize(
    ("micros", "newest"),
    [
        ([1_772_000_000_000_000, None, 1_771_999_999_000_000], "2026-02-25T06:13:20+00:00"),
        ([None], None),
        # Of before the year 1, which a table may hold and Python may not.
        ([-(10**17), None], "0001-01-01T00:00:00+00:00"),
    ],
)
def test_a_snapshot_tells_the_newest_event_that_it_used(
    spark: Any, tmp_path: Path, micros: list[int | None], newest: str | None
) -> None:
    _, out = _staged(tmp_path, micros)
    assert snapshot._facts(spark, out, {"interactions": 1, "items": 1})["newest_event"] == newest


@pytest.mark.usefixtures("spark")
@pytest.mark.parametrize(
    ("newest", "stale_days", "shown"),
    [
        ("2026-02-26T12:00:00+00:00", None, None),
        ("2026-02-26T12:00:00+00:00", 3, None),
        ("2026-02-26T12:00:00+00:00", 2, "1 of 2 rows fail; such as: table='interactions', rows_in=976, days_old=2.5"),
        (None, None, None),
    ],
)
def test_events_that_are_staler_than_the_limit_stop_the_night(
    tmp_path: Path, newest: str | None, stale_days: int | None, shown: str | None
) -> None:
    run, out = _staged(tmp_path, [None], stale_days=stale_days)
    facts = {**night.snapshot_facts(night.snapshot_tables()), "newest_event": newest}
    views, parameters = gates.input_views(run, out, facts)
    rejected = [view for view in views if view.table == "rejected_rows"]
    failures = evaluate(rejected, parameters, name="test", at=run.midnight)[1]
    assert len(failures) == (shown is not None), failures
    assert all(RULE in line and str(shown) in line for line in failures), failures


@pytest.mark.usefixtures("spark")
def test_a_limit_on_events_without_times_is_refused_and_told(tmp_path: Path) -> None:
    run, out = _staged(tmp_path, [None], stale_days=7)
    facts = {**night.snapshot_facts(night.snapshot_tables()), "newest_event": None}
    with pytest.raises(GateError, match=r"gates\.stale_days allows \(inf: no event has a time\).*days_old=inf") as told:
        gates.check_inputs(run, out, facts)
    assert "1 of " in str(told.value).splitlines()[0]
    assert list(Path(out.path("data_docs")).glob("validations/**/*.html"))
