"""jobs/truth.py and jobs/evaluate.py: truth read by real Spark, metrics in a real Delta table, against plain pandas."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import write_deltalake

from jobs import evaluate, truth
from jobs.run import execute, open_run
from jobs.settings import load
from schemas.table import table as schema
from tests import small_lake as small
from tests.evaluated_night import changed, pairs_of, publish, stage_snapshot, temporal, train, vector
from tests.test_ranking_metrics import reference

FIRST = pa.scalar(datetime(2026, 3, 1, tzinfo=UTC), pa.timestamp("us", tz="UTC"))


@pytest.fixture(scope="module")
def night(tmp_path_factory, spark):
    """A night that is published before anything of what follows is known. Returns (run, all events, conf)."""
    folder = tmp_path_factory.mktemp("night")
    built = small.build(folder)
    events = small.tables()[0]
    events = events.append_column("weight", pa.nulls(events.num_rows, pa.float64()))
    past = events.filter(pc.less(events["event_time"], FIRST))
    stray = pa.table({"user_id": ["tea-user-00"], "item_id": ["tea-0"], "event_time": [pc.add(FIRST, timedelta(999))]})
    stray = stray.append_column("weight", pa.array([1.0]))
    rows = pa.concat_tables([past, stray])
    write_deltalake(str(built.lake / "interactions"), rows, mode="overwrite", schema_mode="overwrite")
    run = open_run(load(built.conf), built.run_date)
    items = {row["item_id"]: f"{row['title']} {row['text']}" for row in small.tables()[1].to_pylist()}
    execute(run, "snapshot", stage_snapshot(past.to_pandas()[["user_id", "item_id"]].drop_duplicates(), items))
    execute(run, "filterllm_train", train)
    execute(run, "publish", publish)
    return run, events, built.conf


def test_a_night_without_truth_says_so_and_writes_nothing(night, capsys):
    run = night[0]
    facts = execute(run, "evaluate", evaluate.run)
    assert facts["metrics"] == 0
    assert "measured when events of 2026-03-09 are known" in facts["note"]
    assert facts["note"] in capsys.readouterr().err
    assert run.lake.read("metrics", refresh_date=run.run_date).num_rows == 0


def test_protocol_none_measures_nothing(night):
    run = night[0]
    found = truth.read(changed(run, protocol="none"), truth.catalog(run))
    assert (found.tasks, "none" in found.facts["note"]) == ({}, True)


@pytest.fixture(scope="module")
def later(night):
    """The same night when what followed it is known; among it rows that count for nothing."""
    run, events, _ = night
    future = events.filter(pc.greater_equal(events["event_time"], FIRST))
    known = run.staging("snapshot").read("training_interactions").to_pylist()[0]
    days, instant = timedelta(days=1), timedelta(microseconds=1)
    more = [
        ("a stranger", "tea-new-0", 2 * days, None),
        (None, "tea-new-0", 2 * days, None),
        ("tea-user-01", "an item of later", 2 * days, None),
        ("tea-user-02", "chess-new-0", 99 * days, None),  # after the horizon
        ("tea-user-05", "yarn-0", 2 * days, 3.0),
        ("tea-user-05", "yarn-0", 3 * days, None),  # the same pair twice
        ("chess-user-07", "bike-3", 2 * days, None),
        ("chess-user-08", "bike-4", 0 * days, None),  # on both borders
        ("chess-user-08", "bike-5", 9 * days - instant, None),
        ("chess-user-08", "bike-6", 9 * days, None),
        *[("yarn-user-09", f"bike-{n}", 2 * days, w) for n, w in enumerate([0.0, -1.0, float("nan"), float("inf")])],
        (known["user_id"], known["item_id"], 2 * days, None),  # a pair that is known already
    ]
    user_id, item_id, after, weight = zip(*more, strict=True)
    when = pa.array([run.midnight + one for one in after], pa.timestamp("us", tz="UTC"))
    rows = pa.table({"user_id": list(user_id), "item_id": list(item_id), "event_time": when, "weight": list(weight)})
    write_deltalake(run.lake.path("interactions"), pa.concat_tables([future, rows]), mode="append")
    return night


def history_of(catalog):
    """Everybody's training pairs, as indices."""
    pairs = catalog.staged.read("training_interactions").to_pandas()
    return set(pairs[["user_idx", "item_idx"]].itertuples(index=False, name=None))


