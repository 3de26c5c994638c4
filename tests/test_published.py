"""The rankers' reader: one night, whole, at the versions that `runs` names."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from jobs import cli, publish, published
from jobs.lake import Lake
from jobs.run import execute
from tests import gated_night as night
from tests.test_publish import gated
from udfs.vectors import from_column


def test_the_newest_night_of_a_date_or_before_is_found(tmp_path: Path) -> None:
    lake, one_day = Lake(str(tmp_path)), timedelta(days=1)
    with pytest.raises(published.NotPublishedError, match=r"nothing is published .*jobs/cold_refresh\.py"):
        published.latest(lake)
    assert published.previous(lake, night.RUN_DATE) is None
    runs = [gated(tmp_path, run_date=night.RUN_DATE - 2 * one_day), gated(tmp_path), gated(tmp_path, sequence=2)]
    for run in runs:
        execute(run, "publish", publish.run)
    newest = published.latest(lake)
    assert (newest.run_id, newest.refresh_date, newest.sequence) == (runs[2].run_id, night.RUN_DATE, 2)
    assert newest.space_version == "s1"
    assert published.latest(lake, night.RUN_DATE - one_day).run_id == runs[0].run_id
    before = published.previous(lake, night.RUN_DATE)
    assert before is not None
    assert before.run_id == runs[0].run_id
    assert published.previous(lake, night.RUN_DATE - 2 * one_day) is None
    with pytest.raises(published.NotPublishedError, match="on or before 2026-01-01"):
        published.latest(lake, night.RUN_DATE.replace(month=1))


def test_what_was_read_once_stays_readable_while_later_nights_are_published(tmp_path: Path) -> None:
    execute(gated(tmp_path), "publish", publish.run)
    reader = published.latest(Lake(str(tmp_path)))
    then = [reader.sampled_interactions(), reader.item_embeddings(), reader.user_embeddings()]
    execute(gated(tmp_path, sequence=2), "publish", publish.run)
    now = [reader.sampled_interactions(), reader.item_embeddings(), reader.user_embeddings()]
    assert all(a.equals(b) for a, b in zip(then, now, strict=True))
    assert now[1].schema.field("embedding").type == pa.list_(pa.float32())


def test_a_night_that_was_not_finished_is_not_seen(tmp_path: Path) -> None:
    first = gated(tmp_path)
    execute(first, "publish", publish.run)
    half = gated(tmp_path, sequence=2)
    publish.run(half, half.staging("publish"))  # all tables are committed, but `runs` does not name them yet
    reader = published.latest(Lake(str(tmp_path)))
    assert reader.run_id == first.run_id
    assert set(reader.item_embeddings()["run_id"].to_pylist()) == {first.run_id}


@pytest.mark.parametrize(("column", "other"), [("run_id", "20260301-00000000000f"), ("space_version", "s0")])
def test_rows_of_another_run_or_space_are_an_error_that_names_the_table(
    tmp_path: Path, column: str, other: str
) -> None:
    run = gated(tmp_path)
    execute(run, "publish", publish.run)
    stranger = run.lake.read("user_embeddings").slice(0, 1)
    stranger = stranger.set_column(stranger.schema.get_field_index(column), column, pa.array([other]))
    write_deltalake(run.lake.path("user_embeddings"), stranger, mode="append")
    found = published.latest(run.lake)
    assert found.user_embeddings().num_rows == 12, "a version that nobody published is not read"
    row = run.lake.read("runs").to_pylist()[0]
    versions = {**json.loads(row["output_versions"]), "user_embeddings": run.lake.version("user_embeddings")}
    rows = pa.Table.from_pylist([{**row, "sequence": 9, "output_versions": json.dumps(versions)}])
    run.lake.commit("runs", rows, app="somebody")
    with pytest.raises(published.NotPublishedError, match=rf"'user_embeddings' version .*{column} \['{other}'\]"):
        published.latest(run.lake).user_embeddings()


@pytest.mark.parametrize("index", [False, True])
def test_the_command_answers_as_a_ranker(tmp_path: Path, capsys: pytest.CaptureFixture[str], index: bool) -> None:
    run = gated(tmp_path)
    execute(run, "publish", publish.run)
    capsys.readouterr()
    flags = ["--index"] if index else []
    assert published.main(["--lake", str(tmp_path), "--user", "user-04", "--top", "26", *flags]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out.splitlines()[-1])
    assert len(out.splitlines()) == 1
    reader = published.latest(run.lake)
    items, users = reader.item_embeddings(), reader.user_embeddings()
    row = users["user_id"].to_pylist().index("user-04")
    scores = from_column(items["embedding"]).astype(np.float64) @ from_column(users["embedding"])[row].astype(
        np.float64
    )
    best = [items["item_id"][int(i)].as_py() for i in np.argsort(-scores)]
    assert [item["item_id"] for item in answer["items"]] == best
    assert [item["item_id"] for item in answer["items"] if item["cold"]] == [i for i in best if i.startswith("cold")]
    assert answer["rows"] == {"sampled_interactions": 30, "item_embeddings": 26, "user_embeddings": 12}
    assert (answer["run_id"], answer["user_id"]) == (run.run_id, "user-04")
    assert err.count(" cold ") == night.COLD


def test_the_command_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert published.main(["--lake", str(tmp_path)]) == 1
    assert "there is no table 'runs': is this the lake?" in capsys.readouterr().err
    execute(gated(tmp_path), "publish", publish.run)
    assert published.main(["--lake", str(tmp_path), "--user", "nobody"]) == 1
    assert "user 'nobody' has no vector among the 12 of 2026-03-01" in capsys.readouterr().err
    assert published.main(["--lake", str(tmp_path), "--date", "1 March"]) == cli.REFUSED
    assert "is no date" in capsys.readouterr().err
    assert published.main(["--lake", str(tmp_path), "--top", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["user_id"] == "user-00"


def test_a_night_whose_rows_were_deleted_and_vacuumed_is_no_empty_night(tmp_path: Path) -> None:
    run = gated(tmp_path)
    execute(run, "publish", publish.run)
    reader = published.latest(run.lake)
    table = run.lake.table("item_embeddings")
    table.delete()
    assert reader.item_embeddings().num_rows == 26  # as of its version
    table.vacuum(0, dry_run=False, enforce_retention_duration=False)
    with pytest.raises(published.NotPublishedError, match="holds 0 rows of 2026-03-01, and 26 were published"):
        reader.item_embeddings()
