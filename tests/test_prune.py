"""jobs/prune.py: what nights of the newest days need stays, all else goes."""

from __future__ import annotations

import json
import os
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import cli, prune, recommend, text_embeddings
from jobs.lake import Lake
from jobs.run import Run
from jobs.staging import Staging
from tests import staged_night

NOW = datetime(2026, 6, 30, 12, tzinfo=UTC)
NEWEST = date(2026, 6, 30)
LONG_AGO = NOW - timedelta(days=100)


def artifact(lake: Path, kind: str, version: str, trained_on: str | None, **facts: Any) -> Path:
    """A part that was written long ago; incomplete without a date."""
    folder = Staging(str(lake / "_artifacts" / kind / version))
    folder.write_bytes("model.safetensors", b"x" * 100)
    if trained_on:
        folder.complete({"trained_on": trained_on, **facts})
    return aged(Path(folder.uri))


def aged(folder: Path, when: datetime = LONG_AGO) -> Path:
    for path in folder.rglob("*"):
        os.utime(path, (when.timestamp(), when.timestamp()))
    return folder


def night(
    lake: Path, day: date, number: int = 1, stages: tuple[str, ...] = ("publish", "report"), **counts: Any
) -> Run:
    run = staged_night.run_of(lake, day, number)
    for stage in stages:
        run.record(stage, counts if stage == stages[0] else {}, 1.0, {})
    return run


def staged(run: Run, stage: str, **facts: Any) -> Path:
    out = run.staging(stage)
    out.write_bytes("rows", b"y" * 10)
    out.complete(facts)
    return aged(Path(out.uri).parent)


def versions(lake: Path) -> set[str]:
    return {path.name for path in lake.glob("_artifacts/*/*")}


def test_what_the_newest_nights_use_and_what_that_stands_on_stays(tmp_path: Path) -> None:
    artifact(tmp_path, "spaces", "old", "2026-01-01")
    artifact(tmp_path, "models", "of-old", "2026-01-01", space_version="old")
    artifact(tmp_path, "spaces", "before", "2026-01-08")
    # Old, but in use: a space that is trained twice a year, an alignment on it, a reader on that.
    artifact(tmp_path, "spaces", "used", "2026-02-01", aligned_to="before")
    artifact(tmp_path, "alignments", "aligned", "2026-02-01", space_version="used")
    artifact(tmp_path, "readers", "reader", "2026-02-02", alignment_version="aligned")
    artifact(tmp_path, "spaces", "staged", "2026-02-03")
    artifact(tmp_path, "spaces", "young", "2026-06-01")
    night(tmp_path, date(2026, 1, 2), space_version="old", model_version="of-old")
    night(tmp_path, NEWEST, model_version=None, weights={"version": "reader"}, known={"spaces": ["old", "used"]})
    kept = night(tmp_path, date(2026, 3, 1), 2)
    staged(kept, "cf", space_version="staged")
    lake, before = Lake(str(tmp_path)), versions(tmp_path)

    told = prune.prune(lake, 60, NOW, dry_run=True)
    assert versions(tmp_path) == before
    expected = {"spaces": 2, "models": 1}
    assert (told["removed"], told["dry_run"]) == (expected, True)
    assert 300 < told["bytes"] < 3000
    done = prune.prune(lake, 60, NOW)
    assert (done["removed"], done["bytes"]) == (expected, told["bytes"])
    assert versions(tmp_path) == before - {"old", "of-old", "before"}
    assert prune.prune(lake, 60, NOW)["removed"] == {}
    # Of everything that was trained by the newest night, more days keep more.
    assert prune.prune(lake, 1, NOW)["removed"] == {"spaces": 1}
    assert versions(tmp_path) == {"used", "aligned", "reader", "staged"}


