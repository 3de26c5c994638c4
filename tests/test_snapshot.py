"""The snapshot: what is read, what is rejected and why, and how users and items are numbered and labelled."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from jobs import allmrec_night, expectations, recommend, snapshot
from jobs.published import NotPublishedError
from jobs.run import Run, code_version, execute, open_run
from jobs.settings import Settings
from jobs.staging import Staging
from schemas.errors import ColdRefreshError, ContractError

DAY = date(2026, 3, 1)
BEFORE, AFTER = datetime(2026, 2, 1, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _no_data_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering them takes longer than the gate; tests/test_gates.py has them."""
    evaluate = expectations.evaluate
    monkeypatch.setattr(expectations, "evaluate", lambda *args, **kwargs: evaluate(*args, **{**kwargs, "docs": None}))


def _events(rows: list[tuple[Any, ...]]) -> pa.Table:
    user, item, when, weight = zip(*rows, strict=True)
    return pa.table(
        {
            "user_id": pa.array(user, pa.string()),
            "item_id": pa.array(item, pa.string()),
            "event_time": pa.array(when, pa.timestamp("us", tz="UTC")),
            "weight": pa.array(weight, pa.float64()),
        }
    )


def _items(rows: list[tuple[Any, ...]]) -> pa.Table:
    item, title, text, created = zip(*rows, strict=True)
    return pa.table(
        {
            "item_id": pa.array(item, pa.string()),
            "title": pa.array(title, pa.string()),
            "text": pa.array(text, pa.string()),
            "created_at": pa.array(created, pa.timestamp("us", tz="UTC")),
        }
    )


GOOD_EVENTS = [("u2", "b", BEFORE, 1.0), ("u1", "a", BEFORE, 2.0), ("u1", "b", BEFORE, 1.0)]
GOOD_ITEMS = [("b", "B", "about b", None), ("a", "A", None, None), ("new", "New", "", BEFORE)]


def _run(lake: Path, **sections: Any) -> Run:
    return open_run(Settings.model_validate({"lake": str(lake), **sections}), DAY)


def _snapshot(run: Run) -> tuple[dict[str, Any], Staging]:
    out = run.staging("snapshot")
    facts = snapshot.run(run, out)
    return facts, out


def _lake(folder: Path, events: list[tuple[Any, ...]], items: list[tuple[Any, ...]]) -> Path:
    write_deltalake(str(folder / "interactions"), _events(events))
    write_deltalake(str(folder / "items"), _items(items))
    return folder


def _reasons(out: Staging) -> dict[tuple[str, str | None], tuple[str, int]]:
    return {(r["table"], r["key"]): (r["reason"], r["rows"]) for r in out.read("rejected_rows").to_pylist()}


def test_rows_are_numbered_labelled_and_summed_whatever_their_order(spark: Any, tmp_path: Path) -> None:
    events = [*GOOD_EVENTS, ("u1", "a", datetime(2026, 2, 2, tzinfo=UTC), 3.0)]
    items = [*GOOD_ITEMS, ("a", "Another A", None, None)]
    facts, out = _snapshot(_run(_lake(tmp_path / "one", events, items)))
    users = out.read("users").sort_by("user_idx").to_pylist()
    assert [(u["user_id"], u["user_idx"], u["interactions"]) for u in users] == [("u1", 0, 2), ("u2", 1, 1)]
    labelled = out.read("items_labelled").sort_by("item_idx").to_pylist()
    assert labelled[0]["content"] in ("A", "Another A")
    assert [(i["item_id"], i["label"], i["interactions"]) for i in labelled] == [
        ("a", "warm", 1),
        ("b", "warm", 2),
        ("new", "cold", 0),
    ]
    assert [i["content"] for i in labelled[1:]] == ["B\nabout b", "New"]
    pairs = {(p["user_id"], p["item_id"]): p for p in out.read("training_interactions").to_pylist()}
    assert (pairs["u1", "a"]["weight"], pairs["u1", "a"]["events"]) == (5.0, 2)
    assert pairs["u1", "a"]["last_time"] == datetime(2026, 2, 2, tzinfo=UTC)
    assert facts["newest_event"] == "2026-02-02T00:00:00+00:00"
    assert (facts["rows_in"], facts["rows_used"]) == (
        {"interactions": 4, "items": 4},
        {"interactions": 4, "items": 3},
    )
    assert (facts["warm"], facts["cold"], facts["pairs"], facts["users"]) == (2, 1, 3, 2)
    assert facts["expectations"] == facts["succeeded"] > 0
    assert facts["data_docs"] == out.path("data_docs/index.html")

    two, _ = _snapshot(_run(_lake(tmp_path / "two", events[::-1], items[::-1])))
    assert (two["training_digest"], two["items_digest"]) == (facts["training_digest"], facts["items_digest"])
    other = [*events[:-1], ("u1", "a", datetime(2026, 2, 2, tzinfo=UTC), 3.5)]
    three, _ = _snapshot(_run(_lake(tmp_path / "three", other, items)))
    assert three["training_digest"] != facts["training_digest"]


