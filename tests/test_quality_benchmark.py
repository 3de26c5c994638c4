"""The quality benchmark measures what a night measures of itself, and does not measure it twice."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from jobs import plots
from jobs.benchmark import baselines, llminit, llminit_rows, quality, systems
from jobs.benchmark.choice import chosen, encoders
from jobs.benchmark.datasets import DataSet
from jobs.benchmark.quality_rows import ROWS
from jobs.benchmark.quality_rows import rows as quality_rows
from jobs.lake import Lake
from jobs.settings import Settings, load
from schemas.errors import ColdRefreshError
from tests.small_lake import RUN_DATE, SmallLake, build, tables
from udfs import splits
from udfs.llm_init import LLMInit, text_map

ROW_NAMES = ["FilterLLM", "random", "popularity", "CF on warm", "TF-IDF"]


def test_the_figures_are_those_of_the_night(
    undisturbed: tuple[SmallLake, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spark: Any
) -> None:
    lake = undisturbed[0]
    monkeypatch.setattr(quality, "DATA_SETS", {"small": DataSet("small", str(lake.conf), lake.run_date)})
    monkeypatch.setattr(quality, "lake_of", lambda data, work: str(lake.lake))
    args = argparse.Namespace(
        dataset=["small"], seeds=[3], rows=ROW_NAMES, encoder=[], overrides=[], run_date=None, work=str(tmp_path)
    )
    result = quality.run(args)
    found = {name: one[0]["test"] for name, one in result["results"]["small"].items()}

    # The same settings and inputs: the night that is there is gone on with, and its own metrics say the same.
    metrics = Lake(str(lake.lake), {}).read("metrics").to_pylist()
    recorded = {(r["system"], f"{r['split']} {r['metric']}"): r["value"] for r in metrics if "@10" in r["metric"]}
    for name in ("cold ndcg@10", "cold recall@10"):  # later events are of new items only
        assert found["FilterLLM"][name] == pytest.approx(recorded["published", name], abs=1e-9)
        assert found["popularity"][name] == pytest.approx(recorded["popularity", name], abs=1e-9)
    assert found["FilterLLM"]["distribution ndcg@10"] == pytest.approx(
        recorded["distribution", "cold ndcg@10"], abs=1e-9
    )

    assert found["CF on warm items only"]["cold ndcg@10"] == 0.0
    assert (
        found["TF-IDF ridge to the CF space"]["cold ndcg@10"] > found["random"]["cold ndcg@10"] + 0.2
    )  # the texts name the topics
    assert [row[0] for row in result["tables"][0]["rows"]] == list(found)

    def nothing(*given: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(quality, "measure", nothing)
    assert quality.run(args) == result
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
    shop = DataSet("shop", str(conf), RUN_DATE + timedelta(days=30))
    monkeypatch.setattr(quality, "DATA_SETS", {"shop": shop})
    monkeypatch.setenv("COLD_REFRESH_DATA", str(folder.parent))
    args = argparse.Namespace(
        dataset=["shop"], seeds=[3], rows=["FilterLLM", "random", "CF on", "TF-IDF"],
        encoder=[], overrides=[], run_date=None, work=str(tmp_path / "work"),
    )  # fmt: skip
    found = {name: one[0] for name, one in quality.run(args)["results"]["shop"].items()}
    for part in ("val", "test"):
        assert found["CF on warm items only"][part]["cold ndcg@5"] == 0.0
        for row in ("FilterLLM", "TF-IDF ridge to the CF space"):
            assert found[row][part]["cold ndcg@5"] > found["random"][part]["cold ndcg@5"] + 0.2
        assert found["FilterLLM"][part]["warm ndcg@5"] == found["CF on warm items only"][part]["warm ndcg@5"]

    split = pd.read_parquet(tmp_path / "work" / "shop-split.parquet")
    night = quality.measure(shop, str(tmp_path / "work" / "shop"), 3, [])
    for part in ("val", "test"):
        task = night.parts[part].tasks["cold"]
        asked = {night.catalog.item_ids[task.candidates[place]] for place in task.truth.tocoo().col}
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


def test_the_systems_cost_what_their_stages_cost(
    undisturbed: tuple[SmallLake, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spark: Any
) -> None:
    lake = undisturbed[0]
    monkeypatch.setattr(systems, "DATA_SETS", {"small": DataSet("small", str(lake.conf), lake.run_date)})
    monkeypatch.setattr(systems, "lake_of", lambda data, work: str(lake.lake))

    def here(module: str, function: str, **given: Any) -> Any:
        return getattr(importlib.import_module(f"jobs.benchmark.{module}"), function)(**given)

    monkeypatch.setattr(systems, "fresh", here)
    args = argparse.Namespace(dataset=["small"], seeds=[3], rows=["FilterLLM"], overrides=[], work=str(tmp_path))
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
    monkeypatch.setattr(llminit, "DATA_SETS", {"small": DataSet("small", str(lake.conf), lake.run_date)})
    monkeypatch.setattr(llminit, "lake_of", lambda data, work: str(lake.lake))
    options = {
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


def _curve(tmp_path: Path, **given: Any) -> argparse.Namespace:
    usual = {"dataset": ["amazon-toys"], "seeds": [1, 2], "rows": None, "protocols": ["all"], "curve": [32, 64]}
    usual |= {"encoder": [], "patience": 10, "look": 2, "overrides": []}
    return argparse.Namespace(**usual | given, work=str(tmp_path), out=str(tmp_path))


def test_the_curve_is_drawn_as_far_as_texts_are_wide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llminit, "lake_of", lambda data, work: "lake")
    source = SimpleNamespace(texts=lambda settings: np.eye(768 if settings.text.model == "/wide" else 384))
    monkeypatch.setattr(llminit, "Source", lambda data, lake: source)
    monkeypatch.setattr(llminit, "divide", lambda source, protocol, seed: None)

    def trained(settings: Settings, source: Any, *given: Any) -> dict[str, Any]:
        if settings.cf.init == "llminit":
            options = LLMInit(**settings.cf.llminit.model_dump())
            text_map(
                source.texts(settings),
                np.arange(len(source.texts(settings))),
                settings.cf.dimension,
                options,
                settings.seed,
            )
        test = {f"all {metric}": settings.cf.dimension / 1000 for metric in llminit._METRICS}
        return {"test": test, "epoch": 3, "epochs": 5, "seconds": 1.0}

    monkeypatch.setattr(llminit, "measure", trained)
    starts = ["random", "LLMInit random", "LLMInit uniform", "LLMInit variance", "LLMInit PCA"]
    result = llminit.run(_curve(tmp_path))
    assert [row[0] for row in result["tables"][0]["rows"]] == [
        f"{start}, d = {d}" for start in starts for d in (32, 64)
    ]
    text = (tmp_path / "llminit_curve_amazon-toys.svg").read_text()
    assert all(f">{word}</text>" in text for word in (*starts, "dimensions", "64"))

    args = _curve(tmp_path, curve=[64, 768], encoder=["broad=/wide"], rows=["random", "LLMInit PCA"], seeds=[1])
    result = llminit.run(args)
    assert [row[0] for row in result["tables"][0]["rows"]] == [
        "random, d = 64", "random, d = 768", "LLMInit PCA, d = 64", "LLMInit PCA, broad, d = 64", "LLMInit PCA, broad, d = 768",
    ]  # fmt: skip
    assert "LLMInit PCA, d = 768: left out, LLMInit: cf.dimension is 768" in capsys.readouterr().err
    assert "LLMInit PCA, broad" in (tmp_path / "llminit_curve_amazon-toys_broad.svg").read_text()
    assert (tmp_path / "llminit_curve_amazon-toys.svg").read_text() == text


def test_as_many_curves_as_there_are_have_a_line_each() -> None:
    names = [f"start {number}" for number in range(12)]
    text = plots.curves({name: [(32.0, 0.1), (64.0, 0.2)] for name in names}, "d", "ndcg")
    assert all(f">{name}</text>" in text for name in names)


def test_all_of_the_text_is_as_wide_as_the_encoder_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = {"minilm": 384, "/wide": 768, "/mine": 96}
    source: Any = SimpleNamespace(texts=lambda settings: np.zeros((2, widths[settings.text.model])))
    monkeypatch.setattr(llminit, "divide", lambda source, protocol, seed: None)
    monkeypatch.setattr(llminit, "measure", lambda settings, *given: {"dimension": settings.cf.dimension})
    by_name = {row.name: row for row in llminit_rows.rows({"broad": "/wide"})}

    def dimension(name: str, *overrides: str) -> int:
        args = _curve(tmp_path, overrides=list(overrides))
        found: int = llminit._cell(by_name[name], source, "amazon-toys", "lake", 1, args)["all"]["dimension"]
        return found

    assert dimension("LightGCN, LLMInit full") == 384
    assert dimension("LightGCN, LLMInit full", "text.model=/mine") == 96
    assert dimension("LightGCN, LLMInit full, broad") == 768
    assert dimension("LightGCN, LLMInit PCA, broad") == 128


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mpnet"], r"'mpnet': give NAME=FOLDER"),
        (["=./folder"], "give NAME=FOLDER"),
        (["mpnet="], "give NAME=FOLDER"),
        (["a=./x", "a=./y"], r"a is given twice, as \./x and as \./y"),
    ],
)
def test_an_encoder_that_is_not_named_or_nowhere_is_said(given: list[str], message: str) -> None:
    with pytest.raises(ColdRefreshError, match=message):
        encoders(given)


def test_encoders_are_rows_by_the_name_they_are_given() -> None:
    others = encoders(["broad=/some/a=b", "mine=./c"])
    assert others == {"broad": "/some/a=b", "mine": "./c"}
    names = [row.name for row in llminit_rows.rows(others)]
    assert chosen(["LightGCN, LLMInit variance, mine"], names) == ["LightGCN, LLMInit variance, mine"]
    names = [row.name for row in quality_rows(others)]
    assert chosen(["broad", "MiniLM + mine"], names) == ["broad", "MiniLM + mine"]
    with pytest.raises(ColdRefreshError, match=r"two rows each called \['MiniLM \+ words'\]"):
        chosen(None, [row.name for row in quality_rows({"MiniLM": "./c"})])
    with pytest.raises(ColdRefreshError, match=r"two rows each called \['LightGCN, LLMInit variance, raw'\]"):
        chosen(None, [row.name for row in llminit_rows.rows({"raw": "./c"})])


@pytest.mark.parametrize("row", llminit_rows.rows({"broad": "/some/folder"}), ids=lambda row: row.name)
def test_every_llminit_row_is_a_setting_of_the_confs(row: llminit_rows.Row) -> None:
    found = load("conf/amazon.yaml", [*llminit_rows.BASE, *row.overrides])
    assert found.cf.model in ("bpr", "lightgcn", "sgl", "sgcl")
    assert found.cf.init == ("llminit" if "LLMInit" in row.name else "random")
    assert found.text.model == (
        "/some/folder" if "broad" in row.name else "smollm2" if "SmolLM2" in row.name else "minilm"
    )
    assert found.cf.learning_rate == (0.001 if found.cf.model == "sgcl" else 0.005)
    assert (
        load("conf/amazon.yaml", [*llminit_rows.BASE, *row.overrides, "cf.learning_rate=0.02"]).cf.learning_rate == 0.02
    )


@pytest.mark.parametrize("row", quality_rows({"broad": "/some/folder"}), ids=lambda row: row.name)
def test_every_row_is_a_setting_of_the_confs(row: quality.Row) -> None:
    given = row.settings()
    assert ("/some/folder" in "".join(given)) == ("broad" in row.name)
    confs = ("conf/citeulike.yaml", "conf/amazon.yaml")
    assert any(load(conf).digest() != load(conf, given).digest() for conf in confs) == bool(row.overrides)


@pytest.mark.parametrize("model", ["BPR", "LightGCN", "SGL", "SGCL"])
@pytest.mark.parametrize(
    ("start", "select"),
    [
        ("", None), (" from LLMInit", "variance"), (" from LLMInit, PCA", "pca"),
        (" from LLMInit, random", "random"), (" from LLMInit, uniform", "uniform"),
    ],
)  # fmt: skip
def test_every_backbone_has_its_own_settings_from_every_start(model: str, start: str, select: str | None) -> None:
    row = next(row for row in ROWS if row.name == f"CF: {model}{start}")

    def given(*overrides: str) -> Settings:
        return load("conf/citeulike.yaml", row.settings(overrides))

    one = given()
    assert (one.cf.model, one.cf.dimension, one.cf.epochs, one.refresh.scale) == (model.lower(), 64, 40, "auto")
    assert (one.cf.learning_rate, one.cf.batch_size) == (0.001 if model == "SGCL" else 0.005, 2048)
    assert (one.cf.init, one.cf.llminit.select if select else None) == ("llminit" if select else "random", select)
    # What a row is cannot be changed, what is tuned can.
    other = given("cf.model=als", "cf.learning_rate=0.02", "cf.epochs=3", "refresh.scale=2")
    assert (other.cf.model, other.cf.learning_rate, other.cf.epochs, other.refresh.scale) == (
        model.lower(), 0.02, 3, 2,
    )  # fmt: skip


def test_the_papers_union_is_of_twenty_users_that_count_alike() -> None:
    by_name = {row.name: load("conf/citeulike.yaml", row.overrides) for row in ROWS if "retrained" in row.name}
    ours, papers = by_name.values()
    assert [("the paper's" in name) for name in by_name] == [False, True]
    assert ours.refresh.method == papers.refresh.method == "retrain"
    assert (ours.sampling.k, ours.refresh.by_probability) == (100, True)
    assert (papers.sampling.k, papers.refresh.by_probability) == (20, False)
