"""A table to which a newer release gave another column, as an older one finds it after a rollback, or in a ranker."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, Field, write_deltalake

from jobs.lake import Lake, LakeError
from schemas.table import table as schema

CONTRACT = schema("user_embeddings").arrow_schema
FIRST, SECOND = date(2026, 3, 1), date(2026, 3, 2)


def _rows(night: date, user_id: str, run_id: str, **more: str) -> pa.Table:
    row: dict[str, Any] = {"refresh_date": night, "user_id": user_id, "embedding": [1.0], "run_id": run_id}
    row |= {"model_version": "m", "space_version": "s"}
    types = pa.schema([*CONTRACT, *(pa.field(name, pa.string()) for name in more)])
    return pa.Table.from_pylist([{**row, **more}], types)


def _newer(folder: Path) -> Lake:
    """A lake whose table got the columns `country` and `city`, and rows of the first night that have them, in one file."""
    lake = Lake(str(folder))
    lake.commit("user_embeddings", _rows(FIRST, "old", "one"), app="one")
    delta = lake.table("user_embeddings")
    delta.alter.add_columns([Field(name, "string", nullable=True) for name in ("country", "city")])
    both = [_rows(FIRST, name, "newer", country=name.upper(), city="x") for name in ("ann", "bob")]
    write_deltalake(lake.table("user_embeddings"), pa.concat_tables(both), mode="append")
    return lake


def _countries(lake: Lake) -> set[tuple[Any, ...]]:
    rows = pa.table(DeltaTable(lake.path("user_embeddings")).to_pyarrow_table()).to_pylist()
    return {(row["user_id"], row["run_id"], row["country"], row["city"]) for row in rows}


def test_a_column_that_a_newer_release_added_is_not_read(tmp_path: Path) -> None:
    lake = _newer(tmp_path)
    rows = lake.read("user_embeddings", refresh_date=FIRST)
    assert rows.schema.equals(CONTRACT)
    assert sorted(rows["user_id"].to_pylist()) == ["ann", "bob", "old"]
    for version in (0, 1):
        assert lake.read("user_embeddings", version=version).schema.equals(CONTRACT)


def test_an_older_release_appends_and_replaces_rows_whose_newer_columns_are_null(tmp_path: Path) -> None:
    lake = _newer(tmp_path)
    old, ann = ("old", "one", None, None), ("ann", "newer", "ANN", "x")
    lake.commit("user_embeddings", _rows(SECOND, "eve", "two"), app="two")
    assert _countries(lake) == {old, ann, ("bob", "newer", "BOB", "x"), ("eve", "two", None, None)}
    # A part of a date, as `metrics` are replaced: the rest of the file is written anew as it was.
    replaced: dict[str, Any] = {"refresh_date": FIRST, "user_id": "bob"}
    lake.commit("user_embeddings", _rows(FIRST, "bob", "three"), app="three", replace=replaced)
    assert _countries(lake) == {old, ann, ("bob", "three", None, None), ("eve", "two", None, None)}
    lake.commit("user_embeddings", _rows(FIRST, "zoe", "four"), app="four", replace={"refresh_date": FIRST})
    lake.commit("user_embeddings", CONTRACT.empty_table(), app="five", replace={"refresh_date": SECOND})
    assert _countries(lake) == {("zoe", "four", None, None)}
    assert [field.name for field in lake.table("user_embeddings").schema().fields[-2:]] == ["country", "city"]


def test_a_table_gets_what_its_contract_gained_beside_what_the_contract_does_not_know(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    metric = {
        "refresh_date": FIRST,
        "run_id": "r",
        "split": "cold",
        "system": "random",
        "metric": "m",
        "value": 0.5,
        "n": 1,
    }
    rows = pa.Table.from_pylist([metric], schema("metrics").arrow_schema)
    other = rows.drop_columns(["low"]).append_column("unit", pa.array(["share"]))
    write_deltalake(lake.path("metrics"), other, partition_by=["refresh_date"])
    assert lake.read("metrics").column_names == [name for name in rows.column_names if name != "low"]
    lake.commit("metrics", rows.set_column(7, "low", pa.array([0.25])), app="one")
    assert sorted(lake.read("metrics")["low"].to_pylist(), key=str) == [0.25, None]


def test_an_unknown_column_that_may_not_be_null_is_named_when_it_is_written_to(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    types = pa.schema([*CONTRACT, pa.field("country", pa.string(), nullable=False)])
    rows = _rows(FIRST, "ann", "newer", country="AT").cast(types)
    write_deltalake(lake.path("user_embeddings"), rows, partition_by=["refresh_date"])
    assert lake.read("user_embeddings").schema.equals(CONTRACT)
    ways: list[Any] = [None, {"refresh_date": FIRST}]
    for replace in ways:
        with pytest.raises(LakeError, match=r"'user_embeddings' at .* may not be null .* does not know: \['country'\]"):
            lake.commit("user_embeddings", _rows(FIRST, "bob", "two"), app="two", replace=replace)
    assert lake.version("user_embeddings") == 0