def test_every_rejected_row_has_a_reason_and_counts_reconcile(spark: Any, tmp_path: Path) -> None:
    bad_events = [
        (None, "a", BEFORE, 1.0),
        ("u1", "", BEFORE, 1.0),
        ("u1", "a", BEFORE, 2.0),  # a copy
        ("u1", "gone", BEFORE, 1.0),
        ("u2", "gone", BEFORE, 1.0),
        ("u2", "a", AFTER, 1.0),
        ("u3", "a", BEFORE, -1.0),
        ("u4", "a", BEFORE, float("nan")),
        ("u4", "a", BEFORE, float("inf")),
        ("u5", "a", BEFORE, 1e39),  # no float32
        ("u5", "a", BEFORE, 1e-46),
    ]
    bad_items = [
        (None, "no id", None, None),
        ("a", "Another A", None, None),
        ("empty", " ", "\r\n\t\u00a0\ufeff", None),
        ("\t\u00a0", "Blank", None, None),
        ("future", "Later", None, AFTER),
        ("long", "x" * 10_000_000, None, None),
        ("bare", None, "", None),
    ]
    used = [*GOOD_EVENTS * 10, ("u1", "bare", BEFORE, 1.0)]  # which places it, without any text
    lake = _lake(tmp_path, [*used, *bad_events], [*GOOD_ITEMS, *bad_items])
    # Spark writes the bytes it is given, as a careless upstream job would.
    columns = "'broken' as item_id, cast(X'436166e9' as string) as title, 'latin-1' as text, cast(null as timestamp) as created_at"
    spark.sql(f"select {columns}").write.format("delta").mode("append").save(str(lake / "items"))
    facts, out = _snapshot(_run(lake, gates={"rejected_share": 1.0}, snapshot={"warm_interactions": 2}))
    reasons = _reasons(out)
    assert reasons["interactions", "(null) a"] == ("null_id", 1)
    assert reasons["interactions", "u1 "] == ("null_id", 1)
    assert reasons["interactions", "u1 a"] == ("duplicate", 10)
    assert reasons["interactions", "gone"] == ("unknown_item", 2)
    assert reasons["interactions", None] == ("after_run_date", 1)
    assert reasons["interactions", "u3 a"] == ("bad_weight", 1)
    assert reasons["interactions", "u4 a"] == ("bad_weight", 2)
    assert reasons["interactions", "u5 a"] == ("bad_weight", 2)
    assert reasons["items", "a"] == ("duplicate", 1)
    assert reasons["items", "empty"] == ("no_text", 1)
    assert reasons["items", "\t\u00a0"] == ("null_id", 1)
    assert reasons["items", "long"] == ("text_too_long", 1)
    assert reasons["items", "broken"] == ("invalid_utf8", 1)
    reasons_of_items = {name: rows for name, rows in facts["rejected_reasons"].items() if name.startswith("items.")}
    assert reasons_of_items == {
        "items.after_run_date": 1,
        "items.duplicate": 1,
        "items.invalid_utf8": 1,
        "items.no_text": 1,
        "items.null_id": 2,
        "items.text_too_long": 1,
    }
    items = {item["item_id"]: item for item in out.read("items_labelled").to_pylist()}
    assert set(items) == {"a", "b", "new", "bare"}
    assert (items["bare"]["label"], items["bare"]["content"], items["bare"]["text_sha256"]) == ("cold", None, None)
    for name in ("interactions", "items"):
        assert facts["rows_in"][name] == facts["rows_used"][name] + facts["rows_rejected"][name]


