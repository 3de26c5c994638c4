"""Publishing: all or nothing, exactly once, also when it is killed between two tables."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from jobs import cold_refresh, gates, item_index, publish, published
from jobs.cold_refresh import prune
from jobs.lake import Lake, LakeError
from jobs.run import OUTPUTS, STAGES, Run, execute
from jobs.staging import Staging, StagingError
from schemas.errors import ColdRefreshError
from schemas.table import table as schema
from tests import gated_night as night
from udfs.vectors import from_column


def gated(lake: Path, **kind: Any) -> Run:
    """A night that has passed its gates; what the gates say of it is not asked again here."""
    run = night.run_of(lake, **{k: v for k, v in kind.items() if k in ("sequence", "run_date")})
    night.stage(run, cold=kind.get("cold", night.COLD))
    out = run.staging("gates")
    out.clear()
    out.write_bytes("data_docs/index.html", b"")
    rows = {name: run.staging("refresh").read(name).num_rows for name in OUTPUTS}
    out.complete({"refresh_digest": gates.refresh_digest(run), "rows": rows})
    return run


def tables(lake: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of every published table, in an order of their own."""
    read = {name: Lake(str(lake)).read(name).to_pylist() for name in publish.TABLES}
    return {name: sorted(rows, key=lambda r: json.dumps(r, default=str)) for name, rows in read.items()}


def test_a_night_is_published_with_its_lineage(tmp_path: Path) -> None:
    run = gated(tmp_path)
    facts = execute(run, "publish", publish.run)
    assert facts["rows"] == {
        "rejected_rows": 3,
        "sampled_interactions": 30,
        "item_embeddings": 26,
        "user_embeddings": 12,
    }
    for name in publish.TABLES:
        table = run.lake.table(name)
        assert table.version() == facts["output_versions"][name]
        commit = table.history(1)[0]
        lineage = json.loads(commit["lineage"])
        assert lineage["run_id"] == run.run_id
        assert lineage["input_versions"] == {"interactions": 3, "items": 1}
        assert lineage["conf_hash"] == run.conf_hash
        assert lineage["model_version"] == "m1"
        assert lineage["rows"]["item_embeddings"] == 26
        assert table.transaction_version(f"{name}/2026-03-01") == 1
        assert set(run.lake.read(name)["run_id"].to_pylist()) == {run.run_id}
    staged = run.staging("refresh").read("item_embeddings")
    there = published.latest(run.lake).item_embeddings()
    assert there["embedding"].to_pylist() == staged.sort_by("item_id")["embedding"].to_pylist()
    row = next(r for r in run.lake.read("runs").to_pylist() if r["stage"] == "publish")
    assert json.loads(row["output_versions"]) == facts["output_versions"]


def test_publishing_again_changes_nothing(tmp_path: Path) -> None:
    run = gated(tmp_path)
    first = execute(run, "publish", publish.run)
    assert execute(run, "publish", publish.run) == first
    run.staging("publish").clear()  # as if it had been killed before its manifest
    again = execute(run, "publish", publish.run)
    assert again["output_versions"] == first["output_versions"]
    assert [run.lake.version(name) for name in publish.TABLES] == list(first["output_versions"].values())
    assert run.lake.read("runs").num_rows == 1


# Where the process ends, as a kill ends it: before the index's manifest, or before the commit of table number n.
@pytest.mark.parametrize("after", ["index", "0", "1", "2", "3", "4"])
def test_killed_anywhere_and_run_again_the_tables_are_those_of_an_undisturbed_night(tmp_path: Path, after: str) -> None:
    undisturbed = gated(tmp_path / "undisturbed")
    execute(undisturbed, "publish", publish.run)
    run = gated(tmp_path / "killed")
    script = f"""
import os
from pathlib import Path
from jobs import publish
from jobs.lake import Lake
from jobs.run import execute
from jobs.staging import Staging
from tests import gated_night

commit, complete, done = Lake.commit, Staging.complete, []

def counted(self, *args, **kwargs):
    if len(done) == {4 if after == "index" else int(after)}:
        os._exit(9)
    done.append(args)
    return commit(self, *args, **kwargs)

def half(self, facts):
    if "_index" in self.uri and {after == "index"}:
        os._exit(9)
    complete(self, facts)

Lake.commit, Staging.complete = counted, half
run = gated_night.run_of(Path({str(tmp_path / "killed")!r}))
execute(run, "publish", publish.run)
"""
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert killed.returncode == 9, killed.stderr
    # Readers do not see the half of it.
    with pytest.raises(published.NotPublishedError):
        published.latest(run.lake)
    execute(run, "publish", publish.run)
    assert tables(tmp_path / "killed") == tables(tmp_path / "undisturbed")
    night_there = published.latest(run.lake)
    assert night_there.item_embeddings().num_rows == 26
    assert night_there.sampled_interactions().num_rows == 30


