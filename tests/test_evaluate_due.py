"""`python -m jobs.evaluate --due` after evaluate.horizon_days was changed: old dates are measured while their snapshot is there,
and a date whose snapshot is gone stops nothing."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from jobs import evaluate
from jobs.run import LATE_DAYS, Run, execute, open_run
from jobs.settings import load
from schemas.table import table as schema
from tests import small_lake as small
from tests.evaluated_night import publish, stage_snapshot

LAST = small.RUN_DATE


def _published(conf: Path, night: date) -> Run:
    """A run of this date of whose publication nothing but the row is there, and of whose snapshot that it is complete."""
    run = open_run(load(conf), night)
    run.record("publish", {}, 0.0, {})
    run.staging("snapshot").complete({})
    return run


def _night(conf: Path, night: date) -> Run:
    """A run of this date that has published and was never measured."""
    run = open_run(load(conf), night)
    events, items = small.tables()
    past = events.filter(pc.less(events["event_time"], datetime(night.year, night.month, night.day, tzinfo=UTC)))
    texts = {row["item_id"]: f"{row['title']} {row['text']}" for row in items.to_pylist()}
    execute(run, "snapshot", stage_snapshot(past.to_pandas()[["user_id", "item_id"]].drop_duplicates(), texts))
    execute(run, "publish", publish)
    return run


def test_all_dates_without_figures_whose_snapshot_is_there_have_their_turn_some_a_day(tmp_path: Path) -> None:
    conf = small.build(tmp_path).conf
    runs = {n: _published(conf, LAST - timedelta(days=n)) for n in (0, 1, 3, *range(LATE_DAYS + 1, 2 * LATE_DAYS + 5))}
    lake, oldest, nothing = runs[0].lake, max(runs), schema("metrics").arrow_schema.empty_table()
    runs[oldest].staging("snapshot").clear()
    measured = {1: "metrics/{}", oldest - 1: "metrics/{}/whole"}
    for n, app in measured.items():
        lake.commit("metrics", nothing, app=app.format(runs[n].run_id))
    # By hand, before the truth was whole: that does not count.
    lake.commit("metrics", nothing, app=f"metrics/{runs[3].run_id}/again")
    first, second = oldest - 2, oldest - 2 - LATE_DAYS
    chosen = evaluate._unmeasured(lake, LAST)
    assert [(LAST - one).days for one in chosen] == [3, *range(first, second, -1)]
    for one in chosen:
        run = runs[(LAST - one).days]
        lake.commit("metrics", nothing, app=f"metrics/{run.run_id}/whole")
    assert [(LAST - one).days for one in evaluate._unmeasured(lake, LAST)] == list(range(second, LATE_DAYS, -1))


def test_a_due_date_whose_snapshot_went_with_another_horizon_is_a_note_and_an_older_one_is_measured(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf, long_ago = small.build(tmp_path).conf, LAST - timedelta(days=LATE_DAYS + 2)
    older, run = _night(conf, long_ago), _published(conf, LAST)
    run.staging("snapshot").clear()
    horizon = ["--conf", str(conf), "--set", "evaluate.horizon_days=11"]
    assert evaluate.main([*horizon, "--due", str(LAST + timedelta(days=11))]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert (found["run_date"], found["metrics"], found["measured"]) == (str(LAST), 0, [str(long_ago)])
    assert f"the staged snapshot of run {run.run_id} is gone" in found["note"]
    assert found["note"] in err
    assert set(run.lake.read("metrics")["run_id"].to_pylist()) == {older.run_id}
    assert evaluate.main([*horizon, "--run-date", str(LAST)]) == 1


def test_a_due_date_whose_snapshot_went_with_the_files_of_its_inputs_is_a_note(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = small.build(tmp_path)
    run = _published(built.conf, LAST)
    run.staging("snapshot").clear()
    for file in (built.lake / "items").glob("*.parquet"):
        file.unlink()
    due = LAST + timedelta(days=run.settings.evaluate.horizon_days)
    assert evaluate.main(["--conf", str(built.conf), "--due", str(due)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["metrics"], found["measured"]) == (0, [])
    assert "table 'items'" in found["note"]
    assert "which this run pinned: its files were removed" in found["note"]