def test_k_core_is_applied_until_nothing_changes(spark: Any, tmp_path: Path) -> None:
    core = [(u, i, BEFORE, 1.0) for u in ("u1", "u2") for i in ("a", "b")]
    tail = [("u3", "new", BEFORE, 1.0), ("u3", "a", BEFORE, 1.0)]  # new has one user; without it u3 has one item
    facts, out = _snapshot(
        _run(_lake(tmp_path, core + tail, GOOD_ITEMS), snapshot={"k_core_users": 2, "k_core_items": 2})
    )
    assert {p["user_id"] for p in out.read("training_interactions").to_pylist()} == {"u1", "u2"}
    assert facts["rejected_reasons"] == {"interactions.k_core": 2}
    assert facts["cold"] == 1


def test_a_split_holds_out_a_window_leaves_out_and_a_prompt_is_read(spark: Any, tmp_path: Path) -> None:
    events = [*GOOD_EVENTS, ("u1", "a", datetime(2026, 1, 31, 23, tzinfo=UTC), 8.0), ("u1", "new", None, 1.0)]
    lake = _lake(tmp_path, events, [*GOOD_ITEMS, ("again", "Tea", "Tea from the garden", None)])
    parts = [("u2", "b", "warm_test"), ("u1", "a", "train"), ("u1", "b", "train"), ("u1", "new", "train")]
    user, item, part = zip(*parts, strict=True)
    write_deltalake(str(lake / "split"), pa.table({"user_id": list(user), "item_id": list(item), "part": list(part)}))
    settings = {
        "snapshot": {"split": {"table": "split", "train": ["train"]}, "window_days": 28},
        "text": {"prompt": "Of the shop: {content}."},
    }
    facts, out = _snapshot(_run(lake, **settings))
    pairs = {(p["user_id"], p["item_id"]): p["weight"] for p in out.read("training_interactions").to_pylist()}
    assert pairs == {("u1", "a"): 2.0, ("u1", "b"): 1.0, ("u1", "new"): 1.0}
    assert facts["rejected_reasons"] == {"interactions.held_out": 1, "interactions.before_window": 1}
    assert [i["content"] for i in out.read("items_labelled").sort_by("item_id").to_pylist()] == [
        "Of the shop: A.",
        "Of the shop: Tea from the garden.",
        "Of the shop: B\nabout b.",
        "Of the shop: New.",
    ]