def test_what_a_backfill_has_just_trained_stays_and_what_that_stands_on(tmp_path: Path) -> None:
    artifact(tmp_path, "spaces", "under", "2026-01-01")
    artifact(tmp_path, "spaces", "old", "2026-01-01")
    aged(artifact(tmp_path, "models", "new", "2026-01-02", space_version="under"), NOW - timedelta(hours=1))
    night(tmp_path, NEWEST)
    assert prune.prune(Lake(str(tmp_path)), 60, NOW)["removed"] == {"spaces": 1}
    assert versions(tmp_path) == {"under", "new"}


def test_what_a_night_used_stays_until_it_has_been_measured(tmp_path: Path) -> None:
    for version in ("waiting", "measured"):
        artifact(tmp_path, "models", version, "2026-01-01")
    night(tmp_path, NEWEST)
    snapshot = staged(night(tmp_path, date(2026, 3, 1), 2, model_version="waiting"), "snapshot")
    night(tmp_path, date(2026, 3, 2), 3, model_version="measured")
    assert prune.prune(Lake(str(tmp_path)), 60, NOW)["removed"] == {"models": 1}
    assert (versions(tmp_path), snapshot.exists()) == ({"waiting"}, True)


def test_what_was_given_up_goes_when_it_is_old(tmp_path: Path) -> None:
    night(tmp_path, NEWEST)
    finished = staged(night(tmp_path, date(2026, 3, 1), 2), "snapshot")
    abandoned = staged(night(tmp_path, date(2026, 3, 1), 3, stages=("open",)), "snapshot")
    training = staged(night(tmp_path, date(2026, 3, 2), 4, stages=("open_training", "filterllm_train")), "snapshot")
    running = aged(staged(night(tmp_path, date(2026, 3, 3), 5, stages=("open",)), "snapshot"), NOW - timedelta(days=1))
    old = [artifact(tmp_path, "checkpoints", "given-up", None), artifact(tmp_path, "models", "half", None)]
    new = aged(artifact(tmp_path, "checkpoints", "in-training", None), NOW - timedelta(hours=1))
    (tmp_path / "_artifacts" / "checkpoints" / "empty").mkdir()
    told = prune.prune(Lake(str(tmp_path)), 60, NOW)
    assert told["removed"] == {"checkpoints": 2, "models": 1, "staged runs": 2}
    assert [path.exists() for path in (finished, running, new)] == [True] * 3
    assert [path.exists() for path in (abandoned, training, *old)] == [False] * 4


def test_indexes_that_belong_to_no_night_any_more_go_when_they_are_old(tmp_path: Path) -> None:
    def index(run: Run, when: datetime = LONG_AGO) -> Path:
        folder = Staging(str(tmp_path / "_index" / run.run_id))
        folder.complete({})
        return aged(Path(folder.uri), when)

    old = date(2026, 3, 1)
    newest, measured, waiting = (night(tmp_path, day, n) for n, day in enumerate((NEWEST, old, old), 1))
    staged(waiting, "snapshot")
    withdrawn, young = (staged_night.run_of(tmp_path, old, number) for number in (4, 5))
    gone = [index(measured), index(withdrawn)]
    kept = [index(newest), index(waiting), index(young, NOW - timedelta(days=1))]
    foreign = Staging(str(tmp_path / "_index/theirs"))
    foreign.complete({})
    kept.append(aged(Path(foreign.uri)))
    assert prune.prune(Lake(str(tmp_path)), 60, NOW, dry_run=True)["removed"] == {"indexes": 2}
    assert prune.prune(Lake(str(tmp_path)), 60, NOW)["removed"] == {"indexes": 2}
    assert [folder.exists() for folder in gone + kept] == [False] * 2 + [True] * 4


def test_a_snapshot_that_waits_to_be_measured_stays_though_its_night_has_no_report(tmp_path: Path) -> None:
    night(tmp_path, NEWEST)
    snapshot = staged(night(tmp_path, date(2026, 3, 1), 2, stages=("publish",)), "snapshot")
    assert prune.prune(Lake(str(tmp_path)), 60, NOW)["removed"] == {}
    assert snapshot.exists()


