"""Two writers at once: no commit is lost, and two drivers of a date agree on one run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from jobs import lake as lakes
from jobs import run as runs
from jobs.lake import Lake
from jobs.settings import load
from schemas.table import table as schema
from tests.small_lake import SmallLake

NIGHT = date(2026, 3, 1)


def _together(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which two threads leave at once the first time that they call it."""
    barrier, met = threading.Barrier(2, timeout=60), threading.local()

    def called(*given: Any, **options: Any) -> Any:
        found = function(*given, **options)
        if not hasattr(met, "done"):
            met.done = True
            barrier.wait()
        return found

    return called


def _rows(run_id: str) -> pa.Table:
    row = {"refresh_date": NIGHT, "user_id": "u", "embedding": [1.0], "run_id": run_id}
    return pa.Table.from_pylist(
        [{**row, "model_version": "m", "space_version": "s"}], schema("user_embeddings").arrow_schema
    )


def _commit(lake: Lake, run_id: str, app: str) -> int:
    return lake.commit("user_embeddings", _rows(run_id), app=app, replace={"refresh_date": NIGHT})


def test_who_loses_to_another_writer_writes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = Lake(str(tmp_path))
    first = _commit(lake, "before", "before")
    # Both have seen the table at this version when they begin to write.
    monkeypatch.setattr(lakes, "_gains", _together(lakes._gains))
    with ThreadPoolExecutor(2) as pool:
        versions = list(pool.map(lambda name: _commit(lake, name, name), ("one", "two")))
    assert sorted(versions) == [first + 1, first + 2]
    for name, version in zip(("one", "two"), versions, strict=True):
        assert lake.read("user_embeddings", version=version)["run_id"].to_pylist() == [name]


def test_a_transaction_that_two_writers_make_at_once_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = Lake(str(tmp_path))
    first = _commit(lake, "before", "before")
    monkeypatch.setattr(lakes, "_gains", _together(lakes._gains))
    with ThreadPoolExecutor(2) as pool:
        versions = list(pool.map(lambda name: _commit(lake, name, "the same"), ("one", "two")))
    assert versions == [first + 1] * 2
    assert lake.version("user_embeddings") == first + 1


def test_two_drivers_that_open_a_date_at_once_agree_on_one_run(
    small_lake: SmallLake, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, turn, find = load(small_lake.conf), threading.Lock(), runs.find_run
    interactions = str(small_lake.lake / "interactions")

    def found(*given: Any, **options: Any) -> Any:
        with turn:
            answer = find(*given, **options)
            # The input gains a row between the two, so each would pin another version.
            row = DeltaTable(interactions).to_pyarrow_table().slice(0, 1)
            write_deltalake(interactions, row, mode="append")
            return answer

    monkeypatch.setattr(runs, "find_run", _together(found))
    with ThreadPoolExecutor(2) as pool:
        opened = list(pool.map(lambda _: runs.open_run(settings, small_lake.run_date), range(2)))
    assert opened[0] == opened[1]
    rows = Lake(str(small_lake.lake)).read("runs").to_pylist()
    assert [(row["stage"], row["run_id"]) for row in rows] == [("open", opened[0].run_id)]