def usable(run):
    """Events by named users whose weight is null or a finite number above 0, as pandas."""
    events = run.lake.table("interactions").to_pyarrow_table()
    weight = pc.fill_null(events["weight"], 1.0)
    return events.filter(pc.and_(pc.greater(weight, 0), pc.is_finite(weight))).to_pandas().dropna(subset="user_id")


def test_the_rule_of_the_temporal_truth_knows_only_what_was_before():
    at = datetime(2024, 3, 1, tzinfo=UTC)
    events = pd.DataFrame(
        [
            ("a", "old", "2024-02-29T23:59:59"),
            ("a", "old", "2024-03-02"),  # a pair that is known already
            ("b", "old2", "2024-01-01"),
            ("b", "old", "2024-03-01"),  # the first instant of the test
            ("a", "new", "2024-03-10T23:59:59"),
            ("a", "new", "2024-03-05"),  # the same pair twice
            ("b", "new", "2024-03-11"),  # the first instant after the horizon
            ("stranger", "new", "2024-03-02"),
            ("b", "timeless", None),
        ],
        columns=["user_id", "item_id", "event_time"],
    )
    events["event_time"] = pd.to_datetime(events["event_time"], format="ISO8601", utc=True)
    split = temporal(events, at, horizon_days=10)
    assert list(split.itertuples(index=False, name=None)) == [
        ("a", "new", "cold_test"), ("a", "old", "train"), ("b", "old", "warm_test"), ("b", "old2", "train"),
        ("b", "timeless", "train"),
    ]  # fmt: skip


def test_the_temporal_truth_is_that_of_the_rule(later):
    run, _, _ = later
    catalog = truth.catalog(run)
    found = truth.read(run, catalog, run.lake.version("interactions"))
    rule = temporal(usable(run), run.midnight, run.settings.evaluate.horizon_days)
    rule = rule[rule["item_id"] != "an item of later"]
    cold = set(rule.loc[rule["part"] == "cold_test", ["user_id", "item_id"]].itertuples(index=False, name=None))
    warm = set(rule.loc[rule["part"] == "warm_test", ["user_id", "item_id"]].itertuples(index=False, name=None))
    assert len(cold) == 160
    borders = {("chess-user-08", "bike-4"), ("chess-user-08", "bike-5")}
    assert warm == {("tea-user-05", "yarn-0"), ("chess-user-07", "bike-3")} | borders
    assert pairs_of(found.tasks["cold"], catalog) == cold
    assert pairs_of(found.tasks["warm"], catalog) == warm
    both = {user for user, _ in warm}
    assert pairs_of(found.tasks["overall"], catalog) == {pair for pair in cold | warm if pair[0] in both}
    assert len(found.tasks["cold"].candidates) == 12
    assert len(found.tasks["warm"].candidates) == 48
    assert (found.facts["pairs_of_unknown_users"], found.facts["pairs_of_unknown_items"]) == (1, 1)
    assert found.facts["users"] == found.facts["users_asked"] == 80
    history = history_of(catalog)
    masked = found.tasks["warm"].masked.tocoo()
    users, items = found.tasks["warm"].users[masked.row], found.tasks["warm"].candidates[masked.col]
    assert set(zip(users, items, strict=True)) == {p for p in history if p[0] in set(found.tasks["warm"].users)}


def test_cold_items_that_nobody_takes_are_candidates_too(later):
    run = changed(later[0], horizon_days=2)
    catalog = truth.catalog(run)
    found = truth.read(run, catalog, run.lake.version("interactions"))
    rule = temporal(usable(run), run.midnight, 2)
    taken = set(rule[rule["part"] == "cold_test"]["item_id"])
    assert 0 < len(taken) < 12
    assert {item for _, item in pairs_of(found.tasks["cold"], catalog)} == taken
    assert set(found.tasks["cold"].candidates) == set(np.flatnonzero(catalog.cold))