def test_a_later_run_replaces_the_date_and_leaves_other_dates(tmp_path: Path) -> None:
    other = gated(tmp_path, run_date=night.RUN_DATE - timedelta(days=1))
    execute(other, "publish", publish.run)
    first = gated(tmp_path)
    execute(first, "publish", publish.run)
    asking = {
        "refresh_date": first.run_date,
        "run_id": "asking",
        "table": "users to recommend to",
        "key": "u",
        "rows": 1,
    }
    stranger = pa.Table.from_pylist([{**asking, "reason": "no_vector", "detail": "none"}])
    first.lake.commit("rejected_rows", stranger, app="rejected_rows/recommend/asking")
    second = gated(tmp_path, sequence=2)
    execute(second, "publish", publish.run)
    for name in publish.TABLES:
        kept = {"asking"} if name == "rejected_rows" else set()
        assert set(second.lake.read(name)["run_id"].to_pylist()) == {other.run_id, second.run_id} | kept
    assert published.latest(second.lake).run_id == second.run_id
    # The one before can still be read, at its versions.
    assert published.latest(second.lake, other.run_date).item_embeddings()["run_id"][0].as_py() == other.run_id


def test_an_earlier_run_does_not_pretend_to_publish_over_a_later_one(tmp_path: Path) -> None:
    late = gated(tmp_path, sequence=2)
    execute(late, "publish", publish.run)
    before = tables(tmp_path)
    early = gated(tmp_path, sequence=1)
    with pytest.raises(publish.PublishError, match="number 2 of that date, and this is number 1"):
        execute(early, "publish", publish.run)
    assert tables(tmp_path) == before
    assert published.latest(early.lake).run_id == late.run_id


def test_a_later_run_that_publishes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    early, late = gated(tmp_path, sequence=1), gated(tmp_path, sequence=2)
    commit = Lake.commit

    def overtaken(self: Lake, name: str, rows: pa.Table, **kwargs: Any) -> int:
        if name == "item_embeddings" and kwargs["sequence"] == 1:
            execute(late, "publish", publish.run)
        return commit(self, name, rows, **kwargs)

    monkeypatch.setattr(Lake, "commit", overtaken)
    with pytest.raises(publish.PublishError, match="table 'item_embeddings'"):
        execute(early, "publish", publish.run)
    assert published.latest(late.lake).run_id == late.run_id
    assert {run_id for name in publish.TABLES for run_id in late.lake.read(name)["run_id"].to_pylist()} == {late.run_id}


def test_a_night_without_cold_items_empties_what_an_earlier_run_of_the_date_sampled(tmp_path: Path) -> None:
    execute(gated(tmp_path), "publish", publish.run)
    run = gated(tmp_path, sequence=2, cold=0)
    facts = execute(run, "publish", publish.run)
    assert facts["rows"]["sampled_interactions"] == 0
    assert published.latest(run.lake).sampled_interactions().num_rows == 0
    assert run.lake.read("sampled_interactions").num_rows == 0


def test_nothing_is_published_that_was_not_gated(tmp_path: Path) -> None:
    run = gated(tmp_path)
    run.staging("gates").clear()
    with pytest.raises(StagingError, match="gates is not complete"):
        publish.run(run, run.staging("publish"))
    gated(tmp_path)
    refreshed = run.staging("refresh")
    changed = {name: refreshed.read(name) for name in OUTPUTS}
    refreshed.write("user_embeddings", changed["user_embeddings"].slice(1))
    with pytest.raises(StagingError, match="user_embeddings"):
        publish.run(run, run.staging("publish"))
    refreshed.complete({})  # staged anew, after the gates
    with pytest.raises(publish.PublishError, match="computed again after the gates had passed"):
        publish.run(run, run.staging("publish"))
    gated(tmp_path)
    run.staging("snapshot").write("rejected_rows", run.staging("snapshot").read("rejected_rows").slice(1))
    with pytest.raises(StagingError, match="rejected_rows"):
        publish.run(run, run.staging("publish"))
    assert not any(run.lake.exists(name) for name in publish.TABLES)