def test_tables_of_others_are_read_with_their_names_types_and_delta_features(spark: Any, tmp_path: Path) -> None:
    """Deletion vectors, column mapping and clustering: features that only Spark reads right. All items are warm: a good night."""
    write_deltalake(str(tmp_path / "products"), pa.table({"sku": [1, 2], "name": ["one", "two"]}))
    features = "'delta.enableDeletionVectors'='true', 'delta.columnMapping.mode'='name'"
    path = tmp_path / "modern"
    spark.sql(
        f"create table delta.`{path}` (customer int, sku int, event_time timestamp, note string) using delta "
        f"cluster by (customer) tblproperties ({features})"
    )
    rows = ", ".join(f"({u}, {i}, timestamp '2026-02-01', 'x')" for u in range(40) for i in (1, 2))
    spark.sql(f"insert into delta.`{path}` values {rows}")
    spark.sql(f"alter table delta.`{path}` rename column event_time to happened_at")
    spark.sql(f"delete from delta.`{path}` where customer = 7")
    assert list(path.rglob("deletion_vector*")), (
        "the delete rewrote its file: this table has no deletion vector to test"
    )
    names = {"user_id": "customer", "item_id": "sku", "event_time": "happened_at"}
    inputs = {
        "interactions": {"table": str(path), "columns": names},
        "items": {"table": "products", "columns": {"item_id": "sku", "title": "name"}},
    }
    facts, out = _snapshot(_run(tmp_path, inputs=inputs))
    assert {u["user_id"] for u in out.read("users").to_pylist()} == {str(u) for u in range(40)} - {"7"}
    assert facts["rows_in"]["interactions"] == 78
    assert (facts["warm"], facts["cold"]) == (2, 0)
    assert {p["last_time"] for p in out.read("training_interactions").to_pylist()} == {BEFORE}


