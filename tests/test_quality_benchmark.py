"""The quality benchmark measures what a night measures of itself, and does not measure it twice."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from jobs.benchmark import baselines, coldllm, llminit, quality, systems
from jobs.benchmark.datasets import DATA_SETS, DataSet
from jobs.benchmark.measured import Measured
from jobs.benchmark.quality_rows import ROWS
from jobs.lake import Lake
from schemas.errors import ColdRefreshError
from tests.small_lake import RUN_DATE, SmallLake, build, tables
from udfs import splits
from udfs.ranking_metrics import task

ROW_NAMES = [
    "FilterLLM",
    "random",
    "popularity",
    "text_profile",
    "text_knn",
    "CF on warm",
    "TF-IDF",
    "text to judgment (SmolLM2)",
]


def test_the_figures_are_those_of_the_night(
    undisturbed: tuple[SmallLake, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spark: Any
) -> None:
    lake = undisturbed[0]
    monkeypatch.setitem(DATA_SETS, "small", DataSet("small", str(lake.conf), lake.run_date))
    monkeypatch.setattr(quality, "lake_of", lambda data, work: str(lake.lake))
    # The real judge, of a few pairs.
    few = partial(coldllm.JudgeOptions, history=1, fit_users=6, fit_items=1)
    monkeypatch.setattr(coldllm, "JudgeOptions", few)
    monkeypatch.setattr(coldllm, "candidates", partial(coldllm.candidates, k=2))
    args = argparse.Namespace(
        dataset=["small"],
        conf=None,
        seeds=[3],
        rows=ROW_NAMES,
        encoder=[],
        overrides=[],
        run_date=None,
        work=str(tmp_path),
    )
    result = quality.run(args)
    found = {name: one[0]["test"] for name, one in result["results"]["small"].items()}
    assert result["split_seeds"] == {"small": None}

    # The same settings and inputs: the night that is there is gone on with, and its own metrics say the same.
    metrics = Lake(str(lake.lake), {}).read("metrics").to_pylist()
    recorded = {(r["system"], f"{r['split']} {r['metric']}"): r["value"] for r in metrics if "@10" in r["metric"]}
    for name in ("cold ndcg@10", "cold recall@10"):  # later events are of new items only
        assert found["FilterLLM"][name] == pytest.approx(recorded["published", name], abs=1e-9)
        for floor in ("popularity", "text_profile", "text_knn"):
            assert found[floor][name] == pytest.approx(recorded[floor, name], abs=1e-9)
    assert found["FilterLLM"]["distribution ndcg@10"] == pytest.approx(
        recorded["distribution", "cold ndcg@10"], abs=1e-9
    )
    of_curve = next(row["value"] for row in metrics if row["metric"] == "calibration_error")
    assert found["FilterLLM"]["calibration error"] == pytest.approx(of_curve, abs=1e-9)

    assert found["CF on warm items only"]["cold ndcg@10"] == 0.0
    assert (
        found["TF-IDF ridge to the CF space"]["cold ndcg@10"] > found["random"]["cold ndcg@10"] + 0.2
    )  # the texts name the topics
    assert found["text to judgment (SmolLM2)"]["cold ndcg@10"] > 0.0
    assert [row[0] for row in result["tables"][0]["rows"]] == list(found)

    def nothing(*given: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(quality, "measure", nothing)
    assert quality.run(args) == result
    with monkeypatch.context() as changed:
        changed.setattr(quality, "_BASELINES", quality._BASELINES + 1)  # a floor that is computed in another way
        args.rows = ["text_knn"]
        with pytest.raises(AssertionError, match="measured again"):
            quality.run(args)
    args.rows = ["no such row"]
    with pytest.raises(ColdRefreshError, match="no such row"):
        quality.run(args)


def test_a_split_by_items_is_tuned_on_its_validation_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spark: Any
) -> None:
    """As the Amazon sets: a folder of the data folder, split by the benchmark itself."""
    folder = tmp_path / "data" / "shop"
    folder.mkdir(parents=True)
    for name, table in zip(("interactions", "items"), tables(), strict=True):
        pq.write_table(table, folder / f"{name}.parquet")
    evaluate = {"protocol": "random_item", "k": [5], "bootstrap": 0}
    conf = build(tmp_path / "conf", evaluate=evaluate, snapshot={"split": {"table": "split", "train": ["train"]}}).conf
    shop = DataSet("shop", str(conf), RUN_DATE + timedelta(days=30), split_seed=5)
    monkeypatch.setitem(DATA_SETS, "shop", shop)
    monkeypatch.setenv("COLD_REFRESH_DATA", str(folder.parent))
    args = argparse.Namespace(
        dataset=["shop"], conf=None, seeds=[3], rows=["FilterLLM", "random", "CF on", "TF-IDF"],
        encoder=[], overrides=[], run_date=None, work=str(tmp_path / "work"),
    )  # fmt: skip
    found = {name: one[0] for name, one in quality.run(args)["results"]["shop"].items()}
    for part in ("val", "test"):
        assert found["CF on warm items only"][part]["cold ndcg@5"] == 0.0
        for row in ("FilterLLM", "TF-IDF ridge to the CF space"):
            assert found[row][part]["cold ndcg@5"] > found["random"][part]["cold ndcg@5"] + 0.2
        assert found["FilterLLM"][part]["warm ndcg@5"] == found["CF on warm items only"][part]["warm ndcg@5"]

    split = pd.read_parquet(tmp_path / "work" / "shop-split.parquet")
    pairs = pd.read_parquet(folder / "interactions.parquet", columns=["user_id", "item_id"]).astype(str)
    pd.testing.assert_frame_equal(split, splits.random_item(pairs, 5))
    night = quality.measure(shop, str(tmp_path / "work" / "shop"), 3, [])
    for part in ("val", "test"):
        cold = night.parts[part].tasks["cold"]
        asked = {night.catalog.item_ids[cold.candidates[place]] for place in cold.truth.tocoo().col}
        assert asked == set(split.loc[split["part"] == f"cold_{part}", "item_id"])

    pq.write_table(tables(seed=12)[0], folder / "interactions.parquet")
    with pytest.raises(ColdRefreshError, match=r"was made of another shop than .*: name another --work"):
        quality.run(args)


def test_what_is_best_on_the_validation_part_is_taken() -> None:
    asked: list[str] = []

    def vectors(part: str, given: Any) -> dict[str, float]:
        asked.append(part)
        return {"overall ndcg@10": -abs(float(given[0, 0]) - 3.2), "overall ndcg@20": 0.0}

    settings = SimpleNamespace(evaluate=SimpleNamespace(k=(10,)))
    night: Any = SimpleNamespace(parts={"test": 0, "val": 0}, vectors=vectors, run=SimpleNamespace(settings=settings))
    options = {value: np.full((2, 2), value, np.float32) for value in (1.0, 2.0, 10.0)}
    assert baselines._tuned(night, options, "x")[0, 0] == pytest.approx(3.2)  # 2 with 1.6 times the length
    assert set(asked) == {"val"}


def test_without_a_validation_part_the_ridge_is_tuned_on_what_the_night_holds_out() -> None:
    rng = np.random.default_rng(0)
    texts = sparse.csr_array(rng.random((400, 12)))
    noise = rng.normal(0.0, 0.05, (400, 4))
    items = (texts @ rng.normal(size=(12, 4)) + noise).astype(np.float32)
    users = rng.normal(size=(50, 4)).astype(np.float32)
    cold, held = np.arange(400) < 100, pa.table({"item_id": [f"{item}" for item in range(150, 200)]})
    night: Any = SimpleNamespace(
        parts={"test": 0},
        catalog=SimpleNamespace(
            cold=cold, item_ids=[f"{item}" for item in range(400)], interactions=np.ones(400, np.int64)
        ),
        systems=SimpleNamespace(
            texts=texts, items=items, items_known=~cold, users=users, users_known=np.ones(50, np.bool_)
        ),
        run=SimpleNamespace(
            staging=lambda name: SimpleNamespace(read=lambda table, columns: held),
            settings=SimpleNamespace(filterllm=SimpleNamespace(word_ridge=1000.0)),
        ),
    )
    true = texts[cold] @ np.linalg.lstsq(texts.toarray(), items, rcond=None)[0]
    tuned = baselines.tfidf_ridge(night)
    assert np.linalg.norm(tuned - true) < 0.1 * np.linalg.norm(true)
    held = held.slice(0, 5)  # too few: as short as the night's own ridge makes them
    assert np.median(np.linalg.norm(baselines.tfidf_ridge(night), axis=1)) < 0.5 * np.median(
        np.linalg.norm(tuned, axis=1)
    )


def test_the_systems_cost_what_their_stages_cost(
    undisturbed: tuple[SmallLake, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spark: Any
) -> None:
    lake = undisturbed[0]
    monkeypatch.setitem(DATA_SETS, "small", DataSet("small", str(lake.conf), lake.run_date))
    monkeypatch.setattr(systems, "lake_of", lambda data, work: str(lake.lake))

    def here(module: str, function: str, **given: Any) -> Any:
        return getattr(importlib.import_module(f"jobs.benchmark.{module}"), function)(**given)

    monkeypatch.setattr(systems, "fresh", here)
    args = argparse.Namespace(
        dataset=["small"], conf=None, seeds=[3], rows=["FilterLLM"], overrides=[], work=str(tmp_path)
    )
    found = systems.run(args)["results"]["small"]["FilterLLM"][0]
    recorded = Lake(str(lake.lake), {}).read("runs").to_pylist()
    assert found["seconds"] == {
        r["stage"]: r["seconds"] for r in recorded if r["stage"] in (*systems._SHARED, *systems._SAMPLING)
    }
    metrics = Lake(str(lake.lake), {}).read("metrics").to_pylist()
    published = {r["metric"]: r["value"] for r in metrics if (r["system"], r["split"]) == ("published", "cold")}
    assert found["test"]["cold ndcg@10"] == pytest.approx(published["ndcg@10"], abs=1e-9)


def test_the_memory_of_processes_below_this_one_is_seen() -> None:
    holds = "import time; held = bytearray(b'x') * (200 << 20); print('held', flush=True); time.sleep(2)"
    with systems.PeakOfChildren(every=0.1) as peak:
        subprocess.run([sys.executable, "-c", holds], check=True, stdout=subprocess.DEVNULL)
    assert 200 << 20 < peak.bytes < 300 << 20
    with systems.PeakOfChildren(every=0.1) as nothing:
        pass
    assert nothing.bytes == 0


@pytest.mark.parametrize("system", systems.SYSTEMS)
def test_every_system_is_a_row(system: str) -> None:
    assert systems.SYSTEMS[system][0] in [row.name for row in ROWS]


def test_llminit_masks_all_that_a_user_had_otherwise() -> None:
    rng = np.random.default_rng(0)
    pairs = pd.DataFrame({"user_id": rng.integers(0, 60, 900), "item_id": rng.integers(0, 80, 900)}).astype(str)
    pairs = pairs.drop_duplicates()
    ids = {name: sorted(pairs[name].unique()) for name in ("user_id", "item_id")}
    source: Any = SimpleNamespace(pairs=pairs, user_ids=ids["user_id"], item_ids=ids["item_id"])
    split = splits.cold_users(splits.leave_one_out(pairs, 3).assign(group="all"), 3)
    assert (split["part"] == "removed").any()
    division = llminit.divide(source, "cold_users", 3)
    assert len(division.train.users) == (split["part"] == "train").sum()
    for (part, group), one in division.tasks.items():
        truth, masked = one.truth.tocsr(), one.masked.tocsr()
        for row, user in enumerate(one.users):
            own = split[split["user_id"] == ids["user_id"][user]]
            assert set(own["group"]) == {group}
            asked = own["part"] == part
            for matrix, rows in ((truth, own[asked]), (masked, own[~asked])):
                found = {ids["item_id"][one.candidates[place]] for place in matrix[[row]].indices}
                assert found == set(rows["item_id"])


def test_llminit_rows_are_measured_on_a_lake(
    undisturbed: tuple[SmallLake, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spark: Any
) -> None:
    lake = undisturbed[0]
    monkeypatch.setitem(DATA_SETS, "small", DataSet("small", str(lake.conf), lake.run_date))
    monkeypatch.setattr(llminit, "lake_of", lambda data, work: str(lake.lake))
    options = {
        "conf": None,
        "rows": ["BPR, random", "BPR, LLMInit var"],
        "protocols": ["all", "cold_users"],
        "patience": 2,
        "look": 1,
    }
    quick = ["cf.dimension=16", "cf.epochs=12", "cf.batch_size=128", "cf.learning_rate=0.01"]
    given = {
        "dataset": ["small"],
        "seeds": [3],
        "curve": None,
        "encoder": [],
        "overrides": quick,
        "work": str(tmp_path),
    }
    args = argparse.Namespace(**given, **options, out=str(tmp_path / "out"))
    result = llminit.run(args)
    found = {name: one[0] for name, one in result["results"]["small"].items()}
    assert list(found) == ["BPR, random", "BPR, LLMInit variance"]
    for one in found.values():
        assert set(one["cold_users"]["test"]) == {
            f"{group} {m}" for group in ("single", "half") for m in llminit._METRICS
        }
        assert 1 <= one["all"]["epoch"] <= one["all"]["epochs"] <= 12
        assert one["all"]["epochs"] in (one["all"]["epoch"] + 2, 12)
    # A text names its topic, so a user with one interaction begins among the right items.
    starts = [found[name]["cold_users"]["test"]["single ndcg@20"] for name in ("BPR, random", "BPR, LLMInit variance")]
    assert starts[1] > starts[0] + 0.1

    monkeypatch.setattr(llminit, "measure", lambda *given: pytest.fail("measured again"))
    assert llminit.run(args) == result
    args.rows = ["no such row"]
    with pytest.raises(ColdRefreshError, match="no such row"):
        llminit.run(args)


def test_the_table_has_every_k_and_says_how_items_are_split() -> None:
    every, none = np.arange(30), np.zeros(0, np.int64)
    asked = task(every, (np.zeros(2, np.int64), np.array([4, 14])), (none, none))
    settings = SimpleNamespace(evaluate=SimpleNamespace(k=(20, 10)))
    parts: Any = {"test": SimpleNamespace(tasks={"cold": asked})}
    night: Any = SimpleNamespace(parts=parts, run=SimpleNamespace(settings=settings))
    # Items in the order of their numbers: one of the two is among the first ten.
    found = Measured.metrics(night, "test", {"cold": lambda users: -np.tile(every, (len(users), 1)).astype(np.float32)})
    assert (found["cold recall@20"], found["cold recall@10"]) == (1.0, 0.5)

    args = argparse.Namespace(seeds=[7], overrides=["evaluate.k=[20,10]"])
    data = DATA_SETS["citeulike-a"]
    two = quality._table(data, {"FilterLLM": [{"test": found}]}, args)
    args.overrides = []
    one = quality._table(data, {"FilterLLM": [{"test": found}]}, args)
    assert one["columns"] == [
        "method", "overall ndcg@20", "cold ndcg@20", "warm ndcg@20", "overall recall@20", "cold recall@20", "warm recall@20",
        "distribution ndcg@20", "calibration error",
    ]  # fmt: skip
    of_20 = one["columns"][1:-1]
    assert two["columns"] == ["method", *of_20, *(name.replace("20", "10") for name in of_20), "calibration error"]
    assert "split as it comes or by time, trained with seeds [7]" in one["note"]
    beauty = quality._table(DATA_SETS["amazon-beauty"], {"FilterLLM": [{"test": found}]}, args)
    assert "items split at random (seed 2026), trained with seeds [7]" in beauty["note"]
    cells = dict(zip(two["columns"], two["rows"][0], strict=True))
    assert (cells["cold recall@10"], cells["cold recall@20"]) == ("0.5000", "1.0000")