def test_a_date_that_nobody_measured_in_time_is_measured_late(later, capsys):
    """Three days behind the day on which it was due, once; nothing is due on that day itself."""
    run, _, conf = later
    day = str(run.run_date + timedelta(days=run.settings.evaluate.horizon_days + 3))
    for measured in ([str(run.run_date)], []):
        assert evaluate.main(["--conf", str(conf), "--due", day]) == 0
        out, err = capsys.readouterr()
        facts = json.loads(out.splitlines()[-1])
        assert (facts["run_date"], facts["metrics"], facts["measured"]) == ("2026-03-04", 0, measured)
        assert "no run of 2026-03-04 has published" in err
    assert set(run.lake.read("metrics", refresh_date=run.run_date)["run_id"].to_pylist()) == {run.run_id}


def own_metrics(run):
    rows = run.lake.read("metrics", refresh_date=run.run_date)
    return rows.filter(pc.equal(rows["run_id"], run.run_id)).to_pandas()


def test_evaluating_again_measures_and_replaces(later, capsys):
    run, _, conf = later
    other = {"refresh_date": run.run_date, "run_id": "another run of the date", "split": "cold", "system": "published"}
    row = pa.Table.from_pylist([{**other, "metric": "ndcg@10", "value": 0.5, "n": 1}], schema("metrics").arrow_schema)
    run.lake.commit("metrics", row, app="t/other")
    assert evaluate.main(["--conf", str(conf), "--run-date", str(run.run_date)]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    cold = facts["summary"]["cold"]
    assert facts["run_id"] == run.run_id
    assert list(cold) == ["published", "distribution", "text_knn", "text_profile", "popularity", "random"]
    of_topics = ("published", "text_knn", "text_profile")
    assert min(cold[name]["ndcg@10"] for name in of_topics) > cold["random"]["ndcg@10"] + 0.2
    rows = own_metrics(run)
    assert len(rows) == facts["metrics"]
    assert not rows.duplicated(["run_id", "split", "system", "metric"]).any()
    curve, rows = rows[rows["split"] == "reliability"], rows[rows["split"] != "reliability"]
    assert facts["calibration_error"] == round(curve.set_index("metric")["value"]["calibration_error"], 4)
    assert len(rows) == (5 + 6 + 5) * 3  # systems of each split, metrics
    assert ((rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"])).all()
    assert set(rows.loc[rows["split"] == "cold", "n"]) == {80}

    due = str(run.run_date + timedelta(days=run.settings.evaluate.horizon_days))
    assert evaluate.main(["--conf", str(conf), "--due", due, "--set", "evaluate.k=[5]"]) == 0
    assert "made with other settings" in capsys.readouterr().err
    rows = own_metrics(run)
    assert set(rows.loc[rows["split"] != "reliability", "metric"]) == {"ndcg@5", "recall@5", "hit@5"}
    rest = run.lake.read("metrics", refresh_date=run.run_date).filter(pc.field("run_id") != run.run_id)
    assert rest.to_pylist() == row.to_pylist()


def test_published_is_the_inner_product_of_the_published_vectors_and_popularity_the_pairs_count(later):
    run = later[0]
    catalog = truth.catalog(run)
    found = truth.read(run, catalog, run.lake.version("interactions"))
    rows = {(r["split"], r["system"], r["metric"]): r["value"] for r in evaluate.measure(run, catalog, found)}
    scores = np.array([[vector(u) @ vector(i) for i in catalog.item_ids] for u in catalog.user_ids])
    scores[-1], scores[:, -1] = -np.inf, -np.inf  # `publish` has left them out
    history = history_of(catalog)
    popularity = np.zeros_like(scores)
    for _, item in history:
        popularity[:, item] += 1
    assert len(np.unique(popularity[0])) > 4
    for split, task in found.tasks.items():
        true = task.truth.tocoo()
        pairs = set(zip(task.users[true.row], task.candidates[true.col], strict=True))
        for system, of in (("published", scores), ("popularity", popularity)):
            expected = reference(of, task.candidates.tolist(), pairs, history, (10,))
            for metric, values in expected.items():
                mean = np.mean(list(values.values()))
                assert rows[split, system, metric] == pytest.approx(mean, abs=1e-9), (split, system, metric)


def test_the_neighbours_of_a_text_are_items_that_somebody_has(later):
    run = later[0]
    catalog = truth.catalog(run)
    neighbours = evaluate.Systems.published(run, catalog).neighbours
    had = set(np.flatnonzero(catalog.interactions).tolist())
    assert set(neighbours.indices.tolist()) == had < set(range(len(catalog.item_ids)))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_distribution_is_that_of_the_model(later, normalize):
    run = changed(later[0], normalize_by_item=normalize)
    catalog = truth.catalog(run)
    found = truth.read(run, catalog, run.lake.version("interactions"))
    rows = {(r["split"], r["system"], r["metric"]): r["value"] for r in evaluate.measure(run, catalog, found)}
    logits = np.array([[2 * vector(u) @ vector(i) for i in catalog.item_ids] for u in catalog.user_ids[1:]])
    logits += np.linspace(-1, 1, len(logits))[:, None]
    if normalize:
        logits -= np.log(np.exp(logits).sum(axis=0))
    scores = np.vstack([np.full((1, logits.shape[1]), -np.inf), logits])  # the first user is not in the vocabulary
    task = found.tasks["cold"]
    true = task.truth.tocoo()
    pairs = set(zip(task.users[true.row], task.candidates[true.col], strict=True))
    expected = reference(scores, task.candidates.tolist(), pairs, set(), (10,))
    for metric, values in expected.items():
        assert rows["cold", "distribution", metric] == pytest.approx(np.mean(list(values.values())), abs=1e-9)
    assert ("warm", "distribution", "ndcg@10") not in rows


def test_the_reliability_curve_is_of_the_models_users_and_the_cold_items_truth(later):
    run = later[0]
    catalog = truth.catalog(run)
    found = truth.read(run, catalog, run.lake.version("interactions"))
    rows = [row for row in evaluate.measure(run, catalog, found) if row["split"] == "reliability"]
    task = found.tasks["cold"]
    logits = np.array(
        [[2 * vector(u) @ vector(catalog.item_ids[i]) for i in task.candidates] for u in catalog.user_ids]
    )
    logits = logits[1:] + np.linspace(-1, 1, len(logits) - 1)[:, None]  # the first user is not in the vocabulary
    p = np.exp(logits) / np.exp(logits).sum(axis=0)
    q = np.zeros((len(catalog.user_ids), len(task.candidates)))
    true = task.truth.tocoo()
    q[task.users[true.row], true.col] = 1
    q = q[1:]
    kept = q.sum(axis=0) > 0
    p, q = p[:, kept], q[:, kept] / q[:, kept].sum(axis=0)
    bins = np.floor(3 * np.log10(p)).astype(int) + 27
    expected = {"calibration_error": (0.0, int(kept.sum()))}
    for number in np.unique(bins):
        there = bins == number
        expected[f"p@{number}"] = p[there].mean(), int(there.sum())
        expected[f"q@{number}"] = q[there].mean(), int(there.sum())
        gap = abs(p[there].sum() - q[there].sum()) / kept.sum()
        expected["calibration_error"] = expected["calibration_error"][0] + gap, int(kept.sum())
    assert {row["metric"]: row["n"] for row in rows} == {name: n for name, (_, n) in expected.items()}
    for row in rows:
        assert row["value"] == pytest.approx(expected[row["metric"]][0], rel=1e-4), row["metric"]
    assert {row["system"] for row in rows} == {"distribution"}


def test_what_is_not_published_cannot_be_evaluated(night, capsys):
    conf, due = ["--conf", str(night[2])], ["--due", "2026-02-10"]
    assert evaluate.main([*conf, "--run-date", "2026-02-01"]) == 1
    assert "no run of 2026-02-01 has published" in capsys.readouterr().err
    assert evaluate.main([*conf, *due, "--set", "lake=/no/such/lake"]) == 1
    assert "is this the lake?" in capsys.readouterr().err
    assert evaluate.main([*conf, *due]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["run_date"], summary["metrics"]) == ("2026-02-01", 0)


def test_a_snapshot_that_is_gone_is_not_made_again_with_other_settings(tmp_path, capsys):
    run = open_run(load(small.build(tmp_path).conf), small.RUN_DATE)
    run.record("publish", {}, 0.0, {})
    argv = ["--conf", str(tmp_path / "small.yaml"), "--run-date", str(run.run_date), "--set", "snapshot.window_days=9"]
    assert evaluate.main(argv) == 1
    assert f"the staged snapshot of run {run.run_id} is gone" in capsys.readouterr().err


def test_the_night_itself_reads_no_training_pairs(night, monkeypatch):
    run, catalog = night[0], truth.catalog(night[0])
    users = np.array([3, 5])
    read = catalog.history(users)
    assert set(zip(*read.nonzero(), strict=True)) == {pair for pair in history_of(catalog) if pair[0] in users}
    monkeypatch.setattr(truth.Catalog, "history", lambda *_: pytest.fail("it was read"))
    assert truth.read(run, catalog).tasks == {}


def test_of_many_users_some_are_asked_whom_a_hash_draws(later, capsys):
    run = later[0]
    catalog, version = truth.catalog(run), run.lake.version("interactions")
    everybody = truth.read(run, catalog, version)
    few = truth.read(changed(run, max_users=30), catalog, version)
    assert "30 each are asked at most (evaluate.max_users)" in capsys.readouterr().err
    sizes = [{split: len(one.tasks[split].users) for split in ("cold", "warm")} for one in (everybody, few)]
    assert sizes[1] == {split: min(30, size) for split, size in sizes[0].items()}
    assert sizes[0]["cold"] > 30
    asked = set(few.tasks["cold"].users) | set(few.tasks["warm"].users)
    assert (few.facts["users"], few.facts["users_asked"]) == (80, len(asked))
    for split, task in few.tasks.items():
        of_all = everybody.tasks[split]
        assert task.candidates.tolist() == of_all.candidates.tolist()
        at = np.searchsorted(of_all.users, task.users)
        assert of_all.users[at].tolist() == task.users.tolist()
        for one, other in ((task.truth, of_all.truth), (task.masked, of_all.masked)):
            assert (one != other[at]).nnz == 0
    # The fewer are among the more; another seed draws others.
    fewer = truth.read(changed(run, max_users=10), catalog, version).tasks["cold"].users
    assert set(fewer) < set(few.tasks["cold"].users)
    others = truth.read(changed(run, run.settings.seed + 1, max_users=10), catalog, version).tasks["cold"].users
    assert set(others) != set(fewer)
    rows = evaluate.measure(run, catalog, few)
    assert {row["system"]: row["n"] for row in rows if row["split"] == "cold"} == dict.fromkeys(evaluate.SYSTEMS, 30)
    # Probabilities are compared with all users of an item, asked or not.
    curves = [
        [row for row in one if row["split"] == evaluate.RELIABILITY]
        for one in (rows, evaluate.measure(run, catalog, everybody))
    ]
    assert curves[0] == curves[1] != []


def test_a_lake_of_too_many_items_has_no_floor_that_compares_them_all(later, monkeypatch):
    run = later[0]
    catalog = truth.catalog(run)
    task = truth.read(run, catalog, run.lake.version("interactions")).tasks["warm"]
    named = [name for name, _ in evaluate.Systems.published(run, catalog).of("warm", task)]
    assert named == ["published", "text_knn", "text_profile", "popularity", "random"]
    monkeypatch.setattr(evaluate, "_COMPARED_ITEMS", len(catalog.item_ids) - 1)
    assert [name for name, _ in evaluate.Systems.published(run, catalog).of("warm", task)] == [
        n for n in named if n != "text_knn"
    ]