@pytest.mark.parametrize("feature", ["clustering", "columnMapping"])
def test_an_output_table_that_delta_rs_cannot_write_is_a_clear_error(tmp_path: Path, feature: str) -> None:
    contract = schema("user_embeddings")
    folder = tmp_path / "user_embeddings"
    DeltaTable.create(str(folder), contract.arrow_schema, partition_by=["refresh_date"])
    protocol: dict[str, Any] = {"minReaderVersion": 3, "minWriterVersion": 7}
    protocol |= {"readerFeatures": [feature] if feature == "columnMapping" else []}
    protocol |= {"writerFeatures": [feature, "domainMetadata"]}
    (folder / "_delta_log" / f"{1:020}.json").write_text(json.dumps({"protocol": protocol}) + "\n")
    run = gated(tmp_path)
    with pytest.raises(LakeError, match=rf"table 'user_embeddings' .* cannot write: \['{feature}'\]"):
        execute(run, "publish", publish.run)
    with pytest.raises(published.NotPublishedError):
        published.latest(run.lake)


def test_an_output_table_of_another_shape_is_a_clear_error(tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / "user_embeddings"), pa.table({"who": ["a"]}))
    run = gated(tmp_path)
    with pytest.raises(LakeError, match=r"table 'user_embeddings' at .* cannot be written"):
        execute(run, "publish", publish.run)


def test_a_table_from_before_its_contract_had_a_column_gets_it(tmp_path: Path) -> None:
    contract, lake = schema("recommendations"), Lake(str(tmp_path))
    values = {"string": "a", "date": date(2026, 3, 1)}
    rows = pa.table({c.name: pa.array([values.get(c.type, 1)], c.arrow_type) for c in contract.columns})
    older = contract.conform(rows).drop_columns(["likelihood"])
    write_deltalake(str(tmp_path / "recommendations"), older, partition_by=["refresh_date"])
    lake.commit("recommendations", rows, app="one")
    assert lake.read("recommendations")["likelihood"].to_pylist() in ([None, 1.0], [1.0, None])


def _clustered(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, 16))
    return (centres[rng.integers(0, 40, n)] + 0.4 * rng.normal(size=(n, 16))).astype(np.float32)


def test_the_index_of_a_small_catalogue_is_exact_and_beside_the_tables(tmp_path: Path) -> None:
    run = gated(tmp_path)
    facts = execute(run, "publish", publish.run)["index"]
    assert facts["type"] == "IndexFlatIP"
    assert facts["recall@20"] == 1.0
    assert Path(facts["path"]) == tmp_path / "_index" / run.run_id / "items.faiss"
    index = item_index.load(run.lake, run.run_id)
    there = published.latest(run.lake)
    items, user = there.item_embeddings(), from_column(there.user_embeddings()["embedding"])[3]
    scores = from_column(items["embedding"]) @ user
    best = np.argsort(-scores)[:5]
    found = index.search(user, 5)
    assert [item for item, _ in found] == [items["item_id"][int(i)].as_py() for i in best]
    np.testing.assert_allclose([score for _, score in found], scores[best], rtol=1e-5)
    os.remove(tmp_path / "_index" / run.run_id / "manifest.json")
    with pytest.raises(StagingError, match="is gone"):
        item_index.load(run.lake, run.run_id)


def test_an_index_that_is_gone_is_made_again_in_memory(tmp_path: Path) -> None:
    run = gated(tmp_path)
    execute(run, "publish", publish.run)
    there = published.latest(run.lake)
    tables = there.item_embeddings(), there.user_embeddings()
    kept = item_index.ready(run, *tables)
    shutil.rmtree(tmp_path / "_index")
    made = item_index.ready(run, *tables)
    assert (made.item_ids, made.facts) == (kept.item_ids, kept.facts)
    assert faiss.serialize_index(made.index).tobytes() == faiss.serialize_index(kept.index).tobytes()
    assert not (tmp_path / "_index").exists()


def test_of_published_nights_the_newest_keep_their_staged_files_and_index(tmp_path: Path) -> None:
    days = [night.RUN_DATE + timedelta(days=n) for n in (0, 30, 31, 32)]
    runs = [gated(tmp_path, run_date=day) for day in days]
    for run in runs:
        execute(run, "publish", publish.run)
        if run is not runs[1]:  # this one is being measured, or could not be
            run.record(STAGES[-1], {}, 0.0, {})
    before = tables(tmp_path)

    def left(place: str) -> list[str]:
        return sorted(folder.name for folder in (tmp_path / place).iterdir())

    # The first date is measured a week before the newest night or later, and until then needs its snapshot.
    prune(_keeping(runs[3], 2, horizon_days=25))
    assert left("_staging") == [run.run_id for run in runs]
    assert left(f"_staging/{runs[0].run_id}") == ["snapshot"]
    for number, protocol in enumerate(("temporal", "none")):
        prune(_keeping(runs[3], 2 - number, horizon_days=24, protocol=protocol))
        assert left("_staging") == left("_index") == [runs[1].run_id, *(run.run_id for run in runs[2 + number :])]
    for path in (tmp_path / "_staging" / runs[1].run_id).rglob("*"):
        os.utime(path, (0, 0))
    prune(_keeping(runs[3], 3))
    assert runs[1].staging("refresh").is_complete()
    prune(_keeping(runs[3], 1, horizon_days=24))
    assert left("_staging") == [runs[1].run_id, runs[3].run_id]
    assert left(f"_staging/{runs[1].run_id}") == ["snapshot"]
    assert tables(tmp_path) == before