def test_folders_that_are_not_of_this_project_stay(tmp_path: Path) -> None:
    night(tmp_path, NEWEST)
    others = [tmp_path / "_staging/other_team", tmp_path / "_artifacts/mlflow/run-7"]
    for folder in others:
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"theirs")
        aged(folder)
    assert prune.prune(Lake(str(tmp_path)), 60, NOW)["removed"] == {}
    assert all((folder / "file").exists() for folder in others)
    with pytest.raises(ValueError, match="mlflow is none of"):
        staged_night.run_of(tmp_path, NEWEST).artifact("mlflow", "run-8")


def test_a_run_id_in_runs_names_a_staged_folder_or_nothing(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    victim = tmp_path / "victim/file"
    victim.parent.mkdir()
    victim.write_bytes(b"theirs")
    runs = [staged_night.run_of(lake, NEWEST, number, keep_runs=1) for number in (1, 2, 3)]
    folders = [staged(run, "shards") for run in runs]
    for number, run in enumerate(runs):
        run.record(recommend.STAGE, {}, 1.0, {recommend.TABLE: number})
    rows = runs[0].lake.read("runs").slice(0, 1)
    for name in ("../../victim", ""):
        foreign = rows.set_column(rows.schema.get_field_index("run_id"), "run_id", pa.array([name]))
        runs[0].lake.commit("runs", foreign, app=f"foreign {name}")
    recommend._prune(runs[2])
    assert victim.exists()
    assert [folder.exists() for folder in folders] == [False, False, True]


def test_cached_rows_stay_while_a_kept_night_or_part_names_their_version(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))

    def cached() -> tuple[set[str], set[str]]:
        texts, scores = lake.read("text_embeddings"), lake.read("item_scores")
        return set(texts["model_version"].to_pylist()), set(scores["scoring_version"].to_pylist())

    for version in ("mini", "words", "adapted", "replaced"):
        rows = text_embeddings._rows(pa.array(["sha"]), version, np.ones((1, 4), np.float32))
        lake.commit("text_embeddings", rows, app=f"text_embeddings/{version}")
    for version in ("tonight", "last-year"):
        row = {
            "item_id": "i",
            "text_sha256": "sha",
            "user_id": "u",
            "rank": 1,
            "probability": 0.5,
            "propensity": "top_k",
        }
        scores = pa.Table.from_pylist([{"scoring_version": version, **row}])
        lake.commit("item_scores", scores, app=f"item_scores/{version}")
    artifact(tmp_path, "models", "model", "2026-06-01", encoder_version="adapted")
    night(tmp_path, NEWEST, model_version="mini+words", scoring_version="tonight")
    night(tmp_path, date(2025, 6, 30), 2, model_version="replaced", scoring_version="last-year")
    # The files are of now: by a clock of next year they are old.
    assert prune.prune(lake, 60, datetime.now(UTC))["removed"] == {}
    later = datetime.now(UTC) + timedelta(days=365)
    told = prune.prune(lake, 60, later, dry_run=True)
    assert cached() == ({"mini", "words", "adapted", "replaced"}, {"tonight", "last-year"})
    done = prune.prune(lake, 60, later)
    assert done["removed"] == told["removed"] == {"text_embeddings": 1, "item_scores": 1}
    assert done["bytes"] == told["bytes"] > 500
    runs = lake.table("runs")
    assert runs.get_add_actions().num_rows == len(set(lake.read("runs")["refresh_date"].to_pylist())) == 2
    assert cached() == ({"mini", "words", "adapted"}, {"tonight"})


