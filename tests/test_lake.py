"""jobs/lake.py: what readers of an old date find when the version that `runs` names is gone."""

from __future__ import annotations

import os
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.lake import Lake, LakeError, where
from schemas.table import table as schema

NIGHTS = [date(2026, 3, 1) + timedelta(days=n) for n in range(3)]


def commit(lake: Lake, night: date) -> int:
    row: dict[str, Any] = {"refresh_date": night, "user_id": "u", "embedding": [1.0, 2.0]}
    row |= {"run_id": f"run-{night}", "model_version": "m", "space_version": "s"}
    rows = pa.Table.from_pylist([row], schema("user_embeddings").arrow_schema)
    return lake.commit("user_embeddings", rows, app=f"user_embeddings/{night}", replace={"refresh_date": night})


def forgotten(lake: Lake, version: int) -> None:
    """Delta's log without what is before a checkpoint, as any engine may leave it."""
    delta = lake.table("user_embeddings")
    delta.create_checkpoint()
    for number in range(version + 1):
        Path(lake.path("user_embeddings"), "_delta_log", f"{number:020}.json").unlink()


def test_a_date_is_read_at_its_version_and_as_it_is_now_where_that_is_gone(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    versions = [commit(lake, night) for night in NIGHTS]
    assert lake.read("user_embeddings", version=versions[1]).num_rows == 2
    before = lake.read_date("user_embeddings", NIGHTS[0], versions[0])
    forgotten(lake, versions[1])
    with pytest.raises(LakeError, match=f"has no version {versions[0]} any more"):
        lake.read("user_embeddings", version=versions[0])
    assert lake.read_date("user_embeddings", NIGHTS[0], versions[0]).equals(before)


@pytest.mark.parametrize("uri", ["", " ", "my lake [1]", "s3://bucket/{a,b}", "lake*"])
def test_a_lake_that_would_be_the_root_or_a_pattern_is_refused(uri: str) -> None:
    with pytest.raises(LakeError, match="a folder or a URI, without any of the characters"):
        Lake(uri)


def test_a_value_with_quotes_is_no_more_than_a_value(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    commit(lake, NIGHTS[0])
    lake.table("user_embeddings").delete(where("user_id", ["') OR true --", "it's"]))
    assert lake.read("user_embeddings").num_rows == 1
    assert lake.read("user_embeddings", user_id="u' OR 'a' = 'a").num_rows == 0


def test_a_commit_that_no_other_writer_was_in_the_way_of_says_what_was(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    commit(lake, NIGHTS[0])
    lake.table("user_embeddings").alter.set_table_properties({"delta.appendOnly": "true"})
    with pytest.raises(LakeError, match=r"user_embeddings' at .* cannot be written: .*(append|Append)"):
        lake.commit(
            "user_embeddings",
            lake.read("user_embeddings"),
            app="user_embeddings/again",
            replace={"refresh_date": NIGHTS[0]},
        )


def test_rows_that_were_vacuumed_are_a_clear_error(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    version = commit(lake, NIGHTS[0])
    lake.table("user_embeddings").delete()
    lake.table("user_embeddings").vacuum(0, dry_run=False, enforce_retention_duration=False)
    with pytest.raises(LakeError, match=r"user_embeddings.*cannot be read \(vacuumed\?\)"):
        lake.read("user_embeddings", version=version)
    assert lake.read_date("user_embeddings", NIGHTS[0], version).num_rows == 0


def test_the_log_of_a_table_of_the_project_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def oldest(lake: Lake) -> int:
        """The oldest version that can be read when the log's files and its checkpoint are 400 days old and are cleaned up."""
        for night in NIGHTS:
            commit(lake, night)
        lake.table("user_embeddings").create_checkpoint()
        old = time.time() - 400 * 86400
        for file in Path(lake.path("user_embeddings"), "_delta_log").iterdir():
            os.utime(file, (old, old))
        commit(lake, NIGHTS[-1] + timedelta(days=1))
        lake.table("user_embeddings").create_checkpoint()
        lake.table("user_embeddings").cleanup_metadata()
        for version in range(5):
            try:
                lake.read("user_embeddings", version=version)
            except LakeError:
                continue
            return version
        raise AssertionError

    assert oldest(Lake(str(tmp_path / "kept"))) == 0
    monkeypatch.setattr("jobs.lake._PROPERTIES", {})
    assert oldest(Lake(str(tmp_path / "as-delta-has-it"))) > 2


def test_the_log_of_a_cache_is_short_and_tells_every_shard(tmp_path: Path) -> None:
    lake, apps = Lake(str(tmp_path)), [f"shard/{n}" for n in range(35)]
    log = Path(lake.path("text_embeddings"), "_delta_log")
    for number, app in enumerate(apps):
        row = {"text_sha256": app, "model_version": "m", "embedding": [1.0]}
        lake.commit("text_embeddings", pa.Table.from_pylist([row], schema("text_embeddings").arrow_schema), app=app)
        if number == 24:
            old = time.time() - 40 * 86400
            for file in log.iterdir():
                os.utime(file, (old, old))
    # Those of the versions 9 and 19 were there when all of it was made 40 days old.
    assert sorted(int(file.name.split(".")[0]) for file in log.glob("*.checkpoint.parquet")) == [19, 29]
    assert min(int(file.stem) for file in log.glob("*.json")) == 19
    assert lake.sequences("text_embeddings", [*apps, "another"]) == [1] * len(apps) + [0]
    assert lake.read("text_embeddings").num_rows == len(apps)