def test_refused_inputs_are_read_anew_when_they_have_been_mended(spark: Any, tmp_path: Path) -> None:
    lake = _lake(tmp_path, [(None, "a", BEFORE, 1.0)], GOOD_ITEMS)
    refused = _run(lake)
    for _ in range(2):
        with pytest.raises(ContractError):
            execute(_run(lake), "snapshot", snapshot.run)
        assert _run(lake) == refused  # nothing has been mended yet
    write_deltalake(str(lake / "interactions"), _events(GOOD_EVENTS), mode="overwrite")
    mended = _run(lake)
    assert (mended.sequence, mended.input_versions["interactions"]) == (refused.sequence + 1, 1)
    assert execute(mended, "snapshot", snapshot.run)["rows_used"]["interactions"] == 3
    write_deltalake(str(lake / "interactions"), _events(GOOD_EVENTS[:1]), mode="append")
    assert _run(lake) == mended


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {"items": {"table": "nothing"}}}, "no Delta table 'nothing'"),
        ({"inputs": {"items": {"table": "items", "columns": {"title": "nome"}}}}, "no column 'nome'"),
        ({"inputs": {"interactions": {"table": "interactions", "columns": {"event_time": "weight"}}}}, "is double"),
        ({"inputs": {"interactions": {"table": "none"}}}, "is empty"),
    ],
)
def test_inputs_that_cannot_be_used_are_named(spark: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    lake = _lake(tmp_path, GOOD_EVENTS, GOOD_ITEMS)
    write_deltalake(str(lake / "none"), _events(GOOD_EVENTS).slice(0, 0))
    with pytest.raises(ColdRefreshError, match=message):
        _snapshot(_run(lake, **change))


def test_a_night_without_warm_items_is_refused(spark: Any, tmp_path: Path) -> None:
    with pytest.raises(ColdRefreshError, match="warm"):
        _snapshot(_run(_lake(tmp_path, GOOD_EVENTS, GOOD_ITEMS), snapshot={"warm_interactions": 50}))


def test_a_run_id_cannot_leave_the_lake(tmp_path: Path) -> None:
    settings = Settings.model_validate({"lake": str(tmp_path)})
    with pytest.raises(ColdRefreshError, match="not of the form"):
        Run(settings, DAY, "../../etc", 1, {}, "")


def test_an_unreadable_version_is_named(spark: Any, tmp_path: Path) -> None:
    lake = _lake(tmp_path, GOOD_EVENTS, GOOD_ITEMS)
    from jobs.lake import Lake, LakeError

    with pytest.raises(LakeError, match="version 99"):
        Lake(str(lake)).table("items", 99)
    with pytest.raises(LakeError, match=r"'AWS_ENDPOINT_URL'.* would reach delta-rs only"):
        Lake(str(lake), {"AWS_ENDPOINT_URL": "http://store", "timeout": "60s"})


def test_a_pinned_version_that_is_gone_is_given_up(spark: Any, tmp_path: Path) -> None:
    """Files that were vacuumed, and a table that was made anew: the run says so, and the next one reads what is there."""
    lake = _lake(tmp_path, GOOD_EVENTS, GOOD_ITEMS)
    settings = Settings.model_validate({"lake": str(lake)})
    run = open_run(settings, DAY)
    write_deltalake(str(lake / "items"), _items(GOOD_ITEMS[:2]), mode="overwrite")
    DeltaTable(str(lake / "items")).vacuum(0, dry_run=False, enforce_retention_duration=False)
    with pytest.raises(ContractError, match=r"'items' at .* cannot be read at version 0 any more"):
        execute(run, "snapshot", snapshot.run)
    again = open_run(settings, DAY)
    assert again.run_id != run.run_id
    assert again.input_versions["items"] > run.input_versions["items"]
    assert execute(again, "snapshot", snapshot.run)["rows_in"]["items"] == 2

    shutil.rmtree(lake / "interactions")
    write_deltalake(str(lake / "interactions"), _events(GOOD_EVENTS))
    anew = open_run(settings, DAY)
    assert anew.input_versions == again.input_versions
    assert anew.run_id != again.run_id
    assert open_run(settings, DAY) == anew
    stale = replace(anew, input_versions={**anew.input_versions, "items": 99})
    with pytest.raises(ContractError, match="cannot be read at version 99 any more"):
        execute(stale, "snapshot", snapshot.run)


def test_a_date_whose_rows_were_deleted_is_begun_anew(tmp_path: Path) -> None:
    lake = _lake(tmp_path, GOOD_EVENTS, GOOD_ITEMS)
    settings = Settings.model_validate({"lake": str(lake)})
    first = open_run(settings, DAY)
    DeltaTable(str(lake / "runs")).delete()
    second = open_run(settings, DAY)
    assert (first.sequence, second.sequence) == (1, 2)
    assert open_run(settings, DAY) == second != first


def test_a_snapshot_that_was_removed_is_made_again_of_the_versions_it_pinned(spark: Any, tmp_path: Path) -> None:
    run = _run(_lake(tmp_path, GOOD_EVENTS, GOOD_ITEMS))
    facts, out = _snapshot(run)
    out.complete(facts)
    run.record("snapshot", facts, 1.0, {})
    before = allmrec_night.read(out)
    row = {"conf_hash": run.conf_hash, "code_version": code_version()}
    asking = replace(run, run_id=f"{DAY:%Y%m%d}-{1:012x}")
    assert recommend.night_snapshot(asking, run, row) == out
    out.clear()
    write_deltalake(
        str(tmp_path / "interactions"), _events([("u0", "a", BEFORE, 1.0)]), mode="append"
    )  # not in the night
    assert _run(tmp_path) == run
    again = allmrec_night.read(recommend.night_snapshot(asking, run, row))
    assert (again.user_ids, again.item_ids, again.titles) == (before.user_ids, before.item_ids, before.titles)
    assert again.histories.items.tolist() == before.histories.items.tolist() == [0, 1, 1]
    other = replace(asking, settings=run.settings.model_copy(update={"seed": 8}))
    with pytest.raises(NotPublishedError, match=f"snapshot of run {run.run_id} is gone .* own settings and code"):
        recommend.night_snapshot(other, replace(run, settings=other.settings), row)
    # A table that was made anew has versions of its own.
    asking.staging("snapshot").clear()
    shutil.rmtree(tmp_path / "interactions")
    write_deltalake(str(tmp_path / "interactions"), _events([("u0", "a", BEFORE, 1.0)]))
    with pytest.raises(NotPublishedError, match="cannot be made again: an input table was made"):
        recommend.night_snapshot(asking, run, row)