def test_scores_stay_for_the_nights_of_a_week_and_for_runs_that_are_not_finished(tmp_path: Path) -> None:
    lake, hour = Lake(str(tmp_path)), timedelta(hours=1)
    row = {"item_id": "i", "text_sha256": "sha", "user_id": "u", "rank": 1, "probability": 0.5, "propensity": "top_k"}
    for version in ("tonight", "week", "unfinished", "recorded", "measured", "before"):
        scores = pa.Table.from_pylist([{"scoring_version": version, **row}])
        lake.commit("item_scores", scores, app=f"item_scores/{version}")
    for number, (version, days) in enumerate({"tonight": 0, "week": 7, "before": 8}.items(), 1):
        night(tmp_path, NEWEST - timedelta(days=days), number, scoring_version=version)
    # What a finished night left waits to be measured, for which nothing is scored.
    staged(night(tmp_path, NEWEST - timedelta(days=30), 4), "filterllm_score", scoring_version="measured")
    running = night(tmp_path, NEWEST - timedelta(days=30), 5, ("open",))
    aged(staged(running, "filterllm_score", scoring_version="unfinished"), datetime.now(UTC))
    running.record("filterllm_train", {"scoring_version": "recorded"}, 1.0, {})
    assert prune.prune(lake, 60, datetime.now(UTC) + timedelta(days=7) - hour)["removed"] == {}
    assert prune.prune(lake, 60, datetime.now(UTC) + timedelta(days=7) + hour)["removed"] == {"item_scores": 2}
    left = lake.read("item_scores")["scoring_version"].to_pylist()
    assert sorted(left) == ["recorded", "tonight", "unfinished", "week"]
    # Fewer days than a week count here, too.
    assert prune.prune(lake, 1, datetime.now(UTC) + timedelta(days=1) + hour)["removed"]["item_scores"] == 3


def texts_of(lake: Lake, model: str, *shas: str) -> None:
    rows = text_embeddings._rows(pa.array(shas), model, np.full((len(shas), 4), len(shas), np.float32))
    lake.commit("text_embeddings", rows, app=f"{model}/{shas}")


def left_of(lake: Lake, model: str) -> list[str]:
    return sorted(lake.read("text_embeddings", columns=["text_sha256"], model_version=model)["text_sha256"].to_pylist())


def of_items(run: Run, *shas: str | None) -> Path:
    """The snapshot of a run, staged long ago, of items with these texts."""
    run.staging("snapshot").write("items_labelled", pa.table({"text_sha256": pa.array(shas, pa.string())}))
    return staged(run, "snapshot")


def test_texts_that_no_staged_snapshot_has_are_deleted_under_the_models_in_use(tmp_path: Path) -> None:
    lake, waiting = Lake(str(tmp_path)), date(2026, 5, 1)
    for model in ("mini", "lora-model", "unnamed"):
        texts_of(lake, model, "tonight", "waiting", "gone", "given-up")
        texts_of(lake, model, "gone")  # of two runs at once
    texts_of(lake, "words", "tonight")
    artifact(tmp_path, "models", "model", "2026-06-01", encoder_version="lora-model")
    of_items(night(tmp_path, NEWEST, model_version="mini+words"), "tonight", None, "tonight")
    of_items(night(tmp_path, waiting, 2), "waiting")
    of_items(night(tmp_path, waiting, 3, stages=("open",)), "given-up")
    before = lake.read("text_embeddings")
    told = prune.prune(lake, 60, NOW, dry_run=True)
    assert told["removed"] == {"staged runs": 1, "texts": 6}
    assert lake.read("text_embeddings") == before
    done = prune.prune(lake, 60, NOW)
    assert done["removed"] == told["removed"]
    assert done["bytes"] == told["bytes"] > 1000
    assert left_of(lake, "mini") == left_of(lake, "lora-model") == ["tonight", "waiting"]
    assert left_of(lake, "words") == ["tonight"]
    assert len(left_of(lake, "unnamed")) == 5  # it goes as a whole when it is old
    found = lake.read("text_embeddings", model_version="mini")
    assert set(map(tuple, found["embedding"].to_pylist())) == {(4.0,) * 4}
    assert prune.prune(lake, 60, NOW)["removed"] == {}


