"""jobs/truth.py over a given split: the papers' protocol, read by real Spark."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from deltalake import write_deltalake

from jobs import evaluate, truth
from jobs.run import execute, open_run
from jobs.settings import load
from schemas.errors import ContractError
from tests import small_lake as small
from tests.evaluated_night import changed, pairs_of, publish, stage_snapshot
from udfs.splits import random_item


def split_run(folder, split, items=None):
    """A published run over a given split."""
    lake = folder / "lake"
    texts = {item: f"a text of {item}" for item in split["item_id"]} if items is None else items
    pairs = split[["user_id", "item_id"]]
    write_deltalake(str(lake / "interactions"), pa.Table.from_pandas(pairs, preserve_index=False))
    write_deltalake(str(lake / "items"), pa.table({"item_id": list(texts), "title": list(texts.values())}))
    write_deltalake(str(lake / "split"), pa.Table.from_pandas(split, preserve_index=False))
    conf = folder / "split.yaml"
    body = {"lake": str(lake), "snapshot": {"split": {}}, "evaluate": {"protocol": "random_item", "bootstrap": 20}}
    conf.write_text(yaml.safe_dump({**body, "spark": {"conf": {"spark.driver.memory": "1g"}}}))
    run = open_run(load(conf), small.RUN_DATE)
    execute(run, "snapshot", stage_snapshot(split[split["part"] == "train"], texts))
    execute(run, "publish", publish)
    return run


@pytest.mark.parametrize("part", ["test", "val"])
def test_the_random_item_truth_is_that_of_the_papers(tmp_path, spark, part):
    rng = np.random.default_rng(2)
    given = pd.DataFrame({"user_id": rng.integers(0, 30, 700), "item_id": rng.integers(0, 60, 700)}).astype(str)
    split = random_item(given, seed=3)
    run = split_run(tmp_path, split)
    run = changed(run, part=part)
    catalog = truth.catalog(run)
    found = truth.read(run, catalog)
    items_of = split.groupby("part")["item_id"].agg(set)
    cold_items, warm_items = items_of["cold_val"] | items_of["cold_test"], items_of["train"]
    pairs = {
        name: set(rows[["user_id", "item_id"]].itertuples(index=False, name=None))
        for name, rows in split.groupby("part")
    }
    cold, warm = pairs[f"cold_{part}"], pairs[f"warm_{part}"]
    both = {u for u, _ in cold} & {u for u, _ in warm}
    known = set().union(*pairs.values()) - cold - warm
    expected = {
        "cold": (cold_items, cold),
        "warm": (warm_items, warm),
        "overall": (cold_items | warm_items, {p for p in cold | warm if p[0] in both}),
    }
    assert list(found.tasks) == ["overall", "cold", "warm"]
    for name, (candidates, true) in expected.items():
        task = found.tasks[name]
        assert {catalog.item_ids[i] for i in task.candidates} == candidates
        assert pairs_of(task, catalog) == true
        masked = task.masked.tocoo()
        users, items = task.users[masked.row], task.candidates[masked.col]
        got = {(catalog.user_ids[u], catalog.item_ids[i]) for u, i in zip(users, items, strict=True)}
        assert got == {p for p in known if p[0] in {u for u, _ in true} and p[1] in candidates}

    few = truth.read(changed(run, max_users=8), catalog)
    asked = set().union(*(task.users for task in few.tasks.values()))
    assert (few.facts["users"], few.facts["users_asked"]) == (len({u for u, _ in cold | warm}), len(asked))
    assert [few.facts["splits"][kind]["users"] for kind in ("cold", "warm")] == [8, 8]
    for name, task in few.tasks.items():
        of_all = found.tasks[name]
        assert task.candidates.tolist() == of_all.candidates.tolist()
        at = np.searchsorted(of_all.users, task.users)
        assert of_all.users[at].tolist() == task.users.tolist()
        assert (task.truth != of_all.truth[at]).nnz == (task.masked != of_all.masked[at]).nnz == 0


def test_an_item_that_is_cold_and_warm_is_an_error(tmp_path, spark):
    split = random_item(pd.DataFrame({"user_id": ["a", "b"] * 20, "item_id": [str(i // 2) for i in range(40)]}), seed=1)
    split.loc[split.index[split["part"] == "cold_val"][0], "part"] = "warm_val"
    run = split_run(tmp_path, split)
    with pytest.raises(ContractError, match="table 'split': 1 items are in a cold part and in a warm one"):
        truth.read(run, truth.catalog(run))


def test_a_real_split_gives_the_users_and_floors_of_its_papers(tmp_path, spark, shared_data):
    folder = shared_data / "citeulike-a"
    items = pd.read_parquet(folder / "items.parquet").set_index("item_id")["title"].to_dict()
    run = split_run(tmp_path, pd.read_parquet(folder / "split.parquet"), items)
    facts = execute(run, "evaluate", evaluate.run)
    splits = facts["truth"]["splits"]
    assert (splits["overall"]["users"], splits["cold"]["candidates"]) == (4085, 3396)
    assert (splits["cold"]["pairs"], splits["warm"]["pairs"]) == (20_158, 16_482)
    cold = facts["summary"]["cold"]
    assert cold["random"]["ndcg@20"] < 0.01
    assert 0.2 > cold["text_knn"]["ndcg@20"] > cold["text_profile"]["ndcg@20"] + 0.01 > 0.16
    assert facts["summary"]["warm"]["popularity"]["ndcg@20"] > 3 * facts["summary"]["warm"]["random"]["ndcg@20"]