def test_older_nights_are_cleared_away_although_what_follows_publish_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, tonight = (gated(tmp_path, run_date=night.RUN_DATE + timedelta(days=n)) for n in (0, 80))
    for stage in ("publish", STAGES[-1]):
        execute(before, stage, publish.run if stage == "publish" else lambda run, out: {})
    tonight = _keeping(tonight, 1)

    def stages(run: Run, name: str) -> dict[str, Any]:
        if name == "evaluate":
            raise ColdRefreshError("the table of interactions is gone")
        return execute(run, name, publish.run) if name == "publish" else {}

    monkeypatch.setattr(cold_refresh, "open_run", lambda *_, **__: tonight)
    monkeypatch.setattr(cold_refresh, "_preflight", lambda _: "")
    monkeypatch.setattr(cold_refresh, "execute", stages)
    with pytest.raises(ColdRefreshError, match="is gone"):
        cold_refresh.refresh(tonight.settings, tonight.run_date)
    for place in ("_staging", "_index"):
        assert [folder.name for folder in (tmp_path / place).iterdir()] == [tonight.run_id]


def test_what_earlier_runs_of_a_date_left_without_publishing_goes_when_the_night_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published_before, refused, tonight, later = (gated(tmp_path, sequence=number) for number in (1, 2, 3, 4))
    day_before = gated(tmp_path, run_date=night.RUN_DATE - timedelta(days=1))
    training = replace(refused, run_id=refused.run_id[:-1] + "f")
    training.staging("snapshot").complete({})
    for run in (published_before, refused, tonight, later, day_before):
        run.record("open", {}, 0.0, {})
    training.record("open_training", {}, 0.0, {})
    execute(published_before, "publish", publish.run)
    Staging(str(tmp_path / "_index" / refused.run_id)).complete({})  # it was killed behind its index
    execute(tonight, "publish", publish.run)
    tonight.record(STAGES[-1], {}, 0.0, {})
    with pytest.raises(publish.PublishError):
        execute(refused, "publish", publish.run)
    prune(tonight)
    left = {run.run_id for run in (published_before, tonight, later, day_before, training)}
    assert {folder.name for folder in (tmp_path / "_staging").iterdir()} == left
    assert {folder.name for folder in (tmp_path / "_index").iterdir()} == {published_before.run_id, tonight.run_id}
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("removing")]
    assert [refused.run_id in line for line in said] == [True, True]
    assert published_before.staging("snapshot").is_complete()
    prune(tonight)  # again: there is nothing left to remove
    assert "removing" not in capsys.readouterr().err


def _keeping(run: Run, keep_runs: int, **evaluate: Any) -> Run:
    settings = run.settings
    chosen = {"keep_runs": keep_runs, "evaluate": settings.evaluate.model_copy(update=evaluate)}
    return replace(run, settings=settings.model_copy(update=chosen))


def test_a_large_catalogue_gets_inverted_lists_with_measured_recall() -> None:
    vectors, queries = _clustered(6000, 1), _clustered(100, 2)
    index, facts = item_index.build(vectors, queries, seed=7, exact_below=5000)
    again, _ = item_index.build(vectors, queries, seed=7, exact_below=5000)
    assert faiss.serialize_index(index).tobytes() == faiss.serialize_index(again).tobytes()
    assert facts["type"] == "IndexIVFFlat"
    assert 1 <= facts["probes"] < facts["lists"]
    # The recall that is recorded, against a reference of its own: the exact top 20 in float64.
    best = np.argsort(-(queries.astype(np.float64) @ vectors.T.astype(np.float64)), axis=1)[:, :20]
    _, found = faiss.deserialize_index(faiss.serialize_index(index)).search(queries, 20)
    recall = np.mean([len(set(f) & set(b)) / 20 for f, b in zip(found, best, strict=True)])
    assert recall == pytest.approx(facts["recall@20"], abs=0.002)
    assert facts["recall@20"] >= 0.95
    index.nprobe = 1
    assert item_index.recall(index, vectors, queries, 20) < 0.95