def test_without_the_snapshot_of_the_newest_night_no_text_of_a_model_in_use_is_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = Lake(str(tmp_path))
    texts_of(lake, "mini", "one", "two")
    of_items(night(tmp_path, NEWEST, 1, model_version="mini"), "one")
    newer = night(tmp_path, NEWEST, 2)
    assert prune.prune(lake, 60, NOW)["removed"] == {}
    assert f"the snapshot of {newer.run_id}" in capsys.readouterr().err
    of_items(newer, "two", "three")
    texts_of(lake, "mini", "three", "four")
    assert prune.prune(lake, 60, NOW)["removed"] == {"texts": 1}
    assert left_of(lake, "mini") == ["one", "three", "two"]


def test_texts_that_a_night_encodes_meanwhile_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lake, batches = Lake(str(tmp_path)), Lake.batches
    for model in ("a", "b", "c"):
        texts_of(lake, model, "tonight", "gone")
    of_items(night(tmp_path, NEWEST, models=["a", "b", "c"]), "tonight")

    def beside(self: Lake, name: str, **options: Any) -> Any:
        """A night encodes through model a when the rows of a have been read, and through c when those of b have."""
        yield from batches(self, name, **options)
        if (encoded := {"a": "a", "b": "c"}.get(options.get("model_version", ""))) is not None:
            texts_of(lake, encoded, "of another night")

    monkeypatch.setattr(Lake, "batches", beside)
    assert prune.prune(lake, 60, NOW)["removed"] == {"texts": 2}
    monkeypatch.undo()
    assert "another writer changed `text_embeddings`: texts of a are deleted next time" in capsys.readouterr().err
    assert [left_of(lake, model) for model in "abc"] == [
        ["gone", "of another night", "tonight"],
        ["tonight"],
        ["of another night", "tonight"],
    ]


def test_cached_rows_that_stay_are_put_together_in_fewer_files(tmp_path: Path) -> None:
    """Not those that nobody names: written anew they would look young, and stay as long again."""
    lake = Lake(str(tmp_path))
    for number, version in enumerate(("named", "given-up") * 3):
        rows = text_embeddings._rows(pa.array([f"sha-{number}"]), version, np.full((1, 4), number, np.float32))
        lake.commit("text_embeddings", rows, app=f"text_embeddings/{number}")
    before = lake.read("text_embeddings").sort_by("text_sha256")

    def files() -> dict[str, int]:
        found = pa.table(lake.table("text_embeddings").get_add_actions(flatten=True))["partition.model_version"]
        return {one["values"]: one["counts"] for one in found.value_counts().to_pylist()}

    night(tmp_path, NEWEST, encoder_version="named")
    prune.prune(lake, 60, datetime.now(UTC), dry_run=True)
    assert files() == {"named": 3, "given-up": 3}
    prune.prune(lake, 60, datetime.now(UTC))
    assert files() == {"named": 1, "given-up": 3}
    assert lake.read("text_embeddings").sort_by("text_sha256") == before
    version = lake.version("text_embeddings")
    prune.prune(lake, 60, datetime.now(UTC))
    assert lake.version("text_embeddings") == version  # one file is not written anew


def test_where_nothing_is_published_nothing_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = artifact(tmp_path, "spaces", "old", "2020-01-01")
    assert prune.main(["--lake", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["removed"] == {}
    assert "nothing is published" in captured.err
    assert old.exists()
    assert prune.main(["--lake", str(tmp_path / "mistyped")]) == cli.REFUSED
    assert "there is no such folder" in capsys.readouterr().err
    assert prune.main(["--lake", str(tmp_path), "--keep-days", "0"]) == cli.REFUSED
    assert "--keep-days is 0" in capsys.readouterr().err
